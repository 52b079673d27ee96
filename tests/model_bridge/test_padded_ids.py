"""Padding that comes as ids: what a mask does not say is never guessed without a word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge, patching
from pellucid.corpora import Corpus
from pellucid.errors import PellucidWarning
from pellucid.experiments.ablation import ablation
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.path_patching import path_patching
from pellucid.running_stats import CountPositive
from pellucid.scale.harvest import harvest
from pellucid.sweep import LogProbability, Sweep
from tests.models import VOCAB, make_generator, random_tokens

PAD = 3
TEXTS = ["Everyone has the right", "Everyone"]


def make_bridge() -> TransformerBridge:
    model = make_generator(pad_token_id=PAD)
    model.generation_config.pad_token_id = PAD
    return TransformerBridge(model)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_bridge()


def ids(side: str) -> tuple[Tensor, Tensor]:
    """Two rows, the second of them padded."""
    tokens = random_tokens(2, 6).masked_fill(random_tokens(2, 6) == PAD, 5)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    return tokens.masked_fill(mask == 0, PAD), mask


RUNS: dict[str, Callable[..., Any]] = {
    "forward": lambda b, t, **m: b(t, **m),
    "forward, loss": lambda b, t, **m: b(t, return_type="loss", **m),
    "forward, int32": lambda b, t, **m: b(t.int(), **m),
    "run_with_hooks": lambda b, t, **m: b.run_with_hooks(t, **m),
    "run_with_hooks, both": lambda b, t, **m: b.run_with_hooks(t, return_type="both", **m),
    "run_with_cache": lambda b, t, **m: b.run_with_cache(t, **m),
    "stop_at_layer": lambda b, t, **m: b(t, stop_at_layer=1, **m),
    "generate": lambda b, t, **m: b.generate(t, max_new_tokens=1, do_sample=False, verbose=False, **m),
    "sweep": lambda b, t, **m: Sweep(b, t, LogProbability(7), **m),
    "activation patching": lambda b, t, **m: activation_patching(
        b, t, t, LogProbability(7), normalize=False, layers=[0], **m
    ),
    "ablation": lambda b, t, **m: ablation(b, t, LogProbability(7), how="zero", layers=[0], **m),
    "path patching": lambda b, t, **m: path_patching(
        b, t, t, LogProbability(7), senders=["L0.mlp_out"], receivers=["final"], freeze_mlps=True, **m
    ),
    "TransformerLens' patching": lambda b, t, **m: patching.get_act_patch_resid_pre(
        b, t, kept(t), LogProbability(7), verbose=False, **m
    ),
}


def kept(tokens: Tensor) -> dict[str, Tensor]:
    """A clean run's activations."""
    return {f"blocks.{layer}.hook_resid_pre": torch.zeros(*tokens.shape, 48) for layer in range(3)}


WARNING = r"Row 1 of the token ids .* the padding token \(id 3\) and no attention_mask says what it is"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("run", RUNS)
def test_padded_ids_without_a_mask_are_warned_of(bridge: TransformerBridge, run: str, side: str) -> None:
    tokens, mask = ids(side)
    with pytest.warns(PellucidWarning, match=WARNING) as caught:
        RUNS[run](bridge, tokens)
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}  # the user's own line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RUNS[run](bridge, tokens, attention_mask=mask)
        RUNS[run](bridge, tokens, attention_mask=torch.ones_like(tokens))  # "it is a token"
        RUNS[run](bridge, tokens[:1])
        RUNS[run](bridge, tokens.masked_fill(tokens == PAD, 9))


def test_the_advised_line_gives_each_rows_own_numbers(demo: TransformerBridge) -> None:
    alone = [demo(text) for text in TEXTS]
    for side in ("left", "right"):
        tokens, mask = demo.to_tokens(TEXTS, padding_side=side, return_mask=True)
        logits = demo(tokens, attention_mask=mask)
        for row, expected in enumerate(alone):
            assert torch.allclose(logits[row][mask[row].bool()], expected[0], atol=2e-5 * float(expected.abs().max()))
        with pytest.warns(
            PellucidWarning, match=r"Row 1 .* return_mask=True\)` makes the mask; pass attention_mask=mask"
        ):
            guessed = demo(demo.to_tokens(TEXTS, padding_side=side), return_type="loss")
        assert abs(guessed - demo(TEXTS, return_type="loss", padding_side=side)) > 0.1


def test_a_mask_is_returned_when_asked_for(demo: TransformerBridge) -> None:
    tokens, mask = demo.to_tokens(TEXTS, return_mask=True)
    assert torch.equal(tokens, demo.to_tokens(TEXTS))
    assert mask.shape == tokens.shape
    assert mask.dtype == torch.int64
    assert mask.sum(-1).tolist() == [demo.to_tokens(text).shape[1] for text in TEXTS]
    tokens, mask = demo.to_tokens("Everyone", return_mask=True, move_to_device=False)
    assert torch.equal(mask, torch.ones_like(tokens))


def test_the_padding_token_is_the_tokenizers_or_the_configurations() -> None:
    class Tokenizer:
        pad_token_id = 9

    model = make_generator()
    tokens, _ = ids("right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerBridge(model)(tokens)  # no padding token is known
        TransformerBridge(model, Tokenizer())(tokens)
    with pytest.warns(PellucidWarning, match=r"Row 1 of the token ids ends with the padding token \(id 9\)"):
        TransformerBridge(model, Tokenizer())(tokens.masked_fill(tokens == PAD, 9))
    model.config.pad_token_id = PAD
    with pytest.warns(PellucidWarning, match=WARNING):
        TransformerBridge(model, Tokenizer())(tokens)


@pytest.mark.parametrize("tokens", [[[5, PAD, 6, 7]], [[PAD, 5, 6, 7]], [[4, 5, 6, 7], [5, PAD, 6, 7]]], ids=str)
def test_generate_says_what_hugging_face_takes_for_padding(bridge: TransformerBridge, tokens: list[list[int]]) -> None:
    given = torch.tensor(tokens)
    native = copy.deepcopy(bridge.hf_model)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    with pytest.warns(PellucidWarning, match=r"has the padding token \(id 3\).* Hugging Face's generate guesses"):
        ours = bridge.generate(given, verbose=False, **arguments)
    assert ours.tolist() == native.generate(given, **arguments).tolist()
    guessed = (given != PAD).long()
    assert ours.tolist() == bridge.generate(given, attention_mask=guessed, verbose=False, **arguments).tolist()
    ones = torch.ones_like(given)
    expected = native.generate(given, attention_mask=ones, **arguments)
    assert bridge.generate(given, attention_mask=ones, verbose=False, **arguments).tolist() == expected.tolist()


def test_generate_asks_of_the_generation_configurations_padding_token() -> None:
    model = make_generator()
    model.generation_config.pad_token_id = PAD
    bridge, given = TransformerBridge(model), torch.tensor([[5, PAD, 6, 7]])
    native = copy.deepcopy(model).generate(given, max_new_tokens=5, do_sample=False)
    with pytest.warns(PellucidWarning, match=r"Row 0 of the token ids has the padding token \(id 3\)"):
        ours = bridge.generate(given, max_new_tokens=5, do_sample=False, verbose=False)
    assert ours.tolist() == native.tolist()


def test_a_padding_token_written_in_a_text_is_a_token(demo: TransformerBridge) -> None:
    text = f"Everyone{demo.tokenizer.pad_token} has the right"
    tokens = demo.to_tokens(text)
    assert demo.tokenizer.pad_token_id in tokens
    expected = demo.hf_model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    ours = demo.generate(text, max_new_tokens=4, do_sample=False, verbose=False, return_type="tokens")
    assert ours.tolist() == expected.tolist()


def test_where_masks_are_known_nothing_is_said(bridge: TransformerBridge, tmp_path: Path) -> None:
    rows = torch.tensor([[PAD, 5, 6, 7], [5, 6, 7, PAD]])
    corpus = Corpus.from_tokens({"a": rows}, context=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PellucidWarning)
        bridge.collect(corpus, {"blocks.0.mlp.hook_post": [CountPositive()]}, progress=False)
        harvest(bridge, corpus, ["blocks.0.hook_resid_pre"], tmp_path / "store", progress=False)
        bridge.estimate_cache(rows)
        assert bridge.verify(rows, layers=[0]).ok


def test_looking_for_padding_leaves_one_compiled_graph() -> None:
    bridge = make_bridge()
    tokens, _ = ids("right")
    compiled = torch.compile(bridge, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens), bridge.hf_model(tokens).logits)


def counted(run: Callable[[], Any]) -> Iterator[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run()
    yield from (str(warning.message) for warning in caught if warning.category is PellucidWarning)


def test_one_call_warns_once(bridge: TransformerBridge) -> None:
    tokens, _ = ids("right")
    assert VOCAB > PAD
    for run in ("forward", "run_with_hooks", "run_with_cache", "generate", "activation patching", "ablation"):
        assert len(list(counted(lambda run=run: RUNS[run](bridge, tokens)))) == 1, run
