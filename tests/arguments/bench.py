"""What the tables of refused arguments are written with: things to call with, how a callable is called, and lines.

A line is a call, the arguments that are changed in one that works, and words of the error, which name the argument.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xarray as xr
from torch import Tensor

from pellucid import ActivationCache, Collected, Corpus, TransformerBridge, running_stats, sweep
from pellucid.analysis.expert_neurons import ExpertNeurons, Unit, expertise
from pellucid.analysis.language_neurons import LanguageNeurons, lape
from pellucid.patching import PatchingResult, make_df_from_ranges
from pellucid.scale.harvest import harvest
from pellucid.scale.stored_activations import StoredActivations

NAN, INF = float("nan"), float("inf")
POST = "blocks.0.mlp.hook_post"
TEXT = "Everyone has the right to life"
IDS = torch.tensor([[5, 6]])
MASK = torch.ones(1, 3)

Line: TypeAlias = tuple[str, dict[str, Any], str]


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
    folder: Path
    store: StoredActivations
    languages: LanguageNeurons
    experts: ExpertNeurons
    patched: PatchingResult
    array: xr.DataArray

    @property
    def unit(self) -> Unit:
        """One of the experts' units."""
        return self.experts.units[0]


def make_bench(bridge: TransformerBridge, folder: Path) -> Bench:
    """Everything small: 12 rows of one sentence, a shard or two, three languages of eight neurons."""
    ids = bridge.to_tokens(TEXT)
    _, cache = bridge.run_with_cache(ids)
    corpus = Corpus.from_documents({"en": [TEXT + "."] * 12}, bridge.tokenizer, context=8)
    statistics = {POST: [running_stats.CountPositive(), running_stats.TopK(2)]}
    collected = bridge.collect(corpus, statistics, progress=False)
    collected.save(folder / "collected.safetensors")
    harvest(bridge, corpus, [POST], folder / "store", batch_size=2, batches_per_shard=2, progress=False)
    (folder / "en.txt").write_text(TEXT + "\n", "utf-8")
    (folder / "en.jsonl").write_text(json.dumps({"text": TEXT}) + "\n", "utf-8")
    if find_spec("pyarrow") is not None:
        from pyarrow import parquet, table

        parquet.write_table(table({"text": [TEXT]}), folder / "en.parquet")
    languages = lape(torch.arange(48).reshape(2, 8, 3), [60, 60, 60], languages=["en", "fr", "zh"], top_rate=0.5)
    languages.save(folder / "languages.safetensors")
    generator = torch.Generator().manual_seed(0)
    responses = {POST: {label: torch.rand(4, 6, generator=generator) for label in ("en", "fr")}}
    patched = PatchingResult(
        torch.rand(2, 3, 4, generator=generator), ["layer", "pos"], make_df_from_ranges((2, 3), ("layer", "pos")),
        ["metric"], False, torch.zeros(4),
    )  # fmt: skip
    return Bench(
        bridge, ids, cache, corpus, collected, sweep.LogitDifference(10, 20),
        sweep.Edit("blocks.1.attn.hook_z", sweep.Zero(), heads=0), folder, StoredActivations(folder / "store"),
        languages, expertise(responses), patched, xr.DataArray([[1.0, 2.0], [3.0, 4.0]], dims=("layer", "head")),
    )  # fmt: skip


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A public callable: where its signature is, how it is called, and arguments with which it works."""

    of: Callable[..., Any]
    make: Callable[[Bench], Callable[..., Any]]
    works: Callable[[Bench], dict[str, Any]]
    is_run: bool = True
    """Whether the test calls it with what works: what takes seconds, or a network, is tried elsewhere."""


def made(of: Callable[..., Any], /, **works: Any) -> Call:
    """A class or function that is called as it is; what is a function of the bench is asked of it."""
    return Call(of, lambda _: of, lambda bench: asked(works, bench))


def asked(works: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The arguments, those that depend on the bench filled in."""
    return {name: value.get(bench) if isinstance(value, Of) else value for name, value in works.items()}


@dataclass(frozen=True)
class Of:
    """An argument that is taken from the bench."""

    get: Callable[[Bench], Any]


BRIDGE = Of(lambda bench: bench.bridge)
THE_IDS = Of(lambda bench: bench.ids)
CACHE = Of(lambda bench: bench.cache)
METRIC = Of(lambda bench: bench.metric)
CORPUS = Of(lambda bench: bench.corpus)
TOKENIZER = Of(lambda bench: bench.bridge.tokenizer)


def bound(owner: Callable[[Bench], Any], of: Callable[..., Any], /, **works: Any) -> Call:
    """A method of something on the bench."""
    name = of.__name__
    return Call(of, lambda bench: getattr(owner(bench), name), lambda bench: asked(works, bench))


def entered(call: Call) -> Call:
    """A context manager or an iterator: its beginning is what is called."""

    def make(bench: Bench) -> Callable[..., Any]:
        def begin(**given: Any) -> None:
            begun: AbstractContextManager[Any] | Iterator[Any] = call.make(bench)(**given)
            if isinstance(begun, AbstractContextManager):
                with begun:
                    return
            next(iter(begun), None)

        return begin

    return Call(call.of, make, call.works, call.is_run)


def not_run(call: Call) -> Call:
    """The same, whose working call is left to other tests."""
    return Call(call.of, call.make, call.works, is_run=False)


# -- lines -------------------------------------------------------------------------------------------------------------


def whole(call: str, argument: str, at_least: int | None = None, **more: Any) -> list[Line]:
    """An argument that is a whole number, within a bound."""
    wrong: list[Any] = [True, 1.5, NAN, "1", []]
    lines: list[Line] = [(call, {argument: value, **more}, f"{argument} is a whole number; found") for value in wrong]
    if at_least is not None:
        lines.append((call, {argument: at_least - 1, **more}, f"{argument} must be at least {at_least}; found"))
    return lines


def number(call: str, argument: str, *outside: float, **more: Any) -> list[Line]:
    """An argument that is a finite number, some values being out of range."""
    wrong: list[Any] = [True, "1", []]
    return [
        *((call, {argument: value, **more}, f"{argument} is a number; found") for value in wrong),
        *((call, {argument: value, **more}, f"{argument} must be finite; found") for value in (NAN, INF)),
        *((call, {argument: value, **more}, f"{argument} must be (at least|above|at most)") for value in outside),
    ]


def choice(call: str, argument: str, **more: Any) -> list[Line]:
    """An argument that is one of several words."""
    return [
        (call, {argument: value, **more}, rf"Invalid {argument}: .*{argument} must be one of")
        for value in ("nonsense", "", 3, [])
    ]


def a_path(call: str, argument: str, **more: Any) -> list[Line]:
    """An argument that is a file or a folder."""
    return [(call, {argument: value, **more}, rf"{argument} is a path; found") for value in ("", 3, True, [])]


def a_text(call: str, argument: str, **more: Any) -> list[Line]:
    """An argument that is a string with something in it."""
    return [
        (call, {argument: value, **more}, rf"{argument} is a string that is not empty; found")
        for value in ("", 3, ["x"])
    ]


def a_list(call: str, argument: str, *wrong: Any, **more: Any) -> list[Line]:
    """An argument that is a list: neither a string nor a number, nor empty."""
    return [(call, {argument: value, **more}, rf"{argument} is (a list|one|several)") for value in (3, *wrong)]
