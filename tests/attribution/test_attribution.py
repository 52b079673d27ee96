"""Results of attribution patching: cells and units of patching, the experiment, pairs, going on after an interrupt, refusals."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomBlock

from pellucid import TransformerBridge
from pellucid.analysis.labelled import data_set_from_document, data_set_to_document
from pellucid.attribution import AttributionPatching, attribution_patching
from pellucid.attribution.checking import CHI_SQUARE, SUBSETS, choose, false_negative_bound
from pellucid.attribution.estimates import Estimator, gauss_legendre
from pellucid.attribution.resampling import draw_counts, mean_effects, mean_jaccard, means_of, spearman, stability_of
from pellucid.attribution.streaming import PairStream
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo import load_demo_bridge
from pellucid.errors import GradientError, InputError, OtherJobError, PellucidWarning, UnsupportedModelError
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.pairs import pair_batches
from pellucid.sweep import KLDivergence, LogitDifference, LogProbability, Normalized
from tests.attribution.cases import METRIC, bridge_of, cells, pair, score
from tests.models import make_bloom, random_tokens

N_PAIRS = 6


def make_pairs(count: int = N_PAIRS, lengths: tuple[int, ...] = (7,)) -> PromptPairs:
    rows = []
    for number in range(count):
        clean = random_tokens(1, lengths[number % len(lengths)], seed=10 + number)[0].tolist()
        corrupted = [*clean]
        corrupted[2] = (clean[2] + 7) % 97
        rows.append({"clean": clean, "corrupted": corrupted, "answer": 5 + number, "foil": 40})
    return PromptPairs.from_rows(rows)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return bridge_of("bloom")


# -- cells and units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "by", "options"),
    [
        ("bloom", "z", ("head", "layer"), {}),
        ("bloom", "resid_pre", ("layer", "pos"), {"layers": [0, 2], "positions": [1, 3]}),
        ("bloom", "pattern", ("layer", "head", "pos", "key_pos"), {"heads": [2, 0], "layers": 1}),
        ("bloom", "mlp_post", ("layer", "neuron"), {"neurons": 50, "positions": [3, 5]}),
        ("bloom", "embed", "pos", {}),
        ("bloom", "result", ("layer", "head"), {}),
        ("llama", "v", ("layer", "head", "pos"), {"layers": [1]}),
        ("llama", "k", ("layer", "head"), {"heads": [1]}),
        ("gemma2", "mlp_out", ("pos", "layer"), {}),
    ],
)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_cells_are_those_of_patching(
    name: str, site: str, by: Any, options: dict[str, Any], direction: Any
) -> None:
    """Axes, coordinates, unit, and what is measured; every estimate is the sum of products over what an edit reaches."""
    bridge, (clean, corrupted) = bridge_of(name), pair()
    given: dict[str, Any] = {"direction": direction, **options}
    expected = activation_patching(bridge, clean, corrupted, METRIC, site, by, **given)
    found = attribution_patching(bridge, clean, corrupted, METRIC, site, by, method="atp", check=1000, **given)
    assert isinstance(found, xr.Dataset)
    assert found.effect.dims == expected.dims
    for coord in expected.coords:
        assert found.coords[coord].equals(expected.coords[coord])
    assert found.attrs["units"] == expected.attrs["units"]
    assert found.attrs["base_run"] == expected.attrs["base_run"]
    assert found["effect"].attrs == {name: expected.attrs[name] for name in ("base_run", "differs")}
    unedited = 0.0 if direction == "denoising" else 1.0
    assert np.abs(found.patched.values - (expected.values - unedited)).max() < 1e-9


def test_an_estimate_is_the_sum_of_products(bridge: TransformerBridge) -> None:
    """Against plain torch: activations and gradients by a backward pass of our own over the bridge's run."""
    clean, corrupted = pair()
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        tensor.retain_grad()
        kept[hook.name] = tensor

    names = ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
    score(bridge.run_with_hooks(corrupted, fwd_hooks=[(name, keep) for name in names])).sum().backward()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        gap = float((score(bridge(clean)) - score(bridge(corrupted))).mean())
    products = {name: ((cache[name] - kept[name]) * kept[name].grad).detach() for name in names}
    z = attribution_patching(bridge, clean, corrupted, METRIC, "z", ("layer", "head"), method="atp", check=0)
    expected = products[names[0]].sum((1, 3)).mean(0) / gap
    assert np.abs(z.effect.sel(layer=1).values - expected.numpy()).max() < 1e-12
    neurons = attribution_patching(
        bridge,
        clean,
        corrupted,
        METRIC,
        "mlp_post",
        ("neuron", "layer"),
        method="atp",
        check=0,
        neurons=7,
        positions=[3, 4],
    )
    by_neuron = products[names[1]][:, [3, 4]].sum(1).mean(0) / gap
    groups = torch.stack([part.sum() for part in by_neuron.split(7)])
    assert np.abs(neurons.effect.sel(layer=1).values - groups.numpy()).max() < 1e-12


@pytest.mark.parametrize(
    ("site", "by", "options"),
    [
        ("z", ("head", "layer"), {"positions": [1, 4]}),
        ("mlp_post", ("layer", "neuron"), {"neurons": 50}),
        ("pattern", ("layer", "pos", "key_pos"), {"heads": [1]}),
        ("resid_pre", ("pos", "layer"), {"layers": [1, 2]}),
        ("embed", "pos", {}),
    ],
)
def test_cells_spread_over_activations_are_what_was_summed(
    bridge: TransformerBridge, site: str, by: Any, options: dict[str, Any]
) -> None:
    """Numbers of chosen cells' places alone sum to those cells; all cells' to what an edit of everything reaches."""
    where = cells(bridge, site, by, **options)
    sizes = bridge.cfg.sizes(1, 7, 7)
    chosen = torch.rand(where.cells.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = where.spread(chosen, sizes)
    numbers = {
        layer: torch.rand([sizes[axis] for axis in spec.axes], dtype=torch.float64)
        for layer, spec in where.specs.items()
    }
    whole = where.summed(numbers)
    masked = where.summed({layer: numbers[layer] * masks[spec.name] for layer, spec in where.specs.items()})
    assert torch.allclose(masked, whole * chosen, atol=1e-12)
    assert float(
        sum((numbers[layer] * masks[spec.name]).sum() for layer, spec in where.specs.items())
    ) == pytest.approx(float((whole * chosen).sum()))


def test_several_sites_and_methods_in_one_pass(bridge: TransformerBridge) -> None:
    pairs, sites = make_pairs(2), ["z", "mlp_out"]
    together = attribution_patching(
        bridge, pairs, site=sites, method=["atp", "relp"], by={"z": ("layer", "pos", "head")}
    )
    assert isinstance(together, dict)
    assert [name for name, found in together.items() if found.effect.dims[0] == "estimator"] == sites
    for site, method in itertools.product(sites, ("atp", "relp")):
        by = ("layer", "pos", "head") if site == "z" else None
        alone = attribution_patching(bridge, pairs, site=site, method=method, by=by, check=0)
        assert isinstance(alone, xr.Dataset)
        assert np.abs(alone.effect.values - together[site].effect.sel(estimator=method).values).max() < 1e-9


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_the_best_and_a_sample_are_patched(bridge: TransformerBridge) -> None:
    pairs = make_pairs(2)
    found = attribution_patching(bridge, pairs, site="mlp_post", by=("layer", "neuron"), method="atp", check=5)
    assert isinstance(found, xr.Dataset)
    patched = found.patched.values.ravel()
    done = np.flatnonzero(np.isfinite(patched))
    effect = found.effect.values.ravel()
    assert set(np.argsort(-np.abs(effect))[:5]) <= set(done)
    assert len(done) == 10 == found.attrs["checked_best"] + found.attrs["checked_at_random"]
    assert found.attrs["pearson"] == pytest.approx(np.corrcoef(effect[done], patched[done])[0, 1])
    others = np.setdiff1d(done, np.argsort(-np.abs(effect))[:5])
    assert found.attrs["largest_in_sample"] == pytest.approx(np.abs(patched[others]).max())
    # The bound is of all cells: an experiment on every one of them finds none beyond.
    everything = attribution_patching(bridge, pairs, site="mlp_post", by=("layer", "neuron"), method="atp", check=576)
    left = np.setdiff1d(np.arange(len(effect)), done)
    assert np.abs(everything.patched.values.ravel()[left]).max() < found.attrs["false_negative_bound"]
    assert np.isnan(everything.attrs["false_negative_bound"])
    same = everything.patched.values.ravel()[done]
    assert np.abs(same - patched[done]).max() < 1e-12


def test_a_bound_on_what_adds() -> None:
    """Effects that add: twice the deviation of random halves is the root of the sum of squares, and not less than the largest."""
    effects, generator = np.random.default_rng(0).normal(size=200), np.random.default_rng(1)
    below = 0
    for _ in range(200):
        halves = (generator.random((SUBSETS, 200)) < 0.5) @ effects
        below += false_negative_bound(halves) < np.sqrt((effects**2).sum())
    assert below / 200 < 0.09  # 5 %, and two standard errors of a share of 200
    from scipy.stats import chi2

    assert pytest.approx(chi2.ppf(0.05, SUBSETS - 1), abs=1e-3) == CHI_SQUARE


def test_low_agreement_is_said_first(bridge: TransformerBridge) -> None:
    pairs = make_pairs()
    bad = attribution_patching(bridge, *pair(), METRIC, site="resid_pre", method="atp")
    good = attribution_patching(bridge, pairs, site="mlp_out", by=("layer", "pos"), layers=[-1], method="ig")
    unchecked = attribution_patching(bridge, pairs, site="resid_pre", method="relp", check=0)
    assert bad.attrs["pearson"] < 0.7
    assert bad.attrs["summary"].startswith("LOW AGREEMENT")
    assert good.attrs["pearson"] > 0.9
    assert good.attrs["summary"].startswith("integrated gradients of mlp_out")
    assert unchecked.attrs["summary"].startswith("Not checked")
    assert "patched" not in unchecked


def test_what_is_chosen() -> None:
    where = cells(bridge_of("bloom"), "mlp_post", ("layer", "neuron"))
    n_cells = int(np.prod(where.cells.shape))
    one, other = np.zeros(n_cells), np.zeros(n_cells)
    one[[3, 9]], other[[9, 20]] = (-5, 1), (1, 2)
    chosen = choose(where, [one, other], 2, seed=0)
    assert chosen.best == [3, 9, 20]
    assert len(chosen.sample) == 2
    assert not set(chosen.sample) & set(chosen.best)
    assert not chosen.halves[:, chosen.cells].any()
    assert 0.4 < float(chosen.halves.sum(1).float().mean()) / (n_cells - 5) < 0.6


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_resampled_pairs(bridge: TransformerBridge) -> None:
    pairs = make_pairs()
    found = attribution_patching(bridge, pairs, site="z", method="atp", rows="each", check=0, seed=3, normalize=False)
    assert isinstance(found, xr.Dataset)
    each = found.effect_of_pair.values
    assert each.shape == (3, 4, N_PAIRS)
    assert np.abs(each.mean(-1) - found.effect.values).max() < 1e-12
    counts = draw_counts(N_PAIRS, 100, 3)
    assert (counts.sum(1) == N_PAIRS).all()
    # With replacement: a pair is in a draw a binomial number of times, of variance 1 - 1/n.
    assert draw_counts(N_PAIRS, 10_000, 3).var() == pytest.approx(1 - 1 / N_PAIRS, rel=0.03)
    means = np.array([[(count * cell).sum() / N_PAIRS for count in counts] for cell in each.reshape(-1, N_PAIRS)])
    assert np.abs(means.std(1, ddof=1).reshape(3, 4) - found.standard_error.values).max() < 1e-12
    alone = attribution_patching(bridge, pairs[:1], site="z", method="atp")
    assert np.isnan(alone.standard_error.values).all()


def test_stability_by_hand() -> None:
    generator = np.random.default_rng(0)
    effects = generator.normal(size=(12, 30)) + np.linspace(0, 3, 30)
    spans = generator.uniform(1, 2, size=12)
    found = stability_of(effects, spans, 40, 5, seed=1)
    counts = draw_counts(12, 40, 1)
    means = (counts @ effects) / (counts @ spans)[:, None]
    assert np.abs(found.standard_error - means.std(0, ddof=1)).max() < 1e-12
    tops = [set(np.argsort(-np.abs(row))[:5]) for row in means]
    expected = np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(tops, 2)])
    assert found.jaccard == pytest.approx(expected)
    assert mean_jaccard(np.array([[1, 2], [1, 2], [3, 4]])) == pytest.approx(1 / 3)
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 4, 9])) == pytest.approx(1)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert np.abs(mean_effects(effects, None)[0] - effects.mean(0)).max() < 1e-12


@pytest.mark.parametrize("spans", [None, np.array([-1.7])])
def test_means_of_one_pair_have_the_bits_of_any_mean(spans: Any) -> None:
    """No product is taken of a single pair; a zero loses its sign all the same, as in a sum."""
    effects = np.random.default_rng(0).normal(size=(2, 1, 40)).astype(np.float32)
    effects[:, 0, :3] = [-0.0, 0.0, np.nan]
    expected = np.concatenate([mean_effects(each.astype(np.float64), spans) for each in effects])
    assert means_of(list(effects), spans).tobytes() == expected.tobytes()


def test_pairs_of_several_lengths(bridge: TransformerBridge) -> None:
    pairs = make_pairs(lengths=(7, 9))
    found = attribution_patching(bridge, pairs, rows="each", normalize=False, batch_size=2, check=2)
    for row in range(N_PAIRS):
        alone = attribution_patching(bridge, pairs[[row]], site="z", method="relp", check=0, normalize=False)
        assert np.abs(found.effect_of_pair.isel(pair=row).values - alone.effect.values).max() < 1e-12
    with pytest.raises(InputError, match="7, 9 tokens.*leave pos out"):
        attribution_patching(bridge, pairs, site="resid_pre")
    with pytest.raises(InputError, match="7, 9 tokens"):
        attribution_patching(bridge, pairs, positions=[1])


def test_batches_change_nothing_but_rounding(bridge: TransformerBridge) -> None:
    pairs = make_pairs()
    one, other = (
        attribution_patching(bridge, pairs, site="z", method="atp*", batch_size=size, check=3) for size in (2, 6)
    )
    for name in ("effect", "standard_error", "patched"):
        worst = np.nanmax(np.abs(one[name].values - other[name].values))
        assert worst < 1e-9 * np.nanmax(np.abs(one[name].values))


@pytest.mark.parametrize("stop", [2, 5])
def test_an_interrupted_pass_goes_on_with_equal_bits(
    bridge: TransformerBridge, tmp_path: Path, monkeypatch: Any, stop: int
) -> None:
    """Interrupted after so many batches, three of estimates and three of patching."""
    asked = AttributionPatching(bridge, make_pairs(), site="z", method=("atp", "relp"), batch_size=2, check=1)
    expected = asked.run()
    seen: list[int] = []
    after = PairStream._after_batch

    def interrupt(self: PairStream) -> None:
        seen.append(1)
        if len(seen) == stop:
            raise KeyboardInterrupt
        after(self)

    with monkeypatch.context() as patch:
        patch.setattr(PairStream, "_after_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            asked.run(checkpoint=tmp_path, every=0)
    seen.clear()
    ran: list[int] = []
    estimate = Estimator.estimate
    monkeypatch.setattr(Estimator, "estimate", lambda *given: ran.append(1) or estimate(*given))
    found = asked.run(checkpoint=tmp_path)
    assert len(ran) == max(0, 3 - (stop - 1))
    assert isinstance(found, xr.Dataset)
    assert found.identical(expected)
    with pytest.raises(OtherJobError, match=r"batch_size 2 \(asked for: 3\)"):
        AttributionPatching(bridge, make_pairs(), site="z", method=("atp", "relp"), batch_size=3, check=1).run(
            checkpoint=tmp_path
        )


# -- what a result says ------------------------------------------------------------------------------------------------


def test_a_result_is_saved_and_read(bridge: TransformerBridge, tmp_path: Path) -> None:
    found = attribution_patching(bridge, make_pairs(), site="z", method=["atp", "ig"], n_points=2, rows="each")
    assert isinstance(found, xr.Dataset)
    for value in found.attrs.values():
        entries = value if isinstance(value, list) else [value]
        assert all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in entries), value
    again = data_set_from_document(json.loads(json.dumps(data_set_to_document(found))))
    assert again.effect.equals(found.effect)
    assert again.attrs["pairs_sha256"] == make_pairs().content_hash
    table = found.effect.to_dataframe()
    assert table.loc[("ig", 2, 3), "effect"] == float(found.effect.sel(estimator="ig", layer=2, head=3))
    netcdf = pytest.importorskip("scipy.io", reason="scipy writes NetCDF")
    assert netcdf
    flat = found.drop_vars("estimator").assign_attrs({key: str(value) for key, value in found.attrs.items()})
    flat.to_netcdf(tmp_path / "found.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "found.nc", engine="scipy") as read:
        assert np.array_equal(read.effect.values, found.effect.values)
    said = found.attrs
    assert (said["effect"], said["base_run"], said["value"]) == (
        "(clean - corrupted) . gradient",
        "corrupted",
        "normalized",
    )
    assert said["expanded_at"].startswith("corrupted; ig: on the way")
    assert said["metric"] == "logit difference"


def test_a_plan_says_the_work(bridge: TransformerBridge, monkeypatch: Any) -> None:
    asked = AttributionPatching(bridge, make_pairs(), site=["q", "z"], method=["atp*", "ig"], batch_size=4, n_points=3)
    plan = asked.plan()
    assert (plan.pairs, plan.batches, plan.cells) == (6, 2, {"q": 12, "z": 12})
    ran: list[int] = []
    forward = BloomBlock.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(BloomBlock, "forward", counted)
    one = AttributionPatching(bridge, make_pairs(), site=["q", "z"], method=["atp*", "ig"], n_points=3, check=0)
    one.run()
    assert len(ran) == 3 * one.plan().forwards
    assert one.plan().forwards == plan.forwards // 2


def test_gauss_and_legendres_points() -> None:
    for count in (1, 2, 5):
        points = gauss_legendre(count)
        for power in range(2 * count):
            assert sum(weight * place**power for place, weight in points) == pytest.approx(1 / (power + 1))


def test_integrated_gradients_that_do_not_add_up_are_told() -> None:
    demo = load_demo_bridge()
    *ids, other = (torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:21] + 4).tolist()
    clean, corrupted = [*ids, *ids[:11]], [*ids[:10], other, *ids[11:], *ids[:11]]
    pairs = PromptPairs([clean], [corrupted], [ids[11]], [other])
    with pytest.warns(PellucidWarning, match="n_points=1 miss what patching a whole layer does by up to"):
        attribution_patching(demo, pairs, site="z", method="ig", n_points=1, layers=[0], check=0)
    attribution_patching(
        demo, pairs, site="z", method="ig", n_points=20, layers=[3], check=0
    )  # pytest fails at a warning


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_metrics_without_a_gradient(bridge: TransformerBridge) -> None:
    clean, corrupted = pair()
    for metric in (
        lambda logits: logits[:, -1].argmax(-1),
        lambda logits: logits[:, -1, 5].detach(),
        lambda logits: (logits[:, -1, 5] > logits[:, -1, 9]).double(),
    ):
        with pytest.raises(GradientError, match="has no gradient"):
            attribution_patching(bridge, clean, corrupted, metric)
    with pytest.raises(GradientError, match="has no gradient: it gave float"):
        attribution_patching(bridge, clean[:1], corrupted[:1], lambda logits: float(logits[0, -1, 5]))
    with pytest.raises(InputError, match=r"gives \[\] for 2 rows.*one number a row"):
        attribution_patching(bridge, clean, corrupted, lambda logits: logits[:, -1, 5].mean())
    with pytest.raises(InputError, match="metric is a class of metrics, a metric, or a function"):
        attribution_patching(bridge, clean, corrupted, {"a": METRIC})  # type: ignore[arg-type]


def test_a_divergence_is_not_expanded_at_its_own_reference(bridge: TransformerBridge) -> None:
    clean, corrupted = pair()
    with torch.no_grad():
        divergence = KLDivergence(bridge(clean))
    for metric in (divergence, Normalized(divergence, 2.0, 1.0)):
        with pytest.raises(GradientError, match="KLDivergence is 0 at the run that is patched"):
            attribution_patching(bridge, clean, corrupted, metric, direction="noising")
    found = attribution_patching(bridge, clean, corrupted, divergence, "mlp_out", method="ig", layers=[-1], n_points=40)
    assert found.attrs["pearson"] > 0.9


def test_prompts_of_different_lengths(bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match="clean of row 1 and corrupted of row 1 have different numbers of tokens"):
        attribution_patching(bridge, PromptPairs([[1, 2], [1, 2]], [[1, 3], [1, 2, 3]]), metric=METRIC)
    with pytest.raises(InputError, match="clean has 1 rows and corrupted 2|clean has 2 rows and corrupted 1"):
        attribution_patching(bridge, pair()[0], pair()[1][:1], METRIC)
    with pytest.raises(InputError, match="corrupted is missing"):
        attribution_patching(bridge, pair()[0], metric=METRIC)
    with pytest.raises(InputError, match="leave corrupted out"):
        attribution_patching(bridge, make_pairs(), pair()[1])


def test_a_sum_over_layers_means_nothing(bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match=r"leaves layer out.*Take by=\['layer', 'pos'\]"):
        attribution_patching(bridge, *pair(), METRIC, "resid_pre", "pos")
    with pytest.raises(InputError, match="by='group' names neurons of several layers"):
        attribution_patching(bridge, *pair(), METRIC, "mlp_post", "group", neurons={"a": {0: [1]}})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds token ids"):
        attribution_patching(bridge, *pair(), METRIC, "embed.hook_in", "pos")


@pytest.mark.parametrize("site", ["q", "k", "attn_scores"])
def test_relp_has_nothing_for_what_makes_the_pattern(bridge: TransformerBridge, site: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"nothing flows back to {site}.*'atp\\*'"):
        attribution_patching(bridge, *pair(), METRIC, site)
    assert attribution_patching(bridge, *pair(), METRIC, "pattern", ("layer", "head"), check=0).effect.values.any()


def test_a_norm_over_all_heads_is_not_taken_apart() -> None:
    bridge = bridge_of("olmo2")
    with pytest.raises(UnsupportedModelError, match="over all heads together: take the site q_normed"):
        attribution_patching(bridge, *pair(), METRIC, "q", method="atp*")
    together = attribution_patching(bridge, *pair(), METRIC, "q", ("layer", "pos"), method="atp*", check=0)
    assert together.effect.values.any()


def test_frozen_weights_do_and_quantised_ones_do_not() -> None:
    model = make_bloom()
    plain = attribution_patching(TransformerBridge(model), *pair(), METRIC, "z", check=0)
    model.requires_grad_(False)
    frozen = attribution_patching(TransformerBridge(model), *pair(), METRIC, "z", check=0)
    assert np.array_equal(plain.effect.values, frozen.effect.values)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    quantised = torch.ao.quantization.quantize_dynamic(make_bloom(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        GradientError,
        match="h.0.self_attention.query_key_value is quantised .*DynamicQuantized|query_key_value is quantised",
    ):
        attribution_patching(TransformerBridge(quantised), *pair(), METRIC, "z")


def test_runs_that_score_the_same_and_too_little_memory(bridge: TransformerBridge) -> None:
    clean, corrupted = pair()
    with pytest.raises(InputError, match="nothing between them"):
        attribution_patching(bridge, clean, clean, METRIC)
    with pytest.raises(InputError, match=r"take .* bytes, more than memory_limit=1,000"):
        attribution_patching(
            bridge, clean, corrupted, METRIC, "mlp_post", ("layer", "pos", "neuron"), memory_limit=1000
        )


def test_the_metric_of_a_data_set(bridge: TransformerBridge) -> None:
    """Each row's answer and foil are its own; without a foil the answer's log-probability is measured."""
    pairs = make_pairs()
    by_default, by_class = (
        attribution_patching(bridge, pairs, metric=metric, check=0) for metric in (None, LogitDifference)
    )
    assert np.array_equal(by_default.effect.values, by_class.effect.values)
    without = PromptPairs(pairs.clean, pairs.corrupted, pairs.answer)
    (batch,) = pair_batches(bridge, without)
    assert isinstance(batch.metric, LogProbability)
    assert list(batch.metric.answer) == list(pairs.answer or ())  # type: ignore[arg-type]
    order = random.Random(0).sample(range(N_PAIRS), N_PAIRS)
    shuffled = attribution_patching(bridge, pairs[order], check=0)
    assert np.abs(shuffled.effect.values - by_default.effect.values).max() < 1e-12
