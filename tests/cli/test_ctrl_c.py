"""Ctrl-C for real: a signal to a running process, what it says, and that the same command goes on from what was kept."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import forked

LONG = "Everyone has the right to life, liberty and security of person.\n" * 500


# The process runs this before anything else. The signal is sent by the process itself, where it next puts a finished file in
# its place after those that are waited for are there: a test that waits for them from outside is late on a slow machine (the
# command was over before the signal came), and at any event at all (an import's open) somebody else's bare except may take
# the interrupt. Who runs the tests in the background of a script has SIGINT ignored, and every process of theirs begins so.
SENT_WHEN_THERE = """
import glob, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
waiting = [True]
def hook(event, arguments):
    if event in ("os.rename", "os.link") and waiting and len(glob.glob({files!r})) >= {count}:
        waiting.clear()
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
"""


def interrupted(command: list[str], folder: Path, files: str, count: int = 1) -> tuple[int, str]:
    """Exit code and standard error of a process that gets SIGINT once ``count`` paths match ``files``."""
    sends = SENT_WHEN_THERE.format(files=str(folder / files), count=count)
    done = forked.run(command, cwd=folder, before=sends)
    return done.returncode, done.stderr


def again(command: list[str], folder: Path) -> str:
    done = forked.run(command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_harvest_keeps_its_shards(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(LONG, "utf-8")
    command = ["-m", "pellucid", "harvest", "demo", "--corpus", "en=en.txt", "--hooks", "blocks.0.hook_resid_pre"]
    command += ["--batches-per-shard", "2", "--context", "64", "--out", "store"]
    store = tmp_path / "store"

    def shards() -> int:
        return sum(record.stem.isdecimal() for record in store.glob("*.json"))

    code, said = interrupted(command, tmp_path, "store/[0-9]*.json", count=2)
    assert code == 130, said
    assert said.splitlines()[-1] == (
        f"interrupted: {shards()} finished shards are kept in store: the same command goes on from there."
    )
    kept = shards()
    made, total = (int(word) for word in again(command, tmp_path).split(": ")[1].split(" shards")[0].split(" of "))
    assert made == total - kept


@pytest.mark.parametrize("kept", [True, False])
def test_neurons_keeps_its_counts(kept: bool, tmp_path: Path) -> None:
    for language in ("en", "fr"):
        (tmp_path / f"{language}.txt").write_text(LONG, "utf-8")
    command = ["-m", "pellucid", "neurons", "demo", "--text", "en=en.txt", "--text", "fr=fr.txt", "--context", "64"]
    command += ["--measured-tokens", "0", "--examples", "0", "--out", "study"]
    counting = tmp_path / "study" / "counting"
    code, said = interrupted(command, tmp_path, "study/counting/*/*.safetensors" if kept else "study")
    assert code == 130, said
    state = any(counting.glob("*/*.safetensors"))
    assert state or not kept
    assert said.splitlines()[-1] == (
        "interrupted: What was counted is in study/counting: the same command goes on from there. No result was written."
        if state
        else "interrupted: Nothing was counted yet; study has no result. Give the same command again."
    )
    assert not (tmp_path / "study" / "neurons.json").exists()


COLLECT = """
from pellucid.corpora import Corpus
from pellucid.demo import load_demo_bridge
from pellucid.running_stats import CountPositive
bridge = load_demo_bridge()
corpus = Corpus.from_text({"en": "en.txt"}, bridge.tokenizer, context=64)
found = bridge.collect(corpus, {"blocks.0.mlp.hook_post": [CountPositive()]}, checkpoint="state", every=0.01)
print(found.n_tokens["en"] == corpus.tokens("en"))
"""


def test_a_collection_goes_on(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(LONG, "utf-8")
    code, said = interrupted(["-c", COLLECT], tmp_path, "state/*.safetensors")
    assert code in (130, -signal.SIGINT)
    assert said.splitlines()[-1] == (
        "KeyboardInterrupt: the state is in state/collected.safetensors; the same call goes on from there"
    )
    assert again(["-c", COLLECT], tmp_path) == "True\n"
