"""Models and pairs that the tests of gradients and attribution share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.attribution.cells import SiteCells, find_site_cells
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import read_prompts
from pellucid.sweep import LogitDifference
from pellucid.sweep.unedited import Unedited
from tests.families import in_float64, make_family, of_each_layout, smooth
from tests.models import make_bloom, random_tokens

METRIC = LogitDifference(5, 9)
LAYOUTS = ["bloom", *in_float64(of_each_layout())]
LENGTH = 7


@cache
def bridge_of(name: str) -> TransformerBridge:
    """A float64 model of a family."""
    return TransformerBridge(make_bloom(torch.float64) if name == "bloom" else make_family(name, torch.float64))


@cache
def smooth_bridge_of(name: str) -> TransformerBridge:
    """A float64 model of a family whose forward is smooth, for what is compared with steps: see ``tests.families.smooth``."""
    settings = {} if name == "bloom" else smooth(name)
    return TransformerBridge(make_family(name, torch.float64, **settings)) if settings else bridge_of(name)


def exactness(bridge: TransformerBridge) -> float:
    """1e-9 where all of a float64 model computes in float64 while it is hooked, 1e-5 where a part of it takes float32."""
    return 1e-9 if bridge.adapter.family.float64 else 1e-5


def pair(rows: int = 2) -> tuple[Tensor, Tensor]:
    """Clean and corrupted ids ``[row, pos]``, which differ at positions 1 and 3."""
    clean = random_tokens(rows, LENGTH, seed=1)
    corrupted = clean.clone()
    corrupted[:, [1, 3]] = random_tokens(rows, 2, seed=2)
    return clean, corrupted


def runs(bridge: TransformerBridge, rows: int = 2) -> tuple[Unedited, Unedited]:
    """The corrupted run, which is patched, and the clean run."""
    clean, corrupted = pair(rows)
    return read_prompts(bridge, corrupted).unedited(bridge), read_prompts(bridge, clean).unedited(bridge)


def cells(bridge: TransformerBridge, site: str, by: Any, **options: Any) -> SiteCells:
    """The cells of a site, for :func:`pair`."""
    return find_site_cells(bridge, read_prompts(bridge, pair()[1]), site, by, SweepOptions(**options))


def score(logits: Tensor) -> Tensor:
    """``[row]``: :data:`METRIC`."""
    return logits[:, -1, 5] - logits[:, -1, 9]


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Equal relative to the largest number."""
    worst = float((found - expected).abs().max())
    assert worst <= bound * max(float(expected.abs().max()), 1e-12), (worst, float(expected.abs().max()))
