"""What ``pellucid neurons --relevance`` adds to the study: rows of tables, JSON, tables to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr
from rich.table import Table

from pellucid.analysis.criteria import ENTROPY
from pellucid.analysis.language_neurons import Language, LanguageNeurons
from pellucid.analysis.neurons import Neuron
from pellucid.analysis.perplexity import own_and_others
from pellucid.analysis.relevance import NeuronRelevance
from pellucid.analysis.stopping import Look
from pellucid.cli.output import table
from pellucid.storage.json_text import Json, finite


@dataclass(frozen=True)
class Criteria:
    """The second criterion beside entropy.

    Attributes:
        relevance: of every neuron.
        table: what both share, by language.
        top: of each silenced language as many neurons as it has by entropy.
    """

    relevance: NeuronRelevance
    table: xr.Dataset
    top: Mapping[Language, Sequence[Neuron]]

    @property
    def method(self) -> str:
        """``gradient`` or ``relp``."""
        return str(self.table.attrs["method"])

    def rows(self, found: LanguageNeurons) -> list[dict[str, Any]]:
        """A row for each language and neuron that either criterion chose."""
        mean = self.relevance.mean.sel({"method": self.method})
        error = self.relevance.standard_error.sel({"method": self.method})
        rows = []
        for language, top in self.top.items():
            own = set(found.neurons[language])
            for layer, neuron in sorted(own | set(top)):
                cell = {"layer": layer, "neuron": neuron, "language": language}
                rows.append(
                    {
                        **cell,
                        "by_entropy": (layer, neuron) in own,
                        "by_relevance": (layer, neuron) in set(top),
                        "entropy": float(found.entropy.values[layer, neuron]),
                        "probability": float(found.probabilities.sel(cell)),
                        "relevance": float(mean.sel(cell)),
                        "standard_error": float(error.sel(cell)),
                    }
                )
        return rows

    def document(self, effects: xr.Dataset | None) -> dict[str, Json]:
        """For JSON."""
        about: dict[str, Json] = {
            "method": self.method,
            "against": str(self.table.attrs["against"]),
            "unit": "nats: mean over tokens of |gradient x activation| of a row's summed loss",
            "tokens": dict(zip(map(str, self.relevance.languages), self.relevance.n.values.tolist(), strict=True)),
            "by_language": finite(lines(self.table)),
            "neurons": {str(language): [list(pair) for pair in pairs] for language, pairs in self.top.items()},
        }
        if effects is not None:
            about["effects"] = effect_lines(effects)
        return about


def lines(found: xr.Dataset) -> list[dict[str, Any]]:
    """A line for each language of what :func:`compare_criteria` gives."""
    return [
        {"language": language, **{str(name): found[name].sel(language=language).item() for name in found}}
        for language in found.coords["language"].values.tolist()
    ]


def effect_lines(effects: xr.Dataset) -> list[dict[str, Json]]:
    """A line for each criterion and silenced language: nats on its own text and, on average, on that of the others."""
    said: list[dict[str, Json]] = []
    for criterion in effects.coords["criterion"].values.tolist():
        both = own_and_others(effects["change"].sel(criterion=criterion, drop=True))
        for silenced in both.coords["silenced"].values.tolist():
            cell = both.sel(silenced=silenced)
            numbers = {name: float(cell[name]) for name in ("own", "others")}
            said.append({"criterion": criterion, "silenced": silenced, **numbers})
    return said


def criteria_table(criteria: Criteria, effects: xr.Dataset | None) -> Table:
    """Both criteria by language, and what silencing does by each."""
    by = {(line["criterion"], line["silenced"]): line for line in ([] if effects is None else effect_lines(effects))}
    numbers = ("neurons", "shared", "by chance", f"own, {ENTROPY}", "others", f"own, {criteria.method}", "others ")
    made = table("language", *numbers, title=f"Entropy and relevance ({criteria.method})", numbers=numbers)
    for line in lines(criteria.table):
        shown = [
            f"{by[name, line['language']][part]:.3f}" if (name, line["language"]) in by else "-"
            for name in (ENTROPY, criteria.method)
            for part in ("own", "others")
        ]
        made.add_row(str(line["language"]), str(line["size"]), str(line["shared"]), f"{line['expected']:.1f}", *shown)
    return made


def looks_document(looks: Sequence[Look]) -> list[dict[str, Json]]:
    """What was found after each part of the counting."""
    return [{"tokens": dict(look.tokens), "within": look.within, "before": finite(look.before)} for look in looks]


def looks_line(looks: Sequence[Look]) -> str:
    """How many tokens the counting took."""
    last, tokens = looks[-1], sum(looks[-1].tokens.values())
    return (
        f"Counted {tokens:,} tokens in {len(looks)} parts: the set agrees to {last.within:.2f} with those of draws within "
        f"the intervals, and to {last.before:.2f} with that of the part before (Jaccard)."
    )
