"""Language neurons: those that are active for one language, or few, and not for the others.

The measure is the *language activation probability entropy* (LAPE; Tang et al. 2024, arXiv 2402.16438). A neuron's
activation probability for a language is the share of the language's tokens at which it is active: above zero after GELU, in
a gated MLP (Llama's) where the activated gate is (:func:`~pellucid.analysis.neurons.activity_place` names the hook). Divided
by their sum over the languages these are a distribution; its entropy is low where a neuron fires for few languages.

Numbers are computed in float32 in the order of the published procedure, so that neurons at the edge fall on the same
side. Where several neurons have the entropy of the last one selected, that procedure leaves open which of them are taken;
here it is those that come first by layer, then by neuron.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Num
from torch import Tensor

from pellucid.analysis.neurons import Neuron, RandomMatch, random_neurons
from pellucid.analysis.proportions import wilson_interval
from pellucid.arguments import check_choice, check_count, check_kind, check_list, check_number, check_path
from pellucid.errors import InputError, StoreError
from pellucid.storage.json_text import to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors

Language: TypeAlias = str | int
"""A language's label, or its place on the language axis where there are no labels."""

DIMS = ("layer", "neuron", "language")
_KIND = "language neurons"


@dataclass(frozen=True)
class LanguageNeurons:
    """Selected neurons, and everything they were selected from.

    Attributes:
        counts: ``[layer, neuron, language]`` int64, tokens at which a neuron was active.
        n: ``[language]`` int64, tokens of each language.
        top_rate: share of all neurons that is selected.
        filter_rate: quantile of all probabilities that a neuron must exceed in some language.
        activation_bar_ratio: quantile of all probabilities above which a selected neuron belongs to a language.
        probabilities: ``[layer, neuron, language]`` float32, counts over tokens.
        unfiltered_entropy: ``[layer, neuron]`` float32, nats; 0 for a neuron that is never active.
        entropy: the same with ``+inf`` where no language exceeds the filter.
        filter_threshold: the probability at ``filter_rate``.
        activation_bar: the probability at ``activation_bar_ratio``.
        selected: the selected neurons as (layer, neuron), by entropy, layer, neuron.
        neurons: of each language, its neurons as (layer, neuron), sorted. A neuron may belong to several languages, or,
            selected with an entropy of ``+inf`` because too few pass the filter, to none.
    """

    counts: xr.DataArray
    n: xr.DataArray
    top_rate: float
    filter_rate: float
    activation_bar_ratio: float
    probabilities: xr.DataArray
    unfiltered_entropy: xr.DataArray
    entropy: xr.DataArray
    filter_threshold: float
    activation_bar: float
    selected: tuple[Neuron, ...]
    neurons: Mapping[Language, tuple[Neuron, ...]]

    @property
    def languages(self) -> tuple[Language, ...]:
        """Labels, in the order of the language axis."""
        return tuple(self.neurons)

    @property
    def n_layers(self) -> int:
        """Layers counted."""
        return int(self.counts.sizes["layer"])

    @property
    def d_mlp(self) -> int:
        """Neurons of a layer."""
        return int(self.counts.sizes["neuron"])

    @cached_property
    def dead(self) -> tuple[Neuron, ...]:
        """Neurons that no token of any language activated. Their entropy would be the lowest; the filter leaves them out."""
        return _pairs(np.argwhere(self.counts.values.sum(-1) == 0))

    @cached_property
    def unassigned(self) -> tuple[Neuron, ...]:
        """Selected neurons that belong to no language."""
        owned = {neuron for neurons in self.neurons.values() for neuron in neurons}
        return tuple(neuron for neuron in self.selected if neuron not in owned)

    def rethreshold(
        self,
        top_rate: float | None = None,
        filter_rate: float | None = None,
        activation_bar_ratio: float | None = None,
    ) -> LanguageNeurons:
        """Select again from the same counts, without a new pass; what is not given stays as it is."""
        return lape(
            self.counts,
            self.n,
            top_rate=self.top_rate if top_rate is None else top_rate,
            filter_rate=self.filter_rate if filter_rate is None else filter_rate,
            activation_bar_ratio=self.activation_bar_ratio if activation_bar_ratio is None else activation_bar_ratio,
        )

    def intervals(self, confidence: float = 0.95) -> xr.Dataset:
        """Wilson's interval of each activation probability.

        It takes tokens as independent. Those of one text are not, so that it is rather too narrow.

        Args:
            confidence: probability that an interval holds the true one.

        Returns:
            ``low`` and ``high`` ``[layer, neuron, language]`` float64.

        Raises:
            InputError: a confidence that is not between 0 and 1.
        """
        low, high = wilson_interval(self.counts.values, self.n.values, confidence)
        ends = {name: (DIMS, values) for name, values in (("low", low), ("high", high))}
        return xr.Dataset(ends, dict(self.counts.coords), {"confidence": confidence, "method": "Wilson"})

    def stability(self, draws: int = 20, seed: int = 0) -> xr.DataArray:
        """How much of the chosen set stays when each count is drawn anew, from the binomial of its interval.

        Every draw goes through the whole selection, thresholds too.

        Args:
            draws: how many.
            seed: of NumPy's generator.

        Returns:
            ``[draw]``: Jaccard index (shared over all) of the (language, neuron) pairs chosen now and in each draw; 1 where
            neither has one. The set stands where these are near 1.
        """
        check_count("draws", draws)
        generator = np.random.default_rng(check_count("seed", seed, at_least=0))
        rates = self.counts.values / self.n.values
        found = []
        for _ in range(draws):
            drawn = generator.binomial(self.n.values, rates)
            found.append(
                self.agreement(
                    lape(
                        drawn,
                        self.n.values,
                        self.top_rate,
                        self.filter_rate,
                        self.activation_bar_ratio,
                        languages=self.languages,
                    )
                )
            )
        return xr.DataArray(found, {"draw": np.arange(draws)}, ("draw",), name="Jaccard index")

    def agreement(self, other: LanguageNeurons) -> float:
        """Jaccard index (shared over all) of the (language, neuron) pairs chosen here and there; 1 where neither has one."""
        check_kind("other", other, LanguageNeurons, "what lape gives")
        own, others = _owned(self), _owned(other)
        return len(own & others) / len(own | others) if own | others else 1.0

    def overlap(self) -> xr.DataArray:
        """``[language, other]`` int64: neurons that two languages share; on the diagonal those a language has."""
        sets = [set(neurons) for neurons in self.neurons.values()]
        shared = np.array([[len(one & other) for other in sets] for one in sets], dtype=np.int64)
        labels = list(self.neurons)
        return xr.DataArray(shared, {"language": labels, "other": labels}, ("language", "other"), name="shared neurons")

    def by_layer(self) -> xr.DataArray:
        """``[language, layer]`` int64: how many neurons of each language a layer has."""
        found = np.zeros((len(self.neurons), self.n_layers), dtype=np.int64)
        for row, neurons in enumerate(self.neurons.values()):
            for layer, _ in neurons:
                found[row, layer] += 1
        coords = {"language": list(self.neurons), "layer": np.arange(self.n_layers)}
        return xr.DataArray(found, coords, ("language", "layer"), name="neurons")

    def random_sets(
        self, n_sets: int = 1, seed: int = 0, match: RandomMatch = "uniform"
    ) -> list[dict[Language, tuple[Neuron, ...]]]:
        """Control sets: for each language as many neurons as it has, drawn without regard to what they do.

        Args:
            n_sets: how many; set ``k`` of a language depends on ``seed``, ``k`` and the language's place only.
            seed: of the draw.
            match: ``"uniform"`` draws among all neurons, ``"layer"`` within each layer as many as the language has there.

        Returns:
            ``n_sets`` mappings such as :attr:`neurons`. A language's own neurons may be drawn too.
        """
        check_count("n_sets", n_sets)
        check_count("seed", seed, at_least=0)
        check_choice("match", match, ("uniform", "layer"))
        return [
            {
                language: random_neurons(neurons, self.n_layers, self.d_mlp, (seed, number, place), match)
                for place, (language, neurons) in enumerate(self.neurons.items())
            }
            for number in range(n_sets)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each language and neuron, with the 95 % interval of each probability: for tables and files."""
        ends = self.intervals()
        return [
            {
                "language": language,
                "layer": layer,
                "neuron": neuron,
                "entropy": float(self.entropy.values[layer, neuron]),
                **{
                    f"p_{other}": float(self.probabilities.values[layer, neuron, place])
                    for place, other in enumerate(self.neurons)
                },
                **{
                    f"{end}_{other}": float(ends[end].values[layer, neuron, place])
                    for place, other in enumerate(self.neurons)
                    for end in ("low", "high")
                },
            }
            for language, neurons in self.neurons.items()
            for layer, neuron in neurons
        ]

    def document(self) -> dict[str, Any]:
        """What was selected and how, for JSON."""
        return {
            "kind": _KIND,
            "method": "LAPE, arXiv 2402.16438; entropy in nats, float32; ties by entropy, layer, neuron",
            "languages": list(self.neurons),
            "n": dict(zip(map(str, self.neurons), self.n.values.tolist(), strict=True)),
            "shape": {"layer": self.n_layers, "neuron": self.d_mlp},
            "top_rate": self.top_rate,
            "filter_rate": self.filter_rate,
            "activation_bar_ratio": self.activation_bar_ratio,
            "filter_threshold": self.filter_threshold,
            "activation_bar": self.activation_bar,
            "selected": len(self.selected),
            "unassigned": len(self.unassigned),
            "dead": len(self.dead),
            "neurons": {str(language): [list(pair) for pair in pairs] for language, pairs in self.neurons.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``counts`` and ``n``, and under the metadata key ``pellucid`` :meth:`document`.

        The rest follows from these and is computed again by :meth:`load`. The file is whole, or as it was before.

        Raises:
            StorageFullError: no space is left.
        """
        path = check_path("path", path)
        arrays = {"counts": self.counts.values, "n": self.n.values}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        write_safetensors(path, tensors, to_line(self.document()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LanguageNeurons:
        """Read a file of :meth:`save`.

        Raises:
            InputError: it is damaged, or holds something else.
            OSError: it cannot be read.
        """
        path = check_path("path", path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {os.fspath(path)}.")
        try:
            tensors, about = read_safetensors(path)
            if not isinstance(about, dict) or about.get("kind") != _KIND:
                raise InputError(f"{os.fspath(path)} holds no language neurons of Pellucid.")
            counts, n = tensors["counts"], tensors["n"]
        except (StoreError, KeyError) as error:
            raise InputError(
                f"{os.fspath(path)} holds no language neurons of Pellucid, or is damaged: {error}"
            ) from error
        rates = {name: float(about[name]) for name in ("top_rate", "filter_rate", "activation_bar_ratio")}
        return lape(counts, n, languages=about["languages"], **rates)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{language}: {len(neurons)}" for language, neurons in self.neurons.items())
        return (
            f"LanguageNeurons({len(self.selected)} of {self.n_layers} x {self.d_mlp} selected; {sizes}; "
            f"{len(self.unassigned)} of no language; {len(self.dead)} dead)"
        )


def lape(
    counts: Num[Tensor, "layer neuron language"] | npt.NDArray[Any] | xr.DataArray,
    n: Num[Tensor, " language"] | npt.NDArray[Any] | xr.DataArray | Sequence[int] | Mapping[Any, int],
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    activation_bar_ratio: float = 0.95,
    *,
    languages: Sequence[Language] | None = None,
) -> LanguageNeurons:
    """Select language neurons by their activation probability entropy (arXiv 2402.16438), with the published defaults.

    1. ``p = counts / n``; ``q = p / sum of p over languages``, 0 for a neuron that is never active;
       ``entropy = -sum of q ln q``, with ``0 ln 0 = 0``.
    2. A neuron none of whose ``p`` is strictly above the ``round(filter_rate x size)``-th smallest of all ``p`` gets the
       entropy ``+inf``.
    3. The ``round(top_rate x neurons)`` neurons of least entropy are selected; ``top_rate`` is a share of all neurons, and
       neurons of entropy ``+inf`` fill up where fewer pass the filter. Equal entropies are ordered by layer, then neuron.
    4. A selected neuron belongs to each language whose ``p`` is strictly above the ``round(activation_bar_ratio x
       size)``-th smallest. With equal rates, one of entropy ``+inf`` belongs to none.

    ``round`` is Python's, half to even.

    Args:
        counts: ``[layer, neuron, language]`` whole numbers: tokens at which a neuron was above zero. Named axes of a
            ``DataArray`` may come in any order, and ``label``, as a collection calls it, stands for ``language``.
        n: ``[language]`` whole numbers: tokens of each language; or a mapping from languages.
        top_rate: share of all neurons to select.
        filter_rate: quantile of step 2.
        activation_bar_ratio: quantile of step 4.
        languages: labels of the language axis; by default those of a ``DataArray``, or 0, 1, ....

    Raises:
        InputError: another shape; counts that are negative, not whole, not finite or more than there are tokens; a language
            without tokens; rates outside 0 to 1; an input so small that a quantile's rank rounds to 0.
    """
    counts = _renamed(counts) if isinstance(counts, xr.DataArray) else counts
    n = _renamed(n) if isinstance(n, xr.DataArray) else n
    labels = _labels(counts, n, languages)
    active = _whole(_by_dims(counts), "counts")
    if active.dim() != 3 or 0 in active.shape:
        raise InputError(f"counts are [layer, neuron, language]; found shape {tuple(active.shape)}.")
    if len(labels) != active.shape[-1]:
        raise InputError(f"counts have {active.shape[-1]} languages; {len(labels)} labels were given: {list(labels)}.")
    tokens = _tokens(n, labels)
    _check_counts(active, tokens, labels)
    for name, rate in (
        ("top_rate", top_rate),
        ("filter_rate", filter_rate),
        ("activation_bar_ratio", activation_bar_ratio),
    ):
        check_number(name, rate, at_least=0, at_most=1)

    probabilities = active.to(torch.float32) / tokens.to(torch.float32)
    shares = probabilities / probabilities.sum(dim=-1, keepdim=True)
    shares[shares.isnan()] = 0
    logarithms = torch.where(shares > 0, shares.log(), torch.zeros(()))
    unfiltered = -torch.sum(shares * logarithms, dim=-1)
    flat = probabilities.flatten()
    threshold = _ranked(flat, filter_rate, "filter_rate")
    bar = (
        threshold
        if activation_bar_ratio == filter_rate
        else _ranked(flat, activation_bar_ratio, "activation_bar_ratio")
    )
    entropy = unfiltered.masked_fill(~(probabilities > threshold).any(dim=-1), math.inf)

    ranked = torch.argsort(entropy.flatten(), stable=True)[: round(entropy.numel() * top_rate)]
    width = active.shape[1]
    selected = tuple((int(index) // width, int(index) % width) for index in ranked)
    belongs = probabilities.flatten(0, 1)[ranked] > bar
    neurons = {
        language: tuple(sorted(selected[row] for row in belongs[:, place].nonzero()[:, 0].tolist()))
        for place, language in enumerate(labels)
    }
    coords = {"layer": np.arange(active.shape[0]), "neuron": np.arange(width), "language": list(labels)}
    at_neuron = {name: coords[name] for name in DIMS[:2]}
    return LanguageNeurons(
        counts=xr.DataArray(active.numpy(), coords, DIMS, name="active tokens"),
        n=xr.DataArray(tokens.numpy(), {"language": list(labels)}, ("language",), name="tokens"),
        top_rate=float(top_rate),
        filter_rate=float(filter_rate),
        activation_bar_ratio=float(activation_bar_ratio),
        probabilities=xr.DataArray(probabilities.numpy(), coords, DIMS, name="activation probability"),
        unfiltered_entropy=xr.DataArray(unfiltered.numpy(), at_neuron, DIMS[:2], name="entropy (nats)"),
        entropy=xr.DataArray(entropy.numpy(), at_neuron, DIMS[:2], name="entropy (nats)"),
        filter_threshold=threshold,
        activation_bar=bar,
        selected=selected,
        neurons=neurons,
    )


def _ranked(flat: Tensor, rate: float, name: str) -> float:
    """The ``round(rate x size)``-th smallest value."""
    rank = round(len(flat) * rate)
    if rank < 1:
        raise InputError(
            f"{name}={rate} of {len(flat)} probabilities is rank {rank}, and the smallest has rank 1: give more neurons or "
            "a larger rate."
        )
    return float(flat.kthvalue(rank).values)


def _labels(counts: Any, n: Any, languages: Sequence[Language] | None) -> tuple[Language, ...]:
    if languages is not None:
        if isinstance(languages, str):
            raise InputError(f"languages is a list of labels; found the string {languages!r}.")
        labels = tuple(check_list("languages", languages, "labels"))
    elif isinstance(counts, xr.DataArray) and "language" in counts.coords:
        labels = tuple(counts.coords["language"].values.tolist())
    elif isinstance(n, xr.DataArray) and "language" in n.coords:
        labels = tuple(n.coords["language"].values.tolist())
    elif isinstance(n, Mapping):
        labels = tuple(n)
    else:
        size = np.shape(counts)[-1] if np.ndim(counts) else 0
        labels = tuple(range(size))
    if len(set(labels)) < len(labels):
        raise InputError(f"languages have labels of their own; found {list(labels)}.")
    return labels


def _renamed(values: xr.DataArray) -> xr.DataArray:
    """Labels of a collection are languages here."""
    return values.rename(label="language") if "label" in values.dims and "language" not in values.dims else values


def _by_dims(counts: Any) -> Any:
    if isinstance(counts, xr.DataArray):
        if set(counts.dims) != set(DIMS):
            raise InputError(f"counts have the axes {', '.join(DIMS)}; found {', '.join(map(str, counts.dims))}.")
        return counts.transpose(*DIMS).values
    return counts


def _tokens(n: Any, labels: tuple[Language, ...]) -> Tensor:
    if isinstance(n, xr.DataArray) and "language" in n.coords:
        n = dict(zip(n.coords["language"].values.tolist(), n.values.tolist(), strict=True))
    if isinstance(n, Mapping):
        if set(n) != set(labels):
            raise InputError(
                f"n is given for {list(n)}, and counts for {list(labels)}: give the tokens of each language."
            )
        n = [n[label] for label in labels]
    tokens = _whole(n.values if isinstance(n, xr.DataArray) else n, "n")
    if tokens.dim() != 1 or len(tokens) != len(labels):
        raise InputError(
            f"n has a number of tokens for each of the {len(labels)} languages; found shape {tuple(tokens.shape)}."
        )
    return tokens


def _whole(values: Any, name: str) -> Tensor:
    """int64 on the CPU, the caller's own tensor never."""
    try:
        given = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.array(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} are whole numbers; found {type(values).__name__}.") from error
    if given.dtype == torch.bool or given.is_complex():
        raise InputError(f"{name} are whole numbers; found {given.dtype}.")
    whole = given.to(torch.int64)
    if given.is_floating_point() and not bool((given.to(torch.float64) == whole.to(torch.float64)).all()):
        wrong = given[given.to(torch.float64) != whole.to(torch.float64)][0]
        raise InputError(f"{name} are whole numbers of tokens; found {float(wrong)}.")
    return whole.clone().contiguous()


def _check_counts(active: Tensor, tokens: Tensor, labels: tuple[Language, ...]) -> None:
    for place, label in enumerate(labels):
        count = int(tokens[place])
        if count < 1:
            raise InputError(
                f"The language {label!r} has {count} tokens: leave it out, or count on text that has some."
            )
        low, high = (int(value) for value in active[..., place].aminmax())
        if low < 0:
            raise InputError(f"counts of the language {label!r} are negative ({low}): counts are numbers of tokens.")
        if high > count:
            raise InputError(
                f"A neuron was active at {high} tokens of the language {label!r}, which has {count}: n must count the same "
                "tokens."
            )


def _owned(found: LanguageNeurons) -> set[tuple[Language, Neuron]]:
    """Every language with each of its neurons."""
    return {(language, neuron) for language, neurons in found.neurons.items() for neuron in neurons}


def _pairs(found: npt.NDArray[np.int64]) -> tuple[Neuron, ...]:
    return tuple((int(layer), int(neuron)) for layer, neuron in found)
