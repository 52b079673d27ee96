"""What transformers may rename: each name that Pellucid uses is read from the release, or missed by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers.models.bloom import modeling_bloom

from pellucid import TransformerBridge
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.generalized_components import backbone
from pellucid.model_bridge.generalized_components.hf_arguments import cache_name, forward_parameters
from tests.models import make_bloom, random_tokens

TOKENS = random_tokens(2, 7)


def steps_of(bridge: TransformerBridge, call: Any) -> list[tuple[int, list[int]]]:
    """(past length, positions of the first row) of each forward of a cached generation by hand."""
    seen: list[tuple[int, list[int]]] = []

    def note(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.run.past_length, hook.run.positions[0].tolist()))

    with torch.no_grad(), bridge.hooks([("blocks.1.hook_resid_post", note)]):
        for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:]):
            call(part)
    return seen


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_is_found_under_the_name_of_the_release(kind: Any) -> None:
    bridge = TransformerBridge(make_bloom())
    name = cache_name(BloomForCausalLM)
    wanted = [(0, [0, 1, 2, 3]), (4, [4]), (5, [5, 6])]
    for call in (
        lambda part, cache: bridge(part, past_key_values=cache),
        lambda part, cache: bridge.hf_model(part, **{name: cache}),
        lambda part, cache: bridge.hf_model.transformer(part, cache),  # by its place
        lambda part, cache: bridge.hf_model.transformer(input_ids=part, **{name: cache}),
        lambda part, cache: bridge.hf_model(
            inputs_embeds=bridge.hf_model.transformer.word_embeddings(part), **{name: cache}
        ),
    ):
        config = bridge.hf_model.config
        cache = DynamicCache() if kind is DynamicCache else StaticCache(config=config, max_cache_len=8)
        assert steps_of(bridge, lambda part, cache=cache, call=call: call(part, cache)) == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_name_that_the_release_still_takes_is_found_too() -> None:
    bridge = TransformerBridge(make_bloom())
    cache = DynamicCache()
    wanted = [(0, [0, 1, 2, 3]), (4, [4]), (5, [5, 6])]
    assert steps_of(bridge, lambda part: bridge.hf_model(part, past_key_values=cache)) == wanted


def test_verify_sees_positions_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = TransformerBridge(make_bloom())
    name = "key/value cache: positions that hooks are told"
    assert [result.measured for result in bridge.verify(layers=[0]).results if result.name == name] == [0]
    # As transformers 5.24 made it: the cache has a name that we do not look for.
    monkeypatch.setattr(backbone, "given_cache", lambda arguments: arguments.get("no_such_name"))
    report = bridge.verify(layers=[0])
    assert [result.name for result in report.failed] == [name]


def rename(monkeypatch: pytest.MonkeyPatch, kind: Any, old: str, new: str) -> None:
    """Give a Hugging Face forward another name for one argument, which its ``**kwargs`` would swallow."""
    import inspect

    native = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return native(self, *args, **{old if key == new else key: value for key, value in kwargs.items() if key != old})

    signature = inspect.signature(native)
    parameters = [
        parameter.replace(name=new) if parameter.name == old else parameter
        for parameter in signature.parameters.values()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__module__ = native.__module__
    monkeypatch.setattr(kind, "forward", forward)
    from pellucid.model_bridge.generalized_components import hf_arguments

    monkeypatch.setattr(hf_arguments, "_FOUND", {})


RENAMED = [
    (kind, argument)
    for kind, arguments in (
        (
            modeling_bloom.BloomForCausalLM,
            "input_ids attention_mask inputs_embeds use_cache return_dict logits_to_keep",
        ),
        (modeling_bloom.BloomModel, "input_ids attention_mask inputs_embeds use_cache"),
        (modeling_bloom.BloomBlock, "hidden_states alibi attention_mask layer_past"),
        (modeling_bloom.BloomAttention, "hidden_states residual alibi attention_mask layer_past output_attentions"),
        (modeling_bloom.BloomMLP, "hidden_states residual"),
    )
    for argument in (*arguments.split(), *(["the cache"] if kind.__name__.endswith(("LM", "Model")) else []))
]


@pytest.mark.parametrize(("kind", "argument"), RENAMED)
def test_an_argument_under_another_name_is_an_error(monkeypatch: pytest.MonkeyPatch, kind: Any, argument: str) -> None:
    model = make_bloom()
    old = cache_name(kind) if argument == "the cache" else argument
    rename(monkeypatch, kind, old, "renamed")
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__}.forward.*compatibility"):
        TransformerBridge(model)


def test_a_new_argument_of_what_we_compute_ourselves_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_bloom()
    rename(monkeypatch, modeling_bloom.BloomAttention, "use_cache", "sinks")
    with pytest.raises(UnsupportedModelError, match="sinks, which Pellucid does not know"):
        TransformerBridge(model)


def test_a_cache_under_a_name_that_only_a_later_release_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are data: another one is one entry more, and the bridge gives and reads the cache under it."""
    from pellucid.model_bridge.generalized_components import hf_arguments

    names = {kind: cache_name(kind) for kind in (modeling_bloom.BloomForCausalLM, modeling_bloom.BloomModel)}
    model = make_bloom()
    rename(monkeypatch, modeling_bloom.BloomForCausalLM, names[modeling_bloom.BloomForCausalLM], "kv")
    monkeypatch.setattr(hf_arguments, "CACHE_NAMES", ("kv", *hf_arguments.CACHE_NAMES))
    bridge = TransformerBridge(model)
    cache = DynamicCache()
    assert steps_of(bridge, lambda part: bridge(part, past_key_values=cache)) == [
        (0, [0, 1, 2, 3]),
        (4, [4]),
        (5, [5, 6]),
    ]


def test_a_forward_that_passes_everything_on_is_read_through() -> None:
    class Mine(BloomForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert forward_parameters(Mine) == forward_parameters(BloomForCausalLM)
    model = make_bloom()
    model.__class__ = Mine
    bridge = TransformerBridge(model)
    cache = DynamicCache()
    assert steps_of(bridge, lambda part: bridge(part, past_key_values=cache))[1] == (4, [4])


def test_names_that_are_not_arguments() -> None:
    """Attributes and methods of Hugging Face's that Pellucid reads with a default, or only in rare runs."""
    model = make_bloom()
    assert isinstance(model.all_tied_weights_keys, dict)
    assert model.all_tied_weights_keys["lm_head.weight"] == "transformer.word_embeddings.weight"
    assert model.transformer.gradient_checkpointing is False
    cache = DynamicCache()
    model(TOKENS, **{cache_name(BloomForCausalLM): cache})
    assert int(cache.get_seq_length()) == 7
    assert cache.get_mask_sizes(2, 0)[0] == 9
    assert callable(cache.update)
    fields = vars(GenerationConfig())
    for field in (
        "eos_token_id pad_token_id guidance_scale max_new_tokens do_sample repetition_penalty use_cache top_k top_p "
        "temperature output_logits return_dict_in_generate stop_strings disable_compile"
    ).split():
        assert field in fields, field
