"""Under autocast, one's own or accelerate's: Hugging Face's bits, and a check that knows in which dtype the model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pellucid import TransformerBridge
from tests.models import make_bloom, random_tokens

TOKENS = random_tokens(2, 6)
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "slow but exact": {"slow_but_exact": True, "pretraining_tp": 2}}
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model = make_bloom(n_layer=1, **KINDS[kind])
    bridge = TransformerBridge(copy.deepcopy(model))
    with torch.autocast("cpu", dtype):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                native = model(TOKENS).logits
                logits, cache = bridge.run_with_cache(TOKENS)
                assert torch.equal(logits, native)
                for name in bridge.hook_dict:
                    looked = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda tensor, hook: None)])
                    assert torch.equal(looked, native), name
    added = cache["resid_mid", 0] + cache["mlp_out", 0]
    assert torch.equal(added, cache["resid_post", 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["autocast to bfloat16", "autocast to float16", "accelerate"])
def test_the_check_holds_in_the_dtype_that_computes(how: str, kind: str) -> None:
    model = make_bloom(n_layer=1, **KINDS[kind])
    if how == "accelerate":
        report = TransformerBridge(Accelerator(mixed_precision="bf16", cpu=True).prepare(model)).verify(progress=False)
    else:
        with torch.autocast("cpu", getattr(torch, how.rpartition(" ")[2])):
            report = TransformerBridge(model).verify(progress=False)
    assert [(line.name, line.measured, line.bound) for line in report.failed] == []
    # What is promised to the bit is asked for to the bit.
    assert {line.bound for line in report.results if line.aspect in ("looking", "returned = in place")} == {0.0}
    half = torch.float16 if how == "autocast to float16" else torch.bfloat16
    (rows,) = (line for line in report.results if line.name == "layer 0: pattern rows sum to 1")
    assert rows.bound == torch.finfo(half).eps * 12  # of 12 positions


@pytest.mark.filterwarnings("ignore:.*was replaced while:pellucid.errors.PellucidWarning")
@pytest.mark.parametrize("prepared", ["before hooking", "while hooked"])
def test_what_accelerate_unwraps_of_a_hooked_model_runs(prepared: str) -> None:
    """``unwrap_model`` goes from forward to forward and makes a method of the last: in a model without hooks, the class's."""
    model = make_bloom()
    native, accelerator = copy.deepcopy(model), Accelerator(mixed_precision="bf16", cpu=True)
    if prepared == "before hooking":
        accelerator.prepare(model)
    with TransformerBridge(model).hooks([("blocks.1.hook_resid_pre", lambda tensor, hook: None)]):
        if prepared == "while hooked":
            accelerator.prepare(model)
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert torch.equal(unwrapped(TOKENS).logits, native(TOKENS).logits)
    assert torch.equal(unwrapped(TOKENS).logits, native(TOKENS).logits)


def test_without_autocast_the_bounds_are_those_of_the_weights() -> None:
    report = TransformerBridge(make_bloom(n_layer=1)).verify(progress=False)
    (rows,) = (line for line in report.results if line.name == "layer 0: pattern rows sum to 1")
    assert rows.bound == torch.finfo(torch.float32).eps * 12
