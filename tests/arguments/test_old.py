"""No argument is accepted and ignored: a value out of range, and a combination without effect, are refused by name.

``REFUSED`` is the table: a call, the arguments that are changed in one that works, and words of the error. Nothing has run
when it is raised. A second test asks the signatures: every argument of every call is in the table, or among those of which it
is said why they need no line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomForCausalLM

from pellucid import ActivationCache, Collected, Corpus, TransformerBridge, running_stats, sweep
from pellucid.analysis import ablation, patching
from pellucid.errors import PellucidError
from tests.models import is_pristine

NAN = float("nan")
POST = "blocks.0.mlp.hook_post"
TEXT = "Everyone has the right to life"


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that only looks."""


@dataclass
class Bench:
    """What calls are made with."""

    bridge: TransformerBridge
    ids: Tensor
    cache: ActivationCache
    corpus: Corpus
    collected: Collected
    metric: sweep.Metric
    edit: sweep.Edit


@pytest.fixture(scope="module")
def bench(demo: TransformerBridge) -> Bench:
    ids = demo.to_tokens(TEXT)
    _, cache = demo.run_with_cache(ids)
    corpus = Corpus.from_documents({"en": [TEXT + "."] * 12}, demo.tokenizer, context=16)
    statistics = {POST: [running_stats.CountPositive(), running_stats.TopK(2)]}
    collected = demo.collect(corpus, statistics, progress=False)
    edit = sweep.Edit("blocks.1.attn.hook_z", sweep.Zero(), heads=0)
    return Bench(demo, ids, cache, corpus, collected, sweep.LogitDifference(10, 20), edit)


@dataclass(frozen=True)
class Call:
    """A public callable: where its signature is, how it is called, and arguments with which it works."""

    of: Callable[..., Any]
    make: Callable[[Bench], Callable[..., Any]]
    works: Callable[[Bench], dict[str, Any]]


def method(name: str, /, **works: Any) -> Call:
    """One of the bridge; ``input`` is the ids unless given."""
    of = getattr(TransformerBridge, name)

    def arguments(bench: Bench) -> dict[str, Any]:
        takes_input = "input" in inspect.signature(of).parameters
        return ({"input": bench.ids} if takes_input else {}) | works

    return Call(of, lambda bench: getattr(bench.bridge, name), arguments)


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

    return Call(value, plan, lambda _: works)


def edited(hook: str) -> Call:
    """An edit of a point, planned."""

    def plan(bench: Bench) -> Callable[..., Any]:
        swept = sweep.Sweep(bench.bridge, bench.ids, bench.metric)
        return lambda **given: swept.plan([sweep.Edit(**given)])

    return Call(sweep.Edit, plan, lambda _: {"hook": hook, "value": sweep.Zero()})


def made(of: Callable[..., Any], **works: Any) -> Call:
    """A class or function that needs no model."""
    return Call(of, lambda _: of, lambda _: works)


def of_corpus(name: str, /, **works: Any) -> Call:
    """A method of a corpus."""
    return Call(getattr(Corpus, name), lambda bench: getattr(bench.corpus, name), lambda _: works)


CALLS: dict[str, Call] = {
    "forward": method("forward"),
    "run_with_hooks": method("run_with_hooks"),
    "run_with_cache": method("run_with_cache"),
    "estimate_cache": method("estimate_cache"),
    "add_hook": method("add_hook", name=POST, hook_fn=look),
    "reset_hooks": method("reset_hooks"),
    "list_hooks": method("list_hooks"),
    "to_tokens": method("to_tokens", input=TEXT),
    "to_string": method("to_string", tokens=[5]),
    "to_str_tokens": method("to_str_tokens"),
    "to_single_token": method("to_single_token", string=" the"),
    "to_single_str_token": method("to_single_str_token", int_token=5),
    "get_token_position": method("get_token_position", single_token=" the"),
    "tokens_to_residual_directions": method("tokens_to_residual_directions", tokens=5),
    "verify": method("verify"),
    "set_attn_implementation": method("set_attn_implementation", attn_implementation="eager"),
    "collect": Call(
        TransformerBridge.collect,
        lambda bench: bench.bridge.collect,
        lambda bench: {"corpus": bench.corpus, "statistics": {POST: [running_stats.CountPositive()]}},
    ),
    "cache.to": Call(ActivationCache.to, lambda bench: bench.cache.to, lambda _: {}),
    "Sweep": Call(
        sweep.Sweep,
        lambda _: sweep.Sweep,
        lambda bench: {"bridge": bench.bridge, "input": bench.ids, "metric": bench.metric},
    ),
    "Sweep.plan": Call(
        sweep.Sweep.plan,
        lambda bench: sweep.Sweep(bench.bridge, bench.ids, bench.metric).plan,
        lambda bench: {"edits": [bench.edit]},
    ),
    "Sweep.run": Call(
        sweep.Sweep.run,
        lambda bench: sweep.Sweep(bench.bridge, bench.ids, bench.metric).run,
        lambda bench: {"edits": [bench.edit]},
    ),
    "Edit of z": edited("blocks.1.attn.hook_z"),
    "Edit of pattern": edited("blocks.1.attn.hook_pattern"),
    "SetTo": of_value(sweep.SetTo, value=1.0),
    "Add": of_value(sweep.Add, direction=1.0),
    "Scale": of_value(sweep.Scale, factor=2.0),
    "Apply": of_value(sweep.Apply, function=torch.neg),
    "FromRun": Call(sweep.FromRun, of_value(sweep.FromRun).make, lambda bench: {"run": bench.cache}),
    "LogitDifference": of_metric(sweep.LogitDifference, answer=1, foil=2),
    "LogProbability": of_metric(sweep.LogProbability, answer=1),
    "Probability": of_metric(sweep.Probability, answer=1),
    "KLDivergence": of_metric(sweep.KLDivergence, reference=torch.zeros(1, 2048)),
    "NextTokenLoss": of_metric(sweep.NextTokenLoss),
    "Normalized": of_metric(sweep.Normalized, metric=sweep.LogProbability(1), zero=0.0, one=1.0),
    "activation_patching": Call(
        patching.activation_patching,
        lambda _: patching.activation_patching,
        lambda bench: {"bridge": bench.bridge, "clean": TEXT, "corrupted": bench.ids, "metric": bench.metric},
    ),
    "ablation": Call(
        ablation.ablation,
        lambda _: ablation.ablation,
        lambda bench: {"bridge": bench.bridge, "input": bench.ids, "metric": bench.metric, "how": "zero"},
    ),
    "Corpus.from_documents": Call(
        Corpus.from_documents,
        lambda _: Corpus.from_documents,
        lambda bench: {"documents": {"en": [TEXT]}, "tokenizer": bench.bridge.tokenizer},
    ),
    "Corpus.batches": of_corpus("batches", batch_size=2),
    "Corpus.contexts": of_corpus("contexts", label="en", places=[(0, 1)]),
    "Corpus.documents": of_corpus("documents", label="en", numbers=[0]),
    "Collected.examples": Call(
        Collected.examples,
        lambda bench: bench.collected.examples,
        lambda bench: {"corpus": bench.corpus, "hook": POST, "label": "en", "feature": 0},
    ),
    "Collected.get": Call(
        Collected.get,
        lambda bench: bench.collected.get,
        lambda _: {"hook": POST, "statistic": "count_positive", "label": "en"},
    ),
    "CountPositive": made(running_stats.CountPositive),
    "MeanVariance": made(running_stats.MeanVariance),
    "Covariance": made(running_stats.Covariance),
    "Histogram": made(running_stats.Histogram, edges=[0.0, 1.0]),
    "Quantiles": made(running_stats.Quantiles),
    "TopK": made(running_stats.TopK, k=2),
    "AveragePrecision": made(running_stats.AveragePrecision),
    "average_precision": made(
        running_stats.average_precision,
        scores=torch.tensor([[0.0], [1.0]]),
        positive=torch.tensor([True, False]),
    ),
}

IDS = torch.tensor([[5, 6]])
MASK = torch.ones(1, 3)
RUNS: list[tuple[dict[str, Any], str]] = [
    ({"input": 7}, "found int"),
    ({"input": torch.tensor([[4000]])}, "Token id 4000 is outside the vocabulary"),
    ({"return_type": "logit"}, "Invalid return_type: 'logit'"),
    ({"loss_per_token": True}, "loss_per_token=True would have no effect: return_type='logits'"),
    ({"loss_per_token": True, "return_type": None}, "loss_per_token=True would have no effect"),
    ({"prepend_bos": True}, "prepend_bos is for strings"),
    ({"padding_side": "middle"}, "padding_side='middle' is for strings"),
    ({"padding_side": "left"}, "padding_side='left' is for strings.*attention_mask="),
    ({"input": ["a b", "c"], "padding_side": "middle"}, "padding_side is 'left' or 'right'"),
    ({"input": "a", "padding_side": "middle"}, "padding_side is 'left' or 'right'"),
    ({"attention_mask": MASK}, "attention_mask must have shape"),
    ({"start_at_layer": 9}, "start_at_layer is a block"),
    ({"start_at_layer": 1, "return_type": "loss"}, "A loss needs tokens"),
    ({"stop_at_layer": 9}, "stop_at_layer is a block"),
    ({"stop_at_layer": 1.5}, "stop_at_layer is a whole number; found 1.5"),
    ({"stop_at_layer": True}, "stop_at_layer is a whole number"),
    ({"stop_at_layer": 2, "return_type": "loss"}, "A run with stop_at_layer has no logits"),
    ({"stop_at_layer": 2, "return_type": "both"}, "A run with stop_at_layer has no logits"),
]
"""Of every call that runs the model once."""

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (call, given, words)
        for call in ("forward", "run_with_hooks", "run_with_cache")
        for given, words in RUNS
        if not (call == "forward" and "Token id" in words)  # the embedding itself refuses it there
    ),
    ("run_with_hooks", {"fwd_hooks": [(POST, 3)]}, "as the function"),
    ("run_with_hooks", {"bwd_hooks": [POST]}, "pairs"),
    (
        "run_with_hooks",
        {"input": IDS.expand(2, 2), "remove_batch_dim": True},
        "remove_batch_dim needs a batch of one row",
    ),
    (
        "run_with_cache",
        {"input": IDS.expand(2, 2), "remove_batch_dim": True},
        "remove_batch_dim needs a batch of one row",
    ),
    ("run_with_cache", {"names_filter": "blocks.9.hook_resid_pre"}, "No hook point"),
    ("run_with_cache", {"pos_slice": slice(100, 200)}, "keeps none of the run's 8 positions"),
    ("run_with_cache", {"pos_slice": slice(3, 3)}, "keeps none"),
    ("run_with_cache", {"pos_slice": []}, "pos_slice is empty"),
    ("run_with_cache", {"pos_slice": 8}, "the run has 8, 0 to 7"),
    ("run_with_cache", {"pos_slice": object()}, "a position, a slice or several positions"),
    ("run_with_cache", {"incl_bwd": True, "return_type": "both"}, "incl_bwd"),
    ("run_with_cache", {"incl_bwd": True, "loss_per_token": True}, "incl_bwd"),
    ("run_with_cache", {"device": "nowhere"}, "device='nowhere' is none that torch knows"),
    ("run_with_cache", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
    ("run_with_cache", {"dtype": "float32"}, "dtype is one of .*found 'float32'"),
    ("run_with_cache", {"max_cache_bytes": -1}, "over max_cache_bytes=-1"),
    ("estimate_cache", {"input": torch.tensor([[4000]])}, "Token id 4000"),
    ("estimate_cache", {"names_filter": []}, "empty"),
    ("estimate_cache", {"pos_slice": slice(100, 200)}, "keeps none"),
    ("estimate_cache", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
    ("estimate_cache", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("estimate_cache", {"stop_at_layer": 1.5}, "stop_at_layer is a whole number"),
    ("add_hook", {"name": "nonsense"}, "No hook point"),
    ("add_hook", {"dir": "forward"}, "dir is"),
    ("reset_hooks", {"direction": "forward"}, "forward"),
    ("list_hooks", {"name_filter": "nonsense"}, "No hook point"),
    ("list_hooks", {"dir": "forward"}, "forward"),
    ("to_tokens", {"input": ""}, "has no tokens"),
    ("to_tokens", {"padding_side": "middle"}, "padding_side is"),
    ("to_tokens", {"truncate": True}, "Nothing is cut off"),
    ("to_string", {"tokens": -1}, "Token id -1 is outside"),
    ("to_string", {"tokens": [4000]}, "Token id 4000 is outside"),
    ("to_string", {"tokens": [1.5]}, "Token ids are integers; found torch.float32"),
    ("to_string", {"tokens": object()}, "Token ids are integers; found object"),
    ("to_str_tokens", {"input": torch.tensor([4000])}, "Token id 4000"),
    ("to_str_tokens", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("to_str_tokens", {"padding_side": "middle"}, "Invalid padding_side"),
    ("to_single_token", {"string": "two words"}, "not a single token"),
    ("to_single_token", {"string": 7}, "its text, a string; found 7"),
    ("to_single_str_token", {"int_token": -1}, "Token id -1"),
    ("get_token_position", {"single_token": 4000}, "single_token must be at most 2047"),
    ("get_token_position", {"single_token": [5]}, "single_token is a whole number"),
    ("get_token_position", {"input": IDS.expand(2, 2)}, "one prompt; found 2"),
    ("get_token_position", {"mode": "middle"}, "Invalid mode"),
    ("get_token_position", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("get_token_position", {"padding_side": "middle"}, "Invalid padding_side"),
    ("tokens_to_residual_directions", {"tokens": -1}, "Token id -1"),
    ("tokens_to_residual_directions", {"tokens": 4000}, "Token id 4000"),
    ("tokens_to_residual_directions", {"tokens": 1.5}, "Token ids are integers"),
    ("verify", {"input": IDS[:, :1]}, "two tokens or more"),
    ("verify", {"layers": 0}, "layers is several layers"),
    ("verify", {"layers": [9]}, "layers are 0 to 3"),
    ("set_attn_implementation", {"attn_implementation": "flash"}, "Invalid attn_implementation"),
    ("collect", {"statistics": {}}, "."),
    ("collect", {"batch_size": 0}, "batch_size is a number of rows"),
    ("collect", {"batch_size": True}, "batch_size is a number of rows"),
    ("collect", {"labels": ["de"]}, "de"),
    ("collect", {"start_row": -1}, "Rows go from start_row=0"),
    ("collect", {"start_row": 1.5}, "start_row is a whole number"),
    ("collect", {"stop_row": 1.5}, "stop_row is a whole number"),
    ("collect", {"padding_side": "middle"}, "padding_side"),
    ("collect", {"every": NAN}, "every must be finite"),
    ("collect", {"every": -1.0}, "every must be at least 0"),
    ("cache.to", {"device": "nowhere"}, "none that torch knows"),
    ("cache.to", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
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
    ("Sweep.plan", {"edits": [3]}, "A sweep takes Edits, or lists of them; found int"),
    ("Sweep.plan", {"edits": [[3]]}, "A sweep takes Edits"),
    ("Sweep.run", {"edits": [3]}, "A sweep takes Edits"),
    ("Sweep.run", {"on_interrupt": "stop"}, "on_interrupt"),
    ("Edit of z", {"hook": "nonsense"}, "No hook point"),
    ("Edit of z", {"value": 0.0}, "is one of Zero, SetTo"),
    ("Edit of z", {"positions": 8}, "there are 8, 0 to 7; found 8"),
    ("Edit of z", {"positions": 1.5}, "one index, a slice or several"),
    ("Edit of z", {"positions": []}, "chooses none"),
    ("Edit of z", {"heads": 8}, "there are 8"),
    ("Edit of z", {"neurons": 16}, "there are 16"),
    ("Edit of z", {"keys": 0}, "keys= has no meaning"),
    ("Edit of z", {"rows": 1}, "there are 1"),
    ("Edit of pattern", {"neurons": 0}, "neurons= has no meaning"),
    ("Edit of pattern", {"keys": 8}, "there are 8"),
    ("SetTo", {"value": NAN}, "the value is NaN"),
    ("SetTo", {"value": torch.zeros(3)}, "does not broadcast"),
    ("Add", {"direction": NAN}, "the value is NaN"),
    ("Add", {"direction": torch.zeros(3)}, "does not broadcast"),
    ("Scale", {"factor": NAN}, "factor must be finite"),
    ("Scale", {"factor": torch.ones(2)}, "factor is a number"),
    ("Apply", {"function": 3}, "Apply takes a function; found int"),
    ("FromRun", {"run": torch.zeros(2)}, "FromRun takes a cache"),
    ("FromRun", {"run": {}}, "did not keep blocks.1.hook_resid_pre"),
    ("FromRun", {"rows": 0}, "rows is a list"),
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
    ("KLDivergence", {"reference": torch.zeros(1, 8)}, r"must have shape \(1, 2048\)"),
    ("KLDivergence", {"reference": torch.zeros(1, 3, 2048)}, r"must have shape \(1, 8, 2048\)"),
    ("KLDivergence", {"reference": [0.0]}, "a tensor of logits"),
    ("KLDivergence", {"position": 8}, "the sequence has 8"),
    ("NextTokenLoss", {"attention_mask": MASK}, "would have no effect without tokens"),
    ("NextTokenLoss", {"tokens": IDS}, "tokens must have shape"),
    ("NextTokenLoss", {"tokens": torch.zeros(1, 8)}, "tokens are integers"),
    ("Normalized", {"metric": torch.sum}, "metric is one of pellucid.sweep's"),
    ("Normalized", {"metric": sweep.LogProbability(-1)}, "token id -1"),
    ("Normalized", {"zero": 1.0}, "must be finite and differ"),
    ("Normalized", {"zero": torch.zeros(3)}, "a number, or one a row"),
    ("Normalized", {"one": NAN}, "must be finite and differ"),
    ("activation_patching", {"clean": ""}, "has no tokens"),
    ("activation_patching", {"corrupted": IDS}, "different numbers of tokens"),
    ("activation_patching", {"metric": sweep.LogProbability(-1)}, "token id -1"),
    ("activation_patching", {"site": "nonsense"}, "nonsense"),
    ("activation_patching", {"by": "nonsense"}, "nonsense"),
    ("activation_patching", {"direction": "up"}, "direction"),
    ("activation_patching", {"rows": "some"}, "rows"),
    ("activation_patching", {"layers": 9}, "there are 4"),
    ("activation_patching", {"positions": 8}, "there are 8"),
    ("activation_patching", {"heads": 0}, "heads"),
    ("activation_patching", {"neurons": 0}, "neurons"),
    ("activation_patching", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("activation_patching", {"prepend_bos": True}, "."),
    ("activation_patching", {"padding_side": "left"}, "padding_side='left' is for strings"),
    ("activation_patching", {"logit_positions": [-1]}, "logit_positions would have no effect"),
    ("activation_patching", {"rows_at_once": 0}, "rows_at_once must be at least 1"),
    ("activation_patching", {"on_interrupt": "stop"}, "on_interrupt"),
    ("ablation", {"input": ""}, "has no tokens"),
    ("ablation", {"metric": sweep.LogProbability(-1)}, "token id -1"),
    ("ablation", {"site": "nonsense"}, "nonsense"),
    ("ablation", {"by": "nonsense"}, "nonsense"),
    ("ablation", {"how": "nonsense"}, "how"),
    ("ablation", {"data": IDS}, "data"),
    ("ablation", {"data_mask": MASK}, "data_mask"),
    ("ablation", {"permutation": [0]}, "permutation goes with how='resample'"),
    ("ablation", {"how": "resample", "data": TEXT, "permutation": [0.5]}, "whole number; found 0.5"),
    ("ablation", {"how": "resample", "data": TEXT, "seed": 1.5}, "seed is a whole number"),
    ("ablation", {"rows": "some"}, "rows"),
    ("ablation", {"layers": 9}, "there are 4"),
    ("ablation", {"positions": 8}, "there are 8"),
    ("ablation", {"heads": 8}, "there are 8"),
    ("ablation", {"neurons": 0}, "neurons"),
    ("ablation", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("ablation", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("ablation", {"padding_side": "left"}, "padding_side='left' is for strings"),
    ("ablation", {"logit_positions": [-1]}, "logit_positions would have no effect"),
    ("ablation", {"rows_at_once": 0}, "rows_at_once must be at least 1"),
    ("ablation", {"on_interrupt": "stop"}, "on_interrupt"),
    ("Corpus.from_documents", {"documents": []}, "dictionary"),
    ("Corpus.from_documents", {"context": 0}, "context is a number of tokens"),
    ("Corpus.from_documents", {"context": True}, "context is a number of tokens"),
    ("Corpus.from_documents", {"packing": "loose"}, "Invalid packing"),
    ("Corpus.from_documents", {"separator": -1}, "separator is"),
    ("Corpus.from_documents", {"tail": "cut"}, "Invalid tail"),
    ("Corpus.from_documents", {"long_documents": "cut"}, "Invalid long_documents"),
    ("Corpus.from_documents", {"pad_id": -1}, "pad_id must be at least 0"),
    ("Corpus.from_documents", {"longest_document": 0}, "longest_document"),
    ("Corpus.batches", {"batch_size": 1.5}, "batch_size is a number of rows"),
    ("Corpus.batches", {"labels": "de"}, "de"),
    ("Corpus.batches", {"start_row": 1.5}, "start_row is a whole number"),
    ("Corpus.batches", {"start_row": 3, "stop_row": 2}, "found 3 to 2"),
    ("Corpus.batches", {"padding_side": "middle"}, "Invalid padding_side"),
    ("Corpus.contexts", {"label": "de"}, "de"),
    ("Corpus.contexts", {"places": [(99, 0)]}, "no document 99"),
    ("Corpus.contexts", {"before": -1}, "before must be at least 0"),
    ("Corpus.contexts", {"after": -1}, "after must be at least 0"),
    ("Corpus.documents", {"label": "de"}, "de"),
    ("Corpus.documents", {"numbers": [-1]}, "no document -1"),
    ("Corpus.documents", {"numbers": [1.5]}, "whole number; found 1.5"),
    ("Collected.examples", {"hook": "nonsense"}, "nonsense"),
    ("Collected.examples", {"label": "de"}, "No label 'de'"),
    ("Collected.examples", {"feature": -1}, "feature must be at least 0"),
    ("Collected.examples", {"feature": 9999}, "feature must be at most 511"),
    ("Collected.examples", {"feature": [0, 0]}, "feature is 1 indices"),
    ("Collected.examples", {"statistic": "top_9"}, "0 statistics of that kind"),
    ("Collected.get", {"hook": "nonsense"}, "nonsense"),
    ("Collected.get", {"statistic": "nonsense"}, "No statistic 'nonsense'"),
    ("Collected.get", {"label": "de"}, "No label 'de'"),
    ("CountPositive", {"threshold": NAN}, "threshold must be finite"),
    ("MeanVariance", {"correction": -1}, "correction must be at least 0"),
    ("MeanVariance", {"correction": 0.5}, "correction is a whole number"),
    ("Covariance", {"correction": -1}, "correction must be at least 0"),
    ("Covariance", {"most_features": 0}, "most_features must be at least 1"),
    ("Histogram", {"edges": [1.0, 0.0]}, "increase"),
    ("Quantiles", {"quantiles": [1.5]}, "from 0 to 1"),
    ("Quantiles", {"relative_error": 0.0}, "relative_error"),
    ("Quantiles", {"smallest": 0.0}, "smallest"),
    ("Quantiles", {"largest": float("inf")}, "largest must be finite"),
    ("TopK", {"k": True}, "TopK keeps 1 or more"),
    ("AveragePrecision", {"pool": "sum"}, "pool"),
    ("average_precision", {"scores": torch.zeros(3, 1)}, "found"),
    ("average_precision", {"positive": torch.tensor([True, True])}, "no negative one"),
    ("average_precision", {"chunk": 0}, "chunk must be at least 1"),
    ("average_precision", {"chunk": -1}, "chunk must be at least 1"),
]

NO_LINE_NEEDED: dict[str, str] = {
    "bridge": "a model",
    "tokenizer": "a tokenizer",
    "corpus": "a corpus",
    "past_key_values": "a cache of Hugging Face's, which tests/model_bridge/test_running.py tries",
    "progress": "any truth value, or None",
    "memory_limit": "too little is refused by what does not fit: tests/sweep/test_engine.py",
    "checkpoint": "a path",
    "move_to_device": "any truth value",
    "return_cache_object": "any truth value",
    "return_mask": "any truth value",
    "inputs_embeds": "tests/model_bridge/test_run_positions.py",
    "what": "words for an error",
    "reset_hooks_end": "any truth value",
    "clear_contexts": "any truth value",
    "assert_effect": "any truth value; tests/model_bridge/test_bad_input.py",
    "including_permanent": "any truth value",
    "is_permanent": "any truth value",
    "prepend": "any truth value",
    "pad_to_context": "any truth value",
    "normalize": "any truth value",
    "change": "any truth value",
    "level": "accepted for TransformerLens' callers, and documented so",
    "hook_fn": "checked where hooks are attached: tests/model_bridge/test_bad_input.py",
}
EXPLAINED: dict[tuple[str, str], str] = {
    ("estimate_cache", "incl_bwd"): "any truth value",
    ("to_tokens", "prepend_bos"): "any truth value",
}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward of the model."""
    ran: list[int] = []
    native = BloomForCausalLM.forward

    @wraps(native)
    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return native(*args, **kwargs)

    monkeypatch.setattr(BloomForCausalLM, "forward", counted)
    return ran


def _in_words(value: object) -> str:
    """The same name in every process: addresses differ."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


@pytest.mark.parametrize(("call", "given", "words"), REFUSED, ids=_in_words)
def test_refused_before_anything_runs(
    bench: Bench, forwards: list[int], call: str, given: dict[str, Any], words: str
) -> None:
    entry = CALLS[call]
    function, arguments = entry.make(bench), entry.works(bench) | given
    forwards.clear()
    with pytest.raises(PellucidError, match=words):
        function(**arguments)
    assert not forwards or "Token id" in words  # on a CPU the embedding says it
    assert is_pristine(bench.bridge.hf_model)
    assert not bench.bridge.live_hooks()


@pytest.mark.parametrize("call", CALLS)
def test_what_the_lines_change_works(bench: Bench, call: str) -> None:
    if call not in ("verify", "activation_patching", "ablation"):  # seconds each, and tried elsewhere
        entry = CALLS[call]
        entry.make(bench)(**entry.works(bench))
        bench.bridge.reset_hooks()


@pytest.mark.parametrize("call", CALLS)
def test_every_argument_has_a_line(call: str) -> None:
    tried = {argument for name, given, _ in REFUSED if name == call for argument in given}
    if CALLS[call].of is sweep.Edit:
        tried = {argument for name, given, _ in REFUSED if name.startswith("Edit") for argument in given}
    arguments = {
        name
        for name, parameter in inspect.signature(CALLS[call].of).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    left = {name for name in arguments - tried if name not in NO_LINE_NEEDED and (call, name) not in EXPLAINED}
    assert not left


def test_what_needs_no_line_is_an_argument() -> None:
    names = {name for call in CALLS.values() for name in inspect.signature(call.of).parameters}
    assert set(NO_LINE_NEEDED) <= names
