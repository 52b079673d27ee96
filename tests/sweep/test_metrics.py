"""Metrics against torch's own formulas, and functions of lazily computed logits against the same functions of whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid import TransformerBridge
from pellucid.errors import InputError
from pellucid.sweep import (
    Edit,
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    NextTokenLoss,
    Normalized,
    Probability,
    ProbabilityDifference,
    Scale,
    Sweep,
    Zero,
)
from pellucid.sweep.lazy_logits import asked_cells
from tests.models import VOCAB, make_bloom, random_tokens
from tests.sweep.reference import whole_logits

CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge(make_bloom(torch.float64))


def some_edits() -> list[Edit]:
    return [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=p) for layer in range(3) for p in (0, 3, 6)]


OTHER = torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = random_tokens(2, 7)

METRICS: dict[str, tuple[Metric, Callable[[Tensor], Tensor]]] = {
    "difference": (LogitDifference(3, 5), lambda x: x[:, -1, 3] - x[:, -1, 5]),
    "difference, tokens by row": (
        LogitDifference([3, 4], torch.tensor([5, 6])),
        lambda x: torch.stack([x[0, -1, 3] - x[0, -1, 5], x[1, -1, 4] - x[1, -1, 6]]),
    ),
    "difference elsewhere": (LogitDifference(3, 5, position=2), lambda x: x[:, 2, 3] - x[:, 2, 5]),
    "log-probability": (LogProbability(4), lambda x: x[:, -1].log_softmax(-1)[:, 4]),
    "probability": (Probability([4, 8]), lambda x: x[:, -1].softmax(-1)[[0, 1], [4, 8]]),
    "probability of sets": (
        ProbabilityDifference([[4, 8, 9], [7]], [[1], [2, 3]]),
        lambda x: torch.stack(
            [
                x[0, -1].softmax(-1)[[4, 8, 9]].sum() - x[0, -1].softmax(-1)[1],
                x[1, -1].softmax(-1)[7] - x[1, -1].softmax(-1)[[2, 3]].sum(),
            ]
        ),
    ),
    "probability of one set": (
        ProbabilityDifference([4, 8], position=2),
        lambda x: x[:, 2].softmax(-1)[:, [4, 8]].sum(-1),
    ),
    "divergence": (
        KLDivergence(OTHER),
        lambda x: F.kl_div(
            x[:, -1].log_softmax(-1), OTHER[:, -1].log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1),
    ),
    "divergence of one position": (
        KLDivergence(OTHER[:, 3]),
        lambda x: F.kl_div(
            x[:, -1].log_softmax(-1), OTHER[:, 3].log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1),
    ),
    "loss": (
        NextTokenLoss(TOKENS),
        lambda x: torch.stack([F.cross_entropy(x[row, :-1], TOKENS[row, 1:]) for row in range(2)]),
    ),
    "normalised": (
        Normalized(LogitDifference(3, 5), torch.tensor([1.0, 2.0]), -1.0),
        lambda x: ((x[:, -1, 3] - x[:, -1, 5]) - torch.tensor([1.0, 2.0])) / torch.tensor([-2.0, -3.0]),
    ),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics(case: str, bridge: TransformerBridge) -> None:
    metric, formula = METRICS[case]
    result = Sweep(bridge, TOKENS, metric).run(some_edits())
    torch.testing.assert_close(result.base["metric"], formula(bridge(TOKENS)), **CLOSE)
    for edit, found in zip(some_edits(), result.values["metric"], strict=True):
        logits = whole_logits(bridge, TOKENS, edit)
        torch.testing.assert_close(found, formula(logits), **CLOSE)
        torch.testing.assert_close(metric(logits), formula(logits).mean(), **CLOSE)


def test_several_metrics_at_once(bridge: TransformerBridge) -> None:
    metrics = {name: metric for name, (metric, _) in METRICS.items()}
    together = Sweep(bridge, TOKENS, metrics).run(some_edits())
    for name, metric in metrics.items():
        alone = Sweep(bridge, TOKENS, metric).run(some_edits())
        torch.testing.assert_close(together.values[name], alone.values["metric"], **CLOSE)


def test_the_normalised_metric_is_0_and_1_at_its_ends(bridge: TransformerBridge) -> None:
    from pellucid.sweep import FromRun

    clean = random_tokens(2, 7, seed=9)
    _, cache = bridge.run_with_cache(clean)
    metric = LogitDifference(3, 5)
    zero, one = (Sweep(bridge, tokens, metric).run([]).base["metric"] for tokens in (TOKENS, clean))
    sweep = Sweep(bridge, TOKENS, Normalized(metric, zero, one))
    result = sweep.run([Edit("blocks.0.hook_resid_pre", FromRun(cache))])
    torch.testing.assert_close(result.base["metric"], torch.zeros(2, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(result.values["metric"][0], torch.ones(2, dtype=torch.float64), **CLOSE)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    # name: function, whether it asks for the last position only
    "two cells": (lambda x: x[0, -1, 3] - x[1, -1, 5], True),
    "last position": (lambda x: x[:, -1].log_softmax(-1)[:, 3].mean(), True),
    "last position, kept": (lambda x: x[:, -1, :].gather(-1, torch.tensor([[3], [5]])).mean(), True),
    "lists": (lambda x: x[[0, 1], -1, [3, 5]].sum(), True),
    "one of a list": (lambda x: x[:, -1, [3, 5]].diff().mean(), True),
    "ellipsis": (lambda x: x[..., -1, 3].sum(), True),
    "by rows": (lambda x: x[:, -1, 3], True),
    "a number": (lambda x: float(x[0, -1, 3]), True),
    "step by step": (lambda x: x[0][-1][3], False),
    "slices": (lambda x: x[:, 1:3, 2:9:2].sum(), False),
    "everything": (lambda x: x.log_softmax(-1)[0, -1, 3], False),
    "torch's function": (lambda x: torch.log_softmax(x, dim=-1)[1, 2, 3], False),
    "cast": (lambda x: x.float()[0, -1, 3], False),
    "boolean": (lambda x: x[torch.tensor([True, False])][0, -1, 3], False),
    "new axis": (lambda x: x[None][0, 0, -1, 3], False),
    "arithmetic": (lambda x: (x * 2 - x.mean())[0, -1, 3], False),
    "shape": (lambda x: x[0, x.shape[1] - 1, 3] * x.dim(), True),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_of_logits(case: str, bridge: TransformerBridge) -> None:
    function, last_only = FUNCTIONS[case]
    sweep = Sweep(bridge, TOKENS, function)
    result = sweep.run(some_edits())
    torch.testing.assert_close(
        result.base["metric"],
        torch.as_tensor(function(bridge(TOKENS))),
        rtol=0,
        atol=1e-6 if case in ("cast", "a number") else 1e-10,
    )
    for edit, found in zip(some_edits(), result.values["metric"], strict=True):
        expected = torch.as_tensor(function(whole_logits(bridge, TOKENS, edit)))
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if case in ("cast", "a number") else 1e-10)
    reads = sweep._prepare([]).scorers["metric"].reads
    assert (reads.columns.unique().tolist() == [6]) is last_only


def test_a_function_that_reads_elsewhere_for_an_edit_is_computed_whole(bridge: TransformerBridge) -> None:
    def metric(logits: Tensor) -> Tensor:
        best = int(logits[0, -1].argmax())
        return logits[0, best % 7, best]

    edits = some_edits()
    result = Sweep(bridge, TOKENS, metric).run(edits)
    places = set()
    for edit, found in zip(edits, result.values["metric"], strict=True):
        logits = whole_logits(bridge, TOKENS, edit)
        places.add(int(logits[0, -1].argmax()) % 7)
        torch.testing.assert_close(found, metric(logits), **CLOSE)
    assert len(places) > 1


def test_a_function_that_reads_another_token_for_an_edit_is_computed_whole(bridge: TransformerBridge) -> None:
    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7 if logits[0, -1, 3] > logits[0, -1, 5] else 9]

    edits = [Edit("ln_final.hook_out", Scale(factor)) for factor in (-1.0, 1.5)]
    result = Sweep(bridge, TOKENS, metric).run(edits)
    logits = [whole_logits(bridge, TOKENS, edit) for edit in edits]
    assert len({bool(x[0, -1, 3] > x[0, -1, 5]) for x in logits}) == 2
    torch.testing.assert_close(result.values["metric"], torch.stack([metric(x) for x in logits]), **CLOSE)


def _set_cell(x: Tensor) -> Tensor:
    x[0, -1, 3] = 0
    return x[0, -1, 3]


def _add_to_part(x: Tensor) -> Tensor:
    part = x[0, -1]
    part += 1
    return part.sum()


def _add_to_view(x: Tensor) -> Tensor:
    part = x[0, -1].view(-1)[3:]
    part.mul_(2)
    return part.sum()


def _out(x: Tensor) -> Tensor:
    part = x[0, -1]
    torch.add(part, 1, out=part)
    return part.sum()


@pytest.mark.parametrize("function", [_set_cell, _add_to_part, _add_to_view, _out])
def test_writing_to_logits_is_refused(function: Callable[[Tensor], Tensor], bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match="wrote to its logits"):
        Sweep(bridge, TOKENS, function).run(some_edits())


def test_logit_positions(bridge: TransformerBridge) -> None:
    edits = some_edits()
    free = Sweep(bridge, TOKENS, lambda x: x[0, -1, 3]).run(edits)
    told = Sweep(bridge, TOKENS, lambda x: x[0, -1, 3], logit_positions=[-1]).run(edits)
    assert torch.equal(free.values["metric"], told.values["metric"])
    with pytest.raises(InputError, match=r"reads the logits at position 2, which logit_positions=\[-1\] leaves out"):
        Sweep(bridge, TOKENS, lambda x: x[0, 2, 3], logit_positions=[-1]).run(edits)
    with pytest.raises(InputError, match="logit_positions are positions, -7 to 6"):
        Sweep(bridge, TOKENS, lambda x: x[0, 2, 3], logit_positions=[7]).run(edits)


def test_a_function_that_reads_padding_is_computed_whole(bridge: TransformerBridge) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    edits = [Edit("blocks.1.hook_resid_pre", Zero(), positions=4)]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, 1, 3]

    result = Sweep(bridge, TOKENS, metric, attention_mask=mask).run(edits)
    assert result.plan.n_whole == 1
    assert "padding" in str(result.plan)
    expected = metric(whole_logits(bridge, TOKENS, edits[0], mask))
    torch.testing.assert_close(result.values["metric"][0], expected, **CLOSE)
    assert not torch.equal(expected, result.base["metric"])  # a row of padding does see what comes later


REFUSED: dict[str, tuple[Any, str]] = {
    "reads nothing": (lambda x: torch.tensor(1.0), "does not read the logits"),
    "no number": (lambda x: "high", "must return a number or a tensor; it returned str"),
    "no metric": (3, "is a Metric or a function of logits; found int"),
    "none": ({}, "No metric was given"),
    "too many answers": (LogitDifference([1, 2, 3], 4), "answer has 3 token ids for 2 rows"),
    "no id": (LogitDifference(1.5, 4), "answer is a token id"),
    "position outside": (LogitDifference(1, 4, position=7), "reads position 7; the sequence has 7"),
    "nothing to recover": (Normalized(LogitDifference(1, 4), 1.0, 1.0), "must be finite and differ"),
    "another reference": (KLDivergence(OTHER[0]), "reference is logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, bridge: TransformerBridge) -> None:
    metric, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        Sweep(bridge, TOKENS, metric).run(some_edits())


def test_a_position_that_is_padding_is_refused(bridge: TransformerBridge) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, -2:] = 0
    with pytest.raises(InputError, match="padding in row 1"):
        Sweep(bridge, TOKENS, LogitDifference(1, 4, position=-1), attention_mask=mask).run(some_edits())


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (0, -1),
        (0, -1, 3),
        (slice(None), 2),
        (slice(None), slice(1, 4), [2, 3]),
        (..., 3),
        ([0, 1], [2, 3]),
        torch.tensor([1]),
    ],
)
def test_the_cells_an_index_touches(index: Any) -> None:
    logits = torch.zeros(2, 7, VOCAB, requires_grad=True)
    with torch.enable_grad():
        logits[index].sum().backward()
    assert logits.grad is not None
    touched = logits.grad.nonzero()
    asked = asked_cells(index, logits.shape)
    assert set(touched[:, 1].tolist()) <= asked.columns
    if asked.tokens is not None:
        assert set(touched[:, 2].tolist()) <= asked.tokens
