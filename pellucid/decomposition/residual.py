"""TransformerLens' stacks of a residual stream: as it accumulates, by layer's output, and down to heads and neurons.

A stack is ``[row, batch, pos, d_model]``, less the axes that the cache or a position slice dropped, and has a label a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_choice, check_kind
from pellucid.decomposition.parts import (
    Onto,
    bias_row,
    branch_outputs,
    embeddings,
    nothing,
    shown,
    stack_heads,
    stack_neurons,
    stacked,
    with_remainder,
)
from pellucid.decomposition.stream import (
    CachedRun,
    Frozen,
    check_mlp_input,
    end_of,
    frozen,
    model_of,
    reader_of,
    refuse_no_sum,
)
from pellucid.errors import InputError
from pellucid.slices import Slice, SliceInput

MODES = ("all", "attn", "mlp")

Stack = tuple[Float[Tensor, "row ..."], list[str]]
"""Rows and their labels."""


def accumulated(
    run: CachedRun, layer: int | None, incl_mid: bool, apply_ln: bool, pos_slice: Slice | SliceInput, mlp_input: bool
) -> Stack:
    """See :meth:`DecompositionMethods.accumulated_resid`."""
    model, pos = model_of(run), Slice.of(pos_slice)
    end = end_of(model, layer)
    check_mlp_input(model, end, mlp_input)
    if incl_mid and "blocks.0.hook_resid_mid" not in model.hook_index:
        raise InputError(
            "incl_mid=True asks for hook_resid_mid, and this model has none: its blocks are parallel, attention and MLP "
            "read one residual."
        )
    names: list[tuple[str, str]] = []
    for below in range(end + 1):
        if below == model.cfg.n_layers:
            names.append((f"blocks.{below - 1}.hook_resid_post", "final_post"))
            continue
        names.append((f"blocks.{below}.hook_resid_pre", f"{below}_pre"))
        if (incl_mid and below < end) or (mlp_input and below == end):
            names.append((f"blocks.{below}.hook_resid_mid", f"{below}_mid"))
    stack = torch.stack([pos.apply(run[name], -2) for name, _ in names])
    if apply_ln:
        stack = with_ln(run, stack, end, mlp_input, pos, recompute=end == model.cfg.n_layers)
    return stack, [label for _, label in names]


def decomposed(
    run: CachedRun,
    layer: int | None,
    mlp_input: bool,
    mode: str,
    apply_ln: bool,
    pos_slice: Slice | SliceInput,
    incl_embeds: bool,
) -> Stack:
    """See :meth:`DecompositionMethods.decompose_resid`."""
    model, pos = model_of(run), Slice.of(pos_slice)
    check_choice("mode", mode, MODES)
    end = end_of(model, layer)
    refuse_no_sum(model, "decompose_resid")
    check_mlp_input(model, end, mlp_input)
    rows, labels = embeddings(run, pos) if incl_embeds else ([], [])
    more = branch_outputs(run, end, mlp_input, pos, ("attn", "mlp") if mode == "all" else (mode,))
    rows, labels = rows + more[0], labels + more[1]
    stack = stacked(rows) if rows else nothing(run, pos, None)
    return (with_ln(run, stack, end, mlp_input, pos) if apply_ln else stack), labels


def with_ln(
    run: CachedRun,
    stack: Float[Tensor, "*rows d_model"],
    layer: int,
    mlp_input: bool,
    pos: Slice,
    recompute: bool = False,
) -> Float[Tensor, "*rows d_model"]:
    """A stack as the norm that reads the layer's input sees it; ``recompute``: the final norm itself, row by row."""
    model = model_of(run)
    if recompute:
        return torch.stack([model.stream.final_norm(row) for row in stack])
    return frozen(run, reader_of(model, layer, mlp_input), pos)(stack)


def as_read(
    run: CachedRun,
    residual_stack: Float[Tensor, "row ... d_model"],
    layer: int | None,
    mlp_input: bool,
    pos_slice: Slice | SliceInput,
    batch_slice: Slice | SliceInput,
    has_batch_dim: bool,
    recompute_ln: bool,
) -> Float[Tensor, "row ... d_model"]:
    """See :meth:`DecompositionMethods.apply_ln_to_stack`."""
    model = model_of(run)
    end = end_of(model, layer)
    if recompute_ln and end == model.cfg.n_layers:
        stack = _rows_of(run, residual_stack, Slice.of(batch_slice), has_batch_dim)
        return with_ln(run, stack, end, mlp_input, Slice.of(pos_slice), recompute=True)
    stack, norm = read_by(run, residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim)
    return norm(stack)


def read_by(
    run: CachedRun,
    residual_stack: Float[Tensor, "row ... d_model"],
    layer: int | None,
    mlp_input: bool,
    pos_slice: Slice | SliceInput,
    batch_slice: Slice | SliceInput,
    has_batch_dim: bool,
) -> tuple[Float[Tensor, "row ... d_model"], Frozen]:
    """The rows of a stack that are asked for, and the norm that reads them, its scale at their rows and positions."""
    model, pos, batch = model_of(run), Slice.of(pos_slice), Slice.of(batch_slice)
    end = end_of(model, layer)
    check_mlp_input(model, end, mlp_input)
    stack = _rows_of(run, residual_stack, batch, has_batch_dim)
    return stack, _fitting(frozen(run, reader_of(model, end, mlp_input), pos, batch), stack)


def _rows_of(run: CachedRun, residual_stack: Tensor, batch: Slice, has_batch_dim: bool) -> Tensor:
    """A stack at some rows.

    Raises:
        InputError: no stack of this model's residuals.
    """
    check_kind("residual_stack", residual_stack, Tensor, "a tensor [row, batch, pos, d_model]")
    d_model = model_of(run).cfg.d_model
    if residual_stack.shape[-1] != d_model:
        raise InputError(
            f"residual_stack holds residuals of {d_model} features; found shape {list(residual_stack.shape)}."
        )
    return batch.apply(residual_stack, 1) if has_batch_dim and batch.mode != "identity" else residual_stack


def _fitting(norm: Frozen, stack: Tensor) -> Frozen:
    """The norm, if its scale can be broadcast against a stack.

    Raises:
        InputError: the positions or rows of the two differ.
    """
    try:
        torch.broadcast_shapes(norm.scale.shape, stack.shape)
    except RuntimeError:
        raise InputError(
            f"residual_stack has shape {list(stack.shape)}, and the run's scale {list(norm.scale.shape)}: give the same "
            "pos_slice and batch_slice that the stack was made with."
        ) from None
    return norm


# -- heads and neurons -------------------------------------------------------------------------------------------------


def heads(
    run: CachedRun, layer: int | None, incl_remainder: bool, pos_slice: Slice | SliceInput, apply_ln: bool
) -> Stack:
    """See :meth:`DecompositionMethods.stack_head_results`."""
    model, pos = model_of(run), Slice.of(pos_slice)
    end = end_of(model, layer)
    found, labels = stack_heads(run, end, pos)
    if incl_remainder:
        found, labels = with_remainder(run, found, labels, end, False, pos, None)
    stack = nothing(run, pos, None) if found is None else found
    return (with_ln(run, stack, end, False, pos) if apply_ln else stack), labels


def neurons(
    run: CachedRun,
    layer: int | None,
    pos_slice: Slice | SliceInput,
    neuron_slice: Slice | SliceInput,
    incl_remainder: bool,
    apply_ln: bool,
    project_output_onto: Float[Tensor, " d_model *n"] | None,
    mlp_input: bool,
) -> Stack:
    """See :meth:`DecompositionMethods.stack_neuron_results`."""
    model, pos = model_of(run), Slice.of(pos_slice)
    end = end_of(model, layer)
    check_mlp_input(model, end, mlp_input)
    onto = onto_of(run, project_output_onto, end, mlp_input, pos, apply_ln)
    found, labels = stack_neurons(run, end, Slice.of(neuron_slice), pos, onto)
    if incl_remainder:
        found, labels = with_remainder(run, found, labels, end, mlp_input, pos, onto)
    stack = nothing(run, pos, onto) if found is None else found
    if apply_ln and onto is None:
        stack = with_ln(run, stack, end, mlp_input, pos)
    return squeezed(stack, project_output_onto), labels


def in_full(
    run: CachedRun,
    layer: int | None,
    mlp_input: bool,
    expand_neurons: bool,
    apply_ln: bool,
    pos_slice: Slice | SliceInput,
    project_output_onto: Float[Tensor, " d_model *n"] | None,
) -> Stack:
    """See :meth:`DecompositionMethods.get_full_resid_decomposition`."""
    model, pos, what = model_of(run), Slice.of(pos_slice), "get_full_resid_decomposition"
    end = end_of(model, layer)
    refuse_no_sum(model, what)
    check_mlp_input(model, end, mlp_input)
    onto = onto_of(run, project_output_onto, end, mlp_input, pos, apply_ln)
    pieces: list[Tensor] = []
    labels: list[str] = []
    by_head, head_labels = stack_heads(run, end + mlp_input, pos, onto, what)
    entered, embed_labels = embeddings(run, pos)
    if by_head is not None:
        pieces.append(by_head)
    if end and expand_neurons:
        by_neuron, neuron_labels = stack_neurons(run, end, Slice(None), pos, onto, what)
        assert by_neuron is not None
        pieces.append(by_neuron)
    else:
        outputs, neuron_labels = branch_outputs(run, end, False, pos, ("mlp",))
        pieces += [shown(output, onto)[None] for output in outputs]
    bias = bias_row(run, end, mlp_input, pos, expand_neurons, entered[0])
    rows = [*entered, *([] if bias is None else [bias])]
    pieces.append(shown(stacked(rows), onto))
    labels = [*head_labels, *neuron_labels, *embed_labels, *([] if bias is None else ["bias"])]
    stack = _joined(pieces)
    if apply_ln and onto is None:
        stack = with_ln(run, stack, end, mlp_input, pos)
    return squeezed(stack, project_output_onto), labels


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Stacks one after the other, in the widest of their dtypes."""
    dtype = pieces[0].dtype
    for piece in pieces[1:]:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.to(pieces[0].device, dtype) for piece in pieces])


# -- projections -------------------------------------------------------------------------------------------------------


def onto_of(
    run: CachedRun,
    directions: Float[Tensor, " d_model *n"] | None,
    layer: int,
    mlp_input: bool,
    pos: Slice,
    apply_ln: bool,
) -> Onto | None:
    """What ``project_output_onto`` and ``apply_ln`` mean together.

    Raises:
        InputError: no directions ``[d_model]`` or ``[d_model, n]``.
    """
    if directions is None:
        return None
    d_model = model_of(run).cfg.d_model
    check_kind("project_output_onto", directions, Tensor, f"a tensor [{d_model}] or [{d_model}, n]")
    if directions.dim() not in (1, 2) or directions.shape[0] != d_model:
        raise InputError(
            f"project_output_onto is directions [{d_model}] or [{d_model}, n]; found shape {list(directions.shape)}."
        )
    norm = frozen(run, reader_of(model_of(run), layer, mlp_input), pos) if apply_ln else None
    return Onto(directions.reshape(d_model, -1), norm)


def squeezed(stack: Float[Tensor, "..."], directions: Float[Tensor, " d_model *n"] | None) -> Float[Tensor, "..."]:
    """Without the last axis where one direction ``[d_model]`` was given."""
    return stack.squeeze(-1) if directions is not None and directions.dim() == 1 else stack
