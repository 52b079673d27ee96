"""What a bridge remembers from one run to the next must never be older than the model.

Handles, stand-ins and the way to each module are used again while the model is as it was; Hugging Face is asked for a tuple
while nobody else sees it. Here the model changes in between, in every way that we know of.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import BloomForCausalLM, BloomModel
from transformers.modeling_outputs import ModelOutput

from pellucid import TransformerBridge
from pellucid.errors import PellucidWarning
from tests.models import is_pristine, make_bloom, make_pair, random_tokens

POINTS = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.ln1.hook_scale"]


def looks(tensor: Tensor, hook: Any) -> None:
    pass


def doubled(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 2


# -- outputs -----------------------------------------------------------------------------------------------------------


@contextmanager
def hooked(register: Callable[..., Any], seen: list[Any]) -> Iterator[None]:
    handle = register(lambda module, given, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["model", "backbone", "everywhere"])
def test_a_torch_hook_sees_hugging_faces_output_objects(where: str) -> None:
    bridge, model = make_pair()
    tokens, expected = random_tokens(), make_pair()[1](random_tokens()).logits
    assert torch.equal(bridge(tokens), expected)
    modules = {"model": bridge.hf_model, "backbone": bridge.hf_model.transformer}
    register = modules[where].register_forward_hook if where in modules else register_module_forward_hook
    for run in (bridge, bridge.run_with_hooks, lambda given: bridge.run_with_cache(given)[0]):
        seen: list[Any] = []
        with hooked(register, seen):
            assert torch.equal(run(tokens), expected)
        wanted = [output for output in seen if isinstance(output, ModelOutput)]
        assert len(wanted) == (2 if where == "everywhere" else 1)
        assert not any(isinstance(output, tuple) and len(output) == 1 for output in seen)
    assert torch.equal(bridge(tokens), expected)


class Scaled(BloomForCausalLM):
    """Somebody's model, whose forward counts on an output object."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output


def test_a_class_with_a_forward_of_its_own() -> None:
    plain = make_bloom()
    model = Scaled(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    tokens = random_tokens()
    bridge = TransformerBridge(model)
    assert torch.equal(bridge(tokens), plain(tokens).logits * 3)
    assert torch.equal(bridge.run_with_cache(tokens)[0], plain(tokens).logits * 3)


@pytest.mark.parametrize("owner", [BloomForCausalLM, BloomModel])
def test_a_class_that_is_patched_after_wrapping(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    expected = model(tokens).logits
    bridge.run_with_cache(tokens)
    kept, seen = owner.forward, []

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kept(self, *args, **kwargs)
        seen.append(output[0] if isinstance(output, tuple) else next(iter(output.values())))
        assert isinstance(output, ModelOutput)
        return output

    monkeypatch.setattr(owner, "forward", patched)
    assert torch.equal(bridge(tokens), expected)
    assert torch.equal(bridge.run_with_cache(tokens)[0], expected)
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(POINTS[0], lambda t, hook: None)]), expected)
    assert len(seen) == 3


def test_a_forward_on_the_model_itself() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    expected = model(tokens).logits
    bridge(tokens)
    for owner in (bridge.hf_model, bridge.hf_model.transformer):
        kept, seen = owner.forward, []
        owner.forward = lambda *args, kept=kept, seen=seen, **kwargs: seen.append(kept(*args, **kwargs)) or seen[-1]
        assert torch.equal(bridge(tokens), expected)
        assert torch.equal(bridge.run_with_cache(tokens)[0], expected)
        assert len(seen) == 2
        assert all(isinstance(output, ModelOutput) for output in seen)
        del owner.forward


class Halved(nn.Dropout):
    """Somebody's dropout, which does something when it is off."""

    def forward(self, input: Tensor) -> Tensor:
        return input / 2


@pytest.mark.parametrize("how", ["hook", "pre-hook", "hook everywhere", "class", "forward", "training"])
def test_what_somebody_does_to_the_dropout_is_done(how: str) -> None:
    bridge, _ = make_pair(attention_dropout=0.5)
    tokens = random_tokens()
    attention = bridge.hf_model.transformer.h[1].self_attention
    dropout, undo = attention.attention_dropout, lambda: None
    if how == "hook":
        undo = dropout.register_forward_hook(lambda module, given, output: output * 0.5).remove
    elif how == "pre-hook":
        undo = dropout.register_forward_pre_hook(lambda module, given: given[0] * 0.5).remove
    elif how == "hook everywhere":
        halve = lambda module, given, output: output * 0.5 if module is dropout else None  # noqa: E731
        undo = register_module_forward_hook(halve).remove
    elif how == "class":
        attention.attention_dropout = Halved(0.5).eval()
    elif how == "forward":
        dropout.forward = lambda input: input / 2
    else:
        dropout.train()
    runs = []
    try:
        for run in (bridge.hf_model, lambda given: bridge.run_with_hooks(given, fwd_hooks=[(POINTS[1], looks)])):
            torch.manual_seed(0)
            output = run(tokens)
            runs.append(output if isinstance(output, Tensor) else output.logits)
        # Where layers may take the fused kernel, this one must not; the others do not, since their patterns are looked at.
        bridge.set_attn_implementation("sdpa")
        others = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers) if layer != 1]
        torch.manual_seed(0)
        runs.append(bridge.run_with_hooks(tokens, fwd_hooks=[(others, looks)]))
    finally:
        undo()
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], make_pair()[1](tokens).logits)


# -- mounting ----------------------------------------------------------------------------------------------------------


def runs(bridge: TransformerBridge, tokens: Tensor, name: str) -> tuple[Tensor, Tensor]:
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(name, doubled)])
    _, cache = bridge.run_with_cache(tokens)
    return edited, cache[name]


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("replaced", ["block", "attention", "mlp", "norm", "backbone"])
def test_a_module_that_is_replaced_between_two_runs(name: str, replaced: str) -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    before = runs(bridge, tokens, name)
    other = make_bloom(scale=0.2)
    model = bridge.hf_model
    if replaced == "backbone":
        model.transformer = other.transformer
    elif replaced == "block":
        model.transformer.h[1] = other.transformer.h[1]
    else:
        child = {"attention": "self_attention", "mlp": "mlp", "norm": "input_layernorm"}[replaced]
        setattr(model.transformer.h[1], child, getattr(other.transformer.h[1], child))
    expected = runs(TransformerBridge(copy.deepcopy(bridge.hf_model)), tokens, name)
    found = runs(bridge, tokens, name)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(found[0], before[0])
    assert is_pristine(bridge.hf_model)


def test_a_module_that_is_given_another_forward_between_two_runs() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    name = "blocks.1.mlp.hook_post"
    runs(bridge, tokens, name)
    mlp, calls = bridge.hf_model.transformer.h[1].mlp, []
    plain = mlp.forward
    mlp.forward = own = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", doubled)])
    assert calls  # nothing of ours stands on the MLP then
    with pytest.warns(PellucidWarning, match=r"transformer\.h\.1\.mlp has a forward"):
        with bridge.hooks(fwd_hooks=[(name, doubled)]):
            assert mlp.forward is not own
    assert mlp.forward is own


def test_a_class_of_modules_that_is_patched_between_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    name = "blocks.1.hook_resid_post"
    runs(bridge, tokens, name)
    block = type(bridge.hf_model.transformer.h[1])
    kept = block.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, pattern = kept(self, *args, **kwargs)
        return output + 1, pattern

    monkeypatch.setattr(block, "forward", patched)
    expected = bridge.hf_model(tokens).logits
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: None)]), expected)
    assert torch.equal(bridge.run_with_cache(tokens)[0], expected)


def test_runs_inside_other_runs_and_blocks() -> None:
    """The quick way is for a model on which nothing of ours stands; every other order has to end pristine as well."""
    bridge, model = make_pair()
    tokens = random_tokens()
    expected = model(tokens).logits
    wanted = bridge.run_with_hooks(tokens, fwd_hooks=[(POINTS[0], doubled)])
    everything = set(bridge.run_with_cache(tokens)[1])
    with bridge.hooks(fwd_hooks=[(POINTS[0], doubled)]):
        logits, cache = bridge.run_with_cache(tokens)
        assert torch.equal(logits, wanted)
        assert set(cache) == everything
        assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(POINTS[1], lambda t, hook: None)]), wanted)
    assert is_pristine(bridge.hf_model)

    inner: list[Tensor] = []
    busy: list[bool] = []

    def run_inside(tensor: Tensor, hook: Any) -> None:
        if not busy:
            busy.append(True)  # the run inside meets this function too
            inner.append(bridge.run_with_cache(tokens)[0])

    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[(POINTS[2], run_inside)]), expected)
    assert len(inner) == 1
    assert is_pristine(bridge.hf_model)
    (handle,) = bridge.add_hook(POINTS[0], doubled)
    assert torch.equal(bridge.run_with_cache(tokens)[0], wanted)
    handle.remove()
    assert torch.equal(bridge(tokens), expected)
    assert is_pristine(bridge.hf_model)


# -- handles -----------------------------------------------------------------------------------------------------------


def test_handles_that_are_used_again_belong_to_one_run() -> None:
    bridge, _ = make_pair()
    one, two = random_tokens(seed=1), random_tokens(seed=2)
    _, first = bridge.run_with_cache(one)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    _, second = bridge.run_with_cache(two)
    for name, tensor in first.items():
        assert torch.equal(tensor, kept[name])
    assert not torch.equal(first[POINTS[0]], second[POINTS[0]])
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_handles_that_stay_are_not_used_again() -> None:
    bridge, _ = make_pair()
    one, two = random_tokens(seed=1), random_tokens(seed=2)
    bridge.run_with_cache(one)
    bridge.run_with_cache(one, names_filter=POINTS[0], reset_hooks_end=False)
    ((handle,),) = bridge.list_hooks().values()
    keeps: Any = handle.user_hook
    assert set(keeps.kept) == {POINTS[0]}
    _, second = bridge.run_with_cache(two, names_filter=POINTS[0])
    assert torch.equal(second[POINTS[0]], bridge.run_with_cache(two)[1][POINTS[0]])
    assert list(bridge.list_hooks().values()) == [[handle]]
    assert handle.user_hook is keeps
    assert handle.context_level is None  # as if it had been added
    bridge.reset_hooks()
    assert bridge.list_hooks() == {}
    assert is_pristine(bridge.hf_model)


def test_a_cache_whose_functions_are_left_on_keeps_what_later_runs_show() -> None:
    bridge, _ = make_pair()
    one, two = random_tokens(seed=1), random_tokens(seed=2)
    _, cache = bridge.run_with_cache(one, names_filter=POINTS[0], reset_hooks_end=False)
    of_one = cache[POINTS[0]]
    bridge(two)
    of_two = cache[POINTS[0]].clone()
    assert not torch.equal(of_one, of_two)
    bridge.reset_hooks()
    bridge(one)
    assert torch.equal(cache[POINTS[0]], of_two)
    assert torch.equal(bridge.run_with_cache(two)[1][POINTS[0]], of_two)


def test_an_exception_in_a_cached_run_leaves_nothing() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    expected = bridge.run_with_cache(tokens)[1]

    def fails(module: nn.Module, given: Any) -> None:
        raise RuntimeError("on the way")

    handle = bridge.hf_model.transformer.h[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="on the way"):
        bridge.run_with_cache(tokens)
    handle.remove()
    assert is_pristine(bridge.hf_model)
    assert not any(point.has_hooks() for point in bridge.hook_points())
    for name, tensor in bridge.run_with_cache(tokens)[1].items():
        assert torch.equal(tensor, expected[name])


def test_threads_that_cache_at_once() -> None:
    bridge, _ = make_pair()
    given = [random_tokens(seed=seed) for seed in range(4)]
    expected = [bridge.run_with_cache(tokens)[1] for tokens in given]
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(20):
            _, cache = bridge.run_with_cache(given[index])
            wrong.extend(name for name in cache if not torch.equal(cache[name], expected[index][name]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_remembers_nothing(how: str) -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    _, before = bridge.run_with_cache(tokens)
    clone = copy.deepcopy(bridge) if how == "copy" else pickle.loads(pickle.dumps(bridge))
    with torch.no_grad():
        clone.hf_model.transformer.h[1].mlp.dense_4h_to_h.bias.add_(1)
    _, cache = clone.run_with_cache(tokens)
    assert not torch.equal(cache[POINTS[0]], before[POINTS[0]])
    assert torch.equal(bridge.run_with_cache(tokens)[1][POINTS[0]], before[POINTS[0]])
    assert is_pristine(bridge.hf_model)
    assert is_pristine(clone.hf_model)
