"""Commands that ask which parts of a model carry a behaviour, and their options: attribute, patch, circuit.

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
    PATCH_FILES,
    kept_of_nothing,
    kept_of_pairs,
    refuse_folder,
    refuse_model,
    refuse_picture,
)
from pellucid.cli.mistakes import INTERRUPTED, report_errors
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
    MetricName,
    Model,
    ModelChoice,
    Part,
    PickleOption,
    PrependBos,
    Revision,
    asks_for,
)
from pellucid.errors import InputError
from pellucid.experiments.options import PatchingChoices, SweepOptions


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
