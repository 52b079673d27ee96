"""Generation is Hugging Face's, token for token, with hooks at each step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError
from tests.models import is_pristine, make_generator, random_tokens


@pytest.fixture(scope="module")
def pair() -> tuple[TransformerBridge, Any]:
    model = make_generator()
    model.generation_config.eos_token_id = 5
    model.generation_config.pad_token_id = 3
    return TransformerBridge(model), copy.deepcopy(model)


def padded(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "repetition": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_token_for_token(pair: tuple[TransformerBridge, Any], option: str, hooked: bool) -> None:
    bridge, model = pair
    tokens = random_tokens(3, 6)
    for mask in (torch.ones_like(tokens), padded(tokens)):
        native = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, disable_compile=True, **OPTIONS[option]
        )
        options = dict(OPTIONS[option])
        kept = not options.pop("use_cache", True)
        with bridge.hooks([("*", lambda t, hook: None)] if hooked else []):
            ours = bridge.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=12,
                use_past_kv_cache=not kept,
                verbose=False,
                **({"disable_compile": True} | options),
            )
        assert torch.equal(ours, native)
        assert len(set(ours.flatten().tolist())) > 8  # it does not only copy
    assert is_pristine(bridge.hf_model)


def test_finished_rows_are_padded_as_hugging_face_does(pair: tuple[TransformerBridge, Any]) -> None:
    bridge, model = pair
    tokens = random_tokens(4, 5)
    free = model.generate(tokens, do_sample=False, max_new_tokens=20, eos_token_id=-1)
    ends = int(free[0, 8])  # the first row ends at its fourth new token at the latest
    native = model.generate(tokens, do_sample=False, max_new_tokens=20, eos_token_id=ends)
    assert (native[0, 9:] == 3).all()
    ours = bridge.generate(tokens, do_sample=False, max_new_tokens=20, eos_token_id=ends, verbose=False)
    assert torch.equal(ours, native)
    endless = bridge.generate(tokens, do_sample=False, max_new_tokens=20, stop_at_eos=False, verbose=False)
    assert torch.equal(endless, free)


def test_sampling(pair: tuple[TransformerBridge, Any]) -> None:
    bridge, model = pair
    tokens = random_tokens(2, 4)
    for ours, theirs in (
        ({}, {"top_k": 0, "top_p": 1.0}),
        ({"top_k": 5, "temperature": 0.7}, {"top_k": 5, "top_p": 1.0, "temperature": 0.7}),
        ({"top_p": 0.8}, {"top_k": 0, "top_p": 0.8}),
    ):
        torch.manual_seed(3)
        native = model.generate(tokens, do_sample=True, max_new_tokens=8, **theirs)
        torch.manual_seed(3)
        assert torch.equal(bridge.generate(tokens, max_new_tokens=8, verbose=False, **ours), native)


def test_frequency_penalty(pair: tuple[TransformerBridge, Any]) -> None:
    bridge, _ = pair
    tokens = random_tokens(1, 4)
    free = bridge.generate(tokens, do_sample=False, max_new_tokens=25, verbose=False, stop_at_eos=False)[0].tolist()
    held = bridge.generate(
        tokens, do_sample=False, max_new_tokens=25, verbose=False, stop_at_eos=False, freq_penalty=1000.0
    )[0].tolist()
    assert len(set(held)) == len(held)
    assert len(set(free)) <= len(set(held))


def test_where_a_hook_is(pair: tuple[TransformerBridge, Any]) -> None:
    bridge, _ = pair
    tokens = random_tokens(3, 6)
    mask = padded(tokens)
    seen: list[dict[str, Any]] = []

    def look(tensor: Tensor, hook: Any) -> None:
        run = hook.run
        seen.append(
            {
                "step": run.step,
                "columns": run.columns.tolist(),
                "positions": run.positions[0].tolist(),
                "rows": run.rows.tolist(),
                "real": run.real[0].tolist(),
                "shape": tuple(tensor.shape),
            }
        )

    for cached in (True, False):
        seen.clear()
        with bridge.hooks([("blocks.1.hook_resid_post", look)]):
            bridge.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=3,
                stop_at_eos=False,
                use_past_kv_cache=cached,
                verbose=False,
            )
        assert [entry["step"] for entry in seen] == [0, 1, 2]
        assert seen[0]["positions"] == [-1, -1, -1, 0, 1, 2]
        assert seen[0]["real"] == [False] * 3 + [True] * 3
        assert seen[0]["rows"] == [0, 1, 2]
        if cached:
            assert [entry["columns"] for entry in seen[1:]] == [[6], [7]]
            assert [entry["positions"] for entry in seen[1:]] == [[3], [4]]
            assert seen[1]["shape"] == (3, 1, 48)
        else:
            assert seen[2]["columns"] == list(range(8))
            assert seen[2]["positions"] == [-1, -1, -1, 0, 1, 2, 3, 4]
    seen.clear()
    with bridge.hooks([("blocks.1.hook_resid_post", look)]):
        bridge.generate(tokens, do_sample=False, num_beams=2, max_new_tokens=2, verbose=False)
    assert seen[-1]["rows"] == [0, 0, 1, 1, 2, 2]
    seen.clear()
    bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", look)], attention_mask=mask)
    assert seen[0]["step"] is None


def test_a_hook_on_positions_does_not_depend_on_the_cache(pair: tuple[TransformerBridge, Any]) -> None:
    bridge, _ = pair
    tokens = random_tokens(3, 6)
    mask = padded(tokens)
    direction = torch.randn(48)

    def steer(tensor: Tensor, hook: Any) -> Tensor:
        later = (hook.run.positions >= 4)[..., None]
        return torch.where(later, tensor + 2 * direction, tensor)

    def zero_a_head(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 1] *= (hook.run.positions % 2)[..., None]

    outputs = []
    for cached in (True, False):
        with bridge.hooks([("blocks.1.hook_resid_mid", steer), ("blocks.0.attn.hook_z", zero_a_head)]):
            outputs.append(
                bridge.generate(
                    tokens,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=10,
                    stop_at_eos=False,
                    use_past_kv_cache=cached,
                    verbose=False,
                )
            )
    assert torch.equal(outputs[0], outputs[1])
    plain = bridge.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=10, stop_at_eos=False, verbose=False
    )
    assert not torch.equal(outputs[0], plain)


def test_text(demo: TransformerBridge) -> None:
    from transformers import BloomForCausalLM

    prompt = "Everyone has the right to"
    text = demo.generate(prompt, do_sample=False, max_new_tokens=8, verbose=False)
    model: BloomForCausalLM = copy.deepcopy(demo.hf_model)
    encoded = demo.tokenizer(prompt, return_tensors="pt")
    native = model.generate(**encoded, do_sample=False, max_new_tokens=8)
    assert text == demo.tokenizer.decode(native[0], clean_up_tokenization_spaces=False)
    prompts = [prompt, "Toda persona tiene derecho a la"]
    together = demo.generate(prompts, do_sample=False, max_new_tokens=6, verbose=False)
    assert together == [demo.generate(one, do_sample=False, max_new_tokens=6, verbose=False) for one in prompts]
    ids = demo.generate(prompt, do_sample=False, max_new_tokens=8, verbose=False, return_type="tokens")
    assert torch.equal(ids, native)
    ids, given = demo.generate(prompt, max_new_tokens=2, verbose=False, return_input_tokens=True, return_type="tokens")
    assert torch.equal(given, demo.to_tokens(prompt))
    output = demo.generate(prompt, do_sample=False, max_new_tokens=3, verbose=False, output_logits=True)
    assert len(output.logits) == 3
    stopped = demo.generate(prompt, do_sample=False, max_new_tokens=30, verbose=False, stop_strings=[" and"])
    assert stopped.endswith(" and") or " and" not in stopped
    several = demo.generate(
        prompt, do_sample=False, max_new_tokens=3, verbose=False, num_beams=3, num_return_sequences=2
    )
    assert len(several) == 2
    assert all(text.startswith(prompt) for text in several)


def test_frequency_penalty_does_not_count_padding(pair: tuple[TransformerBridge, Any]) -> None:
    """By hand: a left-padded row is penalised for its own tokens, as it is alone."""
    bridge, model = pair
    alone = random_tokens(1, 4)
    tokens = torch.cat([torch.full((1, 3), 3), alone], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    output = bridge.generate(
        tokens, attention_mask=mask, max_new_tokens=1, do_sample=False, freq_penalty=2.0, verbose=False,
        output_logits=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits[0, -1]
    for token in alone[0].tolist():
        logits[token] -= 2
    assert torch.allclose(output.scores[0][0], logits, atol=1e-5)


def test_text_ends_where_its_row_ends(demo: TransformerBridge) -> None:
    """Without special tokens, or with those that are the text's own; never with padding."""
    whole = "Everyone has the right to life, liberty and security of person."
    prompts = [whole, "Everyone has"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
    encoded = demo.tokenizer(prompts, return_tensors="pt", padding=True)
    native = copy.deepcopy(demo.hf_model).generate(**encoded, do_sample=False, max_new_tokens=6)
    decoded = demo.tokenizer.batch_decode(native, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert demo.generate(prompts, **options) == decoded
    kept = demo.generate(prompts, skip_special_tokens=False, **options)
    assert kept == [whole + "</s>", decoded[1]]
    assert demo.generate("Everyone</s>", skip_special_tokens=False, **options).startswith("Everyone</s>")
    assert "</s>" not in demo.generate("Everyone</s>", **options)
    filled = demo.generate(prompts, skip_special_tokens=False, pad_token_id=300, **options)
    assert filled == kept  # what fills a row need not be the tokenizer's padding token
    ids = demo.generate(whole, return_type="tokens", **options)
    assert demo.generate(demo.to_tokens(whole), return_type="str", **options) == whole
    assert ids[0, -1] == demo.tokenizer.eos_token_id  # ids keep everything


def test_a_single_stopping_criterion(pair: tuple[TransformerBridge, Any]) -> None:
    from transformers import MaxLengthCriteria

    tokens = random_tokens(2, 4)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "verbose": False}
    for criteria in (MaxLengthCriteria(6), [MaxLengthCriteria(6)]):
        assert pair[0].generate(tokens, stopping_criteria=criteria, **options).shape == (2, 6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; found 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number; found 2.5"),
    ({"max_new_tokens": True}, "max_new_tokens is a whole number"),
    ({"max_length": 9}, "max_length counts the prompt.*4 tokens here.*max_new_tokens=max_length - 4"),
    ({"use_cache": False}, "use_cache is Hugging Face's word for use_past_kv_cache"),
    ({"input_ids": None}, "word for input"),
    ({"generation_config": None}, "generation_config would be overridden"),
    ({"eos_token_id": 5, "stop_at_eos": False}, "eos_token_id=5 would have no effect: stop_at_eos=False"),
    ({"eos_token_id": -1}, "stop_at_eos=False ends a row nowhere"),
    ({"eos_token_id": 97}, "eos_token_id must be at most 96; found 97"),
    ({"eos_token_id": [5, 97]}, "eos_token_id must be at most 96; found 97"),
    ({"eos_token_id": []}, "empty list"),
    ({"eos_token_id": "</s>"}, "eos_token_id is a whole number"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_k": 5.0}, "top_k is a whole number"),
    ({"top_p": 2.0}, "top_p must be at most 1; found 2.0"),
    ({"top_p": 0.0}, "top_p must be above 0"),
    ({"top_p": float("nan")}, "top_p must be finite; found nan"),
    ({"temperature": -1.0}, "temperature must be at least 0"),
    ({"temperature": float("inf")}, "temperature must be finite"),
    ({"temperature": None}, "temperature is a number; found None"),
    ({"freq_penalty": -0.5}, "freq_penalty must be at least 0"),
    ({"freq_penalty": float("nan")}, "freq_penalty must be finite"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ({"top_k": 5, "do_sample": False}, "top_k=5 would have no effect: do_sample=False"),
    ({"top_k": 5, "top_p": 0.5, "temperature": 0}, "top_k=5 and top_p=0.5 would have no effect: temperature=0"),
    ({"temperature": 0.7, "do_sample": False}, "temperature=0.7 would have no effect: do_sample=False"),
    ({"stop_strings": []}, "stop_strings is a list of strings; found an empty one"),
    ({"stop_strings": ["", "a"]}, "an entry of stop_strings is a string that is not empty"),
    ({"stop_strings": "a"}, "need a tokenizer"),
    ({"return_type": "ids"}, "Invalid return_type"),
    ({"return_type": "str"}, "need a tokenizer"),
    ({"return_type": "str", "output_logits": True}, "return_type='str' would have no effect"),
    ({"return_type": "str", "return_dict_in_generate": True}, "return_type='str' would have no effect"),
    ({"skip_special_tokens": False}, "skip_special_tokens=False would have no effect"),
    ({"attention_mask": torch.ones(1, 2)}, "attention_mask must have shape"),
    ({"prepend_bos": True}, "prepend_bos is for strings"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_arguments_out_of_range_or_without_effect(
    pair: tuple[TransformerBridge, Any], given: dict[str, Any], words: str
) -> None:
    bridge = pair[0]
    ran: list[int] = []
    handle = bridge.hf_model.register_forward_pre_hook(lambda module, inputs: ran.append(1))
    try:
        with pytest.raises(InputError, match=words):
            bridge.generate(random_tokens(2, 4), **given)
    finally:
        handle.remove()
    assert not ran
    assert is_pristine(bridge.hf_model)


def test_arguments_that_say_the_same_are_taken(pair: tuple[TransformerBridge, Any]) -> None:
    tokens = random_tokens(2, 4)
    greedy = pair[0].generate(tokens, max_new_tokens=5, do_sample=False, verbose=False)
    for given in ({"temperature": 0}, {"temperature": 0, "do_sample": False}, {"temperature": 1.0, "do_sample": False}):
        assert torch.equal(pair[0].generate(tokens, max_new_tokens=5, verbose=False, **given), greedy)
