"""The bytes of files that people keep: a store, a state, counts. Whoever wrote one can read it, and go on in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from pellucid.analysis.language_neurons import LanguageNeurons, lape
from pellucid.running_stats import CountPositive, Histogram, MinMax, TopK, load_statistics, save_statistics
from pellucid.running_stats.base import Places
from pellucid.scale.shard_store import StoredHook, StoreFolder, StoreJob

EXTRA = {"job": {"labels": ["ü", "z"], "every": 1.5, "none": None}, "a": [1, 2]}
STORE = {
    "00000.blocks.0.hook_in.safetensors": "d73ae247e76691ff65988bb3f3697ca75895156890bdfbe355f90b1ed5f1ac25",
    "00000.json": "5beaac890d7cb5a7cdba1cc3ddefec0de8dd3d1ca66cc4ade472b69eac143313",
    "00000.rows.safetensors": "141982344c69a04706cc07a220da9b62f08b7fac2cd6fd3a68c523dfe45c6daa",
    "job.json": "ccaaa48bb5db4c20f4cee2b11f87709296785811b2d9d0ec69a5bae1dba6c728",
    "manifest.json": "b0ce70667c1a1697c77ae0a6bdfd80650fce972c47f5f6887a56e38a57953cec",
}
STATE = "b45c66619e54be653735fcec0ccb57af3075880f16cfa921d4ee2464e8b80608"
COUNTS = "a97660a5e9443cc2454b7753a92c40ca923f1a5c3ea4e3a6995b4d3ecfcaaabd"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_store(tmp_path: Path) -> None:
    hook = StoredHook("blocks.0.hook_in", ("blocks.0.hook_resid_pre",), ("d_model",), (3,), "BF16")
    settings = {"run": {"threads": 1, "b": "ü"}, "model": {"a": None}}
    job = StoreJob((hook,), {"ü": 2}, 2, 4, True, settings, {"model": {"name": "x"}})
    folder = StoreFolder.begin(tmp_path, job)
    numbers = torch.arange(8)
    columns = {
        "token": numbers.int(),
        "document": numbers // 4,
        "position": (numbers % 4).int(),
        "sequence": numbers // 4,
    }
    values = torch.arange(24.0).view(8, 3).to(torch.bfloat16)
    folder.write_shard(job.shards[0], {hook.name: values}, columns)
    assert folder.finish()
    assert {path.name: sha256(path) for path in sorted(tmp_path.iterdir())} == STORE


def test_a_state(tmp_path: Path) -> None:
    values = torch.arange(-12.0, 12.0).view(2, 4, 3)
    places = Places(torch.arange(2)[:, None].expand(2, 4), torch.arange(4).expand(2, 4))
    statistics = {
        "1": CountPositive(),
        "0": TopK(2),
        "2": MinMax(),
        "10": Histogram((-1.0, 0.5)),
        "3": CountPositive(1),
    }
    for key, statistic in statistics.items():
        if key != "3":  # one that has seen nothing
            statistic.update(values, None, places)
    save_statistics(tmp_path / "x", statistics, EXTRA)
    assert sha256(tmp_path / "x") == STATE
    found, extra = load_statistics(tmp_path / "x")
    assert extra == EXTRA
    assert list(found) == sorted(statistics)
    assert torch.equal(found["1"].result(), statistics["1"].result())


def test_counts(tmp_path: Path) -> None:
    counts = torch.arange(2 * 20 * 3).view(2, 20, 3)
    found = lape(counts, torch.tensor([200, 300, 400]), 0.1, 0.5, 0.5, languages=["en", "ü", "zh"])
    found.save(tmp_path / "x.safetensors")
    assert sha256(tmp_path / "x.safetensors") == COUNTS
    assert LanguageNeurons.load(tmp_path / "x.safetensors").document() == found.document()
