"""Language neurons: the selection against a plain transcription of the published procedure, and its identities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.analysis.language_neurons import LanguageNeurons, lape
from pellucid.errors import InputError

RATES = {"top_rate": 0.1, "filter_rate": 0.8, "activation_bar_ratio": 0.8}


def published(
    counts: Tensor, n: Tensor, top_rate: float, filter_rate: float, bar_rate: float
) -> tuple[list[tuple[int, int]], list[set[tuple[int, int]]], bool]:
    """The procedure of arXiv 2402.16438 step by step: selected, by language, and whether the edge is clear."""
    p = counts / n
    q = p / p.sum(-1, keepdim=True)
    q = torch.where(q.isnan(), 0.0, q)
    entropy = -(q * torch.where(q > 0, q.log(), 0.0)).sum(-1)
    every = p.reshape(-1)
    tau = every.kthvalue(round(every.numel() * filter_rate)).values.item()
    entropy = torch.where((p > tau).sum(-1) == 0, math.inf, entropy)
    size = round(entropy.numel() * top_rate)
    if size == 0:
        return [], [set() for _ in n], True
    lowest = entropy.reshape(-1).topk(size, largest=False)
    chosen = [(int(i) // counts.shape[1], int(i) % counts.shape[1]) for i in lowest.indices]
    bar = every.kthvalue(round(every.numel() * bar_rate)).values.item()
    by_language = [{pair for pair in chosen if p[pair][g].item() > bar} for g in range(len(n))]
    edge = lowest.values.max()
    clear = int((entropy == edge).sum()) == int((lowest.values == edge).sum())
    return chosen, by_language, clear


def random_counts(shape: tuple[int, int, int], seed: int, dead: int = 0, most: int = 100_000) -> tuple[Tensor, Tensor]:
    """Counts with neurons that prefer a language, ``dead`` of which never fire."""
    rng = np.random.default_rng(seed)
    n = rng.integers(most // 2, most, shape[-1])
    rate = rng.beta(0.5, 2.0, shape) ** rng.integers(1, 4, shape[:2])[..., None]
    counts = rng.binomial(n, rate)
    flat = counts.reshape(-1, shape[-1])
    flat[rng.choice(len(flat), dead, replace=False)] = 0
    return torch.from_numpy(counts), torch.from_numpy(n)


SHAPES = [(1, 7, 2), (2, 50, 3), (4, 512, 6), (24, 64, 7), (3, 400, 1), (30, 100, 21)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize(
    "rates", [(0.01, 0.95, 0.95), (0.05, 0.95, 0.95), (0.3, 0.5, 0.8), (0.9, 0.9, 0.6), (1.0, 1.0, 1.0)]
)
def test_selection_is_the_published_one(
    shape: tuple[int, int, int], dead: int, rates: tuple[float, float, float]
) -> None:
    compared = 0
    for seed in range(3):
        counts, n = random_counts(shape, seed, dead)
        found = lape(counts, n, *rates)
        chosen, by_language, clear = published(counts, n, *rates)
        assert len(found.selected) == len(chosen) == round(rates[0] * shape[0] * shape[1])
        edge = max((float(found.entropy.values[pair]) for pair in found.selected), default=0.0)
        below = {pair for pair in chosen if found.entropy.values[pair] < edge}
        assert {pair for pair in found.selected if found.entropy.values[pair] < edge} == below
        if clear:
            compared += 1
            assert set(found.selected) == set(chosen)
            assert [set(pairs) for pairs in found.neurons.values()] == by_language
    assert compared or rates[1] == 1.0 or shape[-1] == 1 or rates[0] > 0.2  # many neurons of entropy +inf at the edge


def test_bits_are_the_published_ones() -> None:
    counts, n = random_counts((4, 512, 6), seed=1, dead=9)
    found = lape(counts.int(), n)
    p = counts.int() / n
    assert torch.equal(torch.from_numpy(found.probabilities.values), p)
    assert found.filter_threshold == p.flatten().kthvalue(round(0.95 * p.numel())).values.item()
    assert found.entropy.dtype == np.float32
    wide = p.double()
    shares = torch.nan_to_num(wide / wide.sum(-1, keepdim=True))
    expected = torch.special.entr(shares).sum(-1)
    assert np.abs(found.unfiltered_entropy.values - expected.numpy()).max() < 4e-6  # float32: 6 terms near 1


def test_thirty_layers_of_16384_select_4915_of_which_some_may_belong_to_nobody() -> None:
    generator = torch.Generator().manual_seed(0)
    n = torch.full((6,), 1000)
    counts = torch.randint(0, 900, (30, 16384, 6), generator=generator)
    found = lape(counts, n)
    assert len(found.selected) == 4915 == round(0.01 * 30 * 16384)
    assert not found.unassigned
    # Few neurons fire at all: fewer pass the filter than are selected.
    counts[:, 100:] = 500
    counts[:, :100] = 0
    counts[0, :40, 0] = 999
    found = lape(counts, n)
    assert len(found.selected) == 4915
    assert found.neurons[0] == tuple((0, index) for index in range(40))
    assert len(found.unassigned) == 4915 - 40
    assert all(np.isinf(found.entropy.values[pair]) for pair in found.unassigned)
    assert not any(found.neurons[language] for language in range(1, 6))


def test_ties_are_broken_by_layer_and_neuron() -> None:
    counts = torch.full((3, 20, 2), 1)
    counts[:, 5:15, 1] = 90
    found = lape(counts, [100, 100], top_rate=0.2, filter_rate=0.5, activation_bar_ratio=0.5)
    assert list(found.selected) == [*((0, index) for index in range(5, 15)), (1, 5), (1, 6)]


def test_a_dead_neuron_has_the_lowest_entropy_and_is_never_selected_before_a_live_one() -> None:
    counts, n = random_counts((4, 100, 3), seed=3, dead=30)
    found = lape(counts, n, **RATES)
    assert len(found.dead) >= 30
    assert all(found.unfiltered_entropy.values[pair] == 0 for pair in found.dead)
    assert all(np.isinf(found.entropy.values[pair]) for pair in found.dead)
    assert not set(found.dead) & set(found.selected)


@pytest.mark.parametrize("languages", [2, 6, 7])
def test_identities(languages: int) -> None:
    n = [1000] * languages
    even = torch.full((1, 4, languages), 300)
    assert lape(even, n, **RATES).unfiltered_entropy.values == pytest.approx(math.log(languages), abs=1e-6)
    single = torch.zeros(1, 4, languages, dtype=torch.long)
    single[..., 1] = 7
    assert (lape(single, n, **RATES).unfiltered_entropy.values == 0).all()

    counts, tokens = random_counts((3, 200, languages), seed=5)
    found = lape(counts, tokens, **RATES)
    order = torch.randperm(languages, generator=torch.Generator().manual_seed(0))
    turned = lape(counts[..., order], tokens[order], **RATES)
    assert np.abs(turned.unfiltered_entropy.values - found.unfiltered_entropy.values).max() < 1e-6
    scaled = lape(counts, tokens * 3, **RATES)  # every probability a third
    assert np.abs(scaled.unfiltered_entropy.values - found.unfiltered_entropy.values).max() < 1e-6
    assert set(scaled.selected) == set(found.selected)


def test_a_neuron_may_belong_to_several_languages() -> None:
    counts = torch.full((1, 40, 3), 10)
    counts[0, 3] = torch.tensor([900, 900, 0])
    counts[0, 4] = torch.tensor([0, 0, 900])
    found = lape(counts, [1000] * 3, top_rate=0.05, languages=["a", "b", "c"])
    assert found.neurons == {"a": ((0, 3),), "b": ((0, 3),), "c": ((0, 4),)}
    overlap = found.overlap()
    assert overlap.dims == ("language", "other")
    assert overlap.values.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found.by_layer().values.tolist() == [[1], [1], [1]]


def test_a_last_language_without_neurons_keeps_its_place() -> None:
    """The published code drops it, and with it the number of languages."""
    counts = torch.full((1, 100, 3), 10)
    counts[0, 3] = torch.tensor([900, 0, 0])
    assert lape(counts, [1000] * 3).neurons == {0: ((0, 3),), 1: (), 2: ()}


def test_labels_and_kinds_of_input_agree() -> None:
    counts, n = random_counts((2, 60, 3), seed=2)
    languages = ["en", "fr", "zh"]
    plain = lape(counts, n, **RATES, languages=languages)
    named = xr.DataArray(counts.numpy(), {"language": languages}, ("layer", "neuron", "language"))
    others: list[LanguageNeurons] = [
        lape(counts.numpy(), n.tolist(), **RATES, languages=languages),
        lape(counts.double(), n.float(), **RATES, languages=languages),
        lape(counts, dict(zip(languages, n.tolist(), strict=True)), **RATES),
        lape(named.transpose("language", "layer", "neuron"), n, **RATES),
        lape(named.rename(language="label"), xr.DataArray(n.numpy(), {"label": languages}, ("label",)), **RATES),
        lape(named, xr.DataArray(n.flip(0).numpy(), {"language": languages[::-1]}, ("language",)), **RATES),
    ]
    for other in others:
        assert other.neurons == plain.neurons
        assert other.selected == plain.selected
    assert tuple(plain.neurons) == tuple(languages)
    assert list(lape(counts, n).neurons) == [0, 1, 2]


def test_thresholds_change_without_a_new_pass() -> None:
    counts, n = random_counts((4, 128, 4), seed=7)
    found = lape(counts, n)
    again = found.rethreshold(top_rate=0.2, filter_rate=0.7)
    fresh = lape(counts, n, top_rate=0.2, filter_rate=0.7)
    assert again.neurons == fresh.neurons
    assert again.activation_bar_ratio == 0.95
    assert found.rethreshold().neurons == found.neurons


def test_the_callers_counts_are_not_touched() -> None:
    counts, n = random_counts((2, 40, 3), seed=4, dead=3)
    before = counts.clone()
    found = lape(counts, n)
    counts.zero_()
    assert torch.equal(torch.from_numpy(found.counts.values), before)


@pytest.mark.parametrize("match", ["uniform", "layer"])
def test_random_sets(match: Any) -> None:
    counts, n = random_counts((4, 128, 4), seed=8)
    found = lape(counts, n, top_rate=0.1)
    sets = found.random_sets(3, seed=1, match=match)
    assert sets == found.random_sets(3, seed=1, match=match)
    assert sets[:2] == found.random_sets(2, seed=1, match=match)
    assert sets != found.random_sets(3, seed=2, match=match)
    for control in sets:
        assert tuple(control) == found.languages
        for language, drawn in control.items():
            assert len(drawn) == len(set(drawn)) == len(found.neurons[language])
            assert all(0 <= layer < 4 and 0 <= index < 128 for layer, index in drawn)
            if match == "layer":
                layers = [layer for layer, _ in drawn]
                assert layers == [layer for layer, _ in found.neurons[language]]
    assert sets[0] != sets[1]


def test_random_sets_are_uniform() -> None:
    """Each neuron is drawn equally often: a chi-squared statistic within five deviations of its mean."""
    counts, n = random_counts((2, 16, 2), seed=9)
    found = lape(counts, n, top_rate=0.5, filter_rate=0.3, activation_bar_ratio=0.3)
    drawn = np.zeros((2, 16))
    for control in found.random_sets(400, seed=3):
        for pair in control[0]:
            drawn[pair] += 1
    mean = drawn.mean()
    share = len(found.neurons[0]) / 32
    chi = float(((drawn - mean) ** 2 / (mean * (1 - share))).sum())
    assert abs(chi - 31) < 5 * math.sqrt(2 * 31)


def test_a_file_has_what_is_needed_and_comes_back(tmp_path: Path) -> None:
    counts, n = random_counts((3, 64, 3), seed=6, dead=2)
    found = lape(counts, n, **RATES, languages=["en", "fr", "zh"])
    found.save(tmp_path / "a.safetensors")
    found.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    back = LanguageNeurons.load(tmp_path / "a.safetensors")
    assert back.neurons == found.neurons
    assert back.selected == found.selected
    assert back.document() == found.document()
    assert np.array_equal(back.entropy.values, found.entropy.values)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["pellucid"]
        about = json.loads(file.metadata()["pellucid"])
    assert about["neurons"]["en"] == [list(pair) for pair in found.neurons["en"]]
    rows = found.rows()
    assert len(rows) == sum(map(len, found.neurons.values()))
    assert rows[0]["language"] == "en"
    of_each = {f"{what}_{language}" for what in ("p", "low", "high") for language in ("en", "fr", "zh")}
    assert set(rows[0]) == {"language", "layer", "neuron", "entropy"} | of_each


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no language neurons"):
        LanguageNeurons.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"not a file")
    with pytest.raises(InputError, match="damaged"):
        LanguageNeurons.load(tmp_path / "y.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        LanguageNeurons.load(tmp_path / "z.safetensors")


def bad(change: Any) -> tuple[Tensor, Any]:
    counts, n = torch.full((2, 10, 3), 5), torch.tensor([10, 10, 10])
    return change(counts, n)


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda c, n: (c * math.nan, n), {}, "found nan"),
        (lambda c, n: (c * math.inf, n), {}, "found inf"),
        (lambda c, n: (c + 0.5, n), {}, "found 5.5"),
        (lambda c, n: (-c, n), {}, "negative"),
        (lambda c, n: (c + 6, n), {}, "active at 11 tokens of the language 0, which has 10"),
        (lambda c, n: (c, torch.tensor([10, 0, 10])), {}, "language 1 has 0 tokens"),
        (lambda c, n: (c, torch.tensor([10, -1, 10])), {}, "has -1 tokens"),
        (lambda c, n: (c, n[:2]), {}, "shape \\(2,\\)"),
        (lambda c, n: (c, {"a": 10}), {}, "1 labels were given"),
        (lambda c, n: (c[0], n), {}, "found shape \\(10, 3\\)"),
        (lambda c, n: (c[:, :0], n), {}, "found shape \\(2, 0, 3\\)"),
        (lambda c, n: (c > 3, n), {}, "bool"),
        (lambda c, n: (c, n), {"languages": ["a", "b"]}, "2 labels"),
        (lambda c, n: (c, n), {"languages": ["a", "b", "a"]}, "labels of their own"),
        (lambda c, n: (c, n), {"top_rate": 1.1}, "top_rate must be at most 1"),
        (lambda c, n: (c, n), {"filter_rate": math.nan}, "filter_rate must be finite"),
        (lambda c, n: (c, n), {"filter_rate": 0.001}, "rank 0"),
        (lambda c, n: (c, n), {"activation_bar_ratio": 0.0}, "activation_bar_ratio=0.0 of 60"),
        (lambda c, n: ("counts", n), {}, "whole numbers|found shape"),
    ],
)
def test_counts_that_cannot_be_are_refused(change: Any, arguments: dict[str, Any], said: str) -> None:
    counts, n = bad(change)
    with pytest.raises(InputError, match=said):
        lape(counts, n, **arguments)


def test_names_of_axes_are_checked() -> None:
    counts = xr.DataArray(np.ones((2, 3, 4), dtype=int), dims=("layer", "head", "language"))
    with pytest.raises(InputError, match="layer, neuron, language; found layer, head, language"):
        lape(counts, [5] * 4)
