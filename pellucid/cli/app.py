"""The list of commands. Their options are in ``*_commands.py`` beside this file; what each does is in a module of its own,
imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import pellucid
from pellucid.cli import behaviour_commands, corpus_commands, model_commands, prompt_commands
from pellucid.cli.mistakes import Commands
from pellucid.cli.options import example

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


COMMANDS: tuple[tuple[Callable[..., None], str, tuple[str, ...]], ...] = (
    (model_commands.demo, "A tour of the embedded model, offline.", ("pellucid demo --out story",)),
    (
        model_commands.check,
        "Same numbers as Hugging Face, each hook alive?",
        ("pellucid check bigscience/bloom-560m --layers 0,12,23 --out report.json",),
    ),
    (
        prompt_commands.run,
        "Run a text; keep activations in a file.",
        (
            "pellucid run demo 'Everyone has the right' \\",
            "  --hooks 'blocks.*.attn.hook_pattern' --out patterns.safetensors",
        ),
    ),
    (
        prompt_commands.lens,
        "What the model would say after each layer.",
        ("pellucid lens demo 'Everyone has the right to' --picture lens.html",),
    ),
    (
        prompt_commands.heads,
        "Which heads look at copies, and at the token before.",
        ("pellucid heads demo --pattern induction --picture heads.html",),
    ),
    (
        corpus_commands.neurons,
        "Find and silence the neurons of languages.",
        ("pellucid neurons demo --out study --prompt 'Everyone has'",),
    ),
    (
        behaviour_commands.patch,
        "Activation patching between two prompts.",
        ("pellucid patch --site z --by layer,head --picture heads.html",),
    ),
    (
        behaviour_commands.attribute,
        "Which parts of the model wrote a logit?",
        ("pellucid attribute --by head --picture heads.html",),
    ),
    (
        behaviour_commands.circuit,
        "Which edges between parts carry a behaviour?",
        ("pellucid circuit demo --method eap-ig --edges 30 --curve",),
    ),
    (
        prompt_commands.steer,
        "Steer what a model writes by a direction.",
        (
            "pellucid steer demo 'Everyone has the right to' \\",
            "  --positive 'Toute personne a droit' --negative 'Everyone has the right'",
        ),
    ),
    (
        corpus_commands.harvest,
        "Store the activations of a corpus.",
        (
            "pellucid harvest demo --corpus en=english.txt \\",
            "  --hooks 'blocks.2.hook_resid_post' --out store",
        ),
    ),
)
"""Each command, its line in the list, and the lines of its example."""

for command, line, example_lines in COMMANDS:
    app.command(short_help=line, epilog=example(*example_lines))(command)
