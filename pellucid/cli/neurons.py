"""``pellucid neurons``: find the neurons of languages, silence them, and see what that does to each language.

Text is counted in one pass, whose state is kept in the folder: an interrupted run goes on there, and one with other
thresholds does not count again. What is measured is text that was not counted: files given for it, or the last rows of
each language.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from pellucid.analysis.criteria import ENTROPY, compare_criteria, effects_of_criteria
from pellucid.analysis.expert_neurons import ExpertNeurons, expertise
from pellucid.analysis.language_neurons import LanguageNeurons, lape
from pellucid.analysis.linear_units import published_places
from pellucid.analysis.neurons import (
    NEURONS,
    Neuron,
    RandomMatch,
    activity_place,
    activity_words,
    refuse_without_neurons,
)
from pellucid.analysis.perplexity import continuations
from pellucid.analysis.relevance import Against, Method, neuron_relevance
from pellucid.analysis.stopping import Look, count_until_stable
from pellucid.cli.files import COUNTING_FOLDER, language_files
from pellucid.cli.models import open_bridge
from pellucid.cli.neurons_output import Examples, Study, present, write_study
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.relevance_output import Criteria
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.corpora.sources import DocumentRule
from pellucid.demo.prompts import PROMPTS
from pellucid.demo.texts import held_out_halves, written_text
from pellucid.errors import InputError, StorageFullError, warn
from pellucid.model_bridge.corpus.collected import Collected
from pellucid.model_bridge.corpus.corpus_pass import RowPlan
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.running_stats import AveragePrecision, CountPositive, Statistic, TopK

TABLES_BYTES = 32 * 2**20
"""What tables and pictures take at most: a page holds Plotly (5 MB), and there are four."""


@dataclass(frozen=True)
class NeuronRequest:
    """What was asked for on the command line; ``None`` is what the model decides, see ``settled``."""

    text: tuple[str, ...]
    held_out: tuple[str, ...]
    out: Path | None
    document: DocumentRule = "line"
    context: int | None = None
    batch_size: int = 8
    top_rate: float | None = None
    filter_rate: float = 0.95
    activation_bar_ratio: float = 0.95
    random_sets: int = 3
    match: RandomMatch = "uniform"
    seed: int = 0
    held_out_share: float = 0.2
    measured_tokens: int | None = None
    examples: int = 5
    shown_neurons: int = 3
    experts: int = 0
    expert_documents: int = 500
    prompts: tuple[str, ...] = ()
    relevance: Method | None = None
    relevance_tokens: int = 16_384
    against: Against = "nothing"
    stop_when_stable: float | None = None


@dataclass(frozen=True)
class Texts:
    """Text to count and text to measure: two corpora, or the first and the last rows of one."""

    counted: Corpus
    measured: Corpus
    counted_rows: Mapping[str, int]
    measured_from: Mapping[str, int]
    as_documents: Corpus


@dataclass(frozen=True)
class Measured:
    """At most ``rows`` rows of each label of :class:`Texts` to measure on, as a text of
    :func:`~pellucid.analysis.perplexity.perplexity_change`.
    """

    texts: Texts
    rows: int

    def batches(self, batch_size: int) -> Iterator[CorpusBatch]:
        """Rows, ``batch_size`` at a time."""
        for label, start in self.texts.measured_from.items():
            plan = RowPlan([label], batch_size, start, start + self.rows)
            yield from plan.batches(self.texts.measured)


def find_neurons(choice: ModelChoice, request: NeuronRequest, format: Format) -> None:
    """Count, select, silence, write, print.

    Raises:
        InputError: arguments that contradict each other, no neurons.
        CorpusError: text that cannot be read.
        OtherJobError: the folder holds the counts of another model or text.
        PellucidError: the model cannot be opened.
    """
    _refuse_arguments(choice, request)
    counted_files, measured_files = (
        language_files(request.text, "--text"),
        language_files(request.held_out, "--held-out"),
    )
    if measured_files and set(measured_files) != set(counted_files):
        raise InputError(
            f"--text has the languages {', '.join(counted_files)} and --held-out {', '.join(measured_files)}: give both for "
            "each."
        )
    bridge = open_bridge(choice)
    refuse_without_neurons(bridge)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(bridge, request, len(counted_files) or len(PROMPTS))
    context = request.context or (128 if choice.is_demo else 512)
    top_rate = request.top_rate if request.top_rate is not None else (0.05 if choice.is_demo else 0.01)
    measured_tokens = request.measured_tokens
    if measured_tokens is None:
        # The embedded model's effects are tenths of a nat, random neurons' hundredths: all its text takes twice as long.
        measured_tokens = max(context, 2_048 if choice.is_demo else 65_536)
    if 0 < measured_tokens < context:
        raise InputError(f"--measured-tokens {measured_tokens} is less than one row of {context} tokens.")
    texts = open_texts(bridge, request, counted_files, measured_files, context)
    collected, looks = count(bridge, texts, request, top_rate)
    found = select(collected, activity_place(bridge), top_rate, request)
    silenced = {str(language): neurons for language, neurons in found.neurons.items() if neurons}
    if not silenced:
        raise InputError(
            f"No language has a neuron at --top-rate {top_rate:g}: {len(found.selected)} of "
            f"{found.n_layers * found.d_mlp} neurons are selected. Give a larger one; nothing is counted again."
        )
    without = [str(language) for language in found.neurons if str(language) not in silenced]
    if without:
        warn(f"No neuron belongs to {', '.join(without)} at --top-rate {top_rate:g}: nothing is silenced for it.")
    criteria = compare(bridge, texts, found, silenced, request)
    effects = measure(bridge, texts, found, silenced, criteria, request, measured_tokens)
    study = Study(
        model=choice.name,
        dtype=str(bridge.dtype).removeprefix("torch."),
        context=context,
        counted={label: collected[label].n_tokens[label] for label in texts.counted.labels},
        measured_on="--held-out" if measured_files else _measured_on(choice, request),
        seed=request.seed,
        match=request.match,
        found=found,
        change=None if effects is None else effects.sel(criterion=ENTROPY, drop=True),
        active_where=activity_words(bridge),
        looks=looks,
        criteria=criteria,
        effects=effects if criteria is not None else None,
        examples=examples_of(collected, texts.counted, found, request),
        experts=find_experts(bridge, texts, request),
        written=_written(bridge, request, silenced, choice),
        experts_shown=request.experts,
    )
    pictures = _write(study, request.out) if request.out is not None else []
    present(study, format, request.out, pictures)


def _refuse_full_disk(bridge: TransformerBridge, request: NeuronRequest, n_languages: int) -> None:
    """Refuse before counting what will not fit: counts and examples of every language, tables and pictures.

    Raises:
        StorageFullError: there is too little space, with what is needed.
    """
    assert request.out is not None
    cfg = bridge.cfg
    neurons = cfg.n_layers * (cfg.d_mlp or 4 * cfg.d_model)
    state = neurons * (8 + 24 * request.examples)  # a count; a value, a document and a position for each example
    kept = sum(file.stat().st_size for file in (request.out / COUNTING_FOLDER).rglob("*") if file.is_file())
    needed = max(0, state * (n_languages + 1) - kept) + TABLES_BYTES
    free = shutil.disk_usage(request.out).free
    if needed > free:
        raise StorageFullError(
            f"Counts, tables and pictures need about {needed:,} bytes and {request.out} has {free:,} left. Make room, give "
            "another --out, or fewer --examples; nothing was counted."
        )


def _write(study: Study, out: Path) -> list[str]:
    """Write the study; where that fails, say that the counts are kept.

    Raises:
        StorageFullError: no space is left.
        OSError: something else is in the way.
    """
    try:
        return write_study(study, out)
    except OSError as error:
        kind = StorageFullError if isinstance(error, StorageFullError) else OSError
        raise kind(
            f"{error} What was counted is kept in {out / COUNTING_FOLDER}: the same command goes on from there."
        ) from error


def _refuse_arguments(choice: ModelChoice, request: NeuronRequest) -> None:
    if not request.text and not choice.is_demo:
        raise InputError("Give text of two languages or more: --text en=english.txt --text fr=french.txt.")
    if not request.text and request.held_out:
        raise InputError("--held-out needs --text: without it the embedded model's own text is used for both.")
    if not 0 < request.held_out_share < 1:
        raise InputError(f"--held-out-share is a share between 0 and 1; found {request.held_out_share:g}.")
    for name, rate in (
        ("--top-rate", request.top_rate),
        ("--filter-rate", request.filter_rate),
        ("--activation-bar-ratio", request.activation_bar_ratio),
        ("--stop-when-stable", request.stop_when_stable),
    ):
        if rate is not None and not 0 < rate <= 1:
            raise InputError(f"{name} is a share, over 0 and up to 1; found {rate:g}.")
    if request.against != "nothing" and request.relevance is None:
        raise InputError(f"--against {request.against} would have no effect without --relevance.")


def _measured_on(choice: ModelChoice, request: NeuronRequest) -> str:
    if not request.text:
        return "held-out text of the embedded model"
    return f"the last {request.held_out_share:.0%} of each language's rows"


# -- text --------------------------------------------------------------------------------------------------------------


def open_texts(
    bridge: TransformerBridge,
    request: NeuronRequest,
    counted: Mapping[str, list[Path]],
    measured: Mapping[str, list[Path]],
    context: int,
) -> Texts:
    """Corpora to count and to measure on; read once, so that what cannot be read is known before anything runs."""
    if not counted:
        own, unseen = written_text(), held_out_halves()[1]
        corpus = Corpus.from_documents(own, bridge.tokenizer, context=context)
        other = Corpus.from_documents(unseen, bridge.tokenizer, context=context)
        documents = Corpus.from_documents(own, bridge.tokenizer, context=context, packing="documents")
    else:
        corpus = _from_files(bridge, counted, request.document, context)
        other = _from_files(bridge, measured, request.document, context) if measured else corpus
        documents = _from_files(bridge, counted, request.document, context, as_documents=True)
    rows = {label: found.rows for label, found in corpus.index().items()}
    if other is not corpus:
        other.index()
        return Texts(corpus, other, rows, dict.fromkeys(other.labels, 0), documents)
    kept = {label: math.floor(size * (1 - request.held_out_share)) for label, size in rows.items()}
    for label, size in rows.items():
        if not 0 < kept[label] < size:
            raise InputError(
                f"The text of {label!r} makes {size} rows of {context} tokens: too few to count on some and measure on "
                "others. Give more text, --held-out files, or a smaller --context."
            )
    return Texts(corpus, corpus, kept, kept, documents)


def _from_files(
    bridge: TransformerBridge,
    files: Mapping[str, list[Path]],
    document: DocumentRule,
    context: int,
    as_documents: bool = False,
) -> Corpus:
    kinds = {file.suffix.lower() for paths in files.values() for file in paths}
    arguments: dict[str, Any] = {"context": context, "packing": "documents" if as_documents else "packed"}
    paths: dict[str, Any] = dict(files)
    if kinds & {".jsonl", ".parquet"} and len(kinds) > 1:
        raise InputError(f"Files of one kind go together; found {', '.join(sorted(kinds))}.")
    if kinds == {".jsonl"}:
        return Corpus.from_json_lines(paths, bridge.tokenizer, **arguments)
    if kinds == {".parquet"}:
        return Corpus.from_parquet(paths, bridge.tokenizer, **arguments)
    return Corpus.from_text(paths, bridge.tokenizer, document=document, **arguments)


# -- computing ---------------------------------------------------------------------------------------------------------


def count(
    bridge: TransformerBridge, texts: Texts, request: NeuronRequest, top_rate: float
) -> tuple[Mapping[str, Collected], tuple[Look, ...]]:
    """By language, how often each neuron is active and where it is most, resumed where it was interrupted.

    Returns:
        the counts; with ``--stop-when-stable``, what was found after each part.
    """
    largest: dict[str, list[Statistic]] = {f"blocks.*.{NEURONS}": [TopK(request.examples)]} if request.examples else {}
    folder = None if request.out is None else request.out / COUNTING_FOLDER
    if request.stop_when_stable is not None:
        counted = count_until_stable(
            bridge,
            texts.counted,
            stable_at=request.stop_when_stable,
            seed=request.seed,
            last_rows=texts.counted_rows,
            top_rate=top_rate,
            filter_rate=request.filter_rate,
            activation_bar_ratio=request.activation_bar_ratio,
            statistics=largest,
            batch_size=request.batch_size,
            checkpoint=folder,
        )
        if not counted.stands:
            warn(
                f"The set does not stand at --stop-when-stable {request.stop_when_stable:g}: all of the text was counted."
            )
        return counted.collected, counted.looks
    statistics: dict[str, list[Statistic]] = {f"blocks.*.{activity_place(bridge)}": [CountPositive()]}
    for hook, wanted in largest.items():
        statistics.setdefault(hook, []).extend(wanted)
    found = {}
    for place, label in enumerate(texts.counted.labels):
        found[label] = bridge.collect(
            texts.counted,
            statistics,
            batch_size=request.batch_size,
            labels=label,
            stop_row=texts.counted_rows[label],
            checkpoint=None if folder is None else folder / str(place),
        )
    return found, ()


def select(collected: Mapping[str, Collected], place: str, top_rate: float, request: NeuronRequest) -> LanguageNeurons:
    """The neurons of each language, by how often they are above zero at ``place``."""
    counted = f"blocks.*.{place}"
    counts = xr.concat([each.array(counted, "count_positive") for each in collected.values()], "label")
    tokens = {label: each.n_tokens[label] for label, each in collected.items()}
    return lape(counts, tokens, top_rate, request.filter_rate, request.activation_bar_ratio)


def compare(
    bridge: TransformerBridge,
    texts: Texts,
    found: LanguageNeurons,
    silenced: Mapping[str, Sequence[Neuron]],
    request: NeuronRequest,
) -> Criteria | None:
    """The second criterion, on the first rows of the counted text; ``None`` where it was not asked for."""
    if request.relevance is None:
        return None
    rows = max(1, request.relevance_tokens // texts.counted.rules.context)
    measured = neuron_relevance(
        bridge,
        texts.counted,
        methods=[request.relevance],
        batch_size=request.batch_size,
        stop_row=min(rows, *texts.counted_rows.values()),
        checkpoint=None if request.out is None else request.out / COUNTING_FOLDER / "relevance",
    )
    table = compare_criteria(found, measured, request.relevance, request.against)
    top = measured.top(found, request.relevance, request.against)
    return Criteria(measured, table, {language: top[language] for language in silenced})


def measure(
    bridge: TransformerBridge,
    texts: Texts,
    found: LanguageNeurons,
    silenced: Mapping[str, Sequence[Neuron]],
    criteria: Criteria | None,
    request: NeuronRequest,
    measured_tokens: int,
) -> xr.Dataset | None:
    """What silencing does by each criterion, beside random sets; ``None`` if nothing is to be measured."""
    if not measured_tokens:
        return None
    rows = measured_tokens // texts.measured.rules.context
    drawn = found.random_sets(request.random_sets, request.seed, request.match) if request.random_sets else []
    controls: list[Mapping[Any, Sequence[Neuron]]] = [
        {language: control[language] for language in silenced} for control in drawn
    ]
    sets: dict[str, Mapping[Any, Sequence[Neuron]]] = {ENTROPY: silenced}
    if criteria is not None:
        sets[str(request.relevance)] = criteria.top
    return effects_of_criteria(bridge, Measured(texts, rows), sets, random_sets=controls, batch_size=request.batch_size)


def examples_of(
    collected: Mapping[str, Collected], corpus: Corpus, found: LanguageNeurons, request: NeuronRequest
) -> Examples:
    """Of each language, the neurons of least entropy, and the tokens at which they fire most in its text."""
    shown: Examples = {}
    if not request.examples:
        return shown
    rank = {neuron: place for place, neuron in enumerate(found.selected)}
    for language, neurons in found.neurons.items():
        for layer, index in sorted(neurons, key=lambda neuron: rank[neuron])[: request.shown_neurons]:
            label = str(language)
            shown[label, layer, index] = [
                (example.value, example.context.before, example.context.token, example.context.after)
                for example in collected[label].examples(corpus, f"blocks.{layer}.{NEURONS}", label, index)
            ]
    return shown


def find_experts(bridge: TransformerBridge, texts: Texts, request: NeuronRequest) -> ExpertNeurons | None:
    """Expert units by average precision, at the places that were published."""
    if not request.experts:
        return None
    places = {f"blocks.*.{place}": [AveragePrecision()] for place in published_places(bridge.adapter.family)}
    kept = bridge.collect(texts.as_documents, places, batch_size=request.batch_size, stop_row=request.expert_documents)
    return expertise(kept)


@torch.no_grad()
def _written(
    bridge: TransformerBridge,
    request: NeuronRequest,
    silenced: Mapping[str, Sequence[Neuron]],
    choice: ModelChoice,
) -> xr.DataArray | None:
    prompts = request.prompts or (tuple(PROMPTS.values()) if choice.is_demo and not request.text else ())
    if not prompts:
        return None
    return continuations(bridge, prompts, silenced, max_new_tokens=24)
