"""Sweeps, and the analyses that are sweeps: patching, ablation, path patching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xarray as xr

from pellucid import sweep
from pellucid.analysis import ablation, attribution, labelled, patching, path_patching
from pellucid.experiments import experiment
from pellucid.experiments.ablation import Ablation
from tests.arguments.bench import (
    BRIDGE,
    CACHE,
    IDS,
    MASK,
    METRIC,
    NAN,
    TEXT,
    THE_IDS,
    Bench,
    Call,
    Line,
    Of,
    bound,
    choice,
    made,
    not_run,
    whole,
)

DATA_SET = xr.Dataset({"a": ("pos", [1.0, 2.0])}, attrs={"analysis": "x"})


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


def prepared(bench: Bench) -> experiment.Experiment:
    """One that nothing was asked of yet."""
    return Ablation(bench.bridge, bench.ids, bench.metric, how="zero")


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
    "logit_attribution": made(attribution.logit_attribution, bridge=BRIDGE, prompt=THE_IDS, answer=5),
    "LogitDifference": of_metric(sweep.LogitDifference, answer=1, foil=2),
    "LogProbability": of_metric(sweep.LogProbability, answer=1),
    "Probability": of_metric(sweep.Probability, answer=1),
    "ProbabilityDifference": of_metric(sweep.ProbabilityDifference, answer=[1, 2]),
    "KLDivergence": of_metric(sweep.KLDivergence, reference=torch.zeros(1, 2048)),
    "NextTokenLoss": of_metric(sweep.NextTokenLoss),
    "Normalized": of_metric(sweep.Normalized, metric=sweep.LogProbability(1), zero=0.0, one=1.0),
    "activation_patching": not_run(made(patching.activation_patching, **PAIR)),
    "ablation": not_run(made(ablation.ablation, **ABLATED)),
    "Experiment.run": bound(prepared, experiment.Experiment.run),
    "Experiment.labelled": bound(prepared, experiment.Experiment.labelled),
    "path_patching": not_run(made(path_patching.path_patching, **PATHS)),
    "by_head": not_run(made(path_patching.by_head, result=Of(lambda bench: bench.array))),
    "data_set_to_document": made(labelled.data_set_to_document, result=DATA_SET),
    "data_set_from_document": made(labelled.data_set_from_document, document=labelled.data_set_to_document(DATA_SET)),
    "to_document": made(labelled.to_document, result=Of(lambda bench: bench.array)),
    "from_document": not_run(made(labelled.from_document, document={})),
}

REFUSED: list[Line] = [
    ("logit_attribution", {"prompt": 7}, "Input is .*found int"),
    ("logit_attribution", {"answer": 4000}, "answer must be at most 2047"),
    ("logit_attribution", {"answer": [5, 6]}, "answer has 2 tokens for 1 rows"),
    ("logit_attribution", {"foil": -1}, "foil must be at least 0"),
    ("logit_attribution", {"foil": 5}, "answer and foil are the same token"),
    ("logit_attribution", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("logit_attribution", {"prepend_bos": True}, "prepend_bos is for strings"),
    *choice("logit_attribution", "by"),
    *choice("logit_attribution", "positions"),
    *choice("logit_attribution", "rows"),
    *whole("logit_attribution", "top_k", 1),
    *whole("logit_attribution", "check", 0),
    ("Sweep", {"input": ""}, "has no tokens"),
    ("Sweep", {"metric": 3}, "is a Metric or a function of logits"),
    ("Sweep", {"metric": {}}, "No metric was given"),
    ("Sweep", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("Sweep", {"base_cache": torch.zeros(2)}, "base_cache is a cache"),
    ("Sweep", {"logit_positions": [-1]}, "logit_positions would have no effect"),
    ("Sweep", {"logit_positions": [99], "metric": torch.sum}, "logit_positions are positions"),
    ("Sweep", {"logit_positions": 2, "metric": torch.sum}, "logit_positions is a list"),
    ("Sweep", {"reserved": -1}, "reserved must be at least 0"),
    ("Sweep", {"rows_at_once": 0}, "rows_at_once must be at least 1"),
    ("Sweep", {"rows_at_once": 1.5}, "rows_at_once is a whole number"),
    ("Sweep", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("Sweep", {"padding_side": "left"}, "padding_side='left' is for strings"),
    ("Sweep.plan", {"edits": [3]}, "edits has int"),
    ("Sweep.plan", {"edits": [[3]]}, "edits has int"),
    ("Sweep.run", {"edits": [3]}, "edits has int"),
    ("Sweep.run", {"on_interrupt": "stop"}, "Invalid on_interrupt: 'stop'"),
    ("Edit of z", {"hook": "nonsense"}, "No hook point"),
    ("Edit of z", {"value": 0.0}, "value of the edit .* is one of Zero, SetTo"),
    ("Edit of z", {"positions": 8}, "positions.*there are 8, 0 to 7; found 8"),
    ("Edit of z", {"positions": 1.5}, "positions.* are one index, a slice or several"),
    ("Edit of z", {"positions": []}, "positions.*chooses none"),
    ("Edit of z", {"heads": 8}, "heads.*there are 8"),
    ("Edit of z", {"neurons": 16}, "neurons.*there are 16"),
    ("Edit of z", {"keys": 0}, "keys= has no meaning"),
    ("Edit of z", {"rows": 1}, "rows.*there are 1"),
    ("Edit of pattern", {"neurons": 0}, "neurons= has no meaning"),
    ("Edit of pattern", {"keys": 8}, "keys.*there are 8"),
    ("SetTo", {"value": NAN}, "the value is NaN"),
    ("SetTo", {"value": torch.zeros(3)}, "does not broadcast"),
    ("Add", {"direction": NAN}, "the value is NaN"),
    ("Add", {"direction": torch.zeros(3)}, "does not broadcast"),
    ("Scale", {"factor": NAN}, "factor must be finite"),
    ("Scale", {"factor": torch.ones(2)}, "factor is a number"),
    ("Apply", {"function": 3}, "Apply: function is a function; found int"),
    ("FromRun", {"run": torch.zeros(2)}, "FromRun: run is a cache"),
    ("FromRun", {"run": {}}, "did not keep blocks.1.hook_resid_pre"),
    ("FromRun", {"rows": 0}, "FromRun: rows is a list"),
    ("FromRun", {"rows": []}, "rows names 0 rows"),
    ("FromRun", {"rows": [5]}, "the other run has 1 rows; row 5"),
    ("FromRun", {"positions": 0}, "positions is a list"),
    ("FromRun", {"positions": [0]}, "8 positions are edited and 1 are to be taken"),
    ("LogitDifference", {"answer": 99999}, "answer: token id 99999 is outside the vocabulary, 0 to 2047"),
    ("LogitDifference", {"answer": -3}, "answer: token id -3 is outside"),
    ("LogitDifference", {"foil": [99999]}, "foil: token id 99999"),
    ("LogitDifference", {"foil": object()}, "foil is a token id"),
    ("LogitDifference", {"position": 8}, "the sequence has 8"),
    ("LogitDifference", {"position": 1.5}, "position is a whole number"),
    ("LogProbability", {"answer": -1}, "answer: token id -1"),
    ("LogProbability", {"answer": [1, 2]}, "2 token ids for 1 rows"),
    ("LogProbability", {"position": 8}, "the sequence has 8"),
    ("Probability", {"answer": 2048}, "answer: token id 2048"),
    ("Probability", {"position": -9}, "the sequence has 8"),
    ("ProbabilityDifference", {"answer": [1, 2048]}, "answer: token id 2048"),
    ("ProbabilityDifference", {"answer": []}, "answer is a set of token ids"),
    ("ProbabilityDifference", {"answer": [[1], []]}, "answer is a set of token ids"),
    ("ProbabilityDifference", {"answer": [[1], 2]}, "answer is a set of token ids"),
    ("ProbabilityDifference", {"answer": "1"}, "answer is a set of token ids"),
    ("ProbabilityDifference", {"answer": [1.5]}, "answer is a set of token ids"),
    ("ProbabilityDifference", {"answer": [1, 1]}, "answer has a token twice"),
    ("ProbabilityDifference", {"answer": [[1], [2], [3]]}, "answer has 3 sets of token ids for 1 rows"),
    ("ProbabilityDifference", {"foil": [-1]}, "foil: token id -1"),
    ("ProbabilityDifference", {"foil": True}, "foil is a set of token ids"),
    ("ProbabilityDifference", {"foil": [2, 3]}, "token id 2 is in answer and in foil of row 0"),
    ("ProbabilityDifference", {"position": -9}, "the sequence has 8"),
    ("KLDivergence", {"reference": torch.zeros(1, 8)}, r"must have shape \(1, 2048\)"),
    ("KLDivergence", {"reference": torch.zeros(1, 3, 2048)}, r"must have shape \(1, 8, 2048\)"),
    ("KLDivergence", {"reference": [0.0]}, "a tensor of logits"),
    ("KLDivergence", {"position": 8}, "the sequence has 8"),
    ("NextTokenLoss", {"attention_mask": MASK}, "would have no effect without tokens"),
    ("NextTokenLoss", {"tokens": IDS}, "tokens must have shape"),
    ("NextTokenLoss", {"tokens": torch.zeros(1, 8)}, "tokens are integers"),
    ("Normalized", {"metric": torch.sum}, "metric is one of pellucid.sweep's"),
    ("Normalized", {"metric": sweep.LogProbability(-1)}, "answer: token id -1 is outside"),
    ("Normalized", {"zero": 1.0}, "must be finite and differ"),
    ("Normalized", {"zero": torch.zeros(3)}, "a number, or one a row"),
    ("Normalized", {"one": NAN}, "must be finite and differ"),
    ("activation_patching", {"clean": ""}, "has no tokens"),
    ("activation_patching", {"corrupted": IDS}, "different numbers of tokens"),
    ("activation_patching", {"metric": sweep.LogProbability(-1)}, "answer: token id -1 is outside"),
    ("activation_patching", {"site": "nonsense"}, ".nonsense.*Nearest"),
    ("activation_patching", {"by": "nonsense"}, "by=.*.nonsense. is none of them"),
    ("activation_patching", {"direction": "up"}, "Invalid direction: 'up'"),
    ("activation_patching", {"rows": "some"}, "Invalid rows: 'some'"),
    ("activation_patching", {"layers": 9}, "layers.*there are 4"),
    ("activation_patching", {"positions": 8}, "positions.*there are 8"),
    ("activation_patching", {"heads": 0}, "heads= |heads.*(no heads|meaning)|has no heads"),
    ("activation_patching", {"neurons": 0}, "neurons.*(goes with|must|no)"),
    ("activation_patching", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("activation_patching", {"prepend_bos": True}, "prepend_bos|different numbers of tokens"),
    ("activation_patching", {"padding_side": "left"}, "padding_side='left' is for strings"),
    ("activation_patching", {"logit_positions": [-1]}, "logit_positions would have no effect"),
    ("activation_patching", {"rows_at_once": 0}, "rows_at_once must be at least 1"),
    ("activation_patching", {"on_interrupt": "stop"}, "Invalid on_interrupt: 'stop'"),
    ("ablation", {"input": ""}, "has no tokens"),
    ("ablation", {"metric": sweep.LogProbability(-1)}, "answer: token id -1 is outside"),
    ("ablation", {"site": "nonsense"}, ".nonsense.*Nearest"),
    ("ablation", {"by": "nonsense"}, "by=.*.nonsense. is none of them"),
    ("ablation", {"how": "nonsense"}, "Invalid how: 'nonsense'"),
    ("ablation", {"data": IDS}, "uses no data: leave data out"),
    ("ablation", {"data_mask": MASK}, "data_mask"),
    ("ablation", {"permutation": [0]}, "permutation goes with how='resample'"),
    (
        "ablation",
        {"how": "resample", "data": TEXT, "permutation": [0.5]},
        "an entry of permutation is a whole number; found 0.5",
    ),
    ("ablation", {"how": "resample", "data": TEXT, "seed": 1.5}, "seed is a whole number"),
    ("ablation", {"rows": "some"}, "Invalid rows: 'some'"),
    ("ablation", {"layers": 9}, "layers.*there are 4"),
    ("ablation", {"positions": 8}, "positions.*there are 8"),
    ("ablation", {"heads": 8}, "heads.*there are 8"),
    ("ablation", {"neurons": 0}, "neurons.*(goes with|must|no)"),
    ("ablation", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("ablation", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("ablation", {"padding_side": "left"}, "padding_side='left' is for strings"),
    ("ablation", {"logit_positions": [-1]}, "logit_positions would have no effect"),
    ("ablation", {"rows_at_once": 0}, "rows_at_once must be at least 1"),
    ("Experiment.run", {"on_interrupt": "stop"}, "Invalid on_interrupt: 'stop'"),
    ("ablation", {"on_interrupt": "stop"}, "Invalid on_interrupt: 'stop'"),
    *(
        (name, {"edits": wrong}, words)
        for name in ("Sweep.plan", "Sweep.run", "Sweep.needed_names")
        for wrong, words in ((3, "edits is a list of Edits"), ("x", "edits is a list of Edits"), ([3], "edits has int"))
    ),
    *whole("Sweep", "memory_limit", 1),
    *whole("Sweep", "rows_at_once", 1),
    *whole("Sweep", "reserved", 0),
    ("Edit of z", {"hook": 3}, "name of a hook point is a string; found 3"),
    ("SetTo", {"value": "x"}, "SetTo: value is a number or a tensor"),
    ("SetTo", {"value": True}, "SetTo: value is a number or a tensor"),
    ("Add", {"direction": "x"}, "Add: direction is a number or a tensor"),
    ("Add", {"direction": True}, "Add: direction is a number or a tensor"),
    ("FromRun", {"rows": [True]}, "an entry of rows is a whole number"),
    ("FromRun", {"positions": ["x"]}, "an entry of positions is a whole number"),
    ("NextTokenLoss", {"tokens": 3}, "NextTokenLoss: tokens is a tensor"),
    ("Normalized", {"zero": "x"}, "Normalized: zero is a number"),
    ("Normalized", {"one": True}, "Normalized: one is a number"),
    *(
        line
        for name in ("path_patching",)
        for line in (
            (name, {"original": ""}, "has no tokens"),
            (name, {"new": IDS}, "original and new have different numbers of tokens"),
            (name, {"metric": 3}, "is a Metric or a function of logits"),
            (name, {"metric": sweep.LogProbability(-1)}, "answer: token id -1 is outside"),
            *(
                (name, {ends: wrong}, words)
                for ends in ("senders", "receivers")
                for wrong, words in (
                    (3, f"{ends} is a list of strings"),
                    ([], f"{ends} is a list of strings; found an empty one"),
                    ([3], f"an entry of {ends} is a string"),
                    ("nonsense", f"No {ends[:-1]} is called 'nonsense'"),
                )
            ),
            *choice(name, "inputs"),
            *choice(name, "value"),
            *choice(name, "rows"),
            (name, {"positions": 8}, "positions: there are 8"),
            (name, {"attention_mask": MASK}, "attention_mask must have shape"),
            (name, {"prepend_bos": True}, "different numbers of tokens|prepend_bos is for strings"),
            (name, {"padding_side": "left"}, "padding_side='left' is for strings"),
            (name, {"logit_positions": [-1]}, "logit_positions would have no effect"),
            *whole(name, "memory_limit", 1),
            *whole(name, "rows_at_once", 1),
        )
    ),
    *choice("path_patching", "on_interrupt"),
    *(
        (name, given, words)
        for name in ("activation_patching", "ablation")
        for given, words in (
            ({"memory_limit": 1.5}, "memory_limit is a whole number"),
            ({"memory_limit": 0}, "memory_limit must be at least 1"),
            ({"site": 3}, "site is a string"),
            ({"by": 3}, "by is a list of strings"),
        )
    ),
    ("ablation", {"seed": 3}, "seed=3 would have no effect"),
    ("ablation", {"seed": True}, "seed is a whole number"),
    ("by_head", {"result": 3}, "result is an array"),
    ("by_head", {}, "takes a result of path_patching"),
    ("to_document", {"result": 3}, "result is an array"),
    ("data_set_to_document", {"result": 3}, "result is a data set"),
    ("data_set_from_document", {"document": 3}, "document maps names"),
    ("data_set_from_document", {"document": {"attrs": {}}}, "it has no 'variables'"),
    ("from_document", {"document": 3}, "document maps names"),
    ("from_document", {}, "document is no saved result"),
]
