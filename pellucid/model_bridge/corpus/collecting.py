"""Collecting statistics of activations over a corpus: a reader of the one pass, at several places, keeping nothing.

A tap on each hook point shows what passes to the statistics of the label being run. The forward ends after the last layer
that has a tap, and the unembedding is left out unless it has one. With a checkpoint folder the pass can be interrupted
anywhere: the state is written between batches, and the same call goes on from there with equal bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from pellucid.arguments import check_number
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.collected import Collected, Hook, describe_request
from pellucid.model_bridge.corpus.corpus_pass import (
    PaddingSide,
    PassBatch,
    RowPlan,
    StateFolder,
    corpus_pass,
    stop_after,
)
from pellucid.model_bridge.corpus.job_identity import job_identity
from pellucid.model_bridge.hooked_model import HookedModel
from pellucid.model_bridge.running import RunnableModel
from pellucid.model_bridge.weights_hash import weights_hash
from pellucid.names import HookSpec, NamesFilter
from pellucid.progress import progress_bar
from pellucid.running_stats import Statistic

Requests: TypeAlias = Mapping[Any, Sequence[Statistic]] | Sequence[tuple[NamesFilter, Sequence[Statistic]]]
"""``{name, glob or predicate: [statistics]}``, or pairs, where a filter may also be a list."""


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
        padding_side: PaddingSide = "right",
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
        hooks = requested_hooks(self, statistics)
        plan = RowPlan(corpus.chosen(labels), batch_size, start_row, stop_row, padding_side)
        batches = plan.batches(corpus)  # refuses what it cannot do before anything is read
        counts = corpus.index(plan.labels, progress)
        state, saved = Collected.empty(hooks, plan.labels), None
        if checkpoint is not None:
            job = {
                "statistics": describe_request(hooks),
                "corpus": corpus.content_hash,
                **plan.settings(),
                **job_identity(self),
            }
            saved = StateFolder(self, Path(checkpoint), job, every, state)
            state = saved.state
            batches = plan.batches(corpus, state.n_rows)
        taps = {hook.spec.name: partial(_update, state, hook.spec.name) for hook in hooks}
        _refuse_reshaped(self, taps)
        stop = stop_after([hook.spec for hook in hooks], self.cfg.n_layers)
        with (
            progress_bar(total=plan.n_tokens(counts), desc="collecting", unit=" tokens", show=progress) as bar,
            nullcontext() if saved is None else saved.interrupt_put_off(),
        ):
            bar.update(sum(state.n_tokens.values()))
            for batch in corpus_pass(self, batches, taps, stop=stop, bar=bar, saved=saved):
                batch.run()
                state.saw(batch.rows.label, len(batch.rows.tokens), batch.n_tokens)
            if saved is not None:
                saved.write()
        return state


def _update(state: Collected, hook: str, values: Tensor, batch: PassBatch[CorpusBatch]) -> None:
    for statistic in state.of(hook, batch.rows.label):
        statistic.update(values, batch.mask, batch.places)


def requested_hooks(model: HookedModel, requests: Requests) -> list[Hook]:
    """Points with their statistics, in firing order.

    Raises:
        HookNameError: a name that matches nothing.
        InputError: nothing asked for, a point without features, a statistic asked for twice.
    """
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
        for spec, _ in model._tree.index.select(names_filter, model.cfg.flags, argument="a hook's name"):
            _refuse_shapeless(spec)
            found.setdefault(spec.name, []).extend(wanted)
    for name, wanted in found.items():
        names = [each.name for each in wanted]
        twice = next((each for each in names if names.count(each) > 1), None)
        if twice is not None:
            raise InputError(f"The statistic {twice} is asked for twice at {name}.")
    return [Hook(model._tree.index[name], tuple(found[name])) for name in model._tree.index if name in found]


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


def _refuse_reshaped(model: HookedModel, names: Iterable[str]) -> None:
    reshaped = [name for name in names if model._tree.point(name).hook_conversion is not None]
    if reshaped:
        raise InputError(f"collect cannot tell the axes of {reshaped[0]}, which is shown in another shape.")
