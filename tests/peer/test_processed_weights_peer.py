"""TransformerLens 4.3.0's weight processing beside ours, in one process: the same numbers where it is right.

Where it is not, Hugging Face's unprocessed model says who is. Needs ``pip install transformer-lens==4.3.0``.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pellucid import TransformerBridge
from pellucid.errors import WeightError
from pellucid.weight_processing import STEPS
from tests.families import make_family
from tests.models import VOCAB, make_bloom, random_tokens

pytest.importorskip("transformer_lens")

EPS = torch.finfo(torch.float32).eps
D_MODEL = 48
ALONE = dict.fromkeys(STEPS, False)
RESIDUALS = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {f"t{index}": index for index in range(VOCAB)}
    named = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t3"}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), **named)
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture
def peer(tmp_path: Path, tokenizer: Any) -> Any:
    """Makes TransformerLens' bridge of a copy of a model."""
    from transformer_lens.model_bridge import TransformerBridge as PeerBridge

    logging.getLogger().setLevel(logging.ERROR)

    def make(model: Any) -> Any:
        model.config.save_pretrained(tmp_path)
        return PeerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model), tokenizer=tokenizer)

    return make


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    output = model(tokens)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.detach().double().log_softmax(-1)


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def both(peer: Any, model: Any, **flags: bool) -> tuple[TransformerBridge, Any]:
    ours, theirs = TransformerBridge(copy.deepcopy(model)), peer(model)
    ours.process_weights(**flags)
    # Not its process_weights(): after that alone its b_in and b_out still give the unprocessed numbers.
    theirs.enable_compatibility_mode(disable_warnings=True, **flags)
    return ours, theirs


@pytest.mark.parametrize("n_head", [1, 2, 6, 12])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {**ALONE, "fold_ln": True},
        {**ALONE, "center_unembed": True},
        {**ALONE, "center_writing_weights": True},
        {**ALONE, "fold_value_biases": True},
    ],
    ids=lambda flags: "+".join(step for step, wanted in flags.items() if wanted) or "default",
)
def test_the_same_weights(peer: Any, n_head: int, flags: dict[str, bool]) -> None:
    ours, theirs = both(peer, make_bloom(n_head=n_head), **flags)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_U"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.shape == b.shape
        # A product, a mean and a difference on either side, each rounded once.
        assert largest(a - b) <= 4 * EPS * largest(b), name
    for name in ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.shape == b.shape
        # A sum of d_model products of numbers below one, in another order, and two means.
        assert largest(a - b) <= D_MODEL * EPS, name


@pytest.mark.parametrize("n_head", [2, 6, 12])
def test_the_same_circuits_after_refactoring(peer: Any, n_head: int) -> None:
    ours, theirs = both(peer, make_bloom(n_head=n_head), refactor_factored_attn_matrices=True)
    for name in ("QK", "OV"):
        a, b = getattr(ours, name), getattr(theirs, name)
        # A float32 decomposition is right to a modest multiple of d_model eps times the largest singular value.
        bound = 4 * D_MODEL * EPS * float(a.S.detach().max())
        assert largest(a.AB - b.AB) < bound
        assert largest(a.S - b.S) < bound
    assert largest(ours.W_Q.norm(dim=2) - theirs.W_Q.norm(dim=2)) < 4 * D_MODEL * EPS * largest(ours.W_Q.norm(dim=2))
    assert largest(ours.b_O - theirs.b_O) < D_MODEL * EPS


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "gemma2"])
def test_the_same_weights_of_other_families(peer: Any, name: str) -> None:
    """As they are, to the bit; processed as each does it by default, which is the same steps in these families."""
    model = make_family(name)
    biased = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out") if name.startswith("gpt") else ()  # it has no zeros for none
    views = ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_U", "b_U", *biased)
    views += () if name.startswith("gpt") else ("W_gate",)
    ours, theirs = TransformerBridge(copy.deepcopy(model)), peer(model)
    for view in views:
        assert torch.equal(getattr(ours, view), getattr(theirs, view)), view
    ours, theirs = both(peer, model)
    for view in views:
        a, b = getattr(ours, view), getattr(theirs, view)
        assert largest(a - b) <= (4 * EPS * largest(b) if view[0] == "W" else D_MODEL * EPS), view
    assert ours.weights_state.is_processed


def test_a_planted_difference_is_seen(peer: Any) -> None:
    ours, theirs = both(peer, make_bloom())
    with torch.no_grad():
        ours.blocks[1].attn.W_K[2, 3, 4] += 1e-6
    assert largest(ours.W_K - theirs.W_K) > 4 * EPS * largest(theirs.W_K)


def test_where_the_norms_output_is_the_residual(peer: Any) -> None:
    model = make_bloom(apply_residual_connection_post_layernorm=True)
    tokens = random_tokens()
    before = log_probabilities(model, tokens)
    theirs = peer(model)
    theirs.enable_compatibility_mode(disable_warnings=True)
    assert largest(log_probabilities(theirs, tokens) - before) > 0.5  # folded all the same, and wrong
    ours = TransformerBridge(model)
    with pytest.raises(WeightError, match="apply_residual_connection_post_layernorm"):
        ours.process_weights()
    ours.process_weights(fold_ln=False)
    assert largest(log_probabilities(ours, tokens) - before) < 1e-5


def test_float64_stays_float64(peer: Any) -> None:
    model = make_bloom(torch.float64)
    tokens = random_tokens()
    before = log_probabilities(TransformerBridge(copy.deepcopy(model)), tokens)
    ours, theirs = both(peer, model)
    block = model.transformer.h[1]
    folded = (block.mlp.dense_h_to_4h.weight * block.post_attention_layernorm.weight).T
    exact = folded - folded.mean(0)
    assert theirs.W_in.dtype == ours.W_in.dtype == torch.float64
    assert largest(ours.W_in[1] - exact) < 1e-15
    assert largest(theirs.W_in[1] - exact) > 1e-9  # through float32 and back
    assert largest(log_probabilities(ours, tokens) - before) < 1e-12


def test_refactoring_without_folding_and_after_a_failed_call(peer: Any) -> None:
    model = make_bloom()
    tokens = random_tokens()
    before = log_probabilities(model, tokens)
    theirs = peer(model)
    with pytest.raises(IndexError):
        theirs.process_weights(**{**ALONE, "refactor_factored_attn_matrices": True})
    theirs.enable_compatibility_mode(disable_warnings=True)
    assert theirs.b_V.any()  # the failed call counts as done, and nothing ever is
    ours = TransformerBridge(copy.deepcopy(model))
    with pytest.raises(WeightError):
        ours.process_weights(keep_tied=True)
    ours.process_weights(**{**ALONE, "refactor_factored_attn_matrices": True})
    assert largest(log_probabilities(ours, tokens) - before) < 1e-5
    ours.enable_compatibility_mode(disable_warnings=True)
    assert not ours.b_V.any()
    assert largest(log_probabilities(ours, tokens) - before) < 1e-5


def test_the_residual_stream_is_centred_here_only(peer: Any) -> None:
    ours, theirs = both(peer, make_bloom())
    tokens = random_tokens()
    names = [f"blocks.{layer}.{name}" for layer in range(3) for name in RESIDUALS]
    _, cache = ours.run_with_cache(tokens, names_filter=names)
    _, other = theirs.run_with_cache(tokens, names_filter=lambda name: name in names)
    assert largest(theirs.W_E.mean(1)) < 1e-7  # what it centres, and the embedding norm undoes
    assert max(largest(other[name].mean(-1)) for name in names if name in other) > 0.02
    assert max(largest(cache[name].mean(-1)) for name in names) < 192 * EPS * largest(cache[names[-1]])


def test_as_many_tokens_as_features(peer: Any) -> None:
    model = make_bloom(vocab_size=D_MODEL)
    tokens = random_tokens() % D_MODEL
    before = log_probabilities(model, tokens)
    ours, theirs = both(peer, model, **{**ALONE, "center_unembed": True})
    assert largest(log_probabilities(theirs, tokens) - before) > 0.01  # centred over the wrong axis
    assert largest(log_probabilities(ours, tokens) - before) < 1e-5


def test_tying_again_after_processing(peer: Any) -> None:
    model = make_bloom()
    tokens = random_tokens()
    before = log_probabilities(model, tokens)
    ours, theirs = both(peer, model)
    theirs.original_model.tie_weights()
    ours.hf_model.tie_weights()
    assert largest(log_probabilities(theirs, tokens) - before) > 0.1
    assert largest(log_probabilities(ours, tokens) - before) < 1e-5
