"""A wrong path is refused at once, and an interrupt says what was kept and how to go on: every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import GROUP, invoke

ROOT = Path(__file__).parents[2]

WRONG = (
    ("demo", "--out", "{file}"),
    ("check", "./nowhere"),
    ("check", "{folder}"),
    ("check", "demo", "--out", "{file}"),
    ("check", "demo", "--out", "nowhere/report.json"),
    ("run", "./nowhere", "text"),
    ("run", "demo", "--prompt-file", "nowhere.txt"),
    ("run", "demo", "text", "--hooks", "hook_embed", "--out", "nowhere/x.safetensors"),
    ("run", "demo", "text", "--hooks", "hook_embed", "--out", "{file}"),
    ("neurons", "./nowhere"),
    ("neurons", "demo", "--text", "en=nowhere.txt"),
    ("neurons", "demo", "--text", "en={file}", "--text", "fr={file}", "--held-out", "en=nowhere.txt"),
    ("neurons", "demo", "--out", "{file}"),
    ("attribute", "./nowhere", "text"),
    ("attribute", "--out", "{file}"),
    ("attribute", "--picture", "nowhere/where.html"),
    ("circuit", "./nowhere"),
    ("circuit", "--out", "{file}"),
    ("circuit", "--picture", "nowhere/where.html"),
    ("lens", "./nowhere", "text"),
    ("lens", "demo", "text", "--out", "{file}"),
    ("lens", "demo", "text", "--picture", "nowhere/where.html"),
    ("heads", "./nowhere"),
    ("heads", "demo", "--out", "{file}"),
    ("heads", "demo", "--picture", "{file}"),
    ("steer", "./nowhere", "text"),
    ("steer", "demo", "text", "--out", "nowhere/x.safetensors"),
    ("steer", "demo", "text", "--positive-file", "nowhere.txt"),
    ("patch", "./nowhere"),
    ("patch", "--out", "{file}"),
    ("patch", "--picture", "nowhere/where.html"),
    ("patch", "--picture", "{file}"),
    ("harvest", "./nowhere", "--corpus", "en={file}", "--hooks", "hook_embed", "--out", "store"),
    ("harvest", "demo", "--corpus", "en=nowhere.txt", "--hooks", "hook_embed", "--out", "store"),
    ("harvest", "demo", "--corpus", "en={folder}", "--hooks", "hook_embed", "--out", "store"),
    ("harvest", "demo", "--corpus", "en={file}", "--hooks", "hook_embed", "--out", "{file}"),
    ("harvest", "demo", "--corpus", "en={file}", "--hooks", "hook_embed", "--out", "s", "--saelens", "{file}"),
)
"""A line of each kind of path that a command takes, wrong; ``{file}`` is there, ``{folder}`` is no model."""

TRY = """
import sys
from tests.command_line import invoke
for line in sys.stdin.read().splitlines():
    done = invoke(*line.split("\\t"))
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(done.exit_code, "Traceback" in done.output, loaded, repr(done.stderr), sep="\\t")
"""


def test_every_command_takes_part() -> None:
    assert {line[0] for line in WRONG} == set(GROUP.commands)


def test_a_wrong_path_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    lines = [[word.format(file=tmp_path / "file.txt", folder=tmp_path / "folder") for word in words] for words in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        input="\n".join("\t".join(line) for line in lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == len(lines)
    for words, answer in zip(lines, found, strict=True):
        code, traceback, loaded, said = answer.split("\t")
        assert (code, traceback, loaded) == ("2", "False", "[]"), (words, answer)
        assert said.startswith(("'error: ", '"error: ')), (words, said)
    assert {path.name for path in tmp_path.iterdir()} <= {"file.txt", "folder"}


INTERRUPTED_IN = {
    "demo": (("demo",), "pellucid.cli.demo.show_demo", "Nothing was written"),
    "check": (("check", "demo"), "pellucid.cli.check.check_model", "Nothing was written"),
    "run": (("run", "demo", "text"), "pellucid.cli.run.run_text", "Nothing was written"),
    "attribute": (("attribute",), "pellucid.cli.attribute.attribute_logit", "Nothing was written"),
    "circuit": (("circuit",), "pellucid.cli.circuit.find_circuit", "with --out FOLDER what was computed is"),
    "lens": (("lens", "demo", "text"), "pellucid.cli.lens.read_text", "Nothing was written"),
    "heads": (("heads", "demo"), "pellucid.cli.heads.score_heads", "Nothing was written"),
    "steer": (("steer", "demo", "text"), "pellucid.cli.steer.steer_model", "Nothing was written"),
    "patch": (("patch",), "pellucid.cli.patch.patch_model", "Nothing was written"),
    "neurons": (("neurons", "demo"), "pellucid.cli.neurons.find_neurons", "with --out FOLDER the counting is"),
    "harvest": (
        ("harvest", "demo", "--corpus", "en={file}", "--hooks", "hook_embed", "--out", "{out}"),
        "pellucid.cli.harvest.harvest_corpus",
        "No shard was finished",
    ),
}


@pytest.mark.parametrize("command", sorted(GROUP.commands))
def test_an_interrupt_says_what_was_kept(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    words, place, said = INTERRUPTED_IN[command]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "en.txt").write_text("text")
    monkeypatch.setattr(place, interrupt)
    done = invoke(*(word.format(file=tmp_path / "en.txt", out=tmp_path / "out") for word in words))
    assert done.exit_code == 130
    assert done.stderr.startswith("interrupted: ")
    assert said in done.stderr
    assert "ommand" in done.stderr  # how to go on: the same command


def test_what_is_kept_is_counted(tmp_path: Path) -> None:
    from pellucid.cli.files import kept_of_store, kept_of_study

    for name in ("job.json", "00000.json", "00001.json", "manifest.json"):
        (tmp_path / name).write_text("{}")
    assert kept_of_store(tmp_path).startswith("2 finished shards are kept")
    assert "Nothing was counted" in kept_of_study(tmp_path)
    (tmp_path / "counting" / "0").mkdir(parents=True)
    (tmp_path / "counting" / "0" / "collected.safetensors").write_bytes(b"")
    assert "goes on from there" in kept_of_study(tmp_path)
