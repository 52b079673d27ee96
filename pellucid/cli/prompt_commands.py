"""Commands that ask what a model does with a prompt, and their options: run, lens, heads, steer.

What each does is in a module of its own, imported when it is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.files import refuse_activations, refuse_direction, refuse_model, refuse_out, refuse_picture
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
    PrependBos,
    PromptFile,
    PromptText,
    Revision,
    Shown,
    SteeringMethod,
    decimals,
    number_list,
    number_or_word,
)
from pellucid.errors import InputError

Out = Annotated[Path | None, typer.Option(help="Write everything to this file, as JSON, to be loaded again.")]
PictureFile = Annotated[Path | None, typer.Option(help="A picture in this .html, .png or .svg file; extra 'plots'.")]


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


def lens(
    model: Model,
    text: PromptText = None,
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
    with report_errors(debug):
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
    text: PromptText = None,
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
    with report_errors(debug):
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


def steer(
    model: Model,
    text: PromptText = None,
    prompt_file: PromptFile = None,
    positive: Annotated[
        list[str] | None,
        typer.Option(help="A text that the direction points to. May be repeated. For demo there are some."),
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(help="A text that it points away from. May be repeated.")
    ] = None,
    positive_file: Annotated[
        list[Path] | None, typer.Option(help="A file of such texts, one a line (UTF-8). May be repeated.")
    ] = None,
    negative_file: Annotated[
        list[Path] | None, typer.Option(help="A file of texts that it points away from, likewise.")
    ] = None,
    direction: Annotated[
        Path | None, typer.Option(help="A direction that was saved (--out), in the place of texts.")
    ] = None,
    method: Annotated[
        SteeringMethod,
        typer.Option(
            help="means: the difference of the means; pairs, principal: as many texts of both kinds, in pairs: their mean "
            "difference, their first principal component."
        ),
    ] = SteeringMethod.means,
    site: Annotated[str | None, typer.Option(help="The activation: resid_post (the default), z, mlp_post, ...")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to steer at, such as 8,9,10. By default the middle one, or the direction's."),
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(help="Of each text: last (the default), mean (demo's), or one: from 0, negative from the end."),
    ] = None,
    strength: Annotated[str, typer.Option(help="Times the direction: one, or several, such as 1,2,4.")] = "1",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Where it is added: last, prompt, generated, or numbers such as 0,-1. By default everywhere."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write at most.")] = 20,
    top_k: Annotated[int, typer.Option(min=1, help="How many next tokens to show.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a forward.")] = 8,
    prepend_bos: PrependBos = None,
    out: Annotated[Path | None, typer.Option(help="Save the direction in this .safetensors file.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Next-token probabilities by strength, in this .html, .png or .svg file; needs the extra 'plots'."
        ),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    allow_pickle: PickleOption = False,
    attn_implementation: AttentionOption = Attention.eager,
    format: FormatOption = Format.auto,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a direction out of two kinds of texts, add it while MODEL writes, and show that beside what it writes anyway."""
    with report_errors(debug):
        from pellucid.cli.prompt import read_lines, read_prompt

        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        where = number_or_word(position, "--position", ("last", "mean"))
        if isinstance(where, list) and len(where) > 1:
            raise InputError(f"--position is one position of each text; found {position!r}.")
        if out is not None:
            refuse_direction(out, force)
        if picture is not None:
            refuse_picture(picture, force)
        texts = {
            "--positive": [*(positive or ()), *read_lines(positive_file or (), "--positive-file")],
            "--negative": [*(negative or ()), *read_lines(negative_file or (), "--negative-file")],
        }
        strengths, chosen = decimals(strength, "--strength"), number_list(layers, "--layers")
        steered = number_or_word(positions, "--positions", ("last", "prompt", "generated"))
        prompt = read_prompt(text, prompt_file)
        from pellucid.cli.steer import SteerRequest, steer_model

        request = SteerRequest(
            prompt=prompt,
            positive=texts["--positive"],
            negative=texts["--negative"],
            direction=direction,
            method=method,
            site=site,
            layers=chosen,
            position=where[0] if isinstance(where, list) else where,
            strengths=strengths,
            positions=steered,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            out=out,
            picture=picture,
            force=force,
        )
        steer_model(choice, request, format)
