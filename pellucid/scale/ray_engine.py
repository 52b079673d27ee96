"""The same job on a Ray cluster: one task a shard (extra ``distributed``).

Ray hands out shards, starts a task again whose worker was killed, and is asked for nothing else: what is done is what is on
the disk, which every worker has to see. A worker process opens the model and the corpus once and keeps them.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pellucid.arguments import check_count, check_function, check_number
from pellucid.errors import MissingExtraError
from pellucid.progress import progress_bar
from pellucid.scale.harvest import Harvester, HarvestReport

OpenJob = Callable[[], Harvester]
"""Loads the model, opens the corpus and the folder. It is sent to Ray's workers: a function of a module they can import."""

_opened: dict[str, Harvester] = {}
"""In a Ray worker: the job it works on."""


def harvest_on_ray(
    open_job: OpenJob,
    *,
    tasks: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_retries: int = 3,
    progress: bool | None = None,
) -> HarvestReport:
    """Make every shard that is not done, ``tasks`` at a time.

    A Ray that is initialised is used; otherwise one is started on this machine, and ended. It listens on every network
    interface, as Ray does, and lets in only who knows the token in ``~/.ray``, unless ``RAY_AUTH_MODE=disabled`` is set.
    The token is made readable to this user alone.

    Args:
        open_job: see :data:`OpenJob`.
        tasks: how many shards are computed at a time; as many processes hold the model.
        num_cpus: of Ray's logical CPUs, for one task.
        num_gpus: for one task.
        max_retries: how often a task is started again after its worker died; -1 for as often as it takes.
        progress: show a bar; ``None`` shows it on a terminal only.

    Raises:
        InputError: fewer than one task.
        MissingExtraError: Ray is not installed.
        PellucidError: what a task raised.
    """
    check_function("open_job", open_job, "a function that makes a Harvester")
    check_count("tasks", tasks)
    check_number("num_cpus", num_cpus, at_least=0)
    check_number("num_gpus", num_gpus, at_least=0)
    check_count("max_retries", max_retries, at_least=-1)
    try:
        import ray
    except ImportError:
        raise MissingExtraError("This engine needs Ray: pip install 'pellucid[distributed]'.") from None
    started = not ray.is_initialized()
    if started:
        _keep_token_private()
        # Its scheduler counts itself: with exactly as many CPUs as tasks, some would wait.
        ray.init(num_cpus=max(2, round(tasks * num_cpus) + 1), include_dashboard=False, log_to_driver=False)
        _keep_token_private()
    try:
        return _hand_out(ray, open_job, tasks, num_cpus, num_gpus, max_retries, progress)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if started:
            ray.shutdown()


def _keep_token_private() -> None:
    """See that nobody else can read Ray's token, which Ray writes as the umask has it: who knows it can run code.

    Called before Ray starts, so that the folder is closed when the token is written, and after.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if token.is_file() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def _hand_out(
    ray: Any, open_job: OpenJob, tasks: int, num_cpus: float, num_gpus: float, max_retries: int, progress: bool | None
) -> HarvestReport:
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": max_retries}
    name = secrets.token_hex(8)
    plan = ray.remote(**options)(_unfinished)
    make = ray.remote(**options)(_make)
    n_shards, missing = ray.get(plan.remote(name, open_job))
    rows, waiting = 0, list(reversed(missing))
    running: list[Any] = []
    with progress_bar(total=len(missing), desc="harvesting on Ray", unit=" shards", show=progress) as bar:
        while waiting or running:
            while waiting and len(running) < tasks:
                running.append(make.remote(name, open_job, waiting.pop()))
            done, running = ray.wait(running, num_returns=1)
            rows += sum(ray.get(done))
            bar.update(len(done))
    finished = ray.get(ray.remote(**options)(_finish).remote(name, open_job))
    return HarvestReport(n_shards, n_shards, len(missing), rows, finished)


def _job(name: str, open_job: OpenJob) -> Harvester:
    if name not in _opened:
        _opened[name] = open_job()
    return _opened[name]


def _unfinished(name: str, open_job: OpenJob) -> tuple[int, list[int]]:
    folder = _job(name, open_job).folder
    return len(folder.job.shards), [shard.index for shard in folder.job.shards if not folder.is_done(shard.index)]


def _make(name: str, open_job: OpenJob, shard: int) -> int:
    return _job(name, open_job).harvest_shard(shard).rows


def _finish(name: str, open_job: OpenJob) -> bool:
    return _job(name, open_job).folder.finish()
