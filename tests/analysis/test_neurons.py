"""Changes by neuron list against plain PyTorch hooks, their refusals, and the error that says nothing was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.analysis import neurons as module
from pellucid.analysis.neurons import Neuron, NeuronEdit, add, as_neurons, changed, force, random_neurons, scale, zero
from pellucid.errors import HookNameError, InputError, NoEffectError
from tests.models import make_bloom, make_generator, make_pair, random_tokens

LISTED: list[Neuron] = [(0, 3), (2, 100), (0, 191), (2, 0)]


@contextmanager
def torch_hooks(model: Any, edit: Any, module_name: str = "mlp.dense_4h_to_h", before: bool = True) -> Iterator[None]:
    """``edit(layer, tensor)`` on the input (or output) of a module of every block."""
    handles = []
    for layer, block in enumerate(model.transformer.h):
        target = block.get_submodule(module_name)
        if before:
            handles.append(
                target.register_forward_pre_hook(lambda _, args, layer=layer: (edit(layer, args[0].clone()), *args[1:]))
            )
        else:
            handles.append(target.register_forward_hook(lambda _, args, out, layer=layer: edit(layer, out.clone())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (zero(LISTED), lambda x, v: torch.zeros_like(x)),
        (force(LISTED, [0.5, -1.0, 2.0, 0.25]), lambda x, v: torch.full_like(x, v)),
        (scale(LISTED, [0.5, -1.0, 2.0, 0.25]), lambda x, v: x * v),
        (add(LISTED, dict(zip(LISTED, [0.5, -1.0, 2.0, 0.25], strict=True))), lambda x, v: x + v),
    ],
)
def test_a_change_is_what_a_plain_hook_does(dtype: torch.dtype, change: Any, plain: Any) -> None:
    bridge, bare = make_pair(dtype)
    tokens = random_tokens()
    values = dict(zip(LISTED, [0.5, -1.0, 2.0, 0.25], strict=True))

    def edit(layer: int, x: Tensor) -> Tensor:
        for (where, index), value in values.items():
            if where == layer:
                x[..., index] = plain(x[..., index], value)
        return x

    with torch.no_grad():
        with change.on(bridge):
            found = bridge(tokens)
        by_hooks = bridge.run_with_hooks(tokens, fwd_hooks=change.fwd_hooks(bridge), assert_effect=True)
        with torch_hooks(bare, edit):
            expected = bare(tokens).logits
        assert torch.equal(found, expected)
        assert torch.equal(by_hooks, expected)
        assert torch.equal(bridge(tokens), bare(tokens).logits)


@pytest.mark.parametrize(("place", "part"), [("attn.hook_q", 0), ("attn.hook_k", 1), ("attn.hook_v", 2)])
def test_units_of_heads(place: str, part: int) -> None:
    """Index ``head * d_head + dim``, against the fused projection: ``[n_heads, 3, d_head]``."""
    bridge, bare = make_pair()
    heads, width = bridge.cfg.n_heads, bridge.cfg.d_head
    listed = [(1, 5), (1, width + 2), (2, heads * width - 1)]

    def edit(layer: int, x: Tensor) -> Tensor:
        for where, index in listed:
            if where == layer:
                head, dim = divmod(index, width)
                x[..., (head * 3 + part) * width + dim] = 1.5
        return x

    tokens = random_tokens()
    with (
        torch.no_grad(),
        force(listed, 1.5, place).on(bridge),
        torch_hooks(bare, edit, "self_attention.query_key_value", False),
    ):
        assert torch.equal(bridge(tokens), bare(tokens).logits)


@pytest.mark.parametrize(
    ("place", "name"), [("hook_attn_out", "self_attention.dense"), ("mlp.hook_pre", "mlp.dense_h_to_4h")]
)
def test_other_places(place: str, name: str) -> None:
    bridge, bare = make_pair()

    def edit(layer: int, x: Tensor) -> Tensor:
        if layer == 1:
            x[..., 7] = 2.0
        return x

    if place == "hook_attn_out":  # the module adds the residual after: hook the projection itself
        tokens = random_tokens()
    tokens = random_tokens()
    with torch.no_grad(), force([(1, 7)], 2.0, place).on(bridge), torch_hooks(bare, edit, name, False):
        assert torch.equal(bridge(tokens), bare(tokens).logits)


def test_generation_is_changed_at_every_step() -> None:
    model = make_generator()
    bridge = TransformerBridge(model)
    tokens = random_tokens(1, 5)
    listed = [(layer, index) for layer in range(3) for index in range(0, 192, 2)]

    def edit(layer: int, x: Tensor) -> Tensor:
        x[..., ::2] = 0
        return x

    def written() -> Tensor:
        return bridge.generate(tokens, max_new_tokens=12, do_sample=False, verbose=False)

    plain = written()
    with zero(listed).on(bridge):
        found = written()
    with torch_hooks(model, edit):
        expected = written()
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(written(), plain)


def test_several_changes_together() -> None:
    bridge, bare = make_pair()

    def edit(layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            x[..., 4] = (x[..., 4] + 1) * 2
        return x

    tokens = random_tokens()
    with torch.no_grad(), torch_hooks(bare, edit), changed(bridge, [add([(0, 4)], 1.0), scale([(0, 4)], 2.0)]):
        assert torch.equal(bridge(tokens), bare(tokens).logits)


# -- nothing changed ---------------------------------------------------------------------------------------------------


def test_a_change_that_changes_nothing_is_an_error() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens()
    with pytest.raises(NoEffectError, match="never ran"):
        with zero(LISTED).on(bridge):
            pass
    with pytest.raises(NoEffectError, match="already had the value"):
        with scale(LISTED, 1.0).on(bridge):
            bridge(tokens)
    with pytest.raises(NoEffectError, match="never ran"), zero([(2, 0)]).on(bridge):
        bridge(tokens, stop_at_layer=1)
    with pytest.raises(InputError, match="empty"):
        with zero([]).on(bridge):
            bridge(tokens)
    for change in (zero([]), scale(LISTED, 1.0)):
        with change.on(bridge, assert_effect=False):
            bridge(tokens)


def test_silent_neurons_are_found_out_by_value() -> None:
    """GELU of a large negative number is -0.: setting it to 0. changes bits and no number."""
    model = make_bloom()
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_h_to_4h.bias[5] = -1000.0
    bridge = TransformerBridge(model)
    with pytest.raises(NoEffectError, match="already had"), zero([(1, 5)]).on(bridge):
        bridge(random_tokens())
    with zero([(1, 5), (1, 6)]).on(bridge):
        bridge(random_tokens())


def test_a_replication_that_silences_a_copy_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the edit works on a copy of the activations, as ``x.float()`` is one in half precision."""
    from pellucid.analysis.perplexity import perplexity_change
    from tests.analysis.texts import TokenText

    bridge, _ = make_pair()
    text = TokenText({"a": random_tokens(2, 8)})
    honest = NeuronEdit.__call__
    assert perplexity_change(bridge, text, {"a": LISTED})["change"].item() != 0
    monkeypatch.setattr(NeuronEdit, "__call__", lambda self, activation, hook: honest(self, activation.clone(), hook))
    with pytest.raises(NoEffectError, match="does not reach the logits"):
        perplexity_change(bridge, text, {"a": LISTED})


def test_an_exception_inside_is_not_hidden_and_leaves_nothing_behind() -> None:
    bridge, bare = make_pair()
    with pytest.raises(ZeroDivisionError), zero(LISTED).on(bridge):
        raise ZeroDivisionError
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(bridge(tokens), bare(tokens).logits)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: zero([(3, 0)]), "no layer 3 .* layers 0 to 2"),
        (lambda: zero([(-1, 0)]), "no layer -1"),
        (lambda: zero([(0, 192)]), "no neuron 192 in layer 0: mlp.hook_post has 192 of them, 0 to 191"),
        (lambda: zero([(0, -1)]), "no neuron -1"),
        (lambda: zero([(0, 48)], "hook_attn_out"), "0 to 47"),
        (lambda: zero([(0, 48)], "attn.hook_q"), "0 to 47"),
        (lambda: zero([(0, 1)], "attn.hook_pattern"), "no units at positions"),
        (lambda: zero([(0, 1)], "mlp.hook_posts"), "mlp.hook_post"),
    ],
)
def test_neurons_that_the_model_does_not_have(make: Any, said: str) -> None:
    bridge, _ = make_pair()
    change = make()
    for use in (change.check, change.fwd_hooks, lambda bridge: change.on(bridge).__enter__()):
        with pytest.raises((InputError, HookNameError), match=said):
            use(bridge)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: zero([1, 2]), "pairs; found 1"),
        (lambda: zero([(0, 1.5)]), "whole numbers"),
        (lambda: zero([(0, 1, 2)]), "pairs"),
        (lambda: force([(0, 1)], [1.0, 2.0]), "1 neurons and 2 values"),
        (lambda: force([(0, 1)], float("nan")), "finite"),
        (lambda: force([(0, 1), (0, 1)], [1.0, 2.0]), "listed twice"),
        (lambda: add([(0, 1)], {(0, 2): 1.0}), "no value for neuron \\(0, 1\\)"),
    ],
)
def test_lists_that_cannot_be(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_ways_to_write_a_list() -> None:
    expected = [(0, 1), (2, 5)]
    assert as_neurons([[0, 1], [2, 5]]) == expected
    assert as_neurons(torch.tensor(expected)) == expected
    assert as_neurons(np.array(expected)) == expected
    assert as_neurons({0: [1], 2: torch.tensor([5])}) == expected
    assert zero([(0, 1), (0, 1)]).neurons == ((0, 1),)


def test_random_neurons() -> None:
    drawn = random_neurons([(0, 1), (0, 2), (3, 1)], 4, 10, 0, "layer")
    assert [layer for layer, _ in drawn] == [0, 0, 3]
    assert random_neurons([], 4, 10, 0, "layer") == ()
    assert len(set(random_neurons([(0, i) for i in range(10)], 1, 10, 0))) == 10
    with pytest.raises(InputError, match="match"):
        random_neurons([], 4, 10, 0, "layers")  # type: ignore[arg-type]
    assert module.NEURONS == "mlp.hook_post"
