"""What each sender of a path changes in the residual stream, and the edits that put that change into receivers' inputs.

:mod:`pellucid.experiments.path_patching` says what a path is. The steps here: (1) senders are read from the original and the
new run, and their differences kept, zero where the path does not run; (2) with computed MLPs each difference is followed
along the stream; (3) a receiver's input is edited by the difference that arrives there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import psutil
import torch
from torch import Tensor

from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.paths import PARTS, Receiver, Sender, Stream
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag
from pellucid.run_context import hooks_suppressed
from pellucid.sweep import Add, Edit, FromRun, SetTo
from pellucid.sweep.unedited import Unedited

Inputs: TypeAlias = Literal["added", "set"]

MLP_ROWS = 2048
"""Positions that go through an MLP together where paths lead through MLPs."""


@dataclass(frozen=True, eq=False)
class InputEdit:
    """What goes into a receiver: for the stream ``[row, pos, d_model]``, for heads ``[row, pos, 1, d_model]``, and where."""

    value: Add | SetTo
    by_head: Add | SetTo
    columns: list[int] | None


def refuse_parts(bridge: TransformerBridge, senders: Sequence[Sender], receivers: Sequence[Receiver]) -> None:
    """Refuse ends of paths that a family does not have.

    Raises:
        UnsupportedModelError: with the end, and what there is in its place.
    """
    family, index = bridge.adapter.family, bridge.hook_index
    head = next((sender for sender in senders if sender.kind == "head"), None)
    if head is not None and family.block.ln1_post:
        raise UnsupportedModelError(
            f"{family.title} norms what all heads of a layer give together before it is added to the residual stream: no "
            f"head adds a part of its own, and {head.name} cannot be a sender. Take L{head.layer}.attn_out."
        )
    for receiver in receivers:
        hook = "hook_mlp_in" if receiver.kind == "mlp_in" else f"hook_{receiver.kind}_input"
        if receiver.kind != "final" and f"blocks.{receiver.layer}.{hook}" not in index:
            raise UnsupportedModelError(
                f"{family.title} has no {hook}, a copy of the residual that feeds {receiver.name} alone: it cannot be a "
                "receiver. Take other receivers, such as final."
            )


class PathEdits:
    """What each sender changes at each place of the stream, and the edits that put it into receivers.

    Args:
        bridge: the model.
        original: the run that is edited.
        new: the run that senders are taken from.
        senders: all senders asked for.
        receivers: all receivers asked for.
        columns: positions of the paths.
        freeze_mlps: paths do not lead through MLPs.
        inputs: whether differences are added, or inputs set.
        memory_limit: for the differences.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        original: Unedited,
        new: Unedited,
        senders: Sequence[Sender],
        receivers: Sequence[Receiver],
        columns: Sequence[int],
        freeze_mlps: bool,
        inputs: Inputs,
        memory_limit: int | None,
    ) -> None:
        self.bridge, self.inputs, self.freeze_mlps = bridge, inputs, freeze_mlps
        self.n_layers = bridge.cfg.n_layers
        self.stream = Stream(self.n_layers, bridge.adapter.family.block.parallel)
        flags: list[Flag] = []
        if any(receiver.kind in PARTS for receiver in receivers):
            flags.append("use_split_qkv_input")
        if any(receiver.kind == "mlp_in" for receiver in receivers):
            flags.append("use_hook_mlp_in")
        self.flags = tuple(flags)
        self.places = sorted({receiver.place for receiver in receivers})
        self._changes: dict[tuple[str, int | None, tuple[int, ...]], InputEdit | None] = {}
        names = list(dict.fromkeys(sender.hook for sender in senders))
        more = ["ln_final.hook_scale"]
        if inputs == "set" or not freeze_mlps:
            more += [self.stream.hook(place) for place in range(self.stream.last + 1)]
        if not freeze_mlps:
            if not bridge.adapter.family.mlp.name:
                raise UnsupportedModelError(
                    f"freeze_mlps=False runs the MLPs on their own, and {bridge.adapter.family.title}'s have no module: "
                    "their projections lie in the block. Take freeze_mlps=True."
                )
            if bridge.live_hooks() or bridge.has_torch_hooks():
                raise InputError(
                    "freeze_mlps=False runs the MLPs on their own, without the functions that are on the model: remove them "
                    "first (bridge.reset_hooks())."
                )
            more += [f"blocks.{layer}.hook_mlp_out" for layer in range(self.n_layers)]
        opt_in: tuple[Flag, ...] = ("use_attn_result",) if any(s.kind == "head" for s in senders) else ()
        with bridge.points_on(opt_in):
            self.original_run, self.new = original.observe([*names, *more]), new.observe(names)
        self.original = self.original_run.activations
        self._scale = FromRun({"ln_final.hook_scale": self.original["ln_final.hook_scale"]})
        other = self.new.activations
        self.there = torch.zeros(original.tokens.shape[1], dtype=torch.bool, device=bridge.device)
        self.there[list(columns)] = True
        canonical = {name: bridge.hook_spec(name).name for name in names}
        sent = {name: self._within(other[at] - self.original[at]) for name, at in canonical.items()}
        self.new = replace(self.new, activations={})  # its metric is all that is still to be had
        del other
        self.sent = {
            sender.name: sent[sender.hook][:, :, sender.head] * self._block(sender.layer).factor
            if sender.kind == "head"
            else sent[sender.hook]
            for sender in senders
        }
        self.arriving: dict[tuple[str, int], Tensor] = {}
        if not freeze_mlps:
            self._refuse_memory(senders, memory_limit)
            self._through_mlps(senders)

    def _block(self, layer: int) -> Any:
        return self.bridge.blocks[layer]

    def _within(self, difference: Tensor) -> Tensor:
        """Zero where the path does not run; ``[row, pos, ...]``."""
        there = self.there.view(1, -1, *[1] * (difference.dim() - 2))
        return torch.where(there, difference, torch.zeros((), dtype=difference.dtype, device=difference.device))

    def nbytes(self) -> int:
        """Bytes that have to stay in memory beside the sweep."""
        differences = [*self.sent.values(), *self.arriving.values()]
        return self.original_run.nbytes + sum(tensor.nbytes for tensor in differences)

    # -- through MLPs --------------------------------------------------------------------------------------------------

    def _refuse_memory(self, senders: Sequence[Sender], memory_limit: int | None) -> None:
        each = next(iter(self.sent.values())).nbytes
        needed = each * sum(place >= sender.place for sender in senders for place in self.places)
        limit = memory_limit if memory_limit is not None else int(psutil.virtual_memory().available) // 2
        if needed > limit:
            raise InputError(
                f"What {len(senders)} senders change at {len(self.places)} places takes {needed:,} bytes; {limit:,} may be "
                "used. Take fewer senders or receivers at a time, or freeze_mlps=True."
            )

    def _through_mlps(self, senders: Sequence[Sender]) -> None:
        """Follow each sender's difference along the stream with attention frozen and MLPs computed."""
        with torch.no_grad():
            for sender in senders:
                difference = self.sent[sender.name]
                if not bool(difference.any()):
                    continue
                for place in range(sender.place, self.places[-1] + 1):
                    if place in self.places:
                        self.arriving[sender.name, place] = difference
                    layer = self.stream.mlp_at(place)
                    if layer is not None and place < self.places[-1]:
                        difference = difference + self._mlp_change(layer, difference)

    def _mlp_change(self, layer: int, difference: Tensor) -> Tensor:
        """What an MLP adds more than in the original run if its input is changed, ``[row, pos, d_model]``."""
        before = self.original[self.stream.hook(self.stream.before_mlp(layer))]
        added = self.original[f"blocks.{layer}.hook_mlp_out"]
        change = torch.zeros_like(difference)
        changed = difference.any(-1)
        stream, usual = (before + difference)[changed], added[changed]
        parts = []
        for rows, as_usual in zip(stream.split(MLP_ROWS), usual.split(MLP_ROWS), strict=True):
            parts.append(hooks_suppressed(self._mlp_adds, layer, rows[None])[0] - as_usual)
        change[changed] = torch.cat(parts)
        return change

    def _mlp_adds(self, layer: int, rows: Tensor) -> Tensor:
        """What a block's MLP adds to the stream for any residual ``[1, row, d_model]`` that enters it, its norms included.

        A norm is asked by its component, which computes a float64 model in float64.
        """
        family, parts = self.bridge.adapter.family, self.bridge.blocks[layer].submodules
        norm = "ln2" if family.block.ln2 else "ln1" if family.block.parallel else ""
        normed = parts[norm].forward(rows) if norm else rows
        if family.mlp.adds_residual:
            return parts["mlp"].module(normed, torch.zeros_like(normed))  # type: ignore[no-any-return]
        added: Tensor = parts["mlp"].module(normed) * self._block(layer).factor
        return parts["ln2_post"].forward(added) if family.block.ln2_post else added

    # -- edits ---------------------------------------------------------------------------------------------------------

    def edits(
        self, sender: Sender, receivers: Sequence[Receiver], columns: tuple[int, ...], freeze_scale: bool
    ) -> list[Edit]:
        """The edits of the receivers' inputs at some positions; none where no difference arrives."""
        receivers_there: dict[tuple[str, int, int], list[int]] = {}
        for receiver in receivers:
            if receiver.comes_after(sender):
                receivers_there.setdefault((receiver.kind, receiver.layer, receiver.place), []).append(receiver.head)
        made = [
            self._edit(kind, layer, place, heads, change)
            for (kind, layer, place), heads in receivers_there.items()
            if (change := self._change(sender, place, columns)) is not None
        ]
        if made and freeze_scale:
            made.append(Edit("ln_final.hook_scale", self._scale))
        return made

    def _change(self, sender: Sender, place: int, columns: tuple[int, ...]) -> InputEdit | None:
        """What arrives of a sender at a place of the stream; made once, as many receivers may be given the same."""
        key = (sender.name, None if self.freeze_mlps and self.inputs == "added" else place, columns)
        if key not in self._changes:
            difference = self.sent[sender.name] if self.freeze_mlps else self.arriving.get((sender.name, place))
            self._changes[key] = None if difference is None else self._made(difference, place, columns)
        return self._changes[key]

    def _made(self, difference: Tensor, place: int, columns: tuple[int, ...]) -> InputEdit | None:
        differs = difference.any(-1).any(0).tolist()
        changed = [column for column in columns if differs[column]]
        if not changed:
            return None
        taken = difference[:, changed]
        if self.inputs == "added":
            return InputEdit(Add(taken), Add(taken.unsqueeze(2)), changed)
        # Every position is set, so that nothing an earlier receiver changes arrives.
        new = self.original[self.stream.hook(place)].clone()
        new[:, changed] += taken
        return InputEdit(SetTo(new), SetTo(new.unsqueeze(2)), None)

    def _edit(self, kind: str, layer: int, place: int, heads: list[int], change: InputEdit) -> Edit:
        if kind in PARTS:
            hook = f"blocks.{layer}.hook_{kind}_input"
            return Edit(hook, change.by_head, positions=change.columns, heads=heads)
        hook = f"blocks.{layer}.hook_mlp_in" if kind == "mlp_in" else self.stream.hook(place)
        return Edit(hook, change.value, positions=change.columns)
