"""Two criteria for language neurons side by side: entropy of activity (LAPE), and relevance to the loss.

Sets of equal size are compared by what they share, by where each stands in the order of the other, and by what silencing
them does to every language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pellucid.analysis.language_neurons import Language, LanguageNeurons
from pellucid.analysis.neurons import Neuron
from pellucid.analysis.perplexity import Text, perplexity_change
from pellucid.analysis.relevance import Against, Method, NeuronRelevance
from pellucid.arguments import check_kind, check_mapping
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge

ENTROPY = "entropy"
"""The criterion of :func:`~pellucid.analysis.language_neurons.lape`; the other is called by its method."""


def compare_criteria(
    found: LanguageNeurons, relevance: NeuronRelevance, method: Method = "relp", against: Against = "nothing"
) -> xr.Dataset:
    """How far the neurons of least entropy are those of the highest relevance, language by language.

    Args:
        found: the selection by entropy.
        relevance: of the same model's neurons for the same languages.
        method: see :meth:`NeuronRelevance.scores <pellucid.analysis.relevance.NeuronRelevance.scores>`.
        against: likewise.

    Returns:
        a data set over ``language``

        - ``size``: neurons of the language by entropy, and as many by relevance;
        - ``shared``: neurons in both sets; ``jaccard``: shared over all (1 where both are empty);
        - ``expected``: shared by two sets of this size drawn at random;
        - ``relevance_of_entropy``: median over the set by entropy of the share of all neurons that are less relevant;
        - ``probability_of_relevance``: median over the set by relevance of the share of all neurons that are active less
          often.

        NaN where a language has no neuron.

    Raises:
        InputError: another shape, or other languages.
    """
    check_kind("found", found, LanguageNeurons, "what lape gives")
    check_kind("relevance", relevance, NeuronRelevance, "what neuron_relevance gives")
    scores = relevance.scores(method, against)
    sizes = (scores.sizes["layer"], scores.sizes["neuron"])
    if sizes != (found.n_layers, found.d_mlp) or set(relevance.languages) != set(found.languages):
        raise InputError(
            f"found is of {found.n_layers} x {found.d_mlp} neurons and {', '.join(map(str, found.languages))}; relevance of "
            f"{sizes[0]} x {sizes[1]} and {', '.join(map(str, relevance.languages))}: they compare where both are of one "
            "model and the same languages."
        )
    by_relevance = relevance.top(found, method, against)
    columns: dict[str, list[float]] = {}
    for language, own in found.neurons.items():
        one, other = set(own), set(by_relevance[language])
        probability = found.probabilities.sel(language=language).values
        line = {
            "size": len(one),
            "shared": len(one & other),
            "jaccard": len(one & other) / len(one | other) if one else 1.0,
            "expected": len(one) ** 2 / (sizes[0] * sizes[1]),
            "relevance_of_entropy": _median_rank(scores.sel(language=language).values, own),
            "probability_of_relevance": _median_rank(probability, by_relevance[language]),
        }
        for name, value in line.items():
            columns.setdefault(name, []).append(value)
    return xr.Dataset(
        {name: (("language",), values) for name, values in columns.items()},
        {"language": list(found.neurons)},
        {"method": method, "against": against, "neurons": sizes[0] * sizes[1]},
    )


def _median_rank(values: np.ndarray[Any, Any], neurons: Sequence[Neuron]) -> float:
    """Median over the neurons of the share of all values that are smaller."""
    if not neurons:
        return float("nan")
    ordered = np.sort(values, axis=None)
    own = [values[neuron] for neuron in neurons]
    return float(np.median(np.searchsorted(ordered, own) / ordered.size))


def effects_of_criteria(
    bridge: TransformerBridge,
    text: Text,
    sets: Mapping[str, Mapping[Language, Sequence[Neuron]]],
    *,
    random_sets: Sequence[Mapping[Language, Sequence[Neuron]]] = (),
    batch_size: int = 8,
    progress: bool | None = None,
) -> xr.Dataset:
    """What silencing does to every language, criterion by criterion, on the same text.

    Args:
        bridge: the model.
        text: as of :func:`~pellucid.analysis.perplexity.perplexity_change`.
        sets: by criterion, of each language its neurons.
        random_sets: controls, which are the same for all criteria.
        batch_size: rows of a run.
        progress: show a bar; ``None`` shows it on a terminal only.

    Returns:
        what :func:`~pellucid.analysis.perplexity.perplexity_change` gives, ``change`` and ``size`` with an axis
        ``criterion`` more.

    Raises:
        InputError: no criterion; criteria of other languages; a language without neurons.
        NoEffectError: neurons that change nothing.
    """
    criteria = list(check_mapping("sets", sets, "criteria to neurons by language"))
    if not criteria:
        raise InputError("sets maps criteria to neurons by language; found no criterion.")
    languages = set(check_mapping(f"sets[{criteria[0]!r}]", sets[criteria[0]], "languages to neurons"))
    for name in criteria:
        if set(check_mapping(f"sets[{name!r}]", sets[name], "languages to neurons")) != languages:
            raise InputError(f"sets[{name!r}] has other languages than sets[{criteria[0]!r}].")
    order = list(sets[criteria[0]])
    parts = [
        perplexity_change(
            bridge,
            text,
            {language: sets[name][language] for language in order},
            random_sets=random_sets if place == 0 else (),
            batch_size=batch_size,
            progress=progress,
        )
        for place, name in enumerate(criteria)
    ]
    along = xr.DataArray(criteria, dims="criterion", name="criterion")
    joined = {name: xr.concat([part[name] for part in parts], along) for name in ("change", "size")}
    return parts[0].assign(joined)
