"""``pellucid harvest``: activations of a corpus in a folder, on one process or many, begun or gone on with.

Under ``torchrun`` or in a SLURM array every process takes its share; with ``--ray`` one process hands out shards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.text import Text

from pellucid.cli.corpus import CorpusRequest, open_corpus
from pellucid.cli.mistakes import note
from pellucid.cli.models import DTYPES, commit_of, open_bridge, read_hook_index
from pellucid.cli.options import DEMO, Dtype, Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.run import choose_hooks
from pellucid.cli.terminal import results
from pellucid.errors import InputError
from pellucid.names import Flag
from pellucid.scale.harvest import Harvester, HarvestReport, idle_threads
from pellucid.scale.ray_engine import harvest_on_ray
from pellucid.scale.saelens import export_to_saelens
from pellucid.scale.stored_activations import StoredActivations
from pellucid.scale.workers import Worker, worker_of_environment
from pellucid.storage.json_text import Json


@dataclass(frozen=True)
class HarvestRequest:
    """What to store, where and how."""

    corpus: CorpusRequest
    hooks: tuple[str, ...]
    out: Path
    batch_size: int = 8
    batches_per_shard: int | None = None
    store_dtype: Dtype = Dtype.auto
    threads: int = 1
    worker: str | None = None
    ray_tasks: int | None = None
    saelens: Path | None = None


def harvest_corpus(choice: ModelChoice, request: HarvestRequest, format: Format) -> None:
    """Harvest and print what is there.

    Raises:
        PellucidError: what cannot be done, before it is begun or with what was done kept; see
            :class:`~pellucid.scale.harvest.Harvester`.
    """
    if not request.hooks:
        raise InputError("Say what to store: --hooks NAME, such as --hooks 'blocks.*.hook_resid_post'.")
    choose_hooks(read_hook_index(choice), request.hooks)  # a wrong name is refused before the weights are loaded
    worker = _worker(request.worker)
    if request.saelens is not None and worker.count > 1:
        raise InputError("--saelens exports what is finished: give it to one process, when the workers are done.")
    if request.ray_tasks is not None:
        if worker.count > 1:
            raise InputError("--ray hands out shards itself: start it in one process, without a launcher.")
        report = harvest_on_ray(partial(open_harvester, choice, request), tasks=request.ray_tasks)
    else:
        idle = idle_threads(request.threads)
        if idle and worker.count == 1 and choice.device in (None, "cpu") and sys.stderr.isatty():
            every = request.threads + idle
            note(f"{request.threads} of {every} CPU threads are used; --threads {every} uses all.")
        report = open_harvester(choice, request).run(worker, progress=None if worker.index == 0 else False)
    exported = None
    if request.saelens is not None and report.finished:
        store = StoredActivations(request.out)
        has_glob = any(mark in name for name in request.hooks for mark in "*?[")
        exported = export_to_saelens(store, list(store.hooks if has_glob else request.hooks), request.saelens)
    _tell(request, report, worker, exported, format)


def open_harvester(choice: ModelChoice, request: HarvestRequest) -> Harvester:
    """The job on its model, corpus and folder; also what a Ray worker calls."""
    bridge = open_bridge(choice)
    names, flags = choose_hooks(read_hook_index(choice), request.hooks)
    setters: dict[Flag, Callable[[bool], None]] = {
        "use_attn_result": bridge.set_use_attn_result,
        "use_split_qkv_input": bridge.set_use_split_qkv_input,
        "use_attn_in": bridge.set_use_attn_in,
        "use_hook_mlp_in": bridge.set_use_hook_mlp_in,
    }
    for flag in flags:  # for good: the job is run by whom it is given to
        setters[flag](True)
    name = choice.name if choice.is_demo or not os.path.isdir(choice.name) else Path(choice.name).resolve().name
    return Harvester(
        bridge,
        open_corpus(request.corpus, bridge.tokenizer),
        names,
        request.out,
        batch_size=request.batch_size,
        batches_per_shard=request.batches_per_shard,
        dtype=DTYPES.get(request.store_dtype),
        threads=request.threads,
        model_name=name,
        revision=None if name == DEMO else commit_of(choice) or choice.revision,
    )


def _worker(given: str | None) -> Worker:
    if given is None:
        return worker_of_environment(os.environ)
    index, found, count = given.partition("/")
    if not found or not index.isdecimal() or not count.isdecimal():
        raise InputError(f"--worker takes INDEX/COUNT counted from 0, such as 0/4; found {given!r}.")
    return Worker(int(index), int(count))


def _tell(request: HarvestRequest, report: HarvestReport, worker: Worker, exported: int | None, format: Format) -> None:
    facts: dict[str, Json] = {
        **asdict(report),
        "worker": worker.index,
        "workers": worker.count,
        "out": str(request.out),
    }
    store = StoredActivations(request.out) if report.finished else None
    if store is not None:
        facts |= {"rows_stored": len(store), "bytes_stored": store.nbytes, "saelens_rows": exported}
    if format is Format.json:
        write_json(facts)
        return
    console = results(format)
    console.print(Text(f"{worker}: {report.written} of {report.share} shards made now, {report.rows:,} rows", "bold"))
    if store is None:
        console.print(f"{request.out} is not finished: other workers make the rest of its {report.shards} shards.")
        return
    stored = table("stored", "row", "dtype", numbers=("row",))
    for hook in store.job.hooks:
        stored.add_row(hook.name, " × ".join(map(str, hook.shape)), hook.dtype)
    console.print(stored)
    console.print(
        Text(f"{len(store):,} rows in {report.shards} shards, {store.nbytes:,} bytes, in {request.out}", "bold")
    )
    if exported is not None:
        console.print(Text(f"{exported:,} sequences for SAELens in {request.saelens}", "bold"))
