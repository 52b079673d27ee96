"""Processes: torchrun, one of its workers killed, a command of its own; all on the embedded model. The long version, with
every kind of kill at many moments, is benchmarks/faults_harvest.py."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pellucid.demo import MODEL_FOLDER
from pellucid.scale.stored_activations import StoredActivations
from tests import forked
from tests.command_line import invoke as cli
from tests.scale.jobs import contents

ROOT = Path(__file__).parents[2]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each of two languages."""
    folder = tmp_path_factory.mktemp("text")
    held_out = json.loads((MODEL_FOLDER / "held_out.json").read_text("utf-8"))
    for label in ("en", "vi"):
        lines = [line.replace("\n", " ") for line in held_out[label]["sampled"]]
        (folder / f"{label}.txt").write_text("\n".join(lines), "utf-8")
    return {label: folder / f"{label}.txt" for label in ("en", "vi")}


def words(text: dict[str, Path], out: Path, *more: str) -> list[str]:
    files = [word for label, path in text.items() for word in ("--corpus", f"{label}={path}")]
    sizes = ["--context", "32", "--batches-per-shard", "1"]
    return ["harvest", "demo", *files, "--hooks", HOOK, *sizes, "--out", str(out), *more]


def test_a_killed_worker_costs_unfinished_shards_only(text: dict[str, Path], tmp_path: Path) -> None:
    done = cli(*words(text, tmp_path / "alone"))
    assert done.exit_code == 0, done.stderr
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    environment.pop("OMP_NUM_THREADS", None)  # the launcher sets its own
    with open(os.devnull, "r+") as nothing:
        command = [*torchrun, "-m", "pellucid", *words(text, tmp_path / "many")]
        launcher = forked.start(command, (nothing.fileno(),) * 3, env=environment)
    while launcher.exitcode is None and len(list((tmp_path / "many").glob("?????.json"))) < 3:
        time.sleep(0.01)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not workers.exists():
        pytest.skip("no list of child processes here")
    for worker in workers.read_text().split()[:1]:
        os.kill(int(worker), signal.SIGKILL)
    launcher.join()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "many").glob("?????.json")}
    again = cli(*words(text, tmp_path / "many", "--format", "json"))
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["written"] <= report["shards"] - len(kept)
    assert {name: (tmp_path / "many" / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")


def test_the_command(text: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cli(*words(text, tmp_path / "x", "--worker", "0/2", "--store-dtype", "bfloat16"))
    assert first.exit_code == 0, first.stderr
    assert "worker 0 of 2" in first.stdout
    assert "is not finished" in first.stdout
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = cli(*words(text, tmp_path / "x", "--store-dtype", "bfloat16"))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert "worker 1 of 2" in second.stdout
    store = StoredActivations(tmp_path / "x")
    assert f"{len(store):,} rows in {store.n_shards} shards" in second.stdout
    third = cli(
        *words(
            text, tmp_path / "x", "--store-dtype", "bfloat16", "--saelens", str(tmp_path / "sae"), "--format", "json"
        )
    )
    assert third.exit_code == 0, third.stderr
    assert json.loads(third.stdout)["saelens_rows"] * 32 == len(store) == json.loads(third.stdout)["rows_stored"]
    assert store.job.remarks["model"] == {"name": "demo", "revision": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hooks", "blocks.9.hook_resid_post"], "layers, 0 to 3"),
        (["--worker", "2/2"], "Of 2 workers"),
        (["--worker", "x"], "INDEX/COUNT"),
        (["--corpus", "en=nowhere.txt"], "does not exist"),
        (["--corpus", "en={folder}/notes.doc"], "could be anything"),
        (["--corpus", "de={folder}/more.jsonl"], "files of one kind"),
        (["--separator", "dash"], "'eos', 'none' or a token id"),
        (["--saelens", "x", "--worker", "0/2"], "when the workers are done"),
        (["--ray", "2", "--worker", "0/2"], "without a launcher"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(
    change: list[str], message: str, text: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("notes.doc", "more.jsonl"):
        (tmp_path / name).write_text("{}")
    done = cli(*words(text, tmp_path / "x", *(word.format(folder=tmp_path) for word in change)))
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "x").exists()
