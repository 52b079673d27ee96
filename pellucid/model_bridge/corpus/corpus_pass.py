"""One pass of the model over a corpus, which everything that reads a corpus goes through: collect, harvest, perplexity.

1. A :class:`RowPlan` says which rows are run and how they are cut into batches; a pass that goes on begins after those done.
2. :func:`corpus_pass` gives a :class:`PassBatch` for each: ids, mask and positions of a run that has not been made.
3. :meth:`PassBatch.run` makes it, as often as the reader likes, under whatever hooks are on. It ends where the plan's
   ``stop`` says. *Taps*, functions of the reader's on hook points, are shown each activation while the model runs, so that
   nothing is kept that nobody wants.
4. Between batches the bar moves, and a state that the same call goes on from is written (:class:`StateFolder`). Ctrl-C is
   put off until then: the first one ends the batch, the second one raises at once.

Nothing is attached, mounted or switched between two runs: whoever breaks off leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from pellucid.corpora import Corpus, CorpusBatch, LabelCount
from pellucid.errors import HookValueError, OtherJobError
from pellucid.hook_points import HookPoint, LensHandle
from pellucid.interrupts import ctrl_c_goes_to
from pellucid.model_bridge.corpus.collected import Collected, read_collected, write_collected
from pellucid.model_bridge.corpus.job_identity import Watched, hooks_on
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.running.run_positions import RunPositions
from pellucid.model_bridge.running.runner import Prepared, RunnableModel
from pellucid.model_bridge.running.tokens import ids_as_given
from pellucid.names import FROM_TOKENS, HookSpec, runs_through
from pellucid.padding import has_padding
from pellucid.run_context import current_run
from pellucid.running_stats import Places
from pellucid.storage.json_text import differences
from pellucid.storage.whole_files import remove_abandoned_parts
from pellucid.tables import brief


class LabelledRows(Protocol):
    """Rows of one label: a :class:`~pellucid.corpora.CorpusBatch`, or less."""

    @property
    def label(self) -> str:
        """Whose rows these are."""
        ...

    @property
    def tokens(self) -> Tensor:
        """``[batch, pos]`` ids."""
        ...

    @property
    def attention_mask(self) -> Tensor:
        """``[batch, pos]``, true at real tokens."""
        ...


R = TypeVar("R", bound=LabelledRows)
S = TypeVar("S")
PaddingSide: TypeAlias = Literal["left", "right"]
Tap: TypeAlias = "Callable[[Tensor, PassBatch[Any]], None]"
"""What is called with an activation ``[batch, pos, *features]``, at the positions of the rows, and the batch. The tensor is
the model's: it is to be copied if it is to be kept, and not to be written to."""


@dataclass(frozen=True)
class RowPlan:
    """Which rows of a corpus are run, and how they are cut into batches.

    Attributes:
        labels: of these labels, in this order.
        batch_size: rows of a batch; the last of a label may have fewer.
        start_row: first row of each label.
        stop_row: the row after the last; ``None`` for all.
        padding_side: of rows shorter than the batch.
    """

    labels: Sequence[str]
    batch_size: int
    start_row: int = 0
    stop_row: int | None = None
    padding_side: PaddingSide = "right"

    def batches(self, corpus: Corpus, done: Mapping[str, int] | None = None) -> Iterator[CorpusBatch]:
        """The batches, without the first ``done`` rows of each label.

        Raises:
            InputError: a plan that the corpus cannot follow; at once.
            CorpusError: what cannot be read, when it is met.
        """
        return self._rest(corpus, done) if done else corpus.batches(**self.settings())

    def _rest(self, corpus: Corpus, done: Mapping[str, int]) -> Iterator[CorpusBatch]:
        for label in self.labels:
            begin = self.start_row + done[label]
            if begin < self._last(corpus.rows(label)):
                yield from corpus.batches(**self.settings() | {"labels": [label], "start_row": begin})

    def settings(self) -> dict[str, Any]:
        """The plan as JSON, by the names that :meth:`Corpus.batches <pellucid.corpora.Corpus.batches>` has for it."""
        return {**asdict(self), "labels": list(self.labels)}

    def n_tokens(self, counts: Mapping[str, LabelCount]) -> int:
        """Tokens of all batches, as if all rows were equally long: what a bar counts up to."""
        rows = {label: max(0, self._last(counts[label].rows) - self.start_row) for label in self.labels}
        return sum(size * counts[label].tokens // counts[label].rows for label, size in rows.items())

    def _last(self, rows: int) -> int:
        return rows if self.stop_row is None else min(self.stop_row, rows)


class PassBatch(Generic[R]):
    """Rows of a corpus, and the run of the model that can be made of them.

    Attributes:
        rows: label, ids and mask, and what else the corpus gives with them.
        n_tokens: real tokens.
        prepared: the input of the run, checked.
    """

    def __init__(self, model: RunnableModel, rows: R, taps: Sequence[_Tap], stop: int | None) -> None:
        self.rows, self.n_tokens = rows, int(rows.attention_mask.sum())
        self._model, self._taps, self._stop = model, taps, stop
        within = stop if stop is not None and stop <= model.runner.cfg.n_layers else None
        mask = rows.attention_mask if has_padding(rows.attention_mask) else None
        with torch.no_grad(), ids_as_given():
            self.prepared: Prepared = model.runner.prepare(rows.tokens, attention_mask=mask, stop_at_layer=within)
            self.positions: RunPositions = model.runner.positions_of(self.prepared)
            """Of the run: those of the rows, after any that a wrapper of the model puts before."""

    def __repr__(self) -> str:
        return brief("PassBatch", {"label": self.rows.label, "tokens": self.rows.tokens, "n_tokens": self.n_tokens})

    @cached_property
    def mask(self) -> Tensor | None:
        """``[batch, pos]`` bool on the model's device, ``False`` at padding; ``None`` if every token is real."""
        given = self.prepared
        return None if given.attention_mask is None else self.rows.attention_mask.to(given.given.device)

    @cached_property
    def real(self) -> Tensor | None:
        """``[token]`` int64 on the CPU: where in the rows, one after another, real tokens are; ``None`` if all are."""
        return None if self.mask is None else self.rows.attention_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def places(self) -> Places:
        """Where the tokens come from, on the model's device; of the rows of a corpus."""
        rows: Any = self.rows
        device = self.prepared.given.device
        return Places(rows.documents.to(device), rows.positions.to(device))

    def run(self) -> Tensor:
        """Run the model on the rows, showing the taps what they are on. Gradients are off.

        Returns:
            logits ``[batch, pos, d_vocab]``, or what the model has where the pass stops ``[batch, pos, d_model]``.

        Raises:
            HookValueError: a tap's point fired another number of times than once.
            InputError: a token id that the model does not have.
        """
        # A wrapper that embeds the tokens itself hides them from the run.
        tokens = self.prepared.tokens if self.positions.embeddings is None else None
        for tap in self._taps:
            tap.calls, tap.tokens, tap.batch = 0, tokens, self
        handles = [LensHandle(tap.point, tap, "fwd", tap.point.name, reads_only=True) for tap in self._taps]
        with torch.no_grad(), ids_as_given():
            output = HookSession(self._model.runner.tree, handles).during(self._forward)
        for tap in self._taps:
            if tap.calls != 1:
                raise HookValueError(
                    f"{tap.point.name} fired {tap.calls} times in one forward of {tuple(self.rows.tokens.shape)} tokens: "
                    "what is read there would be wrong. bridge.verify() shows which hooks are alive."
                )
        return output

    def _forward(self) -> Tensor:
        """To the end of the blocks, of the final norm, or of the model."""
        model, prepared, positions = self._model, self.prepared, self.positions
        inside = positions.embeddings is None and not positions.cache_is_wrappers  # a wrapper adds nothing to the input
        prepared.ends_at_norm = self._stop == model.runner.cfg.n_layers + 1 and inside
        return model.runner.run(prepared)


class _Tap:
    """Shows what passes one hook point to a function of the reader's."""

    def __init__(self, point: HookPoint, show: Tap) -> None:
        self.point, self._show = point, show
        self.calls = 0
        self.tokens: Tensor | None = None
        self.batch: PassBatch[Any] | None = None

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        run, batch = current_run(), self.batch
        if batch is None or run is None or run.tokens is not self.tokens:
            return  # a hook of the user's runs the model inside this run
        self.calls += 1
        self._show(batch.positions.of_input(tensor), batch)


STATE_FILE = "collected.safetensors"


@dataclass(frozen=True)
class StateFile(Generic[S]):
    """How the state of one kind of job is kept.

    Attributes:
        name: of the file.
        read: a file to the state, and the JSON that was written beside it.
        write: the state, and JSON beside it, to a file.
        what: the job, for an error.
    """

    name: str
    read: Callable[[Path], tuple[S, dict[str, Any]]]
    write: Callable[[Path, S, Mapping[str, Any]], None]
    what: str


COLLECTION: StateFile[Collected] = StateFile(STATE_FILE, read_collected, write_collected, "the collection")


class StateFolder(Generic[S]):
    """A folder with the state of one unfinished job, which the same call goes on from with equal bits.

    Hooks are part of the job as they are when a state is written, not as they were when it was begun: one that counts its
    calls goes on with equal bits only from the count at which it stood then.

    Args:
        model: the bridge.
        folder: made if it is not there.
        job: what the bits depend on (JSON).
        every: seconds between states.
        empty: the state of a job that begins here.
        file: how it is kept.

    Attributes:
        state: what was seen so far: of the folder, or ``empty``.

    Raises:
        OtherJobError: the folder holds another job's state.
        InputError: a damaged state.
    """

    def __init__(
        self, model: RunnableModel, folder: Path, job: dict[str, Any], every: float, empty: S, file: StateFile[S]
    ) -> None:
        self.path = folder / file.name
        self._model, self._job, self._every, self._file = model, job, every, file
        self._watched = Watched(model, file.what)
        self._interrupted = False
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned_parts(folder)
        self.state = self._held() if self.path.exists() else empty
        self._written = time.monotonic()

    def _held(self) -> S:
        held, extra = self._file.read(self.path)
        found = extra.get("job")
        if not isinstance(found, dict):
            raise OtherJobError(f"{self.path} was saved by hand, not by an unfinished job: give another folder.")
        different = differences(found, self._job)
        if different:
            raise OtherJobError(
                f"{self.path.parent} holds the state of another job. It has:\n"
                + "\n".join(f"  {each}" for each in different)
                + "\nGive the settings it was begun with, or another folder."
            )
        return held

    def after_batch(self) -> None:
        """Write the state if it is time to, or if Ctrl-C was pressed, which then interrupts.

        Raises:
            KeyboardInterrupt: the state is written.
        """
        if self._interrupted or time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write the state in place of the last one.

        Raises:
            InputError: the model is no longer the one that the pass began with; the last state stays.
            StorageFullError: no space is left; the last state stays.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; the state is written.
        """
        self._watched.refuse_change()
        self._job["hooks"] = hooks_on(self._model)
        self._file.write(self.path, self.state, {"job": self._job})
        self._written = time.monotonic()
        if self._interrupted:
            raise KeyboardInterrupt(f"the state is in {self.path}; the same call goes on from there")

    def interrupt_put_off(self) -> AbstractContextManager[None]:
        """Note the first Ctrl-C instead of raising, so that a batch is counted whole; the second one raises at once."""

        def note(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        return ctrl_c_goes_to(note)


def corpus_pass(
    model: RunnableModel,
    batches: Iterable[R],
    taps: Mapping[str, Tap] | None = None,
    *,
    stop: int | None = None,
    bar: Any | None = None,
    saved: StateFolder[Any] | None = None,
) -> Iterator[PassBatch[R]]:
    """Go through batches; each is run when the reader says so.

    Args:
        model: the bridge.
        batches: of a plan, or of any text.
        taps: by hook point, what is shown its activations.
        stop: how far to run, see :func:`stop_after`; ``None`` runs to the logits.
        bar: its ``update`` is told of each batch's tokens.
        saved: where a state is written when it is time to.

    Raises:
        InputError: at a batch that cannot be run.
    """
    shown = [_Tap(model.runner.tree.point(name), tap) for name, tap in (taps or {}).items()]
    for rows in batches:
        batch = PassBatch(model, rows, shown, stop)
        yield batch
        if bar is not None:
            bar.update(batch.n_tokens)
        if saved is not None:
            saved.after_batch()


def stop_after(specs: Sequence[HookSpec], n_layers: int) -> int | None:
    """The earliest end of a run that passes through every point.

    Returns:
        the block before which it may stop, ``n_layers`` for the end of the blocks, ``n_layers + 1`` for the end of the final
        norm, ``None`` for the logits.
    """
    for stop in range(n_layers + 1):
        if all(runs_through(spec, FROM_TOKENS, stop, n_layers) for spec in specs):
            return stop
    return None if any(spec.component == "unembed" for spec in specs) else n_layers + 1
