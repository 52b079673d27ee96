"""``pellucid heads``: which heads look where, on random tokens said several times or on a text.

``--out`` writes the document that ``--format json`` prints; its ``scores`` is read back by
``pellucid.analysis.labelled.data_set_from_document``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from rich.text import Text

from pellucid.analysis.heads import HEAD_PATTERNS, RandomRepeats, head_scores
from pellucid.analysis.labelled import data_set_to_document
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.terminal import results
from pellucid.errors import InputError
from pellucid.names import nearest
from pellucid.storage.json_text import Json, write_json_file


@dataclass(frozen=True)
class HeadsRequest:
    """What to score, and where the result goes."""

    text: str | None
    patterns: tuple[str, ...]
    length: int
    repeats: int
    prompts: int
    seed: int
    top_k: int
    prepend_bos: bool | None
    out: Path | None
    picture: Path | None
    force: bool


def score_heads(choice: ModelChoice, request: HeadsRequest, format: Format) -> None:
    """Score, write the files, print.

    Raises:
        InputError: no such pattern.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        PellucidError: the model cannot be opened.
    """
    for name in request.patterns:
        if name not in HEAD_PATTERNS:
            near = ", ".join(nearest(name, HEAD_PATTERNS))
            raise InputError(f"--pattern {name!r} is none of the patterns. Nearest: {near}.")
    patterns = tuple(dict.fromkeys(request.patterns)) or tuple(HEAD_PATTERNS)
    drawn = RandomRepeats(request.length, request.repeats, request.prompts, request.seed, request.prepend_bos)
    bridge = open_bridge(choice)
    tokens = None if request.text is None else bridge.to_tokens(request.text, prepend_bos=request.prepend_bos)
    scores = head_scores(bridge, drawn if tokens is None else tokens, patterns).assign_attrs(model=choice.name)
    strongest = {pattern: _strongest(scores.sel(pattern=pattern), request.top_k) for pattern in patterns}
    document: dict[str, Json] = {
        **source_of(choice),
        "strongest": strongest,
        "scores": data_set_to_document(scores),
    }
    written = []
    if request.out is not None:
        write_json_file(request.out, document)
        written.append(request.out)
    if request.picture is not None:
        from pellucid.plots import head_map, save_picture

        save_picture(head_map(scores), request.picture, overwrite=request.force)
        written.append(request.picture)
    if format is Format.json:
        write_json(document)
    else:
        _print(scores, strongest, written, format)


def _strongest(scores: xr.Dataset, count: int) -> list[dict[str, float]]:
    """Heads with the highest scores, those first: the mean over prompts, its standard error, and the prior."""
    mean = scores["score"].mean("prompt").values
    error = (
        scores["score"].std("prompt", ddof=1).values / np.sqrt(scores.sizes["prompt"])
        if scores.sizes["prompt"] > 1
        else mean * np.nan
    )
    prior = scores["prior"].mean("prompt").values
    order = np.argsort(-np.nan_to_num(mean, nan=-1.0), axis=None, kind="stable")[:count]
    found: list[dict[str, float]] = []
    for place in order:
        layer, head = map(int, np.unravel_index(int(place), mean.shape))
        if np.isnan(mean[layer, head]):
            continue
        found.append(
            {
                "layer": layer,
                "head": head,
                "score": float(mean[layer, head]),
                "standard_error": float(error[layer, head]),
                "prior": float(prior[layer, head]),
            }
        )
    return found


def _print(
    scores: xr.Dataset, strongest: dict[str, list[dict[str, float]]], written: Sequence[Path], format: Format
) -> None:
    console, prompts = results(format), scores.attrs["prompts"]
    console.print(
        Text.assemble(
            (f"{scores.sizes['prompt']} prompt{'s' * (scores.sizes['prompt'] > 1)}  ", "bold"),
            prompts if isinstance(prompts, str) else "  ".join(prompts),
        )
    )
    for pattern, heads in strongest.items():
        console.print()
        console.print(
            Text.assemble((pattern.replace("_", " "), "bold"), f": attention to {HEAD_PATTERNS[pattern].doc}")
        )
        if not heads:
            console.print("no token of the prompts has any")
            continue
        made = table("head", "score", "±", "by position alone", numbers=("score", "±", "by position alone"))
        for each in heads:
            error = "" if np.isnan(each["standard_error"]) else f"{each['standard_error']:.3f}"
            made.add_row(
                f"L{each['layer']:.0f}H{each['head']:.0f}", f"{each['score']:.3f}", error, f"{each['prior']:.3f}"
            )
        console.print(made)
    console.print()
    console.print(
        Text("Scores are means over queries that have such keys; 1 is all attention. ±: standard error.", "dim")
    )
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --picture FILE.html for every head, --out FILE.json, TEXT for a text of your own")
