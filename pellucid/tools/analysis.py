"""TransformerLens' ``tools.analysis``: the functions that its notebooks take; analyses are in :mod:`pellucid.analysis`.

A name of TransformerLens' module that is not here answers with what to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pellucid.arguments import check_kind
from pellucid.decomposition import readout
from pellucid.decomposition.readout import Quantity
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.patching import get_act_patch_direct_path, get_act_patch_direct_path_all_sources
from pellucid.peer_names import ANALYSIS, absent
from pellucid.tables import BriefFields

__all__ = ["LogitReadout", "get_act_patch_direct_path", "get_act_patch_direct_path_all_sources", "logit_readout"]


@dataclass(frozen=True, eq=False, repr=False)
class LogitReadout(BriefFields):
    """What vectors say.

    Attributes:
        values: ``[..., token]`` in the quantity ``return_type``: the whole vocabulary, or what was asked for of it.
        return_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        entropy: ``[...]`` of the whole distribution, in nats.
        selected_ids: ids of the last axis, ``[token]`` or with the shape of ``values``; ``None`` for the whole vocabulary.
        target_ranks: with targets, how many tokens have a larger logit, with the shape of ``values``.
    """

    values: Tensor
    return_type: Quantity
    entropy: Tensor
    selected_ids: Tensor | None
    target_ranks: Tensor | None

    @property
    def top_ids(self) -> Tensor | None:
        """The ids of ``top_k``, with the shape of ``values``."""
        ids = self.selected_ids
        return ids if self.target_ranks is None and ids is not None and ids.shape == self.values.shape else None


def logit_readout(
    model: TransformerBridge,
    vectors: Tensor,
    *,
    apply_ln: bool = True,
    vocab: Sequence[int] | Tensor | None = None,
    targets: str | int | Sequence[str | int] | Tensor | None = None,
    return_type: Quantity = "logits",
    top_k: int | None = None,
    chunk_size: int = 64,
    enable_grad: bool = False,
) -> LogitReadout:
    """Vectors through the model's own final norm, unembedding, scale and cap. Hooks that are on the model act.

    Args:
        model: a bridge.
        vectors: ``[..., d_model]``.
        apply_ln: ``False``: without the final norm.
        vocab: ids of the tokens to keep.
        targets: tokens to keep with their ranks; a tensor has one for each vector.
        return_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        top_k: keep so many tokens, the most probable first.
        chunk_size: vectors to unembed at a time.
        enable_grad: keep the graph.

    Raises:
        InputError: no vectors of the model's width; more than one of ``vocab``, ``targets`` and ``top_k``; values that are
            none.
    """
    check_kind("model", model, TransformerBridge, "a bridge")
    values, entropy, ids, ranks = readout.vectors(
        model, vectors, apply_ln, vocab, targets, return_type, top_k, chunk_size, enable_grad
    )
    return LogitReadout(values, return_type, entropy, ids, ranks)


def __getattr__(name: str) -> Any:
    raise AttributeError(absent(ANALYSIS, name) or f"module {__name__!r} has no attribute {name!r}")
