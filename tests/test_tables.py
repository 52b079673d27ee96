"""What a REPL and a notebook show of every public object: something, and less than a screenful or two of text."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from enum import Enum
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import pellucid
from pellucid import Corpus, TransformerBridge, steering
from pellucid.analysis.composition import circuits_of
from pellucid.analysis.lens import LogitLens, fitting
from pellucid.analysis.lens.files import LensFile
from pellucid.analysis.lens.readout import RowStatistics
from pellucid.analysis.neurons import force
from pellucid.analysis.relevance import neuron_relevance
from pellucid.analysis.stopping import count_until_stable
from pellucid.conversion_utils.conversion_steps import ChainTensorConversion, RearrangeTensorConversion
from pellucid.corpora import PromptPairs
from pellucid.experiments.ablation import Ablation
from pellucid.experiments.places import find_site, read_prompts
from pellucid.model_bridge.generalized_components import LinearBridge
from pellucid.model_bridge.verification.check_report import CheckReport, CheckResult
from pellucid.patching import generic_activation_patch, layer_pos_patch_setter
from pellucid.plots import TokenExample
from pellucid.running_stats import Covariance, MeanVariance, MinMax
from pellucid.running_stats.top import TopExamples
from pellucid.scale.harvest import Harvester, harvest
from pellucid.scale.stored_activations import StoredActivations
from pellucid.steering import Add, Steering, direction_of
from pellucid.sweep import Edit, FromRun, LogitDifference, SetTo, Sweep, Zero
from pellucid.sweep.metrics import KLDivergence, NextTokenLoss, Normalized, ProbabilityDifference
from pellucid.tables import MOST_ROWS, Table, merge_layers, ranges
from tests.models import make_bloom, random_tokens

LONGEST = 4000
LAYERS = 12
ADDRESS = re.compile(r"^<[\w.]+ object at 0x[0-9a-f]+>$")

INTERNAL = {
    "SaeInput": "inside a bridge",
    "HookedFunction": "abstract",
    "ActivationRecorder": "inside a run with a cache",
    "ArchitectureAdapter": "a table of the code",
    "AsItWas": "inside a hook point",
    "BaseTensorConversion": "abstract",
    "BloomArchitectureAdapter": "a table of the code",
    "Cells": "inside a sweep",
    "Change": "abstract",
    "Checker": "inside verify()",
    "CircuitMethods": "a part of the bridge's class",
    "ComponentTree": "inside a bridge",
    "Costs": "inside a sweep",
    "DecoderAdapter": "a table of the code",
    "DecompositionMethods": "a part of a cache's class",
    "DecoderEdits": "inside the oracle of edits",
    "Draws": "inside a run",
    "Effect": "inside a block of steering",
    "Encoder": "inside a corpus",
    "Ends": "inside edge attribution",
    "Factor": "inside a block that multiplies its branches",
    "FunctionAttends": "inside a sweep",
    "FastAttention": "inside a run",
    "FastAttentionOn": "inside verify()",
    "FrequencyPenalty": "inside generate",
    "HookIntrospectionMixin": "a part of a user's own class",
    "HookSession": "inside a run or a block of hooks",
    "Hooks": "inside a bridge",
    "Intercept": "inside the oracle of edits",
    "KeyTap": "inside attention",
    "LabelRows": "inside a corpus",
    "Metric": "abstract",
    "ModelForward": "inside a forward",
    "Mounted": "abstract",
    "PackedAttention": "inside a sweep",
    "PackedModel": "inside a sweep",
    "PairPass": "inside an attribution",
    "PairStream": "inside an attribution, or scores of edges",
    "PartsOfFused": "abstract",
    "PatchedEdges": "inside a measurement of faithfulness",
    "PathEdits": "inside path patching",
    "Processor": "inside process_weights",
    "Recorder": "inside a sweep",
    "Remover": "inside the oracle of edits",
    "Runner": "inside a bridge",
    "Scope": "inside a block of hooks",
    "ShardWriter": "inside a harvest",
    "Site": "a descriptor",
    "StandIn": "a module's forward while it is hooked",
    "Standing": "inside attention",
    "StateFolder": "inside a collection",
    "StreamerApart": "inside generate",
    "Switch": "inside a run with gradients",
    "TappedFunctional": "inside attention",
    "TokenMethods": "a part of the bridge's class",
    "TokenRules": "inside a bridge",
    "Unembedding": "inside a sweep",
    "Value": "abstract",
    "Watched": "inside a job",
    "WeightMethods": "a part of the bridge's class",
    "Workspace": "inside a statistic",
}
"""Classes that nobody is given an object of, and what they are."""


def classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(pellucid.__path__, "pellucid."):
        if not module.name.endswith("__main__"):
            for name, found in vars(importlib.import_module(module.name)).items():
                if isinstance(found, type) and found.__module__ == module.name and not name.startswith("_"):
                    yield found


def test_every_class_says_something_of_itself() -> None:
    silent = {
        found.__name__
        for found in classes()
        if found.__repr__ is object.__repr__
        and not issubclass(found, (BaseException, Enum))
        and not getattr(found, "_is_protocol", False)
    }
    assert silent == INTERNAL.keys()


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """Layers enough that what grows with them shows."""
    return TransformerBridge(make_bloom(n_layer=LAYERS, hidden_size=32, n_head=4))


@pytest.fixture(scope="module")
def objects(bridge: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of everything that a public call gives, from a deep model and long texts."""
    tokens = random_tokens(4, 12)
    logits, cache = bridge.run_with_cache(random_tokens(4, 12, seed=1))
    seen: list[Any] = []
    bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.attn.o.hook_in", lambda z, hook: seen.extend((hook, hook.run)))]
    )
    corpus = Corpus.from_tokens({f"label {i}": random_tokens(8, 200, i) for i in range(3)}, context=100)
    edits = [
        Edit(f"blocks.{layer}.hook_resid_pre", FromRun(cache), positions=[position])
        for layer in range(LAYERS)
        for position in range(4)
    ]
    sweep = Sweep(bridge, tokens, {"difference": LogitDifference(1, 2), "loss": NextTokenLoss()})
    prompts = read_prompts(bridge, tokens)
    metric = LogitDifference(list(range(4)), [5, 6, 7, 8])
    many = torch.randn(3000)
    table, ranks = many[:, None], torch.arange(len(many))[:, None]
    statistics = {kind.__name__: kind() for kind in (MeanVariance, MinMax, Covariance)}
    for statistic in statistics.values():
        statistic.update(torch.randn(2, 40, 200), torch.ones(2, 40, dtype=torch.bool))
    store = tmp_path_factory.mktemp("store")
    labelled = Ablation(
        bridge, tokens[:1], LogitDifference(1, 2), site="z", by=("layer", "head"), how="zero"
    ).labelled()
    made = {
        "bridge": bridge,
        "cfg": bridge.cfg,
        "blocks": bridge.blocks,
        "block": bridge.blocks[0],
        "attention": bridge.blocks[-1].attn,
        "component alone": LinearBridge("dense"),
        "hook_dict": bridge.hook_dict,
        "hook_dict.keys": bridge.hook_dict.keys(),
        "hook_dict.values": bridge.hook_dict.values(),
        "index": cache.index,
        "point": bridge.blocks[0].hook_resid_pre,
        "spec": bridge.hook_spec("blocks.0.attn.hook_q"),
        "weights_state": bridge.weights_state,
        "report": bridge.verify(layers=[0]),
        "failed report": CheckReport("m", "float32", [CheckResult(f"c{i}", False, 1.0, 0.0) for i in range(900)]),
        "cache": cache,
        "keys": cache.keys(),
        "items": cache.items(),
        "hook": seen[0],
        "run": seen[1],
        "conversion": ChainTensorConversion([RearrangeTensorConversion("b p d -> b p d")]),
        "sweep": sweep,
        "circuits": circuits_of(bridge),
        "lens": LogitLens(bridge),
        "fit": fitting.Fit(corpus),
        "fit's state": fitting.FitState({"rows": many}, {"label 0": 1}, 5, {}),
        "lens file": LensFile("tuned", {"A.0": many}, {}, {}),
        "rows of logits": RowStatistics(ranks, table, table, many, many, table, table, ranks),
        "plan": sweep.plan(edits),
        "batch of a plan": sweep.plan(edits).batches[0],
        "sweep result": sweep.run(edits),
        "edit": edits[0],
        "set": Edit("blocks.0.hook_resid_pre", SetTo(many), positions=range(1000), rows=list(range(900))),
        "zero": Zero(),
        "metric": metric,
        "kl": KLDivergence(logits),
        "normalized": Normalized(metric, many, many),
        "loss": NextTokenLoss(tokens),
        "reads": metric.reads(tokens, None),
        "site": find_site(bridge, "z"),
        "prompts": prompts,
        "labelled": labelled,
        "grid": labelled.grid,
        "reference": labelled.reference,
        "patching result": generic_activation_patch(
            bridge, tokens, cache, metric, layer_pos_patch_setter, "resid_pre", ("layer", "pos"), reduce="none"
        ),
        "change": force([(layer, unit) for layer in range(LAYERS) for unit in range(40)], 1.0),
        "edit of neurons": force([(0, unit) for unit in range(100)], 1.0).edits(bridge)[0],
        "direction": direction_of(bridge, many[:32]),
        "steering": Steering([steering.Edit(Add(many[:32]), "resid_post", positions=range(1000))] * 40),
        "hook of steering": steering.Edit(Add(many[:32]), "resid_post").hooks(bridge)[0],
        "corpus": corpus,
        "pairs": PromptPairs(
            ["a" * 200] * 900, [[1, 2] * 200] * 900, [["x"] * 200] * 900, labels={"z" * 90: [0] * 900}
        ),
        "sets of a metric": ProbabilityDifference([list(range(900))] * 4),
        "counted": count_until_stable(bridge, corpus, first_rows=4, draws=2, top_rate=0.1, progress=False),
        "relevance": neuron_relevance(bridge, corpus, stop_row=1, progress=False),
        "corpus batch": next(iter(corpus.batches(8))),
        "label count": corpus.count("label 0"),
        "source": corpus._of["label 0"].source,
        "collected": bridge.collect(corpus, {"*.hook_post": [MeanVariance()]}),
        "harvester": Harvester(bridge, corpus, "*.hook_resid_post", store),
        "report of a harvest": harvest(bridge, corpus, "*.hook_resid_post", store),
        "store": StoredActivations(store),
        "job": StoredActivations(store).job,
        "rows": StoredActivations(store).rows(range(50)),
        "top examples": TopExamples(many, ranks[:, 0], ranks[:, 0]),
        "example": TokenExample(["a"] * 900, many[:900].numpy(), "x"),
    }
    return made | statistics | {f"{kind} result": statistic.result() for kind, statistic in statistics.items()}


def test_an_object_is_shown_in_short(objects: dict[str, Any]) -> None:
    for name, value in objects.items():
        text = repr(value)
        assert not ADDRESS.match(text), f"{name}: {text}"
        assert 5 < len(text) < LONGEST, f"{name}: {len(text)} characters"
        if hasattr(type(value), "_repr_html_"):
            assert Checked.of(value._repr_html_()), name


def test_what_was_too_long_is_short_now(objects: dict[str, Any]) -> None:
    said = {name: repr(value) for name, value in objects.items()}
    total = len(objects["report"].results)
    assert said["report"].startswith(f"All {total} checks hold") or "do not hold" in said["report"]
    assert "900 of 900 checks do not hold for m" in said["failed report"]
    assert f"and {900 - MOST_ROWS} more" in said["failed report"]
    assert f"blocks.*.attn.hook_pattern      0-{LAYERS - 1}" in said["hook_dict.keys"]
    assert "4 × 12 × 4 × 8" in said["cache"]
    assert said["blocks"].startswith(f"{LAYERS} blocks")
    assert "blocks.0.attn.hook_z" in said["block"]
    assert "functions attached" in said["bridge"]
    assert said["set"] == "Edit(hook='blocks.0.hook_resid_pre', value=SetTo(value=float32[3000]), " + (
        "positions=range(0, 1000), heads=None, neurons=None, keys=None, rows=[0, 1, 2, 3, 4, 5, ...])"
    )
    assert said["MeanVariance result"] == "Moments(mean=float64[200], variance=float64[200])"
    assert said["hook"] == "NamedHook('blocks.0.attn.o.hook_in')"
    assert said["run"] == "RunContext(4 rows, columns 0 to 11)"


def test_a_result_names_where_it_is_largest(objects: dict[str, Any]) -> None:
    result = objects["patching result"]
    best = result.mean().argmax().item()
    layer, position = divmod(best, 12)
    assert f"{result.mean().max().item():.4g} at layer {layer}, pos {position}" in repr(result)
    found = objects["sweep result"]
    means = found.values["loss"].double().mean(-1)
    assert f"{means.max().item():.4g} at edit {means.argmax().item()}" in repr(found)


class Checked(HTMLParser):
    """Every tag that is opened is closed, and nothing but the tags of a table is there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @classmethod
    def of(cls, text: str) -> bool:
        parser = cls()
        parser.feed(text)
        assert not parser.open
        return parser.seen <= {"div", "table", "thead", "tbody", "tr", "th", "td"} and bool(parser.seen)


def test_a_table() -> None:
    made = Table("two <things>", ("name", "x"), [("a & b", "1"), ("<script>", "22")])
    assert str(made).splitlines() == ["two <things>", "  name      x", "  a & b     1", "  <script>  22"]
    assert "<script>" not in made.html()
    assert "&lt;script&gt;" in made.html()
    assert Checked.of(made.html())
    long = Table("many", ("n",), [(str(n),) for n in range(100)])
    assert str(long).endswith(f"... and {100 - MOST_ROWS} more")
    assert str(Table("nothing", ("n",))) == "nothing"


def test_layers_are_merged_where_nothing_else_differs() -> None:
    rows = [("blocks.0.x", "1"), ("blocks.1.x", "1"), ("blocks.2.x", "2"), ("blocks.4.x", "1"), ("y", "1")]
    assert merge_layers(rows) == [("blocks.*.x", "0-1, 4", "1"), ("blocks.*.x", "2", "2"), ("y", "", "1")]
    assert ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"
