"""Directions: how they are made, against plain forwards; whose they are; files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import HookNameError, InputError, PellucidError, StoreError
from pellucid.steering import (
    Add,
    Clamp,
    Direction,
    Edit,
    Origin,
    ProjectOut,
    Replace,
    Resample,
    Samples,
    Scale,
    Steering,
    Zero,
    contrast_pairs,
    difference_of_means,
    direction_of,
    mean_activation,
    sample_activations,
)
from tests.families import make_family, of_each_layout
from tests.models import make_bloom, random_tokens


def rows(count: int, seed: int) -> list[Tensor]:
    """Token ids of rows of different lengths."""
    ids = random_tokens(count, 9, seed)
    return [ids[row, : 3 + row % 6] for row in range(count)]


GOOD, BAD = rows(5, 1), rows(4, 2)


def one_by_one(bridge: TransformerBridge, texts: list[Tensor], name: str, position: Any) -> Tensor:
    """``[text, *features]``: each text alone, by Hugging Face's forward under a hook that looks."""
    found = []
    for text in texts:
        _, cache = bridge.run_with_cache(text[None], names_filter=name)
        values = cache[name][0].double()
        found.append(values.mean(0) if position == "mean" else values[-1 if position == "last" else position])
    return torch.stack(found)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge(make_family("llama"))


@pytest.mark.parametrize("position", ["last", "mean", 1, -2])
@pytest.mark.parametrize(
    ("site", "hook"), [("resid_post", "hook_resid_post"), ("z", "attn.hook_z"), ("mlp_post", "mlp.hook_post")]
)
def test_a_difference_of_means(bridge: TransformerBridge, site: str, hook: str, position: Any) -> None:
    """Batches of rows of different lengths, padded, against each text alone: equal but for rounding of other shapes."""
    found = difference_of_means(bridge, GOOD, BAD, site, [0, 2], position, batch_size=3, name="good")
    for layer in (0, 2):
        name = f"blocks.{layer}.{hook}"
        wanted = one_by_one(bridge, GOOD, name, position).mean(0) - one_by_one(bridge, BAD, name, position).mean(0)
        assert (found.at(layer) - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-6
    assert (found.origin.site, found.layers, found.origin.name) == (hook, (0, 2), "good")
    assert found.origin.made_by == {"by": "difference_of_means", "positive": 5, "negative": 4, "position": position}


@pytest.mark.parametrize("name", of_each_layout())
def test_directions_of_each_layout(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    found = difference_of_means(bridge, GOOD[:3], BAD[:3], layers=[1], batch_size=3)
    wanted = one_by_one(bridge, GOOD[:3], "blocks.1.hook_resid_post", "last").mean(0)
    wanted = wanted - one_by_one(bridge, BAD[:3], "blocks.1.hook_resid_post", "last").mean(0)
    assert (found.at(1) - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-6


def test_no_more_of_the_model_is_run_than_is_looked_at() -> None:
    bridge = TransformerBridge(make_bloom())
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(bridge.hf_model.transformer.h)
    ]
    difference_of_means(bridge, iter(GOOD), iter(BAD), layers=0, batch_size=5)
    for handle in handles:
        handle.remove()
    assert ran == [0, 0]


def test_contrast_pairs(bridge: TransformerBridge) -> None:
    pairs = list(zip(rows(6, 3), rows(6, 4), strict=True))
    name = "blocks.1.hook_resid_post"
    differences = one_by_one(bridge, [a for a, _ in pairs], name, "last") - one_by_one(
        bridge, [b for _, b in pairs], name, "last"
    )
    mean = contrast_pairs(bridge, pairs, layers=1, batch_size=2)
    assert (mean.at() - differences.mean(0)).abs().max() < 1e-5
    principal = contrast_pairs(bridge, iter(pairs), layers=[1], method="principal", batch_size=4)
    assert float(principal.norms) == pytest.approx(1, abs=1e-6)
    decomposition = pytest.importorskip("sklearn.decomposition")
    both = torch.cat([differences / 2, -differences / 2]).numpy()  # each pair about its middle
    component = decomposition.PCA(n_components=1, svd_solver="full").fit(both).components_[0]
    component *= np.sign(component @ differences.mean(0).numpy())
    assert np.abs(principal.at().numpy() - component).max() < 1e-4


def test_means_and_samples(bridge: TransformerBridge) -> None:
    name = "blocks.2.attn.hook_z"
    wanted = one_by_one(bridge, GOOD, name, "mean")
    assert (mean_activation(bridge, GOOD, "z", 2).at() - wanted.mean(0)).abs().max() < 1e-5
    samples = sample_activations(bridge, GOOD, "z", 2, "mean", batch_size=2)
    assert samples.values.shape == (1, 5, 6, 8)
    assert (samples.at() - wanted).abs().max() < 1e-5


def test_texts_begin_as_the_tokenizer_says(demo: TransformerBridge) -> None:
    texts = ["Everyone has the right", "No one shall"]
    name = "blocks.1.hook_resid_post"
    for bos in (None, True):
        tokens = [demo.to_tokens(text, prepend_bos=bos)[0] for text in texts]
        wanted = one_by_one(demo, tokens, name, "last").mean(0)
        found = mean_activation(demo, texts, layers=1, position="last", prepend_bos=bos).at()
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_vectors_of_ones_own(bridge: TransformerBridge) -> None:
    own = torch.randn(48)
    direction = direction_of(bridge, own, layers=[1, 2], name="probe")
    assert torch.equal(direction.vectors, own.expand(2, 48))
    assert torch.equal(direction_of(bridge, torch.stack([own, -own]), layers=[0, 2]).at(2), -own)
    assert torch.equal(direction_of(bridge, torch.stack([own, -own]), layers=[2, 0]).at(2), own)
    assert direction.unit().norms.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert torch.equal((-direction).at(1), -own)
    assert direction.only(2).layers == (2,)
    assert direction_of(bridge, own, "hook_embed").layers is None
    grown = direction_of(bridge, own.requires_grad_(), layers=1)
    assert grown.vectors.requires_grad


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_a_direction_of_another_model_is_refused() -> None:
    here, other = (TransformerBridge(make_bloom()) for _ in range(2))
    direction = direction_of(here, torch.ones(48), layers=1, name="ones")
    steering = Steering(Edit(Add(direction)))
    with steering.on(other):  # a copy with equal weights is the same model
        other(random_tokens())
    with torch.no_grad():
        other.hf_model.transformer.ln_f.bias[0] += 1
    with pytest.raises(InputError, match=r"'ones' is of another model: .*weights.*for_model"), steering.on(other):
        pass
    for bridge in (TransformerBridge(make_bloom(torch.bfloat16)), TransformerBridge(make_family("llama"))):
        with pytest.raises(InputError, match="of another model"), steering.on(bridge):
            pass
    with Steering(Edit(Add(direction.for_model(other)))).on(other):
        other(random_tokens())
    small = TransformerBridge(make_bloom(hidden_size=32))
    with pytest.raises(InputError, match="of another model: .* Make it anew of this model.$"), steering.on(small):
        pass
    with pytest.raises(InputError, match=r"d_model 48.*d_model 32"):
        direction.for_model(small)


def test_a_direction_of_another_place_is_refused(bridge: TransformerBridge) -> None:
    several, one = (direction_of(bridge, torch.ones(48), layers=layers) for layers in ([0, 1], 1))
    for edit, words in (
        (Edit(Add(several), "mlp_post"), r"d_model 48.*blocks.0.mlp.hook_post of .* has \[d_mlp 80\]"),
        (Edit(Add(several), layers=[1, 2]), r"vectors of the layers \[0, 1\]; layer 2"),
        (Edit(Add(one), "pattern"), r"has no vector of features"),
    ):
        with pytest.raises(InputError, match=words), Steering(edit).on(bridge):
            pass
    with Steering(Edit(Add(one), "resid_pre", [0, 2])).on(bridge):  # one vector goes anywhere in the stream
        bridge(random_tokens())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_direction_is_saved_and_loaded(bridge: TransformerBridge, tmp_path: Path) -> None:
    direction = difference_of_means(bridge, GOOD, BAD, "z", [0, 1], name="good")
    direction.save(tmp_path / "good.safetensors")
    loaded = Direction.load(tmp_path / "good.safetensors")
    assert torch.equal(loaded.vectors, direction.vectors)
    assert loaded.origin == direction.origin
    first = (tmp_path / "good.safetensors").read_bytes()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    samples = sample_activations(bridge, GOOD, layers=1)
    samples.save(tmp_path / "samples.safetensors")
    assert torch.equal(Samples.load(tmp_path / "samples.safetensors").values, samples.values)
    with pytest.raises(StoreError, match="holds samples; direction was asked for"):
        Direction.load(tmp_path / "samples.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(first[:-3])
    with pytest.raises(StoreError, match="cut off"):
        Direction.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="give it that ending"):
        direction.save(tmp_path / "good.bin")


def test_steering_is_saved_and_loaded(bridge: TransformerBridge, tmp_path: Path) -> None:
    """Every change and every form of place; loaded, it gives the same bits."""
    direction = difference_of_means(bridge, GOOD, BAD, layers=[0, 1])
    steering = Steering(
        [
            Edit(Add(direction, 0.5), positions="last"),
            Edit(Scale(0.9), "resid_post", 2, slice(-3, None)),
            Edit(Clamp(high=2.0), "blocks.*.hook_mlp_out", positions=[0, -1]),
            Edit(Zero(), "z", 1, heads=[0, 2]),
            Edit(Replace(torch.ones(2)), "mlp_post", 0, 3, neurons=[1, 4]),
            Edit(Resample(sample_activations(bridge, GOOD, layers=2), seed=3), positions=slice(0, 8, 3)),
            Edit(ProjectOut(direction), steps=None),
            Edit(Add(1.0), "resid_pre", 0, steps=slice(1, None)),
        ]
    )
    path = tmp_path / "all.safetensors"
    steering.save(path)
    loaded = Steering.load(path)
    tokens = random_tokens()
    with torch.no_grad():
        outputs = []
        for each in (steering, loaded):
            with each.on(bridge, assert_effect=False):
                outputs.append(
                    torch.cat([bridge(tokens).flatten(), bridge.generate(tokens, 3, do_sample=False).flatten()])
                )
    assert torch.equal(*outputs)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(StoreError, match="holds steering; direction"):
        Direction.load(path)


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"positive": []}, "positive is empty"),
    ({"negative": iter(())}, "negative is empty"),
    ({"positive": "Everyone"}, "positive is a list of texts"),
    ({"positive": ["Everyone"]}, "need a tokenizer"),
    ({"positive": [[1, 2], []]}, "positive: entry 1 is neither a text nor token ids"),
    ({"positive": [[1.5]]}, "entry 0 is neither"),
    ({"positive": ["a", [1]]}, "texts and token ids"),
    ({"positive": [[1, 999]]}, "999"),
    ({"position": 7}, r"positive: text 0 has 3 tokens; position 7 was asked for"),
    ({"position": -4, "positive": GOOD[1:]}, "negative: text 0 has 3 tokens; position -4"),
    ({"position": "first"}, "Invalid position: 'first'"),
    ({"at": "nothing"}, "No site is called 'nothing'"),
    ({"at": "pattern"}, "has no vector of features"),
    ({"layers": 9}, "layers: there are 3"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"prepend_bos": True}, "prepend_bos is for texts"),
    ({"name": 3}, "name is a string"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_refused(bridge: TransformerBridge, place: int) -> None:
    given, words = REFUSED[place]
    with pytest.raises(PellucidError, match=words):
        difference_of_means(bridge, **{"positive": GOOD, "negative": BAD, **given})
    assert not bridge.live_hooks()


def test_vectors_that_are_none_are_refused(bridge: TransformerBridge) -> None:
    wrong = torch.ones(48)
    wrong[3] = float("nan")
    for vectors, words in (
        (wrong, "1 of 48 numbers are NaN|of 144 numbers are NaN"),
        (torch.full((48,), float("inf")), "infinite"),
        (torch.ones(47), r"d_model\] = \(48,\)"),
        (torch.ones(2, 48), r"found shape \(2, 48\)"),
        (torch.ones(48, dtype=torch.long), "floating-point"),
        ([1.0], "vectors is a tensor"),
    ):
        with pytest.raises(InputError, match=words):
            direction_of(bridge, vectors)
    with pytest.raises(HookNameError):
        direction_of(bridge, torch.ones(48), "nothing")
    for change, words in (
        (lambda: Add(wrong), "Add: vector: 1 of 48 numbers are NaN"),
        (lambda: ProjectOut(torch.zeros(48)), "points nowhere"),
        (lambda: direction_of(bridge, torch.zeros(48)).unit(), "points nowhere"),
        (lambda: direction_of(bridge, torch.ones(48)).at(9), "layer 9 was asked for"),
        (
            lambda: Direction(torch.ones(2, 48), Origin("hook_resid_post", ("d_model",), (0,))),
            "2 layers; its origin names 1",
        ),
        (lambda: contrast_pairs(bridge, [([1], [2], [3])]), "entry 0 is no pair"),
        (lambda: contrast_pairs(bridge, []), "pairs is empty"),
        (lambda: contrast_pairs(bridge, [], method="x"), "Invalid method"),
    ):
        with pytest.raises(InputError, match=words):
            change()
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        mean_activation(bridge, GOOD)
    bridge.eval()
