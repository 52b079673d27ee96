"""Path patching: change what one part of the model reads of another, and nothing else (Wang et al. 2023, arXiv 2211.00593;
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
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import Any, Literal, TypeAlias

import xarray as xr
from jaxtyping import Shaped
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
)
from pellucid.experiments.options import OnInterrupt, Rows, SweepOptions, documented, option
from pellucid.experiments.path_edits import Inputs, PathEdits, refuse_parts
from pellucid.experiments.paths import Receiver, Sender, chosen_names, receivers_of, senders_of
from pellucid.experiments.places import Prompts, about_run, read_prompts, refuse_different_lengths
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.sweep import Edit, Sweep
from pellucid.sweep.edits import indices

Value: TypeAlias = Literal["change", "normalized", "metric"]


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
        receiving = [
            known_receivers[name]
            for name in chosen_names(self.receivers, known_receivers, "receiver", "L3H1.q, L3.mlp_in, final")
        ]
        refuse_parts(bridge, sending, receiving)
        first, second = read_prompts(bridge, self.original, options), read_prompts(bridge, self.new, options)
        refuse_different_lengths(first, second, ("original", "new"))
        columns = indices(options.positions, first.length, "positions")
        unedited, other = first.unedited(bridge), second.unedited(bridge)
        Sweep(bridge, unedited, self.metric, logit_positions=options.logit_positions)  # refuses a metric before any run
        paths = PathEdits(
            bridge, unedited, other, sending, receiving, columns, self.freeze_mlps, self.inputs, options.memory_limit
        )
        sets = [[receiver] for receiver in receiving] if self.each_receiver else [receiving]
        places: list[tuple[int, ...]] = [(column,) for column in columns] if self.each_position else [columns]
        edits = [
            paths.edits(sender, together, place, self.freeze_final_scale)
            for sender in sending
            for together in sets
            for place in places
        ]
        grid = _grid(
            first, sending, receiving if self.each_receiver else None, columns if self.each_position else None, edits
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
            receivers=[receiver.name for receiver in receiving],
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
    attention_mask: Shaped[Tensor, "row pos"] | None = None,
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
