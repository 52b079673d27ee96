"""A lens on a prompt: layers down, positions along, the most probable token written into each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import xarray

from pellucid.arguments import check_choice, check_kind, check_whole
from pellucid.errors import InputError
from pellucid.plots.axis import axis_of, check_words
from pellucid.plots.extra import need
from pellucid.plots.heat_maps import MOST_CELLS
from pellucid.plots.picture import Panel, Picture, Scale
from pellucid.plots.results import finite_of
from pellucid.plots.text import paragraphs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Shown: TypeAlias = Literal["top_probability", "kl", "entropy", "probability", "logit", "rank"]
_UNITS = {
    "top_probability": "probability of the token in the cell",
    "kl": "KL(the model's own || the lens) (nats)",
    "entropy": "entropy (nats)",
    "probability": "probability of {token}",
    "logit": "logit of {token}",
    "rank": "tokens with a larger logit than {token}",
}
_OF_TOKEN = ("probability", "logit", "rank")


def lens_table(
    reading: xarray.Dataset,
    show: Shown = "top_probability",
    *,
    token: int | None = None,
    title: str | None = None,
    unit: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """What a lens reads of a prompt. Colours say one number, cells the most probable token, the pointer all that was kept.

    Args:
        reading: what ``Lens.read`` gives.
        show: which number is the colour: of the token in the cell its probability; ``"kl"`` or ``"entropy"``; of a token
            that was followed its ``"probability"``, ``"logit"`` or ``"rank"``.
        token: id of the followed token; by default the first.
        title: by default the lens and the prompt.
        unit: what a colour means; by default the number's name and unit.
        subtitle: smaller lines below the title; a line break begins another paragraph.

    Returns:
        a figure with one trace, its ``z`` the numbers ``[layer, pos]``.

    Raises:
        InputError: no reading, a token that was not followed, over 300,000 cells, no finite number.
        MissingExtraError: Plotly is not installed.
    """
    check_words(title, unit, subtitle)
    check_kind("reading", reading, xarray.Dataset, "what Lens.read gives")
    check_choice("show", show, tuple(_UNITS))
    if "top_token" not in reading or "kl" not in reading:
        raise InputError(
            f"reading is what Lens.read gives; found a data set of {', '.join(map(str, reading)) or 'nothing'}."
        )
    numbers, name = _numbers(reading, show, token)
    grid = numbers.transpose("layer", "pos").values.astype("float64")
    if grid.size > MOST_CELLS:
        raise InputError(
            f"The picture would have {grid.size:,} cells; at most {MOST_CELLS:,} are drawn: take a part of it."
        )
    finite = finite_of([grid])
    high = 1.0 if show in ("top_probability", "probability") else float(finite.max())
    low = min(0.0, float(finite.min()))
    scale = Scale(_UNITS[show].format(token=name) if unit is None else unit, low, high if high > low else low + 1.0)
    texts = reading.top_token.transpose("layer", "pos", "top").values.tolist()
    said = _said(reading, texts)
    need("plotly")
    from pellucid.plots.figures import figure_of

    attrs = reading.attrs
    if title is None:
        title = f"{attrs.get('analysis', 'lens')}: {attrs.get('prompt', '')}"
    panel = Panel("", grid, scale, tuple(tuple(best[0] for best in row) for row in texts), said)
    axes = axis_of(numbers, "pos", None), axis_of(numbers, "layer", None)
    notes = tuple(paragraphs(subtitle))
    return figure_of(Picture(title, notes, *axes, (panel,), printed=True))


def _numbers(reading: xarray.Dataset, show: Shown, token: int | None) -> tuple[xarray.DataArray, str]:
    """``[layer, pos]``, and the token that they are of."""
    if show not in _OF_TOKEN:
        if token is not None:
            raise InputError(f"token would have no effect: show={show!r} is of no token. Give show='probability'.")
        found = reading.top_probability.isel(top=0, drop=True) if show == "top_probability" else reading[show]
        return found, ""
    followed = reading.token.values.tolist() if "token" in reading.coords else []
    if not followed:
        raise InputError(f"show={show!r} is of a token that was followed: read with tokens=.")
    wanted = followed[0] if token is None else check_whole("token", token)
    if wanted not in followed:
        raise InputError(f"token is one that was followed, {', '.join(map(str, followed))}; found {token}.")
    place = followed.index(wanted)
    text = str(reading.token_text.values[place])
    return reading[show].isel(token=place).drop_vars(("token", "token_text")), text


def _said(reading: xarray.Dataset, texts: list[list[list[str]]]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """What each cell says under the pointer: its best tokens, divergence and entropy."""
    shares: Any = reading.top_probability.transpose("layer", "pos", "top").values.tolist()
    kl, entropy = (reading[name].transpose("layer", "pos").values.tolist() for name in ("kl", "entropy"))
    return tuple(
        tuple(
            (
                *(f"{share:.3f} {text}" for share, text in zip(shares[row][column], best, strict=True)),
                f"KL {kl[row][column]:.3f}, entropy {entropy[row][column]:.3f} nats",
            )
            for column, best in enumerate(line)
        )
        for row, line in enumerate(texts)
    )
