"""Running: inputs, losses, starting and stopping at a layer, what is cached and how much it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from pellucid import TransformerBridge
from pellucid.errors import CacheKeyError, CacheTooLargeError, HookUnreachableError, HookValueError, InputError
from tests.models import is_pristine, make_bloom, make_pair, random_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_start_gives_the_full_runs_logits(dtype: torch.dtype, padded: bool) -> None:
    bridge = TransformerBridge(make_bloom(dtype))
    tokens = random_tokens(2, 7)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    full, cache = bridge.run_with_cache(tokens, attention_mask=mask)
    for layer in range(4):
        residual = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
        before = residual.clone()
        assert torch.equal(bridge(residual, start_at_layer=layer, attention_mask=mask), full)
        again = bridge.run_with_hooks(
            residual,
            start_at_layer=layer,
            attention_mask=mask,
            fwd_hooks=[("ln_final.hook_out", lambda t, hook: None)]
            + ([(f"blocks.{layer}.hook_resid_pre", lambda t, hook: t.add_(0))] if layer < 3 else []),
        )
        assert torch.equal(again, full)
        assert torch.equal(residual, before)
    assert is_pristine(bridge.hf_model)


def test_the_start_residual_is_the_callers() -> None:
    bridge, _ = make_pair()
    _, cache = bridge.run_with_cache(random_tokens())
    residual = cache["resid_pre", 1].clone()
    before = residual.clone()
    with torch.no_grad():
        edited = bridge.run_with_hooks(
            residual, start_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", lambda t, hook: t.mul_(2))]
        )
        assert torch.equal(residual, before)
        assert torch.equal(edited, bridge(residual * 2, start_at_layer=1))


def test_a_model_that_returns_tuples() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.hf_model.config.return_dict = False
    assert torch.equal(bridge(tokens), model(tokens).logits)
    logits, cache = bridge.run_with_cache(tokens, names_filter="hook_unembed")
    assert torch.equal(logits, cache["hook_unembed"])


def test_stop_returns_the_residual_and_runs_nothing_after() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    _, cache = bridge.run_with_cache(tokens)
    for layer in range(4):
        wanted = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
        ran: list[str] = []
        handles = [
            module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
            for name, module in bridge.hf_model.named_modules()
            if (name.startswith("transformer.h.") and name.count(".") == 2) or name == "lm_head"
        ]
        assert torch.equal(bridge(tokens, stop_at_layer=layer), wanted)
        for handle in handles:
            handle.remove()
        assert ran == [f"transformer.h.{index}" for index in range(layer)]
    assert torch.equal(bridge(tokens, stop_at_layer=-1), cache["resid_pre", 2])
    assert torch.equal(bridge(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2), cache["resid_pre", 2])
    assert bridge(tokens, stop_at_layer=1, return_type=None) is None
    assert is_pristine(bridge.hf_model)


def test_what_a_part_of_a_run_holds() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    _, cache = bridge.run_with_cache(tokens)
    double = [("blocks.1.hook_resid_post", lambda t, hook: t * 2)]
    assert torch.equal(bridge.run_with_hooks(tokens, stop_at_layer=2, fwd_hooks=double), cache["resid_pre", 2] * 2)
    for stop in (0, 1, 3):
        output, stopped = bridge.run_with_cache(tokens, stop_at_layer=stop)
        assert set(stopped) == {
            name for name in cache if not name.startswith(("ln_final", "hook_unembed"))
            and not name.startswith(tuple(f"blocks.{layer}." for layer in range(stop, 3)))
        }  # fmt: skip
        output.zero_()  # the caller's: not that of the cache
        for name in stopped:
            assert torch.equal(stopped[name], cache[name]), name
    _, started = bridge.run_with_cache(cache["resid_pre", 2], start_at_layer=2)
    assert next(iter(started)) == "blocks.2.hook_resid_pre"
    for name in started:
        assert torch.equal(started[name], cache[name])


def test_functions_of_a_single_row_see_no_batch_axis() -> None:
    bridge, _ = make_pair()
    tokens, seen = random_tokens(1, 5), []

    def first_out(tensor: Tensor, hook: Any) -> None:
        seen.append(tuple(tensor.shape))
        tensor[0] = 0

    name = "blocks.1.hook_resid_post"
    wanted = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t.index_fill(1, torch.tensor([0]), 0.0))])
    returned = [(name, lambda t, hook: t.index_fill(0, torch.tensor([0]), 0.0))]
    for hooks in ([(name, first_out)], returned):
        assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=hooks, remove_batch_dim=True), wanted)
    assert seen == [(5, 48)]
    gradients: list[Tensor] = []
    for alone in (False, True):
        grab = [(name, lambda g, hook: gradients.append(g.clone()))]
        bridge.run_with_hooks(tokens, bwd_hooks=grab, return_type="loss", remove_batch_dim=alone).backward()
    assert torch.equal(gradients[0][0], gradients[1])
    with pytest.raises(HookValueError, match=r"hook <lambda> \(.*test_running.py"):
        bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t[0])], remove_batch_dim=True)


def test_backward_functions_pass_over_token_ids() -> None:
    bridge, _ = make_pair()
    seen: list[str] = []
    bridge.add_hook(lambda name: "embed" in name, lambda g, hook: seen.append(hook.name), dir="bwd")
    bridge(random_tokens(), return_type="loss").backward()
    bridge.reset_hooks()
    assert "embed.hook_in" not in seen
    assert "hook_embed" in seen


def test_a_level_of_the_callers_own() -> None:
    bridge, _ = make_pair()
    for level in (1, 2):
        bridge.add_hook("hook_embed", lambda t, hook: None, level=level)
    bridge.reset_hooks(level=2)
    assert [handle.context_level for handle in bridge.hook_dict["hook_embed"].fwd_hooks] == [1]
    bridge.hook_dict["hook_embed"].fwd_hooks[0].hook.remove()
    assert not bridge.live_hooks()


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("blocks.2.attn.hook_q", {"stop_at_layer": 2}),
        ("blocks.2.hook_resid_pre", {"stop_at_layer": 2}),
        ("hook_unembed", {"stop_at_layer": 3}),
        ("ln_final.hook_scale", {"stop_at_layer": 3}),
        ("blocks.1.ln1.hook_in", {"stop_at_layer": 0}),
        (["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"], {"stop_at_layer": 1}),
    ],
)
def test_a_hook_that_would_not_run_is_refused(name: Any, span: dict[str, int]) -> None:
    bridge, _ = make_pair()
    with pytest.raises(HookUnreachableError, match="stop_at_layer"):
        bridge.run_with_hooks(random_tokens(), fwd_hooks=[(name, lambda t, hook: None)], **span)
    with pytest.raises(HookUnreachableError):
        bridge.run_with_cache(random_tokens(), names_filter=name, **span)
    residual = torch.randn(1, 3, 48)
    with pytest.raises(HookUnreachableError, match="start_at_layer=1"):
        bridge.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[("hook_embed", lambda t, hook: None)])


def test_span_and_cache_are_refused_together() -> None:
    bridge, _ = make_pair()
    with pytest.raises(InputError, match="past_key_values"):
        bridge(torch.randn(1, 3, 48), start_at_layer=1, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="past_key_values"):
        bridge(random_tokens(), stop_at_layer=1, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="return_type"):
        bridge(random_tokens(), stop_at_layer=1, return_type="loss")


def native_loss(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Hugging Face's own loss, with targets ignored unless they and their position are real."""
    labels = tokens.clone()
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100
    return model(tokens, attention_mask=mask, labels=labels).loss


def test_losses() -> None:
    bridge, model = make_pair()
    tokens = random_tokens(3, 8)
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[0, :3], right[1, -4:] = 0, 0
    for mask in (None, left, right):
        loss = bridge(tokens, return_type="loss", attention_mask=mask)
        # Two summation orders of 24 losses of about 5 nats.
        assert torch.allclose(loss, native_loss(model, tokens, mask), rtol=1e-6, atol=1e-6)
        each = bridge(tokens, return_type="loss", loss_per_token=True, attention_mask=mask)
        assert each.shape == (3, 7)
        count = torch.ones(3, 7) if mask is None else mask[:, 1:].float() * mask[:, :-1].float()
        assert (each[count == 0] == 0).all()
        assert torch.allclose(each.sum() / count.sum(), loss)
        logits, both = bridge(tokens, return_type="both", attention_mask=mask)
        assert torch.equal(both, loss)
        reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 7)
        assert torch.allclose(each, reference * count, rtol=1e-5, atol=1e-6)
    assert bridge(tokens, return_type=None) is None


def test_a_padded_rows_loss_is_its_own() -> None:
    bridge, _ = make_pair()
    row = random_tokens(1, 5)
    alone = bridge(row, return_type="loss")
    for side in ("left", "right"):
        tokens, mask = random_tokens(1, 9, seed=4), torch.zeros(1, 9, dtype=torch.long)
        where = slice(4, 9) if side == "left" else slice(0, 5)
        tokens[0, where], mask[0, where] = row[0], 1
        assert torch.allclose(bridge(tokens, return_type="loss", attention_mask=mask), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_strings_have_the_right_loss(demo: TransformerBridge, side: Any) -> None:
    texts = ["Everyone has the right to life, liberty and security.", "Toda persona"]
    losses = [demo(text, return_type="loss", loss_per_token=True) for text in texts]
    mean = sum(float(loss.sum()) for loss in losses) / sum(loss.numel() for loss in losses)
    assert math.isclose(float(demo(texts, return_type="loss", padding_side=side)), mean, rel_tol=1e-5)


def test_half_precision_loss_is_wide() -> None:
    bridge, model = make_pair(torch.bfloat16)
    tokens = random_tokens()
    loss = bridge(tokens, return_type="loss")
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, model(tokens, labels=tokens).loss, rtol=1e-6, atol=1e-6)


def test_filters() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    cases: list[tuple[Any, list[str]]] = [
        ("blocks.1.attn.q.hook_out", ["blocks.1.attn.hook_q"]),
        ("blocks.*.mlp.hook_post", [f"blocks.{i}.mlp.hook_post" for i in range(3)]),
        (["hook_embed", "blocks.0.hook_in"], ["hook_embed", "blocks.0.hook_resid_pre"]),
        (lambda name: name.endswith("hook_z"), [f"blocks.{i}.attn.hook_z" for i in range(3)]),
        (["blocks.0.hook_in", "blocks.0.hook_resid_pre"], ["blocks.0.hook_resid_pre"]),
        ("blocks.0.*hook_in", ["blocks.0.hook_resid_pre", "blocks.0.ln1.hook_out"]),
    ]
    for names_filter, wanted in cases:
        _, cache = bridge.run_with_cache(tokens, names_filter=names_filter)
        assert list(cache)[: len(wanted)] == wanted


def test_cache_lookup() -> None:
    bridge, _ = make_pair()
    _, cache = bridge.run_with_cache(random_tokens(), names_filter="blocks.1.*")
    for key in (
        "blocks.1.attn.hook_pattern",
        ("pattern", 1),
        ("attn", 1),
        ("pattern", 1, "attn"),
        ("pattern", -2),
        "pattern1",
    ):
        assert torch.equal(cache[key], cache["blocks.1.attn.hook_pattern"])
        assert key in cache
    assert torch.equal(cache["scale", 1, "ln1"], cache["blocks.1.ln1.hook_scale"])
    assert torch.equal(cache["blocks.1.attn.o.hook_in"], cache["z", 1])
    with pytest.raises(CacheKeyError, match="exists but was not kept"):
        cache["pattern", 0]
    with pytest.raises(CacheKeyError, match="No hook point is called 'blocks.1.attn.hook_patern'.*hook_pattern"):
        cache["blocks.1.attn.hook_patern"]
    with pytest.raises(CacheKeyError, match="opt-in: switch use_attn_result on"):
        cache["result", 1]
    with pytest.raises(CacheKeyError, match="incl_bwd=True"):
        cache["blocks.1.attn.hook_z_grad"]


@pytest.mark.parametrize(
    "pos_slice",
    [
        -1,
        0,
        slice(1, 5),
        slice(None, None, 3),
        [0, 6, 2],
        torch.tensor([3]),
        (1, 4),
        (0, 6, 2),
        torch.arange(7) % 2 == 0,
    ],
)
def test_positions_kept(pos_slice: Any) -> None:
    bridge, _ = make_pair()
    tokens = random_tokens(2, 7)
    _, full = bridge.run_with_cache(tokens)
    _, cache = bridge.run_with_cache(tokens, pos_slice=pos_slice)
    if isinstance(pos_slice, tuple):  # a range, as in TransformerLens
        wanted = torch.arange(7)[slice(*pos_slice)]
    else:
        wanted = torch.arange(7)[[pos_slice] if isinstance(pos_slice, int) else pos_slice]
    for name, tensor in cache.items():
        axis = bridge._tree.index[name].pos_axis
        assert torch.equal(tensor, full[name].index_select(axis, wanted)), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert cache.nbytes == sum(bridge.estimate_cache(tokens, pos_slice=pos_slice).values())


def test_dtype_device_and_batch_dim() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens(1, 5)
    _, cache = bridge.run_with_cache(tokens, dtype=torch.float16, device="cpu", remove_batch_dim=True)
    assert cache["pattern", 0].shape == (4, 5, 5)
    assert cache["pattern", 0].dtype == torch.float16
    assert cache["embed.hook_in"].dtype == torch.int64
    with pytest.raises(InputError, match="batch of one row"):
        bridge.run_with_cache(random_tokens(2, 5), remove_batch_dim=True)
    _, plain = bridge.run_with_cache(tokens, return_cache_object=False)
    assert type(plain) is dict
    _, kept = bridge.run_with_cache(tokens)
    assert torch.equal(kept.tokens, tokens)
    assert kept.real.all()
    assert kept.to(dtype=torch.float64)["z", 0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_estimates_are_exact(dtype: torch.dtype) -> None:
    bridge = TransformerBridge(make_bloom(dtype))
    bridge.set_use_attn_result(True)
    bridge.set_use_hook_mlp_in(True)
    tokens = random_tokens(2, 7)
    for names_filter in (None, "*hook_pattern", "*.hook_scale"):
        plan = bridge.estimate_cache(tokens, names_filter)
        _, cache = bridge.run_with_cache(tokens, names_filter=names_filter)
        assert {name: tensor.nbytes for name, tensor in cache.items()} == plan
    ran: list[int] = []
    with (
        bridge.hooks([("hook_embed", lambda t, hook: ran.append(1))]),
        pytest.raises(CacheTooLargeError, match=r"max_cache_bytes=1,000.*Largest"),
    ):
        bridge.run_with_cache(tokens, max_cache_bytes=1000)
    assert not ran
    bridge.run_with_cache(tokens, max_cache_bytes=sum(bridge.estimate_cache(tokens).values()))


def test_the_estimate_counts_cached_keys() -> None:
    bridge, _ = make_pair()
    past = DynamicCache()
    bridge(random_tokens(2, 4), past_key_values=past)
    with pytest.raises(CacheTooLargeError):
        bridge.run_with_cache(
            random_tokens(2, 1), names_filter="*hook_pattern", past_key_values=past, max_cache_bytes=479
        )
    _, cache = bridge.run_with_cache(
        random_tokens(2, 1), names_filter="*hook_pattern", past_key_values=past, max_cache_bytes=480
    )
    assert cache.nbytes == 480  # 3 layers x 2 rows x 4 heads x 1 query x 5 keys x 4 bytes


def test_weights_are_views() -> None:
    bridge, model = make_pair()
    attention, mlp = bridge.blocks[1].attn, bridge.blocks[1].mlp
    fused = bridge.hf_model.transformer.h[1].self_attention.query_key_value
    by_head = fused.weight.view(4, 3, 12, 48)
    for index, name in enumerate(("W_Q", "W_K", "W_V")):
        weight = getattr(attention, name)
        assert weight.shape == (4, 48, 12)
        assert torch.equal(weight, by_head[:, index].transpose(1, 2))
        assert weight.untyped_storage().data_ptr() == fused.weight.untyped_storage().data_ptr()
        assert torch.equal(getattr(bridge, name)[1], weight)
    _, cache = bridge.run_with_cache(random_tokens())
    x = cache["blocks.1.ln1.hook_out"]
    q = torch.einsum("bpm,nmh->bpnh", x, attention.W_Q) + attention.b_Q
    assert torch.allclose(q, cache["q", 1], atol=1e-5)
    out = torch.einsum("bpnh,nhm->bpm", cache["z", 1], attention.W_O) + attention.b_O
    assert torch.allclose(out, cache["attn_out", 1], atol=1e-5)
    pre = cache["blocks.1.mlp.hook_in"] @ mlp.W_in + mlp.b_in
    assert torch.allclose(pre, cache["pre", 1], atol=1e-5)
    assert torch.allclose(cache["post", 1] @ mlp.W_out + mlp.b_out, cache["mlp_out", 1], atol=1e-5)
    assert torch.equal(cache["hook_embed"], bridge.W_E_eff[random_tokens()])
    assert torch.allclose(cache["ln_final.hook_out"] @ bridge.W_U + bridge.b_U, cache["hook_unembed"], atol=1e-5)
    with torch.no_grad():
        attention.W_Q[2] = 0
        attention.b_Q[2] = 0
    _, zeroed = bridge.run_with_cache(random_tokens())
    assert zeroed["q", 1][:, :, 2].count_nonzero() == 0
    assert torch.equal(zeroed["k", 1], cache["k", 1])
    assert not torch.equal(bridge(random_tokens()), model(random_tokens()).logits)


def test_tokens(demo: TransformerBridge) -> None:
    text = "Everyone has the right"
    ids = demo.tokenizer(text)["input_ids"]
    assert demo.to_tokens(text).tolist() == [ids]
    assert demo.to_tokens(text, prepend_bos=True).tolist() == [[demo.tokenizer.bos_token_id, *ids]]
    assert demo.to_string(demo.to_tokens(text)[0]) == text
    assert demo.to_string(demo.to_tokens([text, text])) == [text, text]
    assert "".join(demo.to_str_tokens(text)) == text
    assert demo.to_str_tokens([text, "Toda"])[0] == demo.to_str_tokens(text)
    assert demo.to_str_tokens(demo.to_tokens(text)[0].numpy()) == demo.to_str_tokens(text)
    assert demo.to_str_tokens(torch.tensor([], dtype=torch.int64)) == []
    long = text * 2000
    assert demo.to_tokens(long).shape[1] == len(demo.tokenizer(long)["input_ids"]) > 4000
    token = demo.to_single_token(" the")
    assert demo.to_single_str_token(token) == " the"
    assert demo.get_token_position(" the", text) == ids.index(token)
    assert torch.equal(demo.tokens_to_residual_directions(" the"), demo.W_U[:, token])
    assert demo.tokens_to_residual_directions(torch.tensor([[token, 5]])).shape == (1, 2, demo.cfg.d_model)
