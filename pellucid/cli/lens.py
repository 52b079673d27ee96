"""``pellucid lens``: a text through a model, and what the model would say after each layer.

The table is of one position, the last that was read. ``--out`` writes the document that ``--format json`` prints; its
``reading`` is read back by ``pellucid.analysis.labelled.data_set_from_document``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from rich.text import Text

from pellucid.analysis.labelled import data_set_to_document
from pellucid.analysis.lens import Lens, LogitLens, load_lens, load_published
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.terminal import results
from pellucid.cli.tokens import read_token
from pellucid.demo import LENSES_FOLDER
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json, write_json_file

LOGIT = "logit"
OF_DEMO = ("tuned", "jacobian")
"""Lenses that come with the embedded model."""


@dataclass(frozen=True)
class LensRequest:
    """What to read, and where the result goes."""

    text: str
    lens: str
    tokens: tuple[str, ...]
    layers: list[int] | None
    positions: list[int] | None
    top_k: int
    show: Any
    prepend_bos: bool | None
    out: Path | None
    picture: Path | None
    force: bool


def read_text(choice: ModelChoice, request: LensRequest, format: Format) -> None:
    """Read, write the files, print.

    Raises:
        InputError: no such lens, layer, position or token; a lens of another model.
        WeightError: weights that cannot be read.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        PellucidError: the model cannot be opened.
    """
    file = lens_file(choice, request.lens)
    bridge = open_bridge(choice)
    lens = open_lens(bridge, file)
    reading = lens.read(
        request.text,
        layers=request.layers,
        positions=request.positions,
        tokens=_ids(bridge, request),
        top_k=request.top_k,
        prepend_bos=request.prepend_bos,
    ).assign_attrs(model=choice.name)
    document: dict[str, Json] = {
        **source_of(choice),
        "lens": request.lens,
        "reading": data_set_to_document(reading),
    }
    written = []
    if request.out is not None:
        write_json_file(request.out, document)
        written.append(request.out)
    if request.picture is not None:
        from pellucid.plots import lens_table, save_picture

        save_picture(lens_table(reading, request.show), request.picture, overwrite=request.force)
        written.append(request.picture)
    if format is Format.json:
        write_json(document)
    else:
        _print(reading, lens, written, format)


def lens_file(choice: ModelChoice, asked: str) -> Path | None:
    """The file that ``--lens`` means; ``None`` for the logit lens.

    Raises:
        InputError: no such file.
    """
    if asked == LOGIT:
        return None
    if choice.is_demo and asked in OF_DEMO:
        return LENSES_FOLDER / f"{asked}.safetensors"
    file = Path(asked).expanduser()
    if not asked or not file.is_file():
        words = ", ".join((LOGIT, *(OF_DEMO if choice.is_demo else ())))
        only = "" if choice.is_demo or asked not in OF_DEMO else f" A {asked} lens comes with demo only."
        raise InputError(
            f"--lens {asked}: there is no such file. It is {words}, or a file: TunedLens.fit(bridge, corpus).save(file) "
            f"makes one.{only}"
        )
    return file


def open_lens(bridge: TransformerBridge, file: Path | None) -> Lens:
    """The lens of a file on a model, ``None`` being the logit lens."""
    if file is None:
        return LogitLens(bridge)
    return load_published(file, bridge) if file.suffix == ".pt" else load_lens(file, bridge)


def _ids(bridge: TransformerBridge, request: LensRequest) -> list[int]:
    if not request.tokens:
        if request.show in ("probability", "logit", "rank"):
            raise InputError(f"--show {request.show} is of a token: give --token, such as --token ' the'.")
        return []
    with torch.no_grad():
        logits = bridge(bridge.to_tokens(request.text, prepend_bos=request.prepend_bos))[0, -1]
    ids = [read_token(bridge.tokenizer, typed, "--token", logits) for typed in request.tokens]
    return list(dict.fromkeys(ids))


def _print(reading: xr.Dataset, lens: Lens, written: Sequence[Path], format: Format) -> None:
    console, last = results(format), reading.isel(pos=-1)
    console.print(
        Text.assemble((f"{reading.sizes['pos']} positions  ", "bold"), " ".join(reading.text.values.tolist()))
    )
    console.print()
    console.print(
        Text.assemble(
            (f"{reading.attrs['analysis']}, ", "bold"),
            f"position {int(last.pos)} ({last.text.item()}): what the model would say after each layer",
        )
    )
    followed = [f"rank of {text}" for text in reading.token_text.values.tolist()] if "token" in reading.coords else []
    # Labels of two tokens may be the same; the columns of a table are told apart by their places.
    made = table(
        "layer", "token", "probability", "KL", "next best", *followed, numbers=("layer", "probability", "KL", *followed)
    )
    for layer in reading.layer.values.tolist():
        row = last.sel(layer=layer)
        tokens, shares = row.top_token.values.tolist(), row.top_probability.values.tolist()
        others = "  ".join(f"{token} {share:.0%}" for token, share in zip(tokens[1:4], shares[1:4], strict=True))
        ranks = [str(rank) for rank in row["rank"].values.tolist()] if followed else []
        made.add_row(str(layer), tokens[0], f"{shares[0]:.3f}", f"{float(row.kl):.3f}", others, *ranks)
    console.print(made)
    console.print(
        Text(
            "KL: from the model's own distribution, in nats. Layer k enters block k; the last is the model's own.",
            "dim",
        )
    )
    console.print()
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --picture FILE.html for all positions, --token ' the' to follow a token, --out FILE.json")
