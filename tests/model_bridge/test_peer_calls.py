"""Calls that code written for TransformerLens makes: a hook called by several names, or under a conversion; what it catches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import FactoredMatrix, HookPoint, TransformerBridge
from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.conversion_utils.conversion_steps.rearrange_tensor_conversion import RearrangeTensorConversion
from pellucid.errors import GradientError, HookValueError, InputError
from pellucid.experiments.places import read_prompts
from pellucid.gradients import run_with_gradients
from pellucid.model_bridge.corpus.job_identity import hooks_on
from pellucid.sweep import LogitDifference
from tests.models import is_pristine, make_pair, random_tokens

POINT = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair()[0]


class OutOfTrue(BaseTensorConversion):
    """Doubles, and on the way back adds: what comes back unchanged shows that nothing went through it."""

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return input_value * 2

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        return input_value + 100


class Transposed(BaseTensorConversion):
    """A view, so that a function can write through it."""

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return input_value.transpose(0, 1)

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        return input_value.transpose(0, 1)


class Thirds(BaseTensorConversion):
    """Comes back with other bits."""

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        return input_value / 3

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        return input_value * 3


def by_name(seen: list[tuple[str, float]]) -> Any:
    """A function that adds 10 under one name, and under others only looks."""

    def function(tensor: Tensor, hook: Any) -> Tensor | None:
        seen.append((hook.name, tensor.flatten()[0].item()))
        return tensor + 10 if hook.name == "adds" else None

    return function


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_function_with_several_names_is_called_once_for_each(direction: Any) -> None:
    point, seen = HookPoint(), list[tuple[str, float]]()
    handle = point.add_hook(by_name(seen), dir=direction, alias_names=("looks", "adds", "looks after"))
    x = torch.tensor([2.0], requires_grad=True)
    out = point(x)
    (3 * out).backward()
    start = 2.0 if direction == "fwd" else 3.0
    assert seen == [("looks", start), ("adds", start), ("looks after", start + 10)]
    assert (out.item(), x.grad.item()) == ((12.0, 3.0) if direction == "fwd" else (2.0, 13.0))  # type: ignore[union-attr]
    assert (point.handles(), handle.calls) == ([handle], 3)
    clone = copy.deepcopy(point)
    clone(torch.tensor([0.0], requires_grad=True)).backward()
    assert [name for name, _ in seen[3:]] == ["looks", "adds", "looks after"]
    handle.remove()
    assert point(x) is x
    assert not point.has_hooks()


def test_names_of_a_function_on_a_bridge(bridge: TransformerBridge) -> None:
    tokens, seen = random_tokens(), list[tuple[str, float]]()
    function = by_name(seen)
    once = bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, lambda tensor, hook: tensor + 10)])
    handle = bridge.hook_dict[POINT].add_hook(function, alias_names=["adds", "blocks.1.attn.hook_z"])
    assert torch.equal(bridge(tokens), once)
    assert [name for name, _ in seen] == ["adds", "blocks.1.attn.hook_z"]
    named = hooks_on(bridge)
    handle.remove()
    with bridge.hooks(fwd_hooks=[(POINT, function)]):
        assert hooks_on(bridge) != named  # what a job computes depends on the names


@pytest.mark.parametrize("gives", [True, False])
def test_a_shape_that_is_changed_in_place_is_refused(gives: bool) -> None:
    def grows(tensor: Tensor, hook: Any) -> Tensor | None:
        tensor.unsqueeze_(0)
        return tensor if gives else None

    for direction in ("fwd", "bwd"):
        x, point = torch.ones(3, requires_grad=True), HookPoint()
        point.add_hook(grows, dir=direction)  # type: ignore[arg-type]
        with pytest.raises(HookValueError, match=r"grows .* left its tensor with shape \(1, 3\); expected \(3,\)"):
            point(x * 1).sum().backward()


def gives_nothing(tensor: Tensor, hook: Any) -> None:
    pass


def writes(tensor: Tensor, hook: Any) -> None:
    tensor.add_(1)


def gives_it_back(tensor: Tensor, hook: Any) -> Tensor:
    return tensor


def test_a_look_through_a_conversion_changes_no_bit() -> None:
    x, point = torch.tensor([1.0, 2.0]), HookPoint()
    point.enable_reshape(OutOfTrue())
    wanted = {gives_nothing: x, writes: 2 * x + 101, gives_it_back: 2 * x + 100}
    for function, expected in wanted.items():
        handle = point.add_hook(function)
        assert torch.equal(point(x), expected), function
        handle.remove()
    point.add_hook(by_name([]), alias_names=["looks", "adds", "looks after"])
    assert torch.equal(point(x), 2 * x + 110)


def test_a_gradient_that_is_looked_at_through_a_conversion() -> None:
    for function, expected in ((gives_nothing, 3.0), (writes, 107.0), (gives_it_back, 106.0)):
        x, point = torch.ones(2, requires_grad=True), HookPoint()
        point.enable_reshape(OutOfTrue())
        point.add_hook(function, dir="bwd")
        (3 * point(x)).sum().backward()
        assert torch.equal(x.grad, torch.full((2,), expected)), function  # type: ignore[arg-type]


def test_a_function_that_writes_waits_or_cuts_through_a_conversion_is_no_look() -> None:
    kept: list[Tensor] = []

    def waits(tensor: Tensor, hook: Any) -> None:
        tensor.retain_grad()
        kept.append(tensor)

    def listens(tensor: Tensor, hook: Any) -> None:
        tensor.register_hook(kept.append)

    for function in (waits, listens):
        x, point = torch.randn(3, 2, requires_grad=True), HookPoint()
        point.enable_reshape(Transposed())
        point.add_hook(function)
        point(x).square().sum().backward()
        found = kept[-1].grad if function is waits else kept[-1]
        assert torch.equal(found, 2 * x.detach().T)  # type: ignore[arg-type]

    def cuts(tensor: Tensor, hook: Any) -> None:
        tensor.detach_()

    x, point = torch.randn(3, 2, requires_grad=True), HookPoint()
    point.enable_reshape(OutOfTrue())
    point.add_hook(cuts)
    assert not point(x).requires_grad
    x, point = torch.randn(3, 2), HookPoint()
    point.enable_reshape(Transposed())
    point.add_hook(writes)
    assert torch.equal(point(x.clone()), x + 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_conversion_showed_and_a_function_kept_has_its_gradient(frozen: bool) -> None:
    kept: list[Tensor] = []

    def keeps(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor.requires_grad_() if frozen else tensor)

    x, point = torch.randn(30, 20, requires_grad=not frozen), HookPoint()
    assert not torch.equal(x / 3 * 3, x)
    point.enable_reshape(Thirds())
    point.add_hook(keeps)
    gone_on = point(x)
    assert torch.equal(gone_on, x)
    (found,) = torch.autograd.grad(gone_on.square().sum(), kept)
    assert (found - 6 * x.detach()).abs().max() < 1e-5


def test_the_gradient_of_a_run_is_that_of_what_a_conversion_shows(bridge: TransformerBridge) -> None:
    unedited, metric = read_prompts(bridge, random_tokens()).unedited(bridge), LogitDifference(5, 9)
    plain = run_with_gradients(unedited, metric, [POINT]).gradients()[POINT]
    bridge.hook_dict[POINT].enable_reshape(RearrangeTensorConversion("b p n h -> b n p h"))
    try:
        shown = run_with_gradients(unedited, metric, [POINT]).gradients()[POINT]
    finally:
        bridge.hook_dict[POINT].enable_reshape(None)
    assert plain.any()
    assert torch.equal(shown, plain.transpose(1, 2))


def test_gradients_with_the_cache_are_of_the_loss_that_is_asked_for(bridge: TransformerBridge) -> None:
    tokens = random_tokens()
    for kind in ("both", "logits_and_cache", None):
        with pytest.raises(ValueError, match="a scalar output: ask for it, return_type='loss'; found return_type="):
            bridge.run_with_cache(tokens, incl_bwd=True, return_type=kind)  # type: ignore[arg-type]
    for kind in (ValueError, RuntimeError, GradientError):  # TransformerLens' class, autograd's, ours
        with torch.no_grad(), pytest.raises(kind, match="gradient tracking is off"):  # type: ignore[arg-type]
            bridge.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert is_pristine(bridge.hf_model)
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_a_changed_configuration_is_no_other_model() -> None:
    bridge, _ = make_pair()
    wanted = bridge.get_params()
    for wrong in (2, 5):
        bridge.cfg.n_layers = wrong
        for call in (bridge.get_params, bridge.tl_parameters, lambda: bridge.W_Q):
            with pytest.raises(
                ValueError, match=f"Configuration mismatch: cfg.n_layers is {wrong}, and 3 blocks found"
            ):
                call()
    bridge.cfg.n_layers = 3
    assert bridge.get_params().keys() == wanted.keys()


def test_refusals_in_the_words_and_classes_that_are_caught_there(bridge: TransformerBridge) -> None:
    embeddings = torch.randn(1, 4, bridge.cfg.d_model)
    for given in ({"input": embeddings}, {"inputs_embeds": embeddings}):
        with pytest.raises(NotImplementedError, match="inputs_embeds") as caught:
            bridge.generate(**given, max_new_tokens=2, return_cache=True)  # type: ignore[arg-type]
        assert isinstance(caught.value, InputError)
    with pytest.raises(ValueError, match="start_at_layer takes the residual-stream tensor"):
        bridge(random_tokens(), start_at_layer=1)
    beyond = bridge.cfg.d_vocab
    for absent, words in ((7, r"prompt\."), (beyond, f"prompt: ids of the vocabulary go from 0 to {beyond - 1}")):
        with pytest.raises(AssertionError, match=f"{absent} does not occur in the {words}"):
            bridge.get_token_position(absent, torch.tensor([1, 2, 3]))
    matrix = FactoredMatrix(torch.ones(4, 2, 3), torch.ones(4, 3, 2))
    mask = torch.ones(4, 2, dtype=torch.bool)
    beyond_it = [((0, 2), "index 2 is out of bounds"), ((0, 0, -3), "index -3 is out of bounds"), ((..., 9), "are 2")]
    wrong = [((..., ...), "one ellipsis"), ((0, 0, 0, 0), "too long an index"), (mask, "reaches into"), *beyond_it]
    for index, words in wrong:
        with pytest.raises(IndexError, match=words) as refused:
            matrix[index]
        assert isinstance(refused.value, InputError)
    with pytest.raises(ValueError, match="mode must be one of 'Q', 'K', 'V'"):
        bridge.all_composition_scores("X")
