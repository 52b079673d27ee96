"""A family's fused attention is Hugging Face's own: its bits while no pattern is looked at, eager's where it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.errors import UnsupportedModelError
from tests.families import CONFIGS, make_family, mask_of, of_each_layout
from tests.models import random_tokens
from tests.tiny_tokenizers import byte_level

WITHOUT = ("gemma2", "gpt2-upcast", "gptj", "mpt")
EAGER_ONLY = ("falcon", "falcon-new", "falcon-one-norm", "falcon-sequential")
"""Families whose scores and pattern can be looked at where the model runs eager, and no others."""

WITH = [name for name in CONFIGS if name not in (*WITHOUT, *EAGER_ONLY)]
PATTERN = ("hook_attn_scores", "hook_pattern")


def native(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    given = {}
    if mask is not None:
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0) * mask}
    return model(tokens, use_cache=False, **given).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", of_each_layout(WITH))
def test_a_live_model_that_runs_sdpa_stays_hugging_faces(name: str, side: str | None) -> None:
    model, eager = make_family(name, attention="sdpa"), make_family(name)
    bridge = TransformerBridge.boot_transformers(hf_model=model)
    assert bridge.attn_implementation == model.config._attn_implementation == "sdpa"
    tokens = random_tokens()
    mask = mask_of(tokens, side)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        theirs, exact = native(copy.deepcopy(model), tokens, mask), native(eager, tokens, mask)
        assert torch.equal(bridge(tokens, attention_mask=mask), theirs)
        rest = [point for point in bridge.hook_dict if not point.endswith(PATTERN)]
        logits, _ = bridge.run_with_cache(tokens, names_filter=rest, attention_mask=mask)
        assert torch.equal(logits, theirs)
        logits, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(logits[real], exact[real])
        _, same = TransformerBridge(eager).run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(cache["pattern", 1][:, :, -4], same["pattern", 1][:, :, -4]) or side == "right"
        logits, _ = bridge.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_pattern"], attention_mask=mask)
        # One layer of three is eager; either route is within a few roundings a layer of the other.
        bound = 64 * 3 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        torch.testing.assert_close(logits[real], theirs[real], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_the_bridge_hands_its_choice_to_the_model(name: str, tmp_path: Path) -> None:
    bridge = TransformerBridge(make_family(name), byte_level())
    assert bridge.attn_implementation == "eager"
    tokens, model = random_tokens(), bridge.hf_model
    bridge.set_attn_implementation("sdpa")
    assert bridge.attn_implementation == model.config._attn_implementation == "sdpa"
    assert torch.equal(bridge(tokens), native(make_family(name, attention="sdpa"), tokens))
    assert "eager" in bridge.explain("blocks.0.attn.hook_pattern")
    assert "eager" not in bridge.explain("blocks.0.attn.hook_z")
    bridge.set_attn_implementation("eager")
    assert "eager" not in bridge.explain("blocks.0.attn.hook_pattern")
    assert torch.equal(bridge(tokens), native(make_family(name), tokens))
    bridge.save_pretrained(tmp_path)
    assert TransformerBridge.boot_transformers(tmp_path).attn_implementation == "eager"
    fast = TransformerBridge.boot_transformers(tmp_path, attn_implementation="sdpa")
    assert fast.attn_implementation == "sdpa"
    assert torch.equal(fast(tokens), native(make_family(name, attention="sdpa"), tokens))


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_what_shows_scores_under_eager_alone(name: str) -> None:
    """Bits of sdpa with everything else looked at; scores, pattern and verify(), which needs eager, are refused by name."""
    model, tokens = make_family(name, attention="sdpa"), random_tokens()
    bridge = TransformerBridge.boot_transformers(hf_model=model)
    with torch.no_grad():
        theirs = native(copy.deepcopy(model), tokens)
    rest = [point for point in bridge.hook_dict if not point.endswith(PATTERN)]
    assert torch.equal(bridge.run_with_cache(tokens, names_filter=rest)[0], theirs)
    for site in PATTERN:
        with pytest.raises(
            UnsupportedModelError, match=r"it is 'sdpa'. Call bridge.set_attn_implementation\('eager'\)"
        ):
            bridge.run_with_cache(tokens, names_filter=f"blocks.1.attn.{site}")
    for act in (bridge.verify, lambda: bridge.set_attn_implementation("eager")):
        with pytest.raises(
            UnsupportedModelError, match="cannot switch the attention of a loaded Falcon: it stays 'sdpa'"
        ):
            act()
    assert bridge.attn_implementation == "sdpa"


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_sdpa_is_refused_by_name(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    with pytest.raises(UnsupportedModelError, match=r"(Gemma 2|GPT-2|GPT-J|MPT) .*no sdpa"):
        bridge.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="no sdpa"):
        TransformerBridge.boot_transformers(hf_model=bridge.hf_model, attn_implementation="sdpa")
    bridge.set_attn_implementation("eager")
    assert bridge.attn_implementation == bridge.hf_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_verify_checks_a_fused_attention_by_its_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = TransformerBridge(make_family(name, attention="sdpa"))
    report = bridge.verify(layers=[1])
    assert report.ok
    assert bridge.attn_implementation == "sdpa"
    lines = [line for line in report.results if line.name.startswith("sdpa: ")]
    assert len(lines) == 3
    assert {line.bound for line in lines} == {0}
    assert not any(
        line.name.startswith("sdpa") for line in TransformerBridge(make_family(name)).verify(layers=[]).results
    )

    from pellucid.model_bridge.generalized_components.hf_attention import HuggingFaceAttentionBridge as Attention

    right = Attention._mask_for_eager
    monkeypatch.setattr(Attention, "_mask_for_eager", lambda *given: right(*given) * 0)
    failed = bridge.verify(layers=[]).failed
    assert [line.name for line in failed] == ["sdpa: every pattern cached is Hugging Face's eager"]


def test_generation_and_a_cache_run_the_models_own() -> None:
    bridge = TransformerBridge(make_family("llama", attention="sdpa"))
    tokens, model = random_tokens(), make_family("llama", attention="sdpa")
    theirs = model.generate(tokens, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens))
    ours = bridge.generate(tokens, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert torch.equal(ours, theirs)
