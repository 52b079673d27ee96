"""The unembedding with the final norm folded into it: in the model, beside a tied table, and in a file.

Where ``b_U`` lives: folding the final norm gives the unembedding a bias, which BLOOM's ``lm_head`` has not. In memory it
is ``lm_head.bias``, so that every route computes with it. Hugging Face's loader drops that key without an error, so
:func:`portable_state` writes it in a form that survives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.form import is_identity, norm_of, shift_of, working_dtype_of
from pellucid.model_bridge.weights.record import chunk_rows, chunks
from pellucid.weight_processing import fold_gain, fold_layer_norm


@dataclass(frozen=True)
class TableChange:
    """What folding the final norm and centring do to the unembedding, row by row.

    Attributes:
        gain: of the norm to fold, or ``None``.
        shift: its bias, or ``None``.
        centres: whether the norm subtracts the mean.
        work: the dtype in which rows are changed.
        mean: mean over the vocabulary of the folded rows, ``[1, d_model]``, to subtract, or ``None``.
        needed: whether the logits, or their mean, depend on it.
    """

    gain: Tensor | None
    shift: Tensor | None
    centres: bool
    work: torch.dtype
    mean: Tensor | None
    needed: bool

    @classmethod
    def of(cls, tree: ComponentTree, fold: bool, centre: bool) -> TableChange:
        """The change for an unembedding and the norm before it."""
        norm, table = norm_of(tree.components["ln_final"]), head_of(tree).weight.detach()
        work, bias = working_dtype_of(tree, table.dtype), shift_of(norm)
        gain, shift = (norm.gain(), None if bias is None else bias.detach()) if fold else (None, None)
        mean = None
        if centre:
            wide = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
            for rows in chunks(table):
                wide += rows.to(work).sum(0)
            mean = (wide / table.shape[0]).to(work)[None]
            mean = cls(gain, shift, norm.centres, work, None, True).rows(mean)[0]  # folding is linear in the rows
        needed = (fold and not is_identity(norm)) or (mean is not None and bool(mean.any()))
        return cls(gain, shift, norm.centres, work, mean, needed)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows of the new table, and what they add to ``b_U``, in the working dtype."""
        wide, added = rows.to(self.work), None
        if self.gain is None:
            return (wide if self.mean is None else wide - self.mean), None
        if self.centres:
            shift = torch.zeros_like(self.gain) if self.shift is None else self.shift
            new, added = fold_layer_norm(wide, None, self.gain, shift)
        else:
            new = fold_gain(wide, self.gain)
        return (new if self.mean is None else new.sub_(self.mean)), added

    def write(self, table: Tensor, into: Tensor, bias: Tensor | None) -> Tensor | None:
        """Write the new table, row by row; ``into`` may be the table itself.

        Returns:
            The new ``b_U`` ``[d_vocab]`` in the table's dtype, ``None`` where there is none to have.
        """
        added = self._added(table)
        for rows, place, part in zip(chunks(table), chunks(into), added.split(chunk_rows(table)), strict=True):
            new, more = self.rows(rows)
            place.copy_(new)
            if more is not None:
                part.copy_(more)
        return self._bias(added, bias, table.dtype)

    def bias(self, table: Tensor, bias: Tensor | None) -> Tensor | None:
        """The new ``b_U`` alone."""
        added = self._added(table)
        for rows, part in zip(chunks(table), added.split(chunk_rows(table)), strict=True):
            more = self.rows(rows)[1]
            if more is not None:
                part.copy_(more)
        return self._bias(added, bias, table.dtype)

    def _added(self, table: Tensor) -> Tensor:
        # One vector from the start: many small ones, kept between large ones that are freed, would tear the heap apart.
        return torch.zeros(table.shape[0], dtype=self.work, device=table.device)

    def _bias(self, added: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if bias is None and not (self.shift is not None and bool(self.shift.any())):
            return None
        new = added if bias is None else added + bias.detach()
        return (new if self.mean is None else new - new.mean()).to(dtype)

    def refuse_overflow(self, table: Tensor) -> None:
        """Refuse a change whose result the table's dtype cannot hold, before anything is written.

        Raises:
            WeightError: it cannot.
        """
        for rows in chunks(table):
            if not bool(torch.isfinite(self.rows(rows)[0].to(table.dtype)).all()):
                raise WeightError(
                    f"The unembedding's weight does not fit {table.dtype} once processed. Load the model in a wider dtype."
                )


def folded_unembedding(tree: ComponentTree) -> tuple[Tensor, Tensor]:
    """``W_U`` ``[d_model, d_vocab]`` and ``b_U`` ``[d_vocab]``, the final norm folded, beside the tied table."""
    head, change = head_of(tree), TableChange.of(tree, fold=True, centre=False)
    with torch.no_grad():
        table = head.weight.detach()
        new = torch.empty_like(table)
        bias = change.write(table, new, bias_of(head))
    return new.T, table.new_zeros(table.shape[0]) if bias is None else bias


def folded_unembedding_bias(tree: ComponentTree) -> Tensor:
    """``b_U`` ``[d_vocab]`` of :func:`folded_unembedding` alone, without the table."""
    head, change = head_of(tree), TableChange.of(tree, fold=True, centre=False)
    with torch.no_grad():
        bias = change.bias(head.weight.detach(), bias_of(head))
    return head.weight.new_zeros(head.weight.shape[0]) if bias is None else bias


def untie(tree: ComponentTree, table: Tensor) -> None:
    """Give the unembedding ``table`` as its own parameter, and say so in the configurations.

    Hugging Face ties again (``tie_weights``, loading, resizing) whenever its configuration says that it should.
    """
    head = tree.components["unembed"].module
    head.weight = nn.Parameter(table, requires_grad=cast(nn.Parameter, head.weight).requires_grad)
    say_tied(tree, False)


def say_tied(tree: ComponentTree, tied: bool) -> None:
    """Say in every configuration whether embedding and unembedding are one table."""
    tree.cfg.tie_word_embeddings = tied
    cast(Any, tree.root).config.tie_word_embeddings = tied
    keys = getattr(tree.root, "all_tied_weights_keys", None)
    if isinstance(keys, dict):
        keys.pop(weight_path(tree, "unembed"), None)
        if tied:
            keys[weight_path(tree, "unembed")] = weight_path(tree, "embed")


def weight_path(tree: ComponentTree, component: str) -> str:
    """Hugging Face's name of a component's weight."""
    return f"{tree.components[component].path}.weight"


def head_of(tree: ComponentTree) -> nn.Linear:
    """The unembedding's module."""
    return cast(nn.Linear, tree.components["unembed"].module)


def bias_of(head: nn.Linear) -> nn.Parameter | None:
    """The unembedding's bias, ``[d_vocab]``, if it has one."""
    return head._parameters.get("bias")


def portable_state(tree: ComponentTree) -> dict[str, Tensor] | None:
    """A state dict that Hugging Face loads without loss, or ``None`` where the model's own is one.

    A bias of the unembedding is a key that ``from_pretrained`` drops, unless the family's class makes one. Its home in a
    checkpoint is the final norm's bias. Folded rows ``w_v`` sum to zero, so with that bias ``t`` throughout and
    ``b_v / (t d_model)`` added to every number of row ``v``, the row gives ``b_v`` for the norm's bias, and for the
    normalised input, whose mean is zero, what it gave before. No gain is divided by, so a gain of 0 is no obstacle, and an
    edited ``W_U`` or ``b_U`` is written as it is. ``t``
    is the power of two that keeps what is added no larger than the table.

    Raises:
        WeightError: the unembedding was given a bias, and the final norm is of a kind that has none to carry it.
    """
    head = head_of(tree)
    if bias_of(head) is None or tree.adapter.family.outside.head_has_bias:
        return None
    norm = norm_of(tree.components["ln_final"])
    shift = shift_of(norm)
    if shift is None or not norm.centres:
        raise WeightError(
            f"{tree.components['unembed'].path} has a bias, which Hugging Face's loader drops, and {norm.path} has none "
            "that could carry it. Take it off (register_parameter('bias', None)) before saving."
        )
    with torch.no_grad():
        change = TableChange.of(tree, fold=True, centre=False)
        old = head.weight.detach()
        bias = cast(Tensor, change.bias(old, bias_of(head))).to(change.work)
        size = float(torch.linalg.vector_norm(old, dtype=torch.float64)) / old.numel() ** 0.5
        level = float(bias.square().mean().sqrt()) / old.shape[1]
        t = _power_of_two(level / size) if size > 0 and level > 0 else 1.0
        table = torch.empty_like(old)
        per_row = bias / (t * old.shape[1])
        for rows, place, added in zip(chunks(old), chunks(table), per_row.split(chunk_rows(old)), strict=True):
            place.copy_(change.rows(rows)[0] + added[:, None])
    state = tree.root.state_dict()
    state.pop(f"{tree.components['unembed'].path}.bias")
    return {
        **state,
        weight_path(tree, "unembed"): table,
        weight_path(tree, "ln_final"): torch.ones_like(norm.gain()),
        f"{norm.path}.bias": torch.full_like(shift, t),
    }


@contextmanager
def loading(tree: ComponentTree, state: Mapping[str, Any]) -> Iterator[None]:
    """While a state dict is loaded: the bias that folding made is none of a model's whose state has the table and no bias.

    It is put back if loading fails.
    """
    head, path = head_of(tree), tree.components["unembed"].path
    bias = bias_of(head)
    made = not tree.adapter.family.outside.head_has_bias
    if bias is None or not made or f"{path}.weight" not in state or f"{path}.bias" in state:
        yield
        return
    head.register_parameter("bias", None)
    try:
        yield
    except BaseException:
        head.register_parameter("bias", bias)
        raise


def _power_of_two(value: float) -> float:
    """The power of two at or above ``value``, between 2^-10 and 2^10."""
    return float(2.0 ** min(10, max(-10, math.ceil(math.log2(value)))))
