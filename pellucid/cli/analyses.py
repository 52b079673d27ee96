"""The commands that ask what a model does with a prompt, and their options: lens, heads, attribute, steer.

What each does is in a module of its own, imported when it is chosen.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pellucid.circuits.options import CurveChoices, EdgeChoices
from pellucid.cli.files import (
    ATTRIBUTE_FILES,
    ATTRIBUTION_PATCHING_FILES,
    CIRCUIT_FILES,
    kept_of_nothing,
    kept_of_pairs,
    refuse_direction,
    refuse_folder,
    refuse_model,
    refuse_out,
    refuse_picture,
)
from pellucid.cli.mistakes import report_errors
from pellucid.cli.options import (
    DEMO,
    Asked,
    Attention,
    AttentionOption,
    AttributionMethod,
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
    PrependBos,
    PromptFile,
    PromptText,
    Revision,
    Shown,
    SteeringMethod,
    asks_for,
    decimals,
    number_list,
    number_or_word,
)
from pellucid.errors import InputError

Out = Annotated[Path | None, typer.Option(help="Write everything to this file, as JSON, to be loaded again.")]
PictureFile = Annotated[Path | None, typer.Option(help="A picture in this .html, .png or .svg file; extra 'plots'.")]


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
    method: Annotated[
        AttributionMethod,
        typer.Option(
            help="direct: what each part adds to the logit. Others estimate what patching each place would do: atp, atp*, "
            "relp and ig (integrated gradients), from --clean, --corrupted, or --pairs."
        ),
    ] = AttributionMethod.direct,
    by: Annotated[
        Part | None, typer.Option(help="With direct. source: heads and the positions that they read from.")
    ] = None,
    positions: Annotated[
        LogitPositions | None, typer.Option(help="With direct: the logit after the last token, or after each.")
    ] = None,
    clean: Annotated[
        str | None, typer.Option(help="Not with direct: a prompt on which MODEL does what you study. demo has one.")
    ] = None,
    corrupted: Annotated[
        str | None, typer.Option(help="The same prompt with words exchanged for words of as many tokens.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="In their place a CSV file with columns clean, corrupted, answer, foil.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Not with direct: resid_pre, attn_out, mlp_out, z (the default), mlp_post, ...")
    ] = None,
    axes: Annotated[
        str | None, typer.Option(help="Axes of the result, such as layer,pos. By default layer and head, or position.")
    ] = None,
    n_points: Annotated[int | None, typer.Option(min=1, help="Of ig, by default 20.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many parts to list, the largest first.")] = 12,
    check: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Measure so many of them: with direct by taking them away from what the final norm reads (3), else by "
            "patching, and as many others at random (20).",
        ),
    ] = None,
    prepend_bos: PrependBos = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for attribution.json (everything, to load again) and attribution.csv (the numbers); not with "
            "direct, an interrupted run goes on there."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Bars or a heat map in this .html, .png or .svg file; needs the extra 'plots'.")
    ] = None,
    agreement: Annotated[
        Path | None, typer.Option(help="Not with direct: estimates against patching, in such a file.")
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
    """What each part of MODEL adds to a logit, or does to it as far as gradients tell (--method), and a measurement."""
    is_direct = method is AttributionMethod.direct
    with report_errors(debug, kept_of_nothing if is_direct else partial(kept_of_pairs, out)):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        of_patching = {
            "--clean": clean,
            "--corrupted": corrupted,
            "--pairs": pairs,
            "--site": site,
            "--axes": axes,
            "--n-points": n_points,
            "--agreement": agreement,
        }
        for option, given in (
            of_patching if is_direct else {"TEXT": text, "--by": by, "--positions": positions}
        ).items():
            if given is not None:
                raise InputError(f"{option} has no meaning with --method {method.value}: leave it out.")
        if n_points is not None and method is not AttributionMethod.ig:
            raise InputError(f"--n-points has no meaning with --method {method.value}: leave it out.")
        if out is not None:
            refuse_folder(out, ATTRIBUTE_FILES if is_direct else ATTRIBUTION_PATCHING_FILES, force)
        for drawn in (picture, agreement):
            if drawn is not None:
                refuse_picture(drawn, force)
        if check == 0 and agreement is not None:
            raise InputError("--agreement has no meaning with --check 0: nothing is patched.")
        if method is not AttributionMethod.direct:
            from pellucid.cli.attribution_patching import AttributionPatchingRequest, attribute_patching
            from pellucid.cli.pairs import TypedPairs

            estimated = AttributionPatchingRequest(
                method=method.value,
                pairs=TypedPairs(pairs, clean, corrupted, answer, foil),
                site="z" if site is None else site,
                axes=None if axes is None else tuple(axes.split(",")),
                n_points=20 if n_points is None else n_points,
                check=20 if check is None else check,
                top_k=top_k,
                prepend_bos=prepend_bos,
                out=out,
                picture=picture,
                agreement=agreement,
                force=force,
            )
            attribute_patching(choice, estimated, format)
            return
        from pellucid.cli.attribute import AttributeRequest, attribute_logit

        request = AttributeRequest(
            text,
            answer,
            foil,
            (by or Part.component).value,
            (positions or LogitPositions.last).value,
            top_k,
            3 if check is None else check,
            prepend_bos,
            out,
            picture,
            force,
        )
        attribute_logit(choice, request, format)


@asks_for(EdgeChoices, CurveChoices)
def circuit(
    *,
    model: Model = DEMO,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file of pairs with the columns clean, corrupted, answer, foil. For demo there is one."
        ),
    ] = None,
    clean: Annotated[str | None, typer.Option(help="In the place of --pairs, one: the clean prompt.")] = None,
    corrupted: Annotated[str | None, typer.Option(help="Its counterpart, of as many tokens.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="The token right after clean, with its leading space: ' Paris'; or id:123.")
    ] = None,
    foil: Annotated[
        str | None, typer.Option(help="The token that it is compared with, likewise; by default its log-probability.")
    ] = None,
    edges: Annotated[int, typer.Option(min=1, help="How many of the strongest edges the circuit has.")] = 50,
    prune: Annotated[
        bool, typer.Option("--prune", help="Without edges that no way from the embedding to the end goes through.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure what circuits of several sizes keep: all other edges are patched.")
    ] = False,
    asked: Asked,
    top_k: Annotated[int, typer.Option(min=1, help="How many edges to list.")] = 15,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for circuit.json, .graphml, .csv, and .safetensors, to load again; an interrupted run goes on "
            "there."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="The circuit drawn in this .html, .png or .svg file; needs the extra 'plots'.")
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
    """Which edges between parts of MODEL carry a behaviour, how sure that is, and how much of it they keep."""
    with report_errors(debug, partial(kept_of_pairs, out)):
        choice = ModelChoice(model, revision, device, dtype, allow_pickle, attn_implementation)
        refuse_model(choice)
        if out is not None:
            refuse_folder(out, CIRCUIT_FILES, force)
        if picture is not None:
            refuse_picture(picture, force)
        from pellucid.cli.circuit import CircuitRequest, find_circuit
        from pellucid.cli.pairs import TypedPairs

        request = CircuitRequest(
            pairs=TypedPairs(pairs, clean, corrupted, answer, foil),
            edges=edges,
            prune=prune,
            curve=curve,
            top_k=top_k,
            choices=asked.make(EdgeChoices),
            curve_choices=asked.make(CurveChoices),
            out=out,
            picture=picture,
            force=force,
        )
        find_circuit(choice, request, format)


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
