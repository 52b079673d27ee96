"""A pass over pairs that can be interrupted: effects of each pair, then the experiment on the same pairs; their state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from pellucid.attribution.checking import Chosen
from pellucid.attribution.estimates import Estimator
from pellucid.errors import InputError
from pellucid.experiments.labelled import switched
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.pairs import PairBatch
from pellucid.model_bridge.corpus.corpus_pass import StateFile, StateFolder
from pellucid.model_bridge.corpus.job_identity import Watched, job_identity
from pellucid.model_bridge.corpus.tensor_state import read_tensor_state, write_tensor_state
from pellucid.progress import progress_bar
from pellucid.storage.json_text import Json
from pellucid.sweep import Sweep
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields


@dataclass(eq=False, repr=False)
class PassState(BriefFields):
    """How far a pass is.

    Attributes:
        tensors: ``[pair, ...]``: ``"base"`` and ``"source"`` metrics; ``"effect {site} {method}"``; ``"delta {site}"``;
            ``"patched {site}"``, what the experiment's edits do.
        estimated: batches whose effects are known.
        checked: batches whose cells are patched.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    estimated: int = 0
    checked: int = 0

    def put(self, name: str, n_pairs: int, rows: Sequence[int], numbers: Tensor) -> None:
        """Numbers ``[row, ...]`` of some pairs."""
        numbers = numbers.detach().cpu()
        if name not in self.tensors:
            self.tensors[name] = numbers.new_full((n_pairs, *numbers.shape[1:]), torch.nan)
        self.tensors[name][list(rows)] = numbers


def _write(path: Path, state: PassState, extra: Mapping[str, Any]) -> None:
    told: dict[str, Json] = {"estimated": state.estimated, "checked": state.checked}
    write_tensor_state(path, state.tensors, "attribution", told, extra)


def _read(path: Path) -> tuple[PassState, dict[str, Any]]:
    tensors, told, about = read_tensor_state(path, "attribution", "an attribution")
    try:
        return PassState(tensors, told["estimated"], told["checked"]), about
    except KeyError as error:
        raise InputError(f"{path} holds no state of an attribution, or is damaged: {error!r}") from None


STATE: StateFile[PassState] = StateFile("attribution.safetensors", _read, _write, "the attribution")


class PairPass:
    """One pass over batches of pairs.

    Args:
        estimator: what is estimated.
        batches: of the pairs.
        denoises: the corrupted run is patched with clean values; else the other way round.
        options: memory and rows of the experiment's sweep.
        settings: what the numbers depend on beside the model.
        checkpoint: a folder for the state.
        every: seconds between states.
        progress: show a bar; by default on a terminal.
        checks: the experiment is going to be made: pairs count twice in the bar.

    Raises:
        OtherJobError: the folder holds a state of another job.
        InputError: the folder's state is damaged; effects would take more memory than there is.
    """

    def __init__(
        self,
        estimator: Estimator,
        batches: Sequence[PairBatch],
        denoises: bool,
        options: SweepOptions,
        settings: Mapping[str, Json],
        checkpoint: Path | None,
        every: float,
        progress: bool | None,
        checks: bool,
    ) -> None:
        self.estimator, self.batches, self.denoises, self.options = estimator, batches, denoises, options
        bridge = estimator.bridge
        bridge.runner.refuse_training()
        self.n_pairs = sum(len(batch.rows) for batch in batches)
        self._refuse_too_much()
        self._watched = Watched(bridge, "the attribution")
        self._progress, self._checks = progress, checks
        self.saved: StateFolder[PassState] | None = None
        self.state = PassState()
        if checkpoint is not None:
            job: dict[str, Any] = {"attribution": dict(settings)}
            self.saved = StateFolder(bridge, checkpoint, job | job_identity(bridge), every, self.state, STATE)
            self.state = self.saved.state

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs' effects."""
        sites, methods = self.estimator.sites, self.estimator.methods
        cells = sum(math.prod(site.cells.shape) for site in sites) * len(methods)
        return self.n_pairs * cells * max(4, self.estimator.bridge.dtype.itemsize)

    def _refuse_too_much(self) -> None:
        limit = self.options.memory_limit or int(psutil.virtual_memory().available) // 2
        if self.nbytes > limit:
            raise InputError(
                f"The effects of {self.n_pairs} pairs take {self.nbytes:,} bytes, more than memory_limit={limit:,}: leave "
                "an axis out of by, take some layers or positions, or fewer pairs."
            )

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The bar and the care for interrupts, around both halves of a pass."""
        total = self.n_pairs * (2 if self._checks else 1)
        with (
            progress_bar(total=total, desc="attribution", unit="pair", show=self._progress) as bar,
            nullcontext() if self.saved is None else self.saved.interrupt_put_off(),
        ):
            yield bar
            if self.saved is not None:
                self.saved.write()
        self._watched.refuse_change()

    def estimate(self, bar: Any) -> None:
        """The effects of all pairs."""
        for number, batch in enumerate(self.batches):
            if number >= self.state.estimated:
                found = self.estimator.estimate(*self._runs(batch), batch.metric)
                put = self.state.put
                put("base", self.n_pairs, batch.rows, found.base)
                put("source", self.n_pairs, batch.rows, found.source)
                for (site, method), effect in found.effects.items():
                    put(f"effect {site} {method}", self.n_pairs, batch.rows, effect)
                for site, delta in found.deltas.items():
                    put(f"delta {site}", self.n_pairs, batch.rows, delta)
                self.state.estimated = number + 1
                self._after_batch()
            bar.update(len(batch.rows))

    def check(self, bar: Any, chosen: Mapping[str, Chosen]) -> None:
        """What patching the chosen cells of each site does to the metric of each pair."""
        bridge = self.estimator.bridge
        for number, batch in enumerate(self.batches):
            if number >= self.state.checked:
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
                    with switched(bridge, of_site.site.cells.site.flags):
                        found = sweep.run(of_site.edits(kept.activations, sizes), progress=False)
                    change = (found.values["metric"] - found.base["metric"]).reshape(of_site.n_edits, -1)
                    self.state.put(f"patched {name}", self.n_pairs, batch.rows, change.T)
                self.state.checked = number + 1
                self._after_batch()
            bar.update(len(batch.rows))

    def _runs(self, batch: PairBatch) -> tuple[Unedited, Unedited]:
        """The run that is patched, and that which is patched from."""
        runs = [prompts.unedited(self.estimator.bridge) for prompts in (batch.corrupted, batch.clean)]
        base, source = runs if self.denoises else runs[::-1]
        return base, source

    def _after_batch(self) -> None:
        if self.saved is not None:
            self.saved.after_batch()
