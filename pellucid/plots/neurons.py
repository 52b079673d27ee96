"""Pictures of language neurons: where they are, what languages share, what silencing them does, and what they fire on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import xarray

from pellucid.plots.bar_charts import bars
from pellucid.plots.examples import TokenExample, examples_page
from pellucid.plots.heat_maps import heat_map, heat_maps

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Context = tuple[float, str, str, str]
"""An example of a neuron: its activation at a token, the text before it, the token, the text after."""


def layers_picture(by_layer: xarray.DataArray, subtitle: str | None = None) -> Figure:
    """Bars of how many neurons each layer has, a panel for each language.

    Args:
        by_layer: ``[language, layer]``, such as ``LanguageNeurons.by_layer()``.
        subtitle: a smaller line below the title.
    """
    return bars(by_layer, facet="language", title="Language neurons by layer", unit="neurons", subtitle=subtitle)


def overlap_picture(overlap: xarray.DataArray, subtitle: str | None = None) -> Figure:
    """A heat map of how many neurons two languages share.

    Args:
        overlap: ``[language, other]``, such as ``LanguageNeurons.overlap()``.
        subtitle: a smaller line below the title.
    """
    title = "Neurons that languages share"
    return heat_map(
        overlap, x="other", y="language", title=title, unit="shared neurons", centre=None, subtitle=subtitle
    )


def change_picture(found: xarray.Dataset, subtitle: str | None = None) -> Figure:
    """Heat maps of what silencing neurons does, beside the mean of the random sets, on one colour scale.

    Args:
        found: variables ``change`` ``[silenced, language]`` and ``random`` ``[set, silenced, language]``, such as
            ``perplexity_change`` gives.
        subtitle: a smaller line below the title.
    """
    panels = {"language neurons": found["change"]}
    sets = found.sizes["set"]
    if sets:
        panels[f"random neurons, mean of {sets}"] = found["random"].mean("set")
    return heat_maps(
        panels,
        x="language",
        y="silenced",
        title="Rise of the log-perplexity of a language (along) when the neurons of one (down) are silenced",
        unit="nats per token",
        subtitle=subtitle,
    )


def criteria_picture(effects: xarray.Dataset, subtitle: str | None = None) -> Figure:
    """Heat maps of what silencing does, a panel for each criterion by which neurons were chosen, on one colour scale.

    Args:
        effects: variable ``change`` ``[criterion, silenced, language]``, such as ``effects_of_criteria`` gives.
        subtitle: a smaller line below the title.
    """
    criteria = effects.coords["criterion"].values.tolist()
    return heat_maps(
        {f"by {name}": effects["change"].sel(criterion=name, drop=True) for name in criteria},
        x="language",
        y="silenced",
        title="Rise of the log-perplexity of a language (along) when as many neurons of one (down) are silenced",
        unit="nats per token",
        subtitle=subtitle,
    )


def neuron_examples_page(examples: Mapping[str, Sequence[Context]], subtitle: str | None = None) -> str:
    """A page of the tokens at which each neuron was most active, in their text.

    Args:
        examples: for each neuron, named as it is to be shown, its examples, largest first.
        subtitle: a line below the title.

    Returns:
        the page, for ``save_picture``.
    """
    shown = {
        heading: [_example(*context) for context in contexts] for heading, contexts in examples.items() if contexts
    }
    return examples_page(
        shown, title="Where language neurons fire most", unit="activation after GELU", subtitle=subtitle
    )


def _example(value: float, before: str, token: str, after: str) -> TokenExample:
    parts = [(before, 0.0), (token, value), (after, 0.0)]
    kept = [(text, number) for text, number in parts if text or number]
    return TokenExample([text for text, _ in kept], [number for _, number in kept], f"{value:.3g}")
