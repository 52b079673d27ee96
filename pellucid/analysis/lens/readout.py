"""What a residual says: the model's own final norm and unembedding on any residual, and what is read off the logits.

The norm and the head are Hugging Face's modules, called as they are; no hook fires. So the residual that leaves the
last block gives the logits of the run to the bit. Of the logits of many rows only a few numbers a row are kept, a
chunk at a time: all of them would be ``layers * positions * d_vocab``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.dtypes import widened
from pellucid.model_bridge.generalized_components import NormalizationBridge
from pellucid.model_bridge.running.outputs import scaled_and_capped
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.run_context import hooks_suppressed
from pellucid.tables import BriefFields

CHUNK = 2**24
"""Logits that are made at a time: 64 MiB of float32."""


def final_norm(bridge: TransformerBridge) -> NormalizationBridge:
    """The model's last norm."""
    return cast(NormalizationBridge, bridge.ln_final)


def head_of(bridge: TransformerBridge, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """The model's head on what its final norm gives, scaled and capped where the model does that: ``[..., d_vocab]``."""
    logits: Tensor = hooks_suppressed(bridge.unembed.module, normed)
    return scaled_and_capped(logits, bridge.cfg)


def logits_of_residual(
    bridge: TransformerBridge, residual: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_vocab"]:
    """``[..., d_model]`` of the model's dtype, as it would leave the last block, to logits ``[..., d_vocab]``."""
    return head_of(bridge, final_norm(bridge).again(residual))


def frozen_logits(
    bridge: TransformerBridge, residual: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "... 1"]
) -> Float[Tensor, "*rows d_vocab"]:
    """The same with the final norm dividing by ``scale`` ``[..., 1]``, that of another residual: affine in the residual."""
    norm, wide = final_norm(bridge), widened(residual)
    if bridge.adapter.family.norm.centres:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide / scale * norm.gain()
    bias = norm.module._parameters.get("bias")
    normed = normed if bias is None else normed + bias.detach()
    return head_of(bridge, normed.to(residual.dtype))


@dataclass(frozen=True, eq=False, repr=False)
class RowStatistics(BriefFields):
    """What is kept of the logits of some rows.

    Attributes:
        top: ids of the largest logits, best first, ``[row, top]``.
        top_logit: those logits.
        top_probability: their probabilities.
        entropy: of the distribution, in nats, ``[row]``.
        kl: divergence of it from the final one of the same position, KL(final || this), in nats, ``[row]``.
        logit: of chosen tokens, ``[row, token]``.
        probability: of chosen tokens.
        rank: how many tokens have a larger logit, ``[row, token]``.
    """

    top: Int[Tensor, "row top"]
    top_logit: Float[Tensor, "row top"]
    top_probability: Float[Tensor, "row top"]
    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    logit: Float[Tensor, "row token"]
    probability: Float[Tensor, "row token"]
    rank: Int[Tensor, "row token"]

    @staticmethod
    def joined(parts: Sequence[RowStatistics]) -> RowStatistics:
        """Rows of several, one after another."""
        names = RowStatistics.__dataclass_fields__
        return RowStatistics(*(torch.cat([vars(part)[name] for part in parts]) for name in names))


def divergence(
    log_final: Float[Tensor, "*rows d_vocab"], log_p: Float[Tensor, "*rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(final || p) ``[...]`` in nats, of log-probabilities ``[..., d_vocab]``."""
    return (log_final.exp() * (log_final - log_p)).sum(-1)


def statistics_of(
    logits: Float[Tensor, "row d_vocab"],
    log_final: Float[Tensor, "row d_vocab"],
    tokens: Int[Tensor, " token"],
    top_k: int,
) -> RowStatistics:
    """Numbers of some rows.

    Args:
        logits: ``[row, d_vocab]``.
        log_final: the model's own log-probabilities at the position of each row, ``[row, d_vocab]``.
        tokens: ids to follow, ``[token]``.
        top_k: how many of the largest to keep.
    """
    wide = widened(logits)
    log_p = wide.log_softmax(-1)
    best = wide.topk(top_k, dim=-1)
    chosen = wide[:, tokens]
    return RowStatistics(
        best.indices,
        best.values,
        log_p.gather(-1, best.indices).exp(),
        -(log_p.exp() * log_p).sum(-1),
        # Rounding can leave a divergence of equal distributions a little below zero, where none can be.
        divergence(log_final, log_p).clamp(min=0.0),
        chosen,
        log_p[:, tokens].exp(),
        torch.stack([(wide > chosen[:, [at]]).sum(-1) for at in range(len(tokens))], -1)
        if len(tokens)
        else torch.zeros(len(wide), 0, dtype=torch.int64, device=wide.device),
    )


def row_chunks(n_rows: int, d_vocab: int) -> Iterator[slice]:
    """Rows in chunks of at most :data:`CHUNK` logits."""
    size = max(1, CHUNK // d_vocab)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))
