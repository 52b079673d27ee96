"""Gradients of activations, and attribution patching."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import gradients
from pellucid.attribution import AttributionPatching, attribution_patching
from pellucid.corpora.pairs import PromptPairs
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import read_prompts
from pellucid.gradients import GradientRun
from pellucid.sweep import LogProbability
from tests.arguments.bench import (
    BRIDGE,
    IDS,
    METRIC,
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

HOOK = "blocks.1.attn.hook_z"
PAIR: dict[str, Any] = {"bridge": BRIDGE, "clean": TEXT, "corrupted": THE_IDS, "metric": METRIC}
PAIRS = PromptPairs([[5, 6, 7]], [[5, 8, 7]], [1], [2])


def ran(bench: Bench) -> GradientRun:
    return gradients.run_with_gradients(
        read_prompts(bench.bridge, bench.ids).unedited(bench.bridge), bench.metric, [HOOK]
    )


def experiment(bench: Bench) -> AttributionPatching:
    return AttributionPatching(bench.bridge, PAIRS, check=0)


CALLS: dict[str, Call] = {
    "run_with_gradients": made(
        gradients.run_with_gradients,
        unedited=Of(lambda bench: read_prompts(bench.bridge, bench.ids).unedited(bench.bridge)),
        metric=METRIC,
        hooks=[HOOK],
    ),
    "GradientRun.gradients": bound(ran, GradientRun.gradients, hooks=[HOOK]),
    "AttributionPatching": made(AttributionPatching, bridge=BRIDGE, pairs=PAIRS),
    "AttributionPatching.run": bound(experiment, AttributionPatching.run),
    "attribution_patching": not_run(made(attribution_patching, **PAIR)),
}

REFUSED: list[Line] = [
    ("run_with_gradients", {"hooks": ["nonsense"]}, "hook.*nonsense|nonsense.*hook"),
    ("run_with_gradients", {"metric": 3}, "is a Metric or a function of logits"),
    ("run_with_gradients", {"metric": LogProbability(-1)}, "answer: token id -1 is outside"),
    ("run_with_gradients", {"unedited": 3}, "unedited is an input of the model"),
    ("run_with_gradients", {"instead": {"nonsense": torch.zeros(1)}}, "hook.*nonsense|nonsense.*hook"),
    ("run_with_gradients", {"instead": 3}, "instead maps hook points"),
    ("GradientRun.gradients", {"hooks": ["blocks.0.hook_mlp_out"]}, "blocks.0.hook_mlp_out was not kept by this run"),
    ("GradientRun.gradients", {"rules": True}, "made without rules"),
    ("GradientRun.gradients", {"without_layer": 1}, "without_layer|made without gates"),
    ("AttributionPatching", {"pairs": 3}, "pairs is PromptPairs"),
    ("AttributionPatching", {"metric": 3}, "metric is a class of metrics"),
    ("AttributionPatching", {"site": 3}, "site is a list of sites"),
    ("AttributionPatching", {"site": ["z", "z"]}, "site=.* names one of them twice"),
    ("AttributionPatching", {"by": {"q": "layer"}}, "by names the site 'q'"),
    ("AttributionPatching", {"method": "nonsense"}, "Invalid method: 'nonsense'"),
    ("AttributionPatching", {"method": ["atp", "atp"]}, "method=.* names one of them twice"),
    ("AttributionPatching", {"method": 3}, "method is a list of methods"),
    ("AttributionPatching", {"options": 3}, "options is SweepOptions"),
    *(
        ("AttributionPatching", {"options": SweepOptions(**given)}, "would have no effect")  # type: ignore[arg-type]
        for given in ({"padding_side": "left"}, {"logit_positions": [1]}, {"attention_mask": torch.ones(1, 3)})
    ),
    *choice("AttributionPatching", "direction"),
    *(line for name in ("check", "seed") for line in whole("AttributionPatching", name, 0)),
    *(line for name in ("n_points", "top_n", "batch_size") for line in whole("AttributionPatching", name, 1)),
    *whole("AttributionPatching", "resamples", 2),
    ("AttributionPatching.run", {"checkpoint": ""}, "checkpoint is a path"),
    ("AttributionPatching.run", {"every": -1.0}, "every"),
    ("attribution_patching", {"clean": 3}, "clean is a list of texts"),
    ("attribution_patching", {"clean": PAIRS}, "leave corrupted out"),
    ("attribution_patching", {"corrupted": None}, "corrupted is missing"),
    ("attribution_patching", {"corrupted": IDS}, "different numbers of tokens"),
    ("attribution_patching", {"metric": LogProbability(-1)}, "answer: token id -1 is outside"),
    ("attribution_patching", {"site": "nonsense"}, ".nonsense.*Nearest"),
    ("attribution_patching", {"by": "nonsense"}, "by=.*.nonsense. is none of them"),
    ("attribution_patching", {"method": "nonsense"}, "Invalid method: 'nonsense'"),
    ("attribution_patching", {"rows": "some"}, "Invalid rows: 'some'"),
    ("attribution_patching", {"layers": 9}, "layers.*there are 4"),
    ("attribution_patching", {"positions": 8}, "positions.*there are 8"),
    ("attribution_patching", {"heads": 8}, "heads.*there are 8"),
    ("attribution_patching", {"neurons": 0}, "neurons.*(goes with|must|no)"),
    ("attribution_patching", {"prepend_bos": True}, "prepend_bos|different numbers of tokens"),
    ("attribution_patching", {"checkpoint": ""}, "checkpoint is a path"),
    ("attribution_patching", {"every": -1.0}, "every"),
    *choice("attribution_patching", "direction"),
    *(line for name in ("check", "seed") for line in whole("attribution_patching", name, 0)),
    *(
        line
        for name in ("n_points", "top_n", "batch_size", "memory_limit", "rows_at_once")
        for line in whole("attribution_patching", name, 1)
    ),
    *whole("attribution_patching", "resamples", 2),
]
