"""Every analysis, statistic and command once in bfloat16 and float16, and casts to a dtype of a smaller range.

What an analysis finds is held against the same analysis of the float32 model with the same (rounded) weights. How far the two
may differ is measured on Hugging Face's own model: ``error`` is the largest difference of a logit between its forwards in
half precision and in float32. A score that is a sum of ``k`` logits, over the runs it compares, differs by ``k * error``;
twice that is allowed, because an edited run is another input than those it was measured on. Statistics are held against
numpy and scikit-learn on what Hugging Face's own module gives in the same dtype, to the bit where they count or choose.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import average_precision_score
from torch import Tensor

from pellucid import FactoredMatrix, TransformerBridge, patching
from pellucid.analysis.expert_neurons import expertise
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.neurons import add, force, scale
from pellucid.analysis.perplexity import log_perplexity, perplexity_change
from pellucid.corpora import Corpus
from pellucid.errors import InputError
from pellucid.experiments.ablation import Ablation, ablation
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.path_patching import path_patching
from pellucid.plots import TokenExample, examples_page, heat_map
from pellucid.running_stats import (
    AveragePrecision,
    CountPositive,
    Covariance,
    Histogram,
    MeanVariance,
    MinMax,
    Quantiles,
    TopK,
)
from pellucid.scale.harvest import harvest
from pellucid.scale.saelens import export_to_saelens
from pellucid.scale.stored_activations import StoredActivations
from pellucid.sweep import (
    Add,
    Edit,
    FromRun,
    KLDivergence,
    LogitDifference,
    LogProbability,
    NextTokenLoss,
    Normalized,
    Probability,
    SetTo,
    Sweep,
)
from tests.command_line import invoke
from tests.models import make_bloom, random_tokens

HALVES = (torch.bfloat16, torch.float16)
SIZES = {"hidden_size": 32, "n_head": 2, "n_layer": 2}
A, B = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
POST = "blocks.0.mlp.hook_post"


@dataclass(frozen=True)
class Pair:
    """A model in half precision, the float32 one with its weights, and Hugging Face's own difference between them."""

    half: TransformerBridge
    full: TransformerBridge
    error: float


@cache
def pair(dtype: torch.dtype) -> Pair:
    half = make_bloom(torch.float32, **SIZES).to(dtype)
    full = copy.deepcopy(half).float()
    tokens = random_tokens(64, 5, seed=7)
    with torch.no_grad():
        error = float((half(tokens).logits.float() - full(tokens).logits).abs().max())
    return Pair(TransformerBridge(half), TransformerBridge(full), error)


def numbers(found: Any) -> Tensor:
    return torch.as_tensor(found.values if isinstance(found, xr.DataArray) else found).double()


def corpus(packing: Any = "documents") -> Corpus:
    rows = {label: random_tokens(6, 8, seed=seed).tolist() for seed, label in enumerate(("a", "b"), 3)}
    return Corpus.from_tokens(rows, context=8, packing=packing)


# --------------------------------------------------------------------------------------------------------------------
# Analyses
# --------------------------------------------------------------------------------------------------------------------

DIFFERENCE = LogitDifference(3, 5)


def scalar(logits: Tensor) -> Tensor:
    """In the dtype of the logits."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def by_row(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def plain_number(logits: Tensor) -> float:
    return float(logits[0, -1, 3])


def own_loss(logits: Tensor) -> Tensor:
    return -logits[:, :-1].float().log_softmax(-1).gather(-1, A[:, 1:, None]).mean()


METRICS: dict[str, tuple[Any, int]] = {
    "logit difference": (DIFFERENCE, 2),
    "log-probability": (LogProbability(3), 2),
    "probability": (Probability(3), 2),
    "loss": (NextTokenLoss(), 2),
    "normalized": (Normalized(DIFFERENCE, 0.0, 1.0), 2),
    "a function giving one number": (scalar, 2),
    "a function giving one a row": (by_row, 2),
    "a function giving a float": (plain_number, 1),
    "a function giving float32": (own_loss, 2),
    "several": ({"ours": DIFFERENCE, "mine": scalar}, 2),
}
"""A metric, and of how many logits it is the sum. The rounding of a function's own subtraction is far below."""

SITES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "attn_scores"),
    *("result", "mlp_pre", "mlp_post", "embed", "ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale"),
    *("attn.q.hook_in", "hook_q_input", "hook_attn_in", "hook_mlp_in"),
)


def patched(metric: Any = DIFFERENCE, site: str = "resid_pre", **more: Any) -> Callable[[TransformerBridge], Any]:
    return lambda bridge: activation_patching(bridge, A, B, metric, site, normalize=False, progress=False, **more)


def ablated(metric: Any, site: str, how: Any) -> Callable[[TransformerBridge], Any]:
    return lambda bridge: ablation(bridge, A, metric, site, how=how, progress=False)


def by_path(metric: Any, receivers: str, freeze: bool, **more: Any) -> Callable[[TransformerBridge], Any]:
    return lambda bridge: path_patching(
        bridge, A, B, metric, "L0*", receivers, freeze_mlps=freeze, progress=False, **more
    )


def divergence(bridge: TransformerBridge) -> Any:
    with torch.no_grad():
        return patched(KLDivergence(bridge(B)))(bridge)


def like_transformer_lens(name: str, metric: Any, **more: Any) -> Callable[[TransformerBridge], Any]:
    def run(bridge: TransformerBridge) -> Any:
        function = getattr(patching, name)
        with torch.no_grad():
            clean, corrupted = bridge.run_with_cache(B)[1], bridge.run_with_cache(A)[1]
        if name == "get_act_patch_direct_path":
            return function(bridge, A, clean, corrupted, metric, 0, 1, verbose=False)
        if "direct_path" in name:
            return function(bridge, A, clean, corrupted, metric, verbose=False)
        return function(bridge, A, clean, metric, verbose=False, **more)

    return run


def result_of(method: str, *arguments: Any) -> Callable[[TransformerBridge], Any]:
    """What a ``PatchingResult`` says of itself."""

    def run(bridge: TransformerBridge) -> Any:
        made = like_transformer_lens("get_act_patch_attn_out", by_row, reduce="none", baseline=True)(bridge)
        found = getattr(made, method)(*arguments)
        return torch.stack(found) if isinstance(found, tuple) else found

    return run


def changed_loss(change: Callable[..., Any]) -> Callable[[TransformerBridge], Any]:
    neurons = {"a": [(0, 3), (1, 5)], "b": [(1, 1)]}
    return lambda bridge: perplexity_change(bridge, corpus(), neurons, change=change, progress=False)["change"]


def generated(**more: Any) -> Callable[[TransformerBridge], Any]:
    """The logits of the first step: later tokens may be others."""
    return lambda bridge: bridge.generate(
        A, 1, do_sample=False, verbose=False, output_logits=True, attention_mask=torch.ones_like(A), **more
    ).logits[0]


def gradient_size(bridge: TransformerBridge) -> Tensor:
    """The loss' change by a step along its gradient, as the gradient foretells it."""
    _, kept = bridge.run_with_cache(A, return_type="loss", incl_bwd=True, names_filter="blocks.0.hook_resid_pre")
    return kept["blocks.0.hook_resid_pre_grad"].double().norm()


def fast(bridge: TransformerBridge) -> Tensor:
    bridge.set_attn_implementation("sdpa")
    try:
        return bridge(A).detach()
    finally:
        bridge.set_attn_implementation("eager")


def processed(bridge: TransformerBridge) -> Tensor:
    bridge = TransformerBridge(copy.deepcopy(bridge.hf_model))
    bridge.process_weights()
    return bridge(A).detach().log_softmax(-1)


PATCHES = [name for name in dir(patching) if name.startswith("get_act_patch_")]

ANALYSES: dict[str, tuple[Callable[[TransformerBridge], Any], float]] = {
    **{f"patching, {name}": (patched(metric), logits) for name, (metric, logits) in METRICS.items()},
    **{f"ablation, {name}": (ablated(metric, "z", "zero"), 2 * logits) for name, (metric, logits) in METRICS.items()},
    **{
        f"path patching, {name}": (by_path(metric, "final", True), 2 * logits)
        for name, (metric, logits) in METRICS.items()
    },
    "patching, KL divergence": (divergence, 4),
    "patching, each row": (patched(by_row, rows="each"), 2),
    **{f"patching {site}": (patched(site=site), 2) for site in SITES},
    **{f"mean of {site}": (ablated(scalar, site, "mean"), 4) for site in ("resid_pre", "result", *SITES[15:18])},
    **{f"{how} of z": (ablated(scalar, "z", how), 4) for how in ("position_mean", "resample")},
    **{
        f"path to {receiver}, {'frozen' if freeze else 'computed'} MLPs": (by_path(scalar, receiver, freeze), 4)
        for receiver in ("L1H*.q", "L1H*.k", "L1H*.v", "L*.mlp_in")
        for freeze in (True, False)
    },
    "path, frozen scale": (by_path(scalar, "final", True, freeze_final_scale=True), 4),
    "path, inputs set": (by_path(scalar, "L*.mlp_in", True, inputs="set"), 4),
    **{name: (like_transformer_lens(name, scalar), 2) for name in PATCHES},
    **{
        f"by example, {name}": (like_transformer_lens("get_act_patch_attn_out", metric, reduce="mean"), 2)
        for name, metric in {"ours": DIFFERENCE, "mine": by_row}.items()
    },
    "PatchingResult.effect": (result_of("effect"), 4),
    "PatchingResult.stderr": (result_of("stderr"), 2),
    "PatchingResult.mean": (lambda bridge: result_of("mean")(bridge), 2),
    "PatchingResult.bootstrap_ci": (result_of("bootstrap_ci"), 2),
    "log_perplexity": (lambda bridge: log_perplexity(bridge, corpus(), progress=False), 2),
    "zero": (changed_loss(lambda listed: force(listed, 0.0)), 4),
    "force": (changed_loss(lambda listed: force(listed, 2.5)), 4),
    "scale": (changed_loss(lambda listed: scale(listed, 3.0)), 4),
    "add": (changed_loss(lambda listed: add(listed, 1.0)), 4),
    "loss": (lambda bridge: bridge(A, return_type="loss").detach(), 2),
    "loss of each token": (lambda bridge: bridge(A, return_type="loss", loss_per_token=True).detach(), 2),
    "generate": (generated(), 1),
    "generate with penalties": (generated(freq_penalty=0.5), 1),
    "gradients": (gradient_size, 1),
    "fast attention": (fast, 2),
    "processed weights": (processed, 4),
}
"""What is run, and of how many logits a number of it is the sum."""


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis(name: str, dtype: torch.dtype) -> None:
    run, logits = ANALYSES[name]
    models = pair(dtype)
    torch.manual_seed(0)
    found, expected = run(models.half), numbers(run(models.full))
    assert found.dtype in (np.dtype("float32"), np.dtype("float64"), torch.float32, torch.float64, dtype)
    assert isinstance(found, Tensor) or found.dtype != np.dtype("float16")
    assert torch.isfinite(expected).all()
    assert float((numbers(found) - expected).abs().max()) <= 2 * logits * models.error


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["ours", "one number", "one a row"])
def test_normalized_values(kind: str, dtype: torch.dtype) -> None:
    """``(v - zero) / (one - zero)``: above and below the fraction are differences of twice two logits."""
    models = pair(dtype)
    with torch.no_grad():
        moved = (models.full(B)[:1, -1] - models.full(A)[:1, -1])[0]
    answer, foil = int(moved.argmax()), int(moved.argmin())  # the two that tell the prompts apart best
    metric = {
        "ours": LogitDifference(answer, foil),
        "one number": lambda logits: (logits[:, -1, answer] - logits[:, -1, foil]).mean(),
        "one a row": lambda logits: logits[:, -1, answer] - logits[:, -1, foil],
    }[kind]
    found = activation_patching(models.half, B[:1], A[:1], metric, progress=False)
    expected = activation_patching(models.full, B[:1], A[:1], metric, progress=False)
    span, off = float(moved.max() - moved.min()), 8 * models.error
    assert span > 10 * off
    assert found.dtype == np.float32
    assert (np.abs(found.values - expected.values) <= off * (1 + np.abs(expected.values)) / (span - off)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_are_subtracted_in_float32(dtype: torch.dtype) -> None:
    """A change is the difference of two scores that are known to the half's precision, not rounded to it again."""
    bridge = pair(dtype).half
    change, metric = (
        ablation(bridge, A, scalar, how="zero", change=change, progress=False) for change in (True, False)
    )
    assert np.array_equal(change.values, metric.values - np.float32(change.attrs["base"][0]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("site", ["ln1.hook_scale", "ln1.hook_normalized", "attn_out"])
def test_a_mean_has_the_dtype_of_its_activation(site: str, dtype: torch.dtype) -> None:
    """A scale is float32 in a model of half precision, and so is its mean: held against a hook with numpy's mean."""
    bridge = pair(dtype).half
    name = f"blocks.0.{site if '.' in site else 'hook_' + site}"
    with torch.no_grad():
        _, kept = bridge.run_with_cache(A, names_filter=name)
        mean = kept[name].double().mean((0, 1)).to(kept[name].dtype)
        logits = bridge.run_with_hooks(A, fwd_hooks=[(name, lambda tensor, hook: mean.expand_as(tensor).clone())])

    found = ablation(bridge, A, scalar, site, by="layer", how="mean", layers=0, change=False, progress=False)
    assert abs(found.item() - float(scalar(logits.float()))) <= 4 * pair(dtype).error
    for how in ("mean", "position_mean"):
        prepared = Ablation(bridge, A, scalar, site=site, by="layer", how=how, options=SweepOptions(layers=0))
        (edit,) = prepared.labelled().grid.edits[0]
        taken = edit.value.run[name]
        assert taken.dtype == kept[name].dtype
        if how == "mean":
            assert torch.equal(taken[0, 0], mean)


# --------------------------------------------------------------------------------------------------------------------
# Statistics: held against numpy and scikit-learn, on what Hugging Face's own module gives
# --------------------------------------------------------------------------------------------------------------------


def activations(bridge: TransformerBridge, text: Corpus) -> dict[str, np.ndarray]:
    """By label, ``[document, pos, neuron]`` in float64, from a torch hook on a copy of the model."""
    model: Any = copy.deepcopy(bridge.hf_model)
    kept: list[Tensor] = []
    model.transformer.h[0].mlp.gelu_impl.register_forward_hook(lambda module, args, output: kept.append(output))
    found = {}
    with torch.no_grad():
        for label in text.labels:
            kept.clear()
            for batch in text.batches(4, labels=label):
                model(batch.tokens)
            found[label] = torch.cat(kept).double().numpy()
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics(dtype: torch.dtype) -> None:
    bridge, text = pair(dtype).half, corpus()
    edges = (-0.25, 0.0, 0.5)
    asked = [
        *(CountPositive(), CountPositive(0.1), MeanVariance(), MinMax(), Quantiles((0.0, 0.5, 1.0)), Histogram(edges)),
        *(TopK(3), Covariance(), AveragePrecision(), AveragePrecision("max")),
    ]
    got = bridge.collect(text, {POST: asked}, batch_size=4, progress=False)
    documents = activations(bridge, text)
    for label, by_document in documents.items():
        values = by_document.reshape(-1, by_document.shape[-1])

        def of(name: str, field: str | None = None, label: str = label) -> np.ndarray:
            return got.array(POST, name, field).sel(label=label).values

        assert np.array_equal(of("count_positive"), (values > 0).sum(0))
        assert np.array_equal(of("count_above_0.1"), (values > 0.1).sum(0))
        assert np.array_equal(of("min_max", "minimum"), values.min(0))
        assert np.array_equal(of("min_max", "maximum"), values.max(0))
        assert np.array_equal(of("top_3", "values"), -np.sort(-values, axis=0)[:3].T)
        assert np.allclose(of("mean_variance", "mean"), values.mean(0), rtol=1e-12, atol=1e-12)
        assert np.allclose(of("mean_variance", "variance"), values.var(0), rtol=1e-11, atol=1e-12)
        low = np.quantile(values, [0.0, 0.5, 1.0], axis=0, method="lower").T
        assert (np.abs(of("quantiles") - low) <= np.maximum(0.02 * np.abs(low), 1e-4)).all()
        covariance = got.get(POST, "covariance", label).result().covariance
        assert np.allclose(covariance, np.cov(values.T, bias=True), rtol=1e-10, atol=1e-12)
        binned = np.stack([np.histogram(unit, np.array(edges))[0] for unit in values.T])
        assert np.array_equal(of("histogram"), binned)
    truth = np.array([True] * 6 + [False] * 6)
    for name, pooled in (("average_precision", np.mean), ("average_precision_max", np.max)):
        scores = np.concatenate([pooled(documents[label], axis=1) for label in ("a", "b")]).astype(np.float32)
        expected = [average_precision_score(truth, scores[:, unit]) for unit in range(16)]
        assert np.allclose(got.average_precision(POST, "a", name)[:16], expected, rtol=0, atol=1e-12)
    units = expertise(got)
    scores = np.concatenate([documents[label].mean(1) for label in ("a", "b")]).astype(np.float32).astype(float)
    assert np.allclose(units.table["on_p50"].sel(label="a"), np.median(scores[:6], axis=0), rtol=0, atol=1e-12)
    assert np.allclose(units.table["off_mean"].sel(label="a"), scores[6:].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_language_neurons_and_responses_of_ones_own(dtype: torch.dtype) -> None:
    bridge, text = pair(dtype).half, corpus()
    hook = "blocks.*.mlp.hook_post"
    got = bridge.collect(text, {hook: [CountPositive()]}, batch_size=4, progress=False)
    counts = got.array(hook, "count_positive")
    assert (
        lape(counts, got.tokens, top_rate=0.1).selected == lape(counts.values, got.tokens.values, top_rate=0.1).selected
    )
    with torch.no_grad():
        kept = {label: bridge.run_with_cache(random_tokens(6, 8, seed=seed))[1] for seed, label in enumerate("ab", 3)}
    responses = {POST: {label: one[POST].mean(1) for label, one in kept.items()}}  # in half precision
    wide = {POST: {label: one.double() for label, one in responses[POST].items()}}
    assert expertise(responses).table.equals(expertise(wide).table)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_stored_activations(stored: torch.dtype | None, dtype: torch.dtype, tmp_path: Path) -> None:
    bridge, text = pair(dtype).half, corpus("packed")
    harvest(
        bridge, text, [POST, "blocks.0.ln1.hook_scale"], tmp_path / "store", dtype=stored, batch_size=4, progress=False
    )
    store = StoredActivations(tmp_path / "store")
    expected = np.concatenate([one.reshape(-1, one.shape[-1]) for one in activations(bridge, text).values()])
    found = torch.cat([store.shard(index, POST) for index in range(store.n_shards)])
    assert found.dtype == (stored or dtype)
    assert torch.equal(found, torch.from_numpy(expected).to(found.dtype))
    assert export_to_saelens(store, POST, tmp_path / "sae", progress=False) == 12


# --------------------------------------------------------------------------------------------------------------------
# Matrices, pictures, commands
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_factored_matrices(dtype: torch.dtype) -> None:
    """Decompositions are float32's of the rounded factors, whose product is never rounded to half precision."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, generator=generator).to(dtype) for _ in range(2))
    matrix, product = FactoredMatrix(a, b), a.double() @ b.double()
    bound = 100 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(product))
    assert torch.allclose(matrix.S.double(), torch.linalg.svdvals(product), rtol=0, atol=bound)
    assert abs(float(matrix.norm()) - float(torch.linalg.matrix_norm(product))) < bound
    # Sums of powers of eigenvalues do not depend on their order.
    values, exact = matrix.eigenvalues.to(torch.complex128), torch.linalg.eigvals(product)
    assert abs(complex((values.sum() - exact.sum()).item())) < bound
    assert abs(complex((values.square().sum() - exact.square().sum()).item())) < bound * 10
    large = FactoredMatrix(torch.full((2, 2), 300.0, dtype=dtype), torch.full((2, 2), 300.0, dtype=dtype))
    assert large.eigenvalues.abs().max() == pytest.approx(4 * 300.0**2)  # beyond float16
    assert torch.isfinite(matrix.make_even().AB).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pictures(dtype: torch.dtype) -> None:
    found = activation_patching(pair(dtype).half, A, B, scalar, normalize=False, progress=False)
    assert heat_map(found, title="t", unit="u").data[0].z.shape == found.shape
    values = torch.tensor([0.5, -1.0], dtype=dtype)
    page = examples_page({"n": [TokenExample(["a", "b"], values)]}, title="t", unit="u")
    assert page == examples_page({"n": [TokenExample(["a", "b"], [0.5, -1.0])]}, title="t", unit="u")
    with pytest.raises(InputError, match="a number for each of its tokens"):
        examples_page({"n": [TokenExample(["a", "b"], [[1.0, 2.0], [1.0, 2.0]])]}, title="t", unit="u")  # type: ignore[list-item]


TEXTS = {
    "en": "Everyone has the right to life, liberty and security of person.",
    "fr": "Tout individu a droit à la vie.",
}
PAIR = ("--clean", "the right to work and the right to", "--corrupted", "the right to freedom and the right to")
COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("--layers", "0"),
    "run": ("Everyone has", "--hooks", "blocks.*.attn.hook_pattern", "--out", "run.safetensors"),
    "patch": (
        *PAIR,
        *("--answer", " work", "--foil", " freedom", "--site", "z", "--out", "out", "--picture", "out.html"),
    ),
    "neurons": (
        *(
            "--text",
            "en=en.txt",
            "--text",
            "fr=fr.txt",
            "--context",
            "16",
            "--measured-tokens",
            "32",
            "--random-sets",
            "1",
        ),
        *("--examples", "1", "--shown-neurons", "1", "--experts", "2", "--top-rate", "0.5", "--out", "study"),
    ),
    "harvest": ("--corpus", "en=en.txt", "--hooks", "blocks.*.hook_resid_post", "--out", "store"),
}


@pytest.fixture(scope="module")
def folder(demo: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer."""
    made = tmp_path_factory.mktemp("model")
    make_bloom(hidden_size=16, n_head=2, n_layer=1, vocab_size=2048).save_pretrained(made)
    demo.tokenizer.save_pretrained(made)
    return made


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(
    command: str, dtype: torch.dtype, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for label, text in TEXTS.items():
        Path(f"{label}.txt").write_text("\n".join([text] * 8), "utf-8")
    word = str(dtype).removeprefix("torch.")
    done = invoke(command, folder, *COMMANDS[command], "--dtype", word, "--format", "json")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    if command == "harvest":
        assert StoredActivations("store").shard(0, "blocks.0.hook_resid_post").dtype == dtype
    else:
        assert word in done.stdout


# --------------------------------------------------------------------------------------------------------------------
# Casts to a dtype of a smaller range
# --------------------------------------------------------------------------------------------------------------------

LARGE, WHERE = 1e5, "blocks.1.hook_mlp_out"
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (*HALVES, torch.float32, torch.float64)}


def with_large_values(dtype: torch.dtype = torch.float32, value: float = LARGE) -> TransformerBridge:
    """A model whose last MLP adds a number that float16 cannot hold."""
    model = make_bloom(dtype, **SIZES)
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_4h_to_h.bias[3] = value
    return TransformerBridge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cache_in_float16_refuses_what_it_cannot_hold(dtype: torch.dtype) -> None:
    bridge = with_large_values(dtype)
    said = rf"{WHERE} has values up to (1e\+05|99\d{{3}}|100\d{{3}}).*torch.float16 ends at 65504.*Take torch.bfloat16"
    with torch.no_grad(), pytest.raises(InputError, match=said):
        bridge.run_with_cache(A, dtype=torch.float16)
    _, kept = bridge.run_with_cache(A)
    with pytest.raises(InputError, match=said):
        kept.to(dtype=torch.float16)
    below = bridge.run_with_cache(A, dtype=torch.float16, names_filter="blocks.0.*")[1]
    assert all(torch.isfinite(tensor).all() for name, tensor in below.items() if "scores" not in name)
    wide = bridge.run_with_cache(A, dtype=torch.bfloat16)[1]
    assert torch.equal(wide[WHERE], kept[WHERE].to(torch.bfloat16))
    assert torch.equal(kept.to(dtype=torch.bfloat16)[WHERE], wide[WHERE])


@pytest.mark.parametrize(
    ("value", "source", "target"), [(1e39, torch.float64, torch.float32), (3.4e38, torch.float32, torch.bfloat16)]
)
def test_other_dtypes_end_too(value: float, source: torch.dtype, target: torch.dtype) -> None:
    bridge = with_large_values(source, value)
    with torch.no_grad(), pytest.raises(InputError, match=rf"{WHERE} .*{target} ends at 3.*Take torch.float"):
        bridge.run_with_cache(A, dtype=target, names_filter=WHERE)


def test_a_gradient_that_float16_cannot_hold() -> None:
    bridge = pair(torch.bfloat16).full
    with pytest.raises(InputError, match="blocks.0.hook_resid_pre_grad has values up to .* in size"):
        with bridge.hooks(bwd_hooks=[("blocks.0.hook_resid_post", lambda gradient, hook: gradient * 1e9)]):
            bridge.run_with_cache(
                A, return_type="loss", incl_bwd=True, names_filter="blocks.0.hook_resid_pre", dtype=torch.float16
            )


@pytest.mark.parametrize("dtype", LOWEST, ids=str)
def test_a_masked_score_is_the_lowest_number_of_the_dtype(dtype: torch.dtype) -> None:
    """Hugging Face adds the lowest number of the dtype to masked scores: no value of the model is lost with it."""
    bridge, mask = TransformerBridge(make_bloom(**SIZES)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = bridge.run_with_cache(A, attention_mask=mask)[1]["attn_scores", 0]
    kept = bridge.run_with_cache(A, attention_mask=mask, dtype=dtype)[1]["attn_scores", 0]
    masked = scores == LOWEST[torch.float32]
    assert masked.any()
    lowest = LOWEST[dtype] if dtype is not torch.float64 else LOWEST[torch.float32]
    assert (kept[masked] == lowest).all()
    assert torch.equal(kept[~masked], scores[~masked].to(dtype))
    assert torch.equal(bridge.run_with_cache(A, attention_mask=mask)[1].to(dtype=dtype)["attn_scores", 0], kept)


def test_what_was_infinite_stays_so() -> None:
    bridge = TransformerBridge(make_bloom(**SIZES))
    infinite = [("blocks.0.hook_attn_out", lambda tensor, hook: torch.full_like(tensor, -torch.inf))]
    with bridge.hooks(fwd_hooks=infinite):
        _, kept = bridge.run_with_cache(A, names_filter="blocks.0.hook_attn_out", dtype=torch.float16)
    assert (kept["attn_out", 0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.complex64], ids=str)
def test_a_cache_is_kept_in_floating_point(dtype: torch.dtype) -> None:
    bridge, ran = TransformerBridge(make_bloom(**SIZES)), []
    bridge.hf_model.register_forward_pre_hook(lambda *_: ran.append(1))
    for call in (
        lambda: bridge.run_with_cache(A, dtype=dtype),
        lambda: bridge.estimate_cache(A, dtype=dtype),
        lambda: bridge.run_with_cache(A, names_filter="hook_embed")[1].to(dtype=dtype),
    ):
        ran.clear()
        with pytest.raises(InputError, match="dtype is one of torch.float16"):
            call()
        assert len(ran) <= 1  # the last one's own run


EDITS: dict[str, Any] = {
    "SetTo": lambda: SetTo(LARGE),
    "SetTo a tensor": lambda: SetTo(torch.tensor(LARGE)),
    "Add": lambda: Add(LARGE),
    "Add integers": lambda: Add(torch.tensor(100_000)),
    "FromRun": lambda: FromRun(with_large_values().run_with_cache(A)[1]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_float16_cannot_hold(name: str) -> None:
    bridge = pair(torch.float16).half
    with pytest.raises(InputError, match=rf"{name.split()[0]}: the value for {WHERE} has values up to .*torch.float16"):
        Sweep(bridge, A, DIFFERENCE).run([Edit(WHERE, EDITS[name]())], progress=False)
    found = Sweep(pair(torch.bfloat16).half, A, DIFFERENCE).run([Edit(WHERE, EDITS[name]())], progress=False)
    assert torch.isfinite(found.values["metric"]).all()


def test_an_infinite_edit_is_what_was_asked_for() -> None:
    """Masking a key: minus infinity among the scores."""
    edit = Edit("blocks.0.attn.hook_attn_scores", SetTo(-torch.inf), positions=4, keys=1)
    for dtype in HALVES:
        assert torch.isfinite(Sweep(pair(dtype).half, A, DIFFERENCE).run([edit], progress=False).values["metric"]).all()


@pytest.mark.parametrize("change", [force, add, scale], ids=lambda change: change.__name__)
def test_a_neuron_that_float16_cannot_hold(change: Any) -> None:
    with (
        pytest.raises(InputError, match="A value for the neurons of blocks.0.mlp.hook_post has values up to 100000"),
        change([(0, 3)], LARGE).on(pair(torch.float16).half) as bridge,
    ):
        bridge(A)
    with change([(0, 3)], LARGE).on(pair(torch.bfloat16).half) as bridge:
        assert torch.isfinite(bridge(A)).all()


@pytest.mark.parametrize("threshold", [0.1, -0.1, 1e5, -1e5, 0.3, 0.0], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_a_threshold_is_not_rounded_to_the_values(threshold: float, dtype: torch.dtype) -> None:
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    ends = [torch.nextafter(near, torch.tensor(end * torch.inf, dtype=dtype)) for end in (-1, 1)]
    values = torch.stack([near, *ends, torch.tensor(torch.inf, dtype=dtype)]).view(1, 4, 1)
    statistic = CountPositive(threshold)
    statistic.update(values)
    assert statistic.result().tolist() == [sum(float(value) > threshold for value in values.flatten())]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_units_without_finite_responses_are_named(value: float) -> None:
    """One number beyond float16 in one document: which hook, and which of its units."""
    bridge = pair(torch.float16).half

    def overflow(tensor: Tensor, hook: Any) -> None:
        tensor[0, 0, [7, 90]] = value

    asked = {"blocks.*.mlp.hook_post": [AveragePrecision()]}
    with bridge.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", overflow)]):
        got = bridge.collect(corpus(), asked, progress=False)
    said = r"2 of 128 features of blocks\.1\.mlp\.hook_post have a NaN or an infinite one: 7, 90\."
    for call in (lambda: expertise(got), lambda: got.average_precision("blocks.1.mlp.hook_post", "a")):
        with pytest.raises(InputError, match=said):
            call()
    assert got.average_precision("blocks.0.mlp.hook_post", "a").shape == (128,)
