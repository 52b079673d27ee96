"""Collecting statistics of activations over a corpus: one pass, several places, nothing kept.

A *tap* stands on each hook point and shows what passes to the statistics of the label being run. The forward ends after the
last layer that has a tap, and the unembedding is left out unless it has one. With a checkpoint folder the pass can be
interrupted anywhere: the state is written between batches, and the same call goes on from there with equal bits.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pellucid.arguments import check_number
from pellucid.corpora import Corpus, CorpusBatch, LabelCount
from pellucid.differences import differences
from pellucid.errors import HookValueError, InputError, OtherJobError
from pellucid.hook_points import HookPoint, LensHandle
from pellucid.model_bridge.collected import Collected, Hook, describe_request, read_collected, write_collected
from pellucid.model_bridge.hook_session import HookSession
from pellucid.model_bridge.job_identity import Watched, hooks_on, job_identity
from pellucid.model_bridge.run_positions import RunPositions
from pellucid.model_bridge.running import Prepared, RunnableModel
from pellucid.model_bridge.tokens import ids_as_given
from pellucid.model_bridge.weights_hash import weights_hash
from pellucid.names import HookSpec, NamesFilter
from pellucid.progress import progress_bar
from pellucid.run_context import current_run
from pellucid.running_stats import Places, Statistic
from pellucid.storage.whole_files import remove_abandoned_parts

Requests: TypeAlias = Mapping[Any, Sequence[Statistic]] | Sequence[tuple[NamesFilter, Sequence[Statistic]]]
"""``{name, glob or predicate: [statistics]}``, or pairs, where a filter may also be a list."""

STATE_FILE = "collected.safetensors"


class _Tap:
    """Shows what passes one hook point to the statistics of the label being run."""

    def __init__(self, spec: HookSpec) -> None:
        self.spec = spec
        self.calls = 0
        self.tokens: Tensor | None = None
        self.positions: RunPositions | None = None
        self.mask: Tensor | None = None
        self.places: Places | None = None
        self.statistics: Sequence[Statistic] = ()

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        run = current_run()
        if run is None or run.tokens is not self.tokens:
            return  # a hook of the user's runs the model inside this run
        self.calls += 1
        shown = tensor if self.positions is None else self.positions.of_input(tensor)
        for statistic in self.statistics:
            statistic.update(shown, self.mask, self.places)


class CollectingModel(RunnableModel):
    """A model that statistics can be collected of."""

    def weights_hash(self) -> str:
        """SHA-256 over every parameter and buffer of the Hugging Face model: name, dtype, shape and bytes.

        Raises:
            WeightError: weights that are not in memory (offloaded).
        """
        return weights_hash(self.hf_model)

    def collect(
        self,
        corpus: Corpus,
        statistics: Requests,
        batch_size: int = 4,
        labels: str | Sequence[str] | None = None,
        start_row: int = 0,
        stop_row: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        progress: bool | None = None,
        checkpoint: str | Path | None = None,
        every: float = 60.0,
    ) -> Collected:
        """Run the model over a corpus and keep statistics of activations, by label.

        One forward a batch serves every place. It ends after the last layer asked for; logits are computed only for
        ``hook_unembed`` itself. The corpus is read once before the first forward, so that what cannot be read is known
        then. Hooks that are on the bridge act, and statistics see what they leave.

        Args:
            corpus: what to run.
            statistics: what to keep of which hook points: ``{"blocks.*.mlp.hook_post": [CountPositive(), TopK(20)]}``. What
                is given stays empty; each place and label gets one of its own.
            batch_size: rows of a forward. Integer statistics depend on it only where a value is within rounding of what
                it is compared with: a matrix product of another shape may round differently.
            labels: of these labels only.
            start_row: first row of each label, for dividing a corpus among processes.
            stop_row: the row after the last.
            padding_side: where shorter rows are padded.
            progress: show a bar with tokens per second and time left; ``None`` shows it on a terminal only.
            checkpoint: a folder to keep the state in. The same call on it goes on where the last one stopped, with equal
                bits; Ctrl-C ends the batch, writes the state and then interrupts.
            every: seconds between states.

        Returns:
            Statistics by hook point and label, with the number of tokens of each label.

        Raises:
            HookNameError: a name that matches nothing.
            InputError: a point without features (attention scores and patterns, token ids), a statistic asked for twice.
            CorpusError: a corpus that cannot be read.
            OtherJobError: the folder holds a state of other weights, another corpus or other settings, or one whose hooks
                computed something else when it was written.
            InputError: with ``checkpoint``, torch hooks on the model, a hook that cannot be compared with one of a later
                call, or a model that changes during the pass: a later call could not tell what its numbers are.
            StorageFullError: no space is left for the state; the one before stays.
        """
        check_number("every", every, at_least=0)
        hooks = self._hooks_of(statistics)
        chosen = corpus.chosen(labels)
        batches = corpus.batches(  # refuses what it cannot do before anything is read
            batch_size, labels=chosen, start_row=start_row, stop_row=stop_row, padding_side=padding_side
        )
        counts = corpus.index(chosen, progress)
        total = sum(_share(count, start_row, stop_row) for count in counts.values())
        state = Collected.empty(hooks, chosen)
        store = None
        if checkpoint is not None:
            settings = {
                "batch_size": batch_size,
                "labels": list(chosen),
                "start_row": start_row,
                "stop_row": stop_row,
                "padding_side": padding_side,
            }
            job = {
                "statistics": describe_request(hooks),
                "corpus": corpus.content_hash,
                **settings,
                **job_identity(self),
            }
            store = _Store(self, Path(checkpoint), job, every)
            state = store.open(state)
            batches = self._remaining(corpus, state, batch_size, chosen, start_row, stop_row, padding_side)
        with (
            progress_bar(total=total, desc="collecting", unit=" tokens", show=progress) as bar,
            _deferred_interrupt(store is not None) as interrupted,
        ):
            bar.update(sum(state.n_tokens.values()))
            self._pass(state, batches, bar, store, interrupted)
            if store is not None:
                store.write(state)
                interrupted.raise_if_set(store.path)
        return state

    def _pass(
        self, state: Collected, batches: Iterator[CorpusBatch], bar: Any, store: _Store | None, interrupted: _Flag
    ) -> None:
        taps = [_Tap(hook.spec) for hook in state.hooks]
        stop = _stop_after([hook.spec for hook in state.hooks], self.cfg.n_layers)
        points = [self._tree.point(tap.spec.name) for tap in taps]
        handles = [
            LensHandle(point, tap, "fwd", point.name, reads_only=True) for point, tap in zip(points, taps, strict=True)
        ]
        _refuse_reshaped(points)

        def run_all() -> None:
            for batch in batches:
                prepared = self._batch_input(batch, stop)
                places = Places(batch.documents.to(self.device), batch.positions.to(self.device))
                mask = batch.attention_mask.to(self.device) if batch.is_padded else None
                positions = self.positions_of(prepared)
                # A wrapper that embeds the tokens itself hides them from the run.
                tokens = prepared.tokens if positions.embeddings is None else None
                for hook, tap in zip(state.hooks, taps, strict=True):
                    tap.tokens, tap.mask, tap.places, tap.calls = tokens, mask, places, 0
                    tap.positions = positions
                    tap.statistics = state.of(hook.spec.name, batch.label)
                self._run_to(prepared, stop)
                for tap in taps:
                    if tap.calls != 1:
                        raise HookValueError(
                            f"{tap.spec.name} fired {tap.calls} times in one forward of {tuple(batch.tokens.shape)} tokens: "
                            "its statistics would be wrong. bridge.verify() shows which hooks are alive."
                        )
                state.saw(batch.label, len(batch.tokens), batch.n_tokens)
                bar.update(batch.n_tokens)
                if store is not None and (interrupted.is_set or store.is_due()):
                    store.write(state)
                    interrupted.raise_if_set(store.path)

        with torch.no_grad(), ids_as_given():
            HookSession(self._tree, handles).during(run_all)

    def _batch_input(self, batch: CorpusBatch, stop: int | None) -> Prepared:
        mask = batch.attention_mask.long() if batch.is_padded else None
        within = stop if stop is not None and stop <= self.cfg.n_layers else None
        return self._prepare(batch.tokens, attention_mask=mask, stop_at_layer=within)

    def _run_to(self, prepared: Prepared, stop: int | None) -> None:
        """Run, to the end of the blocks, of the final norm, or of the model."""
        positions = self.positions_of(prepared)
        inside = positions.embeddings is None and not positions.cache_is_wrappers  # a wrapper adds nothing to the input
        if stop is None or stop <= self.cfg.n_layers or not inside:
            self._run(prepared)
            return
        backbone: Any = self._tree.backbone.module
        given = {"input_ids": prepared.tokens, "attention_mask": prepared.attention_mask, "use_cache": False}
        with self._safely(prepared.given):
            HookSession(self._tree, components=self._helpers(None, None)).during(partial(backbone, **given))

    def _hooks_of(self, requests: Requests) -> list[Hook]:
        """Points with their statistics, in firing order."""
        pairs = list(requests.items()) if isinstance(requests, Mapping) else list(requests)
        if not pairs:
            raise InputError("Nothing to collect: give {hook name: [statistics]}.")
        found: dict[str, list[Statistic]] = {}
        for pair in pairs:
            names_filter, given = pair
            wanted = [given] if isinstance(given, Statistic) else list(given)
            if not wanted or not all(isinstance(each, Statistic) for each in wanted):
                raise InputError(
                    f"Each hook has a list of statistics, such as [CountPositive()]; found {given!r} for {names_filter!r}."
                )
            for spec, _ in self._tree.index.select(names_filter, self.cfg.flags, argument="a hook's name"):
                _refuse_shapeless(spec)
                found.setdefault(spec.name, []).extend(wanted)
        for name, wanted in found.items():
            names = [each.name for each in wanted]
            twice = next((each for each in names if names.count(each) > 1), None)
            if twice is not None:
                raise InputError(f"The statistic {twice} is asked for twice at {name}.")
        return [Hook(self._tree.index[name], tuple(found[name])) for name in self._tree.index if name in found]

    def _remaining(
        self,
        corpus: Corpus,
        state: Collected,
        batch_size: int,
        labels: Sequence[str],
        start: int,
        stop: int | None,
        side: Literal["left", "right"],
    ) -> Iterator[CorpusBatch]:
        for label in labels:
            begin = start + state.n_rows[label]
            if begin < (corpus.rows(label) if stop is None else min(stop, corpus.rows(label))):
                yield from corpus.batches(batch_size, labels=label, start_row=begin, stop_row=stop, padding_side=side)


class _Store:
    """A folder that holds the state of one job.

    Hooks are part of the job as they are when a state is written, not as they were when it was begun: one that counts its
    calls goes on with equal bits only from the count at which it stood then.
    """

    def __init__(self, model: CollectingModel, folder: Path, job: dict[str, Any], every: float) -> None:
        self.path = folder / STATE_FILE
        self._model, self._job, self._every = model, job, every
        self._watched = Watched(model, "the collection")
        self._written = time.monotonic()

    def open(self, empty: Collected) -> Collected:
        """The state that the folder holds, or ``empty``.

        Raises:
            OtherJobError: it holds another job's.
        """
        remove_abandoned_parts(self.path.parent)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return empty
        held, extra = read_collected(self.path)
        found = extra.get("job")
        if not isinstance(found, dict):
            raise OtherJobError(f"{self.path} was saved by hand, not by an unfinished collect: give another folder.")
        different = differences(found, self._job)
        if different:
            raise OtherJobError(
                f"{self.path.parent} holds the state of another job. It has:\n"
                + "\n".join(f"  {each}" for each in different)
                + "\nGive the settings it was begun with, or another folder."
            )
        return held

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self._every

    def write(self, state: Collected) -> None:
        """Write the state in place of the last one.

        Raises:
            InputError: the model is no longer the one that the pass began with; the last state stays.
            StorageFullError: no space is left; the last state stays.
        """
        self._watched.refuse_change()
        self._job["hooks"] = hooks_on(self._model)
        write_collected(self.path, state, {"job": self._job})
        self._written = time.monotonic()


class _Flag:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.is_set = False

    def raise_if_set(self, path: Path) -> None:
        """Interrupt now that the state is written."""
        if self.is_set:
            raise KeyboardInterrupt(f"the state is in {path}; the same call goes on from there")


@contextmanager
def _deferred_interrupt(wanted: bool) -> Iterator[_Flag]:
    """Note the first Ctrl-C instead of raising, so that a batch is counted whole; the second one raises at once."""
    flag = _Flag()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if flag.is_set:
            raise KeyboardInterrupt
        flag.is_set = True

    signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def _share(count: LabelCount, start: int, stop: int | None) -> int:
    """Tokens of rows ``[start, stop)``, as if all rows were equally long: what the bar counts up to."""
    last = count.rows if stop is None else min(stop, count.rows)
    return max(0, last - start) * count.tokens // count.rows


def _stop_after(specs: Sequence[HookSpec], n_layers: int) -> int | None:
    """How far to run: up to a block, ``n_layers + 1`` for the final norm, ``None`` for the logits."""
    if any(spec.component == "unembed" for spec in specs):
        return None
    if any(spec.component == "ln_final" for spec in specs):
        return n_layers + 1
    layers = [spec.layer for spec in specs if spec.layer is not None]
    if not layers:
        return 0
    last = max(layers)
    enters = all(spec.site == "hook_in" and spec.component == f"blocks.{last}" for spec in specs if spec.layer == last)
    return last if enters else last + 1


def _refuse_shapeless(spec: HookSpec) -> None:
    """Refuse a tensor that has no features of its own.

    Raises:
        InputError: token ids, or a tensor over pairs of positions.
    """
    if spec.kind == "int" or "key_pos" in spec.axes:
        what = "holds token ids" if spec.kind == "int" else f"is over pairs of positions [{', '.join(spec.axes)}]"
        raise InputError(
            f"{spec.name} {what}: there are no features to keep statistics of. Leave it out of the filter."
        )


def _refuse_reshaped(points: Sequence[HookPoint]) -> None:
    reshaped = [point.name for point in points if point.hook_conversion is not None]
    if reshaped:
        raise InputError(f"collect cannot tell the axes of {reshaped[0]}, which is shown in another shape.")
