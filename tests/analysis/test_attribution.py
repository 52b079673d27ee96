"""Direct logit attribution as a labelled result, on every family: against the logits, and against its experiment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pellucid import TransformerBridge
from pellucid.analysis.attribution import logit_attribution
from pellucid.errors import InputError
from pellucid.experiments.labelled import from_document, to_document
from tests.families import CONFIGS, in_float64, make_family, of_each_layout, of_the_turn
from tests.models import make_bloom, random_tokens

BY = ("component", "head", "neuron", "source")
FAMILIES = ("bloom", *of_the_turn(in_float64(CONFIGS)))


def opened(family: str) -> TransformerBridge:
    return TransformerBridge(make_bloom(torch.float64) if family == "bloom" else make_family(family, torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experiment_agrees(family: str) -> None:
    """B4: the direct path taken away, the final norm's scale frozen: what was attributed, to rounding."""
    bridge = opened(family)
    exact = bridge.adapter.family.norm.kind == "layer"
    for by in BY if family in (*of_each_layout(), "bloom", "mpt") else BY[1:2]:  # MPT clips what sources are read at
        if by == "neuron" and bridge.cfg.num_experts:
            with pytest.raises(InputError, match="this model has no such point"):
                logit_attribution(bridge, random_tokens(), 5, 7, by=by)
            continue
        found = logit_attribution(bridge, random_tokens(), 5, 7, by=by, check=1)  # type: ignore[arg-type]
        assert len(found.attrs["checked"]) == 1
        size = max(1.0, max(map(abs, found.attrs["attributed"])))
        assert found.attrs["disagreement"] <= (1e-14 if exact else 1e-6) * size, by


@pytest.mark.parametrize("by", BY)
def test_attributions_add_up(by: Any) -> None:
    bridge, tokens = opened("gemma2"), random_tokens()
    with torch.no_grad():
        head = bridge.run_with_cache(tokens)[1]["hook_unembed"]
    wanted = (head[..., 5] - head[..., 7]).numpy()
    each = logit_attribution(bridge, tokens, 5, 7, by=by, rows="each", positions="all", top_k=10**6)
    parts = [str(dim) for dim in each.dims if dim not in ("row", "pos")]
    np.testing.assert_allclose(each.sum(parts) + each.constant + each.remainder, wanted, atol=1e-6)
    np.testing.assert_allclose(each.logit, wanted, atol=1e-12)
    if by == "component":
        np.testing.assert_allclose(each.remainder, 0, atol=1e-6)
    last = logit_attribution(bridge, tokens, 5, 7, by=by, top_k=10**6)
    np.testing.assert_allclose(last.sum(), each.isel(pos=-1).mean("row").sum(), atol=1e-10)


def test_sources_add_up_to_heads() -> None:
    bridge, tokens = opened("llama"), random_tokens()
    for positions in ("last", "all"):
        heads = logit_attribution(bridge, tokens, 5, by="head", positions=positions)  # type: ignore[arg-type]
        sources = logit_attribution(bridge, tokens, 5, by="source", positions=positions)  # type: ignore[arg-type]
        xr.testing.assert_allclose(sources.sum("source").reset_coords(drop=True), heads.reset_coords(drop=True))


def test_the_largest_neurons_come_first() -> None:
    bridge = opened("gpt2")
    every = logit_attribution(bridge, random_tokens(), 5, by="neuron", top_k=10**6)
    top = logit_attribution(bridge, random_tokens(), 5, by="neuron", top_k=3)
    sizes = np.abs(top.values)
    assert list(sizes) == sorted(sizes, reverse=True) == sorted(np.abs(every.values), reverse=True)[:3]
    first = top[0]
    assert first.neuron.item() == f"L{first.layer.item()}N{first['index'].item()}"


def test_padded_rows_are_read_at_their_own_last_token() -> None:
    bridge, tokens = opened("llama"), random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    both = logit_attribution(bridge, tokens, [5, 6], attention_mask=mask, rows="each")
    short = logit_attribution(bridge, tokens[:1, :6], 5)
    np.testing.assert_allclose(both.isel(row=0), short, atol=1e-9)
    np.testing.assert_allclose(both.isel(row=1), logit_attribution(bridge, tokens[1:], 6), atol=1e-9)
    every = logit_attribution(bridge, tokens, 5, attention_mask=mask, rows="each", positions="all")
    assert bool(np.isnan(every.isel(row=0, pos=7)).all())
    assert not np.isnan(logit_attribution(bridge, tokens, 5, attention_mask=mask, positions="all")).any()


def test_a_result_says_what_made_it(demo: TransformerBridge) -> None:
    prompt = "Everyone has the right"
    found = logit_attribution(demo, prompt, " to", " of", positions="all", check=1)
    assert found.dims == ("component", "pos")
    assert found.attrs["analysis"] == "direct logit attribution"
    assert found.attrs["units"] == "logits"
    assert (found.attrs["answer"], found.attrs["foil"]) == (["·to"], ["·of"])
    assert found.name == "logit difference attribution"
    xr.testing.assert_identical(from_document(to_document(found)), found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"answer": [1, 2, 3]}, "answer has 3 tokens for 2 rows"),
        ({"foil": 5}, "answer and foil are the same token"),
        ({"answer": 97}, "answer must be at most 96"),
        ({"by": "layer"}, "Invalid by: 'layer'"),
    ],
)
def test_bad_input(given: dict[str, Any], words: str) -> None:
    bridge = TransformerBridge(make_bloom())
    with pytest.raises(InputError, match=words):
        logit_attribution(bridge, random_tokens(), **({"answer": 5} | given))


def test_a_stream_that_is_no_sum_is_refused() -> None:
    bridge = TransformerBridge(make_bloom(apply_residual_connection_post_layernorm=True))
    with pytest.raises(InputError, match="apply_residual_connection_post_layernorm"):
        logit_attribution(bridge, random_tokens(), 5)
