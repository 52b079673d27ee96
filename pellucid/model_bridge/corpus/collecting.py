"""Collecting statistics over a corpus: a reader of the one pass, at several places, keeping nothing.

A tap on each hook point shows what passes to the statistics of the label being run. The forward ends after the last layer
that has a tap, and the unembedding is left out unless it has one. With a checkpoint folder the pass can be interrupted
anywhere: the state is written between batches, and the same call goes on from there with equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import Tensor

from pellucid.arguments import check_kind, check_number, check_path
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.collected import Collected, Hook, describe_request
from pellucid.model_bridge.corpus.corpus_pass import (
    COLLECTION,
    PaddingSide,
    PassBatch,
    RowPlan,
    StateFolder,
    Tap,
    corpus_pass,
    stop_after,
)
from pellucid.model_bridge.corpus.job_identity import job_identity
from pellucid.model_bridge.hooking.hooks import refuse_reshaped
from pellucid.model_bridge.running.runner import RunnableModel
from pellucid.model_bridge.running.tokens import ids_as_given
from pellucid.names import HookSpec, NamesFilter
from pellucid.progress import progress_bar
from pellucid.running_stats import Statistic

Requests: TypeAlias = Mapping[Any, Sequence[Statistic]] | Sequence[tuple[NamesFilter, Sequence[Statistic]]]
"""``{name, glob or predicate: [statistics]}``, or pairs, where a filter may also be a list."""


def collect(
    bridge: RunnableModel,
    corpus: Corpus,
    statistics: Requests,
    *,
    batch_size: int,
    labels: str | Sequence[str] | None,
    start_row: int,
    stop_row: int | None,
    padding_side: PaddingSide,
    progress: bool | None,
    checkpoint: str | Path | None,
    every: float,
) -> Collected:
    """See :meth:`pellucid.TransformerBridge.collect`."""
    check_number("every", every, at_least=0)
    check_kind("corpus", corpus, Corpus, "a Corpus")
    hooks = requested_hooks(bridge, statistics)
    plan = RowPlan(corpus.chosen(labels), batch_size, start_row, stop_row, padding_side)
    refuse_reshaped((bridge.runner.tree.point(hook.spec.name) for hook in hooks), "collect")

    def taps(state: Collected) -> dict[str, Tap]:
        return {hook.spec.name: partial(_update, state, hook.spec.name) for hook in hooks}

    return collected_by(
        bridge,
        corpus,
        hooks,
        plan,
        lambda state, batch: batch.run(),
        taps=taps,
        stop=stop_after([hook.spec for hook in hooks], bridge.runner.cfg.n_layers),
        title="collecting",
        progress=progress,
        checkpoint=checkpoint,
        every=every,
    )


def collected_by(
    bridge: RunnableModel,
    corpus: Corpus,
    hooks: Sequence[Hook],
    plan: RowPlan,
    read: Callable[[Collected, PassBatch[CorpusBatch]], Any],
    *,
    taps: Callable[[Collected], Mapping[str, Tap]] | None = None,
    stop: int | None = None,
    job: Mapping[str, Any] | None = None,
    title: str,
    progress: bool | None,
    checkpoint: str | Path | None,
    every: float,
) -> Collected:
    """One pass whose reader fills statistics; interruptible, and resumed where it was interrupted.

    Args:
        bridge: the model.
        corpus: the text.
        hooks: the points and their statistics.
        plan: which rows.
        read: called with each batch, which it runs as it likes, and the statistics so far, which it updates.
        taps: what is shown activations while a batch is run.
        stop: how far a run goes, see :func:`stop_after`.
        job: what else its numbers depend on (JSON), beside the model, the text, the plan and the statistics.
        title: of the bar.
        progress: show a bar; ``None`` shows it on a terminal only.
        checkpoint: a folder for the state; ``None`` keeps none.
        every: seconds between states.

    Raises:
        InputError: rows that there are not; a damaged state.
        OtherJobError: the folder holds another job's state.
    """
    folder = None if checkpoint is None else check_path("checkpoint", checkpoint)
    batches = plan.batches(corpus)  # refuses what it cannot do before anything is read
    counts = corpus.index(plan.labels, progress)
    if 0 < plan.start_row != plan.stop_row and all(count.rows <= plan.start_row for count in counts.values()):
        raise InputError(
            f"start_row={plan.start_row} is beyond the last row of {', '.join(plan.labels)}: nothing would be run."
        )
    state, saved = Collected.empty(hooks, plan.labels), None
    if folder is not None:
        about = {
            "statistics": describe_request(hooks),
            "corpus": corpus.content_hash,
            **plan.settings(),
            **(job or {}),
            **job_identity(bridge),
        }
        saved = StateFolder(bridge, folder, about, every, state, COLLECTION)
        state = saved.state
        batches = plan.batches(corpus, state.n_rows)
    shown = None if taps is None else taps(state)
    with (
        progress_bar(total=plan.n_tokens(counts), desc=title, unit=" tokens", show=progress) as bar,
        nullcontext() if saved is None else saved.interrupt_put_off(),
        ids_as_given(),
    ):
        bar.update(sum(state.n_tokens.values()))
        for batch in corpus_pass(bridge, batches, shown, stop=stop, bar=bar, saved=saved):
            read(state, batch)
            state.saw(batch.rows.label, len(batch.rows.tokens), batch.n_tokens)
        if saved is not None:
            saved.write()
    return state


def _update(state: Collected, hook: str, values: Tensor, batch: PassBatch[CorpusBatch]) -> None:
    for statistic in state.of(hook, batch.rows.label):
        statistic.update(values, batch.mask, batch.places)


def requested_hooks(model: RunnableModel, requests: Requests) -> list[Hook]:
    """Points with their statistics, in firing order.

    Raises:
        HookNameError: a name that matches nothing.
        InputError: nothing asked for, a point without features, a statistic asked for twice.
    """
    tree, given_by_caller = model.runner.tree, cast(Any, requests)
    if not isinstance(requests, Mapping | Sequence) or isinstance(given_by_caller, str) or not requests:
        raise InputError(f"statistics maps hook names to lists of statistics; found {requests!r}.")
    pairs = list(requests.items()) if isinstance(requests, Mapping) else list(requests)
    found: dict[str, list[Statistic]] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"statistics is a list of pairs (hook, statistics); found {pair!r} in it.")
        names_filter, given = pair
        wanted = [given] if isinstance(given, Statistic) else list(given) if isinstance(given, Iterable) else []
        if not wanted or not all(isinstance(each, Statistic) for each in wanted):
            raise InputError(
                f"Each hook has a list of statistics, such as [CountPositive()]; found {given!r} for {names_filter!r}."
            )
        for spec, _ in tree.index.select(names_filter, tree.cfg.flags, argument="a hook's name"):
            _refuse_shapeless(spec)
            found.setdefault(spec.name, []).extend(wanted)
    for name, wanted in found.items():
        names = [each.name for each in wanted]
        twice = next((each for each in names if names.count(each) > 1), None)
        if twice is not None:
            raise InputError(f"The statistic {twice} is asked for twice at {name}.")
    return [Hook(tree.index[name], tuple(found[name])) for name in tree.index if name in found]


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
