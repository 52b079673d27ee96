"""Commands that ask about a model alone, and their options: demo, check.

What each does is in a module of its own, imported when it is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.files import DEMO_FILES, refuse_folder, refuse_model, refuse_out
from pellucid.cli.mistakes import report_errors
from pellucid.cli.options import (
    Attention,
    AttentionOption,
    Debug,
    Device,
    Dtype,
    DtypeOption,
    Force,
    Format,
    FormatOption,
    Model,
    ModelChoice,
    PickleOption,
    Revision,
    number_list,
)


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
