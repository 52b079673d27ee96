"""Commands that ask one prompt what the model does with it. What a command does is imported when it is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.files import ATTRIBUTE_FILES, refuse_folder, refuse_model, refuse_picture
from pellucid.cli.mistakes import told_to_a_person
from pellucid.cli.options import (
    DEMO,
    Attention,
    AttentionOption,
    Debug,
    Device,
    Dtype,
    DtypeOption,
    Force,
    Format,
    FormatOption,
    LogitPositions,
    Model,
    ModelChoice,
    Part,
    PickleOption,
    Revision,
)


def attribute(
    model: Model = DEMO,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What to run; - reads it from standard input. demo has one.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="The token whose logit it is, with its leading space: ' Paris'; or id:123. By default the likeliest."
        ),
    ] = None,
    foil: Annotated[
        str | None, typer.Option(help="Attribute the answer's logit less this token's, likewise; by default the logit.")
    ] = None,
    by: Annotated[Part, typer.Option(help="source: heads and the positions that they read from.")] = Part.component,
    positions: Annotated[
        LogitPositions, typer.Option(help="The logit after the last token, or after each.")
    ] = LogitPositions.last,
    top_k: Annotated[int, typer.Option(min=1, help="How many parts to list, the largest first.")] = 12,
    check: Annotated[
        int, typer.Option(min=0, help="Measure so many of them, by taking them away from what the final norm reads.")
    ] = 3,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(help="With the beginning-of-sequence token first or without; by default as the tokenizer does."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for attribution.json (everything, to load again) and attribution.csv (the numbers)."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Bars or a heat map in this .html, .png or .svg file; needs the extra 'plots'.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    attn_implementation: AttentionOption = Attention.eager,
    allow_pickle: PickleOption = False,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Direct logit attribution: what each part of MODEL adds to the logit of the next token, and a measurement of it."""
    with told_to_a_person(debug):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        if out is not None:
            refuse_folder(out, ATTRIBUTE_FILES, force)
        if picture is not None:
            refuse_picture(picture, force)
        from pellucid.cli.attribute import AttributeRequest, attribute_logit

        request = AttributeRequest(
            text, answer, foil, by.value, positions.value, top_k, check, prepend_bos, out, picture, force
        )
        attribute_logit(choice, request, format)
