"""Attention whose queries, keys and values come out of one fused projection.

The arithmetic is written once, in few steps that the forward and everything that recomputes attention call: ``project``
(fused projection, split, hooks), ``mix`` (scores, pattern, mixed values) and ``project_out``; ``fast_mix`` is ``mix``
in one fused kernel, for runs that asked for it and layers that nothing looks into. The split takes *views* of the fused
output: no weight is copied, an adapter on the fused layer acts, a gradient reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.conversion_utils import fused_qkv
from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.conversion_utils.conversion_steps.chain_tensor_conversion import ChainTensorConversion
from pellucid.conversion_utils.conversion_steps.rearrange_tensor_conversion import RearrangeTensorConversion
from pellucid.conversion_utils.fused_qkv import PARTS, Part
from pellucid.errors import InputError
from pellucid.hook_points import PointOwner
from pellucid.model_bridge.generalized_components.attention import AttentionBridge
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, plain_weight, readable_parameter
from pellucid.model_bridge.generalized_components.head_results import head_results, with_results
from pellucid.model_bridge.generalized_components.linear import LinearBridge
from pellucid.model_bridge.generalized_components.random_numbers import Draws
from pellucid.model_bridge.generalized_components.split_inputs import (
    INPUT_SITE,
    INPUT_SITES,
    PartAgain,
    fire_all_per_head,
    with_head_inputs,
    with_own_input,
)
from pellucid.model_bridge.generalized_components.weight_writes import WeightTarget, WeightTargets

SplitFunction = Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module]]
"""The original attention to its query, key and value transformations ``[..., d_model] -> [..., n_heads * d_head]``."""


class FusedPart(nn.Linear):
    """Queries, keys or values of a fused projection as an ``nn.Linear`` that owns nothing.

    Its weight and bias are read from the fused layer when asked for, and calling it calls the fused layer, so it is
    never stale and an adapter acts.
    """

    def __init__(self, attention: nn.Module, part: Part, n_heads: int) -> None:
        nn.Module.__init__(self)
        # In a tuple, so that torch does not count the attention as a child; its layer is looked up when needed.
        self._attention = (attention,)
        self.part: Part = part
        self.n_heads = n_heads

    @property
    def fused(self) -> nn.Module:
        """The fused projection."""
        return cast(nn.Module, self._attention[0].query_key_value)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[n_heads * d_head, d_model]``: a copy, since rows of one part are not evenly spaced in the fused weight."""
        weight = readable_parameter(self.fused, "weight", "query_key_value")
        return fused_qkv.part_of_weight(weight, self.part, self.n_heads).flatten(0, 1)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """``[n_heads * d_head]``, a copy."""
        bias = readable_parameter(self.fused, "bias", "query_key_value")
        return fused_qkv.part_of_bias(bias, self.part, self.n_heads).flatten()

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """``d_model``."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """``n_heads * d_head``."""
        return int(self.weight.shape[0])

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, pos, d_model]`` to ``[batch, pos, n_heads * d_head]``."""
        return fused_qkv.part_of_activation(self.fused(input), self.part, self.n_heads).flatten(-2)


def split_fused(attention: nn.Module, n_heads: int) -> tuple[FusedPart, FusedPart, FusedPart]:
    """The three parts of ``attention.query_key_value``."""
    q, k, v = (FusedPart(attention, part, n_heads) for part in PARTS)
    return q, k, v


def _fitting_alibi(alibi: Tensor, rows: int, key_length: int) -> Tensor:
    """ALiBi that is not ``[batch * n_heads, 1, key_pos]``, made so if it can be."""
    flat = alibi.flatten(0, 1) if alibi.dim() == 4 else alibi
    if flat.shape[0] != rows or flat.shape[-1] != key_length:
        raise InputError(
            f"alibi must be [batch * n_heads, 1, key_pos] = [{rows}, 1, {key_length}]; found {tuple(flat.shape)}. Build "
            "it over cached and new positions together."
        )
    return flat


def _fitting_mask(mask: Tensor, batch: int, length: int, key_length: int) -> Tensor:
    """A mask that is not ``[batch, 1, pos, key_pos]`` of the scores' dtype, if it can be added to them all the same."""
    if mask.dim() != 4 or mask.shape[-1] != key_length or mask.dtype is torch.bool:
        raise InputError(
            f"attention_mask must be additive, [batch, 1, pos, key_pos] = [{batch}, 1, {length}, {key_length}]; found "
            f"{tuple(mask.shape)} of {mask.dtype}."
        )
    return mask


def _by_head(flat: Tensor, n_heads: int) -> Tensor:
    return flat.reshape(*flat.shape[:-1], n_heads, -1)


class JointQKVAttentionBridge(AttentionBridge):
    """Stands for an attention with a fused ``query_key_value`` and an output projection ``dense``.

    Args:
        name: the attention's name inside its parent.
        config: anything with ``n_heads`` (and ``d_model``).
        split_qkv_matrix: original attention to three linear transformations, which then compute queries, keys and
            values (no bitwise promise). By default, and with an adapter's own ``split_qkv_matrix``, the fused
            projection itself runs and its output is split.
        submodules: components of the children, ``{"qkv": LinearBridge("query_key_value"), "o": LinearBridge("dense")}``
            by default.
        qkv_conversion_rule: shape rule for queries, keys and values. It is given ``[batch, pos, n_heads * d_head]``;
            without one, hooks see ``[batch, pos, n_heads, d_head]``.
        attn_conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
        pattern_conversion_rule: shape rule for ``hook_pattern``.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        split_qkv_matrix: SplitFunction | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        qkv_conversion_rule: BaseTensorConversion | None = None,
        attn_conversion_rule: BaseTensorConversion | None = None,
        pattern_conversion_rule: BaseTensorConversion | None = None,
    ) -> None:
        given = dict(submodules or {})
        given.setdefault("qkv", LinearBridge("query_key_value"))
        given.setdefault("o", LinearBridge("dense"))
        super().__init__(name, config, given | {part: LinearBridge(part) for part in PARTS}, attn_conversion_rule)
        self.n_heads = int(config.n_heads)
        self.split_qkv_matrix = split_qkv_matrix
        self.qkv_conversion_rule = qkv_conversion_rule
        self.pattern_conversion_rule = pattern_conversion_rule
        if qkv_conversion_rule is not None:
            flatten = RearrangeTensorConversion("b p n h -> b p (n h)", n=self.n_heads)
            for part in PARTS:
                self._conversions[f"hook_{part}"] = ChainTensorConversion([flatten, qkv_conversion_rule])
        if pattern_conversion_rule is not None:
            self._conversions["hook_pattern"] = pattern_conversion_rule
        for part in PARTS:
            self.submodules[part].link("hook_in", self, f"hook_{part}_in")
            self.submodules[part].link("hook_out", self, f"hook_{part}")
        self.submodules["qkv"]._names = {}  # its input and output are this component's points; nothing fires there
        self.submodules["o"].link("hook_in", self, "hook_z")
        self.submodules["o"].link("hook_out", self, "hook_attn_out")
        self._own_split: dict[Part, nn.Module] | None = None

    # -- the module ----------------------------------------------------------------------------------------------------

    def set_original_component(self, original_component: nn.Module) -> None:
        """Stand for ``original_component``, its children included."""
        super().set_original_component(original_component)
        children = dict(original_component.named_children())
        for key in ("qkv", "o"):
            child = self.submodules[key]
            if child.name in children:  # an attention of another make has its own, which split_qkv_matrix knows
                child.set_original_component(children[child.name])
        self._split(original_component)

    def place(self, root: nn.Module, path: str, names: Mapping[str, str], owner: PointOwner) -> None:
        """Stand for the attention at ``path``; see :meth:`GeneralizedComponent.place`."""
        super().place(root, path, names, owner)
        self._split(self.module)

    def _split(self, attention: nn.Module) -> None:
        parts = self.split_qkv_matrix(attention) if self.split_qkv_matrix is not None else None
        if parts is None or all(isinstance(part, FusedPart) for part in parts):
            self._own_split = None
            parts = split_fused(attention, self.n_heads)
        else:
            self._own_split = dict(zip(PARTS, parts, strict=True))
        for part, transformation in zip(PARTS, parts, strict=True):
            self.submodules[part].set_original_component(transformation)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[batch, pos, n_heads, d_head]``, after their hooks."""
        own, draws = self._own_split, None
        if self.is_live(*INPUT_SITES):
            draws = Draws(self.module.query_key_value, hidden_states.device)
        if own is None:
            q, k, v = fused_qkv.split_activation(self.module.query_key_value(hidden_states), self.n_heads)
        else:
            q, k, v = (_by_head(own[part](hidden_states), self.n_heads) for part in PARTS)
        if draws is not None:
            q, k, v = self._with_inputs((q, k, v), hidden_states, draws)
        return self.fire("hook_q", q), self.fire("hook_k", k), self.fire("hook_v", v)

    def _with_inputs(
        self, native: tuple[Tensor, Tensor, Tensor], hidden_states: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fire what feeds one of queries, keys and values, or one head of it; what an edit there makes of ``native``."""
        again = {part: self._again(part, draws) for part in PARTS}
        inputs = fire_all_per_head(self, dict.fromkeys(PARTS, self.n_heads))
        q, k, v = (
            with_head_inputs(again[part], values, inputs[part]) for part, values in zip(PARTS, native, strict=True)
        )
        if self.only_reads(*INPUT_SITE.values()):
            for site in INPUT_SITE.values():
                self.fire(site, hidden_states)
            return q, k, v
        q, k, v = (
            with_own_input(self, INPUT_SITE[part], again[part], plain, made, hidden_states)
            for part, plain, made in zip(PARTS, native, (q, k, v), strict=True)
        )
        return q, k, v

    def _again(self, part: Part, draws: Draws) -> PartAgain:
        return PartAgain(self.n_heads, partial(self._one_part, part, draws), partial(self._plain_part, part))

    def _one_part(self, part: Part, draws: Draws, hidden_states: Tensor) -> Tensor:
        with draws.again():
            if self._own_split is not None:
                return _by_head(self._own_split[part](hidden_states), self.n_heads)
            return fused_qkv.part_of_activation(self.module.query_key_value(hidden_states), part, self.n_heads)

    def _plain_part(self, part: Part) -> tuple[Tensor, Tensor] | None:
        fused = self.module.query_key_value
        if self._own_split is not None or not plain_weight(fused, nn.Linear):
            return None
        weight_nhm = fused_qkv.part_of_weight(fused.weight, part, self.n_heads)
        return weight_nhm, fused_qkv.part_of_bias(fused.bias, part, self.n_heads)

    def mix(
        self,
        q_bnqh: Tensor,
        k_bnkh: Tensor,
        v_bnkh: Tensor,
        attention_mask: Tensor | None,
        alibi: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores, pattern and mixed values, the hooks of scores and pattern firing.

        Scores are ``q k^T / sqrt(d_head) + mask``; with ``alibi``, ``alibi + q k^T / sqrt(d_head)`` in one fused product,
        then the mask. The softmax is in float32 at least, then back to the values' dtype, then attention dropout. A float64
        model stays in float64, where Hugging Face goes through float32.

        Args:
            q_bnqh: queries ``[batch, n_heads, pos, d_head]``.
            k_bnkh: keys ``[batch, n_heads, key_pos, d_head]``, the cached ones among them.
            v_bnkh: values, as the keys.
            attention_mask: additive ``[batch, 1, pos, key_pos]``.
            alibi: ``[batch * n_heads, 1, key_pos]`` or ``[batch, n_heads, 1, key_pos]``.

        Returns:
            ``(z, pattern)``: ``[batch, pos, n_heads, d_head]``, its hook still to be fired, and
            ``[batch, n_heads, pos, key_pos]``.

        Raises:
            InputError: alibi or mask do not fit the keys.
        """
        attention = self.module
        batch, n_heads, length, d_head = q_bnqh.shape
        rows, key_length = batch * n_heads, k_bnkh.shape[-2]
        if alibi is None:
            scores = q_bnqh @ k_bnkh.transpose(-1, -2) / math.sqrt(d_head)
        else:
            if alibi.shape != (rows, 1, key_length):
                alibi = _fitting_alibi(alibi, rows, key_length)
            scores = alibi.baddbmm(
                batch1=q_bnqh.reshape(rows, length, d_head),
                batch2=k_bnkh.reshape(rows, key_length, d_head).transpose(-1, -2),
                beta=attention.beta,
                alpha=attention.inv_norm_factor,
            ).view(batch, n_heads, length, key_length)
        dtype = scores.dtype
        if attention_mask is not None:
            if attention_mask.shape != (batch, 1, length, key_length) or attention_mask.dtype is not dtype:
                scores = scores + _fitting_mask(attention_mask, batch, length, key_length)
            elif scores.requires_grad:
                scores = scores + attention_mask
            else:
                scores.add_(attention_mask)  # the same sum, without another tensor of this size
        scores = self.fire("hook_attn_scores", scores)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        pattern: Tensor = attention.attention_dropout(scores.softmax(dim=-1, dtype=wide).to(v_bnkh.dtype))
        # The softmax keeps its output for the backward pass: a hook that writes must not write there.
        pattern = self.fire("hook_pattern", pattern, copy_before_edit=pattern.requires_grad)
        z = torch.bmm(pattern.reshape(rows, length, key_length), v_bnkh.reshape(rows, key_length, d_head))
        # Hugging Face's _merge_heads copies into [batch, pos, n_heads * d_head]; the same copy, seen per head.
        return z.view(batch, n_heads, length, d_head).permute(0, 2, 1, 3).contiguous(), pattern

    def fast_mix(
        self, q_bnqh: Tensor, k_bnkh: Tensor, v_bnkh: Tensor, bias: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """``softmax(q k^T * scale + bias) v`` in one of torch's fused kernels, ``[batch, pos, n_heads, d_head]``.

        No scores and no pattern exist; the numbers are those of the exact steps up to rounding
        (``docs/fast_attention.md`` has the bound).

        Args:
            q_bnqh: queries ``[batch, n_heads, pos, d_head]``.
            k_bnkh: keys ``[batch, n_heads, key_pos, d_head]``, the cached ones among them.
            v_bnkh: values, as the keys.
            bias: added to the scaled products, broadcastable to ``[batch, n_heads, pos, key_pos]``, of the queries' dtype
                (:func:`~pellucid.model_bridge.generalized_components.alibi_utils.add_mask_to_alibi`). Read only: many
                layers may share one.
            scale: ``1 / sqrt(d_head)`` by default.
        """
        if bias is not None:
            bias = bias.expand(*q_bnqh.shape[:3], k_bnkh.shape[-2])
        z = F.scaled_dot_product_attention(q_bnqh, k_bnkh, v_bnkh, attn_mask=bias, scale=scale)
        return z.transpose(1, 2).contiguous()

    def project_out(self, z: Tensor) -> Tensor:
        """``[batch, pos, n_heads, d_head]`` through ``dense``: the additive contribution ``[batch, pos, d_model]``."""
        draws = Draws(self.output_projection, z.device) if self.is_live("hook_result") else None
        contribution = self._dense(z.flatten(-2))
        if draws is not None:
            contribution = with_results(self, self.output_projection, self._dense, z, contribution, draws)
        return self.fire("hook_attn_out", contribution)

    @property
    def output_projection(self) -> nn.Module:
        """``dense``; used alone, what the component ``o`` was given."""
        own = self.submodules["o"].original_component if self._place is None else None
        projection: nn.Module = self.module.dense if own is None else own
        return projection

    def _dense(self, z_flat: Tensor) -> Tensor:
        contribution: Tensor = self.output_projection(z_flat)
        return contribution

    def results(self, z: Tensor) -> Tensor:
        """Each head's contribution without b_O, ``[batch, pos, n_heads, d_model]``, from ``z``."""
        layer = self.output_projection
        return head_results(layer, self._dense, z, Draws(layer, z.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``(hidden_states, attention_mask=None)`` to ``(contribution, pattern)``.

        Plain scaled dot-product attention; architectures with a signature of their own override this.
        """
        return self._run_plain(*args, **kwargs)

    def _run_plain(self, hidden_states: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        if hidden_states is None:
            raise InputError("hidden_states was not given, by position or by name.")
        q, k, v = self.project(self.fire("hook_in", hidden_states))
        z, pattern = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention_mask)
        contribution = self.project_out(self.fire("hook_z", z))
        return self.fire("hook_out", contribution), pattern

    # -- weights -------------------------------------------------------------------------------------------------------

    def _part_weight(self, part: Part) -> Tensor:
        weight = readable_parameter(self.module.query_key_value, "weight", f"{self.path}.query_key_value")
        return fused_qkv.part_of_weight(weight, part, self.n_heads)

    def _part_bias(self, part: Part) -> Tensor:
        bias = readable_parameter(self.module.query_key_value, "bias", f"{self.path}.query_key_value")
        return fused_qkv.part_of_bias(bias, part, self.n_heads)

    @property
    def W_Q(self) -> Tensor:
        """``[n_heads, d_model, d_head]``, a writable view of the fused weight."""
        return self._part_weight("q").transpose(1, 2)

    @property
    def W_K(self) -> Tensor:
        """``[n_heads, d_model, d_head]``, a writable view of the fused weight."""
        return self._part_weight("k").transpose(1, 2)

    @property
    def W_V(self) -> Tensor:
        """``[n_heads, d_model, d_head]``, a writable view of the fused weight."""
        return self._part_weight("v").transpose(1, 2)

    @property
    def b_Q(self) -> Tensor:
        """``[n_heads, d_head]``, a writable view of the fused bias."""
        return self._part_bias("q")

    @property
    def b_K(self) -> Tensor:
        """``[n_heads, d_head]``, a writable view of the fused bias."""
        return self._part_bias("k")

    @property
    def b_V(self) -> Tensor:
        """``[n_heads, d_head]``, a writable view of the fused bias."""
        return self._part_bias("v")

    @property
    def W_O(self) -> Tensor:
        """``[n_heads, d_head, d_model]``, a writable view of ``dense.weight``."""
        weight = readable_parameter(self.output_projection, "weight", f"{self.path}.dense")
        return weight.view(weight.shape[0], self.n_heads, -1).permute(1, 2, 0)

    @property
    def b_O(self) -> Tensor:
        """``[d_model]``."""
        return readable_parameter(self.output_projection, "bias", f"{self.path}.dense")

    def weight_targets(self) -> dict[str, WeightTargets]:
        """``q.weight`` ``[n_heads * d_head, d_model]``, ``q.bias``, ``k...``, ``v...``, ``o.weight``, ``o.bias``."""
        targets: dict[str, WeightTargets] = {}
        for part in PARTS:
            targets[f"{part}.weight"] = partial(self._part_targets, part, "weight")
            targets[f"{part}.bias"] = partial(self._part_targets, part, "bias")
        return targets | {f"o.{key}": target for key, target in self.submodules["o"].weight_targets().items()}

    def _part_targets(self, part: Part, name: str) -> list[WeightTarget]:
        fused = self._part_weight(part) if name == "weight" else self._part_bias(part)
        shape = (fused.shape[0] * fused.shape[1], *fused.shape[2:])
        targets = [WeightTarget(fused, shape)]
        if self._own_split is not None:
            # The linears that compute here, beside the fused layer that Hugging Face's own forward uses.
            own = readable_parameter(self._own_split[part], name, f"{self.path}: split_qkv_matrix, {part}")
            targets.append(WeightTarget(own, tuple(own.shape)))
        return targets
