"""No option is accepted and ignored: every option of every command is refused by its name when it is out of range.

``WRONG`` has values for each option; a second test asks the commands, so that a new option without a line fails. What is
refused by the type of an option ("x" for a number) is the parser's, and tried all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.command_line import GROUP, invoke

WRONG: Mapping[str, Sequence[str]] = {
    "--activation-bar-ratio": ("x", "-1", "2", "nan"),
    "--against": ("x",),
    "--agreement": ("", "x.gif"),
    "--answer": ("",),
    "--attn-implementation": ("x",),
    "--axes": ("nonsense", ""),
    "--batch-size": ("x", "0", "1.5"),
    "--batches-per-shard": ("x", "0"),
    "--by": ("nonsense", ""),
    "--check": ("x", "-1"),
    "--clean": ("",),
    "--context": ("x", "0"),
    "--corpus": ("", "en=", "en=nowhere.txt"),
    "--corrupted": ("",),
    "--device": ("nowhere", ""),
    "--direction": ("x",),  # of patch; of steer, a file
    "--document": ("x",),
    "--dtype": ("x",),
    "--edges": ("x", "0", "9999999"),
    "--examples": ("x", "-1"),
    "--expert-documents": ("x", "0"),
    "--experts": ("x", "-1"),
    "--field": ("",),
    "--filter-rate": ("x", "-1", "2", "nan"),
    "--foil": ("",),
    "--format": ("x",),
    "--heads": ("x", "99", ""),
    "--held-out": ("", "en=nowhere.txt"),
    "--held-out-share": ("x", "-1", "2", "nan"),
    "--hooks": ("nonsense", ""),
    "--layers": ("x", "99", ""),
    "--length": ("x", "1"),
    "--lens": ("nowhere.safetensors", ""),
    "--match": ("x",),
    "--max-new-tokens": ("x", "0"),
    "--measured-tokens": ("x", "-1"),
    "--memory-limit": ("x", "-1", "nan"),
    "--method": ("x",),
    "--metric": ("x",),
    "--n-points": ("x", "0"),
    "--negative": ("",),
    "--negative-file": ("", "nowhere.txt"),
    "--neurons": ("x", "0"),
    "--out": ("",),
    "--outside": ("x",),
    "--packing": ("x",),
    "--pairs": ("", "nowhere.csv"),
    "--pattern": ("nonsense", ""),
    "--picture": ("", "x.gif"),
    "--points": ("x", "0"),
    "--position": ("x", "99", "0,1", ""),
    "--positions": ("x", "99", ""),
    "--positive": ("",),
    "--positive-file": ("", "nowhere.txt"),
    "--prompt": ("",),
    "--prompt-file": ("", "nowhere.txt"),
    "--prompts": ("x", "0"),
    "--random-sets": ("x", "-1"),
    "--randoms": ("x", "-1"),
    "--ray": ("x", "-1"),
    "--relevance": ("x",),
    "--relevance-tokens": ("x", "0"),
    "--repeats": ("x", "1"),
    "--revision": ("",),
    "--rule": ("x",),
    "--saelens": ("",),
    "--seed": ("x", "1.5"),
    "--separator": ("x",),
    "--show": ("x", "rank"),
    "--shown-neurons": ("x", "-1"),
    "--site": ("nonsense", ""),
    "--stop-when-stable": ("x", "-1", "2", "nan"),
    "--store-dtype": ("x",),
    "--strength": ("x", "nan", "0", "1,", ""),
    "--tail": ("x",),
    "--text": ("", "en=nowhere.txt"),
    "--threads": ("x", "-1"),
    "--token": ("", "no such token", "id:99999"),
    "--top-k": ("x", "0"),
    "--top-rate": ("x", "-1", "2", "nan"),
    "--worker": ("x", "3/2"),
}

COMMANDS = GROUP.commands
OPTIONS = {
    (name, option.opts[0])
    for name, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option" and not option.is_flag
}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, list[str]]:
    """A call of each command that would work, started in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en.txt").write_text("Everyone has the right to life.\n" * 20)
    return {
        "attribute": ["attribute"],
        "check": ["check", "demo", "--layers", "0"],
        "circuit": ["circuit"],
        "demo": ["demo"],
        "harvest": [
            "harvest",
            "demo",
            "--out",
            "store",
            "--corpus",
            "en=en.txt",
            "--hooks",
            "blocks.0.hook_resid_post",
        ],
        "heads": ["heads", "demo"],
        "lens": ["lens", "demo", "Everyone has"],
        "neurons": ["neurons", "demo", "--out", "study"],
        "patch": ["patch"],
        "run": ["run", "demo", "Everyone has"],
        "steer": ["steer", "demo", "Everyone has", "--max-new-tokens", "2"],
    }


@pytest.mark.parametrize(("command", "option"), sorted(OPTIONS))
def test_refused_by_name(command: str, option: str, call: Mapping[str, list[str]], tmp_path: Path) -> None:
    for value in WRONG[option]:
        asked = [*call[command], f"{option}={value}"]
        done = invoke(*asked)
        assert done.exit_code == 2, (asked, done.exit_code, done.output[-500:], done.exception)
        named = option.removeprefix("--") in done.stderr.replace("_", "-") or (value and repr(value) in done.stderr)
        assert named, (asked, done.stderr)
        assert [path.name for path in tmp_path.iterdir()] == ["en.txt"], asked


def test_every_line_is_of_an_option() -> None:
    assert {option for _, option in OPTIONS} == WRONG.keys()
