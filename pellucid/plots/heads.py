"""Scores of heads: layers down, heads along, a panel for each pattern, beside it what position alone would give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray

from pellucid.arguments import check_kind
from pellucid.errors import InputError
from pellucid.plots.heat_maps import heat_map

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def head_map(
    scores: xarray.Dataset,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    print_values: bool | None = None,
) -> Figure:
    """How much every head attends to each pattern, the mean over prompts, on one scale from 0 to 1.

    Args:
        scores: what ``head_scores`` gives; its priors are drawn too, if it has any.
        title: by default what was scored on which prompts.
        subtitle: a smaller line below the title.
        print_values: write values into cells; by default where the picture has at most 144 of them.

    Returns:
        a figure with a trace for each pattern, and for each prior.

    Raises:
        InputError: no scores.
        MissingExtraError: Plotly is not installed.
    """
    check_kind("scores", scores, xarray.Dataset, "what head_scores gives")
    if "score" not in scores or scores["score"].dims != ("pattern", "prompt", "layer", "head"):
        raise InputError(
            f"scores is what head_scores gives; found a data set of {', '.join(map(str, scores)) or 'nothing'}."
        )
    panels: dict[str, xarray.DataArray] = {}
    for name in scores.pattern.values.tolist():
        one = scores.sel(pattern=name, drop=True).mean("prompt")
        panels[name.replace("_", " ")] = one["score"]
        if "prior" in one:
            panels[f"{name.replace('_', ' ')} by position"] = one["prior"]
    if "prior" in scores:
        said = "by position: the same, with queries and keys replaced by their means"
        subtitle = said if subtitle is None else f"{subtitle}\n{said}"
    prompts = scores.attrs.get("prompts", "")
    if title is None:
        title = f"Attention heads: {prompts if isinstance(prompts, str) else ' / '.join(prompts)}"
    return heat_map(
        panels,
        title=title,
        unit="mean attention to what the pattern means",
        subtitle=subtitle,
        centre=None,
        limits=(0.0, 1.0),
        print_values=print_values,
    )
