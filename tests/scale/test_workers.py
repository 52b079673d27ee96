"""Shares and launchers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.errors import InputError
from pellucid.scale.workers import Worker, fixed_threads, worker_of_environment


@given(work=st.integers(0, 50), count=st.integers(1, 20))
def test_shares_are_everything_once(work: int, count: int) -> None:
    shares = [Worker(index, count).share(range(work)) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(work))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def array(task: int, first: int, count: int, step: int = 1) -> dict[str, str]:
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, Worker(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Worker(2, 4)),
        (array(5, 0, 8), Worker(5, 8)),
        (array(3, 1, 8), Worker(2, 8)),
        (array(14, 10, 3, step=2), Worker(2, 3)),
        (array(1, 0, 3) | {"RANK": "1", "WORLD_SIZE": "2"}, Worker(3, 6)),
    ],
)
def test_what_a_launcher_says(environment: dict[str, str], worker: Worker) -> None:
    assert worker_of_environment(environment) == worker


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        array(7, 0, 3),
        array(3, 0, 3, step=2),
    ],
)
def test_what_contradicts_itself_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError):
        worker_of_environment(environment)


def test_an_array_and_torchrun_together_are_every_worker_once() -> None:
    found = [
        worker_of_environment(array(task, 0, 3) | {"RANK": str(rank), "WORLD_SIZE": "4"})
        for task in range(3)
        for rank in range(4)
    ]
    assert sorted(worker.index for worker in found) == list(range(12))


def test_threads() -> None:
    with pytest.raises(InputError, match="at least 1"), fixed_threads(0):
        pass
