"""Circuits of attention heads (Elhage et al. 2021) on factored matrices, and how heads compose.

A head reads the stream through two maps of low rank, never formed here:

* OV, ``W_V W_O`` ``[d_model, d_model]``: what it moves from a source to a destination;
* QK, ``W_Q W_K^T`` ``[d_model, d_model]``: where it looks, query on the left and key on the right, before a rotation.

An earlier head's output composes with a later one by ``|A B| / (|A| |B|)`` (Frobenius), A the earlier OV, B what reads
it: QK for its queries (Q-composition), QK transposed for its keys (K), OV for its values (V).

Raw weights leave out what stands between two heads. So :func:`circuits_of` puts in, as the stream's readers see it,
the gain of the norm that a map reads through, the gain of a norm after attention, and, where norms subtract the mean,
the projection that does; the embedding is that of ``bridge.W_E_eff``. Scales, which differ from token to token, stay out.
On processed weights nothing of it is left to do, and the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

import pellucid
from pellucid.arguments import check_choice, check_count, check_kind
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.factored_matrix import FactoredMatrix, composition_scores
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.tables import BriefFields

Mode: TypeAlias = Literal["Q", "K", "V"]


def head_composition(ov: FactoredMatrix, qk: FactoredMatrix, mode: Mode) -> Float[Tensor, "layer head _ _"]:
    """Composition of every head with every head of a later layer, ``[layer, head, later layer, later head]``; else 0.

    Args:
        ov: ``[layer, head, d_model, d_model]``.
        qk: the same of queries and keys; not read for ``"V"``.
        mode: of what the later head reads: ``"Q"``, ``"K"`` or ``"V"``.

    Raises:
        InputError: another mode, matrices without layers and heads.
    """
    check_choice("mode", mode, ("Q", "K", "V"))
    check_kind("ov", ov, FactoredMatrix, "a FactoredMatrix [layer, head, d_model, d_model]")
    check_kind("qk", qk, FactoredMatrix, "a FactoredMatrix [layer, head, d_model, d_model]")
    right = {"Q": qk, "K": qk.T, "V": ov}[mode]
    if ov.ndim != 4 or right.ndim != 4:
        raise InputError(
            f"Composition is of [layer, head, d_model, d_model]; found {tuple(ov.shape)}, {tuple(qk.shape)}."
        )
    scores = composition_scores(ov, right)
    layers, later = (torch.arange(each.shape[0], device=scores.device) for each in (ov, right))
    return scores.masked_fill((layers[:, None] >= later[None, :])[:, None, :, None], 0.0)


def by_query_head(weights: Shaped[Tensor, "layer _ ..."], n_heads: int) -> Shaped[Tensor, "layer head ..."]:
    """``[layer, key/value head, ...]`` with a copy beside each head of queries that it serves: ``[layer, head, ...]``.

    Raises:
        InputError: heads that cannot be shared out.
    """
    check_kind("weights", weights, Tensor, "a tensor [layer, head, ...]")
    check_count("n_heads", n_heads)
    if weights.dim() < 2 or n_heads % weights.shape[1]:
        raise InputError(
            f"weights is [layer, head, ...] with a number of heads that divides {n_heads}; found {list(weights.shape)}."
        )
    return weights.repeat_interleave(n_heads // weights.shape[1], dim=1)


@dataclass(frozen=True, eq=False, repr=False)
class Circuits(BriefFields):
    """Maps of every head, as the stream's readers see them.

    Attributes:
        ov: ``[layer, head, d_model, d_model]`` (source, destination).
        qk: ``[layer, head, d_model, d_model]`` (queries, keys), unscaled.
        embed: ``[d_vocab, d_model]``.
        unembed: ``[d_model, d_vocab]``.
    """

    ov: FactoredMatrix
    qk: FactoredMatrix
    embed: Float[Tensor, "d_vocab d_model"]
    unembed: Float[Tensor, "d_model d_vocab"]

    def token_ov(self, layer: int, head: int) -> FactoredMatrix:
        """``[d_vocab, d_vocab]``: what attending to a token (row) does to the logit of each (column), through one head."""
        ov = self._of(self.ov, layer, head)
        return FactoredMatrix(self.embed @ ov.A, ov.B @ self.unembed)

    def token_qk(self, layer: int, head: int) -> FactoredMatrix:
        """``[d_vocab, d_vocab]``: how much a query token (row) attends to a key token (column), by tokens alone."""
        qk = self._of(self.qk, layer, head)
        return FactoredMatrix(self.embed @ qk.A, qk.B @ self.embed.T)

    def copying(self) -> Float[Tensor, "layer head"]:
        """``[layer, head]``: sum of the eigenvalues of ``embed OV unembed`` over the sum of their sizes, -1 to 1.

        1 where attending to a token raises that token. The eigenvalues are those of ``W_O (unembed embed) W_V``
        ``[d_head, d_head]``, so that nothing of the vocabulary's size but one product is formed.
        """
        through = self.unembed @ self.embed
        found = FactoredMatrix(through @ self.ov.A, self.ov.B).eigenvalues
        return (found.sum(-1).real / found.abs().sum(-1)).to(self.embed.dtype)

    def _of(self, maps: FactoredMatrix, layer: int, head: int) -> FactoredMatrix:
        layers, heads = maps.shape[:2]
        check_count("layer", layer, 0, layers - 1)
        check_count("head", head, 0, heads - 1)
        return FactoredMatrix(maps.A[layer, head], maps.B[layer, head])


@torch.no_grad()
def circuits_of(bridge: TransformerBridge) -> Circuits:
    """The circuits of a model, in float32 at least; heads of keys and values beside each head of queries they serve.

    Raises:
        WeightError: weights that cannot be read where they are.
    """
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    n_heads, centres = bridge.cfg.n_heads, bridge.adapter.family.norm.centres
    read = _per_layer([block.submodules.get("ln1") for block in bridge.blocks])
    wrote = _per_layer([block.submodules.get("ln1_post") for block in bridge.blocks])
    q, k, v = (
        _read_through(widened(weights), read, centres, has_norm=read is not None)
        for weights in (bridge.W_Q, by_query_head(bridge.W_K, n_heads), by_query_head(bridge.W_V, n_heads))
    )
    o = widened(bridge.W_O)
    o = o if wrote is None else o * wrote[:, None, None].to(o)
    unembedding: Any = bridge.unembed
    final: Any = bridge.ln_final
    unembed = _read_through(widened(unembedding.W_U), final.gain(), centres, has_norm=True)
    embed = widened(bridge.W_E_eff)
    if centres:  # every reader subtracts the mean, so that none sees what is written of it
        o, embed = o - o.mean(-1, keepdim=True), embed - embed.mean(-1, keepdim=True)
    return Circuits(FactoredMatrix(v, o), FactoredMatrix(q, k.transpose(-2, -1)), embed, unembed)


def _per_layer(norms: Sequence[Any]) -> Tensor | None:
    """Gains ``[layer, d_model]``, ``None`` where there are no such norms."""
    return None if norms[0] is None else torch.stack([widened(norm.gain()) for norm in norms])


def _read_through(weights: Tensor, gain: Tensor | None, centres: bool, has_norm: bool) -> Tensor:
    """Weights ``[..., d_model, out]`` that read a norm, as maps of what the norm reads, its scale apart."""
    if gain is not None:
        gains = gain.to(weights)
        weights = weights * (gains[:, None, :, None] if gains.dim() == 2 else gains[:, None])
    return weights - weights.mean(-2, keepdim=True) if centres and has_norm else weights


def composition(bridge: TransformerBridge, mode: Mode) -> xr.DataArray:
    """How every head composes with every later one, by :func:`circuits_of`.

    Args:
        bridge: the model.
        mode: of what the later head reads: ``"Q"`` (queries), ``"K"`` (keys) or ``"V"`` (values).

    Returns:
        ``[layer, head, to_layer, to_head]``, 0 to 1; 0 where ``to_layer`` is not later. Two random maps score about
        ``1 / sqrt(d_model)``, whatever their rank (``attrs["random"]``): compare with that, not with 0.

    Raises:
        InputError: another mode.
        WeightError: weights that cannot be read where they are.
    """
    check_choice("mode", mode, ("Q", "K", "V"))
    circuits = circuits_of(bridge)
    scores = head_composition(circuits.ov, circuits.qk, mode).cpu().numpy()
    layers, heads = range(bridge.cfg.n_layers), range(bridge.cfg.n_heads)
    coords = {"layer": list(layers), "head": list(heads), "to_layer": list(layers), "to_head": list(heads)}
    about = {
        "analysis": f"{mode}-composition",
        "pellucid": pellucid.__version__,
        "model": bridge.cfg.model_name,
        "units": "1",
        "random": bridge.cfg.d_model**-0.5,
    }
    return xr.DataArray(scores, coords, tuple(coords), "composition", about)
