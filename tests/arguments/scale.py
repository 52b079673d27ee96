"""Stores: harvesting, reading, exporting, and statistics over processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from pellucid import running_stats
from pellucid.scale import collect_shards, harvest, ray_engine, saelens, stored_activations, workers
from tests.arguments.bench import (
    BRIDGE,
    CORPUS,
    POST,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    choice,
    entered,
    made,
    not_run,
    number,
    whole,
)

JOB: dict[str, Any] = {"bridge": BRIDGE, "corpus": CORPUS, "hooks": [POST], "out": "out"}


def store(name: str, /, **works: Any) -> Call:
    """A method of the reader."""
    return bound(lambda bench: bench.store, getattr(stored_activations.StoredActivations, name), **works)


CALLS: dict[str, Call] = {
    "harvest": made(harvest.harvest, **JOB, progress=False),
    "Harvester": made(harvest.Harvester, **JOB),
    "Harvester.harvest_shard": bound(
        lambda bench: harvest.Harvester(bench.bridge, bench.corpus, [POST], Path(tempfile.mkdtemp(dir=bench.folder))),
        harvest.Harvester.harvest_shard,
        index=0,
    ),
    "Harvester.run": bound(
        lambda bench: harvest.Harvester(bench.bridge, bench.corpus, [POST], Path(tempfile.mkdtemp(dir=bench.folder))),
        harvest.Harvester.run,
    ),
    "harvest_on_ray": not_run(made(ray_engine.harvest_on_ray, open_job=print, tasks=1)),
    "export_to_saelens": not_run(
        made(saelens.export_to_saelens, store=Of(lambda bench: bench.store), hooks=POST, out="out")
    ),
    "collect_shards": made(
        collect_shards.collect_shards,
        bridge=BRIDGE,
        corpus=CORPUS,
        statistics={POST: [running_stats.CountPositive()]},
        out="out",
        progress=False,
    ),
    "merge_shards": not_run(made(collect_shards.merge_shards, out="out")),
    "StoredActivations": made(stored_activations.StoredActivations, path=Of(lambda bench: bench.folder / "store")),
    "StoredActivations.batches": entered(store("batches", batch_size=2)),
    "StoredActivations.random_rows": store("random_rows", count=2),
    "StoredActivations.rows": store("rows", numbers=[0]),
    "StoredActivations.shard": store("shard", index=0, hook=POST),
    "StoredActivations.column": store("column", index=0, name="token"),
    "StoredActivations.label_of": store("label_of", index=0),
    "StoredActivations.sequences_of": store("sequences_of", index=0),
    "Worker": made(workers.Worker),
    "worker_of_environment": made(workers.worker_of_environment, environment={}),
}

REFUSED: list[Line] = [
    *(
        line
        for name in ("harvest", "Harvester", "collect_shards")
        for line in (
            *whole(name, "batch_size", 1),
            *whole(name, "batches_per_shard", 1),
            *whole(name, "threads", 1),
            *choice(name, "padding_side"),
            *a_path(name, "out"),
            (name, {"threads": 10**9}, "threads must be at most 1024"),
            (name, {"corpus": 3}, "corpus is a Corpus"),
            (name, {"labels": 3}, "labels is a list of strings"),
            (name, {"labels": []}, "labels is a list of strings; found an empty one"),
            (name, {"labels": ["de"]}, "no label 'de'"),
        )
    ),
    *(
        line
        for name in ("harvest", "Harvester")
        for line in (
            *a_text(name, "model_name"),
            *a_text(name, "revision"),
            (name, {"hooks": 3}, "hooks is a name, a glob, a list"),
            (name, {"hooks": []}, "The list given as hooks is empty"),
            (name, {"hooks": [3]}, "hooks takes names; found 3"),
            (name, {"hooks": "blocks.0.attn.hook_pattern"}, "cannot be stored"),
            (name, {"dtype": torch.int64}, "dtype: activations are stored as one of .*found torch.int64"),
            (name, {"dtype": "float32"}, "dtype: .*found 'float32'"),
        )
    ),
    *((name, {"worker": 3}, "worker is a Worker") for name in ("harvest", "Harvester.run", "collect_shards")),
    ("collect_shards", {"statistics": {}}, "statistics maps hook names"),
    ("collect_shards", {"statistics": 3}, "statistics maps hook names"),
    *whole("Harvester.harvest_shard", "index", 0),
    ("Harvester.harvest_shard", {"index": 99}, "index must be at most"),
    ("harvest_on_ray", {"open_job": 3}, "open_job is a function"),
    *whole("harvest_on_ray", "tasks", 1),
    *number("harvest_on_ray", "num_cpus", -1),
    *number("harvest_on_ray", "num_gpus", -1),
    *whole("harvest_on_ray", "max_retries", -1),
    ("export_to_saelens", {"store": 3}, "store is a StoredActivations"),
    ("export_to_saelens", {"hooks": []}, "hooks is a list of strings; found an empty one"),
    ("export_to_saelens", {"hooks": 3}, "hooks is a list of strings"),
    ("export_to_saelens", {"hooks": [POST, POST]}, "hooks are names to export, each once"),
    *a_path("export_to_saelens", "out"),
    *whole("export_to_saelens", "seed", 0),
    *a_path("merge_shards", "out"),
    *a_path("StoredActivations", "path"),
    ("StoredActivations", {"labels": []}, "labels is a list of strings; found an empty one"),
    ("StoredActivations", {"labels": "en"}, "labels is a list of strings; found the string 'en'"),
    ("StoredActivations", {"labels": [3]}, "an entry of labels is a string"),
    ("StoredActivations", {"labels": ["de"]}, "no label 'de'"),
    *whole("StoredActivations.batches", "batch_size", 1),
    *whole("StoredActivations.batches", "seed", 0),
    *whole("StoredActivations.batches", "epoch", 0),
    ("StoredActivations.batches", {"epoch": 1, "seed": None}, "epoch=1 would have no effect"),
    *whole("StoredActivations.batches", "shards_mixed", 1),
    *whole("StoredActivations.random_rows", "count", 0),
    ("StoredActivations.random_rows", {"count": 10**6}, "count must be at most"),
    *whole("StoredActivations.random_rows", "seed", 0),
    ("StoredActivations.rows", {"numbers": 3}, "numbers is a list"),
    ("StoredActivations.rows", {"numbers": [True]}, "an entry of numbers is a whole number"),
    ("StoredActivations.rows", {"numbers": [1.5]}, "an entry of numbers is a whole number"),
    ("StoredActivations.rows", {"numbers": [10**6]}, "numbers of rows are 0 to"),
    *(
        (name, {"hooks": wrong}, words)
        for name in ("batches", "random_rows", "rows")
        for name in (f"StoredActivations.{name}",)
        for wrong, words in (
            (POST, "hooks is a list of strings; found the string"),
            (3, "hooks is a list of strings"),
            ([], "hooks is a list of strings; found an empty one"),
            (["nonsense"], "'nonsense' is not stored here"),
        )
    ),
    *(
        line
        for name in ("shard", "column", "label_of", "sequences_of")
        for name in (f"StoredActivations.{name}",)
        for line in (*whole(name, "index", 0), (name, {"index": 99}, "index must be at most"))
    ),
    *a_text("StoredActivations.shard", "hook"),
    *choice("StoredActivations.column", "name"),
    *whole("Worker", "index", 0),
    *whole("Worker", "count", 1),
    ("Worker", {"index": 1}, "found index=1"),
    ("worker_of_environment", {"environment": 3}, "environment maps names"),
    ("worker_of_environment", {"environment": {"RANK": "0"}}, "RANK and WORLD_SIZE"),
]
