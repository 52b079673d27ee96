"""Running statistics against numpy, scikit-learn and themselves in parts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellucid import running_stats
from pellucid.errors import InputError
from pellucid.running_stats import (
    AveragePrecision,
    CountPositive,
    CountTogether,
    Covariance,
    Histogram,
    MeanVariance,
    MinMax,
    Places,
    Quantiles,
    Statistic,
    TopK,
    average_precision,
    load_statistics,
    save_statistics,
)

EXACT: list[Callable[[], Statistic]] = [
    CountPositive,
    lambda: CountPositive(0.3),
    CountTogether,
    lambda: CountTogether(0.3),
    MinMax,
    lambda: Quantiles((0.0, 0.25, 1.0)),
    lambda: Histogram((-1.0, 0.0, 0.25, 3.0)),
    lambda: TopK(4),
]
ROUNDED: list[Callable[[], Statistic]] = [MeanVariance, lambda: MeanVariance(1), Covariance]
BY_DOCUMENT: list[Callable[[], Statistic]] = [AveragePrecision, lambda: AveragePrecision("max")]
ALL = [*EXACT, *ROUNDED, *BY_DOCUMENT]


def a_batch(
    seed: int, batch: int = 5, pos: int = 7, features: tuple[int, ...] = (3, 2), dtype: Any = torch.float32
) -> Any:
    """Values with ties and zeros, a mask, and places that follow those of the batches before."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, pos, *features, generator=generator, dtype=torch.float64)
    values = (values * 8).round() / 8
    mask = torch.rand(batch, pos, generator=generator) > 0.3
    documents = (seed * batch + torch.arange(batch))[:, None].expand(-1, pos)
    positions = torch.arange(pos).expand(batch, -1)
    return values.to(dtype), mask, Places(documents, positions)


def same_state(first: Statistic, second: Statistic) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_statistic_is_in_a_list() -> None:
    public = {getattr(running_stats, name) for name in running_stats.__all__}
    concrete = {each for each in public if isinstance(each, type) and issubclass(each, Statistic)} - {Statistic}
    assert {type(make()) for make in ALL} == concrete


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_does_not_count(make: Callable[[], Statistic], dtype: torch.dtype) -> None:
    values, mask, places = a_batch(0, dtype=dtype)
    padded = make()
    padded.update(values, mask, places)
    alone = make()
    keep = mask.reshape(-1)
    alone.update(
        values.flatten(0, 1)[keep][None],
        None,
        Places(places.documents.flatten()[keep][None], places.positions.flatten()[keep][None]),
    )
    assert padded.n == int(mask.sum())
    assert same_state(padded, alone)
    garbage = values.clone()
    garbage[~mask] = torch.nan
    other = make()
    other.update(garbage, mask, places)
    assert same_state(other, alone)


@pytest.mark.parametrize("make", ALL)
def test_a_batch_of_padding_only_changes_nothing(make: Callable[[], Statistic]) -> None:
    values, mask, places = a_batch(0)
    one = make()
    one.update(values, mask, places)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.update(values, torch.zeros_like(mask), places)
    assert all(torch.equal(before[name], tensor) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("make", EXACT)
def test_integer_statistics_do_not_depend_on_how_the_corpus_was_divided(make: Callable[[], Statistic]) -> None:
    batches = [a_batch(seed) for seed in range(6)]
    whole = make()
    for batch in batches:
        whole.update(*batch)
    for sizes in ((6,), (2, 4), (3, 3), (1, 2, 3)):
        parts, at = [], 0
        for size in sizes:
            part = make()
            for batch in batches[at : at + size]:
                part.update(*batch)
            parts.append(part)
            at += size
        for order in itertools.permutations(parts):
            merged = make()
            for part in order:
                merged.merge(part)
            assert same_state(merged, whole)
    rows = make()
    for values, mask, places in batches:
        for row in range(len(values)):
            here = slice(row, row + 1)
            rows.update(values[here], mask[here], Places(places.documents[here], places.positions[here]))
    assert same_state(rows, whole)


@pytest.mark.parametrize("make", [*ROUNDED, *BY_DOCUMENT])
def test_the_others_merge_in_order_with_equal_bits_and_close_to_the_whole(make: Callable[[], Statistic]) -> None:
    batches = [a_batch(seed) for seed in range(6)]
    whole, *parts = (make() for _ in range(4))
    for index, batch in enumerate(batches):
        whole.update(*batch)
        parts[index // 2].update(*batch)
    merged, again = make(), make()
    for part in parts:
        merged.merge(part)
        again.merge(part)
    assert same_state(merged, again)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", ALL)
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(make: Callable[[], Statistic], tmp_path: Path) -> None:
    one = make()
    one.update(*a_batch(0))
    save_statistics(tmp_path / "s", {"a|b": one, "empty": make()}, {"note": 3})
    loaded, extra = load_statistics(tmp_path / "s")
    assert extra == {"note": 3}
    assert loaded["empty"].features is None
    assert loaded["a|b"].settings() == one.settings()
    one.update(*a_batch(1))
    loaded["a|b"].update(*a_batch(1))
    assert same_state(one, loaded["a|b"])


# -- what each is ------------------------------------------------------------------------------------------------------


def test_counts_above_and_of_nan() -> None:
    values = torch.tensor([[[1.0, 0.0], [torch.nan, -0.0], [torch.inf, 1e-45]]])
    count = CountPositive()
    count.update(values)
    assert count.result().tolist() == [2, 1]
    assert count.result().dtype == torch.int64
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = CountPositive()
        other.update(torch.ones(1, 5000, 1, dtype=dtype))  # over what a half-precision sum could hold
        assert other.result().tolist() == [5000]


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pairs_are_counted_as_a_plain_loop_counts_them(threshold: float, dtype: torch.dtype) -> None:
    values, mask, _ = a_batch(0, dtype=dtype)
    values[0, 0, 0, 0], values[1, 1], values[2, 2] = torch.nan, torch.tensor(0.1, dtype=dtype), torch.inf
    mask[[0, 1, 2], [0, 1, 2]] = True
    one = CountTogether(threshold)
    one.update(values, mask)
    rows = values[mask].flatten(1).double().tolist()
    expected = [[sum(row[i] > threshold < row[j] for row in rows) for j in range(6)] for i in range(6)]
    assert one.result().tolist() == expected
    assert one.result().dtype == torch.int64
    alone = CountPositive(threshold)
    alone.update(values, mask)
    assert torch.equal(one.result().diagonal(), alone.result().flatten())


def test_mean_and_variance_survive_a_large_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1e8 + torch.randn(40, 25, 3, generator=generator, dtype=torch.float64)
    one = MeanVariance()
    for part in values.split(7):
        one.update(part)
    wide = values.flatten(0, 1).numpy().astype(np.longdouble)
    np.testing.assert_allclose(one.result().variance, wide.var(0).astype(float), rtol=1e-7)
    squares = (wide.astype(float) ** 2).mean(0) - wide.astype(float).mean(0) ** 2  # the way not taken
    assert np.abs(squares / wide.var(0).astype(float) - 1).max() > 1e-2


@given(
    st.lists(
        st.floats(-2e4, 2e4, width=32) | st.sampled_from([0.0, 1e-4, -1e-4, 1e4, -1e4, 9.9999e-5]),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([0.001, 0.01, 0.02, 0.2]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_quantiles_keep_their_bound(values: list[float], error: float, dtype: torch.dtype) -> None:
    ranks = [0.0, 0.1, 0.5, 0.77, 1.0]
    tensor = torch.tensor(values, dtype=dtype)
    sketch = Quantiles(ranks, relative_error=error)
    sketch.update(tensor[None, :, None])
    exact = np.quantile(tensor.double().numpy(), ranks, method="lower")
    found = sketch.result()[0].numpy()
    inside = np.abs(exact) <= 1e4
    bound = np.maximum(error * np.abs(exact), 1e-4)
    assert (np.abs(found - exact) <= bound)[inside].all()
    assert (np.abs(found) >= 1e4 * (1 - error))[~inside].all()
    assert (np.abs(found) <= np.abs(tensor.double().numpy()).max())[~inside].all()
    assert int(sketch.beyond) == int((tensor.abs() > 1e4).sum())


@pytest.mark.parametrize("error", [0.001, 0.02])
def test_quantiles_of_many_values_on_the_edges_of_bins(error: float) -> None:
    sketch = Quantiles((0.5,), relative_error=error, smallest=1e-3, largest=1e3)
    edges = 1e-3 * 2 ** (np.linspace(0, sketch._n_bins, 200).round() * sketch._width_log2)
    values = torch.tensor(edges, dtype=torch.float32).repeat(3)
    values[len(edges) : 2 * len(edges)] = torch.nextafter(values[: len(edges)], torch.tensor(torch.inf))
    values[2 * len(edges) :] = torch.nextafter(values[: len(edges)], torch.tensor(0.0))
    values = values[(values >= 1e-3) & (values <= 1e3)]
    # Each a feature of its own, between two others: a sole value would be known exactly, as minimum and maximum.
    sketch.update(torch.stack([torch.full_like(values, 1e-3), values, torch.full_like(values, 1e3)])[None])
    assert ((sketch.result()[:, 0] - values.double()).abs() <= error * values.double()).all()


def test_top_examples_of_equal_values_are_the_first_of_the_corpus() -> None:
    values = torch.tensor([[[1.0], [2.0], [2.0]], [[2.0], [torch.nan], [0.5]]])
    places = Places(torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([[0, 1, 0], [1, 0, 1]]))
    top = TopK(2)
    top.update(values, None, places)
    found = top.result()
    assert found.values.tolist() == [[2.0, 2.0]]
    assert found.documents.tolist() == [[0, 1]]
    assert found.positions.tolist() == [[1, 0]]
    few = TopK(8)
    few.update(values, None, places)
    assert few.result().values.tolist() == [[2.0, 2.0, 2.0, 1.0, 0.5, -np.inf, -np.inf, -np.inf]]
    assert few.result().documents.tolist() == [[0, 1, 1, 0, 2, -1, -1, -1]]
    many = TopK(3)  # one feature has its largest three times, the other a hundred times
    values = torch.ones(1, 100, 2)
    values[0, [80, 20, 50], 0] = 2
    many.update(values, None, Places(torch.arange(100)[None] // 10, torch.arange(100)[None] % 10))
    assert many.result().documents.tolist() == [[2, 5, 8], [0, 0, 0]]
    assert many.result().positions.tolist() == [[0, 0, 0], [0, 1, 2]]
    backwards = TopK(2)  # a batch that comes before what was seen
    for document in (3, 1, 2):
        backwards.update(torch.ones(1, 2, 1), None, Places(torch.full((1, 2), document), torch.arange(2)[None]))
    assert backwards.result().documents.tolist() == [[1, 1]]


def test_documents_are_pooled_wherever_their_rows_are() -> None:
    values, mask, places = a_batch(0, features=(3,))
    documents = torch.tensor([0, 0, 1, 2, 2])[:, None].expand(-1, 7)
    for pool in ("mean", "max"):
        one = AveragePrecision(pool)  # type: ignore[arg-type]
        for row in range(5):
            here = slice(row, row + 1)
            one.update(values[here], mask[here], Places(documents[here], places.positions[here]))
        assert one.documents.tolist() == [0, 1, 2]
        for document in range(3):
            own = values[mask & (documents == document)]
            expected = own.double().mean(0).float() if pool == "mean" else own.amax(0)
            torch.testing.assert_close(one.result()[document], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ties", [0, 1, 3])
def test_average_precision_is_that_of_scikit_learn(ties: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(ties)
    scores = torch.randn(120, 9, 4, generator=generator)
    if ties:
        scores = (scores * ties).round() / ties
    scores[:, 0, 0] = 0.0
    positive = torch.rand(120, generator=generator) < 0.2
    found = average_precision(scores, positive, chunk=5)
    assert found.shape == (9, 4)
    for feature in itertools.product(range(9), range(4)):
        expected = metrics.average_precision_score(positive.numpy(), scores[:, feature[0], feature[1]].numpy())
        assert abs(float(found[feature]) - expected) <= 1e-12


def test_average_precision_of_labels() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    kept = []
    for seed in range(3):
        one = AveragePrecision()
        one.update(*a_batch(seed, features=(6,)))
        kept.append(one)
    found = kept[0].against(kept[1:])
    scores = torch.cat([one.result() for one in kept]).numpy()
    truth = [1] * 5 + [0] * 10
    for feature in range(6):
        assert abs(float(found[feature]) - metrics.average_precision_score(truth, scores[:, feature])) <= 1e-12


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CountPositive().result(), "has seen no token"),
        (lambda: CountPositive().update(torch.zeros(3, 4)), r"\[batch, pos"),
        (lambda: CountPositive().update(torch.zeros(3, 4, 2), torch.ones(4, 3, dtype=torch.bool)), "mask"),
        (lambda: seen(CountPositive()).update(torch.zeros(3, 4, 9)), "has seen features"),
        (lambda: seen(CountPositive()).merge(seen(CountPositive(1.0))), "merges with its like"),
        (lambda: seen(CountPositive()).merge(seen(MinMax())), "merges with its like"),
        (lambda: seen(MinMax()).merge(seen(MinMax(), features=4)), "cannot merge"),
        (lambda: TopK(0), "k must be at least 1"),
        (lambda: TopK(2).update(torch.zeros(1, 1, 1)), "places"),
        (lambda: AveragePrecision().update(torch.zeros(1, 1, 1)), "places"),
        (lambda: AveragePrecision("sum"), "Invalid pool: 'sum'"),  # type: ignore[arg-type]
        (lambda: Histogram((1.0,)), "increase"),
        (lambda: Histogram((1.0, 1.0)), "increase"),
        (lambda: Quantiles((1.5,)), "an entry of quantiles must be at most 1"),
        (lambda: Quantiles(relative_error=0.0), "relative_error"),
        (lambda: seen(Covariance(most_features=2)), "most_features"),
        (lambda: seen(CountTogether(most_features=2)), "most_features"),
        (lambda: average_precision(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)), "no positive"),
        (lambda: average_precision(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool)), "no negative"),
        (lambda: average_precision(torch.zeros(3, 2), torch.tensor([1, 0, 1])), "bool"),
        (lambda: average_precision(torch.tensor([0.0, torch.nan]), torch.tensor([True, False])), "finite"),
    ],
)
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def seen(statistic: Statistic, features: int = 3) -> Statistic:
    statistic.update(torch.zeros(1, 2, features))
    return statistic


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no statistics"):
        load_statistics(tmp_path / "x")
    from safetensors.torch import save_file

    save_file({"a": Tensor([1.0])}, tmp_path / "y")
    with pytest.raises(InputError, match="no statistics"):
        load_statistics(tmp_path / "y")


def test_no_flipped_bit_gives_another_number(tmp_path: Path) -> None:
    one = CountPositive()
    one.update(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "s"
    save_statistics(path, {"x": one}, {"job": {"threads": 1}})
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded, extra = load_statistics(path)
        except InputError:
            refused += 1
            continue
        assert same_state(loaded["x"], one), bit  # a space of the header, say
        assert extra == {"job": {"threads": 1}}, bit
    assert refused > 0.9 * 8 * len(whole)


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text = json.dumps({"statistics": {"x": {"kind": "count_positive", "settings": {"threshold": 0.0}}}, "extra": {}})
    save_file({"x|n": torch.tensor(3)}, tmp_path / "old", metadata={"pellucid": text})
    with pytest.raises(InputError, match="no checksum: it was written by an older version"):
        load_statistics(tmp_path / "old")


def test_a_subclass_of_a_statistic_leaves_its_parents_files_readable(tmp_path: Path) -> None:
    """A class is found by a word of its own: one without it would come back as another."""
    save_statistics(tmp_path / "parent", {"x": MeanVariance()}, {})

    class Named(MeanVariance):
        kind = "named_in_a_test"

    class Nameless(MeanVariance):
        pass

    save_statistics(tmp_path / "named", {"x": Named()}, {})
    assert type(load_statistics(tmp_path / "parent")[0]["x"]) is MeanVariance
    assert type(load_statistics(tmp_path / "named")[0]["x"]) is Named
    with pytest.raises(InputError, match="a Nameless of the kind 'mean_variance'"):
        save_statistics(tmp_path / "nameless", {"x": Nameless()}, {})
    assert not (tmp_path / "nameless").exists()
