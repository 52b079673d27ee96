"""Fast attention: torch's fused kernel where nothing looks inside a layer, held against float64 and Hugging Face.

The bound. ``eps`` is that of the dtype, ``e`` that of the kernel's own accuracy, which is float32 at least. A score is a
product of ``d`` terms and ALiBi; the fused kernel has it within ``df = e * ((d + 2) * scale * |q||k| + |alibi|)``, the exact
path rounds it to the dtype as well, within ``de = df + eps * (scale * |q||k| + |alibi|)``. Scores that are ``d`` off move
probabilities by a factor of at most ``exp(2 d)``; probabilities and output are rounded to the dtype, and sums over ``K``
keys, the division and the kernel's exponential (20 units in the last place) have the kernel's accuracy. So each path is
within ``(expm1(2 d) + eps + (2 K + 32) e) * sum_k pattern_k |v_k|`` of the real number, and within the sum of both of the
other. What underflows in float16 adds a half of its smallest number for each ``|v_k|``.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.models.bloom.modeling_bloom import BloomAttention

from pellucid import TransformerBridge
from pellucid.errors import InputError, PellucidWarning
from pellucid.model_bridge.generalized_components import JointQKVAttentionBridge, build_alibi_tensor
from pellucid.model_bridge.generalized_components.alibi_utils import add_mask_to_alibi
from pellucid.model_bridge.generalized_components.bloom_attention import BloomAttentionBridge
from pellucid.run_context import in_own_context, set_fast_attention
from tests.models import is_pristine, make_bloom, make_generator, make_pair, random_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def padded(kind: str, batch: int, length: int) -> Tensor:
    """An attention mask ``[batch, length]``; the last row is never padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    half = length // 2
    if kind == "left":
        mask[0, :half] = 0
    elif kind == "right":
        mask[0, half + 1 :] = 0
    elif kind == "hole":
        mask[0, half // 2 : half] = 0
    elif kind == "all":
        mask[0] = 0
    return mask


def additive(mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Hugging Face's additive mask for the last ``length`` positions, ``[batch, 1, length, key_pos]``."""
    keys = mask.shape[1]
    seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)[None] & mask.bool()[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class Case:
    """Queries, keys, values, ALiBi and mask of one attention, and what it should give."""

    def __init__(self, dtype: torch.dtype, n_heads: int, padding: str, length: int, keys: int, d_head: int) -> None:
        generator = torch.Generator().manual_seed(length + keys)
        fused = torch.randn(2, keys, n_heads, 3, d_head, generator=generator).to(dtype)
        self.q, self.k, self.v = (fused[..., part, :].transpose(1, 2) for part in range(3))  # views, as in the model
        self.q = self.q[:, :, keys - length :]
        self.dtype, self.scale = dtype, d_head**-0.5
        attended = padded(padding, 2, keys)
        self.alibi = build_alibi_tensor(attended, n_heads, dtype)
        self.mask = additive(attended, length, dtype)
        bridge = BloomAttentionBridge("self_attention", SimpleNamespace(n_heads=n_heads, d_model=n_heads * d_head))
        bridge.set_original_component(
            SimpleModule(beta=1.0, inv_norm_factor=self.scale, attention_dropout=torch.nn.Dropout(0.0)).eval()
        )
        self.bridge, self.n_heads = bridge, n_heads

    def bias(self) -> Tensor | None:
        return add_mask_to_alibi(self.alibi, self.mask, self.n_heads)

    def fast(self) -> Tensor:
        return self.bridge.fast_mix(self.q, self.k, self.v, self.bias())

    def exact(self) -> Tensor:
        return self.bridge.mix(self.q, self.k, self.v, self.mask, self.alibi)[0]

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64 what attention is, and the bounds of the fast and of the exact path: ``[batch, pos, head, d]``."""
        q, k, v, alibi, mask = (t.double() for t in (self.q, self.k, self.v, self.alibi, self.mask))
        pattern = ((q @ k.mT) * self.scale + alibi + mask).softmax(-1)
        eps, wide = torch.finfo(self.dtype).eps, torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        products = (q.abs() @ k.abs().mT) * self.scale
        counts = (mask == 0).expand_as(products)  # a masked score is lost in finfo.min in either path
        fast = wide * ((q.shape[-1] + 2) * products + alibi) * counts
        exact = fast + eps * (products + alibi) * counts
        size, sizes = pattern @ v.abs(), v.abs().sum(-2, keepdim=True)
        underflow = torch.finfo(self.dtype).smallest_normal * eps * (sizes + 1)

        def bound(score: Tensor) -> Tensor:
            off = torch.expm1(2 * score.amax(-1, keepdim=True)) + eps + (2 * k.shape[-2] + 32) * wide
            return (off * size + underflow).transpose(1, 2)

        return (pattern @ v).transpose(1, 2), bound(fast), bound(exact)


class SimpleModule(torch.nn.Module):
    """What the steps read of an attention."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def hold(case: Case) -> None:
    fast, exact = case.fast().double(), case.exact().double()
    real, fast_bound, exact_bound = case.reference()
    assert bool(torch.isfinite(fast).all())
    assert bool(((fast - real).abs() <= fast_bound).all())
    assert bool(((exact - real).abs() <= exact_bound).all())
    assert bool(((fast - exact).abs() <= fast_bound + exact_bound).all())
    # Sharper, if not derived: no worse than the exact path, give or take roundings of the result.
    if case.dtype == torch.float64:
        return  # the reference is no better than the paths
    slack = 4 * torch.finfo(case.dtype).eps * float(case.v.abs().max())
    assert float((fast - real).abs().max()) <= 2 * float((exact - real).abs().max()) + slack


@EVERY_DTYPE
@pytest.mark.parametrize("padding", ["none", "left", "right", "hole", "all"])
@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_within_the_bound(dtype: torch.dtype, n_heads: int, padding: str) -> None:
    for length, keys, d_head in ((1, 1, 12), (1, 19, 12), (2, 2, 8), (7, 7, 64), (5, 33, 16), (70, 70, 12)):
        case = Case(dtype, n_heads, padding, length, keys, d_head)
        if case.bias() is None:  # a fully masked row in float16: the exact path's
            assert dtype == torch.float16
            assert bool((case.mask.amax(-1) < 0).any())
            continue
        hold(case)


@EVERY_DTYPE
@pytest.mark.parametrize("padding", ["none", "left"])
def test_within_the_bound_at_2048(dtype: torch.dtype, padding: str) -> None:
    case = Case(dtype, 1, padding, 2048, 2048, 16)
    if case.bias() is not None:
        hold(case)


@pytest.mark.parametrize("fault", ["scale", "alibi", "mask", "heads"])
def test_the_bound_finds_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.bfloat16, 4, "left", 24, 24, 16)
    bias, fast = case.bias(), case.bridge.fast_mix
    assert bias is not None
    wrong = {
        "scale": lambda: fast(case.q, case.k, case.v, bias, 1.1 * case.scale),
        "alibi": lambda: fast(case.q, case.k, case.v, case.mask),
        "mask": lambda: fast(case.q, case.k, case.v, case.alibi),
        "heads": lambda: fast(case.q, case.k, case.v, bias.flip(1)),
    }
    monkeypatch.setattr(case, "fast", wrong[fault])
    with pytest.raises(AssertionError):
        hold(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_fully_masked_row_is_uniform_over_all_keys(dtype: torch.dtype) -> None:
    case = Case(dtype, 4, "left", 24, 24, 16)
    mean = case.v[:1].double().mean(-2)
    off = (case.fast()[0, :12].double() - mean).abs().max()
    assert off <= 2 * torch.finfo(dtype).eps * case.v.abs().max()


def test_rows_that_are_alike_share_one_bias() -> None:
    assert Case(torch.float32, 4, "none", 6, 6, 8).bias().shape == (1, 4, 6, 6)  # type: ignore[union-attr]
    assert Case(torch.float32, 4, "left", 6, 6, 8).bias().shape == (2, 4, 6, 6)  # type: ignore[union-attr]
    alibi = build_alibi_tensor(torch.ones(2, 6), 4, torch.float32)
    assert add_mask_to_alibi(alibi.flatten(0, 1), None, 4).shape == (2, 4, 1, 6)  # type: ignore[union-attr]


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each use of the fused kernel: the attention's path, and where its bias lies."""
    calls: list[tuple[str, int]] = []
    original = JointQKVAttentionBridge.fast_mix

    def fast_mix(self: JointQKVAttentionBridge, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: Any = None) -> Any:
        calls.append((self.path, bias.data_ptr()))
        return original(self, q, k, v, bias, scale)

    monkeypatch.setattr(JointQKVAttentionBridge, "fast_mix", fast_mix)
    return calls


def paths(calls: list[tuple[str, int]]) -> list[int]:
    """Layers, in the order in which the kernel ran in them."""
    found = [int(path.split(".")[2]) for path, _ in calls]
    calls.clear()
    return found


def fast_pair(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[TransformerBridge, Any]:
    """A bridge with fast attention, and an untouched Hugging Face copy of its model."""
    bridge, native = make_pair(dtype, **settings)
    bridge.set_attn_implementation("sdpa")
    return bridge, native


def near(fast: Tensor, exact: Tensor, n_layers: int = 3) -> None:
    """The bound of ``verify()``."""
    fast, exact = fast.detach(), exact.detach()
    eps = torch.finfo(fast.dtype).eps
    bound = (64 + 2 * exact.shape[1]) * n_layers * eps * float(exact.abs().max())
    assert bool(torch.isfinite(fast).all())
    assert float((fast.double() - exact.double()).abs().max()) <= bound


@EVERY_DTYPE
@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_logits(dtype: torch.dtype, n_heads: int, kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair(dtype, n_head=n_heads)
    real = TransformerBridge(copy.deepcopy(native).double())
    # Hugging Face's softmax is float32, in which the mask of a float64 model overflows.
    eager = TransformerBridge(native)
    for length in (1, 2, 17):
        tokens = random_tokens(3, length)
        for padding in ("none", "left", "right", "hole", "all"):
            mask = None if padding == "none" else padded(padding, 3, length)
            with torch.no_grad():
                fast, exact, wanted = (run(tokens, attention_mask=mask) for run in (bridge, eager, real))
            near(fast, exact)
            if dtype == torch.float16 and mask is not None and bool((mask[:, :1] == 0).any()):
                assert torch.equal(fast, exact)
                assert paths(kernel) == []
                continue
            assert len({place for _, place in kernel}) == 1  # one bias for all layers
            assert paths(kernel) == [0, 1, 2]
            if dtype != torch.float64:
                slack = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
                assert (fast - wanted).abs().max() <= 2 * (exact - wanted).abs().max() + slack
    assert is_pristine(bridge.hf_model)


def test_one_large_tensor_a_forward() -> None:
    """Of all that a forward makes, the bias alone has an entry for each head, query and key."""

    class Large(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
            for tensor in output if isinstance(output, tuple) else (output,):
                large = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() >= 4 * 200 * 200
                self.made += int(large and tensor.untyped_storage().data_ptr() not in known)
            return output

    bridge, native = fast_pair()
    tokens = random_tokens(1, 200)
    with torch.no_grad(), Large() as fast:
        bridge(tokens)
    with torch.no_grad(), Large() as exact:
        native(tokens)
    assert fast.made == 1
    assert exact.made >= 3 * 3


def test_a_layer_that_is_looked_into_takes_the_exact_path(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens = random_tokens()
    for site in ("hook_pattern", "hook_attn_scores"):
        seen: dict[str, Tensor] = {}
        fast = bridge.run_with_hooks(
            tokens, fwd_hooks=[(f"blocks.1.attn.{site}", lambda t, hook: seen.update({site: t.clone()}))]
        )
        assert paths(kernel) == [0, 2]
        near(fast, native(tokens).logits)
        _, cache = bridge.run_with_cache(tokens, names_filter=f"blocks.0.attn.{site}")
        assert paths(kernel) == [1, 2]
        bridge.set_attn_implementation("eager")
        _, exact = bridge.run_with_cache(tokens, names_filter=f"blocks.*.attn.{site}")
        bridge.set_attn_implementation("sdpa")
        assert torch.equal(cache[f"blocks.0.attn.{site}"], exact[f"blocks.0.attn.{site}"])  # nothing fast came before
        real = exact[f"blocks.1.attn.{site}"] > -1e30
        assert (seen[site] - exact[f"blocks.1.attn.{site}"])[real].abs().max() < 1e-4
    # A function that acts in another thread's block only, or in none any more, is no reason.
    handle = bridge.add_hook("blocks.2.attn.hook_pattern", lambda t, hook: None)[0]
    bridge(tokens)
    assert paths(kernel) == [0, 1]
    handle.remove()
    with bridge.hooks(bwd_hooks=[("blocks.1.attn.hook_pattern", lambda t, hook: None)]):
        bridge(tokens)
    assert paths(kernel) == [0, 2]
    bridge(tokens)
    assert paths(kernel) == [0, 1, 2]


def test_everything_cached_is_hugging_faces_to_the_bit(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens = random_tokens()
    outputs = native(tokens, output_attentions=True)
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, outputs.logits)
    assert all(torch.equal(cache["pattern", layer], outputs.attentions[layer]) for layer in range(3))
    assert kernel == []


def test_all_other_points_fire_as_ever(kernel: list[tuple[str, int]]) -> None:
    bridge, _ = make_pair()
    for switch in (bridge.set_use_attn_result, bridge.set_use_split_qkv_input, bridge.set_use_hook_mlp_in):
        switch(True)
    tokens, mask = random_tokens(), padded("left", 2, 9)
    names = [name for name in bridge.hook_dict if not name.endswith(("hook_pattern", "hook_attn_scores"))]
    _, exact = bridge.run_with_cache(tokens, names_filter=names, attention_mask=mask)
    bridge.set_attn_implementation("sdpa")
    _, fast = bridge.run_with_cache(tokens, names_filter=names, attention_mask=mask)
    assert paths(kernel) == [0, 1, 2]
    assert list(fast) == list(exact) == names
    for name in names:
        assert fast[name].shape == exact[name].shape
        assert fast[name].stride() == exact[name].stride()
        assert (fast[name].double() - exact[name].double()).abs().max() < 1e-4, name

    for site in ("attn.hook_z", "attn.hook_k", "attn.hook_result", "attn.hook_v_input", "hook_resid_pre"):

        def edit(tensor: Tensor, hook: Any) -> Tensor:
            return tensor * 1.5

        def edit_in_place(tensor: Tensor, hook: Any) -> None:
            tensor.mul_(1.5)

        hooked = [
            bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{site}", function)])
            for function in (edit, edit_in_place)
        ]
        assert paths(kernel) == [0, 1, 2] * 2
        assert torch.equal(*hooked)
        bridge.set_attn_implementation("eager")
        wanted = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{site}", edit)])
        assert not torch.equal(wanted, bridge(tokens))
        bridge.set_attn_implementation("sdpa")
        near(hooked[0], wanted)


def test_the_bare_model_stays_hugging_faces(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens = random_tokens()
    wanted = native(tokens).logits
    assert torch.equal(bridge.hf_model(tokens).logits, wanted)
    with bridge.hooks([("blocks.1.attn.hook_z", lambda t, hook: None)]):
        assert torch.equal(bridge.hf_model(tokens).logits, wanted)
    inside: list[Tensor] = []

    def call_the_model(tensor: Tensor, hook: Any) -> None:
        if not inside:
            inside.append(tensor)
            inside.append(bridge.hf_model(tokens).logits)

    bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", call_the_model)])
    assert torch.equal(inside[1], wanted)
    assert paths(kernel) == [0, 1, 2]
    other = TransformerBridge(bridge.hf_model)
    assert other.attn_implementation == "eager"
    assert torch.equal(other(tokens), wanted)
    assert kernel == []
    assert bridge.hf_model.config._attn_implementation == "eager"


def test_another_model_called_meanwhile_is_not_meant(kernel: list[tuple[str, int]]) -> None:
    bridge, _ = fast_pair()
    other, native = make_pair(scale=0.2)
    tokens = random_tokens()

    def called() -> Tensor:
        set_fast_attention(bridge.hf_model)
        with other.hooks([("blocks.1.attn.hook_z", lambda t, hook: None)]):
            logits: Tensor = other.hf_model(tokens).logits
        return logits

    assert torch.equal(in_own_context(called), native(tokens).logits)
    assert kernel == []


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_caches_in_chunks(dtype: torch.dtype, kind: str, kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair(dtype)
    tokens = random_tokens(2, 14)

    def cache() -> Any:
        return DynamicCache() if kind == "dynamic" else StaticCache(config=native.config, max_cache_len=20)

    masks = [None, padded("left", 2, 14)] if kind == "dynamic" else [None]
    for mask in masks:
        ours, theirs = cache(), cache()
        for start, stop in ((0, 8), (8, 13), (13, 14)):
            given = None if mask is None else mask[:, :stop]
            fast = bridge(tokens[:, start:stop], past_key_values=ours, attention_mask=given)
            exact = native(tokens[:, start:stop], past_key_values=theirs, attention_mask=given, use_cache=True).logits
            near(fast, exact)
            assert paths(kernel) == [0, 1, 2]
    if kind == "static":  # the mask has to reach over the whole cache, said as ever
        with pytest.raises(InputError, match="cached and new positions together"):
            bridge(tokens, past_key_values=cache(), attention_mask=padded("left", 2, 14))


def test_generation(kernel: list[tuple[str, int]]) -> None:
    bridge = TransformerBridge(make_generator())
    tokens, mask = random_tokens(2, 6), padded("left", 2, 6)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    for more in ({}, {"attention_mask": mask}, {"num_beams": 3}, {"use_past_kv_cache": False}):
        bridge.set_attn_implementation("eager")
        wanted = bridge.generate(tokens, **arguments, **more)
        assert kernel == []
        bridge.set_attn_implementation("sdpa")
        assert torch.equal(bridge.generate(tokens, **arguments, **more), wanted)
        assert paths(kernel) == [0, 1, 2] * 8
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    attentions = bridge.generate(tokens, **arguments, **asked).attentions
    assert kernel == []
    assert all(torch.is_tensor(pattern) for step in attentions for pattern in step)
    assert is_pristine(bridge.hf_model)


def test_from_and_to_a_layer(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens = random_tokens()
    residual = bridge(tokens, stop_at_layer=2)
    assert paths(kernel) == [0, 1]
    near(residual, native(tokens, output_hidden_states=True).hidden_states[2])
    near(bridge(residual, start_at_layer=2), native(tokens).logits)
    assert paths(kernel) == [2]
    assert is_pristine(bridge.hf_model)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(bridge: TransformerBridge, mask: Tensor | None) -> dict[str, Tensor]:
    """Of the loss: for every parameter, and at two points."""
    bridge.zero_grad()
    found: dict[str, Tensor] = {}
    names = ["blocks.1.attn.hook_z", "blocks.0.attn.hook_q", "hook_embed"]
    keep = [(name, lambda g, hook: found.update({hook.name: g.clone()})) for name in names]
    with bridge.hooks(bwd_hooks=keep):
        bridge(random_tokens(2, 12), return_type="loss", attention_mask=mask).backward()
    return found | {name: parameter.grad.clone() for name, parameter in bridge.named_parameters()}


@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients(padding: str, kernel: list[tuple[str, int]]) -> None:
    bridge, _ = make_pair(torch.float64)
    mask = None if padding == "none" else padded(padding, 2, 12)
    exact = gradients(bridge, mask)
    assert kernel == []
    bridge.set_attn_implementation("sdpa")
    fast = gradients(bridge, mask)
    assert paths(kernel) == [0, 1, 2]
    assert fast.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (fast[name] - gradient).abs().max() < 1e-12, name


def test_an_edit_in_place_under_gradients() -> None:
    """The kernel keeps its output for the backward pass; an edit of z must not reach it."""
    bridge, _ = fast_pair(torch.float64)
    tokens = random_tokens()

    def run(function: Any) -> Tensor:
        bridge.zero_grad()
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", function)], return_type="loss").backward()
        return bridge.hf_model.transformer.h[1].self_attention.query_key_value.weight.grad.clone()

    def write(tensor: Tensor, hook: Any) -> None:
        tensor.mul_(2)

    assert torch.equal(run(write), run(lambda t, hook: t * 2))


# -- what needs the exact path -----------------------------------------------------------------------------------------


def test_dropout_in_training_is_hugging_faces(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair(attention_dropout=0.2, hidden_dropout=0.1)
    tokens = random_tokens()
    bridge.train()
    native.train()
    torch.manual_seed(3)
    ours = bridge(tokens)
    torch.manual_seed(3)
    assert torch.equal(ours, native(tokens).logits)
    assert kernel == []
    bridge.eval()
    near(bridge(tokens), native.eval()(tokens).logits)
    assert paths(kernel) == [0, 1, 2]


def test_gradient_checkpointing_takes_the_exact_path(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair(hidden_dropout=0.0)
    tokens = random_tokens()
    for model in (bridge.hf_model, native):
        model.train()
        model.gradient_checkpointing_enable()
    loss = bridge(tokens, return_type="loss")
    loss.backward()
    native(tokens, labels=tokens).loss.backward()
    assert kernel == []
    theirs = dict(native.named_parameters())
    assert all((p.grad - theirs[name].grad).abs().max() < 1e-6 for name, p in bridge.named_parameters())
    with torch.no_grad():
        bridge(tokens)
    assert paths(kernel) == [0, 1, 2]


def test_others_who_look_see_the_pattern(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens = random_tokens()
    attention: BloomAttention = bridge.hf_model.transformer.h[1].self_attention
    patterns: list[Tensor] = []
    on_module = attention.register_forward_hook(lambda module, args, output: patterns.append(output[1]))
    bridge(tokens)
    assert paths(kernel) == [0, 2]
    on_module.remove()
    on_dropout = attention.attention_dropout.register_forward_hook(lambda module, args, output: patterns.append(output))
    bridge(tokens)
    assert paths(kernel) == [0, 2]
    on_dropout.remove()
    wanted = native(tokens, output_attentions=True).attentions[1]
    assert all((pattern - wanted).abs().max() < 1e-5 for pattern in patterns)


def test_autocast_takes_the_exact_path(kernel: list[tuple[str, int]]) -> None:
    bridge, native = fast_pair()
    tokens, mask = random_tokens(), padded("left", 2, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bridge(tokens, attention_mask=mask), native(tokens, attention_mask=mask).logits)
    assert kernel == []


def test_summed_slices_and_adapters(kernel: list[tuple[str, int]]) -> None:
    from peft import LoraConfig, get_peft_model

    bridge, native = fast_pair(slow_but_exact=True, pretraining_tp=2)
    tokens = random_tokens()
    near(bridge(tokens), native(tokens).logits)
    lora = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(make_bloom(), lora).eval()
    bridge = TransformerBridge.boot_transformers(hf_model=adapted, attn_implementation="sdpa")
    near(bridge(tokens), adapted(input_ids=tokens).logits)
    assert paths(kernel) == [0, 1, 2] * 2


def test_a_mask_that_is_written_to_makes_another_bias(kernel: list[tuple[str, int]]) -> None:
    """Somebody's torch hook masks a key from the second block on: the bias of the first must not be used there."""
    bridge, native = fast_pair()
    tokens = random_tokens()

    def mask_a_key(module: Any, args: Any, kwargs: Any) -> None:
        kwargs["attention_mask"][..., 1:, 0] = torch.finfo(torch.float32).min

    for model in (bridge.hf_model, native):
        model.transformer.h[1].register_forward_pre_hook(mask_a_key, with_kwargs=True)
    near(
        bridge(tokens, attention_mask=padded("right", 2, 9)),
        native(tokens, attention_mask=padded("right", 2, 9)).logits,
    )
    assert paths(kernel) == [0, 1, 2]
    with torch.no_grad():
        native.transformer.h[1]._forward_pre_hooks.clear()
    plain = native(tokens, attention_mask=padded("right", 2, 9)).logits
    assert (bridge(tokens, attention_mask=padded("right", 2, 9)) - plain).abs().max() > 1e-2


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_choosing(tmp_path: Any, kernel: list[tuple[str, int]]) -> None:
    model = make_bloom()
    model.save_pretrained(tmp_path)
    tokens = random_tokens()
    with pytest.warns(PellucidWarning, match="no tokenizer"):
        bridge = TransformerBridge.boot_transformers(tmp_path, attn_implementation="sdpa")
    assert bridge.attn_implementation == "sdpa"
    assert bridge.hf_model.config._attn_implementation == "eager"
    near(bridge(tokens), model(tokens).logits)
    assert paths(kernel) == [0, 1, 2]
    clone = copy.deepcopy(bridge)
    assert torch.equal(clone(tokens), bridge(tokens))
    assert paths(kernel) == [0, 1, 2] * 2
    clone.set_attn_implementation("eager")
    assert bridge.attn_implementation == "sdpa"
    assert torch.equal(clone(tokens), model(tokens).logits)
    for wrong in ("flash_attention_2", "SDPA", None, torch.ones(1)):
        with pytest.raises(InputError, match=r"Invalid attn_implementation.*'eager', 'sdpa'"):
            bridge.set_attn_implementation(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="Invalid attn_implementation"):
            TransformerBridge.boot_transformers(hf_model=model, attn_implementation=wrong)  # type: ignore[arg-type]
    assert bridge.attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_verify_reports_the_deviation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, _ = fast_pair(dtype)
    report = bridge.verify(layers=[1])
    lines = [result for result in report.results if "sdpa against the exact path" in result.name]
    assert report.ok
    assert len(lines) == 3
    assert 0 < lines[0].measured <= lines[0].bound
    assert next(result.bound for result in report.results if result.name == "logits, nothing hooked") == 0
    assert bridge.attn_implementation == "sdpa"
    bridge.set_attn_implementation("eager")
    assert not any("sdpa" in result.name for result in bridge.verify(layers=[]).results)

    bridge.set_attn_implementation("sdpa")
    original = JointQKVAttentionBridge.fast_mix
    monkeypatch.setattr(JointQKVAttentionBridge, "fast_mix", lambda *args: original(*args) * 1.5)
    failed = bridge.verify(layers=[0]).failed
    assert failed
    assert all("sdpa" in result.name for result in failed)
