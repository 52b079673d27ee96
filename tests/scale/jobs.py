"""A small job on a small random model, and what of it ends up where."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.scale.harvest import HarvestReport, harvest
from tests.models import make_bloom, random_tokens

RESIDUAL, NEURONS = "blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"
HOOKS = [RESIDUAL, NEURONS]
CONTEXT, BATCH, SHARD = 8, 3, 2  # tokens a sequence, sequences a batch, batches a shard


def make_bridge(dtype: torch.dtype = torch.float32, **settings: Any) -> TransformerBridge:
    """Three layers with random gains and biases."""
    return TransformerBridge(make_bloom(dtype, **settings).eval())


def documents(seed: int = 0, count: int = 40) -> dict[str, list[list[int]]]:
    """Ids of documents of 1 to 13 tokens, of two labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (2, count), generator=generator).tolist()
    return {
        label: [random_tokens(1, size, seed=100 * row + index)[0].tolist() for index, size in enumerate(sizes)]
        for row, (label, sizes) in enumerate(zip(("aa", "bb"), lengths, strict=True))
    }


def packed(seed: int = 0) -> Corpus:
    """Sequences of exactly :data:`CONTEXT` tokens."""
    return Corpus.from_tokens(documents(seed), context=CONTEXT)


def padded(seed: int = 0) -> Corpus:
    """A document a sequence."""
    return Corpus.from_tokens(documents(seed), context=CONTEXT, packing="documents")


def run(
    out: Path, bridge: TransformerBridge | None = None, corpus: Corpus | None = None, **given: Any
) -> HarvestReport:
    """Harvest with the settings above unless others are given."""
    settings = {"batch_size": BATCH, "batches_per_shard": SHARD, "hooks": HOOKS, "progress": False} | given
    return harvest(bridge or make_bridge(), corpus or packed(), out=out, **settings)


def contents(folder: Path) -> dict[str, str]:
    """Every file's checksum."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def by_hand(
    bridge: TransformerBridge, corpus: Corpus, label: str, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """What should be stored, by Hugging Face's own modules and nothing of ours: ``[rows, d]``."""
    model: Any = bridge.hf_model
    kept: dict[str, list[Tensor]] = {RESIDUAL: [], NEURONS: []}
    shown: dict[str, Tensor] = {}
    block, mlp = model.transformer.h[1], model.transformer.h[0].mlp.dense_4h_to_h
    handles = [
        block.register_forward_hook(lambda module, given, output: shown.update({RESIDUAL: output[0]})),
        mlp.register_forward_pre_hook(lambda module, given: shown.update({NEURONS: given[0]})),
    ]
    with torch.no_grad():
        for batch in corpus.batches(BATCH, labels=label, padding_side=side):
            model(batch.tokens, attention_mask=batch.attention_mask.long() if batch.is_padded else None)
            for name, found in kept.items():
                found.append(shown[name][batch.attention_mask])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in kept.items()}
