"""Stores: harvesting, reading, exporting, and statistics over processes."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import running_stats
from pellucid.scale import harvest, ray_engine, saelens, statistics, stored_activations, workers
from tests.arguments.bench import (
    BRIDGE, CORPUS, NAN, POST, Bench, Call, Line, Of, a_path, a_text, bound, choice, entered, made, not_run, number, whole,
)  # fmt: skip

JOB: dict[str, Any] = {"bridge": BRIDGE, "corpus": CORPUS, "hooks": [POST], "out": "out"}


def store(name: str, /, **works: Any) -> Call:
    """A method of the reader."""
    return bound(lambda bench: bench.store, getattr(stored_activations.StoredActivations, name), **works)


CALLS: dict[str, Call] = {
    "harvest": made(harvest.harvest, **JOB, progress=False),
    "Harvester": made(harvest.Harvester, **JOB),
    "Harvester.harvest_shard": bound(
        lambda bench: harvest.Harvester(bench.bridge, bench.corpus, [POST], bench.folder / "steps"),
        harvest.Harvester.harvest_shard,
        index=0,
    ),
    "Harvester.run": bound(
        lambda bench: harvest.Harvester(bench.bridge, bench.corpus, [POST], bench.folder / "steps"),
        harvest.Harvester.run,
    ),
    "harvest_on_ray": not_run(made(ray_engine.harvest_on_ray, open_job=print, tasks=1)),
    "export_to_saelens": not_run(
        made(saelens.export_to_saelens, store=Of(lambda bench: bench.store), hooks=POST, out="out")
    ),
    "collect_shards": made(
        statistics.collect_shards,
        bridge=BRIDGE,
        corpus=CORPUS,
        statistics={POST: [running_stats.CountPositive()]},
        out="out",
        progress=False,
    ),
    "merge_shards": not_run(made(statistics.merge_shards, out="out")),
    "StoredActivations": made(stored_activations.StoredActivations, path=Of(lambda bench: bench.folder / "store")),
    "StoredActivations.batches": entered(store("batches", batch_size=2)),
    "StoredActivations.random_rows": store("random_rows", count=2),
    "StoredActivations.rows": store("rows", numbers=[0]),
    "StoredActivations.shard": store("shard", index=0, hook=POST),
    "StoredActivations.column": store("column", index=0, name="token"),
    "StoredActivations.label_of": store("label_of", index=0),
    "StoredActivations.sequences_of": store("sequences_of", index=0),
    "Worker": made(workers.Worker),
    "Worker.share": bound(lambda _: workers.Worker(), workers.Worker.share, work=[1]),
    "worker_of_environment": made(workers.worker_of_environment, environment={}),
}

REFUSED: list[Line] = []
