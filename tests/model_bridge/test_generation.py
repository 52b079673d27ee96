"""Generation is Hugging Face's, token for token, with hooks at each step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
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
