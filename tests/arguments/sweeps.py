"""Sweeps, and the analyses that are sweeps: patching, ablation, path patching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pellucid import sweep
from pellucid.analysis import ablation, labelled, patching, path_patching
from tests.arguments.bench import (
    BRIDGE, CACHE, IDS, MASK, METRIC, NAN, TEXT, THE_IDS, Bench, Call, Line, Of, bound, choice, made, not_run, number,
    whole,
)  # fmt: skip


def of_metric(metric: Callable[..., Any], /, **works: Any) -> Call:
    """A metric, made and given to a sweep."""
    return Call(
        metric, lambda bench: lambda **given: sweep.Sweep(bench.bridge, bench.ids, metric(**given)), lambda _: works
    )


def of_value(value: Callable[..., Any], /, **works: Any) -> Call:
    """The value of an edit, made and planned."""

    def plan(bench: Bench) -> Callable[..., Any]:
        swept = sweep.Sweep(bench.bridge, bench.ids, bench.metric)
        swept.run([sweep.Edit("blocks.1.hook_resid_pre", sweep.Zero())])  # so that nothing has to be run for the plan
        return lambda **given: swept.plan([sweep.Edit("blocks.1.hook_resid_pre", value(**given))])

    return Call(value, plan, lambda bench: {n: v.get(bench) if isinstance(v, Of) else v for n, v in works.items()})


def edited(hook: str) -> Call:
    """An edit of a point, planned."""

    def plan(bench: Bench) -> Callable[..., Any]:
        swept = sweep.Sweep(bench.bridge, bench.ids, bench.metric)
        return lambda **given: swept.plan([sweep.Edit(**given)])

    return Call(sweep.Edit, plan, lambda _: {"hook": hook, "value": sweep.Zero()})


def swept(bench: Bench) -> sweep.Sweep:
    """One that nothing was asked of yet."""
    return sweep.Sweep(bench.bridge, bench.ids, bench.metric)


EDITS = Of(lambda bench: [bench.edit])
PAIR: dict[str, Any] = {"bridge": BRIDGE, "clean": TEXT, "corrupted": THE_IDS, "metric": METRIC}
ABLATED: dict[str, Any] = {"bridge": BRIDGE, "input": THE_IDS, "metric": METRIC, "how": "zero"}
PATHS: dict[str, Any] = {
    "bridge": BRIDGE, "original": TEXT, "new": THE_IDS, "metric": METRIC, "senders": "embed", "receivers": "final",
    "freeze_mlps": True,
}  # fmt: skip

CALLS: dict[str, Call] = {
    "Sweep": made(sweep.Sweep, bridge=BRIDGE, input=THE_IDS, metric=METRIC),
    "Sweep.plan": bound(swept, sweep.Sweep.plan, edits=EDITS),
    "Sweep.run": bound(swept, sweep.Sweep.run, edits=EDITS),
    "Sweep.needed_names": bound(swept, sweep.Sweep.needed_names, edits=EDITS),
    "Edit of z": edited("blocks.1.attn.hook_z"),
    "Edit of pattern": edited("blocks.1.attn.hook_pattern"),
    "SetTo": of_value(sweep.SetTo, value=1.0),
    "Add": of_value(sweep.Add, direction=1.0),
    "Scale": of_value(sweep.Scale, factor=2.0),
    "Apply": of_value(sweep.Apply, function=torch.neg),
    "FromRun": of_value(sweep.FromRun, run=CACHE),
    "LogitDifference": of_metric(sweep.LogitDifference, answer=1, foil=2),
    "LogProbability": of_metric(sweep.LogProbability, answer=1),
    "Probability": of_metric(sweep.Probability, answer=1),
    "KLDivergence": of_metric(sweep.KLDivergence, reference=torch.zeros(1, 2048)),
    "NextTokenLoss": of_metric(sweep.NextTokenLoss),
    "Normalized": of_metric(sweep.Normalized, metric=sweep.LogProbability(1), zero=0.0, one=1.0),
    "activation_patching": not_run(made(patching.activation_patching, **PAIR)),
    "prepare_activation_patching": not_run(made(patching.prepare_activation_patching, **PAIR)),
    "ablation": not_run(made(ablation.ablation, **ABLATED)),
    "prepare_ablation": not_run(made(ablation.prepare_ablation, **ABLATED)),
    "path_patching": not_run(made(path_patching.path_patching, **PATHS)),
    "prepare_path_patching": not_run(made(path_patching.prepare_path_patching, **PATHS)),
    "by_head": not_run(made(path_patching.by_head, result=Of(lambda bench: bench.array))),
    "to_document": made(labelled.to_document, result=Of(lambda bench: bench.array)),
    "from_document": not_run(made(labelled.from_document, document={})),
}

REFUSED: list[Line] = []
