"""Models that a user's code runs in the middle of a run or a generation: they are no part of it.

Torch hooks of the model, streamers, logits processors and stopping criteria are called between forwards, where nothing of
ours is on the stack. The oracle is the loop by hand of :mod:`test_run_context`: what a generation shows its hooks is the same
with such code and without.
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

from pellucid import TransformerBridge
from tests.model_bridge.test_run_context import NEW, TOKENS, Seen, by_hand, generate, make_bridge
from tests.models import is_pristine, make_pair, random_tokens

OTHER = random_tokens(1, 3, seed=5)


class Beside:
    """Code of a user's that runs the model, once at a time, on a text of its own or on all that was written so far."""

    def __init__(self, bridge: TransformerBridge, on: str) -> None:
        self.model, self.on = bridge.hf_model, on
        self.running = False
        self.so_far = TOKENS
        self.calls = 0

    def run(self, tokens: Tensor | None = None) -> None:
        if self.running:
            return
        self.running, self.calls = True, self.calls + 1
        self.so_far = self.so_far if tokens is None else tokens
        self.model(OTHER if self.on == "another text" else self.so_far, use_cache=False)
        self.running = False

    # What Hugging Face calls: a streamer, a processor or a criterion.

    def put(self, value: Tensor) -> None:
        self.run()

    def end(self) -> None:
        self.run()

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.run(input_ids)
        return scores

    def stop(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.run(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def allow(self, row: int, tokens: Tensor) -> list[int]:
        self.run(tokens[None])
        return list(range(97))


TORCH_HOOKS = {
    "pre-hook of the model": ("", "register_forward_pre_hook"),
    "pre-hook of the backbone": ("transformer", "register_forward_pre_hook"),
    "forward hook of the model": ("", "register_forward_hook"),
    "forward hook of the backbone": ("transformer", "register_forward_hook"),
}
ARGUMENTS: dict[str, Callable[[Beside], dict[str, Any]]] = {
    "streamer": lambda beside: {"streamer": beside},
    "logits processor": lambda beside: {"logits_processor": [beside.process]},
    "stopping criterion": lambda beside: {"stopping_criteria": [beside.stop]},
    "allowed tokens": lambda beside: {"prefix_allowed_tokens_fn": beside.allow},
}
PLACES = pytest.mark.parametrize("place", [*TORCH_HOOKS, *ARGUMENTS])


@contextmanager
def put_at(place: str, bridge: TransformerBridge, beside: Beside) -> Iterator[dict[str, Any]]:
    """Have ``beside`` called at ``place``; gives arguments of ``generate``."""
    if place in ARGUMENTS:
        yield ARGUMENTS[place](beside)
        return
    where, register = TORCH_HOOKS[place]
    module = bridge.hf_model.get_submodule(where)

    def hook(module: nn.Module, *args: Any) -> None:
        beside.run()

    handle = getattr(module, register)(hook)
    yield {}
    assert hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    handle.remove()


def look_beside(bridge: TransformerBridge, beside: Beside, run: Callable[[], Any]) -> tuple[list[Seen], list[Any]]:
    """What a hook sees in the generation's own forwards, and the steps of those beside it."""
    own: list[Seen] = []
    steps: list[Any] = []

    def note(tensor: Tensor, hook: Any) -> None:
        run = hook.run
        if beside.running:
            steps.append(run.step)
        else:
            own.append(Seen(run.step, run.columns.tolist(), run.rows.tolist()))

    with bridge.hooks([("blocks.1.hook_resid_post", note)]):
        run()
    assert is_pristine(bridge.hf_model)
    return own, steps


@PLACES
@pytest.mark.parametrize(
    ("way", "on", "cached"),
    [
        ("hf", "another text", True),
        ("hf", "another text", False),
        ("hf", "the same text", False),
        ("bridge", "the same text", True),
    ],
)
def test_a_forward_beside_a_generation_is_no_step_of_it(way: str, place: str, on: str, cached: bool) -> None:
    bridge = make_bridge()
    beside = Beside(bridge, on)
    with put_at(place, bridge, beside) as arguments:
        own, steps = look_beside(bridge, beside, lambda: generate(bridge, way, TOKENS, use_cache=cached, **arguments))
    assert [entry.step for entry in own] == list(range(NEW))
    assert own == (by_hand(6, [0, 1]) if cached else [Seen(k, list(range(6 + k)), [0, 1]) for k in range(NEW)])
    assert beside.calls >= NEW
    assert len(steps) == beside.calls
    if place in ("streamer", *TORCH_HOOKS):
        assert set(steps) == {None}
    elif on == "another text":
        per_step = beside.calls // NEW
        assert steps == [step for step in range(NEW) for _ in range(per_step)]


@PLACES
def test_a_forward_beside_guidance_is_no_step_of_it(place: str) -> None:
    """Without a cache, where nothing but the tokens tells the two sequences apart."""
    bridge = make_bridge()
    beside = Beside(bridge, "the same text" if place in ARGUMENTS else "another text")
    given = {"guidance_scale": 1.5, "use_cache": False, "negative_prompt_ids": random_tokens(2, 4, seed=5)}
    with put_at(place, bridge, beside) as arguments:
        own, _ = look_beside(bridge, beside, lambda: generate(bridge, "hf", TOKENS, **given, **arguments))
    assert own == [Seen(step, list(range(n + step)), [0, 1]) for step in range(NEW) for n in (6, 4)]


@pytest.mark.parametrize("span", [{}, {"start_at_layer": 1}, {"stop_at_layer": 2}], ids=str)
@pytest.mark.parametrize("where", ["", "transformer"])
def test_a_torch_hook_after_a_part_of_the_model_runs_the_whole(where: str, span: dict[str, int]) -> None:
    bridge, native = make_pair()
    other = random_tokens(seed=5)
    given = bridge(TOKENS, stop_at_layer=1) if "start_at_layer" in span else TOKENS
    wanted_output, wanted = bridge.run_with_cache(given, **span)
    found: list[Tensor] = []
    running: list[int] = []

    def run_after(module: nn.Module, *args: Any) -> None:
        if not running:
            running.append(1)
            found.append(bridge.hf_model(other).logits)
            running.clear()

    handle = bridge.hf_model.get_submodule(where).register_forward_hook(run_after, always_call=True)
    output, cache = bridge.run_with_cache(given, **span)
    handle.remove()
    assert found
    assert all(torch.equal(logits, native(other).logits) for logits in found)
    assert torch.equal(output, wanted_output)
    assert all(torch.equal(cache[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("where", ["transformer", "transformer.ln_f", "lm_head"])
def test_the_unembedding_belongs_to_the_forward_that_it_is_in(where: str, register: str) -> None:
    """A bare backbone, run at any place before the head, leaves blocks of its own."""
    bridge, _ = make_pair()
    seen: list[tuple[int, ...]] = []
    running: list[int] = []

    def run_blocks(module: nn.Module, *args: Any) -> None:
        if not running:
            running.append(1)
            bridge.hf_model.transformer(OTHER)
            running.clear()

    handle = getattr(bridge.hf_model.get_submodule(where), register)(run_blocks)
    for run in (bridge, bridge.hf_model):
        with bridge.hooks([("hook_unembed", lambda tensor, hook: seen.append(tuple(hook.run.tokens.shape)))]):
            run(TOKENS)
    handle.remove()
    assert seen == [tuple(TOKENS.shape)] * 2


def test_a_torch_hook_of_two_threads_is_beside_the_generation_of_each() -> None:
    """The first generation ends, and takes off what it put, while the second is between two steps."""
    bridge = make_bridge()
    model = bridge.hf_model
    both_run, first_ended = threading.Barrier(2), threading.Event()
    here = threading.local()

    def run_inside(module: nn.Module, args: Any) -> None:
        if not here.beside:
            here.beside = True
            model(OTHER)
            here.beside = False

    def generation(is_second: bool, seen: list[Any]) -> None:
        here.beside, waited = False, []

        def wait(tensor: Tensor, hook: Any) -> None:
            seen.append((here.beside, hook.run.step))
            if not (here.beside or waited):
                waited.append(1)
                both_run.wait(10)
                assert not is_second or first_ended.wait(10)

        with bridge.hooks([("blocks.1.hook_resid_post", wait)]):
            generate(bridge, "hf", TOKENS)

    handle = model.register_forward_pre_hook(run_inside)
    seen: tuple[list[Any], list[Any]] = [], []
    second = threading.Thread(target=generation, args=(True, seen[1]))
    second.start()
    generation(False, seen[0])
    first_ended.set()
    second.join()
    assert list(model._forward_pre_hooks.values()) == [run_inside]
    handle.remove()
    assert seen[0] == seen[1] == [found for step in range(NEW) for found in ((True, None), (False, step))]


def test_a_copy_made_by_a_torch_hook_has_the_user_s_hook() -> None:
    bridge, _ = make_pair()
    copies: list[nn.Module] = []

    def keep(module: nn.Module, args: Any) -> None:
        if not copies:
            copies.append(copy.deepcopy(module))
            copies.append(pickle.loads(pickle.dumps(module._forward_pre_hooks)))

    keep.__qualname__ = keep.__name__
    globals()["keep"] = keep  # a pickle finds it by its name
    handle = bridge.hf_model.transformer.register_forward_pre_hook(keep)
    bridge.run_with_cache(TOKENS)
    handle.remove()
    del globals()["keep"]
    assert list(copies[0]._forward_pre_hooks.values()) == list(copies[1].values()) == [keep]
