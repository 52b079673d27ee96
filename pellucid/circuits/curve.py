"""Whether a circuit carries the behaviour: all edges outside it are patched, at several sizes, and the metric is measured.

With ``M(C)`` the metric of the base run in which every edge outside the circuit ``C`` carries what its sender writes in the
source run (or its mean there), and ``M(none)`` that with all edges patched:

    ``faithfulness(C) = (M(C) - M(none)) / (M(base) - M(none))``

means over pairs above and below the fraction. The circuits are the strongest edges at each size, so that the last one is the
whole model, which keeps 1. Over the share of the model's edges that a circuit has, CPR is the area under the curve and CMD
the area between it and 1 (MIB, arXiv 2504.13151), by the trapezoid rule; a circuit of no edges keeps 0. Beside each size are
circuits of as many edges drawn at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_kind, check_wholes
from pellucid.attribution.resampling import RESAMPLES, draw_counts, interval
from pellucid.attribution.streaming import PairStream, Resuming, metric_identity
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.edges import batches_of
from pellucid.circuits.ends import Ends, refuse_functions, wiring_of
from pellucid.circuits.options import CurveChoices, Outside
from pellucid.circuits.patched_edges import PatchedEdges
from pellucid.corpora.pairs import PromptPairs
from pellucid.errors import InputError
from pellucid.experiments.labelled import about_metrics, in_float32
from pellucid.experiments.options import Direction, documented, option
from pellucid.experiments.pairs import PairBatch, PairMetric, check_pairs
from pellucid.experiments.places import about_run
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json
from pellucid.sweep import Sweep
from pellucid.sweep.base_run import KeptRun
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the model's edges: the sizes of circuits by default (MIB's), beside none and all."""


@documented()
@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(CurveChoices, BriefFields):
    """The faithfulness curve of a circuit's strongest edges; see the top of this module.

    Attributes:
        bridge: the model, in eval mode.
        circuit: its scores rank the edges. Of one without scores, a circuit made from names, there is the one size.
        pairs: the prompts; others than those that the scores are of show more.
        metric: as :class:`~pellucid.circuits.EdgeAttribution` takes it.

    Raises:
        InputError: a word that an option does not know, or a number out of range; a circuit of another model.
        UnsupportedModelError: the residual stream is not the sum of what parts add to it.
    """

    bridge: TransformerBridge
    circuit: Circuit
    pairs: PromptPairs
    metric: PairMetric | None = None
    _: KW_ONLY
    sizes: Sequence[int] | None = option(
        None, "Edges of the circuits, beside none and all; by default shares of the model's edges from 0.1 % to 50 %."
    )
    direction: Direction = option(
        "noising",
        "noising: the base run is the clean one, edges are patched from the corrupted run; denoising the other way round.",
    )
    batch_size: int | None = option(None, "Pairs that run together; by default as many as memory allows, up to 16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairs(self.pairs, self.metric)
        check_kind("circuit", self.circuit, Circuit, "a Circuit, as edge_attribution gives it")
        check_choice("direction", self.direction, ("denoising", "noising"))
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        found = wiring_of(self.bridge)
        if found != self.circuit.wiring:
            raise InputError(
                f"The circuit is of a model with other edges, {self.circuit.wiring}; this one has {found}."
            )
        for size in check_wholes("sizes", self.sizes, 0) if self.sizes is not None else ():
            check_count("an entry of sizes", size, 0, len(found))

    # -- circuits ------------------------------------------------------------------------------------------------------

    def _sizes(self) -> list[int]:
        total = len(self.circuit.wiring)
        if not len(self.circuit.scores.values):
            if self.sizes is not None and list(self.sizes) != [len(self.circuit)]:
                raise InputError(
                    f"sizes: a circuit made from names has its own size, {len(self.circuit)}, and no other: its edges have "
                    "no rank. Leave sizes out."
                )
            asked: Iterable[int] = [len(self.circuit)]
        elif self.sizes is not None:
            asked = self.sizes
        else:
            asked = (max(1, round(share * total)) for share in SHARES)
        return sorted({0, total, *asked})

    def _members(self, size: int) -> np.ndarray:
        """``[edge]`` bool: the circuit of a size."""
        made = np.zeros(len(self.circuit.wiring), dtype=bool)
        scores = self.circuit.scores
        if size == len(made) or not len(scores.values):
            made[np.arange(len(made)) if size == len(made) else self.circuit.chosen[:size]] = True
        else:
            made[scores.strongest(size, np.arange(len(made)))] = True
        return made

    def _random(self, size: int, number: int) -> np.ndarray:
        made = np.zeros(len(self.circuit.wiring), dtype=bool)
        rng = np.random.default_rng((self.seed, size, number))
        made[rng.choice(len(made), size=size, replace=False)] = True
        return made

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run(
        self, *, progress: bool | None = None, checkpoint: str | Path | None = None, every: float = 60.0
    ) -> xr.Dataset:
        """The curve.

        Args:
            progress: show a bar on standard error; by default on a terminal.
            checkpoint: a folder for the state: the same call goes on from it after an interrupt, with equal bits.
            every: seconds between states.

        Returns:
            Axes ``size`` (edges; coordinate ``share`` of the model's), ``random``, ``pair``. ``metric`` ``[size, pair]``,
            ``random_metric`` ``[random, size, pair]``; ``faithfulness`` ``[size]`` and the ends ``low``, ``high`` of its
            95 % interval over resampled pairs, NaN of one pair; ``random_faithfulness`` ``[random, size]``. ``attrs`` have
            ``cpr`` and ``cmd`` with their intervals, and the metric of the base run and with all edges patched.

        Raises:
            InputError: as :meth:`EdgeAttribution.run`; a metric that is the same with all edges patched, so that there is
                no gap to keep a share of.
            OtherJobError: the folder holds a state of another job.
        """
        resuming = Resuming(checkpoint, every)
        bridge, wiring = self.bridge, self.circuit.wiring
        refuse_functions(bridge)
        sizes, ends = self._sizes(), Ends(bridge, wiring)
        batches = batches_of(bridge, wiring, self.pairs, self.metric, self.batch_size)
        inside = [0, len(wiring)]
        kept = {size: [self._members(size)] for size in sizes}
        for size in sizes:
            kept[size] += [] if size in inside else [self._random(size, number) for number in range(self.randoms)]
        columns = [(column, members) for column, size in enumerate(sizes) for members in kept[size]]
        settings = {} if checkpoint is None else self._settings([members for _, members in columns])
        stream = PairStream(bridge, "faithfulness", settings, resuming, progress)
        mean = self._mean(ends, batches) if self.outside == "mean" else None
        with stream.running(len(self.pairs) * len(columns), "run"):
            for batch in stream.left("measured", batches, len(columns)):
                base = self._prompts(batch, True).unedited(bridge)
                patching = PatchedEdges(ends, base, self._given(ends, batch, mean))
                scores = []
                for _, members in columns:
                    scores.append(self._score(batch, base, patching.final(~members)))
                    stream.step(len(batch.rows))
                stream.state.put("metric", len(self.pairs), batch.rows, torch.stack(scores, 1))
        return self._labelled(sizes, self._by_size(columns, stream.state.tensors["metric"].numpy()), batches[0])

    def _by_size(self, columns: Sequence[tuple[int, np.ndarray]], metric: np.ndarray) -> np.ndarray:
        """``[circuit, size, pair]`` of ``[pair, column]``: the strongest edges, then random ones, which at no edge and at
        all are the same."""
        found: list[list[np.ndarray]] = [[] for _ in range(1 + columns[-1][0])]
        for (column, _), scores in zip(columns, metric.T, strict=True):
            found[column].append(scores)
        return np.stack([each if len(each) > 1 else each * (1 + self.randoms) for each in found], 1)

    def _settings(self, members: Sequence[np.ndarray]) -> dict[str, Json]:
        """All that the metrics depend on beside the model; ``members`` are the edges of each circuit."""
        circuits = hashlib.sha256(b"".join(np.packbits(each).tobytes() for each in members)).hexdigest()
        return {
            "circuits_sha256": circuits,
            "outside": self.outside,
            "direction": self.direction,
            "batch_size": self.batch_size,
            "pairs_sha256": self.pairs.content_hash,
            "metric": metric_identity(self.metric),
        }

    def _prompts(self, batch: PairBatch, base: bool) -> Any:
        return batch.clean if (self.direction == "noising") == base else batch.corrupted

    def _given(self, ends: Ends, batch: PairBatch, mean: Tensor | None) -> Tensor:
        """``[row, sender, pos, d_model]``: what patched edges carry."""
        if mean is not None:
            rows, length = self._prompts(batch, True).tokens.shape
            return mean[None, :, None].expand(rows, -1, length, -1)
        source = self._prompts(batch, False).unedited(self.bridge).observe(ends.writing_hooks)
        return ends.written(source.activations)

    def _mean(self, ends: Ends, batches: Sequence[PairBatch]) -> Tensor:
        """``[sender, d_model]``: what each part writes, the mean over source runs and positions."""
        total: Any = 0.0
        positions = 0
        for batch in batches:
            written = self._given(ends, batch, None)
            total = total + written.double().sum((0, 2))
            positions += written.shape[0] * written.shape[2]
        made: Tensor = (total / positions).to(self.bridge.dtype)
        return made

    def _score(self, batch: PairBatch, base: Unedited, final: Tensor) -> Tensor:
        """``[row]``."""
        scores = Sweep(self.bridge, base, batch.metric).scores(KeptRun({}, final, None))
        (score,) = in_float32(scores).values()
        if score.shape != (len(batch.rows),):
            raise InputError(
                f"The metric gives {list(score.shape)} for {len(batch.rows)} rows; let it give one number a row, [row]."
            )
        return score.double()

    # -- the curve -----------------------------------------------------------------------------------------------------

    def _labelled(self, sizes: Sequence[int], found: np.ndarray, batch: PairBatch) -> xr.Dataset:
        shares = np.array(sizes) / len(self.circuit.wiring)
        every = found.mean(-1)
        gap = float(every[0, -1] - every[0, 0])
        if not np.isfinite(gap) or abs(gap) <= 1e-9 * float(np.abs(found[0]).max()):
            raise InputError(
                f"The metric is {every[0, -1]:.6g} in the base run and {every[0, 0]:.6g} with all edges patched: there is "
                "no gap that a circuit could keep a share of. Take other pairs or another metric."
            )
        curve = _shares_of_gap(every)
        count = found.shape[-1]
        drawn = draw_counts(count, RESAMPLES, self.seed) / count
        curves = _shares_of_gap(found[0] @ drawn.T, axis=0).T  # [resample, size]
        if count < 2:  # one pair has no interval
            curves = np.full_like(curves, np.nan)
        ends = interval(curves, axis=0)
        base = "clean" if self.direction == "noising" else "corrupted"
        about = about_run(
            self.bridge,
            "faithfulness",
            outside=self.outside,
            direction=self.direction,
            base_run=base,
            pairs=self.pairs.name,
            n_pairs=count,
            prompts=self.pairs.content_hash,
            base=float(every[0, -1]),
            patched=float(every[0, 0]),
            cpr=cpr(shares, curve[0]),
            cmd=cmd(shares, curve[0]),
            cpr_interval=interval([cpr(shares, each) for each in curves]).tolist(),
            cmd_interval=interval([cmd(shares, each) for each in curves]).tolist(),
            random_cpr=[cpr(shares, each) for each in curve[1:]],
            seed=self.seed,
            **about_metrics(batch.metric, "metric"),
        )
        made = xr.Dataset(
            {
                "faithfulness": ("size", curve[0]),
                "low": ("size", ends[0]),
                "high": ("size", ends[1]),
                "random_faithfulness": (("random", "size"), curve[1:]),
                "metric": (("size", "pair"), found[0]),
                "random_metric": (("random", "size", "pair"), found[1:]),
            },
            {"size": list(sizes), "share": ("size", shares)},
            about,
        )
        for name in ("metric", "random_metric"):
            made[name].attrs["units"] = about["units"]
        return made


def _shares_of_gap(metric: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of the gap between the first and the last size that each size keeps."""
    first, last = np.take(metric, [0], axis), np.take(metric, [-1], axis)
    return np.asarray((metric - first) / (last - first))


def cpr(shares: np.ndarray, curve: np.ndarray) -> float:
    """Area under a faithfulness curve, ``[size]`` over the share of edges, which runs from 0 to 1."""
    return float(((curve[1:] + curve[:-1]) / 2 * np.diff(shares)).sum())


def cmd(shares: np.ndarray, curve: np.ndarray) -> float:
    """Area between a faithfulness curve and 1."""
    return cpr(shares, np.abs(1 - curve))


@documented(Faithfulness)
def faithfulness(
    bridge: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    metric: PairMetric | None = None,
    *,
    sizes: Sequence[int] | None = None,
    outside: Outside = "source",
    direction: Direction = "noising",
    randoms: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
) -> xr.Dataset:
    """Run :class:`Faithfulness`: which share of the metric's gap the strongest edges keep, all others patched.

    Arguments are its fields; ``progress``, ``checkpoint`` and ``every`` those of its ``run``.

    Raises:
        InputError: see :meth:`Faithfulness.run`.
        OtherJobError: the same.
        UnsupportedModelError: the residual stream is not the sum of what parts add to it.
    """
    return Faithfulness(
        bridge,
        circuit,
        pairs,
        metric,
        sizes=sizes,
        outside=outside,
        direction=direction,
        randoms=randoms,
        seed=seed,
        batch_size=batch_size,
    ).run(progress=progress, checkpoint=checkpoint, every=every)
