"""What each part of a model wrote to the residual stream: layers' outputs, heads, neurons, biases.

A function that is given :class:`Onto` gives each part's product with some directions instead of the part itself, after the
norm that reads it; the parts themselves are then never made. Head and neuron results are made a layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_count
from pellucid.decomposition.stream import (
    BranchName,
    CachedRun,
    Frozen,
    StreamModel,
    entering,
    frozen,
    model_of,
    refuse_no_sum,
)
from pellucid.errors import InputError
from pellucid.slices import Slice


@dataclass(frozen=True)
class Onto:
    """Directions that parts are projected on, and the norm between.

    Attributes:
        directions: ``[d_model, n]``.
        norm: what reads the stream, ``None`` for nothing.
    """

    directions: Float[Tensor, "d_model n"]
    norm: Frozen | None = None

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows n"]:
        """``[..., d_model]`` to ``[..., n]``."""
        seen = x if self.norm is None else self.norm(x)
        directions = self.directions.to(seen.device)
        dtype = torch.promote_types(seen.dtype, directions.dtype)
        return seen.to(dtype) @ directions.to(dtype)

    def over(self, axis_of_parts: int) -> Onto:
        """The same for parts ``[..., pos, part, d_model]``, before whose axis a scale has none."""
        return self if self.norm is None else replace(self, norm=_over(self.norm, axis_of_parts))


def _over(norm: Frozen, axis: int) -> Frozen:
    return replace(norm, scale=norm.scale.unsqueeze(axis))


def shown(parts: Float[Tensor, "*rows d_model"], onto: Onto | None) -> Float[Tensor, "*rows _"]:
    """Parts ``[..., d_model]`` as they are, or projected, ``[..., n]``."""
    return parts if onto is None else onto(parts)


def stacked(rows: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "row ..."]:
    """Rows of one shape behind a new first axis.

    Raises:
        InputError: the embedding has other positions than the blocks: a wrapper of the model puts some before the tokens.
    """
    if len({row.shape for row in rows}) > 1:
        raise InputError(
            f"The parts have shapes {sorted({tuple(row.shape) for row in rows})}: the model's wrapper puts virtual "
            "positions before the tokens, which the embedding does not see. Leave the embeddings out (incl_embeds=False)."
        )
    return torch.stack(list(rows))


# -- outputs of branches -----------------------------------------------------------------------------------------------


def embeddings(run: CachedRun, pos: Slice) -> tuple[list[Float[Tensor, "... d_model"]], list[str]]:
    """What enters block 0: the token embedding, and that of positions where there is a table."""
    model = model_of(run)
    names = [name for name in ("hook_embed", "hook_pos_embed") if name in model.hook_index]
    return [pos.apply(run[name], -2) for name in names], [name.removeprefix("hook_") for name in names]


def branch_outputs(
    run: CachedRun, layer: int, mlp_input: bool, pos: Slice, branches: Sequence[str] = ("attn", "mlp")
) -> tuple[list[Float[Tensor, "... d_model"]], list[str]]:
    """What the branches below ``layer`` added, in the order of the layers; with ``mlp_input`` its attention, too."""
    wanted = [(below, branch) for below in range(layer) for branch in branches]
    if mlp_input and "attn" in branches:
        wanted.append((layer, "attn"))
    rows = [pos.apply(run[f"blocks.{below}.hook_{branch}_out"], -2) for below, branch in wanted]
    return rows, [f"{below}_{branch}_out" for below, branch in wanted]


def bias_row(
    run: CachedRun, layer: int, mlp_input: bool, pos: Slice, include_mlp: bool, like: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"] | None:
    """All output biases below ``layer`` as one row ``[..., d_model]``; ``None`` where a model has none.

    Args:
        run: the cache.
        layer: whose input is decomposed.
        mlp_input: with its attention's.
        pos: positions.
        include_mlp: the MLPs' biases, too.
        like: a residual of these positions, for shape and dtype.
    """
    total: Tensor | None = None
    for below in range(layer + mlp_input):
        parts = _constants(run, below, "attn", pos)
        parts += _constants(run, below, "mlp", pos) if include_mlp and below < layer else []
        for part in parts:
            total = part if total is None else total + part.to(total.device)
    return None if total is None else total.to(like).expand_as(like)


def _constants(run: CachedRun, layer: int, branch: BranchName, pos: Slice) -> list[Tensor]:
    """What a branch adds whatever its heads or neurons do."""
    stream = model_of(run).stream
    bias, norm = stream.bias(layer, branch), stream.norm_after(layer, branch)
    found = []
    if bias is not None:
        written = bias * stream.factor(layer)
        found.append(written if norm is None else frozen(run, norm, pos)(written))
    if norm is not None and norm.bias is not None:
        found.append(norm.bias)
    return found


# -- heads -------------------------------------------------------------------------------------------------------------


def head_results(run: CachedRun, layer: int) -> Float[Tensor, "... n_heads d_model"]:
    """``[..., pos, n_heads, d_model]``: what ``hook_result`` holds, each head through the projection without b_O."""
    name = f"blocks.{layer}.attn.hook_result"
    if name in run:
        return run[name]
    weight = model_of(run).stream.weight(layer, "attn")
    z = run[f"blocks.{layer}.attn.hook_z"]
    return torch.einsum("...hd,hdm->...hm", z, weight.to(z))


def heads_written(run: CachedRun, layer: int, pos: Slice, onto: Onto | None = None) -> Float[Tensor, "... n_heads _"]:
    """``[..., n_heads, d_model]``, or ``[..., n_heads, n]``: what each head of a layer added to the stream."""
    name, z_name = (f"blocks.{layer}.attn.hook_{site}" for site in ("result", "z"))
    stream = model_of(run).stream
    norm = stream.norm_after(layer, "attn")
    after = None if norm is None else _over(frozen(run, norm, pos), -2)
    if onto is None or name in run:
        results = pos.apply(head_results(run, layer), -3) * stream.factor(layer)
        written = results if after is None else after(results)
        return written if onto is None else onto.over(-2)(written)
    z = pos.apply(run[z_name], -3)
    weight, scale = _pulled(stream.weight(layer, "attn") * stream.factor(layer), onto.over(-2), after, z)
    return _divided(torch.einsum("...hd,hdn->...hn", z.to(weight.dtype), weight), scale)


def _pulled(weight: Tensor, onto: Onto, after: Frozen | None, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A branch's weight ``[..., d_model]`` times the directions, ``[..., n]``, seen through the norm after the branch and
    the norm that reads the stream; and the scales of these, which the products are still to be divided by.
    """
    directions = onto.directions.to(like.device)
    scales = []
    for norm in (onto.norm, after):
        if norm is not None:
            directions = norm.pulled_back(directions.to(torch.promote_types(directions.dtype, norm.scale.dtype)))
            scales.append(norm.scale.to(like.device))
    dtype = torch.promote_types(torch.promote_types(directions.dtype, weight.dtype), like.dtype)
    return weight.to(like.device, dtype) @ directions.to(dtype), scales


def _divided(products: Tensor, scales: Sequence[Tensor]) -> Tensor:
    for scale in scales:
        products = products / scale
    return products


def stack_heads(
    run: CachedRun, layer: int, pos: Slice, onto: Onto | None = None, what: str = "stack_head_results"
) -> tuple[Float[Tensor, "row ..."] | None, list[str]]:
    """``[layer * n_heads, ..., d_model]`` (or ``n``) of all heads below ``layer``, layer after layer; ``None`` for none."""
    model = model_of(run)
    refuse_no_sum(model, what)
    heads = model.cfg.n_heads
    stack: Tensor | None = None
    for below in range(layer):
        written = heads_written(run, below, pos, onto).movedim(-2, 0)
        if stack is None:
            stack = written.new_empty((layer * heads, *written.shape[1:]))
        stack[below * heads : (below + 1) * heads] = written
    return stack, [f"L{below}H{head}" for below in range(layer) for head in range(heads)]


def sources_written(run: CachedRun, layer: int, pos: Slice, onto: Onto) -> Float[Tensor, "... n_heads source n"]:
    """``[..., n_heads, source, n]``: what each head of a layer moved to a position from each source position, projected.

    A head's values at a source, as it takes them (MPT clips them), times its pattern's entry there; over all sources that
    is :func:`heads_written`.
    """
    stream = model_of(run).stream
    norm = stream.norm_after(layer, "attn")
    after = None if norm is None else _over(_over(frozen(run, norm, pos), -2), -2)
    pattern = pos.apply(run[f"blocks.{layer}.attn.hook_pattern"].movedim(-2, -3), -3)  # [..., pos, head, source]
    values, clip = run[f"blocks.{layer}.attn.hook_v"], stream.clip(layer)
    if clip:  # as Hugging Face asks: 0 cuts nothing off
        values = values.clamp(-clip, clip)
    group = pattern.shape[-2] // values.shape[-2]
    values = values.repeat_interleave(group, -2) if group > 1 else values
    weight, scales = _pulled(stream.weight(layer, "attn") * stream.factor(layer), onto.over(-2).over(-2), after, values)
    said = torch.einsum("...shd,hdn->...hsn", values.to(weight.dtype), weight)
    if pattern.dim() == values.dim():  # several positions of each row
        said = said.unsqueeze(-4)
    return _divided(pattern[..., None].to(said.dtype) * said, scales)


# -- neurons -----------------------------------------------------------------------------------------------------------


def refuse_no_neurons(model: StreamModel) -> None:
    """Refuse to tell neurons apart that cannot be seen.

    Raises:
        InputError: the family's MLPs are made of experts, or its neurons were not found.
    """
    if "blocks.0.mlp.hook_post" not in model.hook_index:
        raise InputError(
            "Neurons are read at mlp.hook_post, and this model has no such point: what its MLPs are made of cannot be seen "
            "apart. Their output as a whole is hook_mlp_out (decompose_resid; expand_neurons=False)."
        )


def neurons_written(
    run: CachedRun, layer: int, neurons: Slice, pos: Slice, onto: Onto | None = None
) -> Float[Tensor, "... neuron _"]:
    """``[..., neuron, d_model]`` or ``[..., neuron, n]``: what each neuron of a layer added to the stream, without b_out."""
    model = model_of(run)
    refuse_no_neurons(model)
    post = neurons.apply(pos.apply(run[f"blocks.{layer}.mlp.hook_post"], -2), -1)
    weight, norm = neurons.apply(model.stream.weight(layer, "mlp"), 0), model.stream.norm_after(layer, "mlp")
    weight = weight * model.stream.factor(layer)
    after = None if norm is None else _over(frozen(run, norm, pos), -2)
    if onto is not None:
        projected, scales = _pulled(weight, onto.over(-2), after, post)
        return _divided(post[..., None].to(projected.dtype) * projected, scales)
    written = post[..., None] * weight.to(post)
    return written if after is None else after(written)


def one_neuron_keeps_its_axis(neurons: Slice) -> Slice:
    """A slice of neurons whose axis stays, an integer's too."""
    return Slice([neurons.slice]) if isinstance(neurons.slice, int) else neurons


def stack_neurons(
    run: CachedRun,
    layer: int,
    neurons: Slice,
    pos: Slice,
    onto: Onto | None = None,
    what: str = "stack_neuron_results",
) -> tuple[Float[Tensor, "row ..."] | None, list[str]]:
    """``[layer * neuron, ..., d_model]`` (or ``n``) of the neurons of each layer below; ``None`` for none."""
    model = model_of(run)
    refuse_no_sum(model, what)
    neurons = one_neuron_keeps_its_axis(neurons)
    indices = neurons.indices(model.cfg.sizes()["d_mlp"]).tolist()
    stack: Tensor | None = None
    for below in range(layer):
        written = neurons_written(run, below, neurons, pos, onto).movedim(-2, 0)
        if stack is None:
            stack = written.new_empty((layer * len(indices), *written.shape[1:]))
        stack[below * len(indices) : (below + 1) * len(indices)] = written
    return stack, [f"L{below}N{neuron}" for below in range(layer) for neuron in indices]


# -- what is left ------------------------------------------------------------------------------------------------------


def with_remainder(
    run: CachedRun,
    stack: Float[Tensor, "row ..."] | None,
    labels: list[str],
    layer: int,
    mlp_input: bool,
    pos: Slice,
    onto: Onto | None,
) -> tuple[Float[Tensor, "_ ..."], list[str]]:
    """The same with one more row: the residual that enters ``layer``, less the rows."""
    left = shown(entering(run, layer, mlp_input, pos), onto)[None]
    if stack is not None:
        left = left - stack.sum(0, keepdim=True)
        left = torch.cat([stack, left.to(stack)])
    return left, [*labels, "remainder"]


def nothing(run: CachedRun, pos: Slice, onto: Onto | None) -> Float[Tensor, "0 ..."]:
    """A stack without rows, of the shape that its rows would have."""
    return shown(entering(run, 0, False, pos), onto)[None][:0]


def neuron_layer(run: CachedRun, layer: int) -> int:
    """A layer whose neurons are asked for; negative counts from the end.

    Raises:
        InputError: no layer.
    """
    n_layers = model_of(run).cfg.n_layers
    return check_count("layer", layer, -n_layers, n_layers - 1) % n_layers
