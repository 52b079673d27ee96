"""What ``hook.run`` says under every kind of generation, against a hand-written loop and Hugging Face's own masks.

Each case runs by ``bridge.generate`` and by Hugging Face's ``generate`` inside a block of hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError
from tests.models import is_pristine, make_generator, random_tokens

TOKENS = random_tokens(2, 6)
NEW = 3


class Seen(NamedTuple):
    """One forward, as a hook sees it."""

    step: int | None
    columns: list[int]
    rows: list[int]


def make_bridge() -> TransformerBridge:
    model = make_generator()
    model.generation_config.pad_token_id = 3
    return TransformerBridge(model)


def generate(bridge: TransformerBridge, way: str, tokens: Tensor, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    if way == "hf":
        return bridge.hf_model.generate(tokens, eos_token_id=-1, **options)
    cached = options.pop("use_cache", True)
    return bridge.generate(tokens, stop_at_eos=False, verbose=False, use_past_kv_cache=cached, **options)


def look(bridge: TransformerBridge, run: Callable[[], Any], point: str = "blocks.1.hook_resid_post") -> list[Seen]:
    seen: list[Seen] = []

    def note(tensor: Tensor, hook: Any) -> None:
        run = hook.run
        assert tensor.shape[:2] == (run.batch, run.length)
        seen.append(Seen(run.step, run.columns.tolist(), run.rows.tolist()))
        if run.step is not None and run.columns.dim() == 1:
            assert run.step == int(run.steps[-1])

    with bridge.hooks([(point, note)]):
        run()
    assert is_pristine(bridge.hf_model)
    return seen


def by_hand(prompt: int, rows: list[int]) -> list[Seen]:
    """A loop with a cache: the prompt, then one token at a time."""
    starts = [(0, prompt), *((prompt + k, prompt + k + 1) for k in range(NEW - 1))]
    return [Seen(step, list(range(*span)), rows) for step, span in enumerate(starts)]


WAYS = pytest.mark.parametrize("way", ["bridge", "hf"])


@WAYS
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [0, 1]),
        ({"num_beams": 2}, [0, 0, 1, 1]),
        ({"num_beams": 3, "num_return_sequences": 2}, [0, 0, 0, 1, 1, 1]),
        ({"do_sample": True, "num_return_sequences": 2}, [0, 0, 1, 1]),
        ({"cache_implementation": "static", "disable_compile": True}, [0, 1]),
        ({"logits_to_keep": 0}, [0, 1]),
    ],
)
def test_one_token_a_step(way: str, options: dict[str, Any], rows: list[int]) -> None:
    bridge = make_bridge()
    assert look(bridge, lambda: generate(bridge, way, TOKENS, **options)) == by_hand(6, rows)
    whole = look(bridge, lambda: generate(bridge, way, TOKENS, use_cache=False, **options)) if len(options) < 2 else []
    for step, seen in enumerate(whole):
        assert seen == Seen(step, list(range(6 + step)), rows)


@WAYS
def test_a_prompt_in_chunks(way: str) -> None:
    bridge = make_bridge()
    seen = look(bridge, lambda: generate(bridge, way, TOKENS, prefill_chunk_size=4))
    assert [entry[:2] for entry in seen] == [(0, [0, 1, 2, 3]), (0, [4, 5]), (1, [6]), (2, [7])]


@WAYS
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("negative", [None, 1, 4, 6, 7, 9])
def test_guidance_is_at_the_step_that_it_guides(way: str, cached: bool, negative: int | None) -> None:
    bridge = make_bridge()
    given = {} if negative is None else {"negative_prompt_ids": random_tokens(2, negative, seed=5)}
    seen = look(bridge, lambda: generate(bridge, way, TOKENS, guidance_scale=1.5, use_cache=cached, **given))
    length = 1 if negative is None else negative
    wanted = []
    for step in range(NEW):
        for prompt in (6, length):
            start = prompt + step - 1 if cached and step else 0
            wanted.append(Seen(step, list(range(start, prompt + step)), [0, 1]))
    assert seen == wanted


@WAYS
@pytest.mark.parametrize("kind", ["lookup", "assistant", "the model itself"])
def test_assisted_decoding_counts_positions(way: str, kind: str) -> None:
    """Several tokens a forward; every edit by step is the edit of a greedy decoding by hand."""
    bridge = make_bridge()
    prompt = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    assistant = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": make_generator(n_layer=1)}}
    options = assistant.get(kind, {"assistant_model": bridge.hf_model})
    direction = torch.randn(48, generator=torch.Generator().manual_seed(2))
    forwards: list[tuple[int, int, int]] = []

    def steer(tensor: Tensor, hook: Any) -> Tensor:
        run = hook.run
        # The model's own calls of generate, as an assistant, have prompts of their own; the loop by hand has no step.
        if kind != "the model itself" and run.step is not None:
            forwards.append((run.past_length, run.length, run.step))
            assert run.steps.tolist() == [max(0, column - 7) for column in run.columns.tolist()]
        return tensor + 3 * (run.columns >= 9)[None, :, None] * direction

    with bridge.hooks([("blocks.1.hook_resid_post", steer)]):
        assisted = generate(bridge, way, prompt, max_new_tokens=8, **options)
        plain = prompt
        with torch.no_grad():
            for _ in range(8):
                plain = torch.cat([plain, bridge.hf_model(plain).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(assisted, plain)
    if kind != "the model itself":
        assert any(length > 1 for past, length, _ in forwards if past)
        assert all(step == past + length - 8 for past, length, step in forwards)


@WAYS
def test_an_edit_by_step_is_the_edit_of_a_loop(way: str) -> None:
    """Steering from the second new token on: with a cache, without, in chunks, and by hand."""
    bridge = make_bridge()
    direction = 3 * torch.randn(48, generator=torch.Generator().manual_seed(2))

    def by_step(tensor: Tensor, hook: Any) -> None:
        tensor[:, hook.run.steps >= 2] += direction

    name = "blocks.1.hook_resid_post"
    with bridge.hooks([(name, by_step)]):
        outputs = [
            generate(bridge, way, TOKENS, max_new_tokens=6, **options)
            for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4})
        ]
    tokens = TOKENS
    with torch.no_grad():
        for _ in range(6):

            def by_place(tensor: Tensor, hook: Any) -> None:
                tensor[:, 7:] += direction

            logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, by_place)])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert all(torch.equal(output, tokens) for output in outputs)
    assert not torch.equal(tokens, generate(bridge, way, TOKENS, max_new_tokens=6))


KEPT: dict[str, tuple[Any, Any]] = {
    "all": (0, [0, 1, 2, 3, 4, 5]),
    "more than there are": (9, [0, 1, 2, 3, 4, 5]),
    "last": (1, [5]),
    "last three": (3, [3, 4, 5]),
    "places": (torch.tensor([0, 3]), [0, 3]),
    "in another order": (torch.tensor([4, 1]), [4, 1]),
    "from the end": (torch.tensor([-1]), [5]),
    "mask": (torch.tensor([True, False, False, True, True, False]), [0, 3, 4]),
}


@pytest.mark.parametrize("form", KEPT)
def test_the_unembedding_knows_which_positions_it_is_given(form: str) -> None:
    bridge = make_bridge()
    kept, columns = KEPT[form]
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    real = mask.cumsum(1) - 1
    native = bridge.hf_model(TOKENS, attention_mask=mask, logits_to_keep=kept).logits
    whole = bridge.hf_model(TOKENS, attention_mask=mask).logits[:, columns]
    assert (native - whole).abs().max() < 1e-5  # the columns are these; a product of other shape may round otherwise

    def note(tensor: Tensor, hook: Any) -> None:
        run = hook.run
        assert run.columns.tolist() == columns
        assert torch.equal(run.tokens, TOKENS[:, columns])
        assert torch.equal(run.real, mask[:, columns].bool())
        assert torch.equal(run.positions, real[:, columns].masked_fill(mask[:, columns] == 0, -1))
        seen.append(tensor)

    seen: list[Tensor] = []
    with bridge.hooks([("hook_unembed", note)]):
        bridge.hf_model(TOKENS, attention_mask=mask, logits_to_keep=kept)
    assert torch.equal(seen[0], native)


def test_positions_of_each_row() -> None:
    bridge = make_bridge()
    kept = torch.tensor([[5, 0], [2, 3]])
    columns: list[Any] = []
    with bridge.hooks([("hook_unembed", lambda t, hook: columns.append((hook.run.columns, hook.run.tokens, t)))]):
        try:
            bridge.hf_model(TOKENS, logits_to_keep=kept)
        except (IndexError, RuntimeError):
            pytest.skip("this release takes no positions of each row")
    if columns[0][2].dim() != 3:
        pytest.skip("this release takes no positions of each row")
    assert torch.equal(columns[0][0], kept)
    assert torch.equal(columns[0][1], TOKENS.gather(1, kept))


def test_a_mask_of_rows_and_positions_is_refused() -> None:
    bridge = make_bridge()
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    with bridge.hooks([("hook_unembed", lambda t, hook: None)]), pytest.raises(InputError, match="logits_to_keep"):
        bridge.hf_model(TOKENS, logits_to_keep=mask)
    assert is_pristine(bridge.hf_model)


@WAYS
def test_a_forward_of_a_logits_processor_is_not_a_step(way: str) -> None:
    bridge = make_bridge()

    def beside(input_ids: Tensor, scores: Tensor) -> Tensor:
        bridge.hf_model(TOKENS[:1, :3])
        return scores

    seen = look(bridge, lambda: generate(bridge, way, TOKENS, logits_processor=[beside]))
    assert seen[::2] == by_hand(6, [0, 1])
    assert [(entry.step, entry.rows) for entry in seen[1::2]] == [(0, [0]), (1, [0]), (2, [0])]


@WAYS
def test_a_conversation_goes_on(way: str) -> None:
    """A cache that is given and extended: the prompt is what was not yet read, and a mask covers all."""
    from transformers import DynamicCache

    from pellucid.model_bridge.generalized_components.hf_arguments import cache_name

    bridge = make_bridge()
    cache = DynamicCache()
    name = cache_name(type(bridge.hf_model))
    bridge.hf_model(TOKENS[:, :4], **{name: cache})
    seen = look(bridge, lambda: generate(bridge, way, TOKENS, **{name: cache}))
    assert [entry[:2] for entry in seen] == [(0, [4, 5]), (1, [6]), (2, [7])]


@WAYS
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}])
def test_where_the_prompt_of_a_row_ends(way: str, options: dict[str, Any], side: str | None) -> None:
    """In every forward, though the mask of a prompt's first chunk ends before the prompt does."""
    bridge = make_bridge()
    mask = torch.ones_like(TOKENS)
    if side is not None:
        mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    lengths: list[list[int]] = []
    with bridge.hooks([("blocks.1.hook_resid_post", lambda t, hook: lengths.append(hook.run.prompt_lengths.tolist()))]):
        generate(bridge, way, TOKENS, attention_mask=mask, **options)
        bridge(TOKENS, attention_mask=mask)
    whole = mask.sum(1).tolist()
    assert lengths.pop() == whole
    assert lengths
    assert all(found == [length for length in whole for _ in range(options.get("num_beams", 1))] for found in lengths)


def test_outside_generate_there_is_no_step() -> None:
    bridge = make_bridge()
    steps: list[Any] = []
    with bridge.hooks([("hook_embed", lambda t, hook: steps.append((hook.run.step, hook.run.steps)))]):
        bridge(TOKENS)
        generate(bridge, "hf", TOKENS, max_new_tokens=1)
        bridge.hf_model(TOKENS)
    assert [step for step, _ in steps] == [None, 0, None]
    assert steps[0][1] is None
