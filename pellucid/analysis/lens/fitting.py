"""What fitting a lens shares, whichever lens: one pass over a corpus that can be interrupted, and the state it goes on
from.

1. Batches of all labels take turns, so that a fit does not end on the last label's text alone.
2. The reader's ``step`` is given each batch, and changes the tensors of a :class:`FitState`.
3. With a folder the state is written between batches, under the identity of the job; the same call goes on from it with
   equal bits, or is refused by the name of what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_number, check_path
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import InputError
from pellucid.experiments.labelled import Attribute
from pellucid.model_bridge.corpus.corpus_pass import PassBatch, RowPlan, StateFile, StateFolder, corpus_pass
from pellucid.model_bridge.corpus.job_identity import Watched, job_identity
from pellucid.model_bridge.corpus.tensor_state import read_tensor_state, write_tensor_state
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.progress import progress_bar
from pellucid.storage.json_text import Json
from pellucid.tables import BriefFields


@dataclass(eq=False, repr=False)
class FitState(BriefFields):
    """How far a fit is.

    Attributes:
        tensors: what is fitted, and what the fitting remembers; changed in place or replaced.
        n_rows: rows of this epoch that were seen, by label.
        n_tokens: tokens seen, in all epochs.
        counts: other whole numbers.
        epoch: how often the corpus was gone through.
    """

    tensors: dict[str, Shaped[Tensor, "..."]]
    n_rows: dict[str, int]
    n_tokens: int
    counts: dict[str, int]
    epoch: int = 0


def _write_state(path: Path, state: FitState, extra: Mapping[str, Any]) -> None:
    told: dict[str, Json] = {
        "n_rows": state.n_rows,
        "n_tokens": state.n_tokens,
        "counts": state.counts,
        "epoch": state.epoch,
    }
    write_tensor_state(path, state.tensors, "lens_fit", told, extra)


def _read_state(path: Path) -> tuple[FitState, dict[str, Any]]:
    tensors, told, about = read_tensor_state(path, "lens_fit", "a fit")
    try:
        return FitState(tensors, told["n_rows"], told["n_tokens"], told["counts"], told["epoch"]), about
    except KeyError as error:
        raise InputError(f"{path} holds no state of a fit, or is damaged: {error!r}") from None


STATE: StateFile[FitState] = StateFile("lens_fit.safetensors", _read_state, _write_state, "the fit")


@dataclass(frozen=True)
class Fit:
    """How a fit goes through a corpus.

    Attributes:
        corpus: what is read.
        labels: of these labels, by default all.
        batch_size: rows of a batch.
        start_row: first row of each label.
        stop_row: the row after the last.
        epochs: how often the corpus is gone through.
        checkpoint: a folder for the state.
        every: seconds between states.
        progress: show a bar; ``None`` shows it on a terminal only.
    """

    corpus: Corpus
    labels: str | Sequence[str] | None = None
    batch_size: int = 1
    start_row: int = 0
    stop_row: int | None = None
    epochs: int = 1
    checkpoint: str | Path | None = None
    every: float = 60.0
    progress: bool | None = None

    def plan(self) -> RowPlan:
        """Which rows, checked.

        Raises:
            InputError: a plan that the corpus cannot follow.
        """
        check_kind("corpus", self.corpus, Corpus, "a Corpus")
        check_count("epochs", self.epochs)
        check_number("every", self.every, at_least=0)
        plan = RowPlan(self.corpus.chosen(self.labels), self.batch_size, self.start_row, self.stop_row)
        plan.batches(self.corpus)  # refuses what it cannot do before anything is read
        return plan

    def rows(self, plan: RowPlan) -> dict[str, int]:
        """Rows of each label that are read; the corpus is read once for it.

        Raises:
            InputError: there are none.
            CorpusError: what cannot be read.
        """
        counts = self.corpus.index(plan.labels, self.progress)
        last = {
            label: count.rows if self.stop_row is None else min(self.stop_row, count.rows)
            for label, count in counts.items()
        }
        found = {label: max(0, rows - self.start_row) for label, rows in last.items()}
        if not any(found.values()):
            raise InputError(
                f"start_row={self.start_row} is beyond the last row of {', '.join(plan.labels)}: nothing would be run."
            )
        return found


Step = Callable[[PassBatch[CorpusBatch], FitState], None]


def run_fit(
    bridge: TransformerBridge,
    fit: Fit,
    settings: Mapping[str, Json],
    empty: FitState,
    step: Step,
    taps: Mapping[str, Any],
) -> FitState:
    """Go through the corpus; the state when all of it was seen.

    Args:
        bridge: the model.
        fit: how.
        settings: what the state depends on beside the model and the corpus.
        empty: the state of a fit that begins here.
        step: is given each batch, run or not.
        taps: by hook point, what is shown its activations in the runs that ``step`` makes.

    Raises:
        CorpusError: what cannot be read.
        OtherJobError: the folder holds a state of other weights, another corpus or other settings.
        InputError: the model changed meanwhile, or has torch hooks and there is a folder.
        StorageFullError: no space is left for the state.
    """
    bridge.runner.refuse_training()
    folder = None if fit.checkpoint is None else check_path("checkpoint", fit.checkpoint)
    plan = fit.plan()
    fit.rows(plan)
    counts = fit.corpus.index(plan.labels, False)
    state, saved, watched = empty, None, Watched(bridge, "the fit")
    if folder is not None:
        job = {"fit": dict(settings), "epochs": fit.epochs, "corpus": fit.corpus.content_hash} | plan.settings()
        saved = StateFolder(bridge, folder, job | job_identity(bridge), fit.every, empty, STATE)
        state = saved.state
    with (
        progress_bar(
            total=plan.n_tokens(counts) * fit.epochs, desc="fitting", unit=" tokens", show=fit.progress
        ) as bar,
        nullcontext() if saved is None else saved.interrupt_put_off(),
    ):
        bar.update(state.n_tokens)
        while state.epoch < fit.epochs:
            for batch in corpus_pass(bridge, in_turns(plan, fit.corpus, state.n_rows), taps, bar=bar, saved=saved):
                step(batch, state)
                state.n_rows[batch.rows.label] += len(batch.rows.tokens)
                state.n_tokens += batch.n_tokens
            state.epoch += 1
            if state.epoch < fit.epochs:
                state.n_rows = dict.fromkeys(state.n_rows, 0)
        if saved is not None:
            saved.write()
    watched.refuse_change()
    return state


def in_turns(plan: RowPlan, corpus: Corpus, done: Mapping[str, int]) -> Iterator[CorpusBatch]:
    """The batches of a plan that are left, those of its labels taking turns.

    Which label is next follows from the rows that are done alone, so that a fit that goes on sees the same order.
    """
    seen = dict(done)
    left = {
        label: RowPlan([label], plan.batch_size, plan.start_row, plan.stop_row).batches(corpus, {label: seen[label]})
        if seen[label]
        else RowPlan([label], plan.batch_size, plan.start_row, plan.stop_row).batches(corpus)
        for label in plan.labels
    }
    while left:
        label = min(left, key=lambda each: seen[each])
        batch = next(left[label], None)
        if batch is None:
            del left[label]
        else:
            seen[label] += len(batch.tokens)
            yield batch


def about_fit(fit: Fit, state: FitState) -> dict[str, Attribute]:
    """What a fitted lens says of its fit."""
    return {
        "fitted_on": fit.corpus.content_hash,
        "fitted_rows": sum(state.n_rows.values()) * max(1, state.epoch),
        "fitted_tokens": state.n_tokens,
    }
