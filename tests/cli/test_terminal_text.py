"""No text from outside reaches a terminal as anything but text: every command, its mistakes, its results and its logs."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from safetensors.torch import load_file, save_file

from pellucid.cli import main
from pellucid.cli import run as run_module
from pellucid.cli.mistakes import report_errors
from pellucid.cli.output import table
from pellucid.cli.terminal import SafeConsole
from pellucid.demo import MODEL_FOLDER
from pellucid.demo.story import Story
from pellucid.errors import InputError, PellucidWarning
from pellucid.tables import CONTROL, Table, visible
from tests.command_line import GROUP, invoke

HOSTILE = "x\x1b[8m\x1b]0;t\x07\x9b2J\x7f\u202e\r"
"""A hidden text, a new title, a cleared screen, a deleted character, a turned direction, a line begun anew."""

COMMANDS = GROUP.commands


def outcome(*arguments: str | Path) -> Any:
    """A command's outcome in this process; nothing is taken out of its output because that is no terminal."""
    return invoke(*arguments, color=True)


def is_text(output: str, quoted: bool = True) -> bool:
    """Whether a terminal would obey nothing of it; with ``quoted``, and what was given is shown in it."""
    plain = output.replace("\x1b[1;31merror: \x1b[0m", "")
    return not CONTROL.search(plain) and (not quoted or "\\x1b[8m" in "".join(plain.split()))


# -- mistakes ----------------------------------------------------------------------------------------------------------

REQUIRED = {
    "check": ["demo"],
    "run": ["demo", "text"],
    "lens": ["demo", "text"],
    "heads": ["demo"],
    "steer": ["demo"],
    "neurons": ["demo"],
    "harvest": ["demo", "--out", "store"],
}
VALUES = [
    (command, parameter.opts[0])
    for command, found in COMMANDS.items()
    for parameter in found.params
    if parameter.param_type_name == "option"
    and not parameter.is_flag
    and parameter.type_descriptor.annotation not in (str, Path)
    and not parameter.multiple
]
"""Every option whose value the parser reads: a number, one of several words."""


@pytest.mark.parametrize(("command", "option"), VALUES)
def test_what_is_said_of_a_wrong_value_is_text(command: str, option: str) -> None:
    done = outcome(command, *REQUIRED.get(command, []), option, HOSTILE)
    assert done.exit_code == 2
    assert is_text(done.output, quoted=False), done.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("more", [[f"--{HOSTILE}"], [f"-{HOSTILE}"], ["x", "y", "z", HOSTILE], [f"--force={HOSTILE}"]])
def test_usage_errors_are_text(command: str, more: list[str]) -> None:
    done = outcome(command, *REQUIRED.get(command, []), *more)
    assert done.exit_code == 2
    assert is_text(done.output, quoted=False), done.output


def test_a_command_that_does_not_exist_is_quoted() -> None:
    assert is_text(outcome(HOSTILE).output)


@pytest.mark.parametrize(
    "given",
    [
        ("run", f"no{HOSTILE}", "text"),
        ("check", "demo", "--layers", HOSTILE),
        ("check", "demo", "--device", HOSTILE),
        ("demo", "--out", f"no{HOSTILE}/a/../b"),
        ("patch", "--site", HOSTILE),
        ("patch", "--by", HOSTILE),
        ("patch", "--answer", HOSTILE),
        ("patch", "--picture", f"no{HOSTILE}/x.html"),
        ("neurons", "demo", "--text", HOSTILE),
        ("harvest", "demo", "--out", "x", "--worker", HOSTILE, "--corpus", "en.txt", "--hooks", "hook_embed"),
        ("harvest", "demo", "--out", "x", "--hooks", HOSTILE, "--corpus", "en.txt"),
    ],
)
def test_a_mistake_that_we_find_is_quoted(given: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("en.txt").write_text("one document\n" * 200)
    if given[0] == "demo":
        Path(given[2]).parents[2].write_text("in the way")
    done = outcome(*given)
    assert done.exit_code == 2, done.output
    assert is_text(done.output), done.output


# -- results -----------------------------------------------------------------------------------------------------------


SECOND_HALF = ("transformer.h.2.", "transformer.h.3.")


@pytest.fixture
def hostile_model(tmp_path: Path) -> Path:
    """The embedded model's first half in a folder with such a name; its tokenizer has a special token of that kind."""
    folder = Path(shutil.copytree(MODEL_FOLDER, tmp_path / f"model{HOSTILE}"))
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text("utf-8"))
    first = {name: weight for name, weight in weights.items() if not name.startswith(SECOND_HALF)}
    save_file(first, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}), "utf-8")
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text("utf-8").replace('"<unk>"', json.dumps(HOSTILE)), "utf-8")
    return folder


@pytest.mark.parametrize("format", ["auto", "json"])
@pytest.mark.filterwarnings("ignore::pellucid.errors.PellucidWarning")
def test_results_are_text(format: str, hostile_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {}
    for language, line in (("en", "the right of all people to be heard "), ("fr", "le droit de tous les hommes ")):
        texts[language] = tmp_path / f"{language}{HOSTILE}.txt"
        texts[language].write_text((line + HOSTILE.replace("\r", "") + "\n") * 60, "utf-8")
    label, out = f"l{HOSTILE}", f"out{HOSTILE}"
    files = [word for language, file in texts.items() for word in ("--text", f"{label}{language}={file}")]
    few = ["--context", "32"]
    two = ["--clean", f"a {HOSTILE} b", "--corrupted", f"c {HOSTILE} b", "--metric", "kl-divergence", "--layers", "0"]
    study = ["--top-rate", "0.05", "--measured-tokens", "64", "--prompt", HOSTILE, "--random-sets", "1"]
    stored = ["--out", f"store{HOSTILE}"]
    commands: dict[str, list[str | Path]] = {
        "run": ["run", hostile_model, HOSTILE, "--hooks", "hook_embed", "--out", f"{out}.safetensors"],
        "check": ["check", hostile_model, "--layers", "0"],
        "attribute": ["attribute", hostile_model, f"the right {HOSTILE}", "--check", "0", "--out", f"parts{HOSTILE}"],
        "circuit": [
            *("circuit", hostile_model, "--answer", "id:5", "--foil", "id:6", "--out", f"circuit{HOSTILE}"),
            *("--clean", f"a {HOSTILE} b", "--corrupted", f"c {HOSTILE} b"),
        ],
        "lens": ["lens", hostile_model, f"the right {HOSTILE}", "--out", f"lens{HOSTILE}.json"],
        "heads": ["heads", hostile_model, f"the right {HOSTILE}", "--out", f"heads{HOSTILE}.json"],
        "steer": [
            "steer",
            hostile_model,
            f"the right {HOSTILE}",
            "--positive",
            f"a {HOSTILE}",
            "--negative",
            "b c d",
            "--out",
            f"d{HOSTILE}.safetensors",
        ],
        "patch": ["patch", hostile_model, *two, "--out", out],
        "neurons": ["neurons", hostile_model, *files, *few, *study, "--out", f"study{HOSTILE}"],
        "harvest": [
            "harvest",
            hostile_model,
            "--corpus",
            f"{label}={texts['en']}",
            "--hooks",
            "hook_embed",
            *few,
            *stored,
        ],
    }
    assert {*commands, "demo"} == set(COMMANDS)
    for command, words in commands.items():
        done = outcome(*words, "--format", format)
        assert done.exit_code == 0, (command, done.output, done.exception)
        assert is_text(done.stdout, quoted=format == "auto"), (command, done.stdout)
        assert is_text(done.stderr, quoted=False), (command, done.stderr)
        if format == "json":
            assert HOSTILE in json.dumps(json.loads(done.stdout), ensure_ascii=False) or re.search(
                r"\\u202e", done.stdout
            ), command  # the same text, written with escapes


def test_nothing_of_it_is_lost() -> None:
    file = io.StringIO()
    made = table("cell", HOSTILE, title=HOSTILE)
    made.add_row(HOSTILE, Text(HOSTILE, "bold"))
    SafeConsole(file=file, width=200).print(made, HOSTILE)
    assert file.getvalue().count(visible(HOSTILE)) == 4
    assert is_text(file.getvalue())


def test_where_the_demonstration_was_written_is_text(story: Story, tmp_path: Path, monkeypatch: Any) -> None:
    from pellucid.cli import demo as demo_module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, "run_demo", lambda *_: story)
    monkeypatch.setattr(demo_module, "_chapters", lambda story: [])
    done = outcome("demo", "--out", HOSTILE)
    assert is_text(done.stdout), done.output


def test_what_is_shown_in_a_session_is_text() -> None:
    assert is_text(str(Table(HOSTILE, ("label",), [(HOSTILE,)])))
    assert is_text(str(Table(HOSTILE)))


# -- what others print -------------------------------------------------------------------------------------------------


def test_warnings_and_logs_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogRecordFactory()  # Ray sets one of its own
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
            patched.setattr(logger, "propagate", False)
            warnings.simplefilter("default", PellucidWarning)
            with report_errors(debug=False):
                warnings.warn(HOSTILE, PellucidWarning, stacklevel=1)
                logger.warning("%s is not read", HOSTILE)
        inside = logging.getLogRecordFactory()
    finally:
        logger.removeHandler(handler)
    assert inside is before
    said = capsys.readouterr().err
    assert is_text(said), said
    assert said.count("\\x1b[8m") == 2


def test_what_hugging_face_logs_is_a_message_of_ours_once(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as of_transformers

    logger = of_transformers.get_logger("transformers.tried")
    theirs = logging.StreamHandler(sys.stderr)
    logger.addHandler(theirs)
    with report_errors(debug=False):
        for number in range(3):
            logger.warning("Retrying in %ss [Retry %s/5]. %s", 2**number, number + 1, HOSTILE)
        logging.getLogger("huggingface_hub.tried").warning("another\nline")
    said = capsys.readouterr().err
    assert is_text(said), said
    assert said.count("Retrying") == 1
    assert [line.partition(": ")[0] for line in said.splitlines()] == ["warning", "warning"]
    assert said.splitlines()[1] == "warning: another line"
    logger.warning("outside it is the library's own")
    logger.removeHandler(theirs)
    assert capsys.readouterr().err == "outside it is the library's own\n"


@pytest.mark.parametrize("error", [InputError, ZeroDivisionError])
def test_tracebacks_are_text(error: type[Exception], monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: Any) -> None:
        raise error(HOSTILE)

    monkeypatch.setattr(run_module, "run_text", fail)
    monkeypatch.setattr(sys, "argv", ["pellucid", "run", "demo", "text", "--debug"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (2 if error is InputError else 1)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert is_text(said), said
