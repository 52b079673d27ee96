"""What Hugging Face collects of a run (``output_hidden_states``, ``output_attentions``) shows an edit, returned or in place.

Held against what the points themselves hold after the edit: hidden state ``i`` is what block ``i`` was given, the last one what
leaves the final norm, attention ``i`` the pattern that block ``i`` used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.running.loading import make_adapter
from pellucid.names import HookSpec
from tests.families import make_family
from tests.models import VOCAB, make_bloom, make_generator, random_tokens

LAYER, N_LAYERS = 1, 3
TABLE: dict[str, HookSpec] = {
    name: spec for name, spec in make_adapter(make_bloom()).hook_index().items() if spec.layer in (None, LAYER)
}
TOKENS = random_tokens(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def edit_of(spec: HookSpec) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        if spec.kind == "int":
            return (tensor + 1) % VOCAB
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor.dtype)
        return tensor + 0.3 * (noise.abs() if spec.site == "hook_scale" else noise)

    return edit


def styles(edit: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor, HookPoint], Tensor | None]]:
    def in_place(tensor: Tensor, hook: HookPoint) -> None:
        tensor.copy_(edit(tensor))

    return {"returned": lambda tensor, hook: edit(tensor), "in place": in_place}


def run(bridge: TransformerBridge, name: str, function: Any, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """Hugging Face's output with everything collected, and what the points hold after the edit."""
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = tensor.detach().clone()

    wanted = [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in ("hook_resid_pre", "attn.hook_pattern")]
    hooks = [(name, function), *((point, keep) for point in (*wanted, "ln_final.hook_out"))]
    with bridge.hooks(fwd_hooks=hooks):
        output = bridge.hf_model(TOKENS, attention_mask=MASK, output_hidden_states=True, output_attentions=True, **more)
    return output, kept


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", TABLE)
def test_an_edit_is_among_what_was_collected(name: str, grad: bool) -> None:
    spec = TABLE[name]
    bridge = TransformerBridge(make_bloom())
    if spec.flag is not None:
        setattr(bridge.cfg, spec.flag, True)
    found = {}
    with torch.set_grad_enabled(grad):
        for style, function in styles(edit_of(spec)).items():
            found[style] = output, kept = run(bridge, name, function)
            assert len(output.hidden_states) == N_LAYERS + 1
            for layer in range(N_LAYERS):
                assert torch.equal(output.hidden_states[layer], kept[f"blocks.{layer}.hook_resid_pre"]), (style, layer)
                assert torch.equal(output.attentions[layer], kept[f"blocks.{layer}.attn.hook_pattern"]), (style, layer)
            assert torch.equal(output.hidden_states[-1], kept["ln_final.hook_out"]), style
        returned, in_place = (output for output, _ in found.values())
        assert torch.equal(returned.logits, in_place.logits)
        for one, other in (
            (returned.hidden_states, in_place.hidden_states),
            (returned.attentions, in_place.attentions),
        ):
            assert all(map(torch.equal, one, other))
        untouched = bridge.hf_model(TOKENS, attention_mask=MASK)
        assert not torch.equal(returned.logits, untouched.logits)


@pytest.mark.parametrize("style", ["returned", "in place"])
def test_every_way_to_ask_for_them(style: str) -> None:
    """As a tuple, by the configuration, with a cache and without, in each step of ``generate``."""
    name = "blocks.1.hook_resid_pre"
    bridge = TransformerBridge(make_generator())
    model: Any = bridge.hf_model
    seen: list[Tensor] = []
    function = styles(edit_of(TABLE[name]))[style]

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        seen.append(tensor.detach().clone())

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, function), (name, keep)]):
        for use_cache, attentions in ((True, True), (False, True), (True, False), (False, False)):
            output = model(
                TOKENS, use_cache=use_cache, output_hidden_states=True, output_attentions=attentions, return_dict=False
            )
            assert torch.equal(output[1 + use_cache][1], seen[-1])
        model.config.output_hidden_states = True
        assert torch.equal(model(TOKENS).hidden_states[1], seen[-1])
        assert torch.equal(model.transformer(TOKENS).hidden_states[1], seen[-1])
        assert model(TOKENS, output_hidden_states=False).hidden_states is None
        model.config.output_hidden_states = False
        seen.clear()
        made = model.generate(
            TOKENS[1:], max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
        )
        assert len(made.hidden_states) == len(seen) == 3
        for step, kept in zip(made.hidden_states, seen, strict=True):
            assert torch.equal(step[1], kept)


def test_a_run_inside_a_hook_has_its_own() -> None:
    """A hook runs the model: its block inputs are not the outer run's, nor the other way round."""
    bridge, name = TransformerBridge(make_bloom()), "blocks.1.hook_resid_pre"
    model: Any = bridge.hf_model
    inner: list[Any] = []

    def runs_it(tensor: Tensor, hook: HookPoint) -> None:
        if not inner:
            inner.append(None)
            inner.append(model(TOKENS[:1], output_hidden_states=True))
            model(TOKENS[:1])

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, lambda t, hook: t + 1), ("blocks.2.hook_resid_pre", runs_it)]):
        outer = model(TOKENS, output_hidden_states=True)
    with torch.no_grad():
        plain = model(TOKENS, output_hidden_states=True)
        alone = model(TOKENS[:1], output_hidden_states=True)
    assert torch.equal(outer.hidden_states[1], plain.hidden_states[1] + 1)
    assert torch.equal(inner[1].hidden_states[1], alone.hidden_states[1] + 1)


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_block_that_a_hook_calls_by_hand_is_no_part_of_the_run(family: str) -> None:
    """Inputs of blocks 0 and 2 are edited, and before block 1 a hook calls block 0 by hand.

    The oracle is Hugging Face's model with torch hooks that do so. It collects what a Llama's block gives by torch hooks of its
    own, of a call by hand too: the places that come after move up.
    """
    model: Any = make_bloom() if family == "bloom" else make_family(family)
    native = copy.deepcopy(model)
    blocks = native.transformer.h if family == "bloom" else native.model.layers
    bridge = TransformerBridge(model)
    block = bridge.blocks[0].original_component
    assert block is not None
    arguments: list[Any] = []  # of a block, behind the residual
    entered: dict[int, Tensor] = {}

    def edited(layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        arguments[:] = [args[1:], kwargs]
        entered.setdefault(layer, args[0] + 1)
        return (args[0] + 1, *args[1:]), kwargs

    def call(called: nn.Module, residual: Tensor) -> None:
        called(residual * 0.5, *arguments[0], **arguments[1])

    for layer in (0, 2):
        blocks[layer].register_forward_pre_hook(partial(edited, layer), with_kwargs=True)
    blocks[1].register_forward_pre_hook(lambda module, args: call(blocks[0], args[0]))
    hooks: Any = [(f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: tensor + 1) for layer in (0, 2)]
    hooks.append(("blocks.1.hook_resid_pre", lambda tensor, hook: call(block, tensor)))
    with torch.no_grad():
        expected = native(TOKENS, use_cache=False, output_hidden_states=True)
        with bridge.hooks(fwd_hooks=hooks):
            found = model(TOKENS, use_cache=False, output_hidden_states=True)
            some = model(TOKENS, use_cache=False, output_hidden_states=[1]).hidden_states
    assert torch.equal(found.logits, expected.logits)
    moved = len(expected.hidden_states) - N_LAYERS - 1
    assert moved == (0 if family == "bloom" else 1)
    wanted = dict(enumerate(expected.hidden_states)) | {0: entered[0], 2 + moved: entered[2]}
    assert len(found.hidden_states) == len(wanted)
    for place, tensor in wanted.items():
        assert torch.equal(found.hidden_states[place], tensor), place
    if family == "llama":
        assert [place for place, tensor in enumerate(some) if tensor is not None] == [1]  # what was asked for


def test_gradients_flow_through_what_was_collected() -> None:
    """A loss on the hidden state of an edited block: its gradient is that of the edit."""
    bridge = TransformerBridge(make_bloom())
    direction = torch.zeros(48, requires_grad=True)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda t, hook: t + direction)]):
        output = bridge.hf_model(TOKENS, output_hidden_states=True)
    output.hidden_states[1].sum().backward()
    assert torch.equal(direction.grad, torch.full((48,), float(TOKENS.numel())))
