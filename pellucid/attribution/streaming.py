"""A pass over batches of pairs that can be interrupted: what is kept of the pairs done, a bar, and the job's identity.

What a batch gives is the caller's: attribution patching (:mod:`pellucid.attribution.pair_pass`), edge attribution and
faithfulness (:mod:`pellucid.circuits`) put numbers into the state. The same call goes on from it with equal bits, and a
changed job is refused by the name of what has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_number, check_path
from pellucid.errors import InputError
from pellucid.experiments.pairs import PairBatch, PairMetric
from pellucid.model_bridge.corpus.corpus_pass import StateFile, StateFolder
from pellucid.model_bridge.corpus.function_hash import function_hash
from pellucid.model_bridge.corpus.job_identity import job_identity
from pellucid.model_bridge.corpus.tensor_state import read_tensor_state, write_tensor_state
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.progress import progress_bar
from pellucid.storage.json_text import Json
from pellucid.tables import BriefFields


@dataclass(eq=False, repr=False)
class PassState(BriefFields):
    """How far a pass is.

    Attributes:
        tensors: what the caller keeps, by its own names.
        done: batches that are done, by round.
    """

    tensors: dict[str, Shaped[Tensor, "..."]] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, n_pairs: int, rows: Sequence[int], numbers: Float[Tensor, "row ..."]) -> None:
        """Numbers ``[row, ...]`` of some pairs, into ``[pair, ...]``."""
        numbers = numbers.detach().cpu()
        if name not in self.tensors:
            self.tensors[name] = numbers.new_full((n_pairs, *numbers.shape[1:]), torch.nan)
        self.tensors[name][list(rows)] = numbers


@dataclass(frozen=True)
class Resuming:
    """How a pass can be gone on with, as its caller was asked.

    Attributes:
        checkpoint: a folder for the state; ``None`` keeps none.
        every: seconds between states.

    Raises:
        InputError: no path, or a time below 0.
    """

    checkpoint: str | Path | None = None
    every: float = 60.0

    def __post_init__(self) -> None:
        check_number("every", self.every, at_least=0)
        if self.checkpoint is not None:
            check_path("checkpoint", self.checkpoint)


class PairStream:
    """One pass over batches of pairs, in one round or several.

    Args:
        bridge: the model, in eval mode.
        what: the job, in its file's name, in errors and beside the bar.
        settings: what the numbers depend on beside the model.
        resuming: where the state is kept.
        progress: show a bar; by default on a terminal.

    Attributes:
        state: what was found so far.

    Raises:
        OtherJobError: the folder holds a state of another job.
        InputError: the folder's state is damaged; a model in training mode.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        what: str,
        settings: Mapping[str, Json],
        resuming: Resuming,
        progress: bool | None,
    ) -> None:
        bridge.runner.refuse_training()
        self.what, self.state = what, PassState()
        self._progress, self._goal = progress, 0
        self._bar: Any = None
        self._saved: StateFolder[PassState] | None = None
        if resuming.checkpoint is not None:
            job: dict[str, Any] = {what: dict(settings)}
            folder, file = check_path("checkpoint", resuming.checkpoint), _state_file(what)
            self._saved = StateFolder(bridge, folder, job | job_identity(bridge), resuming.every, self.state, file)
            self.state = self._saved.state

    @contextmanager
    def running(self, total: int, unit: str = "pair") -> Iterator[None]:
        """The bar and the care for interrupts, around all rounds; the state is written at the end.

        Args:
            total: steps of all rounds.
            unit: what a step is.
        """
        with (
            progress_bar(total=total, desc=self.what, unit=unit, show=self._progress) as self._bar,
            nullcontext() if self._saved is None else self._saved.interrupt_put_off(),
        ):
            yield
            if self._saved is not None:
                self._saved.write()

    def left(self, round: str, batches: Sequence[PairBatch], steps: int = 1) -> Iterator[PairBatch]:
        """The batches that the state has not; one is done when the next is asked for.

        Args:
            round: which.
            batches: all of them.
            steps: of the bar, for a pair.
        """
        for number, batch in enumerate(batches):
            self._goal += steps * len(batch.rows)
            if number >= self.state.done.get(round, 0):
                yield batch
                self.state.done[round] = number + 1
                self._after_batch()
            self.step(self._goal - self._bar.n)

    def step(self, count: int) -> None:
        """Move the bar inside a batch."""
        self._bar.update(count)

    def _after_batch(self) -> None:
        if self._saved is not None:
            self._saved.after_batch()


def metric_identity(metric: PairMetric | None) -> str | None:
    """What a metric computes, for a job: a class by its name, anything else by its code and what it holds.

    Raises:
        InputError: it holds what cannot be compared.
    """
    if metric is None or isinstance(metric, type):
        return None if metric is None else metric.__qualname__
    return function_hash(metric, {})


def _state_file(what: str) -> StateFile[PassState]:
    name = f"{what.replace(' ', '_')}.safetensors"
    return StateFile(name, partial(_read, what), partial(_write, what), f"the {what}")


def _write(what: str, path: Path, state: PassState, extra: Mapping[str, Any]) -> None:
    write_tensor_state(path, state.tensors, what, {"done": dict(state.done)}, extra)


def _read(what: str, path: Path) -> tuple[PassState, dict[str, Any]]:
    tensors, told, about = read_tensor_state(path, what, f"the {what}")
    try:
        return PassState(tensors, dict(told["done"])), about
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no state of the {what}, or is damaged: {error!r}") from None
