"""The embedded model shows what the demo says it shows; bounds are loose, so that a remade model may differ a little."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.demo import MODEL_FOLDER, load_demo_bridge
from pellucid.demo.predictions import next_tokens
from pellucid.demo.prompts import LANGUAGES, PROMPTS
from pellucid.demo.story import (
    LENGTH,
    Head,
    Story,
    ablate_to_mean,
    find_most_important,
    halves,
    head_scores,
    hook_z,
    losses_by_target,
    repeated_tokens,
)
from pellucid.errors import NoEffectError
from tests.models import is_pristine


def test_the_model_is_small_and_float32(demo: TransformerBridge) -> None:
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size < 3_000_000
    assert demo.dtype is torch.float32
    assert load_demo_bridge(torch.bfloat16).dtype is torch.bfloat16


def test_it_completes_sentences_in_six_languages(story: Story) -> None:
    assert [completion.language for completion in story.completions] == list(PROMPTS) == list(LANGUAGES)
    for completion in story.completions:
        assert len(completion.text) >= 10
        assert "\ufffd" not in completion.text
        assert "</s>" not in completion.text
        probabilities = [token.probability for token in completion.next_tokens]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1
    assert any(completion.finished for completion in story.completions)


def test_nothing_predicts_the_first_half_and_induction_the_second(story: Story) -> None:
    assert story.losses.first_half > 7.2
    assert story.losses.second_half < 0.6


def test_induction_heads_are_found_and_ranked(story: Story) -> None:
    scores = [head.induction for head in story.induction_heads]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9
    assert sum(score > 0.8 for score in scores) >= 5
    assert {head.layer for head in story.induction_heads} == {1}
    for head in story.induction_heads:
        assert head.name == f"L{head.layer}H{head.head}"
        assert head.induction == story.induction[head.layer][head.head]


def test_scores_are_not_effects(story: Story) -> None:
    most = story.most_important
    assert most.head.effect == max(map(max, story.effect)) > 4
    assert most.head.layer < story.induction_heads[0].layer
    assert most.head.previous_token < 0.4
    assert most.rank_by_previous_token == 1 + len(most.higher_scored)
    assert all(head.effect < 0.5 for head in most.higher_scored)
    assert all(head.effect < 0.5 for head in story.induction_heads)
    assert story.effect_of_all_induction_heads > 4


def test_one_head_put_back_undoes_the_loss_of_its_layer(story: Story) -> None:
    restored = story.restored
    assert restored.head == story.most_important.head.name
    assert restored.clean == pytest.approx(story.losses.second_half, abs=1e-5)
    assert restored.without_layer - restored.clean > 4
    assert restored.with_head_put_back - restored.clean < 0.3
    assert restored.share > 0.95


def test_the_check_is_part_of_the_story(story: Story) -> None:
    assert story.check.checks == story.check.held > 100
    assert not story.check.failed


def test_the_model_is_left_as_it_was(demo: TransformerBridge, story: Story) -> None:
    assert is_pristine(demo.hf_model)


def test_scores_and_effects_by_hugging_face(demo: TransformerBridge, story: Story) -> None:
    """The same numbers from the bare model: its returned attentions, and a torch hook on dense for the ablation."""
    tokens = repeated_tokens(demo.cfg.d_vocab)
    with torch.no_grad():
        attentions = demo.hf_model(tokens, output_attentions=True).attentions
    for layer, pattern in enumerate(attentions):
        for head in range(demo.cfg.n_heads):
            stripe = [pattern[:, head, i, i - LENGTH + 1].mean() for i in range(LENGTH, 2 * LENGTH)]
            before = [pattern[:, head, i, i - 1].mean() for i in range(1, 2 * LENGTH)]
            assert float(torch.stack(stripe).mean()) == pytest.approx(story.induction[layer][head], abs=1e-6)
            assert float(torch.stack(before).mean()) == pytest.approx(story.previous_token[layer][head], abs=1e-6)

    lost = story.most_important.head
    part = slice(lost.head * demo.cfg.d_head, (lost.head + 1) * demo.cfg.d_head)

    def average(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        merged = inputs[0].clone()
        merged[..., part] = merged[..., part].mean(dim=(0, 1))
        return (merged,)

    dense = demo.hf_model.get_submodule(f"transformer.h.{lost.layer}.self_attention.dense")
    handle = dense.register_forward_pre_hook(average)
    try:
        with torch.no_grad():
            logits = demo.hf_model(tokens).logits
    finally:
        handle.remove()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    rise = float(losses[:, LENGTH - 1 :].mean()) - story.losses.second_half
    assert rise == pytest.approx(lost.effect, abs=1e-4)


def test_another_seed_tells_the_same_story(demo: TransformerBridge, story: Story) -> None:
    tokens = repeated_tokens(demo.cfg.d_vocab, seed=7)
    assert not torch.equal(tokens, repeated_tokens(demo.cfg.d_vocab))
    with torch.no_grad():
        induction, _ = head_scores(demo, tokens)
    best = {(layer, head) for layer, head in (induction > 0.8).nonzero().tolist()}
    assert best == {(head.layer, head.head) for head in story.induction_heads if head.induction > 0.8}


def test_random_tokens_are_ordinary_and_said_twice(demo: TransformerBridge) -> None:
    tokens = repeated_tokens(demo.cfg.d_vocab)
    assert torch.equal(tokens[:, :LENGTH], tokens[:, LENGTH:])
    assert tokens.min() >= 4
    assert torch.equal(tokens, repeated_tokens(demo.cfg.d_vocab))


def test_halves() -> None:
    losses = torch.tensor([[1.0, 1.0, 5.0, 5.0, 5.0]])  # targets 1, 2 | 3, 4, 5 of six tokens
    assert halves(losses).first_half == 1.0
    assert halves(losses).second_half == 5.0


def test_an_edit_that_does_nothing_is_refused(demo: TransformerBridge) -> None:
    tokens = repeated_tokens(demo.cfg.d_vocab, rows=1, length=4)
    with torch.no_grad(), pytest.raises(NoEffectError):
        losses_by_target(demo, tokens, [(hook_z(0), ablate_to_mean([]))])


def test_the_modest_head() -> None:
    heads = [
        Head(f"L0H{i}", 0, i, 0.0, previous, effect) for i, (previous, effect) in enumerate([(0.3, 0.1), (0.2, 9.0)])
    ]
    most = find_most_important(heads)
    assert most.head is heads[1]
    assert most.rank_by_previous_token == 2
    assert most.higher_scored == [heads[0]]


def test_predictions_sum_to_one_and_are_labelled(demo: TransformerBridge) -> None:
    logits = torch.zeros(demo.cfg.d_vocab, dtype=torch.bfloat16)
    logits[1] = 3.0
    found = next_tokens(demo.tokenizer, logits, 10_000)
    assert found[0].token == "⟦<s>⟧"
    assert len(found) == demo.cfg.d_vocab
    assert sum(token.probability for token in found) == pytest.approx(1, abs=1e-4)


def test_the_story_is_plain_json_and_arrays(story: Story) -> None:
    assert json.loads(json.dumps(asdict(story), allow_nan=False)) == asdict(story)
    tensors = story.tensors()
    assert tensors["induction"].shape == tensors["effect"].shape == (story.n_layers, story.n_heads)
    assert tensors["tokens"].dtype is torch.int64
    assert tensors["loss_by_target"].shape == (2 * LENGTH - 1,)
