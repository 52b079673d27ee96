"""Which run, thread and module a hook belongs to, where those come apart."""

from __future__ import annotations

import contextvars
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid import TransformerBridge
from pellucid.errors import GradientError, HookNotFiredError, InputError, PellucidWarning
from pellucid.hook_points import HookPoint
from tests.interrupts import count_lines, interrupt_at
from tests.models import is_pristine, make_bloom, make_generator, make_pair, random_tokens

TOKENS = random_tokens()
POINT = "blocks.1.attn.hook_z"


def double(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 2


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that only looks."""


def in_a_thread(work: Callable[[], Any]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


# -- gradient checkpointing: blocks run again, in whatever thread ------------------------------------------------------


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("where", ["same thread", "another thread"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_run_again_runs_with_its_hooks(reentrant: bool, where: str) -> None:
    bridge, _ = make_pair()
    bridge.train()
    backward = (lambda work: work()) if where == "same thread" else in_a_thread
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            bridge.hf_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                bridge.hf_model.enable_input_require_grads()
        for call in (bridge, lambda tokens: bridge.hf_model(tokens).logits):
            with bridge.hooks([(POINT, double), ("blocks.0.mlp.hook_post", double)]):
                loss = call(TOKENS).pow(2).mean()
                backward(loss.backward)
            found.append(gradients(bridge.hf_model))
    assert is_pristine(bridge.hf_model)
    assert not any("_Recomputation" in repr(vars(module)) for module in bridge.hf_model.modules())
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, gradient in found[0].items():
            # The same operations in the same order; only sums over uses of a weight may be taken in another one.
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    bridge.hf_model.gradient_checkpointing_disable()
    bridge(TOKENS).pow(2).mean().backward()
    plain = gradients(bridge.hf_model)
    name = "transformer.h.1.self_attention.dense.weight"
    assert (plain[name] - found[0][name]).norm() > 0.05 * plain[name].norm()  # the hooks do make a difference


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("point", ["hook_v_input", "hook_attn_in"])
def test_a_block_that_is_run_again_takes_its_heads_inputs_from_what_it_is_given(point: str, reentrant: bool) -> None:
    """Half as much again of the residual goes to the heads; the oracle calls Hugging Face's modules in torch hooks."""
    bridge, native = make_pair()
    bridge.train()
    bridge.set_use_split_qkv_input(point == "hook_v_input")
    bridge.set_use_attn_in(point == "hook_attn_in")
    bridge.hf_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    bridge.hf_model.enable_input_require_grads()
    with bridge.hooks([(f"blocks.1.{point}", lambda tensor, hook: tensor * 1.5)]):
        bridge(TOKENS).pow(2).mean().backward()
    found = gradients(bridge.hf_model)

    block, entering = native.train().transformer.h[1], []
    parts = slice(2, 3) if point == "hook_v_input" else slice(0, 3)
    block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))

    def project_more(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heads, d_head = native.config.n_head, 48 // native.config.n_head
        more = F.linear(block.input_layernorm(entering[0] * 1.5), module.weight, module.bias)
        output, more = (each.view(*each.shape[:2], heads, 3, d_head) for each in (output, more))
        chosen = torch.zeros(3, 1, dtype=torch.bool)
        chosen[parts] = True
        return torch.where(chosen, more, output).flatten(2)

    block.self_attention.query_key_value.register_forward_hook(project_more)
    native(TOKENS).logits.pow(2).mean().backward()
    expected = gradients(native)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        # The heads' products are made one by one: sums of 48 numbers in another order.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("where", ["same thread", "another thread"])
def test_a_block_that_is_run_again_after_its_hooks_are_gone_is_refused(where: str) -> None:
    bridge, _ = make_pair()
    bridge.train()
    bridge.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    backward = (lambda work: work()) if where == "same thread" else in_a_thread
    with bridge.hooks([(POINT, double)]):
        loss = bridge.hf_model(TOKENS).logits.pow(2).mean()
    with pytest.raises(GradientError, match="runs the forward again"):
        backward(loss.backward)
    handles = bridge.add_hook(POINT, double)
    loss = bridge(TOKENS).pow(2).mean()
    handles.remove()
    with pytest.raises(GradientError, match="runs the forward again"):
        backward(loss.backward)


def test_threads_that_train_with_hooks_of_their_own() -> None:
    bridge, _ = make_pair()
    bridge.train()
    bridge.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    both_run = threading.Barrier(2)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with bridge.hooks([(POINT, double)]):
                loss = bridge.hf_model(TOKENS).logits.pow(2).mean()
                both_run.wait(10)
                loss.backward()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed


def test_what_an_interrupt_leaves_of_checkpointing_does_nothing() -> None:
    bridge, _ = make_pair()
    model = bridge.train().hf_model
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def run() -> None:
        with bridge.hooks([(POINT, double)]):
            model(TOKENS)

    run()
    total = count_lines(run)
    for line in range(total - 60, total + 1):  # the end of the forward and of the block
        interrupt_at(line, run)
        model(TOKENS).logits.sum().backward()
    bridge.run_with_hooks(TOKENS, fwd_hooks=[(POINT, double)])
    assert is_pristine(model)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_started_inside_a_block_is_warned() -> None:
    bridge = TransformerBridge(make_generator())
    tokens = random_tokens(1, 4)
    found: list[Tensor] = []

    def generate() -> None:
        found.append(bridge.hf_model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=3))

    with bridge.hooks([("hook_unembed", double), (POINT, double)]):
        with pytest.warns(PellucidWarning, match="copy_context"):
            in_a_thread(generate)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            in_a_thread(generate)  # once a block
            context = contextvars.copy_context()
            in_a_thread(lambda: context.run(generate))  # as the warning says
        generate()
    assert torch.equal(found[2], found[3])
    with bridge.hooks([(POINT, double)]), warnings.catch_warnings():
        warnings.simplefilter("error")
        in_a_thread(lambda: bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double)]))  # hooks of its own


def test_a_block_that_ends_while_a_point_fires_takes_no_edit_from_another() -> None:
    """The ending block's function stands before this run's in the list that the point is going through."""
    bridge, _ = make_pair()
    expected = bridge.run_with_hooks(TOKENS, fwd_hooks=[(POINT, double)])
    is_open, ends, has_ended = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        with bridge.hooks([(POINT, lambda tensor, hook: None)]):
            is_open.set()
            ends.wait(10)
        has_ended.set()

    def end_the_other(tensor: Tensor, hook: Any) -> None:
        ends.set()
        assert has_ended.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert is_open.wait(10)
    found = bridge.run_with_hooks(TOKENS, fwd_hooks=[(POINT, end_the_other), (POINT, double)])
    thread.join()
    assert torch.equal(found, expected)
    assert is_pristine(bridge.hf_model)


# -- runs inside runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["forward", "cache", "hugging face"])
@pytest.mark.parametrize("where", ["embed.hook_in", "hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"])
def test_a_run_inside_a_run_before_the_first_kept_point(where: str, inner: str) -> None:
    bridge, _ = make_pair()
    other = random_tokens(seed=5)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: bridge(other),
        "cache": lambda: bridge.run_with_cache(other),
        "hugging face": lambda: bridge.hf_model(other),
    }
    running: list[int] = []

    def run_inside(tensor: Tensor, hook: Any) -> None:
        if not running:
            running.append(1)
            calls[inner]()

    for names in ("blocks.2.hook_resid_post", None):
        running.clear()
        wanted_logits, wanted = bridge.run_with_cache(TOKENS, names_filter=names)
        with bridge.hooks([(where, run_inside)]):
            logits, cache = bridge.run_with_cache(TOKENS, names_filter=names)
        assert running
        assert torch.equal(logits, wanted_logits)
        assert all(torch.equal(cache[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("span", [{"start_at_layer": 1}, {"stop_at_layer": 2}])
def test_a_torch_hook_that_runs_the_model_in_a_part_of_it(span: dict[str, int]) -> None:
    bridge, native = make_pair()
    other = random_tokens(seed=5)
    found: list[Tensor] = []

    def run_inside(module: nn.Module, given: Any) -> None:
        if not found:
            found.append(torch.zeros(0))
            found.append(bridge(other))
            found.append(bridge.hf_model(other).logits)

    given = bridge(TOKENS, stop_at_layer=1) if "start_at_layer" in span else TOKENS
    expected = bridge(given, **span)
    handle = bridge.hf_model.transformer.h[1].register_forward_pre_hook(run_inside)
    assert torch.equal(bridge(given, **span), expected)
    handle.remove()
    assert all(torch.equal(logits, native(other).logits) for logits in found[1:])


@pytest.mark.parametrize("span", [{}, {"start_at_layer": 1}, {"stop_at_layer": 2}], ids=str)
@pytest.mark.parametrize("where", ["", "transformer"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_torch_pre_hook_of_the_model_that_runs_it(attention: Any, where: str, span: dict[str, int]) -> None:
    """It runs the model on other tokens and on the very arguments; the cache is that of the run that was asked for."""
    bridge, native = make_pair()
    bridge.set_attn_implementation(attention)
    model, other = bridge.hf_model, random_tokens(seed=5)
    given = bridge(TOKENS, stop_at_layer=1) if "start_at_layer" in span else TOKENS
    wanted_output, wanted = bridge.run_with_cache(given, **span)
    found: list[Tensor] = []
    caches: list[Any] = []
    running: list[int] = []

    def run_inside(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            running.append(1)
            found.append(model(other).logits)
            module(*args, **kwargs)
            caches.append(bridge.run_with_cache(other)[1])
            running.clear()

    handle = model.get_submodule(where).register_forward_pre_hook(run_inside, with_kwargs=True)
    output, cache = bridge.run_with_cache(given, **span)
    assert torch.equal(output, wanted_output)
    assert all(torch.equal(cache[name], wanted[name]) for name in wanted)
    assert torch.equal(found[0], native(other).logits)  # whole, and not in the attention of this bridge
    assert list(model.get_submodule(where)._forward_pre_hooks.values()) == [run_inside]
    handle.remove()
    _, alone = bridge.run_with_cache(other)
    assert all(torch.equal(caches[0][name], alone[name]) for name in alone)


def test_resetting_hooks_leaves_the_runs_of_others_alone() -> None:
    bridge, _ = make_pair()
    wanted = set(bridge.run_with_cache(TOKENS)[1])
    with bridge.hooks([(POINT, lambda tensor, hook: bridge.reset_hooks())]):
        assert set(bridge.run_with_cache(TOKENS)[1]) == wanted
    expected = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.hook_resid_post", double)])

    def reset_elsewhere(tensor: Tensor, hook: Any) -> None:
        in_a_thread(bridge.reset_hooks)

    hooks = [("hook_embed", reset_elsewhere), ("blocks.2.hook_resid_post", double)]
    assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), expected)


def test_a_model_that_was_hooked_is_not_kept_alive() -> None:
    bridge, _ = make_pair()
    alive = weakref.ref(bridge.hf_model)
    with bridge.hooks([(POINT, double)]):
        bridge(TOKENS)
        bridge.hf_model.transformer(TOKENS)
    bridge.add_hook(POINT, double).remove()
    del bridge
    gc.collect()
    assert alive() is None


def test_a_pickle_made_inside_a_block_has_nothing_of_it() -> None:
    bridge, native = make_pair()
    bridge.add_hook("hook_embed", look)
    with bridge.hooks([(POINT, double)]):
        clone = pickle.loads(pickle.dumps(bridge))
    assert [handle.name for handle in clone.live_hooks()] == ["hook_embed"]
    assert torch.equal(clone(TOKENS), native(TOKENS).logits)
    clone.reset_hooks()
    assert is_pristine(clone.hf_model)


def test_a_gradient_after_the_norm_beside_a_function_on_a_head_s_input() -> None:
    bridge, _ = make_pair()
    bridge.set_use_attn_in(True)
    wanted = [("blocks.1.ln1.hook_out", lambda gradient, hook: None)]
    with pytest.raises(GradientError, match="exclude each other"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_attn_in", look)], bwd_hooks=wanted)
    bridge.add_hook("blocks.1.hook_attn_in", lambda gradient, hook: None, dir="bwd")
    with pytest.raises(GradientError, match="exclude each other"):
        bridge.run_with_hooks(TOKENS, bwd_hooks=wanted)


# -- points that have to fire ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*was replaced while:pellucid.errors.PellucidWarning")
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", POINT, "blocks.1.mlp.hook_post", "hook_unembed"])
def test_a_point_that_does_not_fire_is_an_error_of_the_run(name: str) -> None:
    bridge, _ = make_pair()
    model = bridge.hf_model
    block = model.transformer.h[1]
    module = {"hook_unembed": model.lm_head, POINT: block.self_attention, "blocks.1.mlp.hook_post": block.mlp}.get(
        name, block
    )
    native = type(module).forward.__get__(module)
    for run in (bridge, lambda tokens: bridge.hf_model(tokens)):
        with bridge.hooks([(name, double)]):
            module.forward = native  # a library that replaces a forward it had kept
            with pytest.raises(HookNotFiredError, match=name.replace(".", r"\.")):
                run(TOKENS)
        del module.forward
    # What is not on the way of a run is no fault of it.
    with bridge.hooks([("blocks.0.hook_resid_post", double)]):
        residual = bridge(TOKENS, stop_at_layer=2)
        bridge(residual, start_at_layer=2)
    bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda tensor, hook: hook.remove_hooks())])
    with bridge.hooks([("embed.hook_out", double)]):
        model(inputs_embeds=torch.randn(1, 3, bridge.cfg.d_model))


# -- torch's own hooks -------------------------------------------------------------------------------------------------

REGISTRATIONS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
]


@pytest.mark.parametrize("register", REGISTRATIONS)
def test_a_torch_hook_where_it_would_never_be_called_is_refused(register: str) -> None:
    bridge = TransformerBridge(make_bloom())
    for module in (
        bridge.blocks[1],
        bridge.blocks[1].mlp,
        bridge.blocks[1].attn.o,
        bridge.ln_final,
        bridge.unembed,
        bridge.blocks[0].hook_resid_pre,
        bridge.hook_dict["blocks.0.attn.hook_z"],
        bridge,
    ):
        with pytest.raises(InputError, match="would not be called"):
            getattr(module, register)(lambda *_: None)
    with pytest.raises(InputError, match=r"get_submodule\('transformer\.h\.1\.mlp'\)"):
        getattr(bridge.blocks[1].mlp, register)(lambda *_: None)
    called: list[int] = []
    point = HookPoint()  # in a user's own module it is called
    point.register_forward_hook(lambda *_: called.append(1))
    point(torch.zeros(1))
    assert called == [1]
