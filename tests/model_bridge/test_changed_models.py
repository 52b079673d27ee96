"""A model that is changed after it was wrapped, and modules around it: the numbers are Hugging Face's, or it is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pellucid import TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.model_bridge.generalized_components.weights import first_floating
from pellucid.sweep import Edit, LogitDifference, Sweep, Zero
from tests.families import make_family
from tests.models import make_bloom, random_tokens


class Around(nn.Module):
    """A module around a BLOOM that gives what ``give`` makes of its output."""

    def __init__(self, model: nn.Module, give: Any) -> None:
        super().__init__()
        self.inner, self.give = model, give

    def forward(self, **arguments: Any) -> Any:
        return self.give(self.inner(**arguments | {"output_hidden_states": True, "return_dict": True}))


class Block(nn.Module):
    """A block with a module around it that has no children of a block's names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.wrapped = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


@pytest.mark.parametrize(
    "give",
    [
        lambda out: out.hidden_states[-1],
        lambda out: (out.hidden_states[-1],),
        lambda out: out.logits.mean(),
        lambda out: out.logits[:, -1],
        lambda out: out.logits[:, -1:],
        lambda out: {"scores": out.logits},
        lambda out: (),
        lambda out: None,
    ],
)
def test_a_module_around_bloom_that_gives_something_else_is_refused(give: Any) -> None:
    bridge = TransformerBridge(Around(make_bloom(), give))
    for call in (bridge, bridge.run_with_cache, lambda tokens: bridge(tokens, return_type="loss")):
        with pytest.raises(
            UnsupportedModelError, match=r"Around is around the model.*expected logits \[batch, pos, 97\]"
        ):
            call(random_tokens())


@pytest.mark.parametrize("give", [lambda out: out, lambda out: (out.logits,), lambda out: out.logits])
def test_a_module_around_bloom_that_gives_logits(give: Any) -> None:
    tokens = random_tokens()
    bridge = TransformerBridge(Around(make_bloom(), give))
    assert torch.equal(bridge(tokens), make_bloom()(tokens).logits)
    assert torch.equal(bridge.run_with_cache(tokens)[0], make_bloom()(tokens).logits)


def drop_last(model: Any) -> None:
    model.transformer.h = model.transformer.h[:2]


def drop_first(model: Any) -> None:
    del model.transformer.h[0]


def add_block(model: Any) -> None:
    model.transformer.h.append(make_bloom().transformer.h[0])


def wrap_with_two(model: Any) -> None:
    """A module around a block with another block beside it: which of them is meant?"""
    wrapped = Block(model.transformer.h[1])
    wrapped.other = make_bloom().transformer.h[1]
    model.transformer.h[1] = wrapped


class Raised(Block):
    """A module around a block that adds to what it gives, as repeng's control vectors do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.wrapped(*args, **kwargs)
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_block_is_found_in_a_module_that_was_put_around_it(family: str) -> None:
    model = make_bloom() if family == "bloom" else make_family(family)
    bridge, tokens = TransformerBridge(model), random_tokens(vocab=80) + 5
    plain = bridge.run_with_cache(tokens)[1]
    layers = model.transformer.h if family == "bloom" else model.model.layers
    layers[1] = Raised(layers[1])
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens).logits)
    assert torch.equal(cache["resid_mid", 1], plain["resid_mid", 1])
    assert torch.equal(cache["resid_post", 1], plain["resid_post", 1] + 1)
    without = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)])
    assert not torch.allclose(without, logits, atol=1e-3)
    layers[1] = layers[1].wrapped
    assert torch.equal(bridge.run_with_cache(tokens)[1]["resid_post", 1], plain["resid_post", 1])


@pytest.mark.parametrize("change", [wrap_with_two, drop_last, drop_first, add_block])
def test_blocks_changed_after_wrapping_are_refused_as_when_wrapping(change: Any) -> None:
    model = make_bloom()
    bridge = TransformerBridge(model)
    bridge.run_with_cache(random_tokens())
    change(model)
    for call in (
        lambda: bridge.run_with_cache(random_tokens(), attention_mask=torch.ones(2, 9)),
        lambda: bridge.run_with_hooks(
            random_tokens().int(), fwd_hooks=[("blocks.1.hook_resid_mid", lambda t, hook: None)]
        ),
        bridge.verify,
    ):
        with pytest.raises(UnsupportedModelError, match="transformer.h"):
            call()
    with pytest.raises(UnsupportedModelError):
        TransformerBridge(model)


@pytest.mark.parametrize("size", [120, 80])
def test_sizes_follow_a_resized_vocabulary(size: int) -> None:
    model = make_bloom()
    bridge = TransformerBridge(model)
    other = TransformerBridge(model)
    tokens = random_tokens(vocab=80)
    before = bridge.estimate_cache(tokens)["hook_unembed"]
    model.resize_token_embeddings(size)
    assert bridge.estimate_cache(tokens)["hook_unembed"] == before // 97 * size
    assert bridge.cfg.d_vocab == other.cfg.d_vocab == size
    new = torch.tensor([[size - 1, 3]])
    for each in (bridge, other):
        assert torch.equal(each(new), model(new).logits)
        with pytest.raises(InputError, match=f"ids go from 0 to {size - 1}"):
            each(torch.tensor([[size, 3]]))
        with pytest.raises(InputError, match=f"ids go from 0 to {size - 1}"):
            each.estimate_cache(torch.tensor([[size, 3]]))
    edit = Edit("blocks.1.hook_mlp_out", Zero())
    result = Sweep(bridge, new, {"difference": LogitDifference(size - 1, 3)}).run([edit])

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(tensor)

    logits = bridge.run_with_hooks(new, fwd_hooks=[("blocks.1.hook_mlp_out", zero)])[0, -1]
    assert torch.allclose(
        result.values["difference"].flatten().float(), (logits[size - 1] - logits[3])[None], atol=1e-5
    )
    assert bridge.verify(layers=[1]).ok


def _nothing(*arguments: Any) -> None:
    """A torch hook."""


def _hook_a_leaf(model: Any) -> None:
    model.transformer.h[1].mlp.gelu_impl.register_forward_hook(_nothing)


def _hook_the_root_before_it_runs(model: Any) -> None:
    model.register_forward_pre_hook(_nothing)


def _hook_beside_a_child_that_is_none(model: Any) -> None:
    block = model.transformer.h[0]
    block.register_module("none", None)
    block.add_module("extra", nn.Identity())
    block.extra.register_forward_hook(_nothing)


def _hook_a_sequence_of_nothing(model: Any) -> None:
    model.transformer.h[0].add_module("extra", nn.Sequential())  # false, as everything of length 0
    model.transformer.h[0].extra.register_forward_hook(_nothing)


def _put_in_a_hooked_module(model: Any) -> None:
    mlp = copy.deepcopy(model.transformer.h[1].mlp)
    mlp.register_forward_hook(_nothing)
    model.transformer.h[1].mlp = copy.deepcopy(mlp)  # its hook was registered with another module


def _give_a_module_another_dictionary(model: Any) -> None:
    model.transformer.h[1].mlp._forward_hooks = OrderedDict({0: _nothing})


def _give_a_list_other_blocks(model: Any) -> None:
    blocks = model.transformer.h
    del blocks[1]  # torch gives the list another dictionary
    blocks.append(copy.deepcopy(blocks[0]))
    blocks[-1].register_forward_hook(_nothing)


def _hook_a_parametrization(model: Any) -> None:
    dense = model.transformer.h[0].self_attention.dense
    parametrize.register_parametrization(dense, "weight", nn.Identity())
    dense.parametrizations.weight[0].register_forward_hook(_nothing)


@pytest.mark.parametrize(
    "put",
    [
        _hook_a_leaf,
        _hook_the_root_before_it_runs,
        _hook_beside_a_child_that_is_none,
        _hook_a_sequence_of_nothing,
        _put_in_a_hooked_module,
        _give_a_module_another_dictionary,
        _give_a_list_other_blocks,
        _hook_a_parametrization,
    ],
)
def test_torch_hooks_are_seen_wherever_they_are_put(put: Callable[[Any], None]) -> None:
    bridge = TransformerBridge(make_bloom())
    bridge.run_with_cache(random_tokens())  # what is found may not be remembered
    assert not bridge.has_torch_hooks()
    put(bridge.hf_model)
    assert bridge.has_torch_hooks()
    assert copy.deepcopy(bridge).has_torch_hooks()


@pytest.mark.parametrize("family", [None, "llama", "mpt"])
def test_the_first_floating_point_parameter_is_torchs(family: str | None) -> None:
    model: Any = make_bloom() if family is None else make_family(family)

    def of_torch() -> Tensor | None:
        return next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)

    assert first_floating(model) is of_torch() is not None
    embedding = model.get_input_embeddings()
    embedding.register_parameter("none", None)
    model._modules = {"none": None, **model._modules}
    embedding._parameters["weight"] = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)  # quantised
    assert first_floating(model) is of_torch() is not embedding.weight
    assert first_floating(nn.Identity()) is None


class Doubled(nn.Module):
    """A wrapper whose logits are twice those of the model inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self.inside(*args, **kwargs).logits * 2
        return logits


def test_a_wrapper_that_takes_the_models_place_is_run() -> None:
    bridge = TransformerBridge(make_bloom())
    tokens = random_tokens()
    plain = bridge(tokens)
    bridge.original_model = Doubled(bridge.hf_model)
    assert torch.equal(bridge(tokens), plain * 2)
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda tensor, hook: None)]), plain * 2)
