"""Commands that read a corpus, and their options: neurons, harvest.

What each does is in a module of its own, imported when it is chosen.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.files import (
    STUDY_FILES,
    kept_of_store,
    kept_of_study,
    labelled_files,
    language_files,
    refuse_file,
    refuse_folder,
    refuse_model,
    refuse_used_folder,
)
from pellucid.cli.mistakes import report_errors
from pellucid.cli.options import (
    Debug,
    Device,
    DocumentKind,
    Dtype,
    DtypeOption,
    Force,
    Format,
    FormatOption,
    Match,
    Model,
    ModelChoice,
    Packing,
    PickleOption,
    RelevanceAgainst,
    RelevanceMethod,
    Revision,
    StoreDtype,
    Tail,
)


def neurons(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="LANGUAGE=FILE: text to find neurons on; for each language, several times for several files. .jsonl "
            "(field text) and .parquet (column text) too. The embedded model comes with text of its own."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="LANGUAGE=FILE: other text, to measure on. By default the last rows of --text."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for tables, counts and pictures; an interrupted run goes on there.")
    ] = None,
    top_rate: Annotated[
        float | None, typer.Option(help="Share of all neurons to select. By default .01, as published (demo: .05).")
    ] = None,
    filter_rate: Annotated[
        float, typer.Option(help="Quantile of all activation probabilities that a neuron exceeds in some language.")
    ] = 0.95,
    activation_bar_ratio: Annotated[
        float, typer.Option(help="Quantile above which a selected neuron belongs to a language.")
    ] = 0.95,
    random_sets: Annotated[int, typer.Option(min=0, help="Random sets of the same sizes to silence beside.")] = 3,
    match: Annotated[
        Match, typer.Option(help="Draw random sets among all neurons, or within layers as many as the language has.")
    ] = Match.uniform,
    seed: Annotated[int, typer.Option(min=0, help="Of the random sets.")] = 0,
    document: Annotated[DocumentKind, typer.Option(help="What a document of a text file is.")] = DocumentKind.line,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row; text is packed. By default 512 (demo: 128).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 8,
    held_out_share: Annotated[
        float, typer.Option(help="Share of the rows kept for measuring, without --held-out.")
    ] = 0.2,
    measured_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Measure on at most so many tokens of a language; 0 silences nothing. By default 65,536 (demo: 2,048).",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Top examples of a neuron to keep, with their text.")] = 5,
    shown_neurons: Annotated[int, typer.Option(min=0, help="Neurons of each language to show examples of.")] = 3,
    experts: Annotated[
        int, typer.Option(min=0, help="Also find so many expert units, best and worst, by average precision.")
    ] = 0,
    expert_documents: Annotated[int, typer.Option(min=1, help="Documents of a language for --experts.")] = 500,
    relevance: Annotated[
        RelevanceMethod | None,
        typer.Option(help="Also rank neurons by what the loss on a language's text depends on, and compare both."),
    ] = None,
    relevance_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many tokens of each language for --relevance.")
    ] = 16_384,
    against: Annotated[
        RelevanceAgainst, typer.Option(help="For --relevance: rank by a language's, or less the mean of the others'.")
    ] = RelevanceAgainst.nothing,
    stop_when_stable: Annotated[
        float | None,
        typer.Option(help="Count until the chosen set agrees so well (Jaccard, to 1) within its intervals and before."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Show how the model goes on with this, as it is and silenced. Repeatable.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Find the neurons of languages in MODEL (LAPE), silence them, and measure what that does to each language."""
    with report_errors(debug, partial(kept_of_study, out)):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle)
        refuse_model(choice)
        language_files(text or (), "--text")
        language_files(held_out or (), "--held-out")
        if out is not None:
            refuse_folder(out, STUDY_FILES, force)
        from pellucid.cli.neurons import NeuronRequest, find_neurons

        request = NeuronRequest(
            text=tuple(text or ()),
            held_out=tuple(held_out or ()),
            out=out,
            document=document.value,
            context=context,
            batch_size=batch_size,
            top_rate=top_rate,
            filter_rate=filter_rate,
            activation_bar_ratio=activation_bar_ratio,
            random_sets=random_sets,
            match="layer" if match is Match.layer else "uniform",
            seed=seed,
            held_out_share=held_out_share,
            measured_tokens=measured_tokens,
            examples=examples,
            shown_neurons=shown_neurons,
            experts=experts,
            expert_documents=expert_documents,
            prompts=tuple(prompt or ()),
            relevance=None if relevance is None else ("relp" if relevance is RelevanceMethod.relp else "gradient"),
            relevance_tokens=relevance_tokens,
            against="others" if against is RelevanceAgainst.others else "nothing",
            stop_when_stable=stop_when_stable,
        )
        find_neurons(choice, request, format)


def harvest(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder; one where the same job was begun is gone on with.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=FILE",
            help="What to run: a .txt, .jsonl or .parquet file and its label, such as en=english.txt. May be repeated.",
        ),
    ] = None,
    hooks: Annotated[
        list[str] | None,
        typer.Option(help="What to store: a hook name or a glob, such as 'blocks.*.hook_resid_post'. May be repeated."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    packing: Annotated[
        Packing, typer.Option(help="packed: documents one after another, cut; documents: one a sequence, padded.")
    ] = Packing.packed,
    separator: Annotated[
        str | None, typer.Option(help="After each document: eos, none or a token id. By default eos in packed text.")
    ] = None,
    tail: Annotated[Tail, typer.Option(help="Tokens that fill no packed sequence.")] = Tail.drop,
    document: Annotated[DocumentKind, typer.Option(help="What a document of a text file is.")] = DocumentKind.line,
    field: Annotated[str, typer.Option(help="Of JSON lines, or the column of Parquet, that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward; part of the job.")] = 8,
    batches_per_shard: Annotated[
        int | None, typer.Option(min=1, help="By default as many as make files of about 64 MiB.")
    ] = None,
    store_dtype: StoreDtype = Dtype.auto,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Of the CPU, for each worker; part of the job: another number rounds differently."),
    ] = 1,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX/COUNT", help="Which share, from 0. By default what torchrun or a SLURM array says."
        ),
    ] = None,
    ray: Annotated[
        int | None, typer.Option(min=1, help="Hand out shards on Ray, so many at a time (extra distributed).")
    ] = None,
    saelens: Annotated[
        Path | None, typer.Option(help="When finished, export to this folder for SAELens (extra datasets).")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    format: FormatOption = Format.auto,
    debug: Debug = False,
) -> None:
    """Store the activations of a corpus in a folder. Given again, it goes on where it was interrupted."""
    with report_errors(debug, partial(kept_of_store, out)):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle)
        refuse_model(choice)
        labelled_files(corpus or ())
        refuse_file(out)
        if saelens is not None:
            refuse_used_folder(saelens)
        from pellucid.cli.corpus import CorpusRequest
        from pellucid.cli.harvest import HarvestRequest, harvest_corpus

        text = CorpusRequest(tuple(corpus or ()), context, packing.value, separator, tail.value, document.value, field)
        request = HarvestRequest(
            text, tuple(hooks or ()), out, batch_size, batches_per_shard, store_dtype, threads, worker, ray, saelens
        )
        harvest_corpus(choice, request, format)
