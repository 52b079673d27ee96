"""TransformerLens' cache methods beside ours, as :mod:`tests.peer.beside` runs it, in a process of its own.

Both bridges have processed weights and are run on the same ids. Every method is called with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge
from tests.families import make_family
from tests.models import make_bloom, random_tokens

FAMILIES = ("bloom", "gpt2", "llama", "gemma2")
TOKENS = random_tokens()
D_MODEL = 48
DIRECTIONS = torch.randn(D_MODEL, 2, generator=torch.Generator().manual_seed(5))
LABELLED = {"return_labels": True}

CALLS: Mapping[str, Callable[[Any], Any]] = {
    "accumulated_resid": lambda cache: cache.accumulated_resid(**LABELLED),
    "accumulated_resid to 2, mids": lambda cache: cache.accumulated_resid(2, incl_mid=True, mlp_input=True, **LABELLED),
    "accumulated_resid of the norm": lambda cache: cache.accumulated_resid(apply_ln=True, pos_slice=-1, **LABELLED),
    "accumulated_resid of ln1": lambda cache: cache.accumulated_resid(2, apply_ln=True, **LABELLED),
    "decompose_resid": lambda cache: cache.decompose_resid(**LABELLED),
    "decompose_resid of ln2": lambda cache: cache.decompose_resid(1, mlp_input=True, apply_ln=True, **LABELLED),
    "decompose_resid attn": lambda cache: cache.decompose_resid(2, mode="attn", pos_slice=(1, 4), **LABELLED),
    "stack_head_results": lambda cache: cache.stack_head_results(incl_remainder=True, pos_slice=[3, 1], **LABELLED),
    "stack_head_results of ln1": lambda cache: cache.stack_head_results(2, apply_ln=True, **LABELLED),
    "stack_neuron_results": lambda cache: cache.stack_neuron_results(
        2, neuron_slice=(3, 9), incl_remainder=True, **LABELLED
    ),
    "stack_neuron_results projected": lambda cache: cache.stack_neuron_results(
        -1, apply_ln=True, incl_remainder=True, project_output_onto=DIRECTIONS, **LABELLED
    ),
    "get_neuron_results": lambda cache: (cache.get_neuron_results(1, 7, pos_slice=-1), []),
    "get_full_resid_decomposition": lambda cache: cache.get_full_resid_decomposition(pos_slice=-1, **LABELLED),
    "get_full_resid_decomposition projected": lambda cache: cache.get_full_resid_decomposition(
        2, mlp_input=True, expand_neurons=False, apply_ln=True, project_output_onto=DIRECTIONS[:, 0], **LABELLED
    ),
    "apply_ln_to_stack": lambda cache: (cache.apply_ln_to_stack(cache.decompose_resid(), batch_slice=1), []),
    "logit_attrs": lambda cache: (cache.logit_attrs(cache.decompose_resid(), TOKENS[:, 0], TOKENS[:, 1]), []),
    "logit_attrs of a stack of heads": lambda cache: (
        cache.logit_attrs(cache.stack_head_results(pos_slice=2), 5, pos_slice=2),
        [],
    ),
    "stack_activation": lambda cache: (cache.stack_activation("z"), []),
    "apply_slice_to_batch_dim": lambda cache: cache.apply_slice_to_batch_dim(1).decompose_resid(**LABELLED),
    "logit_lens": lambda cache: (cache.logit_lens(positions=None).values.log_softmax(-1), []),
}


def ranks(cache: Any) -> tuple[Tensor, list[str]]:
    """Ranks and labels of the lens."""
    lens = cache.logit_lens(targets=[5, 9], incl_mid=True)
    return lens.rank_trajectory(9).float(), list(lens.labels)


def made(name: str) -> Any:
    return make_bloom() if name == "bloom" else make_family(name)


def called(cache: Any) -> dict[str, tuple[Tensor, list[str]] | str]:
    """What each method gives, or its error."""
    found: dict[str, tuple[Tensor, list[str]] | str] = {}
    for name, call in {**CALLS, "logit_lens of targets": ranks}.items():
        try:
            tensor, labels = call(cache)
            found[name] = tensor.detach().double(), list(map(str, labels))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def compared(ours: Any, theirs: Any) -> dict[str, Any]:
    """How far two results are apart, relative to the largest number, and their labels; a row of theirs without counterpart
    (a bias of a model that has none) has to be zero.
    """
    if isinstance(ours, str) or isinstance(theirs, str):
        return {"ours": ours if isinstance(ours, str) else "", "theirs": theirs if isinstance(theirs, str) else ""}
    (mine, labels), (other, others) = ours, theirs
    extra = 0.0
    if others and set(others) - set(labels) == {"bias"}:
        row = others.index("bias")
        extra = float(other[row].abs().max())
        other, others = torch.cat([other[:row], other[row + 1 :]]), others[:row] + others[row + 1 :]
    same = labels == others and mine.shape == other.shape
    if not same:
        return {"labels": [labels, others], "shapes": [list(mine.shape), list(other.shape)]}
    difference, size = mine - other, float(other.abs().max())
    # A residual's mean over features is nothing that a LayerNorm sees: of BLOOM's embedding theirs leaves it in.
    centred = difference - difference.mean(-1, keepdim=True) if mine.shape[-1] == D_MODEL else difference
    return {
        "labels": True,
        "apart": float(difference.abs().max()) / size,
        "centred": float(centred.abs().max()) / size,
        "extra": extra,
    }


@torch.no_grad()
def before() -> dict[tuple[str, bool], Any]:
    """Of each family, processed and not, what our methods give and what they miss the whole by."""
    mine = {}
    for name in FAMILIES:
        for processed in (True, False):
            bridge = TransformerBridge(made(name))
            if processed:
                bridge.process_weights()
            cache = bridge.run_with_cache(TOKENS)[1]
            mine[name, processed] = called(cache), misses(cache, cache.logit_bias(TOKENS[:, 0]))
    return mine


@torch.no_grad()
def beside(mine: dict[tuple[str, bool], Any], tokenizer: Any) -> dict[str, Any]:
    """By family and method, how far the two are apart; and what either misses the whole by."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs

    found: dict[str, Any] = {}
    for (name, processed), (results, missed) in mine.items():
        model = made(name)
        model.config.architectures = [type(model).__name__]
        theirs = Theirs.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")
        if processed:
            theirs.enable_compatibility_mode(disable_warnings=True)
        cache = theirs.run_with_cache(TOKENS)[1]
        other = called(cache)
        found[f"{name} {'processed' if processed else 'raw'}"] = {
            "methods": {call: compared(results[call], other[call]) for call in results},
            "ours": missed,
            "theirs": misses(cache, theirs.b_U[TOKENS[:, 0]]),
        }
    return found


def misses(cache: Any, constant: Tensor) -> dict[str, float]:
    """By how much a cache's parts miss its own residual and logits, relative to the largest number."""
    whole = cache[f"blocks.{cache.model.cfg.n_layers - 1}.hook_resid_post"]
    missed = {}
    for name, call in (
        ("heads", lambda: cache.get_full_resid_decomposition(expand_neurons=False)),
        ("neurons", lambda: cache.get_full_resid_decomposition()),
    ):
        missed[name] = float((call().sum(0) - whole).abs().max() / whole.abs().max())
    logits = cache["unembed.hook_out"]
    own = torch.stack([logits[row, :, token] for row, token in enumerate(TOKENS[:, 0].tolist())])
    said = cache.logit_attrs(cache.decompose_resid(), TOKENS[:, 0]).sum(0) + constant[:, None]
    return missed | {"logits": float((said - own).abs().max() / own.abs().max())}
