"""A sweep's numbers are those of one whole forward an edit, in float64 to rounding, at every hook point."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import CacheKeyError, HookNameError, InputError
from pellucid.model_bridge.generalized_components.bloom_attention import BloomAttentionBridge
from pellucid.sweep import Add, Apply, Edit, FromRun, LogitDifference, NextTokenLoss, Scale, SetTo, Sweep, Zero
from tests.models import is_pristine, make_bloom, random_tokens
from tests.sweep.reference import whole_logits

CLOSE = {"rtol": 0, "atol": 1e-10}
ANSWER, FOIL = 3, 5


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_bridge(opt_in: bool = False, **settings: Any) -> TransformerBridge:
    bridge = TransformerBridge(make_bloom(torch.float64, **settings))
    if opt_in:
        bridge.set_use_attn_result(True)
        bridge.set_use_split_qkv_input(True)
        bridge.set_use_hook_mlp_in(True)
    return bridge


def padded(rows: int = 3, length: int = 9) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    mask[2, 4] = 0
    return mask


def last_real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logit difference at each row's last real token, from whole logits."""
    rows = range(len(logits))
    columns = [logits.shape[1] - 1 if mask is None else int(mask[row].nonzero().max()) for row in rows]
    return torch.stack(
        [logits[row, column, ANSWER] - logits[row, column, FOIL] for row, column in zip(rows, columns, strict=True)]
    )


def edits_everywhere(bridge: TransformerBridge, cache: Any, length: int, seed: int) -> list[Edit]:
    """For every hook: first, middle, last, all and two positions, each with a value of one kind or another."""
    choice = random.Random(seed)
    edits = []
    for name in bridge.hook_dict:
        spec = bridge.hook_spec(name)
        for positions in (0, length // 2, length - 1, None, [1, length - 2]):
            indices: dict[str, Any] = {"positions": positions}
            if "n_heads" in spec.axes and choice.random() < 0.7:
                indices["heads"] = choice.randrange(bridge.cfg.n_heads)
            if "key_pos" in spec.axes and choice.random() < 0.5:
                indices["keys"] = [0, length - 1]
            if spec.axes[-1] in ("d_model", "d_mlp", "d_head") and choice.random() < 0.3:
                indices["neurons"] = slice(1, 7)
            value = choice.choice([FromRun(cache), FromRun(cache), Zero(), Scale(1.5), SetTo(0.3), Add(0.2)])
            if name.endswith("attn_scores") and isinstance(value, Scale):
                value = Zero()  # half as much again as the lowest number is -inf, and a row of those has no softmax
            if spec.kind == "int":
                value = FromRun(cache)
            elif name.endswith("hook_scale"):
                value = choice.choice([FromRun(cache), Scale(1.5)])
            edits.append(Edit(name, value, **indices))
    return edits


CASES = {
    "one row": (1, None, {}),
    "several rows": (3, None, {}),
    "padded": (3, padded(), {}),
    "residual after the norm": (3, padded(), {"apply_residual_connection_post_layernorm": True}),
    "slow but exact": (3, None, {"slow_but_exact": True, "pretraining_tp": 2}),
    "six heads": (2, None, {"n_head": 6}),
    "one layer": (2, None, {"n_layer": 1}),
}


@pytest.mark.parametrize("opt_in", [False, True], ids=["", "opt-in points"])
@pytest.mark.parametrize("case", CASES)
def test_every_hook_equals_whole_forwards(case: str, opt_in: bool) -> None:
    rows, mask, settings = CASES[case]
    bridge = make_bridge(opt_in, **settings)
    tokens = random_tokens(rows, 9)
    _, cache = bridge.run_with_cache(random_tokens(rows, 9, seed=7), attention_mask=mask)
    edits = edits_everywhere(bridge, cache, 9, seed=len(case))
    edits = edits if opt_in else edits[::2]  # those points are there with the others too
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask).run(edits)
    assert result.plan.n_whole == 0
    base = last_real(bridge(tokens, attention_mask=mask), mask)
    torch.testing.assert_close(result.base["metric"], base, **CLOSE)
    moved = 0
    for edit, found in zip(edits, result.values["metric"], strict=True):
        expected = last_real(whole_logits(bridge, tokens, edit, mask), mask)
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, edit=edit: f"{edit}: {text}")
        moved += bool((expected - base).abs().max() > 1e-6)
    assert moved > len(edits) / 2  # the comparison is of numbers that differ
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("mask", [None, padded()], ids=["unpadded", "padded"])
def test_a_metric_that_reads_every_position(mask: Tensor | None) -> None:
    bridge = make_bridge()
    tokens = random_tokens(3, 9)
    _, cache = bridge.run_with_cache(random_tokens(3, 9, seed=7), attention_mask=mask)
    edits = edits_everywhere(bridge, cache, 9, seed=1)[::3]
    result = Sweep(bridge, tokens, NextTokenLoss(), attention_mask=mask).run(edits)
    for edit, found in zip(edits, result.values["metric"], strict=True):
        logits = whole_logits(bridge, tokens, edit, mask)
        for row in range(3):
            keep = torch.ones(8, dtype=torch.bool) if mask is None else mask[row, 1:].bool() & mask[row, :-1].bool()
            loss = torch.nn.functional.cross_entropy(logits[row, :-1][keep], tokens[row, 1:][keep])
            torch.testing.assert_close(found[row], loss, **CLOSE)


def test_several_edits_in_one_run() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 9)
    _, cache = bridge.run_with_cache(random_tokens(2, 9, seed=7))
    every = [
        edit
        for edit in edits_everywhere(bridge, cache, 9, seed=3)
        if "hook_unembed" not in edit.hook and "scale" not in edit.hook
    ]
    choice = random.Random(0)
    sets = [choice.sample(every, choice.randint(2, 5)) for _ in range(60)]
    # Hooks of one point run in the order given, points in the order of the model; the sweep does the same.
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(sets)
    for chosen, found in zip(sets, result.values["metric"], strict=True):
        expected = last_real(whole_logits(bridge, tokens, chosen), None)
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, chosen=chosen: f"{chosen}: {text}")


def test_an_edit_of_the_last_layer_is_made_once() -> None:
    """That layer takes two passes where some columns are not read; a sum made in both would show."""
    bridge = make_bridge(opt_in=True)
    tokens = random_tokens(2, 7)
    names = [name for name in bridge.hook_dict if name.startswith("blocks.2.") and not name.endswith("scale")]
    edits = [Edit(name, Add(0.2)) for name in names]
    edits += [Edit("blocks.2.hook_resid_pre", Add(torch.linspace(-1, 1, 48)), positions=p) for p in (2, [2, 6], 6)]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    for edit, found in zip(edits, result.values["metric"], strict=True):
        expected = last_real(whole_logits(bridge, tokens, edit), None)
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, edit=edit: f"{edit}: {text}")


def test_rows_of_one_edit() -> None:
    bridge = make_bridge()
    tokens = random_tokens(3, 7)
    edits = [Edit("blocks.1.hook_attn_out", Zero(), rows=row, positions=p) for row in range(3) for p in (2, 6)]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    for edit, found in zip(edits, result.values["metric"], strict=True):
        torch.testing.assert_close(found, last_real(whole_logits(bridge, tokens, edit), None), **CLOSE)
        others = [row for row in range(3) if row != edit.rows]
        assert torch.equal(found[others], result.base["metric"][others])


def test_an_edit_that_changes_no_bit_scores_what_the_base_scores() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    _, cache = bridge.run_with_cache(tokens)
    edits = [Edit(name, FromRun(cache), positions=3) for name in bridge.hook_dict]
    sweep = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL))
    result = sweep.run(edits)
    assert result.plan.n_unchanged == len(edits)
    assert torch.equal(result.values["metric"], result.base["metric"].expand(len(edits), 2))


def test_what_cannot_reach_the_metric_is_the_base_run() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=p) for layer in range(3) for p in (4, 5, 6)]
    edits += [Edit("blocks.2.attn.hook_z", Zero(), positions=[0, 1, 2])]  # nothing attends after the last layer
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL, position=3)).run(edits)
    assert result.plan.n_unchanged == len(edits)
    assert torch.equal(result.values["metric"], result.base["metric"].expand(len(edits), 2))
    for edit in edits:
        logits = whole_logits(bridge, tokens, edit)
        assert torch.equal(
            logits[:, 3, ANSWER] - logits[:, 3, FOIL], (bridge(tokens)[:, 3, ANSWER] - bridge(tokens)[:, 3, FOIL])
        )


def test_a_whole_layer_of_the_other_run_is_the_other_run() -> None:
    bridge = make_bridge()
    tokens, other = random_tokens(2, 7), random_tokens(2, 7, seed=4)
    _, cache = bridge.run_with_cache(other)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", FromRun(cache)) for layer in range(3)]
    edits += [
        Edit("hook_embed", FromRun(cache)),
        Edit("embed.hook_in", FromRun(cache)),
        Edit("ln_final.hook_out", FromRun(cache)),
    ]
    found = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits).values["metric"]
    torch.testing.assert_close(found, last_real(bridge(other), None).expand(len(edits), 2), **CLOSE)


def test_none_and_the_same_twice() -> None:
    bridge = make_bridge()
    sweep = Sweep(bridge, random_tokens(2, 7), LogitDifference(ANSWER, FOIL))
    assert sweep.run([]).values["metric"].shape == (0, 2)
    edit = Edit("blocks.1.attn.hook_z", Zero(), heads=2)
    found = sweep.run([edit, Edit("blocks.0.hook_mlp_out", Zero()), edit, edit]).values["metric"]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])


def test_the_same_call_gives_the_same_bits_and_another_plan_nearly_them() -> None:
    bridge = TransformerBridge(make_bloom(torch.float32))
    tokens = random_tokens(2, 9)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=p) for layer in range(3) for p in range(9)]
    first, second = (Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits).values["metric"] for _ in range(2))
    assert torch.equal(first, second)
    scale = bridge(tokens).abs().max()
    for rows in (9, 40):
        other = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), rows_at_once=rows).run(edits)
        # 64 roundings of the largest logit a layer: other shapes of products round otherwise.
        torch.testing.assert_close(other.values["metric"], first, rtol=0, atol=float(scale) * 64 * 3 * 2**-24)


def test_a_smaller_memory_limit_makes_more_batches_and_too_small_a_one_is_refused() -> None:
    bridge = make_bridge()
    tokens = random_tokens(1, 9)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=p) for layer in range(3) for p in range(9)]
    metric = LogitDifference(ANSWER, FOIL)
    free = Sweep(bridge, tokens, metric).run(edits)
    with pytest.raises(InputError, match=r"memory_limit=1,000 bytes is too little: .* Give at least ([\d,]+)") as error:
        Sweep(bridge, tokens, metric, memory_limit=1000).run(edits)
    least = int(str(error.value).split("Give at least ")[1].split(", or")[0].replace(",", ""))
    tight = Sweep(bridge, tokens, metric, memory_limit=least).run(edits)
    assert len(tight.plan.batches) > len(free.plan.batches)
    assert tight.plan.peak_bytes <= least
    torch.testing.assert_close(tight.values["metric"], free.values["metric"], **CLOSE)
    with pytest.raises(InputError, match="too little"):
        Sweep(bridge, tokens, metric, memory_limit=least - 100).run(edits)


def test_functions_of_the_users_own_are_honoured() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    edits = [Edit("blocks.1.hook_resid_pre", Zero(), positions=p) for p in (0, 6)]

    def steer(tensor: Tensor, hook: Any) -> Tensor:
        return tensor + 0.1 * tensor.mean(dim=1, keepdim=True)

    with bridge.hooks([("blocks.2.hook_mlp_out", steer)]):
        result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
        expected = [last_real(whole_logits(bridge, tokens, edit), None) for edit in edits]
    assert result.plan.n_whole == 2
    assert "blocks.2.hook_mlp_out" in str(result.plan)
    torch.testing.assert_close(result.values["metric"], torch.stack(expected), **CLOSE)
    plain = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    assert not torch.allclose(plain.values["metric"], result.values["metric"])
    assert not torch.allclose(plain.base["metric"], result.base["metric"])


def test_torch_hooks_of_the_users_own_are_honoured() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    edit = Edit("blocks.0.hook_resid_pre", Zero(), positions=2)
    handle = bridge.hf_model.transformer.h[1].register_forward_hook(lambda m, a, out: (out[0] * 1.1, *out[1:]))
    try:
        result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run([edit])
        expected = last_real(whole_logits(bridge, tokens, edit), None)
    finally:
        handle.remove()
    assert result.plan.n_whole == 1
    torch.testing.assert_close(result.values["metric"][0], expected, **CLOSE)


def test_a_sweep_takes_the_fused_kernel_where_the_bridge_does() -> None:
    bridge = make_bridge()
    tokens, mask = random_tokens(3, 9), padded()
    _, cache = bridge.run_with_cache(random_tokens(3, 9, seed=7), attention_mask=mask)
    edits = edits_everywhere(bridge, cache, 9, seed=5)
    exact = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask).run(edits)
    bridge.set_attn_implementation("sdpa")
    with mock.patch.object(
        BloomAttentionBridge, "fast_mix", autospec=True, side_effect=BloomAttentionBridge.fast_mix
    ) as fast:
        found = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask).run(edits)
    assert fast.call_count > 3  # the base run has one a layer
    torch.testing.assert_close(found.values["metric"], exact.values["metric"], **CLOSE)


def test_an_adapter_acts() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        make_bloom(torch.float64), LoraConfig(target_modules=["query_key_value", "dense"], r=4, init_lora_weights=False)
    )
    bridge = TransformerBridge(model.eval())
    tokens = random_tokens(2, 7)
    edits = [Edit(f"blocks.{layer}.attn.hook_z", Zero(), heads=head) for layer in range(3) for head in range(4)]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    assert result.plan.n_whole == 0
    for edit, found in zip(edits, result.values["metric"], strict=True):
        torch.testing.assert_close(found, last_real(whole_logits(bridge, tokens, edit), None), **CLOSE)


def test_the_base_run_from_a_cache() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    edits = [Edit("blocks.1.attn.hook_z", Zero(), heads=1), Edit("blocks.2.mlp.hook_post", Zero(), neurons=[3, 4])]
    metric = LogitDifference(ANSWER, FOIL)
    sweep = Sweep(bridge, tokens, metric)
    names = sweep.needed_names(edits)
    assert not any("blocks.0." in name for name in names)
    _, cache = bridge.run_with_cache(tokens, names_filter=names)
    given = Sweep(bridge, tokens, metric, base_cache=cache).run(edits)
    assert torch.equal(given.values["metric"], sweep.run(edits).values["metric"])
    with pytest.raises(CacheKeyError, match=r"lacks .*blocks\.0\.hook_resid_pre"):
        Sweep(bridge, tokens, metric, base_cache=cache).run([Edit("blocks.0.hook_resid_pre", Zero())])
    with pytest.raises(InputError, match="other tokens"):
        Sweep(bridge, random_tokens(2, 7, seed=9), metric, base_cache=cache).run(edits)


@pytest.mark.parametrize("first", [0, 1])
def test_a_base_cache_of_another_run_is_refused_by_name(first: int) -> None:
    """Tokens, positions, mask, rows, dtype; a plain dictionary too, as far as what it holds tells."""
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    edits = [Edit(f"blocks.{first}.attn.hook_z", Zero(), heads=1)]
    metric = LogitDifference(ANSWER, FOIL)
    names = Sweep(bridge, tokens, metric).needed_names(edits)

    def cache_of(*given: Any, **settings: Any) -> Any:
        return bridge.run_with_cache(*given, names_filter=names, **settings)[1]

    def refused(cache: Any, words: str, **settings: Any) -> None:
        with pytest.raises(InputError, match=words):
            Sweep(bridge, tokens, metric, base_cache=cache, **settings).run(edits)

    own = cache_of(tokens)
    refused(cache_of(tokens.flip(0)), "other tokens")
    refused(cache_of(tokens, attention_mask=mask), "another attention mask")
    refused(own, "another attention mask", attention_mask=mask)
    refused(cache_of(tokens[:1]), "2 rows of 7 positions")
    refused(cache_of(random_tokens(2, 8)), "2 rows of 7 positions")
    refused(cache_of(tokens, pos_slice=-1), "2 rows of 7 positions")
    refused(cache_of(tokens).to(dtype=torch.float32), "is torch.float32 on cpu")
    refused({name: own[name][:, :6] for name in names}, "2 rows of 7 positions")
    if first == 0:
        refused({name: own[name].flip(0) for name in names}, r"blocks\.0\.hook_resid_pre holds other numbers")
        other = make_bridge(scale=0.2)
        refused(other.run_with_cache(tokens, names_filter=names)[1], r"blocks\.0\.hook_resid_pre holds other numbers")
    whole = Sweep(bridge, tokens, metric).run(edits).values["metric"]
    for cache in (own, dict(own), cache_of(tokens, attention_mask=torch.ones_like(tokens))):
        assert torch.equal(Sweep(bridge, tokens, metric, base_cache=cache).run(edits).values["metric"], whole)


def test_the_base_run_is_made_anew_when_edits_need_more_of_it() -> None:
    bridge = make_bridge()
    tokens = random_tokens(1, 7)
    sweep = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL))
    for hook in ("blocks.2.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post", "embed.hook_out"):
        edit = Edit(hook, Zero(), positions=1)
        found = sweep.run([edit]).values["metric"][0]
        torch.testing.assert_close(found, last_real(whole_logits(bridge, tokens, edit), None), **CLOSE)


def test_the_base_run_is_made_anew_when_the_model_is_another() -> None:
    bridge = make_bridge()
    tokens = random_tokens(1, 7)
    edit = Edit("blocks.1.hook_mlp_out", Zero(), positions=1)
    sweep = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL))

    def holds() -> Tensor:
        result = sweep.run([edit])
        torch.testing.assert_close(result.base["metric"], last_real(bridge(tokens), None), **CLOSE)
        torch.testing.assert_close(
            result.values["metric"][0], last_real(whole_logits(bridge, tokens, edit), None), **CLOSE
        )
        return result.base["metric"]

    before = holds()
    bridge.hf_model.transformer.h[0].mlp.dense_h_to_4h.weight.mul_(1.5)  # in place, behind our back
    assert not torch.equal(holds(), before)
    handles = bridge.add_hook("blocks.0.hook_mlp_out", lambda t, hook: t * 2)
    hooked = holds()
    for handle in handles:
        handle.remove()
    assert not torch.equal(holds(), hooked)
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        sweep.run([edit])


def test_a_function_of_what_is_there() -> None:
    bridge = make_bridge()
    tokens = random_tokens(2, 7)
    edits = [
        Edit("blocks.1.hook_mlp_out", Apply(lambda region: region.flip(0))),  # looks at several positions
        Edit("blocks.1.hook_mlp_out", Apply(lambda region: region**2), positions=3),
    ]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    assert result.plan.n_whole == 1
    for function, place, found in (
        (lambda t: t.flip(1), slice(None), result.values["metric"][0]),
        (lambda t: t**2, 3, result.values["metric"][1]),
    ):

        def hook(tensor: Tensor, hook: Any, function: Any = function, place: Any = place) -> Tensor:
            new = tensor.clone()
            new[:, place] = function(tensor)[:, place]
            return new

        logits = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", hook)])
        torch.testing.assert_close(found, last_real(logits, None), **CLOSE)


def test_a_function_may_run_the_model() -> None:
    """What it runs is neither edited nor packed."""
    bridge = make_bridge()
    tokens, other = random_tokens(2, 7), random_tokens(3, 5, seed=8)
    apart = bridge.hf_model(other).logits[0, -1, :48]
    edits = [
        Edit(hook, Apply(lambda region: region + bridge.hf_model(other).logits[0, -1, :48]), positions=position)
        for hook in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre")
        for position in (3, 6)
    ]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits)
    assert result.plan.n_whole == 0
    for edit, found in zip(edits, result.values["metric"], strict=True):
        added = Edit(edit.hook, Add(apart), positions=edit.positions)
        torch.testing.assert_close(found, last_real(whole_logits(bridge, tokens, added), None), **CLOSE)


def test_an_interrupted_sweep_gives_what_it_has() -> None:
    bridge = make_bridge()
    tokens = random_tokens(1, 9)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=p) for layer in range(3) for p in range(9)]
    calls = []

    def metric(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 22:  # one for finding out what it reads, one for the base run, and twenty edits
            raise KeyboardInterrupt
        return logits[0, -1, ANSWER] - logits[0, -1, FOIL]

    sweep = Sweep(bridge, tokens, metric, rows_at_once=9)
    assert len(sweep.plan(edits).batches) > 1
    calls.clear()
    result = sweep.run(edits, on_interrupt="return")
    assert 0 < int(result.done.sum()) < len(edits)
    assert torch.isfinite(result.values["metric"][result.done]).all()
    assert torch.isnan(result.values["metric"][~result.done]).all()
    whole = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL)).run(edits).values["metric"][:, 0]
    torch.testing.assert_close(result.values["metric"][result.done], whole[result.done], **CLOSE)
    assert is_pristine(bridge.hf_model)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(edits)
    assert is_pristine(bridge.hf_model)


def test_nothing_is_left_behind_by_an_error() -> None:
    bridge = make_bridge()

    def wrong(region: Tensor) -> Tensor:
        if region.shape[0] == 1 and wrong_after.append(1) is None and len(wrong_after) > 1:
            raise RuntimeError("in the middle of it")
        return region + 1

    wrong_after: list[int] = []
    with pytest.raises(RuntimeError, match="in the middle"):
        Sweep(bridge, random_tokens(1, 7), LogitDifference(ANSWER, FOIL)).run(
            [Edit("blocks.1.hook_mlp_out", Apply(wrong), positions=1)]
        )
    assert is_pristine(bridge.hf_model)
    assert bridge.live_hooks() == []


REFUSED = {
    "unknown hook": (
        Edit("blocks.1.hook_resid_prr", Zero()),
        HookNameError,
        r"Nearest names: blocks\.1\.hook_resid_pre",
    ),
    "position outside": (
        Edit("blocks.1.hook_resid_pre", Zero(), positions=7),
        InputError,
        "there are 7, 0 to 6; found 7",
    ),
    "head outside": (Edit("blocks.1.attn.hook_z", Zero(), heads=[0, 4]), InputError, "there are 4, 0 to 3; found 4"),
    "heads of a residual": (Edit("blocks.1.hook_resid_pre", Zero(), heads=0), InputError, "heads= has no meaning at"),
    "named twice": (Edit("blocks.1.hook_resid_pre", Zero(), positions=[1, -6]), InputError, "names one of them twice"),
    "none": (Edit("blocks.1.hook_resid_pre", Zero(), positions=[]), InputError, "chooses none"),
    "no number": (Edit("blocks.1.hook_resid_pre", Zero(), positions=[1.5]), InputError, "whole numbers"),  # type: ignore[list-item]
    "no edit": ("blocks.1.hook_resid_pre", InputError, "A sweep takes Edits"),
    "value of another shape": (
        Edit("blocks.1.hook_resid_pre", SetTo(torch.zeros(5))),
        InputError,
        r"does not broadcast .*\(2, 7, 48\)",
    ),
    "another length": (
        Edit("blocks.1.hook_resid_pre", FromRun({"blocks.1.hook_resid_pre": torch.zeros(2, 5, 48)})),
        InputError,
        "same number of tokens",
    ),
    "without a batch": (
        Edit("blocks.1.hook_resid_pre", FromRun({"blocks.1.hook_resid_pre": torch.zeros(7, 48)})),
        InputError,
        "remove_batch_dim=False",
    ),
    "not kept": (Edit("blocks.1.hook_resid_pre", FromRun({})), CacheKeyError, "did not keep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    edit, error, message = REFUSED[case]
    bridge = make_bridge()
    with pytest.raises(error, match=message):
        Sweep(bridge, random_tokens(2, 7), LogitDifference(ANSWER, FOIL)).run([edit])
    assert is_pristine(bridge.hf_model)


def test_a_model_in_training_mode_is_refused() -> None:
    bridge = make_bridge()
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        Sweep(bridge, random_tokens(2, 7), LogitDifference(ANSWER, FOIL))
