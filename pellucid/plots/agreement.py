"""Attribution against patching: how many cells have which estimate and which measurement, and where the two are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.arguments import check_count, check_kind
from pellucid.errors import InputError
from pellucid.plots.axis import check_words
from pellucid.plots.heat_maps import heat_map

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def agreement_map(
    found: xarray.Dataset,
    *,
    estimator: str | None = None,
    bins: int = 25,
    title: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """The cells of an attribution that were really patched, counted by estimate (up) and by measurement (along).

    Both axes have the same steps, so that the diagonal is the line of identity: it is drawn as empty cells where nothing
    lies on it. Above it the estimate is too large, below too small.

    Args:
        found: what :func:`~pellucid.attribution.attribution_patching` gives, with ``patched``.
        estimator: of several methods, which.
        bins: steps of either axis.
        title: what is shown; by default the method and the site.
        subtitle: a smaller line below; by default what the result says of itself first.

    Raises:
        InputError: no such data set, a method that it does not have, fewer than two cells that were patched.
        MissingExtraError: Plotly is not installed.
    """
    check_kind("found", found, xarray.Dataset, "what attribution_patching gives")
    check_words(title, None, subtitle)
    check_count("bins", bins, 2, 100)
    if not {"effect", "patched"} <= set(map(str, found.data_vars)):
        raise InputError("found is what attribution_patching gives with check=: it has no effect and patched.")
    effect = found.effect
    if "estimator" in effect.dims:
        names = [str(name) for name in effect.coords["estimator"].values]
        if estimator not in names:
            raise InputError(f"estimator is one of {', '.join(names)}; found {estimator!r}.")
        effect = effect.sel(estimator=estimator)
    elif estimator is not None:
        raise InputError("estimator would have no effect: the result is of one method.")
    measured = found.patched.transpose(*effect.dims).values.ravel()
    done = np.isfinite(measured)
    if done.sum() < 2:
        raise InputError(f"found.patched has {int(done.sum())} cells that were patched: take check= of 2 or more.")
    along, up = measured[done], effect.values.ravel()[done]
    low, high = min(along.min(), up.min()), max(along.max(), up.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts, _, _ = np.histogram2d(up, along, bins=[edges, edges])
    counts[counts == 0] = np.nan
    on_the_line = np.arange(bins)
    counts[on_the_line, on_the_line] = np.nan_to_num(counts[on_the_line, on_the_line])
    middles = [f"{middle:.3g}" for middle in (edges[1:] + edges[:-1]) / 2]
    shown = xarray.DataArray(np.log2(1 + counts)[::-1], dims=("estimated", "patched"))
    method = estimator or str(found.attrs.get("method", "estimate"))
    return heat_map(
        shown,
        title=title or f"{method} of {found.attrs.get('site', 'cells')} against patching: {along.size} cells",
        subtitle=subtitle or str(found.attrs.get("summary", "")).partition("\n")[0] or None,
        unit="log2(1 + cells)",
        labels={"estimated": middles[::-1], "patched": middles},
        centre=None,
        clip=False,
        print_values=False,
        square=True,
    )
