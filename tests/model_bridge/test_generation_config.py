"""A checkpoint's own generation configuration does not choose the tokens of ``bridge.generate``; the call's arguments do.

The oracle is Hugging Face's ``generate`` of the same weights with a bare generation configuration. Each field is first seen
to change Hugging Face's tokens (or to end in an error), so that a field that leaked would be found.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from pellucid import TransformerBridge
from pellucid.errors import PellucidWarning
from pellucid.model_bridge.running.generation import KEPT, OURS, TOKENS_DO_NOT_DEPEND_ON
from tests.models import make_generator, random_tokens

TOKENS = random_tokens(3, 6)
GREEDY: dict[str, Any] = {"do_sample": False}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 4}
SAMPLED: dict[str, Any] = {"do_sample": True}
FIRST, FOURTH = 70, 12
"""Tokens that the model writes in row 0, after the prompt, greedily; the fourth ends a row here."""

LOUD: dict[str, tuple[Any, dict[str, Any]]] = {
    # Field: a value that is heard, and the call in which Hugging Face hears it.
    "bad_words_ids": ([[FIRST]], GREEDY),
    "begin_suppress_tokens": ([FIRST], GREEDY),
    "constraints": ([1], BEAMS),
    "do_sample": (True, GREEDY),
    "dola_layers": ("low", GREEDY),
    "encoder_no_repeat_ngram_size": (1, GREEDY),
    "encoder_repetition_penalty": (9.0, GREEDY),
    "epsilon_cutoff": (0.5, SAMPLED),
    "eta_cutoff": (0.5, SAMPLED),
    "exponential_decay_length_penalty": ((1, 9.0), GREEDY),
    "force_words_ids": ([[1]], BEAMS),
    "forced_eos_token_id": (1, GREEDY),
    "guidance_scale": (9.0, GREEDY),
    "is_assistant": (True, GREEDY),
    "length_penalty": (-9.0, BEAMS),
    "max_length": (7, GREEDY),
    "max_new_tokens": (2, GREEDY),
    "max_time": (1e-9, GREEDY),
    "min_length": (17, GREEDY),
    "min_new_tokens": (11, GREEDY),
    "min_p": (0.5, SAMPLED),
    "no_repeat_ngram_size": (1, GREEDY),
    "num_beam_groups": (2, BEAMS),
    "num_beams": (4, GREEDY),
    "penalty_alpha": (0.9, GREEDY),
    "prompt_lookup_num_tokens": (3, GREEDY),
    "repetition_penalty": (9.0, GREEDY),
    "return_dict_in_generate": (True, GREEDY),
    "sequence_bias": ([[[FIRST], -99.0]], GREEDY),
    "stop_strings": (["a"], GREEDY),
    "suppress_tokens": ([FIRST], GREEDY),
    "temperature": (3.0, SAMPLED),
    "token_healing": (True, GREEDY),
    "top_h": (0.1, SAMPLED),
    "top_k": (2, SAMPLED),
    "top_p": (0.2, SAMPLED),
    "typical_p": (0.2, SAMPLED),
    "watermarking_config": ({"greenlist_ratio": 0.1, "bias": 99.0}, GREEDY),
}
UNHEARD = {
    # Fields that are set back too; no call of one bridge makes Hugging Face choose other tokens by them alone.
    "assistant_confidence_threshold": "of an assistant model",
    "assistant_early_exit": "the draft is checked: same tokens",
    "assistant_ensemble_weight": "of an assistant model",
    "assistant_lookbehind": "of an assistant model",
    "continuous_batching_config": "deprecated, of another entry point",
    "diversity_penalty": "of grouped beams, which need num_beam_groups",
    "early_stopping": "of beams; the same tokens in this model",
    "forced_bos_token_id": "of prompts of one token",
    "max_matching_ngram_size": "of prompt look-up",
    "num_assistant_tokens": "of an assistant model",
    "num_assistant_tokens_schedule": "of an assistant model",
    "num_return_sequences": "only beside do_sample or num_beams; it has a test of its own",
    "remove_invalid_values": "of logits that are not finite",
    "renormalize_logits": "scores, not their order",
    "speculation_type": "of an assistant model",
    "target_lookbehind": "of an assistant model",
    "use_cache": "the same tokens without",
    "use_mtp": "of models with heads for several tokens",
}


@pytest.fixture(scope="module")
def model() -> Any:
    model = make_generator()
    model.generation_config.eos_token_id = FOURTH
    model.generation_config.pad_token_id = 3
    return model


def native(model: Any, how: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    everything = {"top_k": 0} if how["do_sample"] else {}  # Hugging Face cuts at 50 unless told
    tokens: Tensor = model.generate(TOKENS, max_new_tokens=12, **how, **everything)
    return tokens


def ours(bridge: TransformerBridge, how: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PellucidWarning)
        return bridge.generate(TOKENS, max_new_tokens=12, verbose=False, **how, **more)


def leaky(model: Any, field: str) -> Any:
    changed = copy.deepcopy(model)
    setattr(changed.generation_config, field, LOUD[field][0])
    return changed


def test_every_field_is_here() -> None:
    """A field that a new release adds is set back; here it is asked what hears it."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - KEPT - TOKENS_DO_NOT_DEPEND_ON - set(LOUD) - set(UNHEARD) == set()


@pytest.mark.parametrize("field", LOUD)
def test_the_arguments_choose_the_tokens(model: Any, field: str) -> None:
    if field not in vars(GenerationConfig()):
        pytest.skip("not a field in this release of transformers")
    how = LOUD[field][1]
    wanted = native(model, how)
    changed = leaky(model, field)
    try:
        # What a call hears that leaves the field open; where our argument names it, Hugging Face's is left out.
        torch.manual_seed(3)
        heard = changed.generate(TOKENS, **{name: value for name, value in how.items() if name != field})
    except (ValueError, TypeError):
        heard = None
    assert not (isinstance(heard, Tensor) and torch.equal(heard, wanted))
    found = ours(TransformerBridge(changed), how)
    assert isinstance(found, Tensor)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("field", LOUD)
def test_what_is_left_out_is_named(model: Any, field: str) -> None:
    if field not in vars(GenerationConfig()):
        pytest.skip("not a field in this release of transformers")
    value, how = LOUD[field]
    bridge = TransformerBridge(leaky(model, field))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bridge.generate(TOKENS, max_new_tokens=2, verbose=False, **how)
    said = [str(one.message) for one in caught if issubclass(one.category, PellucidWarning)]
    if field in OURS or field in TOKENS_DO_NOT_DEPEND_ON:
        assert not said
    else:
        assert len(said) == 1
        assert f"sets {field}={value!r}" in said[0]
        assert f"generate(..., {field}={value!r})" in said[0]
        assert next(one for one in caught if issubclass(one.category, PellucidWarning)).filename == __file__


def test_several_fields_at_once(model: Any) -> None:
    changed = copy.deepcopy(model)
    settings = {"do_sample": True, "num_return_sequences": 2, "top_p": 0.3, "no_repeat_ngram_size": 1, "min_p": 0.4}
    for field, value in settings.items():
        setattr(changed.generation_config, field, value)
    assert changed.generate(TOKENS, max_new_tokens=12).shape[0] == 6
    with pytest.warns(PellucidWarning, match=r"sets min_p=0\.4, no_repeat_ngram_size=1, num_return_sequences=2\. "):
        found = TransformerBridge(changed).generate(TOKENS, max_new_tokens=12, do_sample=False, verbose=False)
    assert torch.equal(found, native(model, GREEDY))


def test_a_field_that_is_passed_is_taken(model: Any) -> None:
    bridge = TransformerBridge(leaky(model, "no_repeat_ngram_size"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PellucidWarning)
        found = bridge.generate(TOKENS, max_new_tokens=12, do_sample=False, verbose=False, no_repeat_ngram_size=1)
        plain = bridge.generate(TOKENS, max_new_tokens=12, do_sample=False, verbose=False, no_repeat_ngram_size=0)
    assert torch.equal(found, native(model, GREEDY | {"no_repeat_ngram_size": 1}))
    assert torch.equal(plain, native(model, GREEDY))


def test_token_ids_of_the_checkpoint_are_taken(model: Any) -> None:
    found = ours(TransformerBridge(copy.deepcopy(model)), GREEDY)
    assert found[0, 9:].tolist() == [FOURTH] + [3] * (found.shape[1] - 10)
    several = copy.deepcopy(model)
    several.generation_config.eos_token_id = [FIRST, FOURTH]
    assert ours(TransformerBridge(several), GREEDY)[0, 6:].tolist() == [FIRST] + [3] * 11
    assert ours(TransformerBridge(model), GREEDY, eos_token_id=[FIRST, 5])[0, 6:].tolist() == [FIRST] + [3] * 11


def test_a_model_without_anything_set_is_not_warned_about(demo: TransformerBridge) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PellucidWarning)
        demo.generate("Everyone has", max_new_tokens=1, verbose=False)
