"""Edits on a bare BLOOM, whose attention and MLP add the residual themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.model_bridge.reference_edits.tools import (
    Edit,
    Intercept,
    Remover,
    by_head,
    no_reference,
    on_input,
    on_output,
    recompute,
)
from pellucid.names import HookSpec

_NORM_SITES = ("hook_scale", "hook_normalized")


def _norm_inside(norm: nn.Module, edit: Edit, of_scale: bool) -> Any:
    layer_norm = cast(nn.LayerNorm, norm)

    def again(x: Tensor, output: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        scale = torch.sqrt(variance + layer_norm.eps)
        normalized = (wide - mean) / (edit(scale) if of_scale else scale)
        if not of_scale:
            normalized = edit(normalized)
        with align_module_device(layer_norm):  # offloaded weights are in memory only inside this block
            return (normalized * layer_norm.weight + layer_norm.bias).to(output.dtype)

    return recompute(norm, again)


_PART = {"q": 0, "k": 1, "v": 2}
_COPIES = {"hook_attn_in": "qkv", "hook_q_input": "q", "hook_k_input": "k", "hook_v_input": "v"}


def _replace_parts(fused: Tensor, n_heads: int, parts: dict[int, Tensor]) -> Tensor:
    """A copy of the fused projection with some of its (batch, pos, head, part, dim) parts replaced."""
    batch, length, width = fused.shape
    view = fused.reshape(batch, length, n_heads, 3, width // n_heads // 3).clone()
    for index, values in parts.items():
        view[:, :, :, index] = values
    return view.reshape(batch, length, width)


def _take_part(fused: Tensor, n_heads: int, index: int) -> Tensor:
    batch, length, width = fused.shape
    return fused.reshape(batch, length, n_heads, 3, width // n_heads // 3)[:, :, :, index]


def install_bloom(model: Any, spec: HookSpec, edit: Edit) -> list[Any]:
    """Handles (with ``remove``) or function modes that make one edit on a bare ``BloomForCausalLM``."""
    backbone = model.transformer
    outer = {
        "embed.hook_in": lambda: on_input(backbone.word_embeddings, edit),
        "embed.hook_out": lambda: on_input(backbone.word_embeddings_layernorm, edit),
        "hook_embed": lambda: on_output(backbone.word_embeddings_layernorm, edit),
        "ln_final.hook_out": lambda: on_output(backbone.ln_f, edit),
        "hook_unembed": lambda: on_output(model.lm_head, edit),
    }
    if spec.name in outer:
        return [outer[spec.name]()]
    norms = {"embed_ln": backbone.word_embeddings_layernorm, "ln_final": backbone.ln_f}
    if spec.layer is None:
        component, _, site = spec.name.rpartition(".")
        if component not in norms or site not in _NORM_SITES:
            raise no_reference(spec.name, "bloom.py (install_bloom)")
        return [_norm_inside(norms[component], edit, site == "hook_scale")]
    return _install_in_block(backbone.h[spec.layer], spec, edit)


def _install_in_block(block: Any, spec: HookSpec, edit: Edit) -> list[Any]:
    layer = cast(int, spec.layer)
    attention, mlp, n_heads = block.self_attention, block.mlp, block.self_attention.num_heads
    tail = spec.name.removeprefix(f"blocks.{layer}.")
    norms = {"ln1": block.input_layernorm, "ln2": block.post_attention_layernorm}
    component, _, site = tail.rpartition(".")
    if component in norms and site in _NORM_SITES:
        return [_norm_inside(norms[component], edit, site == "hook_scale")]
    on_heads = by_head(edit, n_heads)
    simple: dict[str, Callable[[], Any]] = {
        "hook_resid_pre": lambda: on_input(block, edit),
        "ln1.hook_out": lambda: on_output(block.input_layernorm, edit),
        "attn.hook_attn_scores": lambda: Intercept(F.softmax, layer, edit, on_input=True),
        "attn.hook_pattern": lambda: on_output(attention.attention_dropout, edit),
        "attn.hook_z": lambda: _merged_heads(attention, on_heads),
        # Three dropouts a block, in this order: the pattern's, attention's contribution, the MLP's.
        "hook_attn_out": lambda: Intercept(F.dropout, 3 * layer + 1, edit, on_input=True),
        "hook_mlp_out": lambda: Intercept(F.dropout, 3 * layer + 2, edit, on_input=True),
        "hook_resid_mid": lambda: on_output(attention, edit),
        "mlp.hook_in": lambda: on_output(block.post_attention_layernorm, edit),
        "hook_mlp_in": lambda: recompute(
            block.post_attention_layernorm, lambda x, _: block.post_attention_layernorm(edit(x))
        ),
        "mlp.hook_pre": lambda: on_output(mlp.dense_h_to_4h, edit),
        "mlp.hook_post": lambda: on_output(mlp.gelu_impl, edit),
        "hook_resid_post": lambda: on_output(block, edit),
    }
    if tail == "attn.hook_result":
        return _result_handles(attention, layer, edit)
    if tail in simple:
        return [simple[tail]()]
    return _install_on_fused(block, tail, edit)


def _merged_heads(attention: Any, edit: Edit) -> Remover:
    """Edit what ``BloomAttention._merge_heads`` gives: the heads' outputs, side by side."""
    original = attention._merge_heads
    attention._merge_heads = lambda x: edit(original(x))
    return Remover(lambda: delattr(attention, "_merge_heads"))


def _result_handles(attention: Any, layer: int, edit: Edit) -> list[Any]:
    """Take each head's product with its columns of ``dense``, edit, and sum."""
    kept: list[Tensor] = []

    def remember(flat: Tensor) -> Tensor:
        kept.append(flat)
        return flat

    def summed(contribution: Tensor) -> Tensor:
        z = kept.pop().unflatten(-1, (attention.num_heads, -1))
        slices = attention.pretraining_tp > 1 and attention.slow_but_exact
        # The layer is called with one head at a time, so an adapter on it acts; without its bias where that is dropped.
        nothing = torch.zeros_like(z)
        bias = attention.dense(nothing.flatten(-2))
        heads = []
        for head in range(attention.num_heads):
            alone = nothing.clone()
            alone[:, :, head] = z[:, :, head]
            heads.append(attention.dense(alone.flatten(-2)) - bias)
        return edit(torch.stack(heads, dim=2)).sum(2) + (0 if slices else bias)

    return [_merged_heads(attention, remember), Intercept(F.dropout, 3 * layer + 1, summed, on_input=True)]


def _install_on_fused(block: Any, tail: str, edit: Edit) -> list[Any]:
    """Edits of queries, keys and values and of the inputs that feed them."""
    attention = block.self_attention
    fused, n_heads = attention.query_key_value, attention.num_heads
    if tail in ("attn.hook_q", "attn.hook_k", "attn.hook_v"):
        index = _PART[tail[-1]]
        return [
            on_output(fused, lambda out: _replace_parts(out, n_heads, {index: edit(_take_part(out, n_heads, index))}))
        ]
    if tail in ("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"):
        index = _PART[tail.removeprefix("attn.")[0]]
        return [
            recompute(
                fused,
                lambda x, out: _replace_parts(out, n_heads, {index: _take_part(fused(edit(x)), n_heads, index)}),
            )
        ]
    if tail not in _COPIES:
        raise no_reference(f"blocks.{{i}}.{tail}", "bloom.py (_install_in_block)")
    parts = [_PART[part] for part in _COPIES[tail]]
    residuals: list[Tensor] = []

    def remember(residual: Tensor) -> Tensor:
        residuals.append(residual)
        return residual

    def again(_x: Tensor, out: Tensor) -> Tensor:
        copies = edit(residuals.pop()[:, :, None, :].repeat(1, 1, n_heads, 1))
        # One head after another through the real norm and the real projection.
        by_head = [fused(block.input_layernorm(copies[:, :, head])) for head in range(n_heads)]
        replaced = {
            index: torch.stack(
                [_take_part(values, n_heads, index)[:, :, head] for head, values in enumerate(by_head)], dim=2
            )
            for index in parts
        }
        return _replace_parts(out, n_heads, replaced)

    return [on_input(block, remember), recompute(fused, again)]
