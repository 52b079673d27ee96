"""Edits on a bare decoder of any family that is data: where each tensor is a module's input or output, or passes a function.

What a residual is added to again after a branch is edited in place, by a hook before the branch: Hugging Face's block holds
the very tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pellucid.config import TransformerBridgeConfig
from pellucid.model_bridge.family import Family
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

_CACHES = ("past_key_values", "layer_past", "cache")


class DecoderEdits:
    """Edits of one model.

    Args:
        model: the bare Hugging Face model.
        family: its family, as it has it.
        cfg: its sizes.
    """

    def __init__(self, model: nn.Module, family: Family, cfg: TransformerBridgeConfig) -> None:
        self.model: Any = model
        self.family, self.cfg = family, cfg
        self.backbone: Any = model.get_submodule(family.outside.backbone)

    def install(self, spec: HookSpec, edit: Edit) -> list[Any]:
        """Handles (with ``remove``) or function modes that make one edit.

        Raises:
            NoReferenceError: nobody has written what an edit there is.
        """
        if not self.family.mlp.name and spec.component.endswith((".ln2", ".mlp")):
            sizes: list[tuple[int, int]] = []
            # There the block has rows and positions as one axis.
            made = self._install(spec, lambda flat: edit(flat.unflatten(0, sizes[-1])).flatten(0, 1))
            block = self.backbone.get_submodule(f"{self.family.outside.blocks}.{spec.layer}")
            return [block.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:2])), *made]
        return self._install(spec, edit)

    def _install(self, spec: HookSpec, edit: Edit) -> list[Any]:
        if spec.name.endswith((".hook_scale", ".hook_normalized")):
            return [self._norm_inside(self._norm(spec), edit, spec.name.endswith("hook_scale"))]
        if spec.layer is None:
            outside = self._outside(edit)
            if spec.name not in outside:
                raise no_reference(spec.name, "decoder.py (DecoderEdits._outside)")
            return [outside[spec.name]()]
        tail = spec.name.removeprefix(f"blocks.{spec.layer}.")
        block = self.backbone.get_submodule(f"{self.family.outside.blocks}.{spec.layer}")
        return self._in_block(block, tail, edit)

    def _outside(self, edit: Edit) -> Mapping[str, Callable[[], Any]]:
        outside = self.family.outside
        embed, final = self.backbone.get_submodule(outside.embed), self.backbone.get_submodule(outside.final_norm)
        head = self.model.get_submodule(outside.head)
        return {
            "embed.hook_in": lambda: on_input(embed, edit),
            "embed.hook_out": lambda: on_output(embed, edit),
            "hook_embed": lambda: on_output(
                self.backbone.get_submodule(outside.embed_norm) if outside.embed_norm else embed, edit
            ),
            "hook_pos_embed": lambda: self._positions(embed, edit),
            "ln_final.hook_out": lambda: on_output(final, edit),
            "hook_unembed": lambda: on_output(head, edit),
            "hook_logits": lambda: self.model.register_forward_hook(lambda module, args, out: _with_logits(out, edit)),
        }

    def _positions(self, embed: nn.Module, edit: Edit) -> Remover:
        """Hugging Face looks positions up once for all rows: the edit is of each row's."""
        rows: list[int] = []
        first = embed.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
        table = self.backbone.get_submodule(self.family.outside.pos_embed)
        second = on_output(table, lambda out: edit(out.expand(rows[-1], -1, -1).clone()))

        def undo() -> None:
            first.remove()
            second.remove()

        return Remover(undo)

    def _norm(self, spec: HookSpec) -> nn.Module:
        block, outside = self.family.block, self.family.outside
        inside = f"{outside.blocks}.{spec.layer}"
        paths = {
            "ln_final": outside.final_norm,
            "embed_ln": outside.embed_norm,
            f"blocks.{spec.layer}.ln1": f"{inside}.{block.ln1}",
            f"blocks.{spec.layer}.ln2": f"{inside}.{block.ln2}",
            f"blocks.{spec.layer}.ln1_post": f"{inside}.{block.ln1_post}",
            f"blocks.{spec.layer}.ln2_post": f"{inside}.{block.ln2_post}",
        }
        component = spec.name.rpartition(".")[0]
        if component not in paths:
            name = spec.name.replace(f"blocks.{spec.layer}.", "blocks.{i}.")
            raise no_reference(name, "decoder.py (DecoderEdits._norm)")
        return cast(nn.Module, self.backbone.get_submodule(paths[component]))

    def _norm_inside(self, norm: nn.Module, edit: Edit, of_scale: bool) -> Any:
        kind = self.family.norm
        module: Any = norm

        def again(x: Tensor, output: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            if kind.centres:
                wide = wide - wide.mean(-1, keepdim=True)
            eps = module.variance_epsilon if "variance_epsilon" in vars(module) else module.eps
            scale = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
            normalized = wide / (edit(scale) if of_scale else scale)
            if not of_scale:
                normalized = edit(normalized)
            if kind.kind == "layer":
                made = normalized * module.weight + (0 if module.bias is None else module.bias)
            elif kind.gain == "1 + weight":
                made = normalized * (1 + module.weight.to(wide.dtype))
            else:
                made = (normalized.to(x.dtype) if kind.rounds_first else normalized) * module.weight
            return cast(Tensor, made).to(output.dtype)

        return recompute(norm, again)

    # -- a block -------------------------------------------------------------------------------------------------------

    def _in_block(self, block: Any, tail: str, edit: Edit) -> list[Any]:
        names, mlp_names, cfg = self.family.block, self.family.mlp, self.cfg
        attention = block.get_submodule(self.family.attention.name)
        mlp = block.get_submodule(mlp_names.name)

        def child(name: str) -> nn.Module:
            return cast(nn.Module, block.get_submodule(name))

        simple: dict[str, Callable[[], Any]] = {
            "hook_resid_pre": lambda: on_input(block, edit),
            "hook_resid_post": lambda: on_output(block, edit),
            "ln1.hook_out": lambda: on_output(child(names.ln1), edit),
            "ln2.hook_in": lambda: on_input(child(names.ln2), edit),
            "hook_mlp_in": lambda: on_input(child(names.ln2), edit),
            "mlp.hook_in": lambda: on_output(child(names.ln2), edit),
            "hook_resid_mid": lambda: _in_place_on_input(child(names.ln2) if names.ln2 else mlp, edit),
            "mlp.hook_post": lambda: on_input(mlp.get_submodule(mlp_names.down), edit),
            "mlp.hook_out": lambda: on_output(mlp.get_submodule(mlp_names.down), edit),
            "hook_mlp_out": lambda: on_output(
                child(names.ln2_post) if names.ln2_post else mlp.get_submodule(mlp_names.down), edit
            ),
            "hook_attn_out": lambda: on_output(
                child(names.ln1_post) if names.ln1_post else attention.get_submodule(self.family.attention.o), edit
            ),
            "attn.hook_out": lambda: on_output(attention.get_submodule(self.family.attention.o), edit),
        }
        if mlp_names.router:
            simple |= {
                "mlp.hook_out": lambda: on_output(mlp, edit),
                "mlp.hook_router_logits": lambda: _router_logits(mlp, mlp.get_submodule(mlp_names.router), edit),
            }
            if not names.ln2_post:
                simple["hook_mlp_out"] = simple["mlp.hook_out"]
        if names.multiplier and tail in ("hook_attn_out", "hook_mlp_out"):
            edited = attention if tail == "hook_attn_out" else mlp
            return _products(
                block, names.multiplier, {each: edit if each is edited else None for each in (attention, mlp)}
            )
        if tail in simple:
            return [simple[tail]()]
        if tail.startswith("mlp."):
            width = cfg.sizes()["d_mlp"]
            return [self._mlp(mlp, tail, edit, width)]
        if tail in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"):
            parts = "qkv" if tail == "hook_attn_in" else tail[5]
            return self._copies(block, attention, parts, edit)
        if not tail.startswith("attn."):
            raise no_reference(f"blocks.{{i}}.{tail}", "decoder.py (DecoderEdits._in_block)")
        site = tail.removeprefix("attn.")
        if self.family.attention.qkv and site in ("q.hook_in", "k.hook_in", "v.hook_in"):
            fused = attention.get_submodule(self.family.attention.qkv)
            return [recompute(fused, lambda x, out: self._with_part(out, site[0], self._part(fused(edit(x)), site[0])))]
        return [self._attention(attention, site, edit)]

    def _copies(self, block: Any, attention: Any, parts: str, edit: Edit) -> list[Any]:
        """Edit copies of the residual before the first norm, one a head: norm and projection run once for each head."""
        names = self.family.attention
        norm = block.get_submodule(self.family.block.ln1) if self.family.block.ln1 else nn.Identity()
        residuals: list[Tensor] = []

        def remember(residual: Tensor) -> Tensor:
            residuals[:] = [residual]
            return residual

        def heads_of(linear: nn.Module, part: str) -> Tensor:
            copies = edit(residuals[0][:, :, None, :].repeat(1, 1, self._count(part), 1))
            each = [self._part(linear(norm(copies[:, :, head])), part) for head in range(self._count(part))]
            return torch.stack([made[:, :, head] for head, made in enumerate(each)], dim=2)

        def again(linear: nn.Module, mine: str, _x: Tensor, output: Tensor) -> Tensor:
            for part in mine:
                output = self._with_part(output, part, heads_of(linear, part))
            return output

        handles = [on_input(block, remember)]
        by_module = {names.qkv: parts} if names.qkv else {self._separate(part): part for part in parts}
        for name, mine in by_module.items():
            linear = attention.get_submodule(name)
            handles.append(recompute(linear, partial(again, linear, mine)))
        return handles

    def _separate(self, part: str) -> str:
        names = self.family.attention
        return {"q": names.q, "k": names.k, "v": names.v}[part]

    def _count(self, part: str) -> int:
        return self.cfg.n_heads if part == "q" else self.cfg.n_key_value_heads

    def _part(self, output: Tensor, part: str) -> Tensor:
        """One part of a projection's output, ``[batch, pos, heads, d_head]``."""
        if not self.family.attention.qkv:
            return cast(Tensor, output.unflatten(-1, (self._count(part), -1)))
        taken: list[Tensor] = []

        def take(heads: Tensor) -> Tensor:
            taken.append(heads.clone())
            return heads

        self._fused(output, part, take)
        return taken[0]

    def _with_part(self, output: Tensor, part: str, heads: Tensor) -> Tensor:
        """A projection's output with one part replaced."""
        return self._fused(output, part, lambda _: heads) if self.family.attention.qkv else heads.flatten(-2)

    def _mlp(self, mlp: Any, tail: str, edit: Edit, width: int) -> Any:
        names = self.family.mlp
        if tail not in ("mlp.hook_pre", "mlp.hook_pre_linear"):
            raise no_reference(f"blocks.{{i}}.{tail}", "decoder.py (DecoderEdits._in_block or ._mlp)")
        if names.gate_up:
            first = slice(0, width) if tail == "mlp.hook_pre" else slice(width, 2 * width)
            return on_output(mlp.get_submodule(names.gate_up), lambda out: _replaced(out, first, edit))
        gated = names.gate if tail == "mlp.hook_pre" and names.gate else names.up
        return on_output(mlp.get_submodule(gated), edit)

    def _attention(self, attention: Any, site: str, edit: Edit) -> Any:
        names, cfg = self.family.attention, self.cfg
        output = attention.get_submodule(names.o)
        if site == "hook_z":
            return on_input(output, by_head(edit, cfg.n_heads))
        if site == "hook_result":
            return _results(output, edit, cfg.n_heads)
        if site in ("hook_q", "hook_k", "hook_v"):
            part = site[-1]
            if names.qkv:
                return on_output(attention.get_submodule(names.qkv), lambda out: self._fused(out, part, edit))
            return on_output(attention.get_submodule(self._separate(part)), by_head(edit, self._count(part)))
        if site in ("q.hook_in", "k.hook_in", "v.hook_in"):
            return on_input(attention.get_submodule(self._separate(site[0])), edit)
        if site in ("hook_q_normed", "hook_k_normed"):
            part = site[5]
            norm = attention.get_submodule(names.q_norm if part == "q" else names.k_norm)
            if names.head_norm == "flat":
                return on_output(norm, by_head(edit, self._count(part)))
            return on_output(norm, edit if names.head_norm == "positions first" else _heads_first(edit))
        if site == "hook_rot_k":
            one_each = _one_of_each(_heads_first(edit), cfg.n_key_value_heads)
            return attention.register_forward_pre_hook(
                lambda module, args, kwargs: (args, _with_cache(kwargs, one_each)), with_kwargs=True
            )
        if site == "hook_rot_q" and names.softmax_in not in ("function", "forward"):
            return _into_method(attention, names.softmax_in, _heads_first(edit))
        if site == "hook_rot_q" and names.softmax_in == "forward":  # after the product of a fused projection
            return _Inside(attention, Intercept(torch.Tensor.matmul, 1, _heads_first(edit), on_input=True))
        if site == "hook_rot_q":
            return _Inside(attention, Intercept(torch.matmul, 0, _heads_first(edit), on_input=True))
        if site == "hook_attn_scores":
            return _Inside(attention, Intercept(F.softmax, 0, edit, on_input=True))
        if site != "hook_pattern":
            raise no_reference(f"blocks.{{i}}.attn.{site}", "decoder.py (DecoderEdits._attention)")
        if names.pattern_at not in ("dropout", "softmax"):
            return on_output(attention.get_submodule(names.pattern_at), edit)
        function = F.dropout if names.pattern_at == "dropout" else F.softmax
        return _Inside(attention, Intercept(function, 0, edit, on_input=False))

    def _fused(self, fused: Tensor, part: str, edit: Edit) -> Tensor:
        """A copy of a fused projection's output with one part edited."""
        cfg = self.cfg
        batch, length, _ = fused.shape
        if self.family.attention.layout == "stacked":
            q, kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
            start, width = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[part]
            return _replaced(fused, slice(start, start + width), by_head(edit, width // cfg.d_head))
        group = cfg.n_heads // cfg.n_key_value_heads
        view = fused.reshape(batch, length, cfg.n_key_value_heads, group + 2, cfg.d_head).clone()
        chosen = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, group + 2)}[part]
        heads = view[:, :, :, chosen].clone().flatten(2, 3)  # of one group, a view of what is written to
        view[:, :, :, chosen] = edit(heads).view(batch, length, cfg.n_key_value_heads, -1, cfg.d_head)
        return view.view_as(fused)


class _Inside(TorchFunctionMode):
    """A function mode that sees the calls of one module alone.

    Args:
        module: whose calls.
        mode: what sees them; its count of calls begins anew with each call of the module.
    """

    def __init__(self, module: nn.Module, mode: Intercept) -> None:
        super().__init__()
        self._mode, self._inside = mode, False
        self._handles = [
            module.register_forward_pre_hook(lambda module, args: self._enter(True)),
            module.register_forward_hook(lambda module, args, output: self._enter(False)),
        ]

    def also(self, handle: Any) -> None:
        """Remove another handle when the mode ends."""
        self._handles.append(handle)

    def _enter(self, inside: bool) -> None:
        self._inside, self._mode.seen = inside, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return self._mode.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)


def _router_logits(mlp: nn.Module, router: nn.Module, edit: Edit) -> Any:
    """Edit what a router's linear map gives, ``[batch * pos, n_experts]``, by row and position."""
    shapes: list[torch.Size] = []
    handle = mlp.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))

    def by_row(logits: Tensor) -> Tensor:
        return edit(logits.view(*shapes[-1], -1)).flatten(0, 1)

    mode = _Inside(router, Intercept(F.linear, 0, by_row, on_input=False))
    mode.also(handle)
    return mode


def _into_method(module: nn.Module, name: str, edit: Edit) -> Remover:
    """Edit the first argument of a method that holds the scores."""
    original = getattr(module, name)
    vars(module)[name] = lambda query, *args, **kwargs: original(edit(query), *args, **kwargs)
    return Remover(lambda: vars(module).pop(name))


def _products(block: Any, multiplier: str, branches: Mapping[nn.Module, Edit | None]) -> list[Any]:
    """Let each branch give its product with the block's multiplier, edited or not, and the block multiply it with 1."""
    number = getattr(block, multiplier)

    def product(edit: Edit | None) -> Edit:
        return lambda output: output * number if edit is None else edit(output * number)

    handles: list[Any] = [on_output(branch, product(edit)) for branch, edit in branches.items()]
    setattr(block, multiplier, 1.0)
    return [*handles, Remover(lambda: setattr(block, multiplier, number))]


def _in_place_on_input(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].copy_(edit(args[0].clone()))

    return module.register_forward_pre_hook(hook)


def _heads_first(edit: Edit) -> Edit:
    return lambda value: edit(value.transpose(1, 2)).transpose(1, 2)


def _one_of_each(edit: Edit, heads: int) -> Edit:
    """``edit`` of keys ``[batch, heads, ...]`` that may have been repeated for each head of queries."""

    def edited(keys: Tensor) -> Tensor:
        each = keys.shape[1] // heads
        return (
            edit(keys) if each == 1 else torch.empty_like(keys).copy_(edit(keys[:, ::each]).repeat_interleave(each, 1))
        )

    return edited


def _replaced(fused: Tensor, where: slice, edit: Edit) -> Tensor:
    made = fused.clone()
    made[..., where] = edit(fused[..., where])
    return made


def _with_logits(output: Any, edit: Edit) -> Any:
    if isinstance(output, tuple):
        return (edit(output[0]), *output[1:])
    output.logits = edit(output.logits)
    return output


def _results(linear: nn.Module, edit: Edit, n_heads: int) -> Any:
    """Each head's product with its part of the output projection, edited and summed: the layer is called a head at a
    time.
    """

    def again(flat: Tensor, output: Tensor) -> Tensor:
        z = flat.unflatten(-1, (n_heads, -1))
        nothing = torch.zeros_like(z)
        bias = linear(nothing.flatten(-2))
        heads = []
        for head in range(n_heads):
            alone = nothing.clone()
            alone[:, :, head] = z[:, :, head]
            heads.append(linear(alone.flatten(-2)) - bias)
        return cast(Tensor, edit(torch.stack(heads, dim=2)).sum(2) + bias)

    return recompute(linear, again)


class _EditingCache:
    """What an attention is given as its cache: keys are edited on their way in."""

    def __init__(self, cache: Any, edit: Edit) -> None:
        self._cache, self._edit = cache, edit

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = self._edit(keys)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)


def _with_cache(kwargs: Mapping[str, Any], edit: Edit) -> dict[str, Any]:
    name = next(name for name in _CACHES if name in kwargs)
    return {**kwargs, name: _EditingCache(kwargs[name], edit)}
