"""Attribution over a data set of pairs: the effects of each pair, then the experiment on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil

from pellucid.attribution.checking import Chosen
from pellucid.attribution.estimates import Estimator
from pellucid.attribution.streaming import PairStream
from pellucid.errors import InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.pairs import PairBatch
from pellucid.sweep import Sweep
from pellucid.sweep.unedited import Unedited

ESTIMATED, CHECKED = "estimated", "checked"
"""The two rounds."""


class PairPass:
    """The two rounds over batches of pairs.

    The state has ``[pair, ...]``: ``"base"`` and ``"source"`` metrics; ``"effect {site} {method}"``; ``"delta {site}"``;
    ``"patched {site}"``, what the experiment's edits do.

    Args:
        estimator: what is estimated.
        batches: of the pairs.
        denoises: the corrupted run is patched with clean values; else the other way round.
        options: memory and rows of the experiment's sweep.
        stream: what the batches go through, and keeps the state.
    """

    def __init__(
        self,
        estimator: Estimator,
        batches: Sequence[PairBatch],
        denoises: bool,
        options: SweepOptions,
        stream: PairStream,
    ) -> None:
        self.estimator, self.batches, self.denoises, self.options = estimator, batches, denoises, options
        self.stream, self.state = stream, stream.state
        self.n_pairs = sum(len(batch.rows) for batch in batches)

    def estimate(self) -> None:
        """The effects of all pairs."""
        for batch in self.stream.left(ESTIMATED, self.batches):
            found = self.estimator.estimate(*self._runs(batch), batch.metric)
            put = self.state.put
            put("base", self.n_pairs, batch.rows, found.base)
            put("source", self.n_pairs, batch.rows, found.source)
            for (site, method), effect in found.effects.items():
                put(f"effect {site} {method}", self.n_pairs, batch.rows, effect)
            for site, delta in found.deltas.items():
                put(f"delta {site}", self.n_pairs, batch.rows, delta)

    def check(self, chosen: Mapping[str, Chosen]) -> None:
        """What patching the chosen cells of each site does to the metric of each pair."""
        bridge = self.estimator.bridge
        for batch in self.stream.left(CHECKED, self.batches):
            base, source = self._runs(batch)
            kept = self.estimator.source(source)
            sizes = bridge.cfg.sizes(len(batch.rows), batch.clean.length, batch.clean.length)
            sweep = Sweep(
                bridge,
                base,
                batch.metric,
                memory_limit=self.options.memory_limit,
                rows_at_once=self.options.rows_at_once,
            )
            for name, of_site in chosen.items():
                with bridge.points_on(of_site.site.cells.site.flags):
                    found = sweep.run(of_site.edits(kept.activations, sizes), progress=False)
                change = (found.values["metric"] - found.base["metric"]).reshape(of_site.n_edits, -1)
                self.state.put(f"patched {name}", self.n_pairs, batch.rows, change.T)

    def _runs(self, batch: PairBatch) -> tuple[Unedited, Unedited]:
        """The run that is patched, and that which is patched from."""
        runs = [prompts.unedited(self.estimator.bridge) for prompts in (batch.corrupted, batch.clean)]
        base, source = runs if self.denoises else runs[::-1]
        return base, source


def refuse_too_much(estimator: Estimator, n_pairs: int, memory_limit: int | None) -> None:
    """See that the effects of all pairs can be kept.

    Raises:
        InputError: they take more memory than there is.
    """
    needed = estimator.effect_bytes(n_pairs)
    limit = memory_limit or int(psutil.virtual_memory().available) // 2
    if needed > limit:
        raise InputError(
            f"The effects of {n_pairs} pairs take {needed:,} bytes, more than memory_limit={limit:,}: leave an axis out of "
            "by, take some layers or positions, or fewer pairs."
        )
