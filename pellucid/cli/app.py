"""The commands and their options. What a command does is in its own module, imported when the command is chosen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import pellucid
from pellucid.cli import analyses
from pellucid.cli.files import (
    DEMO_FILES,
    PATCH_FILES,
    STUDY_FILES,
    kept_of_store,
    kept_of_study,
    labelled_files,
    language_files,
    refuse_activations,
    refuse_file,
    refuse_folder,
    refuse_model,
    refuse_out,
    refuse_picture,
    refuse_used_folder,
)
from pellucid.cli.mistakes import INTERRUPTED, Commands, report_errors
from pellucid.cli.options import (
    DEMO,
    Asked,
    Attention,
    AttentionOption,
    Debug,
    Device,
    DocumentKind,
    Dtype,
    DtypeOption,
    Force,
    Format,
    FormatOption,
    Match,
    MetricName,
    Model,
    ModelChoice,
    Packing,
    PickleOption,
    PrependBos,
    PromptFile,
    PromptText,
    RelevanceAgainst,
    RelevanceMethod,
    Revision,
    StoreDtype,
    Tail,
    asks_for,
    example,
    number_list,
)
from pellucid.experiments.options import PatchingChoices, SweepOptions

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: the boxes of rich break words in the middle at 80 columns
    epilog=example("pellucid demo"),
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pellucid {pellucid.__version__}")
        raise typer.Exit


@app.callback()
def _pellucid(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Read and change every activation of a Hugging Face language model.

    MODEL is a hub name (meta-llama/Llama-3.2-1B), a local folder, or demo: a small trained model that comes with Pellucid.
    """


@app.command(short_help="A tour of the embedded model, offline.", epilog=example("pellucid demo --out story"))
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A folder for demo.json, demo.safetensors (the arrays) and induction.svg.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tokens.")] = 0,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """A tour on the embedded model: what its heads do, shown by changing them. Offline, within a minute."""
    with report_errors(debug):
        if out is not None:
            refuse_folder(out, DEMO_FILES, force)
        from pellucid.cli.demo import show_demo

        holds = show_demo(out, seed, format)
    if not holds:
        raise typer.Exit(1)


@app.command(
    short_help="Same numbers as Hugging Face, each hook alive?",
    epilog=example("pellucid check bigscience/bloom-560m --layers 0,12,23 --out report.json"),
)
def check(
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers whose hooks are tried, such as 0,5,11. By default the first, a middle one, the last."
        ),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    attn_implementation: AttentionOption = Attention.eager,
    format: FormatOption = Format.auto,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every line, not one for each kind.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Hold Pellucid against Hugging Face on MODEL: same numbers, and every hook alive. Exit code 1 if not."""
    with report_errors(debug):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        chosen = number_list(layers, "--layers")
        if out is not None:
            refuse_out(out, force)
        from pellucid.cli.check import check_model

        holds = check_model(choice, chosen, format, verbose, out)
    if not holds:
        raise typer.Exit(1)


@app.command(
    short_help="Run a text; keep activations in a file.",
    epilog=example(
        "pellucid run demo 'Everyone has the right' \\",
        "  --hooks 'blocks.*.attn.hook_pattern' --out patterns.safetensors",
    ),
)
def run(
    model: Model,
    text: PromptText = None,
    prompt_file: PromptFile = None,
    hooks: Annotated[
        list[str] | None,
        typer.Option(help="What to keep: a hook name or a glob, such as 'blocks.*.attn.hook_z'. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .safetensors file for what is kept, each tensor under its hook's name.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many next tokens to show.")] = 10,
    prepend_bos: PrependBos = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    attn_implementation: AttentionOption = Attention.eager,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Run MODEL on a text: the next token it expects, and the activations you name, in a file."""
    with report_errors(debug):
        from pellucid.cli.prompt import read_prompt

        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        if out is not None:
            refuse_activations(out, hooks, force)
        prompt = read_prompt(text, prompt_file)
        from pellucid.cli.run import RunRequest, run_text

        run_text(choice, RunRequest(prompt, tuple(hooks or ()), out, top_k, prepend_bos), format)


app.command(
    short_help="What the model would say after each layer.",
    epilog=example("pellucid lens demo 'Everyone has the right to' --picture lens.html"),
)(analyses.lens)
app.command(
    short_help="Which heads look at copies, and at the token before.",
    epilog=example("pellucid heads demo --pattern induction --picture heads.html"),
)(analyses.heads)


@app.command(
    short_help="Find and silence the neurons of languages.",
    epilog=example("pellucid neurons demo --out study --prompt 'Everyone has'"),
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
        int, typer.Option(min=0, help="Measure on at most so many tokens of a language; 0 silences nothing.")
    ] = 65_536,
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


@app.command(
    short_help="Activation patching between two prompts.",
    epilog=example("pellucid patch --site z --by layer,head --picture heads.html"),
)
@asks_for(PatchingChoices, SweepOptions)
def patch(
    *,
    model: Model = DEMO,
    clean: Annotated[
        str | None, typer.Option(help="A prompt on which MODEL does what you study. For demo there is one.")
    ] = None,
    corrupted: Annotated[
        str | None, typer.Option(help="The same prompt with words exchanged for words of as many tokens.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="The token right after clean, with its leading space: ' Paris'; or id:123.")
    ] = None,
    foil: Annotated[str | None, typer.Option(help="The token right after corrupted, likewise.")] = None,
    metric: Annotated[
        MetricName, typer.Option(help="log-probability and probability are of --answer; kl-divergence needs no tokens.")
    ] = MetricName.logit_difference,
    asked: Asked,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for patch.json (everything, to load again) and patch.csv (the numbers)."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="A heat map in this .html, .png or .svg file; needs the extra 'plots'.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the strongest cells to list.")] = 10,
    plan: Annotated[bool, typer.Option("--plan", help="Say how much work it is, and stop.")] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    attn_implementation: AttentionOption = Attention.eager,
    allow_pickle: PickleOption = False,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Patch one run's activations into another, place by place: where does MODEL keep what makes the difference?"""
    with report_errors(debug):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        if out is not None:
            refuse_folder(out, PATCH_FILES, force)
        if picture is not None:
            refuse_picture(picture, force)
        from pellucid.cli.patch import PatchRequest, patch_model

        request = PatchRequest(
            clean=clean,
            corrupted=corrupted,
            answer=answer,
            foil=foil,
            metric=metric,
            choices=asked.make(PatchingChoices),
            options=asked.make(SweepOptions),
            out=out,
            picture=picture,
            force=force,
            top_k=top_k,
            plan=plan,
        )
        whole = patch_model(choice, request, format)
    if not whole:
        raise typer.Exit(INTERRUPTED)


app.command(
    short_help="Which parts of the model wrote a logit?",
    epilog=example("pellucid attribute --by head --picture heads.html"),
)(analyses.attribute)


app.command(
    short_help="Which edges between parts carry a behaviour?",
    epilog=example("pellucid circuit demo --method eap-ig --edges 30 --curve"),
)(analyses.circuit)


app.command(
    short_help="Steer what a model writes by a direction.",
    epilog=example(
        "pellucid steer demo 'Everyone has the right to' \\",
        "  --positive 'Toute personne a droit' --negative 'Everyone has the right'",
    ),
)(analyses.steer)


@app.command(
    short_help="Store the activations of a corpus.",
    epilog=example(
        "pellucid harvest demo --corpus en=english.txt \\",
        "  --hooks 'blocks.2.hook_resid_post' --out store",
    ),
)
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
