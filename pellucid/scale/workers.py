"""Which share of a job this process does, and the threads it does it with.

Nothing is negotiated: shard k belongs to worker ``k % count``. A launcher is only asked for two numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from pellucid.arguments import check_count, check_kind, check_mapping
from pellucid.errors import InputError

T = TypeVar("T")

MOST_THREADS = 1024
"""More than any processor of today has; a million would end the process inside OpenMP."""


@dataclass(frozen=True)
class Worker:
    """One of ``count`` processes that share a job.

    Attributes:
        index: 0 to ``count - 1``.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_count("index", self.index, at_least=0)
        if not self.index < self.count:
            raise InputError(f"Of {self.count} workers there are 0 to {self.count - 1}; found index={self.index}.")

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """What of ``work`` is this worker's."""
        return work[self.index :: self.count]

    def __str__(self) -> str:
        return f"worker {self.index} of {self.count}"


def share_of(worker: Worker | None, work: Sequence[T]) -> Sequence[T]:
    """A worker's share, without a worker all of it.

    Raises:
        InputError: no :class:`Worker`.
    """
    return (Worker() if worker is None else check_kind("worker", worker, Worker, "a Worker")).share(work)


def worker_of_environment(environment: Mapping[str, str]) -> Worker:
    """The worker that a launcher says this process is.

    ``torchrun`` sets ``RANK`` and ``WORLD_SIZE``, a SLURM array ``SLURM_ARRAY_TASK_ID`` and its kin. With both (an array
    of jobs that each call ``torchrun``) every process of every task is a worker.

    Args:
        environment: ``os.environ``.

    Raises:
        InputError: variables that contradict each other.
    """
    check_mapping("environment", environment, "names of variables to their values, as os.environ does")
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if (rank is None) != (world is None):
        raise InputError("A launcher sets both RANK and WORLD_SIZE, and one of them is missing: set both or none.")
    task, tasks = 0, 1
    task_id = _number(environment, "SLURM_ARRAY_TASK_ID")
    if task_id is not None:
        first, step = _number(environment, "SLURM_ARRAY_TASK_MIN"), _number(environment, "SLURM_ARRAY_TASK_STEP")
        task, rest = divmod(task_id - (first or 0), step or 1)
        tasks = _number(environment, "SLURM_ARRAY_TASK_COUNT") or 1
        if rest or not 0 <= task < tasks:
            raise InputError(
                f"SLURM_ARRAY_TASK_ID={task_id} is not one of {tasks} tasks in equal steps: give the array as one range, "
                "such as --array=0-7."
            )
    return Worker(task * (world or 1) + (rank or 0), tasks * (world or 1))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise InputError(f"The environment variable {name} is a number; found {text!r}.")
    return int(text)


def check_threads(threads: int) -> int:
    """A number of threads that a processor may have.

    Raises:
        InputError: another one. With more than the system can start, torch ends the process.
    """
    return check_count("threads", threads, 1, MOST_THREADS)


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute with so many threads, whatever the launcher has set; matrix products round by it.

    Raises:
        InputError: fewer than one.
    """
    check_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
