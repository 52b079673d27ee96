"""What writes to a model's residual stream, and what reads it, as its modules compute: for decompositions.

The maps are asked of the modules: an adapter's, a quantised or an offloaded one's numbers are those that run, not those of
the parameter under it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.conversion_utils.fused_qkv import PARTS, Part
from pellucid.decomposition.stream import BranchName, Norm
from pellucid.dtypes import widened
from pellucid.model_bridge.generalized_components import GeneralizedComponent, NormalizationBridge
from pellucid.model_bridge.generalized_components.block import BlockBridge
from pellucid.model_bridge.generalized_components.weights import CONV1D, linear_weight, plain_weight
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.supported_architectures.decoder import qkv_layout
from pellucid.model_bridge.weights.form import shift_of
from pellucid.run_context import hooks_suppressed

AT_ONCE = 256
"""Rows of the identity that go through a map together where its weight cannot be read."""

_MAPS: dict[BranchName, tuple[str, str]] = {"attn": ("attn", "o"), "mlp": ("mlp", "out")}
"""Where a block has the map that ends a branch."""


class ResidualStream:
    """What :class:`pellucid.decomposition.stream.Stream` asks, of one model.

    Args:
        tree: its components.
        folds_final_norm: whether ``W_U`` and ``b_U`` have the final norm's gain and bias in them while the norm has them,
            too (``process_weights(keep_tied=True)``).
    """

    def __init__(self, tree: ComponentTree, folds_final_norm: bool) -> None:
        self._tree, self._folds = tree, folds_final_norm

    def __repr__(self) -> str:
        return f"ResidualStream of {type(self._tree.root).__name__}: norm(name), weight(layer, branch), bias(layer, branch)"

    def norm(self, name: str) -> Norm | None:
        """See :meth:`pellucid.decomposition.stream.Stream.norm`."""
        found = self._tree.components.get(name)
        if not isinstance(found, NormalizationBridge):
            return None
        centres = self._tree.adapter.family.norm.centres
        if name == "ln_final" and self._folds:
            return Norm(name, centres, None, None)
        bias = shift_of(found)
        return Norm(name, centres, found.gain(), None if bias is None else bias.detach())

    def norm_after(self, layer: int, branch: BranchName) -> Norm | None:
        """See :meth:`pellucid.decomposition.stream.Stream.norm_after`."""
        return self.norm(f"blocks.{layer}.{'ln1_post' if branch == 'attn' else 'ln2_post'}")

    def factor(self, layer: int) -> float:
        """See :meth:`pellucid.decomposition.stream.Stream.factor`."""
        return cast(BlockBridge, self._tree.components[f"blocks.{layer}"]).factor

    def clip(self, layer: int) -> float | None:
        """See :meth:`pellucid.decomposition.stream.Stream.clip`."""
        name = self._tree.adapter.family.attention.clip
        return vars(self._tree.components[f"blocks.{layer}.attn"].module)[name] if name else None

    def weight(self, layer: int, branch: BranchName) -> Tensor:
        """See :meth:`pellucid.decomposition.stream.Stream.weight`."""
        component, cfg = self._map(layer, branch), self._tree.cfg
        width = cfg.n_heads * cfg.d_head if branch == "attn" else cfg.sizes()["d_mlp"]
        weight = self._as_it_runs(component, width)
        return weight.unflatten(0, (cfg.n_heads, -1)) if branch == "attn" else weight

    def reading(self, layer: int) -> dict[Part, Tensor]:
        """What a block makes queries, keys and values with, by ``q``, ``k``, ``v``: ``[head, d_model, d_head]``.

        As the model computes it, adapters and quantised weights included; keys and values by their own heads.
        """
        attention, cfg = self._tree.components[f"blocks.{layer}.attn"], self._tree.cfg
        family, heads = self._tree.adapter.family.attention, {"q": cfg.n_heads}
        if family.qkv:
            fused = self._as_it_runs(attention.submodules["qkv"], cfg.d_model)
            found = qkv_layout(family.layout, cfg).parts(fused)
            parts = {part: found[f"hook_{part}"].flatten(1, -2) for part in PARTS}
        else:
            parts = {
                part: self._as_it_runs(attention.submodules[part], cfg.d_model).unflatten(
                    -1, (heads.get(part, cfg.n_key_value_heads), -1)
                )
                for part in PARTS
            }
        return {part: weight.transpose(0, 1) for part, weight in parts.items()}

    def _as_it_runs(self, component: GeneralizedComponent, width: int) -> Tensor:
        """``[width, out]``: the linear map of a module."""
        module, cfg = component.module, self._tree.cfg
        if _is_plain(module):
            return linear_weight(module, component.path).detach()
        unit = torch.eye(width, dtype=cfg.dtype, device=cfg.device)
        return torch.cat([_mapped(module, rows) for rows in unit.split(AT_ONCE)]) - _mapped(module, unit[:1] * 0)

    def bias(self, layer: int, branch: BranchName) -> Tensor | None:
        """See :meth:`pellucid.decomposition.stream.Stream.bias`; ``slow_but_exact`` leaves BLOOM's out."""
        component, cfg = self._map(layer, branch), self._tree.cfg
        module = component.module
        if cfg.sums_weight_slices:
            return None
        if _is_plain(module):
            return None if module.bias is None else module.bias.detach()
        width = cfg.n_heads * cfg.d_head if branch == "attn" else cfg.sizes()["d_mlp"]
        added = _mapped(module, torch.zeros(1, width, dtype=cfg.dtype, device=cfg.device))[0]
        return added if bool(added.any()) else None

    def final_norm(self, residual: Tensor) -> Tensor:
        """See :meth:`pellucid.decomposition.stream.Stream.final_norm`."""
        norm = cast(NormalizationBridge, self._tree.components["ln_final"])
        given = residual.to(norm.module.weight.device, self._tree.cfg.dtype)
        if not self._folds:
            with torch.set_grad_enabled(torch.is_grad_enabled() and residual.requires_grad):
                return norm.again(given).to(residual.device)
        wide = widened(given)
        if self._tree.adapter.family.norm.centres:
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + self._tree.cfg.eps).sqrt()
        return normed.to(residual)

    def _map(self, layer: int, branch: BranchName) -> GeneralizedComponent:
        owner, child = _MAPS[branch]
        return self._tree.components[f"blocks.{layer}.{owner}"].submodules[child]


def _is_plain(module: nn.Module) -> Any:
    kind = type(module)
    known = kind is nn.Linear or (kind.__module__, kind.__name__) == CONV1D
    return known and plain_weight(module, kind)


def _mapped(module: nn.Module, rows: Tensor) -> Tensor:
    """``[row, in]`` to ``[row, out]``, nothing firing."""
    with torch.no_grad():
        mapped: Tensor = hooks_suppressed(module, rows[None])
    return mapped[0].to(rows.dtype)
