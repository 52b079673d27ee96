"""Path patching: change what one part of the model hears of another, and nothing else (Wang et al. 2023, arXiv 2211.00593;
Goldowsky-Dill et al. 2023, arXiv 2304.05969).

The original run is run again. What a sender adds to the residual stream differs between the new run and the original run;
that difference is put into the inputs of the receivers only. Everything after the receivers is computed as usual.

With ``freeze_mlps=True`` the difference reaches a receiver by the residual stream alone: the receiver's input is the
original's plus ``sender(new) - sender(original)``. With ``freeze_mlps=False`` a path may also lead through MLPs between
the two, as in Wang et al.: all later attention is frozen to the original run, MLPs are computed, and the difference is
what then arrives at the receiver. "Direct" means two different things there, so it has to be said.

Several receivers at once: with ``inputs="added"`` the difference is added to what a receiver is given in that run, so that
what an earlier receiver changes reaches later ones (edges, in Goldowsky-Dill's sense; adding at all receivers after the
sender is activation patching of the sender). With ``inputs="set"`` a receiver's input is set to the original's plus the
difference, so that it does not (Wang et al.). For one receiver the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, replace
from typing import Any, Literal, TypeAlias

import psutil
import torch
import xarray as xr
from torch import Tensor

from pellucid.arguments import check_choice, check_kind
from pellucid.axes import ROWS_AT_ONCE, Index
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.experiment import Experiment, Metrics, left_of
from pellucid.experiments.labelled import (
    Grid,
    LabelledSweep,
    Reference,
    about_metrics,
    between,
    check_scores,
    in_float32,
    switched,
)
from pellucid.experiments.options import OnInterrupt, Rows, SweepOptions, documented, option
from pellucid.experiments.paths import PARTS, Receiver, Sender, Stream, chosen_names, receivers_of, senders_of
from pellucid.experiments.places import Prompts, about_run, read_prompts, refuse_different_lengths
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag
from pellucid.run_context import hooks_suppressed
from pellucid.sweep import Add, Edit, FromRun, SetTo, Sweep
from pellucid.sweep.edits import indices
from pellucid.sweep.unedited import Unedited

Inputs: TypeAlias = Literal["added", "set"]
Value: TypeAlias = Literal["change", "normalized", "metric"]

MLP_ROWS = 2048
"""Positions that go through an MLP together where paths lead through MLPs."""


@documented()
@dataclass(frozen=True, eq=False, repr=False)
class PathPatching(Experiment):
    """The effect of each sender through the paths to given receivers, or through each edge apart.

    The opt-in hook points that receivers need are switched on meanwhile and left as they were.

    Attributes:
        bridge: the model, in eval mode.
        original: prompt or prompts that are run: text, texts, or ids ``[row, pos]``.
        new: their counterparts, from which senders are taken; of as many tokens row by row.
        metric: what is measured.
        senders: names or globs of :mod:`pellucid.experiments.paths`: ``"L*H*"``, ``["embed", "L0.mlp_out"]``.
        receivers: likewise: ``"final"``, ``"L3H*.q"``, ``["L2H0.k", "L3.mlp_in"]``. All together, unless
            ``each_receiver``.
        options: those that experiments share; of their places ``positions``, those of the path.

    Raises:
        InputError: a word that an option does not know.
        UnsupportedModelError: the residual stream is not a sum of what parts add to it, or the model's family has no such
            sender or receiver.
    """

    original: TextOrTokens
    new: TextOrTokens
    metric: Metrics
    senders: str | Sequence[str]
    receivers: str | Sequence[str]
    _: KW_ONLY
    freeze_mlps: bool = option(
        MISSING, "Whether MLPs between sender and receiver stay as in the original run, see the top of this module."
    )
    inputs: Inputs = option("added", "'added' or 'set', see the top of this module.")
    each_receiver: bool = option(False, "An axis receiver: every edge from a sender to a receiver apart.")
    each_position: bool = option(
        False, "An axis pos: the path at each position apart (up to the receiver it stays in its position)."
    )
    freeze_final_scale: bool = option(
        False,
        "The last norm divides by what it divides by in the original run. The path to final is then the direct logit "
        "attribution of the difference.",
    )
    value: Value = option(
        "change",
        "'change' of the metric from the original run; 'normalized', that change as a part of the change from the original "
        "to the new run; or the 'metric' itself.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("inputs", self.inputs, ("added", "set"))
        check_choice("value", self.value, ("change", "normalized", "metric"))
        for name in ("layers", "heads", "neurons"):
            if getattr(self.options, name) is not None:
                raise InputError(f"Path patching takes no {name}=: its senders and receivers say where, such as L2H5.")
        if self.bridge.cfg.apply_residual_connection_post_layernorm:
            raise UnsupportedModelError(
                "Path patching needs a residual stream that is the sum of what its parts add. This model continues the "
                "stream from each norm's output (apply_residual_connection_post_layernorm), where a difference is rescaled "
                "on the way."
            )

    def _prepare(self, progress: bool | None) -> LabelledSweep:
        bridge, options, cfg = self.bridge, self.options, self.bridge.cfg
        parallel = bridge.adapter.family.block.parallel
        known_senders = senders_of(cfg.n_layers, cfg.n_heads, parallel)
        known_receivers = receivers_of(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, parallel)
        sending = [
            known_senders[name]
            for name in chosen_names(self.senders, known_senders, "sender", "L2H5, L2.mlp_out, embed")
        ]
        hearing = [
            known_receivers[name]
            for name in chosen_names(self.receivers, known_receivers, "receiver", "L3H1.q, L3.mlp_in, final")
        ]
        _refuse_parts(bridge, sending, hearing)
        first, second = read_prompts(bridge, self.original, options), read_prompts(bridge, self.new, options)
        refuse_different_lengths(first, second, ("original", "new"))
        columns = indices(options.positions, first.length, "positions")
        unedited, other = first.unedited(bridge), second.unedited(bridge)
        Sweep(bridge, unedited, self.metric, logit_positions=options.logit_positions)  # refuses a metric before any run
        paths = _Paths(
            bridge, unedited, other, sending, hearing, columns, self.freeze_mlps, self.inputs, options.memory_limit
        )
        sets = [[receiver] for receiver in hearing] if self.each_receiver else [hearing]
        places: list[tuple[int, ...]] = [(column,) for column in columns] if self.each_position else [columns]
        edits = [
            paths.edits(sender, heard, place, self.freeze_final_scale)
            for sender in sending
            for heard in sets
            for place in places
        ]
        grid = _grid(
            first, sending, hearing if self.each_receiver else None, columns if self.each_position else None, edits
        )
        sweep = Sweep(
            bridge,
            unedited,
            self.metric,
            logit_positions=options.logit_positions,
            memory_limit=left_of(options.memory_limit, paths.nbytes()),
            rows_at_once=options.rows_at_once,
        )
        reference = Reference(self.value)
        if self.value == "normalized":
            new = Sweep(bridge, other, self.metric, logit_positions=options.logit_positions).scores(paths.new)
            ends = [in_float32(sweep.scores(paths.original_run)), in_float32(new)]
            for end in ends:
                check_scores(end, first.n_rows, options.rows)
            reference = between(ends[0], ends[1], options.rows, ("original", "new"))
        about = about_run(
            bridge,
            "path patching",
            receivers=[receiver.name for receiver in hearing],
            mlps="frozen" if self.freeze_mlps else "computed",
            inputs=self.inputs,
            final_scale="frozen" if self.freeze_final_scale else "computed",
            positions=list(columns),
            original=first.text(),
            new=second.text(),
            differs=first.differing(second),
            **about_metrics(self.metric, self.value),
        )
        return LabelledSweep(sweep, grid, reference, about, options.rows, isinstance(self.metric, Mapping), paths.flags)


@documented(PathPatching, SweepOptions)
def path_patching(
    bridge: TransformerBridge,
    original: TextOrTokens,
    new: TextOrTokens,
    metric: Metrics,
    senders: str | Sequence[str],
    receivers: str | Sequence[str],
    *,
    freeze_mlps: bool,
    inputs: Inputs = "added",
    each_receiver: bool = False,
    each_position: bool = False,
    freeze_final_scale: bool = False,
    value: Value = "change",
    rows: Rows = "mean",
    positions: Index = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool | None = None,
    on_interrupt: OnInterrupt = "raise",
) -> xr.DataArray:
    """Run :class:`PathPatching`: the effect of each sender through the paths to given receivers.

    Arguments are the fields of the experiment and of :class:`SweepOptions`; ``progress`` and ``on_interrupt`` those of its
    ``run``.

    Returns:
        ``[sender]``, ``[sender, receiver]``, and a last ``pos`` with ``each_position`` (``[metric, ...]`` for several
        metrics, ``[..., row]`` with ``rows="each"``). Coordinates ``sender``, ``receiver`` are names; ``sender_layer``,
        ``sender_head``, ``receiver_layer``, ``receiver_head`` numbers, -1 where there is none. :func:`by_head` lays the
        heads out as layer x head. A path that leads backwards changes nothing, exactly.

    Raises:
        InputError: prompts of different token counts, unknown senders or receivers, an index out of range, a model in
            training mode, too little memory.
        UnsupportedModelError: the residual stream is not a sum of what parts add to it
            (``apply_residual_connection_post_layernorm``), or the model's family has no such sender or receiver.
    """
    return PathPatching(
        bridge,
        original,
        new,
        metric,
        senders,
        receivers,
        freeze_mlps=freeze_mlps,
        inputs=inputs,
        each_receiver=each_receiver,
        each_position=each_position,
        freeze_final_scale=freeze_final_scale,
        value=value,
        options=SweepOptions(
            rows=rows,
            positions=positions,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            logit_positions=logit_positions,
            memory_limit=memory_limit,
            rows_at_once=rows_at_once,
        ),
    ).run(progress=progress, on_interrupt=on_interrupt)


def by_head(result: xr.DataArray) -> xr.DataArray:
    """The heads among the senders laid out as ``layer`` x ``head``, first of all axes; other senders are left out.

    A head that was no sender is NaN.

    Raises:
        InputError: no sender is a head.
    """
    check_kind("result", result, xr.DataArray, "an array, as path_patching gives it")
    if "sender" not in result.dims:
        raise InputError(
            f"by_head takes a result of path_patching; this has the axes {', '.join(map(str, result.dims))}."
        )
    heads = result.isel(sender=(result["sender_head"] >= 0).values)
    if not heads.sizes["sender"]:
        raise InputError("by_head: no sender of this result is a head.")
    named = heads.drop_vars("sender").rename(sender_layer="layer", sender_head="head")
    grid = named.set_index(sender=("layer", "head")).unstack("sender")
    made = grid.transpose("layer", "head", ...)
    return made.assign_attrs(result.attrs)


def _grid(
    prompts: Prompts,
    senders: Sequence[Sender],
    receivers: Sequence[Receiver] | None,
    columns: Sequence[int] | None,
    edits: Sequence[Sequence[Edit]],
) -> Grid:
    dims, shape = ["sender"], [len(senders)]
    coords: dict[str, tuple[str, list[Any]]] = {
        "sender": ("sender", [sender.name for sender in senders]),
        "sender_layer": ("sender", [sender.layer for sender in senders]),
        "sender_head": ("sender", [sender.head for sender in senders]),
    }
    if receivers is not None:
        dims.append("receiver")
        shape.append(len(receivers))
        coords["receiver"] = ("receiver", [receiver.name for receiver in receivers])
        coords["receiver_layer"] = ("receiver", [receiver.layer for receiver in receivers])
        coords["receiver_head"] = ("receiver", [receiver.head for receiver in receivers])
    asked: list[tuple[int, ...]] = [()] * len(edits)
    if columns is not None:
        dims.append("pos")
        shape.append(len(columns))
        labels = prompts.columns()
        coords["pos"] = ("pos", list(columns))
        coords["token"] = ("pos", [labels[column] for column in columns])
        asked = [(columns[cell % len(columns)],) for cell in range(len(edits))]
    return Grid(tuple(dims), coords, tuple(shape), edits, asked)


@dataclass(frozen=True, eq=False)
class _Message:
    """What goes into a receiver: for the stream ``[row, pos, d_model]``, for heads ``[row, pos, 1, d_model]``, and where."""

    value: Add | SetTo
    by_head: Add | SetTo
    columns: list[int] | None


def _refuse_parts(bridge: TransformerBridge, senders: Sequence[Sender], receivers: Sequence[Receiver]) -> None:
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


class _Paths:
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
        self._messages: dict[tuple[str, int | None, tuple[int, ...]], _Message | None] = {}
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
        with switched(bridge, opt_in):
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
        """The edits that let the receivers hear the difference at some positions; none if they cannot."""
        heard: dict[tuple[str, int, int], list[int]] = {}
        for receiver in receivers:
            if receiver.hears(sender):
                heard.setdefault((receiver.kind, receiver.layer, receiver.place), []).append(receiver.head)
        made = [
            self._edit(kind, layer, place, heads, message)
            for (kind, layer, place), heads in heard.items()
            if (message := self._message(sender, place, columns)) is not None
        ]
        if made and freeze_scale:
            made.append(Edit("ln_final.hook_scale", self._scale))
        return made

    def _message(self, sender: Sender, place: int, columns: tuple[int, ...]) -> _Message | None:
        """What a place of the stream hears of a sender; made once, as many receivers may be given the same."""
        key = (sender.name, None if self.freeze_mlps and self.inputs == "added" else place, columns)
        if key not in self._messages:
            difference = self.sent[sender.name] if self.freeze_mlps else self.arriving.get((sender.name, place))
            self._messages[key] = None if difference is None else self._made(difference, place, columns)
        return self._messages[key]

    def _made(self, difference: Tensor, place: int, columns: tuple[int, ...]) -> _Message | None:
        differs = difference.any(-1).any(0).tolist()
        changed = [column for column in columns if differs[column]]
        if not changed:
            return None
        taken = difference[:, changed]
        if self.inputs == "added":
            return _Message(Add(taken), Add(taken.unsqueeze(2)), changed)
        # Every position is set, so that nothing an earlier receiver changes arrives.
        new = self.original[self.stream.hook(place)].clone()
        new[:, changed] += taken
        return _Message(SetTo(new), SetTo(new.unsqueeze(2)), None)

    def _edit(self, kind: str, layer: int, place: int, heads: list[int], message: _Message) -> Edit:
        if kind in PARTS:
            hook = f"blocks.{layer}.hook_{kind}_input"
            return Edit(hook, message.by_head, positions=message.columns, heads=heads)
        hook = f"blocks.{layer}.hook_mlp_in" if kind == "mlp_in" else self.stream.hook(place)
        return Edit(hook, message.value, positions=message.columns)
