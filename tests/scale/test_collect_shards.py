"""Statistics over workers: integers as in one pass, floats with equal bits for any number of workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid.errors import HookNameError, InputError, OtherJobError, StoreError
from pellucid.running_stats import CountPositive, MeanVariance, MinMax, TopK
from pellucid.scale.collect_shards import CollectReport, collect_shards, merge_shards
from pellucid.scale.workers import Worker
from tests.scale.jobs import BATCH, NEURONS, RESIDUAL, contents, make_bridge, padded


def asked() -> dict[str, Any]:
    return {NEURONS: [CountPositive(), TopK(5), MeanVariance()], RESIDUAL: [MinMax()]}


def collect(out: Path, **given: Any) -> CollectReport:
    settings = {"statistics": asked(), "batch_size": BATCH, "batches_per_shard": 2, "progress": False} | given
    return collect_shards(settings.pop("bridge", None) or make_bridge(), padded(), out=out, **settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "alone"
    assert collect(out).finished
    return out


def test_integers_are_those_of_one_pass_and_floats_within_rounding(alone: Path) -> None:
    once = make_bridge().collect(padded(), asked(), batch_size=BATCH, progress=False)
    merged = merge_shards(alone)
    assert merged.n_tokens == once.n_tokens
    assert merged.n_rows == once.n_rows
    for label in once.labels:
        for hook, names in ((NEURONS, ("count_positive", "top_5")), (RESIDUAL, ("min_max",))):
            for name in names:
                ours, theirs = merged.get(hook, name, label).state_dict(), once.get(hook, name, label).state_dict()
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        ours, theirs = (each.get(NEURONS, "mean_variance", label).result() for each in (merged, once))
        for found, expected in zip(ours, theirs, strict=True):
            # float64 sums of some hundred numbers, added up in another order
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_equal_bits(count: int, alone: Path, tmp_path: Path) -> None:
    for index in reversed(range(count)):
        report = collect(tmp_path / "x", worker=Worker(index, count))
    assert report.finished
    assert contents(tmp_path / "x") == contents(alone)
    merge_shards(tmp_path / "x").save(tmp_path / "ours.safetensors")
    merge_shards(alone).save(tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_damage_is_named_and_mended_and_other_jobs_are_refused(alone: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(alone, tmp_path / "x"))
    path = out / "00003.statistics.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard 3 is damaged: 00003\.statistics\.safetensors"):
        merge_shards(out)
    (out / "00002.json").unlink()
    with pytest.raises(StoreError, match="shard 2 of"):
        merge_shards(out)
    assert collect(out).written == 2
    assert contents(out) == contents(alone)
    with pytest.raises(OtherJobError, match="statistics"):
        collect(out, statistics={NEURONS: [CountPositive()]})
    with pytest.raises(OtherJobError, match=r"run\.threads 1 \(asked for: 2\)"):
        collect(out, threads=2)
    with pytest.raises(HookNameError):
        collect(tmp_path / "y", statistics={"blocks.0.mlp.hook_pots": [CountPositive()]})
    with pytest.raises(InputError, match="at least 1"):
        collect(tmp_path / "y", batches_per_shard=0)
    assert not (tmp_path / "y").exists()
