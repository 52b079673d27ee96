"""Commands that read a model: ``pellucid lens`` and ``pellucid heads``, their options. Each is done in a module of its
own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.files import refuse_model, refuse_out, refuse_picture
from pellucid.cli.mistakes import told_to_a_person
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


class Shown(str, Enum):
    """What the colour of a lens' picture is."""

    top_probability = "top-probability"
    kl = "kl"
    entropy = "entropy"
    probability = "probability"
    logit = "logit"
    rank = "rank"


Text = Annotated[str | None, typer.Argument(metavar="TEXT", help="What to run; - reads it from standard input.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="Run the text of this file (UTF-8; one line break at its end is left out).")
]
PrependBos = Annotated[
    bool | None,
    typer.Option(help="With the beginning-of-sequence token first or without; by default as the tokenizer does."),
]
Out = Annotated[Path | None, typer.Option(help="Write everything to this file, as JSON, to be loaded again.")]
PictureFile = Annotated[Path | None, typer.Option(help="A picture in this .html, .png or .svg file; extra 'plots'.")]


def lens(
    model: Model,
    text: Text = None,
    prompt_file: PromptFile = None,
    lens: Annotated[
        str,
        typer.Option(
            help="logit; or a file of a lens that was fitted on MODEL (.safetensors, a published .pt). demo also comes with "
            "tuned and jacobian."
        ),
    ] = "logit",
    token: Annotated[
        list[str] | None,
        typer.Option(
            help="Follow this token through the layers: ' Paris' with its leading space, or id:123. Repeatable."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to read, such as 0,5,12: k enters block k, the last leaves the last block."),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Positions to read, such as 0,-1; by default all. The table shows the last of them."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the most probable tokens to keep.")] = 5,
    show: Annotated[
        Shown, typer.Option(help="The colour of the picture; probability, logit and rank are of the first --token.")
    ] = Shown.top_probability,
    prepend_bos: PrependBos = None,
    out: Out = None,
    picture: PictureFile = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    attn_implementation: AttentionOption = Attention.eager,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """What MODEL would say after each layer of a text: the most probable token, how sure, how far from the end."""
    with told_to_a_person(debug):
        from pellucid.cli.prompt import read_prompt

        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        _refuse_files(out, picture, force)
        chosen = number_list(layers, "--layers"), number_list(positions, "--positions")
        prompt = read_prompt(text, prompt_file)
        from pellucid.cli.lens import LensRequest, read_text

        request = LensRequest(
            prompt,
            lens,
            tuple(token or ()),
            *chosen,
            top_k,
            show.value.replace("-", "_"),
            prepend_bos,
            out,
            picture,
            force,
        )
        read_text(choice, request, format)


def heads(
    model: Model,
    text: Text = None,
    prompt_file: PromptFile = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="previous_token, duplicate_token or induction; repeatable. By default all three."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Without TEXT: random tokens that are said several times.")] = 25,
    repeats: Annotated[int, typer.Option(min=2, help="How often.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="How many such prompts.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tokens.")] = 0,
    top_k: Annotated[int, typer.Option(min=1, help="How many heads of each pattern to list.")] = 5,
    prepend_bos: PrependBos = None,
    out: Out = None,
    picture: PictureFile = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    attn_implementation: AttentionOption = Attention.eager,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Which heads of MODEL look at the token before, at copies, or at what followed them (induction)."""
    with told_to_a_person(debug):
        from pellucid.cli.prompt import read_prompt

        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        _refuse_files(out, picture, force)
        prompt = None if text is None and prompt_file is None else read_prompt(text, prompt_file)
        from pellucid.cli.heads import HeadsRequest, score_heads

        request = HeadsRequest(
            prompt, tuple(pattern or ()), length, repeats, prompts, seed, top_k, prepend_bos, out, picture, force
        )
        score_heads(choice, request, format)


def _refuse_files(out: Path | None, picture: Path | None, force: bool) -> None:
    if out is not None:
        refuse_out(out, force)
    if picture is not None:
        refuse_picture(picture, force)
