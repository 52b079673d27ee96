"""Head scores: known answers, priors in closed form, every family; copying and composition against whole matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import Corpus, TransformerBridge
from pellucid.analysis.composition import Circuits, circuits_of, composition
from pellucid.analysis.heads import (
    HEAD_PATTERNS,
    PREFIX_MATCHING,
    HeadPattern,
    RandomRepeats,
    copying_scores,
    head_scores,
    in_context_learning,
    ordinary_tokens,
    register_head_pattern,
    stripe_ceiling,
)
from pellucid.demo import load_demo_bridge
from pellucid.errors import InputError, WeightError
from pellucid.factored_matrix import FactoredMatrix, composition_scores
from pellucid.head_detector import detect_head
from tests.families import CONFIGS, make_family, of_each_layout
from tests.models import make_bloom, random_tokens
from tests.tiny_tokenizers import byte_level

DRAWN = RandomRepeats(length=7, prompts=2)


def make(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> TransformerBridge:
    model = make_bloom(dtype, **settings) if name == "bloom" else make_family(name, dtype, **settings)
    return TransformerBridge(model)


@pytest.mark.parametrize("name", of_each_layout(["bloom", *CONFIGS]))
def test_scores_are_sums_over_cached_patterns(name: str) -> None:
    bridge = make(name)
    tokens = DRAWN.tokens(bridge)
    found = head_scores(bridge, DRAWN)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern")
    length = tokens.shape[1]
    for layer in range(bridge.cfg.n_layers):
        pattern = cache["pattern", layer]
        previous = pattern.diagonal(offset=-1, dim1=-2, dim2=-1)
        np.testing.assert_allclose(
            found["score"].sel(pattern="previous_token", layer=layer), previous.mean(-1), rtol=1e-5
        )
        np.testing.assert_allclose(
            found["share"].sel(pattern="previous_token", layer=layer), previous.sum(-1) / length, rtol=1e-5
        )
        stripe = pattern.diagonal(offset=1 - 7, dim1=-2, dim2=-1)
        np.testing.assert_allclose(found["stripe"].sel(layer=layer), stripe.mean(-1), rtol=1e-5)
        # No beginning-of-sequence token here: the first entry of the stripe is before the repetition.
        np.testing.assert_allclose(
            found["score"].sel(pattern="induction", layer=layer), stripe[..., 1:].mean(-1), rtol=1e-5
        )
    assert found["score"].dims == ("pattern", "prompt", "layer", "head")
    assert (found.ceiling == 1).all()
    prior = found["prior"]
    assert ((prior >= 0) & (prior <= 1)).all()
    if bridge.cfg.positional_embedding_type == "standard":
        uniform = np.mean([1 / (query + 1) for query in range(1, length)])
        np.testing.assert_allclose(prior.sel(pattern="previous_token"), uniform, rtol=1e-4)


def test_alibis_prior_in_closed_form() -> None:
    """With equal keys ALiBi alone is left: e^-m, e^-2m, ... over their sum."""
    bridge = make("bloom", n_head=4)
    found = head_scores(bridge, random_tokens(3, 20), "previous_token")
    slopes = [2 ** (-8 * (head + 1) / 4) for head in range(4)]
    for head, slope in enumerate(slopes):
        rows = [math.exp(-slope) / sum(math.exp(-slope * back) for back in range(query + 1)) for query in range(1, 20)]
        np.testing.assert_allclose(found["prior"].sel(head=head), np.mean(rows), rtol=1e-4)


def test_an_induction_head_made_by_hand() -> None:
    """All attention to the token after the earlier copy: 1 exactly; TransformerLens' measure says .5 of it."""
    bridge = load_demo_bridge()

    def induct(pattern: Tensor, hook: Any) -> Tensor:
        length, period = pattern.shape[-1], DRAWN.length
        made = torch.zeros_like(pattern)
        for query in range(length):
            made[..., query, max(0, query - period + 1) if query >= period + first else 0] = 1
        return made

    for bos, share in ((False, 7 / 14), (True, 7 / 15)):
        drawn = RandomRepeats(length=7, prompts=2, prepend_bos=bos)
        first = int(bos)
        with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", induct)]):
            found = head_scores(bridge, drawn, "induction").sel(layer=1, pattern="induction")
        assert (found["score"] == 1).all()
        assert found["share"].values == pytest.approx(share)
        assert found.share_ceiling.values == pytest.approx(share)
        # Whatever does not induct rests on the first token, which the stripe of a prompt with BOS counts once.
        assert found["stripe"].values == pytest.approx((7 + 1) / (7 + 2) if bos else 1.0)
        assert found.attrs["stripe_ceiling"] == stripe_ceiling(7, bos)
    assert stripe_ceiling(20, True) == pytest.approx(21 / 22)


def test_the_embedded_models_heads() -> None:
    bridge = load_demo_bridge()
    found = head_scores(bridge, RandomRepeats(length=25, prompts=4))
    best = found["score"].sel(pattern="induction").mean("prompt")
    assert float(best.max()) > 0.5 > float(found["prior"].sel(pattern="induction").max())
    prefix = head_scores(bridge, PREFIX_MATCHING, "induction")["score"].mean("prompt")
    assert float(prefix.values.flatten()[best.values.argmax()]) > 0.5
    assert found.attrs["bos"] == 0
    text = "a b c a b c a b"
    ours = head_scores(bridge, text, ["previous_token", "duplicate_token", "induction"])["share"].isel(prompt=0)
    for name in ("previous_token", "duplicate_token", "induction"):
        np.testing.assert_allclose(ours.sel(pattern=name), detect_head(bridge, text, f"{name}_head"), rtol=1e-5)  # type: ignore[arg-type]


def test_a_detection_writes_to_no_cache() -> None:
    bridge = load_demo_bridge()
    with torch.no_grad():
        _, cache = bridge.run_with_cache("a b c a b c", remove_batch_dim=True)
    before = cache["pattern", 0].clone()
    settings: dict[str, Any] = {"cache": cache, "exclude_bos": True, "exclude_current_token": True}
    for measure in ("mul", "abs"):
        detect_head(bridge, "a b c a b c", "induction_head", error_measure=measure, **settings)  # type: ignore[arg-type]
    assert torch.equal(cache["pattern", 0], before)


def test_rows_are_scored_without_their_padding() -> None:
    bridge = load_demo_bridge()
    texts = ["Everyone has the right to life and the right to", "Everyone has"]
    both = head_scores(bridge, texts)
    for row, text in enumerate(texts):
        alone = head_scores(bridge, text, prior=False).isel(prompt=0)
        np.testing.assert_allclose(both["score"].isel(prompt=row), alone["score"], rtol=1e-4, atol=1e-6)
    assert both["score"].sel(pattern="induction", prompt=1).isnull().all()  # nothing is said twice
    assert "prior" not in alone


def test_a_pattern_of_ones_own() -> None:
    bridge = make("llama")
    first = HeadPattern(
        "first_token", lambda tokens: torch.eye(len(tokens))[[0]].repeat(len(tokens), 1), "the first token"
    )
    try:
        assert register_head_pattern(first) is HEAD_PATTERNS["first_token"]
        with pytest.raises(InputError, match="There is a pattern 'first_token'"):
            register_head_pattern(first)
        found = head_scores(bridge, random_tokens(2, 6), "first_token")
    finally:
        del HEAD_PATTERNS["first_token"]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(random_tokens(2, 6))
    np.testing.assert_allclose(
        found["score"].sel(pattern="first_token", layer=1), cache["pattern", 1][..., 0].mean(-1), rtol=1e-5
    )
    half = HeadPattern("half", lambda tokens: torch.eye(len(tokens)) / 2)
    assert head_scores(bridge, random_tokens(1, 6), half).ceiling.values == pytest.approx(0.5)
    for targets, words in (
        (lambda tokens: torch.ones(3), r"gives \[6, 6\] for 6 tokens; found \[3\]"),
        (lambda tokens: torch.ones(6, 6), "none for a key after its query"),
        (lambda tokens: 2 * torch.eye(6), "numbers from 0 to 1"),
        (lambda tokens: None, "found NoneType"),
    ):
        with pytest.raises(InputError, match=words):
            head_scores(bridge, random_tokens(1, 6), HeadPattern("own", targets))


def test_random_tokens_are_ordinary_ones() -> None:
    bridge = TransformerBridge(make_family("llama"), byte_level("bos"))
    tokenizer: Any = bridge.tokenizer
    pool = ordinary_tokens(bridge)
    assert not set(pool) & set(tokenizer.all_special_ids)
    assert max(pool) < min(len(tokenizer), bridge.cfg.d_vocab)
    drawn = RandomRepeats(length=9, repeats=3, prompts=4, seed=3)
    tokens = drawn.tokens(bridge)
    assert tokens.shape == (4, 1 + 27)
    assert set(tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    for row in tokens[:, 1:].tolist():
        assert row[:9] == row[9:18] == row[18:]
        assert len(set(row)) == 9
        assert set(row) <= set(pool)
    assert torch.equal(drawn.tokens(bridge), tokens)
    assert not torch.equal(RandomRepeats(length=9, repeats=3, prompts=4, seed=4).tokens(bridge), tokens)
    assert RandomRepeats(length=200, prompts=1).tokens(bridge).shape == (1, 401)  # more than there are: some come again


def test_in_context_learning() -> None:
    bridge = make("llama")
    rows = random_tokens(5, 40, 3)
    corpus = Corpus.from_tokens({"one": rows, "two": rows[:2, :30]}, context=40, packing="documents")
    found = in_context_learning(bridge, corpus, early=5, late=33, batch_size=2, progress=False)
    with torch.no_grad():
        losses = bridge(rows, return_type="loss", loss_per_token=True).double()
    assert float(found["score"]) == pytest.approx(float((losses[:, 31] - losses[:, 3]).mean()), rel=1e-5)
    np.testing.assert_allclose(found["loss"], losses[:, :32].mean(0), rtol=1e-5)
    assert found.attrs["rows"] == 5
    with pytest.raises(InputError, match="No row of the corpus has 50 tokens"):
        in_context_learning(bridge, corpus, early=5, late=50, progress=False)


# -- circuits ----------------------------------------------------------------------------------------------------------


def whole(circuits: Circuits, layer: int, head: int) -> Tensor:
    return circuits.ov.A[layer, head] @ circuits.ov.B[layer, head]


NO_VIEW_BY_HEAD = ("falcon-new", "falcon-one-norm")
"""Whose weights lie in groups: several heads of queries, then their key and their value."""


@pytest.mark.parametrize("name", of_each_layout(["bloom", *CONFIGS]))
def test_circuits_are_what_the_modules_do(name: str) -> None:
    """One head's OV by Hugging Face's modules: what attending to one direction writes, the norms' scales held still."""
    bridge = make(name, torch.float64)
    if name in NO_VIEW_BY_HEAD:
        with pytest.raises(
            WeightError, match="keeps the queries of each key/value head beside .*: they have no view by head"
        ):
            circuits_of(bridge)
        return
    circuits, layer, head = circuits_of(bridge), 1, 4 if bridge.cfg.n_heads > 4 else 1
    family, block = bridge.adapter.family, bridge.blocks[layer]
    d, generator = bridge.cfg.d_model, torch.Generator().manual_seed(2)
    x = torch.randn(d, generator=generator, dtype=torch.float64)
    norm = block.submodules.get("ln1")
    read = x
    if norm is not None:
        read = (x - x.mean() if family.norm.centres else x) * norm.gain().double()
    group = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    attention: Any = block.submodules["attn"]
    wrote = (read @ attention.W_V[head // group].double()) @ attention.W_O[head].double()
    if "ln1_post" in block.submodules:
        wrote = wrote * block.submodules["ln1_post"].gain().double()
    if family.norm.centres:
        wrote = wrote - wrote.mean()
    torch.testing.assert_close(x @ whole(circuits, layer, head), wrote.detach(), rtol=1e-9, atol=1e-12)
    keys = read @ attention.W_K[head // group].double()
    queries = read @ attention.W_Q[head].double()
    qk = circuits.qk.A[layer, head] @ circuits.qk.B[layer, head]
    torch.testing.assert_close(x @ qk @ x, (queries @ keys).detach(), rtol=1e-9, atol=1e-12)
    token = circuits.token_ov(layer, head).AB
    eigenvalues = torch.linalg.eigvals(token)
    wanted = eigenvalues.sum().real / eigenvalues.abs().sum()
    assert float(circuits.copying()[layer, head]) == pytest.approx(float(wanted), abs=1e-6)
    assert token.shape == circuits.token_qk(layer, head).shape == (97, 97)


@pytest.mark.parametrize("name", ["bloom", "gpt2", "llama"])
def test_processed_weights_have_the_same_circuits(name: str) -> None:
    bridge = make(name, torch.float64)
    before = {mode: composition(bridge, mode) for mode in ("Q", "K", "V")}  # type: ignore[arg-type]
    copying = copying_scores(bridge)
    # Centring the unembedding adds a number to all logits of a token alike, which moves eigenvalues.
    bridge.process_weights(center_unembed=False)
    for mode, found in before.items():
        np.testing.assert_allclose(composition(bridge, mode), found, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]
    np.testing.assert_allclose(copying_scores(bridge), copying, atol=1e-6)


def test_composition_is_that_of_whole_matrices() -> None:
    bridge = make("llama", torch.float64)
    circuits = circuits_of(bridge)
    for mode in ("Q", "K", "V"):
        found = composition(bridge, mode)  # type: ignore[arg-type]
        assert found.dims == ("layer", "head", "to_layer", "to_head")
        left = whole(circuits, 0, 2)
        qk = circuits.qk.A[2, 5] @ circuits.qk.B[2, 5]
        right = {"Q": qk, "K": qk.T, "V": whole(circuits, 2, 5)}[mode]
        wanted = (left @ right).norm() / left.norm() / right.norm()
        assert float(found.sel(layer=0, head=2, to_layer=2, to_head=5)) == pytest.approx(float(wanted), rel=1e-9)
        assert not found.sel(layer=1, to_layer=1).any()
        assert not found.sel(layer=2, to_layer=1).any()
    generator = torch.Generator().manual_seed(0)
    left, right = (
        FactoredMatrix(torch.randn(*shape, 9, 3, generator=generator), torch.randn(*shape, 3, 9, generator=generator))
        for shape in ((4,), (4,))
    )
    pairs = composition_scores(left, right)
    assert pairs.shape == (4, 4)
    torch.testing.assert_close(composition_scores(left, right, broadcast_dims=False), pairs.diagonal())
    with pytest.raises(InputError, match="left.rdim and right.ldim to be equal"):
        composition_scores(left, FactoredMatrix(torch.ones(5, 2), torch.ones(2, 5)))
