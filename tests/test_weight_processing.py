"""The pure functions: each keeps its map to rounding, and leaves its invariant, on random numbers with no model around."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.errors import WeightError
from pellucid.weight_processing import (
    BLOCK_KEYS,
    BLOCK_STEPS,
    BlockForm,
    center_embedding,
    center_unembed,
    center_writing_weights,
    centred_rows,
    effective_embedding,
    fold_gain,
    fold_layer_norm,
    fold_value_biases,
    process_block,
    refactor_factored_attn_matrices,
    working_dtype,
)

D_MODEL, D_MLP, N_HEADS = 24, 96, 4
EPS64 = torch.finfo(torch.float64).eps


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def normalised(*shape: int) -> Tensor:
    return F.layer_norm(numbers(*shape, seed=7), (shape[-1],), eps=1e-5)


def dot_bound(n: int, size: float, dtype: torch.dtype = torch.float64) -> float:
    """Rounding of a sum of ``n`` products, each at most ``size``: ``n eps`` times their absolute sum."""
    return n * torch.finfo(dtype).eps * n * size


def attention(dtype: torch.dtype = torch.float64, width: int = D_MODEL) -> dict[str, Tensor]:
    weights = {}
    for seed, part in enumerate("qkv"):
        weights[f"{part}.weight"] = numbers(width, D_MODEL, seed=seed, dtype=dtype)
        weights[f"{part}.bias"] = numbers(width, seed=seed, dtype=dtype)
    return weights | {
        "o.weight": numbers(D_MODEL, width, seed=9, dtype=dtype),
        "o.bias": numbers(D_MODEL, seed=9, dtype=dtype),
    }


def block(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    weights = {f"attn.{key}": value for key, value in attention(dtype).items()}
    for seed, norm in enumerate(("ln1", "ln2")):
        weights[f"{norm}.weight"] = 1 + numbers(D_MODEL, seed=20 + seed, dtype=dtype)
        weights[f"{norm}.bias"] = numbers(D_MODEL, seed=30 + seed, dtype=dtype)
    weights |= {"mlp.in.weight": numbers(D_MLP, D_MODEL, dtype=dtype), "mlp.in.bias": numbers(D_MLP, dtype=dtype)}
    return weights | {
        "mlp.out.weight": numbers(D_MODEL, D_MLP, dtype=dtype),
        "mlp.out.bias": numbers(D_MODEL, dtype=dtype),
    }


def run_block(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A block written from its definition: ``[pos, d_model]`` to the residual after it, freed of its mean."""

    def norm(name: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, (D_MODEL,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    y = norm("ln1", x)
    q, k, v = (linear(f"attn.{part}", y).unflatten(-1, (N_HEADS, -1)).transpose(0, 1) for part in "qkv")
    distance = torch.arange(len(x), dtype=x.dtype)  # a bias that depends on the key alone, as ALiBi's does
    scores = q @ k.transpose(1, 2) / (D_MODEL / N_HEADS) ** 0.5 + 0.3 * distance
    pattern = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf")).softmax(-1)
    x = x + linear("attn.o", (pattern @ v).transpose(0, 1).flatten(1))
    x = x + linear("mlp.out", F.gelu(linear("mlp.in", norm("ln2", x))))
    return x - x.mean(-1, keepdim=True)


# -- folding -----------------------------------------------------------------------------------------------------------


def test_folding_a_norm_keeps_the_map() -> None:
    weight, bias, gain, shift = numbers(10, D_MODEL), numbers(10), numbers(D_MODEL, seed=1), numbers(D_MODEL, seed=2)
    n = normalised(6, D_MODEL)
    new_weight, new_bias = fold_layer_norm(weight, bias, gain, shift)
    before, after = F.linear(n * gain + shift, weight, bias), F.linear(n, new_weight, new_bias)
    assert (before - after).abs().max() < dot_bound(D_MODEL, 50)
    assert new_weight.sum(1).abs().max() < dot_bound(D_MODEL, 10)
    assert torch.allclose(fold_layer_norm(weight, None, gain, shift)[1] + bias, new_bias, rtol=1e-13)


def test_folding_is_linear_in_the_rows() -> None:
    weight, gain, shift = numbers(10, D_MODEL), numbers(D_MODEL, seed=1), numbers(D_MODEL, seed=2)
    whole, bias = fold_layer_norm(weight, None, gain, shift)
    parts = [fold_layer_norm(rows, None, gain, shift) for rows in weight.split(3)]
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert torch.allclose(bias, torch.cat([part[1] for part in parts]), rtol=0, atol=dot_bound(D_MODEL, 10))
    mean, _ = fold_layer_norm(weight.mean(0, keepdim=True), None, gain, shift)
    assert (mean[0] - whole.mean(0)).abs().max() < dot_bound(D_MODEL, 10)


def test_a_gain_of_zero_folds() -> None:
    gain = numbers(D_MODEL, seed=1)
    gain[3] = 0
    weight, shift = numbers(10, D_MODEL), numbers(D_MODEL, seed=2)
    new, bias = fold_layer_norm(weight, None, gain, shift)
    n = normalised(6, D_MODEL)
    assert (F.linear(n * gain + shift, weight) - F.linear(n, new, bias)).abs().max() < dot_bound(D_MODEL, 50)


# -- centring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D_MODEL, D_MLP), (D_MODEL, D_MODEL)])
def test_centring_what_writes(shape: tuple[int, int]) -> None:
    weight, bias = numbers(*shape), numbers(shape[0])
    new, new_bias = center_writing_weights(weight, bias)
    assert new_bias is not None
    x = numbers(5, shape[1], seed=3)
    before, after = F.linear(x, weight, bias), F.linear(x, new, new_bias)
    assert (before - before.mean(-1, keepdim=True) - after).abs().max() < dot_bound(shape[1], 20)
    assert new.sum(0).abs().max() < dot_bound(D_MODEL, 5)
    assert new_bias.sum().abs() < dot_bound(D_MODEL, 5)
    assert center_writing_weights(weight)[1] is None
    # The columns, not the rows: with as many inputs as outputs nothing but the values can tell.
    assert new.sum(1).abs().max() > 0.1


@pytest.mark.parametrize("d_vocab", [37, D_MODEL])
def test_centring_the_unembedding_keeps_log_probabilities(d_vocab: int) -> None:
    weight, bias = numbers(d_vocab, D_MODEL), numbers(d_vocab)
    new, new_bias = center_unembed(weight, bias)
    assert new_bias is not None
    x = numbers(5, D_MODEL, seed=4)
    before, after = F.linear(x, weight, bias).log_softmax(-1), F.linear(x, new, new_bias).log_softmax(-1)
    assert (before - after).abs().max() < dot_bound(D_MODEL, 20)
    assert F.linear(x, new, new_bias).mean(-1).abs().max() < dot_bound(D_MODEL, 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 0.1])
def test_centring_the_embedding_is_exact(dtype: torch.dtype, eps: float) -> None:
    table, gain, shift = (
        numbers(50, D_MODEL, dtype=dtype),
        1 + numbers(D_MODEL, dtype=dtype),
        numbers(D_MODEL, seed=5, dtype=dtype),
    )
    before = effective_embedding(table, gain, shift, eps)
    wanted = before - before.mean(-1, keepdim=True)
    new, new_gain, new_shift = center_embedding(table, gain, shift, eps)
    after = F.layer_norm(new, (D_MODEL,), new_gain, new_shift, eps)
    # Some ten roundings from one to the other, each relative to the largest number of a row.
    bound = 10 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert (after - wanted).abs().max() < bound
    assert after.mean(-1).abs().max() < bound
    assert before.mean(-1).abs().max() > 0.05
    assert torch.equal(new_gain, new_gain[:1].expand(D_MODEL))
    assert not new_shift.any()


def test_an_embedding_without_room_for_it() -> None:
    table = torch.ones(5, D_MODEL, dtype=torch.float64)  # constant rows: the norm gives its bias alone
    new, gain, shift = center_embedding(table, numbers(D_MODEL), torch.full((D_MODEL,), 0.5, dtype=torch.float64), 1e-5)
    assert (F.layer_norm(new, (D_MODEL,), gain, shift, 1e-5)).abs().max() < 10 * EPS64
    with pytest.raises(WeightError, match="eps"):
        center_embedding(table, numbers(D_MODEL), numbers(D_MODEL), 0.0)


# -- value biases and the circuits -------------------------------------------------------------------------------------


def test_folding_value_biases_keeps_the_contribution() -> None:
    weights = attention()
    new_v, new_o = fold_value_biases(weights["v.bias"], weights["o.weight"], weights["o.bias"])
    z = numbers(5, D_MODEL, seed=6)
    before = F.linear(z + weights["v.bias"], weights["o.weight"], weights["o.bias"])
    assert (before - F.linear(z + new_v, weights["o.weight"], new_o)).abs().max() < dot_bound(D_MODEL, 20)
    assert not new_v.any()


@pytest.mark.parametrize("n_heads", [1, 2, 6, 12])
def test_the_circuits_stay_and_are_in_their_singular_basis(n_heads: int) -> None:
    old = attention()
    new = refactor_factored_attn_matrices(old, n_heads)

    def by_head(weights: dict[str, Tensor], part: str) -> Tensor:
        extended = torch.cat([weights[f"{part}.weight"], weights[f"{part}.bias"][:, None]], dim=1)
        return extended.unflatten(0, (n_heads, -1)).transpose(1, 2)  # [n, d_model + 1, d_head]

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return weights["o.weight"].unflatten(1, (n_heads, -1)).permute(1, 2, 0)

    q, k = by_head(new, "q"), by_head(new, "k")
    qk_old = by_head(old, "q") @ by_head(old, "k").transpose(1, 2)
    size = float(torch.linalg.matrix_norm(qk_old, 2).max())
    bound = 100 * D_MODEL * EPS64 * size  # a backward stable decomposition: a modest multiple of eps times the norm
    assert (q @ k.transpose(1, 2) - qk_old).abs().max() < bound
    for gram in (q.transpose(1, 2) @ q, k.transpose(1, 2) @ k):
        assert (gram - gram.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < bound
    assert (q.norm(dim=1) - k.norm(dim=1)).abs().max() < bound
    assert (q.norm(dim=1).diff(dim=-1) <= bound).all()
    v_old, v = (by_head(weights, "v")[:, :-1] for weights in (old, new))
    o_old, o = outputs(old), outputs(new)
    size = float(torch.linalg.matrix_norm(v_old @ o_old, 2).max())
    assert (v @ o - v_old @ o_old).abs().max() < 100 * D_MODEL * EPS64 * size
    assert (o @ o.transpose(1, 2) - torch.eye(o.shape[1])).abs().max() < 100 * D_MODEL * EPS64
    assert not new["v.bias"].any()
    offset = old["o.weight"] @ old["v.bias"] + old["o.bias"]
    assert (new["o.bias"] - offset).abs().max() < dot_bound(D_MODEL, 20)


# -- a block -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(len(BLOCK_STEPS) + 1))
def test_every_subset_keeps_a_blocks_map(count: int) -> None:
    x = numbers(7, D_MODEL, seed=11)
    old = block()
    kept = {key: value.clone() for key, value in old.items()}
    before = run_block(old, x)
    for steps in itertools.combinations(sorted(BLOCK_STEPS), count):
        given = {key: old[key] for step in steps for key in BLOCK_KEYS[step]}
        new = process_block(given, steps, N_HEADS)
        after = run_block(old | new, x)
        assert (before - after).abs().max() < 1e-12 * float(before.abs().max()), steps
        again = process_block({key: (old | new)[key] for key in given}, steps, N_HEADS)
        if "refactor_factored_attn_matrices" not in steps:  # singular vectors have a sign
            for key, value in again.items():
                assert torch.allclose(value, new[key], rtol=0, atol=1e-12), (steps, key)
    assert all(torch.equal(old[key], kept[key]) for key in old)


def test_a_planted_fault_in_the_order_is_seen() -> None:
    x = numbers(7, D_MODEL, seed=11)
    old = block()
    new = process_block(old, BLOCK_STEPS, N_HEADS)
    wrong = dict(new)
    wrong["attn.q.weight"] = wrong["attn.q.weight"].unflatten(0, (N_HEADS, -1)).transpose(0, 1).flatten(0, 1)
    assert (run_block(old, x) - run_block(old | wrong, x)).abs().max() > 1e-3
    wrong = new | {"ln1.bias": old["ln1.bias"]}
    assert (run_block(old, x) - run_block(old | wrong, x)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_working_dtype(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert working_dtype(dtype) == wanted
    new = process_block(block(dtype), BLOCK_STEPS, N_HEADS)
    assert {value.dtype for key, value in new.items() if not key.startswith("ln")} == {wanted}
    assert centred_rows(numbers(3, D_MODEL, dtype=dtype), *(numbers(D_MODEL, dtype=dtype),) * 2, 1e-5).dtype == wanted


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight, gain = numbers(10, D_MODEL), numbers(D_MODEL)
    with pytest.raises(WeightError, match=r"weight must have shape \[any, 24\]; found \[10, 23\]"):
        fold_layer_norm(weight[:, 1:], None, gain, gain)
    with pytest.raises(WeightError, match="bias must have shape"):
        fold_layer_norm(weight, numbers(9), gain, gain)
    with pytest.raises(WeightError, match="shift must have shape"):
        center_embedding(weight, gain, gain[1:], 1e-5)
    with pytest.raises(WeightError, match="not given: k.bias"):
        refactor_factored_attn_matrices({key: value for key, value in attention().items() if key != "k.bias"}, 4)
    with pytest.raises(WeightError, match="7 heads"):
        refactor_factored_attn_matrices(attention(), 7)
    with pytest.raises(WeightError, match=r"needs attn\.o\.bias"):
        process_block({"attn.v.bias": gain, "attn.o.weight": weight}, ["fold_value_biases"], 4)
    with pytest.raises(WeightError, match="int8"):
        fold_layer_norm(weight.to(torch.int8), None, gain, gain)


# -- blocks of other forms ---------------------------------------------------------------------------------------------


def test_a_norm_that_attention_and_mlp_share_is_folded_into_both() -> None:
    form = BlockForm(
        {"ln1": ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.in")}, frozenset(), centres=False, unit=0.0
    )
    old = {f"{name}.weight": numbers(8, D_MODEL, seed=i) for i, name in enumerate(form.readers["ln1"])}
    old["ln1.weight"] = numbers(D_MODEL, seed=9)
    assert set(form.keys("fold_ln")) == set(old)
    new = process_block(old, ["fold_ln"], N_HEADS, form)
    assert new.keys() == old.keys()
    assert not new["ln1.weight"].any()
    for name in form.readers["ln1"]:  # Gemma's gain is 1 + weight
        assert torch.equal(new[f"{name}.weight"], old[f"{name}.weight"] * (1 + old["ln1.weight"]))
    with pytest.raises(WeightError, match=r"weight must have shape \[any, 24\]"):
        fold_gain(numbers(8, 23), numbers(D_MODEL))


def test_shared_value_biases_reach_every_query() -> None:
    form, d_head = BlockForm(queries_per_key=2), 3
    old = {
        "attn.v.bias": numbers(2 * d_head),
        "attn.o.weight": numbers(D_MODEL, 4 * d_head),
        "attn.o.bias": numbers(D_MODEL),
    }
    new = process_block(old, ["fold_value_biases"], 4, form)
    by_head = old["attn.o.weight"].unflatten(1, (4, d_head))
    wanted = old["attn.o.bias"] + sum(
        by_head[:, head] @ old["attn.v.bias"][head // 2 * d_head :][:d_head] for head in range(4)
    )
    torch.testing.assert_close(new["attn.o.bias"], wanted, rtol=0, atol=1e-13)
    assert new["attn.v.bias"].shape == (2 * d_head,)
    assert not new["attn.v.bias"].any()


def test_a_bias_with_nowhere_to_go_is_refused() -> None:
    old = block()
    biased = frozenset({"ln1", "ln2", "mlp.in", "mlp.out", "attn.v"})
    with pytest.raises(WeightError, match=r"ln1 has a bias that folding would give to attn\.q"):
        process_block(old, ["fold_ln"], N_HEADS, BlockForm(biased=biased))
    with pytest.raises(WeightError, match=r"attn\.o, which has no bias"):
        process_block(old, ["refactor_factored_attn_matrices"], N_HEADS, BlockForm(biased=biased))
    with pytest.raises(WeightError, match="a head of keys and values for each head of queries"):
        process_block(old, ["refactor_factored_attn_matrices"], N_HEADS, BlockForm(queries_per_key=2))


def test_without_biases_the_steps_keep_the_block() -> None:
    """Centring and refactoring where nothing has a bias (MPT)."""
    x, old = numbers(7, D_MODEL, seed=11), block()
    none = {key: torch.zeros_like(value) for key, value in old.items() if key.endswith("bias")}
    steps = ["fold_ln", "center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices"]
    new = process_block(
        {key: value for key, value in old.items() if key not in none}, steps, N_HEADS, BlockForm(biased=frozenset())
    )
    assert not any(key.endswith("bias") for key in new)
    before, after = run_block(old | none, x), run_block(old | none | new, x)
    assert (before - after).abs().max() < 1e-12 * float(before.abs().max())
