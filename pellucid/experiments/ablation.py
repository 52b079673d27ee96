"""Ablation: take a part of the model away and see what the metric loses.

*Zero* sets an activation to 0, which is rarely what it is on average. *Mean* sets it to its mean over data, *position mean*
to its mean at each position (Wang et al. 2023, arXiv 2211.00593, over prompts of one template), *resample* to what it is on
another prompt (causal scrubbing, Chan et al. 2022). Padding never counts.

Zeroing all of ``z`` in a layer is not zeroing its ``attn_out``: the output projection's bias ``b_O`` is left. Zeroing ``z``
takes the heads away; zeroing ``attn_out`` takes the bias too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, replace
from typing import Literal, TypeAlias

import torch
import xarray as xr
from jaxtyping import Shaped
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.arguments import check_choice, check_whole, check_wholes
from pellucid.axes import ROWS_AT_ONCE, Index
from pellucid.errors import CacheKeyError, InputError
from pellucid.experiments.experiment import Experiment, Metrics, left_of
from pellucid.experiments.labelled import LabelledSweep, Reference, about_metrics
from pellucid.experiments.options import NeuronGroups, OnInterrupt, Rows, SweepOptions, documented, option
from pellucid.experiments.places import (
    Prompts,
    Site,
    about_run,
    check_by,
    default_by,
    find_site,
    make_grid,
    read_prompts,
)
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.padding import places
from pellucid.progress import progress_bar
from pellucid.sweep import FromRun, Sweep, Value, Zero

How: TypeAlias = Literal["zero", "mean", "position_mean", "resample"]
Data: TypeAlias = TextOrTokens | Mapping[str, Tensor]

ROWS_OF_DATA = 8
"""Prompts of ``data`` that are run together."""


@documented()
@dataclass(frozen=True, eq=False, repr=False)
class Ablation(Experiment):
    """Ablate every place of a site, one after the other.

    Attributes:
        bridge: the model, in eval mode.
        input: prompt or prompts that are run: text, texts, or ids ``[row, pos]``.
        metric: what is measured.
        options: those that experiments share.

    Raises:
        InputError: a word that an option does not know, or options that contradict each other.
    """

    input: TextOrTokens
    metric: Metrics
    _: KW_ONLY
    site: str = option("z", "z (heads), attn_out, mlp_out, mlp_post (neurons), resid_pre or any other hook of a block.")
    by: str | Sequence[str] | None = option(
        None,
        "Axes of the result, of layer, pos, head, neuron, group, ...; by default layer and head where the site has heads, "
        "else layer.",
    )
    how: How = option(
        MISSING,
        "'zero'; 'mean' over all real positions of the data; 'position_mean', its mean at the same place among each row's "
        "real tokens; 'resample', what it is on another row.",
    )
    data: Data | None = option(
        None,
        "What means are over, or rows are drawn from: texts, ids [row, pos], or activations by hook name such as a cache. "
        "By default the input itself.",
    )
    data_mask: Shaped[Tensor, "_ _"] | None = option(None, "[row, pos] of data, if it is ids or a plain mapping.")
    permutation: Sequence[int] | None = option(
        None,
        "For 'resample', the row of the data that each row of the input is given. By default drawn: among the input's own "
        "rows a cycle, so that no row keeps its own.",
    )
    seed: int = option(0, "Of that draw.")
    change: bool = option(True, "How far the metric moves from the unablated run; else the metric itself.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed)
        check_choice("how", self.how, ("zero", "mean", "position_mean", "resample"))
        if self.seed and (self.how != "resample" or self.permutation is not None):
            raise InputError(
                f"seed={self.seed} would have no effect: it is of the permutation that how='resample' draws."
            )
        if self.how == "zero" and self.data is not None:
            raise InputError('how="zero" uses no data: leave data out, or take another how.')
        if self.how != "resample" and self.permutation is not None:
            raise InputError(f"permutation goes with how='resample'; how is {self.how!r}.")
        if self.data_mask is not None and not isinstance(self.data, Tensor | Mapping):
            raise InputError("data_mask goes with data= as token ids or activations; that of texts is known.")

    def _prepare(self, progress: bool | None) -> LabelledSweep:
        bridge, options = self.bridge, self.options
        found = find_site(bridge, self.site, options.layers)
        words = check_by(found, self.by if self.by is not None else default_by(found, ("head",)))
        prompts = read_prompts(bridge, self.input, options)
        given = _Data(bridge, prompts, found, self.data, replace(options, attention_mask=self.data_mask), progress)
        drawn: tuple[int, ...] = ()
        values: Mapping[str, Tensor] = {}
        if self.how == "mean":
            values = given.mean()
        elif self.how == "position_mean":
            values = given.position_mean()
        elif self.how == "resample":
            drawn = given.draw(self.permutation, self.seed)
            values = given.whole()

        def value(spec: HookSpec) -> Value:
            return Zero() if self.how == "zero" else FromRun(values, rows=drawn or None)

        grid = make_grid(bridge, prompts, found, words, value, options)
        sweep = Sweep(
            bridge,
            prompts.unedited(bridge),
            self.metric,
            logit_positions=options.logit_positions,
            memory_limit=left_of(options.memory_limit, sum(tensor.nbytes for tensor in values.values())),
            rows_at_once=options.rows_at_once,
        )
        reference = Reference("change" if self.change else "metric")
        about = about_run(
            bridge,
            "ablation",
            site=found.name,
            hooks=[spec.name for spec in found.specs.values()],
            how=self.how,
            prompts=prompts.text(),
            data_tokens=given.n_tokens,
            resampled_rows=list(drawn),
            **about_metrics(self.metric, reference.kind),
        )
        return LabelledSweep(sweep, grid, reference, about, options.rows, isinstance(self.metric, Mapping), found.flags)


@documented(Ablation, SweepOptions)
def ablation(
    bridge: TransformerBridge,
    input: TextOrTokens,
    metric: Metrics,
    site: str = "z",
    by: str | Sequence[str] | None = None,
    *,
    how: How,
    data: Data | None = None,
    data_mask: Shaped[Tensor, "_ _"] | None = None,
    permutation: Sequence[int] | None = None,
    seed: int = 0,
    change: bool = True,
    rows: Rows = "mean",
    layers: Index = None,
    positions: Index = None,
    heads: Index = None,
    neurons: int | NeuronGroups | None = None,
    attention_mask: Shaped[Tensor, "row pos"] | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool | None = None,
    on_interrupt: OnInterrupt = "raise",
) -> xr.DataArray:
    """Run :class:`Ablation`: ablate every place of a site, one after the other: all heads of a model in one call.

    Arguments are the fields of the experiment and of :class:`SweepOptions`; ``progress`` and ``on_interrupt`` those of its
    ``run``.

    Returns:
        ``[*by]`` as ``activation_patching`` returns it.

    Raises:
        InputError: no other row to resample from, rows of other token counts, positions that the data does not reach, an
            axis that the site does not have, an index out of range.
        CacheKeyError: the given activations lack a hook of the site.
        HookNameError: no such site.
    """
    return Ablation(
        bridge,
        input,
        metric,
        site=site,
        by=by,
        how=how,
        data=data,
        data_mask=data_mask,
        permutation=permutation,
        seed=seed,
        change=change,
        options=SweepOptions(
            rows=rows,
            layers=layers,
            positions=positions,
            heads=heads,
            neurons=neurons,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            logit_positions=logit_positions,
            memory_limit=memory_limit,
            rows_at_once=rows_at_once,
        ),
    ).run(progress=progress, on_interrupt=on_interrupt)


class _Data:
    """What means are over and rows are drawn from.

    Args:
        bridge: the model.
        prompts: the input's.
        site: the activations wanted.
        data: texts, ids or activations; ``None`` for the input itself.
        reading: how it is read; its mask, if it is ids or a plain mapping.
        progress: show a bar.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        prompts: Prompts,
        site: Site,
        data: Data | None,
        reading: SweepOptions,
        progress: bool | None,
    ) -> None:
        self.bridge, self.prompts, self.site, self.progress = bridge, prompts, site, progress
        self.names = [spec.name for spec in site.specs.values()]
        self.own = data is None
        self.n_tokens = 0
        self.kept: Mapping[str, Tensor] | None = None
        self.rows = prompts
        if isinstance(data, Mapping):
            self.kept = data
            self.real = self._real_of(data, reading.attention_mask)
        else:
            if data is not None:
                self.rows = read_prompts(bridge, data, reading)
            self.real = self.rows.real

    def _real_of(self, data: Mapping[str, Tensor], data_mask: Tensor | None) -> Tensor:
        """``[row, pos]``: which columns of given activations are tokens."""
        missing = [name for name in self.names if name not in data]
        if missing:
            raise CacheKeyError(
                f"The activations given as data lack {missing[0]}. Keep them all: "
                f"bridge.run_with_cache(tokens, names_filter=[{self.names[0]!r}, ...])."
            )
        sizes = {name: tuple(data[name].shape) for name in self.names}
        for name, size in sizes.items():
            if len(size) != len(self.site.first.axes):
                raise InputError(
                    f"{name} of data must have axes {self.site.first.axes}; found shape {size}. Cache it with its batch "
                    "axis (remove_batch_dim=False)."
                )
        first = data[self.names[0]]
        shape = (first.shape[0], first.shape[self.site.first.pos_axis])
        if data_mask is None and isinstance(data, ActivationCache):
            data_mask = data.real
        if data_mask is None:
            data_mask = torch.ones(shape)
        if tuple(data_mask.shape) != shape:
            raise InputError(
                f"data_mask has shape {tuple(data_mask.shape)}; the activations have [row, pos] = {shape}."
            )
        return data_mask.bool().to(first.device)

    def whole(self) -> Mapping[str, Tensor]:
        """``[row, pos, ...]`` by hook name."""
        self.n_tokens = int(self.real.sum())
        if self.kept is not None:
            return {name: self.kept[name] for name in self.names}
        return self._activations(self.rows)

    def _activations(self, rows: Prompts) -> Mapping[str, Tensor]:
        with self.bridge.points_on(self.site.flags):
            return rows.unedited(self.bridge).observe(self.names).activations

    def _sums(self, by_position: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Sums in float64 over real tokens, ``[pos, ...]`` or ``[1, ...]`` by hook name, and how many each is of."""
        self._refuse_keys()
        place = places(self.real)
        n_places = int(place.max()) + 1 if by_position else 1
        sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        counts = torch.zeros(n_places, dtype=torch.float64, device=self.real.device)
        n_rows = self.real.shape[0]
        starts = range(0, n_rows, n_rows if self.kept is not None else ROWS_OF_DATA)
        for start in progress_bar(starts, desc="means", unit="batch", show=self.progress):
            chunk = slice(start, n_rows if self.kept is not None else start + ROWS_OF_DATA)
            real = self.real[chunk]
            at = (
                place[chunk][real]
                if by_position
                else torch.zeros(int(real.sum()), dtype=torch.int64, device=real.device)
            )
            counts.index_add_(0, at, torch.ones_like(at, dtype=torch.float64))
            for name, tensor in self._chunk(chunk).items():
                self._dtypes[name] = tensor.dtype  # a scale is float32 in a model of half precision
                found = tensor.movedim(self.site.first.pos_axis, 1)[real].double()
                total = sums.setdefault(
                    name, torch.zeros(n_places, *found.shape[1:], dtype=torch.float64, device=found.device)
                )
                total.index_add_(0, at, found)
        self.n_tokens = int(counts.sum())
        return sums, counts

    def _refuse_keys(self) -> None:
        if "key_pos" in self.site.first.axes:
            raise InputError(
                f"{self.site.name} has an axis of key positions, over which a mean says nothing: ablate z, or take "
                'how="zero" or "resample".'
            )

    def _chunk(self, chunk: slice) -> Mapping[str, Tensor]:
        if self.kept is not None:
            return {name: self.kept[name] for name in self.names}
        mask = self.rows.attention_mask
        rows = replace(
            self.rows,
            tokens=self.rows.tokens[chunk],
            attention_mask=None if mask is None else mask[chunk],
            labels=self.rows.labels[chunk],
        )
        return self._activations(rows)

    def mean(self) -> dict[str, Tensor]:
        """The mean over all real tokens, seen as a run of one row, ``[1, pos, ...]``."""
        sums, counts = self._sums(by_position=False)
        means = {
            name: (total / counts.view(-1, *[1] * (total.dim() - 1))).to(self._dtypes[name])
            for name, total in sums.items()
        }
        return {name: mean.expand(self.prompts.length, *mean.shape[1:])[None] for name, mean in means.items()}

    def position_mean(self) -> dict[str, Tensor]:
        """The mean at each place among a row's real tokens, laid out as the input's rows are, ``[row, pos, ...]``."""
        sums, counts = self._sums(by_position=True)
        longest = max(self.prompts.counts())
        if longest > counts.shape[0]:
            raise InputError(
                f"The input has {longest} tokens and the data at most {counts.shape[0]}: there is no mean at position "
                f"{counts.shape[0]}. Give longer data, or ablate fewer positions of shorter prompts."
            )
        at = places(self.prompts.real).clamp(min=0)  # padding is edited too, and reaches no real position
        return {
            name: (total / counts.view(-1, *[1] * (total.dim() - 1))).to(self._dtypes[name])[at]
            for name, total in sums.items()
        }

    def draw(self, permutation: Sequence[int] | None, seed: int) -> tuple[int, ...]:
        """The row of the data for each row of the input.

        Raises:
            InputError: there is none of as many tokens, or a given one that does not fit.
        """
        n_rows, n_data = self.prompts.n_rows, self.real.shape[0]
        if permutation is None:
            generator = torch.Generator().manual_seed(seed)
            if self.own:
                permutation = _cycle(n_rows, generator)
            else:
                permutation = torch.randint(n_data, (n_rows,), generator=generator).tolist()
        chosen = tuple(check_wholes("permutation", permutation))
        if len(chosen) != n_rows or not all(0 <= row < n_data for row in chosen):
            raise InputError(
                f"permutation has one row of the data, 0 to {n_data - 1}, for each of the {n_rows} rows of the input; found "
                f"{list(permutation)!r}."
            )
        own = self.prompts.real
        for row, other in enumerate(chosen):
            if own.shape[1] != self.real.shape[1] or not torch.equal(own[row], self.real[other].to(own.device)):
                raise InputError(
                    f"Row {row} of the input has {int(own[row].sum())} tokens and row {other}, from which it would be "
                    f"resampled, {int(self.real[other].sum())}, or is padded elsewhere. A position must mean the same in "
                    "both: resample among prompts of as many tokens."
                )
        return chosen


def _cycle(n_rows: int, generator: torch.Generator) -> list[int]:
    """A permutation drawn evenly among those of one cycle, in which no row keeps its place (Sattolo 1986)."""
    if n_rows < 2:
        raise InputError(
            'how="resample" needs another row to take from: give several prompts, or data= to draw rows from.'
        )
    order = list(range(n_rows))
    for last in range(n_rows - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        order[last], order[other] = order[other], order[last]
    return order
