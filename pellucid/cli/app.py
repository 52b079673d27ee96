"""The commands and their options. What a command does is in its own module, imported when the command is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pellucid
from pellucid.cli.mistakes import told_to_a_person
from pellucid.cli.options import (
    Debug,
    Device,
    DocumentKind,
    Dtype,
    DtypeOption,
    Force,
    Format,
    FormatOption,
    Model,
    ModelChoice,
    Packing,
    PickleOption,
    Revision,
    StoreDtype,
    Tail,
    layer_list,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
    """Read and change every activation of a Hugging Face BLOOM model.

    MODEL is a hub name (bigscience/bloom-560m), a local folder, or demo: a small trained model that comes with Pellucid.
    """


@app.command()
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
    with told_to_a_person(debug):
        from pellucid.cli.demo import show_demo

        holds = show_demo(out, seed, format, force)
    if not holds:
        raise typer.Exit(1)


@app.command()
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
    format: FormatOption = Format.auto,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every line, not one for each kind.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Hold Pellucid against Hugging Face on MODEL: same numbers, and every hook alive. Exit code 1 if not."""
    with told_to_a_person(debug):
        from pellucid.cli.check import check_model

        choice = ModelChoice(model, revision, device, dtype, allow_pickle)
        holds = check_model(choice, layer_list(layers), format, verbose, out, force)
    if not holds:
        raise typer.Exit(1)


@app.command()
def run(
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What to run; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Run the text of this file (UTF-8; one line break at its end is left out).")
    ] = None,
    hooks: Annotated[
        list[str] | None,
        typer.Option(help="What to keep: a hook name or a glob, such as 'blocks.*.attn.hook_z'. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .safetensors file for what is kept, each tensor under its hook's name.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many next tokens to show.")] = 10,
    prepend_bos: Annotated[
        bool,
        typer.Option("--prepend-bos", help="Put the beginning-of-sequence token first; BLOOM was trained without."),
    ] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Run MODEL on a text: the next token it expects, and the activations you name, in a file."""
    with told_to_a_person(debug):
        from pellucid.cli.prompt import read_prompt
        from pellucid.cli.run import RunRequest, run_text

        prompt = read_prompt(text, prompt_file)
        request = RunRequest(prompt, tuple(hooks or ()), out, force, top_k, prepend_bos)
        run_text(ModelChoice(model, revision, device, dtype, allow_pickle), request, format)


@app.command()
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
    with told_to_a_person(debug):
        from pellucid.cli.corpus import CorpusRequest
        from pellucid.cli.harvest import HarvestRequest, harvest_corpus

        text = CorpusRequest(tuple(corpus or ()), context, packing.value, separator, tail.value, document.value, field)
        request = HarvestRequest(
            text, tuple(hooks or ()), out, batch_size, batches_per_shard, store_dtype, threads, worker, ray, saelens
        )
        harvest_corpus(ModelChoice(model, revision, device, dtype, allow_pickle), request, format)
