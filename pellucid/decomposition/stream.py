"""What a decomposition asks of a model and of a run, and the one linear map that it is made of.

Everything that a block adds to the residual stream is linear in its heads or neurons once the norms are *frozen*: divided by
the scales that they had in the run. A head writes ``z @ W_O``, through the norm after the branch where a family has one
(Gemma 2, OLMo 2); a reader (a block's norm, the final norm) sees ``(x - mean) / scale * gain``. Frozen norms' biases are no
part's own; they are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_whole
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import CacheKeyError, InputError
from pellucid.names import HookIndex
from pellucid.slices import Slice

BranchName = Literal["attn", "mlp"]


@dataclass(frozen=True)
class Norm:
    """A norm of a model.

    Attributes:
        name: its component, ``"ln_final"`` or ``"blocks.0.ln1"``.
        centres: whether it subtracts the mean.
        gain: ``[d_model]``, ``None`` for one that multiplies with nothing.
        bias: ``[d_model]``, ``None`` for one that adds nothing.
    """

    name: str
    centres: bool
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None


class Stream(Protocol):
    """What writes to a model's residual stream, and what reads it."""

    def norm(self, name: str) -> Norm | None:
        """A norm by its component's name, ``None`` where the family has none there."""

    def weight(
        self, layer: int, branch: BranchName
    ) -> Float[Tensor, "n_heads d_head d_model"] | Float[Tensor, "d_mlp d_model"]:
        """``[n_heads, d_head, d_model]`` or ``[d_mlp, d_model]``: what a branch multiplies its heads or neurons with, as the
        model computes it: adapters and quantised weights included.
        """

    def bias(self, layer: int, branch: BranchName) -> Float[Tensor, " d_model"] | None:
        """``[d_model]``: what the same map adds, ``None`` where it adds nothing."""

    def factor(self, layer: int) -> float:
        """What the output of a block's branches is multiplied with before it is added."""

    def clip(self, layer: int) -> float | None:
        """The size at which values are cut off between ``attn.hook_v`` and the heads, ``None`` for not."""

    def norm_after(self, layer: int, branch: BranchName) -> Norm | None:
        """The norm that the output of a branch goes through before it is added, ``None`` for none."""

    def final_norm(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """``[..., d_model]`` through the final norm, its statistics taken anew: what ``W_U`` and ``b_U`` are applied to."""


class StreamModel(Protocol):
    """A bridge, as a decomposition sees it."""

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Its sizes."""

    @property
    def hook_index(self) -> HookIndex:
        """Its hook points."""

    @property
    def stream(self) -> Stream:
        """What writes to its residual stream, and what reads it."""

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """``[d_model, d_vocab]``."""

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """``[d_vocab]``."""

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "... d_model"]:
        """Columns of ``W_U``."""

    @property
    def run_with_hooks(self) -> Callable[..., Any]:
        """What runs it."""

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token."""


class CachedRun(Protocol):
    """A cache, as a decomposition sees it."""

    model: Any
    """The bridge, or ``None``."""
    has_batch_dim: bool

    def __getitem__(self, key: str) -> Shaped[Tensor, "..."]:
        """A tensor by its hook's name."""

    def __contains__(self, key: object) -> bool:
        """Whether it was kept."""


def model_of(run: CachedRun) -> StreamModel:
    """The model behind a cache.

    Raises:
        InputError: the cache was made without one.
    """
    if run.model is None:
        raise InputError(
            "This cache knows no model, whose weights are asked for here: set cache.model = bridge, or make it from the "
            "bridge, ActivationCache(dict(cache), bridge)."
        )
    return cast(StreamModel, run.model)


def refuse_no_sum(model: StreamModel, what: str) -> None:
    """Refuse to show parts as a sum where the stream is none.

    Raises:
        InputError: each branch starts from the output of its norm, which scales what was there before.
    """
    if model.cfg.apply_residual_connection_post_layernorm:
        raise InputError(
            f"{what} shows the residual stream as a sum of what was written to it, and this model's is none: with "
            "apply_residual_connection_post_layernorm=True each branch is added to the norm's output."
        )


def end_of(model: StreamModel, layer: int | None) -> int:
    """A layer as TransformerLens counts: the residual that enters it is meant; ``None`` and -1 are the end.

    Raises:
        InputError: no layer.
    """
    n_layers = model.cfg.n_layers
    if layer is None:
        return n_layers
    found = check_whole("layer", layer)
    if found == -1:
        return n_layers
    if not 0 <= found <= n_layers:
        raise InputError(f"layer is 0 to {n_layers - 1}, or {n_layers}, -1 or None for the end; found {layer}.")
    return found


def check_mlp_input(model: StreamModel, layer: int, mlp_input: bool) -> None:
    """Refuse what enters an MLP where no such residual is.

    Raises:
        InputError: after the last layer; in a parallel block.
    """
    if not mlp_input:
        return
    if layer == model.cfg.n_layers:
        raise InputError(f"mlp_input=True needs a layer below {layer}: after the last one comes no MLP.")
    if f"blocks.{layer}.hook_resid_mid" not in model.hook_index:
        raise InputError(
            "mlp_input=True asks for the residual between attention and MLP, and this model's blocks are parallel: its MLP "
            "reads what enters the block, which mlp_input=False gives."
        )


def reader_of(model: StreamModel, layer: int, mlp_input: bool) -> Norm:
    """The norm that reads the residual entering ``layer`` (its MLP with ``mlp_input``), the final norm at the end.

    Raises:
        InputError: the family has no norm there.
    """
    name = "ln_final" if layer == model.cfg.n_layers else f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}"
    norm = model.stream.norm(name)
    if norm is None:
        raise InputError(
            f"apply_ln=True asks for {name}, and this model has no such norm: {'its MLP' if mlp_input else 'attention'} "
            "reads the stream as it is. Leave apply_ln out, or take the final norm (layer=None)."
        )
    return norm


@dataclass(frozen=True)
class Frozen:
    """A norm with the scale that it had in a run: a linear map, the norm's bias apart.

    Attributes:
        norm: the norm.
        scale: ``[..., 1]``, that of the run, broadcast against what it is applied to.
    """

    norm: Norm
    scale: Float[Tensor, "... 1"]

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """``[..., d_model]`` divided by the scale, centred where the norm centres, times the gain; no bias."""
        scale = self.scale.to(x.device)
        wide = x.to(torch.promote_types(x.dtype, scale.dtype))
        if self.norm.centres:
            wide = wide - wide.mean(-1, keepdim=True)
        divided = wide / scale
        return divided if self.norm.gain is None else divided * self.norm.gain.to(divided)

    def pulled_back(self, directions: Float[Tensor, "*rows d_model n"]) -> Float[Tensor, "*rows d_model n"]:
        """``[..., d_model, n]``: what the norm's *input* is multiplied with for ``norm(x) @ directions``, less the scale."""
        pulled = directions
        if self.norm.gain is not None:
            pulled = self.norm.gain.to(pulled)[:, None] * pulled
        return pulled - pulled.mean(-2, keepdim=True) if self.norm.centres else pulled


def frozen(run: CachedRun, norm: Norm, pos: Slice, batch: Slice | None = None) -> Frozen:
    """A norm with the scale of a run, at some positions (and rows).

    Raises:
        CacheKeyError: the run did not keep its scale.
    """
    name = f"{norm.name}.hook_scale"
    if name not in run:
        raise CacheKeyError(
            f"A norm is applied as it was in the run, divided by its scale, and {name} was not kept: add it to names_filter."
        )
    scale = pos.apply(run[name], -2)
    return Frozen(norm, batch.apply(scale) if batch is not None and run.has_batch_dim else scale)


def entering(run: CachedRun, layer: int, mlp_input: bool, pos: Slice) -> Float[Tensor, "... d_model"]:
    """The residual that enters a layer, or its MLP, or the final norm, at some positions, under any of its names."""
    if mlp_input:
        return pos.apply(run[f"blocks.{layer}.hook_resid_mid"], -2)
    names = [f"blocks.{layer}.hook_resid_pre"] if layer < model_of(run).cfg.n_layers else []
    names += [f"blocks.{layer - 1}.hook_resid_post"] if layer else []
    return pos.apply(run[next((name for name in names if name in run), names[0])], -2)
