"""``pellucid steer``: a direction out of texts, or a saved one, added while the model writes, beside what it writes anyway.

The file of ``--out`` is what :meth:`pellucid.steering.Direction.load` reads; ``--direction`` takes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from rich.text import Text
from torch import Tensor

from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice, SteeringMethod
from pellucid.cli.output import table, write_json
from pellucid.cli.prompt import as_typed
from pellucid.cli.terminal import results
from pellucid.demo.predictions import Prediction, next_tokens
from pellucid.demo.texts import written_text
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.steering import Add, Direction, Edit, Steering, contrast_pairs, difference_of_means
from pellucid.steering.measuring import Method
from pellucid.storage.json_text import Json
from pellucid.token_text import token_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SITE = "resid_post"
DEMO_TEXTS = 24
"""Paragraphs of each language that the embedded model's own direction is made of."""


@dataclass(frozen=True)
class SteerRequest:
    """What to steer with, where, and what to show."""

    prompt: str
    positive: Sequence[str]
    negative: Sequence[str]
    direction: Path | None
    method: SteeringMethod
    site: str | None
    layers: Sequence[int] | None
    position: Any
    strengths: Sequence[float]
    positions: Any
    max_new_tokens: int
    top_k: int
    batch_size: int
    prepend_bos: bool | None
    out: Path | None
    picture: Path | None
    force: bool


@dataclass(frozen=True)
class Written:
    """What the model expects and writes at one strength."""

    strength: float
    text: str
    next_tokens: list[Prediction]
    probabilities: Tensor


def steer_model(choice: ModelChoice, request: SteerRequest, format: Format) -> None:
    """Make or read the direction, generate, write the files, print.

    Raises:
        InputError: texts that are missing or contradict a saved direction, a direction of another model, a strength of 0.
        HookNameError: no such site.
        NoEffectError: positions that no row has.
        StoreError: a file that holds no direction.
        PellucidError: the model cannot be opened.
    """
    _refuse(choice, request)
    bridge = open_bridge(choice)
    direction = _direction(bridge, choice, request)
    site = None if request.direction is None else request.site
    steered = [
        (strength, Steering(Edit(Add(direction, strength), site, request.layers, request.positions)))
        for strength in request.strengths
    ]
    for _, steering in steered:
        steering.fwd_hooks(bridge)  # what cannot be is refused before the first token
    written = [_write(bridge, request, 0.0, None)]
    written += [_write(bridge, request, strength, steering) for strength, steering in steered]
    if request.out is not None:
        direction.save(request.out)
    if request.picture is not None:
        from pellucid.plots import save_picture

        save_picture(draw(bridge, direction, written, request), request.picture, overwrite=request.force)
    origin = direction.origin
    about: dict[str, Json] = {
        **source_of(choice),
        "dtype": str(bridge.dtype).removeprefix("torch."),
        "prompt": request.prompt,
        "direction": asdict(origin) | {"norms": direction.norms.tolist()},
        "positions": request.positions,
    }
    if format is Format.json:
        shown: list[dict[str, Json]] = [
            {"strength": each.strength, "text": each.text, "next_tokens": [asdict(token) for token in each.next_tokens]}
            for each in written
        ]
        files = {name: None if path is None else str(path) for name, path in _files(request).items()}
        write_json({**about, "unsteered": shown[0], "steered": shown[1:], **files})
    else:
        _print(direction, written, request, format)


def _refuse(choice: ModelChoice, request: SteerRequest) -> None:
    """What can be said before the model is opened.

    Raises:
        InputError: see :func:`steer_model`.
    """
    if 0 in request.strengths:
        raise InputError("--strength 0 is the model as it is, which is shown beside the others anyway: leave it out.")
    has_texts = bool(request.positive or request.negative)
    if request.direction is not None:
        if has_texts or request.position is not None or request.method is not SteeringMethod.means:
            raise InputError("--direction is made already: leave --positive, --negative, --position and --method out.")
        if not request.direction.is_file():
            raise InputError(f"--direction: there is no file {request.direction}.")
        return
    for option, texts in (("--positive", request.positive), ("--negative", request.negative)):
        if not texts and (has_texts or not choice.is_demo):
            raise InputError(
                f"{option} is missing: give texts of both kinds (--positive TEXT or --positive-file FILE, --negative TEXT "
                "or --negative-file FILE), or a saved direction (--direction FILE)."
            )
    if request.method is not SteeringMethod.means and len(request.positive) != len(request.negative):
        raise InputError(
            f"--method {request.method.value} takes pairs: --positive has {len(request.positive)} texts and --negative "
            f"{len(request.negative)}."
        )


def _direction(bridge: TransformerBridge, choice: ModelChoice, request: SteerRequest) -> Direction:
    if request.direction is not None:
        return Direction.load(request.direction)
    name, positive, negative = "positive - negative", request.positive, request.negative
    position = "last" if request.position is None else request.position
    if not positive:
        position = "mean" if request.position is None else request.position
        written = written_text()
        name, positive, negative = "French - English", written["fr"][:DEMO_TEXTS], written["en"][:DEMO_TEXTS]
    typed = [
        [as_typed(text, "A text is not UTF-8: put it into a file.") for text in texts] for texts in (positive, negative)
    ]
    options: dict[str, Any] = {
        "layers": [bridge.cfg.n_layers // 2] if request.layers is None else request.layers,
        "position": position,
        "at": SITE if request.site is None else request.site,
        "batch_size": request.batch_size,
        "prepend_bos": request.prepend_bos,
        "name": name,
    }
    towards, away = typed
    if request.method is SteeringMethod.means:
        return difference_of_means(bridge, towards, away, **options)
    method: Method = "mean" if request.method is SteeringMethod.pairs else "principal"
    return contrast_pairs(bridge, list(zip(towards, away, strict=True)), method=method, **options)


def _write(bridge: TransformerBridge, request: SteerRequest, strength: float, steering: Steering | None) -> Written:
    def run() -> tuple[str, Tensor]:
        with torch.no_grad():
            logits: Tensor = bridge(request.prompt, prepend_bos=request.prepend_bos)[0, -1]
        text = bridge.generate(
            request.prompt,
            request.max_new_tokens,
            do_sample=False,
            prepend_bos=request.prepend_bos,
            verbose=False,
        )
        return text, logits

    if steering is None:
        text, logits = run()
    else:
        with steering.on(bridge):
            text, logits = run()
    found = next_tokens(bridge.tokenizer, logits, request.top_k)
    return Written(strength, text, found, logits.float().softmax(-1))


def _files(request: SteerRequest) -> dict[str, Path | None]:
    return {"file": request.out, "picture": request.picture}


def draw(bridge: TransformerBridge, direction: Direction, written: Sequence[Written], request: SteerRequest) -> Figure:
    """A heat map of next-token probabilities: strengths by the tokens that are likely at any of them."""
    from pellucid.plots import heat_map
    from pellucid.plots.text import visible as in_one_line

    ids = list(dict.fromkeys(token.id for token in chain.from_iterable(each.next_tokens for each in written)))
    values = torch.stack([each.probabilities[ids] for each in written]).double().numpy()
    labels = token_labels(bridge.tokenizer, ids)
    result = xr.DataArray(
        values,
        {"strength": [f"{each.strength:g}" for each in written], "token": [f"{label}" for label in labels]},
        ("strength", "token"),
    )
    origin = direction.origin
    return heat_map(
        result,
        title=f"Next token, steered along {origin.name or origin.site}",
        unit="probability",
        subtitle=f"prompt: {in_one_line(request.prompt)}\nstrength 0: unsteered",
        centre=None,
    )


def _print(direction: Direction, written: Sequence[Written], request: SteerRequest, format: Format) -> None:
    console, origin = results(format), direction.origin
    layers = "" if origin.layers is None else f", layers {', '.join(map(str, origin.layers))}"
    lengths = ", ".join(f"{length:.3g}" for length in direction.norms.tolist())
    console.print(Text.assemble((origin.name or "direction", "bold"), f"  {origin.site}{layers}; length {lengths}"))
    console.print()
    texts = table("strength", "goes on", numbers=("strength",))
    for each in written:
        texts.add_row("unsteered" if each.strength == 0 else f"{each.strength:g}", each.text.replace("\n", "⏎"))
    console.print(texts)
    console.print()
    expected = table("strength", "next tokens", numbers=("strength",))
    for each in written:
        named = "  ".join(f"{token.token} {token.probability:.0%}" for token in each.next_tokens)
        expected.add_row("unsteered" if each.strength == 0 else f"{each.strength:g}", named)
    console.print(expected)
    files = [str(path) for path in _files(request).values() if path is not None]
    if files:
        console.print()
        console.print(Text(f"Written: {', '.join(files)}", "bold"))
