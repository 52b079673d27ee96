"""Every hook point of every family: what an edit there does, against Hugging Face's own modules and finite differences.

The oracle of an edit is :func:`~pellucid.model_bridge.reference_edits.reference_edit` on an untouched copy: torch's own
hooks and function modes. That of a gradient is the difference of two forwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import NoReferenceError, UnsupportedModelError
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.reference_edits import REBUILT, reference_edit
from pellucid.model_bridge.running.loading import make_adapter
from pellucid.model_bridge.supported_architectures import decoder
from pellucid.names import HookSpec
from tests.families import (
    CONFIGS,
    NO_FLOAT64,
    has_experts,
    in_float64,
    in_full,
    make_family,
    of_the_turn,
    opted_in,
    smooth,
)
from tests.models import is_pristine, make_bloom, random_tokens


def points(bridge: TransformerBridge, *layers: int) -> list[HookSpec]:
    """All points outside the blocks and of some blocks, opt-in ones among them."""
    return [spec for spec in bridge.hook_index.values() if spec.layer in (None, *layers)]


def noise(spec: HookSpec, tensor: Tensor) -> Tensor:
    """A fixed random change of a tensor, of its own size; not a constant, which a norm or a softmax would not see."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    size = torch.where(tensor.abs() < 1e4, tensor, 0).detach().double().std(correction=0).clamp_min(1e-3)
    if spec.site == "hook_scale":  # stays positive
        drawn, size = drawn.abs(), size * 0.1
    return drawn.to(tensor.dtype) * size.to(tensor.dtype)


def edit_at(spec: HookSpec, d_vocab: int) -> Callable[[Tensor], Tensor]:
    if spec.kind == "int":
        return lambda tensor: (tensor + 1) % d_vocab
    return lambda tensor: tensor + noise(spec, tensor)


def check_edit(bridge: TransformerBridge, native: Any, spec: HookSpec, dtype: torch.dtype) -> None:
    tokens, edit = random_tokens(), edit_at(spec, bridge.cfg.d_vocab)

    def write(tensor: Tensor, hook: HookPoint) -> None:
        tensor.copy_(edit(tensor))

    plain = bridge(tokens)
    looked = bridge.run_with_hooks(tokens, fwd_hooks=[(spec.name, lambda tensor, hook: None)])
    returned = bridge.run_with_hooks(tokens, fwd_hooks=[(spec.name, lambda tensor, hook: edit(tensor))])
    in_place = bridge.run_with_hooks(tokens, fwd_hooks=[(spec.name, write)])
    if torch.is_grad_enabled():
        in_place.sum().backward()  # fails if something was written where autograd had saved it
    with torch.no_grad(), reference_edit(native, spec, edit, bridge.adapter):
        wanted = native(tokens, use_cache=False).logits
    assert torch.equal(looked, plain), f"{spec.name}: looking moves the logits"
    assert torch.equal(returned, in_place), f"{spec.name}: returned and in place differ"
    assert not torch.equal(returned, plain), f"{spec.name}: an edit is lost"
    # What Hugging Face does not compute is computed beside it: two roundings a layer, each passed on by the others.
    bound = 64 * bridge.cfg.n_layers * torch.finfo(dtype).eps * float(plain.detach().abs().max())
    off = float((returned.detach().double() - wanted.double()).abs().max())
    assert off <= (bound if spec.site in REBUILT else 0), f"{spec.name}: {off} from the oracle"


def check_edits(family: str, specs: Callable[[TransformerBridge], list[HookSpec]], dtype: torch.dtype) -> None:
    native = make_family(family, dtype)
    bridge = TransformerBridge(make_family(family, dtype))
    for spec in specs(bridge):
        with opted_in(bridge, spec.flag) if spec.flag else nullcontext():
            check_edit(bridge, native, spec, dtype)
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("family", filter(in_full, CONFIGS))
def test_an_edit_is_the_oracles(family: str) -> None:
    with torch.no_grad():
        check_edits(family, lambda bridge: points(bridge, bridge.cfg.n_layers - 1), torch.float32)


@pytest.mark.parametrize("family", filter(in_full, CONFIGS))
def test_an_edit_with_gradients_on_is_the_oracles(family: str) -> None:
    check_edits(family, lambda bridge: points(bridge, 1), torch.float32)


@pytest.mark.parametrize("family", filter(in_full, CONFIGS))
def test_an_edit_in_half_precision_is_the_oracles(family: str) -> None:
    with torch.no_grad():
        check_edits(family, lambda bridge: points(bridge, 1), torch.bfloat16)


@pytest.mark.parametrize("family", [family for family in of_the_turn(CONFIGS) if not in_full(family)])
def test_edits_of_the_others_in_turn(family: str) -> None:
    """A point without gradients, the next with them."""
    with torch.no_grad():
        check_edits(family, lambda bridge: points(bridge, 1)[::2], torch.float32)
    check_edits(family, lambda bridge: points(bridge, 1)[1::2], torch.float32)


@pytest.mark.parametrize("family", ["gptj", "gpt2-upcast"])
def test_a_pattern_given_by_a_module_may_be_written_to(family: str) -> None:
    """Their dropout module gives the tensor that the softmax gave, which autograd has saved."""
    bridge = TransformerBridge(make_family(family))
    spec = bridge.hook_index["blocks.1.attn.hook_pattern"]
    edit = edit_at(spec, bridge.cfg.d_vocab)
    gradients = []
    for function in (lambda t, hook: edit(t), lambda t, hook: (t.copy_(edit(t)), None)[1]):
        bridge.run_with_hooks(random_tokens(), fwd_hooks=[(spec.name, function)]).sum().backward()
        gradients.append([each.grad.clone() for each in bridge.hf_model.parameters() if each.grad is not None])
        bridge.hf_model.zero_grad()
    assert all(map(torch.equal, *gradients))
    assert any(each.any() for each in gradients[0])


def gradient_at(bridge: TransformerBridge, spec: HookSpec, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor at a point, and the gradient of the weighted sum of logits there."""
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    with bridge.hooks(
        fwd_hooks=[(spec.name, lambda tensor, hook: values.append(tensor.detach().clone()))],
        bwd_hooks=[(spec.name, lambda gradient, hook: gradients.append(gradient.clone()))],
    ):
        (bridge(random_tokens()).double() * weights).sum().backward()
    bridge.hf_model.zero_grad()
    assert len(gradients) == 1, f"{spec.name}: {len(gradients)} gradients"
    return values[0], gradients[0]


def slope_along(bridge: TransformerBridge, spec: HookSpec, direction: Tensor, step: float, weights: Tensor) -> float:
    """The central difference of the weighted sum of logits along a direction."""
    sums = []
    with torch.no_grad():
        for sign in (1, -1):
            change = sign * step * direction
            logits = bridge.run_with_hooks(
                random_tokens(), fwd_hooks=[(spec.name, lambda tensor, hook: tensor + change.to(tensor.dtype))]
            )
            sums.append(float((logits.double() * weights).sum()))
    return (sums[0] - sums[1]) / (2 * step)


@cache
def weights_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("family", NO_FLOAT64)
def test_hugging_face_has_no_float64(family: str) -> None:
    """Why tests in float64 leave it out."""
    for model in (make_family(family, torch.float64), TransformerBridge(make_family(family, torch.float64))):
        with pytest.raises(RuntimeError, match="Error with upcasting, attn_weights does not have dtype"):
            model(random_tokens())


@pytest.mark.parametrize("family", in_float64(filter(in_full, CONFIGS)))
def test_a_gradient_is_a_central_difference(family: str) -> None:
    """A backward hook at every point of a middle layer, against differences of forwards in float64.

    With differences ``D(h)`` and ``D(h / 2)``, ``(4 D(h / 2) - D(h)) / 3`` is free of the error of order ``h ** 2``, whose
    size ``|D(h) - D(h / 2)|`` bounds what is left. Rounding adds ``u / h``, where ``u`` is what two routes to the same sum
    of logits may differ by: 64 units in the last place a layer, as everywhere in these tests. Where Hugging Face goes through
    float32 inside, those units are float32's, and the step is larger, since that error falls with it.
    """
    # Of all experts: a choice among them is no smooth function.
    settings = smooth(family) if has_experts(family) else {}
    bridge = TransformerBridge(make_family(family, torch.float64, **settings))
    exact = bridge.adapter.family.float64
    step = 1e-3 if exact else 0.05
    unit = torch.finfo(torch.float64 if exact else torch.float32).eps
    with torch.no_grad():
        logits = bridge(random_tokens())
    weights = weights_of(tuple(logits.shape))
    # Errors of the logits are independent of each other: their weighted sum grows with the norm.
    noise_of_sum = 64 * bridge.cfg.n_layers * unit * float((logits * weights).norm())
    for spec in points(bridge, 1):
        if spec.kind == "int":
            continue
        with opted_in(bridge, spec.flag) if spec.flag else nullcontext():
            value, gradient = gradient_at(bridge, spec, weights)
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            # A masked score is the least number there is, and takes no change.
            drawn = torch.where(value.abs() < 1e30, drawn, 0)
            direction = gradient.double() / gradient.double().norm() + drawn / drawn.norm()
            direction /= direction.norm()
            expected = float((gradient.double() * direction).sum())
            whole = slope_along(bridge, spec, direction, step, weights)
            half = slope_along(bridge, spec, direction, step / 2, weights)
            found = (4 * half - whole) / 3
            bound = abs(whole - half) + 4 * noise_of_sum / step
            assert abs(found - expected) <= bound, f"{spec.name}: {found} is not {expected} within {bound}"
            assert bound <= (1e-4 if exact else 0.5) * abs(expected), f"{spec.name}: {bound} says little of {expected}"


FORGOTTEN = [
    ("llama", "hook_new", r"decoder.py \(DecoderEdits._outside"),
    ("llama", "attn_ln.hook_scale", r"decoder.py \(DecoderEdits._norm"),
    ("llama", "blocks.{i}.attn.q_norm.hook_scale", r"decoder.py \(DecoderEdits._norm"),
    ("llama", "blocks.{i}.ln3.hook_out", r"decoder.py \(DecoderEdits._in_block"),
    ("llama", "blocks.{i}.attn.hook_new", r"decoder.py \(DecoderEdits._attention"),
    ("llama", "blocks.{i}.mlp.hook_new", r"decoder.py \(DecoderEdits._in_block or ._mlp"),
    ("phi3", "blocks.{i}.mlp.hook_new", r"decoder.py \(DecoderEdits._in_block or ._mlp"),
    ("opt", "blocks.{i}.mlp.hook_new", r"decoder.py \(DecoderEdits._in_block or ._mlp"),
    ("qwen2_moe", "blocks.{i}.mlp.hook_new", r"decoder.py \(DecoderEdits._in_block or ._mlp"),
    ("bloom", "hook_new", r"bloom.py \(install_bloom"),
    ("bloom", "ln_new.hook_scale", r"bloom.py \(install_bloom"),
    ("bloom", "ln_final.hook_new", r"bloom.py \(install_bloom"),
    ("bloom", "blocks.{i}.mlp.hook_scale", r"bloom.py \(_install_in_block"),
    ("bloom", "blocks.{i}.mlp.hook_new", r"bloom.py \(_install_in_block"),
    ("bloom", "blocks.{i}.attn.hook_values", r"bloom.py \(_install_in_block"),
]
"""Points that no table has, each where the oracle chooses by a name."""


@pytest.mark.parametrize(("family", "name", "where"), FORGOTTEN)
def test_a_point_that_the_oracle_does_not_know_is_refused_by_name(family: str, name: str, where: str) -> None:
    model: Any = make_bloom() if family == "bloom" else make_family(family)
    component, _, site = name.rpartition(".")
    spec = HookSpec(name, component, site, ("batch", "pos", "d_model"), "new")
    spec = spec.at_layer(1) if "{i}" in name else spec
    with (
        pytest.raises(NoReferenceError, match=rf"^The hook table has {re.escape(name)}, .* Write it in \S+/{where}"),
        reference_edit(model, spec, lambda tensor: tensor, make_adapter(model)),
    ):
        raise AssertionError("the oracle took it for another")
    assert is_pristine(model)


@pytest.mark.parametrize("model_type", ["llama", "nobodys"])
def test_a_point_whose_reference_was_forgotten_is_named(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that works, under a name that the oracle does not know; a model of no known family tries it when it opens."""
    written = decoder.hook_table

    def with_another(*arguments: Any) -> Any:
        table = written(*arguments)
        names = {"blocks.{i}.mlp.hook_pre": "blocks.{i}.mlp.hook_before"}
        return replace(table, block=tuple(replace(each, name=names.get(each.name, each.name)) for each in table.block))

    monkeypatch.setattr(decoder, "hook_table", with_another)
    model = make_family("llama")
    model.config.model_type = model_type
    with pytest.raises(NoReferenceError, match=r"^The hook table has blocks\.\{i\}\.mlp\.hook_before, .*_mlp"):
        TransformerBridge(model).verify(layers=[1], progress=False)
    assert is_pristine(model)


def test_the_oracle_reads_one_token_of_one_group() -> None:
    """Falcon's key of one token is a view of the tensor that the oracle writes it back to."""
    bridge, model, tokens = TransformerBridge(make_family("falcon")), make_family("falcon"), random_tokens(1, 1)
    spec = bridge.hook_spec("blocks.1.attn.k.hook_in")
    with opted_in(bridge), torch.no_grad():
        ours = bridge.run_with_hooks(tokens, fwd_hooks=[(spec.name, lambda tensor, hook: tensor + 0.5)])
        with reference_edit(model, spec, lambda tensor: tensor + 0.5, bridge.adapter):
            assert torch.equal(ours, model(tokens, use_cache=False).logits)


def test_what_a_function_keeps_is_not_written_to_afterwards() -> None:
    """Falcon's block adds attention's output into the MLP's own tensor."""
    bridge = TransformerBridge(make_family("falcon"))
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept.append(tensor)
        seen.append(tensor.clone())

    bridge.run_with_hooks(random_tokens(), fwd_hooks=[("blocks.1.hook_mlp_out", keep)])
    assert torch.equal(kept[0], seen[0])


def test_gradients_where_rows_are_flat() -> None:
    """OPT's MLP is given rows and positions as one axis: a backward hook sees two, and the gradient that autograd keeps."""
    bridge, native = TransformerBridge(make_family("opt")), make_family("opt")
    block = native.model.decoder.layers[1]
    kept: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Tensor, name: str) -> None:
        output.retain_grad()
        kept[name] = output

    for name, module in (
        ("mlp.hook_in", block.final_layer_norm),
        ("mlp.hook_pre", block.fc1),
        ("hook_mlp_out", block.fc2),
    ):
        module.register_forward_hook(partial(keep, name=name))
    logits = native(random_tokens(), use_cache=False).logits
    weights = weights_of(tuple(logits.shape))
    (logits.double() * weights).sum().backward()
    for name, output in kept.items():
        value, gradient = gradient_at(bridge, bridge.hook_index[f"blocks.1.{name}"], weights)
        assert value.shape == gradient.shape == (2, 9, output.shape[-1])
        assert torch.equal(value.flatten(0, 1), output)
        assert torch.equal(gradient.flatten(0, 1), output.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_an_opt_in_point_that_a_family_has_not_is_refused(family: str) -> None:
    bridge = TransformerBridge(make_family(family))
    there = {spec.flag for spec in bridge.hook_index.values()}
    setters: dict[Any, Callable[[bool], None]] = {
        "use_attn_in": bridge.set_use_attn_in,
        "use_split_qkv_input": bridge.set_use_split_qkv_input,
        "use_attn_result": bridge.set_use_attn_result,
        "use_hook_mlp_in": bridge.set_use_hook_mlp_in,
    }
    for flag, setter in setters.items():
        if flag in there:
            setter(True)
        else:
            with pytest.raises(UnsupportedModelError, match=rf"{flag} switches nothing on: .* It has: set_use_"):
                setter(True)
        setter(False)
    assert ("use_attn_in" in there) is (bridge.cfg.n_key_value_heads == bridge.cfg.n_heads)
    assert ("use_hook_mlp_in" in there) is (family != "olmo2")
    assert not any(bridge.cfg.flags.values())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_an_input_whose_heads_are_looked_at_before(family: str) -> None:
    """With gradients on, the heads' copies are on the way; an edit of what feeds all values keeps its bits."""
    bridge, model, tokens = TransformerBridge(make_family(family)), make_family(family), random_tokens(1, 5)
    spec = bridge.hook_index["blocks.1.attn.v.hook_in"]
    with opted_in(bridge, "use_split_qkv_input"):
        hooks = [("blocks.1.hook_v_input", lambda t, hook: None), (spec.name, lambda t, hook: t + 0.3)]
        found = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    with reference_edit(model, spec, lambda t: t + 0.3, bridge.adapter):
        assert torch.equal(found, model(tokens).logits)
