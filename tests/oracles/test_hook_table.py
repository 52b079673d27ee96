"""Every line of the hook table, no name left out: it fires once, looking changes nothing, an edit is an edit.

The oracle is :mod:`pellucid.model_bridge.reference_edits`, Hugging Face's modules with torch's own hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.axes import AXES, OF_RESULTS
from pellucid.model_bridge.reference_edits import REBUILT, reference_edit
from pellucid.model_bridge.running.loading import make_adapter
from pellucid.names import HookSpec
from tests.models import VOCAB, is_pristine, make_bloom, make_pair, random_tokens

LAYER = 1
ADAPTER = make_adapter(make_bloom())
TABLE: dict[str, HookSpec] = {spec.name: spec for spec in ADAPTER.hook_index().values() if spec.layer in (None, LAYER)}
SIZES = {"batch": 2, "pos": 7, "key_pos": 7, "n_heads": 4, "d_head": 12, "d_model": 48, "d_mlp": 192, "1": 1}
SIZES["d_vocab"] = VOCAB
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def switch_on(bridge: TransformerBridge, spec: HookSpec) -> None:
    if spec.flag is not None:
        setattr(bridge.cfg, spec.flag, True)


@cache
def pair(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[TransformerBridge, Any]:
    """A bridge and a model that tests of many points share; each point has a fresh one in the first test below."""
    return make_pair(dtype, **settings)


@contextmanager
def switched_on(bridge: TransformerBridge, spec: HookSpec) -> Iterator[None]:
    """The point there for the length of a block, if it is opt-in."""
    switch_on(bridge, spec)
    try:
        yield
    finally:
        if spec.flag is not None:
            setattr(bridge.cfg, spec.flag, False)


def random_edit(spec: HookSpec) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        if spec.kind == "int":
            return (tensor + 1) % VOCAB
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        if spec.site == "hook_scale":
            noise = noise.abs()
        return tensor + (0.3 * noise).to(tensor.dtype)

    return edit


@pytest.mark.parametrize("name", TABLE)
def test_shape_dtype_names_and_once(name: str) -> None:
    spec = TABLE[name]
    for dtype in (*DTYPES, torch.float64):
        bridge = TransformerBridge(make_bloom(dtype))
        switch_on(bridge, spec)
        seen: list[tuple[tuple[int, ...], torch.dtype, str]] = []
        for asked in (name, *spec.aliases):
            seen.clear()
            bridge.run_with_hooks(
                random_tokens(2, 7),
                fwd_hooks=[(asked, lambda t, hook: seen.append((tuple(t.shape), t.dtype, hook.name)))],
            )
            wanted = {"model": dtype, "int": torch.int64, "wide": torch.promote_types(dtype, torch.float32)}[spec.kind]
            assert seen == [(tuple(SIZES[axis] for axis in spec.axes), wanted, asked)]
            assert bridge.hook_dict[asked] is bridge.hook_dict[name]
        assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_looking_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    spec = TABLE[name]
    bridge, model = pair(dtype, n_head=6)
    tokens = random_tokens(2, 7)
    native = model(tokens).logits
    with switched_on(bridge, spec):
        for function in (lambda t, hook: None, lambda t, hook: t, lambda t, hook: t.clone()):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(name, function)]), native)
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens, names_filter=name)
    assert torch.equal(logits, native)
    assert list(cache) == [name]


@pytest.mark.parametrize("config", ["plain", "post_norm", "slow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_an_edit_is_an_edit(name: str, dtype: torch.dtype, config: str) -> None:
    """Returned, in place, with and without gradients: the same bits, and those of the reference."""
    settings: dict[str, Any] = {
        "plain": {"n_head": 6},
        "post_norm": {"apply_residual_connection_post_layernorm": True},
        "slow": {"slow_but_exact": True, "pretraining_tp": 2},
    }[config]
    spec = TABLE[name]
    bridge, model = pair(dtype, **settings)
    tokens = random_tokens(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    edit = random_edit(spec)

    def returned(tensor: Tensor, hook: Any) -> Tensor:
        return edit(tensor)

    def in_place(tensor: Tensor, hook: Any) -> None:
        tensor.copy_(edit(tensor))

    def transposed(tensor: Tensor, hook: Any) -> Tensor:
        """The same numbers in another memory layout."""
        return edit(tensor).transpose(0, -1).contiguous().transpose(0, -1)

    outputs = []
    for function in (returned, in_place, transposed):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), switched_on(bridge, spec):
                output = bridge.run_with_hooks(
                    tokens, fwd_hooks=[(name, function)], attention_mask=mask, assert_effect=True
                )
            if grad:
                output.sum().backward()  # fails if something was written where autograd had saved it
            outputs.append(output.detach())
    for output in outputs[1:]:
        assert torch.equal(outputs[0], output)
    with torch.no_grad(), reference_edit(model, spec, edit, ADAPTER):
        reference = model(tokens, attention_mask=mask).logits
    assert not torch.equal(outputs[0], model(tokens, attention_mask=mask).logits)
    if spec.site in REBUILT:
        # Rebuilt in float32 and rounded once more than the reference's route, then carried through two more blocks.
        bound = 64 * 3 * torch.finfo(dtype).eps * float(reference.abs().max())
        assert (outputs[0].double() - reference.double()).abs().max() <= bound
    else:
        assert torch.equal(outputs[0], reference)
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("name", TABLE)
def test_one_row_one_position(name: str) -> None:
    """Shapes of size one, where a reshape may be a view with other strides."""
    spec = TABLE[name]
    for n_head, batch, length in ((1, 1, 1), (4, 1, 1), (1, 2, 3), (4, 1, 2)):
        bridge, model = pair(n_head=n_head)
        tokens = random_tokens(batch, length)
        edit = random_edit(spec)
        with torch.no_grad(), switched_on(bridge, spec):
            returned = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: edit(t))])
            in_place = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: _write(t, edit(t)))])
            with reference_edit(model, spec, edit, ADAPTER):
                reference = model(tokens).logits
        assert torch.equal(returned, in_place)
        if spec.site not in REBUILT:
            assert torch.equal(returned, reference)


def _write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def test_every_axis_word_is_explained() -> None:
    others = {"n_key_value_heads", "n_experts", "d_in", "d_sae", "d_out"}  # of other families, and of attached SAEs
    assert {axis for spec in TABLE.values() for axis in spec.axes} == set(AXES) - set(OF_RESULTS) - others


def test_the_reference_can_fail() -> None:
    """A planted fault: an edit on the wrong tensor is seen."""
    bridge, model = make_pair()
    tokens = random_tokens(2, 7)
    edit = random_edit(TABLE[f"blocks.{LAYER}.hook_attn_out"])
    with torch.no_grad():
        ours = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_mid", lambda t, hook: edit(t))])
        with reference_edit(model, TABLE[f"blocks.{LAYER}.hook_attn_out"], edit, ADAPTER):
            # attn_out + d and resid_mid + d are the same sum only up to rounding.
            assert not torch.equal(ours, model(tokens).logits)
        with reference_edit(model, TABLE[f"blocks.{LAYER}.mlp.hook_in"], edit, ADAPTER):
            assert (ours - model(tokens).logits).abs().max() > 1e-3


def test_a_cached_tensor_never_changes() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    _, clean = bridge.run_with_cache(tokens)
    kept = {name: tensor.clone() for name, tensor in clean.items()}
    later = [
        (name, lambda t, hook: _write(t, torch.zeros_like(t)))
        for name in bridge.hook_dict
        if "embed.hook_in" not in name
    ]
    bridge.run_with_hooks(tokens, fwd_hooks=later)
    for name in kept:
        assert torch.equal(clean[name], kept[name]), name
    # The same storage is seen at two points: what is written at the second must not reach what was kept at the first.
    edit = [("blocks.1.hook_resid_pre", lambda t, hook: _write(t, t + 1)), ("hook_embed", lambda t, hook: None)]
    with bridge.hooks(edit):
        _, cache = bridge.run_with_cache(tokens)
    assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])
    assert torch.equal(cache["resid_pre", 1], clean["resid_post", 0] + 1)
    module = bridge.hf_model.transformer.h[1]
    handle = module.register_forward_pre_hook(lambda m, args: _write(args[0], args[0] * 2))
    _, cache = bridge.run_with_cache(tokens)
    handle.remove()
    assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])
    for part in "qkv":
        assert clean[part, 0].untyped_storage().nbytes() == clean[part, 0].nbytes


def test_the_table_is_the_hook_dict() -> None:
    bridge, _ = make_pair()
    names = set(bridge.hook_dict)
    assert names == {spec.name for spec in bridge._tree.index.values() if spec.flag is None}
    fired: list[str] = []
    bridge.run_with_hooks(random_tokens(), fwd_hooks=[(lambda name: True, lambda t, hook: fired.append(hook.name))])
    assert fired == list(bridge.hook_dict)
    for setter in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in"):
        before = set(bridge.hook_dict)
        getattr(bridge, setter)(True)
        assert before < set(bridge.hook_dict)
    fired.clear()
    bridge.run_with_hooks(random_tokens(), fwd_hooks=[("*", lambda t, hook: fired.append(hook.name))])
    assert fired == list(bridge.hook_dict)


@pytest.mark.parametrize("site", ["hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in"])
def test_split_inputs_hold_the_residual_before_the_norm(site: str) -> None:
    bridge, _ = make_pair()
    if site == "hook_attn_in":
        bridge.set_use_attn_in(True)
    else:
        bridge.set_use_split_qkv_input(True)
    _, cache = bridge.run_with_cache(random_tokens())
    for layer in range(3):
        copies = cache[f"blocks.{layer}.{site}"]
        assert torch.equal(copies, cache["resid_pre", layer][:, :, None].expand_as(copies))


def test_an_edit_of_one_head_input_touches_that_head_only() -> None:
    bridge, _ = make_pair()
    bridge.set_use_split_qkv_input(True)
    tokens = random_tokens()

    def edit(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 2] += 1 + torch.arange(48.0) / 48

    _, clean = bridge.run_with_cache(tokens)
    with bridge.hooks([("blocks.1.hook_q_input", edit)]):
        _, edited = bridge.run_with_cache(tokens)
    different = (edited["q", 1] != clean["q", 1]).any(-1).flatten(0, 1).any(0)
    assert different.tolist() == [False, False, True, False]
    assert torch.equal(edited["k", 1], clean["k", 1])
    assert torch.equal(edited["resid_pre", 1], clean["resid_pre", 1])


def test_an_in_place_edit_of_one_input_reaches_the_queries_alone() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    _, clean = bridge.run_with_cache(tokens)
    with bridge.hooks([("blocks.1.attn.q.hook_in", lambda t, hook: _write(t, torch.randn_like(t)))]):
        _, edited = bridge.run_with_cache(tokens)
    assert not torch.equal(edited["q", 1], clean["q", 1])
    for name in ("blocks.1.attn.hook_k", "blocks.1.attn.hook_v", "blocks.1.ln1.hook_out"):
        assert torch.equal(edited[name], clean[name])


def test_results_sum_to_the_contribution() -> None:
    bridge, _ = make_pair(torch.float64)
    bridge.set_use_attn_result(True)
    _, cache = bridge.run_with_cache(random_tokens())
    for layer, block in enumerate(bridge.blocks):
        total = cache["result", layer].sum(2) + block.attn.b_O
        assert (total - cache["attn_out", layer]).abs().max() < 1e-13
    zeroed = bridge.run_with_hooks(random_tokens(), fwd_hooks=[("blocks.1.attn.hook_result", lambda t, hook: t * 0)])
    bias = bridge.blocks[1].attn.b_O
    set_to_bias = bridge.run_with_hooks(
        random_tokens(), fwd_hooks=[("blocks.1.hook_attn_out", lambda t, hook: bias.expand_as(t).clone())]
    )
    assert torch.equal(zeroed, set_to_bias)
