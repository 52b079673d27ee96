"""Expertise against scikit-learn and NumPy on responses of plain Hugging Face, and published files."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid.analysis.expert_neurons import (
    PUBLISHED_PLACES,
    HeadUnit,
    Unit,
    check_units,
    expertise,
    force_units,
    head_unit,
    unit_of_linear,
)
from pellucid.analysis.neuron_files import BLOOM_LANGUAGES, read_expertise, read_language_neurons
from pellucid.analysis.neurons import changed
from pellucid.config import TransformerBridgeConfig
from pellucid.corpora import Corpus
from pellucid.errors import HookNameError, InputError
from pellucid.running_stats import AveragePrecision
from tests.analysis.test_neurons import torch_hooks
from tests.models import make_pair, random_tokens

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn (extra neurons) is the oracle")
LINEARS = {
    "self_attention.query_key_value": None,
    "self_attention.dense": "hook_attn_out",
    "mlp.dense_h_to_4h": "mlp.hook_pre",
    "mlp.dense_4h_to_h": "hook_mlp_out",
}


def documents(seed: int, count: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 97, generator.integers(3, 12)).tolist() for _ in range(count)]


def plain_responses(model: Any, rows: list[list[int]], pool: str) -> dict[tuple[str, int], np.ndarray]:
    """Each linear layer's output, pooled over the tokens of one document at a time, in float64."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for row in rows:
        for name in LINEARS:

            def note(layer: int, out: Tensor, name: str = name) -> Tensor:
                wide = out[0].double()
                found.setdefault((name, layer), []).append((wide.mean(0) if pool == "mean" else wide.amax(0)).numpy())
                return out

            with torch.no_grad(), torch_hooks(model, note, name, False):
                model(torch.tensor([row]))
    return {key: np.stack(value) for key, value in found.items()}


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_expertise_is_scikit_learns_on_plain_hugging_face(pool: Any) -> None:
    """Every unit of every linear layer, the fused one taken apart, in float64 and in padded batches."""
    bridge, bare = make_pair(torch.float64)
    text = {label: documents(seed, 6 + seed) for seed, label in enumerate(("en", "fr", "zh"))}
    corpus = Corpus.from_tokens(text, packing="documents", context=16)
    requests = {f"blocks.*.{place}": [AveragePrecision(pool)] for place in PUBLISHED_PLACES}
    collected = bridge.collect(corpus, requests, batch_size=5, padding_side="left")
    name = "average_precision" if pool == "mean" else "average_precision_max"
    experts = expertise(collected, statistic=name)
    units = experts.units
    assert len(units) == 3 * 9 * 48
    rows = [row for listed in text.values() for row in listed]
    plain = plain_responses(bare, rows, pool)
    which = np.array([label for label, listed in text.items() for _ in listed])
    at = {unit: place for place, unit in enumerate(units)}
    for label in text:
        table = experts.table.sel(label=label)
        for (module, layer), responses in plain.items():
            for feature in range(0, responses.shape[1], 7):
                place = at[unit_of_linear(module, layer, feature, 4, 12)]
                scores = responses[:, feature].astype(np.float32)  # as they are kept
                on, off = responses[which == label, feature], responses[which != label, feature]
                expected = sklearn.average_precision_score(which == label, scores)
                assert abs(float(table["ap"][place]) - expected) < 1e-12
                assert float(table["on_p50"][place]) == pytest.approx(np.quantile(on, 0.5), abs=1e-6)
                assert float(table["on_p90"][place]) == pytest.approx(np.quantile(on, 0.9), abs=1e-6)
                assert float(table["off_mean"][place]) == pytest.approx(off.mean(), abs=1e-6)


def with_responses(columns: np.ndarray, positive: int) -> Any:
    """Experts from ``[document, unit]``, of which the first ``positive`` are of the label ``yes``."""
    responses = torch.from_numpy(columns)
    return expertise({"blocks.0.mlp.hook_pre": {"yes": responses[:positive], "no": responses[positive:]}})


def test_known_values_of_average_precision() -> None:
    """5 of 30 positive: perfect, inverted, and constant, which a sum over sorted documents takes for perfect."""
    perfect = np.arange(30, 0, -1.0)
    columns = np.stack(
        [perfect, -perfect, np.zeros(30), np.exp(perfect / 10), np.r_[np.ones(15), np.zeros(15)]], axis=1
    )
    ap = with_responses(columns, 5).table["ap"].sel(label="yes").values
    inverted = sum((rank / (25 + rank)) * 0.2 for rank in range(1, 6))
    assert ap == pytest.approx([1.0, inverted, 5 / 30, 1.0, 1 / 3], abs=1e-12)
    assert inverted == pytest.approx(0.1049, abs=5e-5)


def test_average_precision_with_many_ties() -> None:
    generator = np.random.default_rng(0)
    columns = generator.integers(0, 4, (60, 300)).astype(np.float32)
    ap = with_responses(columns, 20).table["ap"].sel(label="yes").values
    labels = np.arange(60) < 20
    expected = [sklearn.average_precision_score(labels, column) for column in columns.T]
    assert np.abs(ap - expected).max() < 1e-12


def test_the_choice() -> None:
    generator = np.random.default_rng(1)
    columns = generator.normal(size=(30, 40)).astype(np.float32)
    columns[:, 7] = columns[:, 3]
    columns[:10, 3] += 9
    columns[:10, 7] += 9
    columns[:10, 5] -= 9
    experts = with_responses(columns, 10)
    assert experts.best("yes", 2) == [Unit("mlp.hook_pre", 0, 3), Unit("mlp.hook_pre", 0, 7)]  # equal: the first first
    assert experts.best("yes", 1, "bottom") == [Unit("mlp.hook_pre", 0, 5)]
    assert experts.best("yes", 1, "both") == [Unit("mlp.hook_pre", 0, 3), Unit("mlp.hook_pre", 0, 5)]
    median = float(np.median(columns[:10, 5].astype(np.float64)))
    assert experts.values("yes", [Unit("mlp.hook_pre", 0, 5)]) == pytest.approx([median])
    (change,) = experts.forced("yes", 1, "bottom")
    assert change.values == {(0, 5): pytest.approx(median)}
    rows = experts.rows("yes")
    assert list(rows[0]) == ["place", "layer", "index", "ap", "on_p50", "on_p90", "off_mean"]
    for wrong, said in (
        (lambda: experts.best("maybe", 1), "no label 'maybe'"),
        (lambda: experts.best("yes", 21, "both"), "asks for 42"),
        (lambda: experts.best("yes", 1, "middle"), "Invalid which: 'middle'"),
        (lambda: experts.values("yes", [Unit("mlp.hook_pre", 1, 0)]), "has no Unit"),
        (lambda: experts.values("yes", [], "p50"), "on_p50"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


def test_forcing_units_at_several_places() -> None:
    bridge, bare = make_pair()
    units = [unit_of_linear(module, 1, 17, 4, 12) for module in LINEARS]
    changes = force_units(units, [1.0, 2.0, 3.0, 4.0])
    values = dict(zip(LINEARS, [1.0, 2.0, 3.0, 4.0], strict=True))
    tokens = random_tokens()
    check_units(bridge, units)
    with torch.no_grad(), changed(bridge, changes):
        found = bridge(tokens)
    from contextlib import ExitStack

    with torch.no_grad(), ExitStack() as stack:
        for module, value in values.items():

            def edit(layer: int, out: Tensor, value: float = value) -> Tensor:
                if layer == 1:
                    out[..., 17] = value
                return out

            stack.enter_context(torch_hooks(bare, edit, module, False))
        expected = bare(tokens).logits
    # BLOOM adds the residual inside its modules: after the projection in both cases.
    assert torch.equal(found, expected)


def test_forcing_units_to_their_own_values_changes_nothing() -> None:
    bridge, bare = make_pair()
    tokens = random_tokens(1, 1)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_pre")
        own = cache["blocks.1.mlp.hook_pre"][0, 0].tolist()
        units = [Unit("mlp.hook_pre", 1, index) for index in range(192)]
        with changed(bridge, force_units(units, own), assert_effect=False):
            assert torch.equal(bridge(tokens), bare(tokens).logits)


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_the_fused_units_are_the_bridges(heads: int) -> None:
    """The projection's own output beside what the hooks show."""
    bridge, bare = make_pair(n_head=heads)
    width = 48 // heads
    tokens = random_tokens(1, 3)
    fused = []

    def note(layer: int, out: Tensor) -> Tensor:
        fused.append(out)
        return out

    with torch.no_grad(), torch_hooks(bare, note, "self_attention.query_key_value", False):
        bare(tokens)
        _, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_[qkv]")
    for index in range(0, 144, 5):
        unit = unit_of_linear("self_attention.query_key_value", 2, index, heads, width)
        found = head_unit(unit, width)
        assert torch.equal(cache[f"blocks.2.{unit.place}"][..., found.head, found.dim], fused[2][..., index])
    assert head_unit(Unit("attn.hook_q", 0, width), width) == HeadUnit("attn.hook_q", 0, 1, 0) or heads == 1


def test_units_that_there_are_not() -> None:
    bridge, _ = make_pair()
    with pytest.raises(InputError, match="no linear layer 'mlp.dense'"):
        unit_of_linear("mlp.dense", 0, 0, 4, 12)
    with pytest.raises(InputError, match="0 to 143"):
        unit_of_linear("self_attention.query_key_value", 0, 144, 4, 12)
    with pytest.raises(InputError, match="has no heads"):
        head_unit(Unit("mlp.hook_pre", 0, 0), 12)
    with pytest.raises(InputError, match="layers 0 to 2 of units 0 to 191"):
        check_units(bridge, [Unit("mlp.hook_pre", 0, 192)])
    with pytest.raises(HookNameError, match="mlp.hook_pre"):
        check_units(bridge, [Unit("mlp.hook_pree", 0, 0)])


@pytest.mark.parametrize(
    ("responses", "arguments", "said"),
    [
        ({}, {}, "responses is empty"),
        ({"blocks.0.mlp.hook_pre": {"a": torch.ones(2, 3)}}, {}, "only 'a'"),
        (
            {"blocks.0.mlp.hook_pre": {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}},
            {"labels": ["c"]},
            "labels asks for",
        ),
        ({"blocks.0.mlp.hook_pre": {"a": torch.ones(2, 3), "b": torch.ones(0, 3)}}, {}, "no negative"),
        ({"blocks.0.mlp.hook_pre": {"a": torch.ones(2, 3), "b": torch.ones(2, 3) * torch.nan}}, {}, "finite"),
        (
            {
                "blocks.0.mlp.hook_pre": {"a": torch.ones(2, 3), "b": torch.ones(2, 3)},
                "blocks.1.mlp.hook_pre": {"a": torch.ones(2, 3)},
            },
            {},
            "and others of",
        ),
    ],
)
def test_responses_that_cannot_be(responses: Any, arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        expertise(responses, **arguments)


# -- published files ---------------------------------------------------------------------------------------------------

CFG = TransformerBridgeConfig(d_model=48, n_layers=3, n_heads=4, d_vocab=97, d_head=12, n_ctx=64)


def test_language_neurons_as_published(tmp_path: Path) -> None:
    """List by language of list by layer of LongTensor, empty layers and shared neurons among them."""
    sizes = [[3, 0, 5], [0, 0, 0], [1, 2, 3]]
    generator = torch.Generator().manual_seed(0)
    held = [[torch.randperm(192, generator=generator)[:size].sort().values for size in layers] for layers in sizes]
    torch.save(held, tmp_path / "x.neuron.pth")
    found = read_language_neurons(tmp_path / "x.neuron.pth", ["en", "zh", "fr"], n_layers=3, d_mlp=192)
    assert list(found) == ["en", "zh", "fr"]
    assert [len(neurons) for neurons in found.values()] == [8, 0, 6]
    for (_, neurons), layers in zip(found.items(), held, strict=True):
        assert [(layer, index) for layer, indices in enumerate(layers) for index in indices.tolist()] == list(neurons)
    assert len(BLOOM_LANGUAGES) == 6


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"en": 1}, "holds a dict"),
        ([[torch.tensor([1])]], "neurons of 1 languages"),
        ([[torch.tensor([1])], [torch.tensor([1]), torch.tensor([2])]], "layers; expected 3"),
        ([[torch.tensor([1.0])] * 3] * 2, "torch.float32"),
        ([[torch.tensor([[1]])] * 3] * 2, "\\(1, 1\\)"),
        ([[3, 4, 5]] * 2, "holds int"),
        ([[torch.tensor([1, 1])] * 3] * 2, "lists a neuron twice"),
        ([[torch.tensor([192])] * 3] * 2, "neuron 192, and the model has 0 to 191"),
        ([[torch.tensor([-1])] * 3] * 2, "neuron -1"),
    ],
)
def test_neuron_files_that_are_none(held: Any, said: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "x.pth")
    with pytest.raises(InputError, match=said):
        read_language_neurons(tmp_path / "x.pth", ["en", "zh"], n_layers=3, d_mlp=192)


class Planted:
    """What a malicious file holds: a call of a function of its choice."""

    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_a_file_that_would_run_code_is_not_loaded(tmp_path: Path, capsys: Any) -> None:
    torch.save([[Planted()]], tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"not a file")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.writestr("a", "b")
    for name in ("x.pth", "y.pth", "z.pth"):
        with pytest.raises(InputError, match="not loaded"):
            read_language_neurons(tmp_path / name, ["en"])
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        read_language_neurons(tmp_path / "nothing.pth", ["en"])


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(**changes: Any) -> dict[str, Any]:
    plain = {"ap": 0.9, "off_mean": 0.1, "on_p50": 0.5, "on_p90": 0.7, "layer": "transformer.h.1.mlp.dense_h_to_4h"}
    return plain | {"unit": 7, "uuid": 1, "concept": "de", "group": "sense"} | changes


def test_expertise_as_published(tmp_path: Path) -> None:
    rows = [
        row(),
        row(layer="transformer.h.2.self_attention.query_key_value:0", unit=40, ap=0.2),
        row(layer="h.0.self_attention.dense", unit=3, on_p50=-1.0),
        row(layer="transformer.h.0.mlp.dense_4h_to_h", unit=47, ap=0.95),
    ]
    experts = read_expertise(write_table(tmp_path / "e.csv", rows), CFG)
    assert experts.labels == ("de",)
    # 40 = head 1 (36 to 71), the first of its three parts, dimension 4: query index 1 * 12 + 4.
    assert experts.units == [
        Unit("mlp.hook_pre", 1, 7),
        Unit("attn.hook_q", 2, 16),
        Unit("hook_attn_out", 0, 3),
        Unit("hook_mlp_out", 0, 47),
    ]
    assert experts.best("de", 1, "both") == [Unit("hook_mlp_out", 0, 47), Unit("attn.hook_q", 2, 16)]
    assert experts.values("de", [Unit("hook_attn_out", 0, 3)]) == [-1.0]
    bare = [{key: value for key, value in entry.items() if not key.startswith(("on", "off"))} for entry in rows]
    short = read_expertise(write_table(tmp_path / "f.csv", bare), CFG, label="German")
    assert short.labels == ("German",)
    with pytest.raises(InputError, match="finite"):
        short.forced("German", 1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"ap": 1, "unit": 2}], "no column 'layer'"),
        ([row(layer="model.layers.3.mlp.gate_proj")], "line 2: 'model.layers.3.mlp.gate_proj' is no linear layer"),
        ([row(), row(unit="x")], "line 3: invalid literal"),
        ([row(unit=192)], "features 0 to 191; found layer 1, unit 192"),
        ([row(layer="transformer.h.3.mlp.dense_h_to_4h")], "layers 0 to 2"),
        ([row(ap=1.5)], "found '1.5'"),
        ([row(ap="")], "found ''"),
        ([row(), row()], "lists a unit twice"),
        ([row(), row(unit=8, concept="fr")], "2 concepts \\(de, fr\\)"),
    ],
)
def test_tables_that_are_none(rows: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_expertise(write_table(tmp_path / "e.csv", rows), CFG)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00bad")
    (tmp_path / "b.csv").write_text("ap,layer,unit\n", "utf-8")
    with pytest.raises(InputError, match="UTF-8"):
        read_expertise(tmp_path / "a.csv", CFG)
    with pytest.raises(InputError, match="no rows"):
        read_expertise(tmp_path / "b.csv", CFG)
    with pytest.raises(FileNotFoundError):
        read_expertise(tmp_path / "c.csv", CFG)
