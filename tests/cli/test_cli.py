"""The commands: what they print where, what they write, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM

import pellucid
from pellucid import TransformerBridge
from pellucid.cli import demo as demo_module
from pellucid.cli import models
from pellucid.cli import run as run_module
from pellucid.cli.check import ranges, summarise
from pellucid.cli.options import ModelChoice
from pellucid.demo import MODEL_FOLDER
from pellucid.demo import story as story_module
from pellucid.demo.story import Story
from pellucid.model_bridge.verification.check_report import CheckReport, CheckResult
from pellucid.storage.whole_files import whole_file
from tests import forked
from tests.command_line import invoke

ROOT = Path(__file__).parents[2]
PATTERNS = "blocks.*.attn.hook_pattern"
TEXT = "Everyone has the right"
COLOUR = re.compile(r"\x1b\[[\d;]*[349]\d[;m]")


def cli(*arguments: str | Path, input: str | bytes | None = None, **environment: str) -> Any:
    """Run a command in this process."""
    return invoke(*arguments, input=input, env=environment)


def process(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return forked.run(["-m", "pellucid", *arguments], before=before)


def one_line(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture(scope="module")
def checked() -> tuple[Any, CheckReport]:
    """``pellucid check demo``, and the report that it was made of."""
    verify, made = TransformerBridge.verify, []

    def kept(*given: Any, **named: Any) -> CheckReport:
        made.append(verify(*given, **named))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBridge, "verify", kept)
        done = cli("check", "demo")
    return done, *made


@pytest.fixture(scope="module")
def report(checked: tuple[Any, CheckReport]) -> CheckReport:
    """What the check of the embedded model finds, for tests of how it is shown."""
    return checked[1]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The embedded model in a folder that a test may damage."""
    return Path(shutil.copytree(MODEL_FOLDER, tmp_path / "model"))


@pytest.fixture
def not_finite(copied: Path) -> Path:
    """A model with one weight that is not a number."""
    weights = load_file(copied / "model.safetensors")
    weights["transformer.h.1.mlp.dense_4h_to_h.bias"][3] = float("nan")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


# -- the command line itself -------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time; sys.argv = ['pellucid', '--help']\n"
        "from pellucid.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 1.0
    for command in ("demo", "check", "run", "patch", "steer"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [("--version",), ("-h",), ("run", "--help"), ("check", "-h"), ("demo", "-h")])
def test_asking_for_help_is_no_error(arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 0
    assert pellucid.__version__ in done.stdout or "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Usage"),
        (("run",), "MODEL"),
        (("nonsense",), "nonsense"),
        (("run", "demo", TEXT, "--dtype", "float8"), "float8"),
        (("run", "demo"), "TEXT"),
        (("run", "demo", ""), "empty"),
        (("run", "demo", TEXT, "--prompt-file", "x"), "--prompt-file"),
        (("run", "demo", "--prompt-file", "no/such/file"), "no/such/file"),
        (("run", "demo", "\udcff"), "UTF-8"),
        (("run", "demo", TEXT, "--device", "cuda:99"), "--device cuda:99"),
        (("run", "demo", TEXT, "--device", "gpu"), "cpu always can"),
        (("run", "demo", TEXT, "--revision", "main"), "--revision"),
        (("run", "demo", TEXT, "--out", "x.safetensors"), "--hooks"),
        (("run", "demo", TEXT, "--hooks", PATTERNS, "--out", "x.pt"), "x.safetensors"),
        (("run", "demo", TEXT, "--hooks", PATTERNS, "--out", "no/such/x.safetensors"), "no folder no/such"),
        (("run", "demo", TEXT, "--hooks", "*.hook_attn_in", "--hooks", "*.hook_q_input"), "exclude each other"),
        (("run", "./nowhere", TEXT), "no folder ./nowhere"),
        (("run", "a/b/c", TEXT), "no folder a/b/c"),
        (("run", "tests", TEXT), "config.json"),
        (("check", "demo", "--layers", "0,x"), "0,5,11"),
        (("check", "demo", "--layers", "4"), "layers 0 to 3"),
        (("demo", "--seed", "-1"), "--seed"),
        (("hooks", "demo"), "No such command 'hooks'. The commands are demo, check, run,"),
        (
            ("heads", "demo", "--picture", "x.pdf"),
            "--picture: a picture's name ends in .html, .png, .svg; found 'x.pdf'",
        ),
        (("lens", "someone/model", TEXT, "--lens", "tuned"), "A tuned lens comes with demo only."),
        (("run", "demo", TEXT, "--hooks", "blocks.9.hook_z", "--out", "x.safetensors"), ".attn.hook_z, blocks."),
    ],
)
def test_a_mistake_is_told_on_standard_error(arguments: tuple[str, ...], said: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    done = cli(*arguments)
    assert done.exit_code == 2
    assert said in one_line(done.stderr or done.output)
    assert "Traceback" not in done.output
    assert not done.stdout or arguments == ()


def test_a_model_that_is_not_there(monkeypatch: Any) -> None:
    offline = "import huggingface_hub.constants as read_once; read_once.HF_HUB_OFFLINE = True"
    done = process("run", "nobody/no-such-model", TEXT, before=offline)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: 'nobody/no-such-model' is no folder here, and the hub cannot be asked for it: HF_"
    )
    assert "or the model demo on the command line" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_debug_shows_where_it_went_wrong() -> None:
    done = cli("run", "demo", TEXT, "--hooks", "nope", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "error: No hook point is called 'nope'" in done.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: Any) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "run_text", fail)
    assert isinstance(cli("run", "demo", TEXT).exception, ZeroDivisionError)


def test_an_interrupt_ends_with_130(monkeypatch: Any) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run_text", interrupt)
    assert cli("run", "demo", TEXT).exit_code == 130


@pytest.mark.parametrize("format", ["human", "json"])
def test_a_reader_that_goes_away_is_not_a_failed_check(format: str) -> None:
    command = ["-m", "pellucid", "run", "demo", TEXT, "--top-k", "9999", "--format", format]
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as stderr, open(os.devnull) as nothing:
        running = forked.start(command, (nothing.fileno(), writer, stderr.fileno()))
        os.close(writer)
        os.close(reader)
        running.join()
        assert running.exitcode == 141
        stderr.seek(0)
        errors = stderr.read().decode()
    assert "Traceback" not in errors
    assert "Broken" not in errors


def test_colours(report: CheckReport, monkeypatch: Any) -> None:
    monkeypatch.setattr(TransformerBridge, "verify", lambda *_, **__: report)
    assert COLOUR.search(cli("check", "demo", "--format", "human").stdout)
    assert not COLOUR.search(cli("check", "demo", "--format", "human", NO_COLOR="1").stdout)
    assert "\x1b" not in cli("check", "demo").stdout


@pytest.mark.filterwarnings("default::pellucid.errors.PellucidWarning")
def test_a_warning_is_one_line(copied: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    done = cli("run", copied, TEXT)
    assert done.exit_code == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: ")
    assert error.startswith("error: Strings need a tokenizer")


# -- run ---------------------------------------------------------------------------------------------------------------


def test_run_says_what_comes_next(demo: TransformerBridge) -> None:
    done = cli("run", "demo", TEXT, "--top-k", "3", "--format", "json")
    assert done.exit_code == 0
    assert not done.stderr
    found = json.loads(done.stdout)
    with torch.no_grad():
        best = demo(demo.to_tokens(TEXT))[0, -1].softmax(-1).topk(3)
    assert [token["id"] for token in found["next_tokens"]] == best.indices.tolist()
    assert [token["probability"] for token in found["next_tokens"]] == pytest.approx(best.values.tolist())
    assert found["tokens"] == ["Everyone", "·has", "·the", "·right"]
    assert found["model"] == "demo"
    assert found["dtype"] == "float32"
    assert found["pellucid"] == pellucid.__version__
    assert found["tensors"] == []
    assert found["file"] is None


def test_run_keeps_what_was_asked_for(demo: TransformerBridge, tmp_path: Path) -> None:
    out = tmp_path / "kept.safetensors"
    hooks = ("--hooks", PATTERNS, "--hooks", "blocks.1.hook_in", "--hooks", "blocks.0.hook_resid_post")
    done = cli("run", "demo", TEXT, *hooks, "--out", out, "--format", "json")
    assert done.exit_code == 0
    tokens = demo.to_tokens(TEXT)
    with torch.no_grad():
        _, cache = demo.run_with_cache(tokens)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(4)]
    names += ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"]
    kept = load_file(out)
    assert sorted(kept) == sorted([*names, "tokens"])
    assert torch.equal(kept["tokens"], tokens)
    for name in names:
        assert torch.equal(kept[name], cache[name])

    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["pellucid"]
    about = json.loads(metadata["pellucid"])
    assert list(about["hooks"]) == names
    assert about["hooks"]["blocks.0.attn.hook_pattern"] == ["batch", "n_heads", "pos", "key_pos"]
    assert about["asked"] == [PATTERNS, "blocks.1.hook_in", "blocks.0.hook_resid_post"]
    assert about["tokens"] == ["Everyone", "·has", "·the", "·right"]
    assert (about["model"], about["revision"], about["commit"], about["dtype"]) == ("demo", None, None, "float32")

    lines = {line["name"]: line for line in json.loads(done.stdout)["tensors"]}
    assert list(lines) == names
    assert lines[names[0]]["shape"] == [1, 8, 4, 4]
    assert lines[names[0]]["bytes"] == 8 * 4 * 4 * 4
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cli("run", "demo", TEXT, "--hooks", PATTERNS, "--out", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_table_of_what_was_kept(tmp_path: Path) -> None:
    out = tmp_path / "kept.safetensors"
    done = cli("run", "demo", TEXT, "--hooks", "blocks.0.attn.hook_pattern", "--out", out, "--dtype", "bfloat16")
    assert "blocks.0.attn.hook_pattern  1 × 8 × 4 × 4  batch n_heads pos key_pos  bfloat16    256" in done.stdout
    assert f"1 tensors, 256 bytes, written to {out}" in done.stdout
    assert load_file(out)["blocks.0.attn.hook_pattern"].dtype is torch.bfloat16
    assert "give --out" in cli("run", "demo", TEXT, "--hooks", "hook_embed").stdout


def test_a_file_is_overwritten_only_with_force(tmp_path: Path) -> None:
    out = tmp_path / "kept.safetensors"
    out.write_text("mine")
    done = cli("run", "demo", TEXT, "--hooks", PATTERNS, "--out", out)
    assert done.exit_code == 2
    assert "--force" in done.stderr
    assert out.read_text() == "mine"
    assert cli("run", "demo", TEXT, "--hooks", PATTERNS, "--out", out, "--force").exit_code == 0
    assert "tokens" in load_file(out)


@pytest.mark.parametrize(
    "given",
    [
        ("run", "no\x1b[31msuch\x9b0m", TEXT),
        ("run", "demo", TEXT, "--hooks", "blocks.0.\x1b]0;title\x07"),
        ("run", "demo", TEXT, "--hooks", PATTERNS, "--out", "no\x1b[2Jfolder/x.safetensors"),
        ("neurons", "demo", "--text", "en=no\x1b[8mfile\u202e"),
        ("harvest", "demo", "--corpus", "en=no\x1b[8mfile.txt", "--hooks", "hook_embed", "--out", "x"),
        ("run", "demo", "--prompt-file", "no\x1b[8mfile"),
    ],
)
def test_no_message_sends_the_terminal_what_an_argument_held(given: tuple[str, ...], tmp_path: Path) -> None:
    done = cli(*given)
    assert done.exit_code == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stderr.replace("\x1b[1;31merror: \x1b[0m", "")), (
        done.stderr
    )
    assert "\\x1b" in done.stderr


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "x") as draft:
            draft.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    done = cli("run", "demo", TEXT, "--hooks", PATTERNS, "--out", tmp_path / "x.safetensors")
    assert done.exit_code == 2
    assert "has 10 left" in done.stderr


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_patern", "blocks.9.attn.hook_pattern", "blocks.*.hook_nothing"])
def test_an_unknown_hook_is_refused_before_weights_are_loaded(hook: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_module, "open_bridge", None)
    done = cli("run", "demo", TEXT, "--hooks", hook)
    assert done.exit_code == 2
    assert "blocks.3" in done.stderr


def test_opt_in_hooks_are_switched_on_when_named(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    cli("run", "demo", TEXT, "--hooks", "blocks.0.attn.hook_result", "--hooks", "blocks.1.*", "--out", out)
    kept = load_file(out)
    assert kept["blocks.0.attn.hook_result"].shape == (1, 4, 8, 128)
    assert "blocks.1.attn.hook_z" in kept
    assert "blocks.1.attn.hook_result" not in kept


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/INST]", ":smile:", "a\\[", "</s>", "\x1b[31m"])
def test_a_text_is_never_read_as_markup(text: str) -> None:
    done = cli("run", "demo", text)
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    tokens = json.loads(cli("run", "demo", text, "--format", "json").stdout)["tokens"]
    assert " ".join(tokens) in done.stdout
    if text != "</s>":
        assert "".join(tokens).replace("⟨U+001B⟩", "\x1b") == text


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (b"Everyone has\n", ["Everyone", "·has"]),
        (b"Everyone has\r\n", ["Everyone", "·has"]),
        (b"\xef\xbb\xbfEveryone has\n\n", ["Everyone", "·has", "⏎"]),
    ],
)
def test_a_text_from_a_file_or_a_pipe(content: bytes, tokens: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    for done in (
        cli("run", "demo", "--prompt-file", file, "--format", "json"),
        cli("run", "demo", "-", "--format", "json", input=content),
    ):
        assert json.loads(done.stdout)["tokens"] == tokens


ECHO = """
import sys
from types import SimpleNamespace
from pellucid.cli import main, output
sys.modules["pellucid.cli.run"] = SimpleNamespace(
    RunRequest=lambda text, *rest: text, run_text=lambda choice, text, format: output.write_json({"text": text})
)
sys.argv = ["pellucid", "run", "demo", *sys.argv[1:]]
main()
"""
"""``pellucid run demo`` that gives its text back: a locale changes how that comes in and goes out, not what a model does."""


@pytest.mark.skipif(os.name == "nt", reason="arguments are UTF-16 there")
def test_a_text_on_the_command_line_is_utf8_in_every_locale() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run(
        [sys.executable, "-c", ECHO, "人权"],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **locale},
    )
    assert json.loads(done.stdout)["text"] == "人权", done.stderr


@pytest.mark.parametrize(("content", "said"), [(b"\xff", "byte 0"), (b"\n", "empty")])
def test_a_file_without_text(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    done = cli("run", "demo", "--prompt-file", file)
    assert done.exit_code == 2
    assert said in done.stderr


def test_prepending_the_first_token() -> None:
    done = cli("run", "demo", TEXT, "--prepend-bos", "--format", "json")
    assert json.loads(done.stdout)["tokens"][0] == "⟦<s>⟧"


def test_pickle_weights_need_permission(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    refused = cli("run", copied, TEXT)
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.stderr
    assert "use_safetensors" not in refused.stderr
    allowed = cli("run", copied, TEXT, "--allow-pickle")
    assert allowed.exit_code == 0


def test_damaged_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = cli("run", copied, TEXT)
    assert done.exit_code == 2
    assert "damaged or cut off" in done.stderr


def test_a_missing_weight_fails_the_check_and_an_adapters_folder_is_a_model(copied: Path, tmp_path: Path) -> None:
    model = BloomForCausalLM.from_pretrained(copied)
    lora = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    plain = json.loads(cli("run", copied, TEXT, "--format", "json").stdout)
    adapted = json.loads(cli("run", tmp_path / "adapter", TEXT, "--format", "json").stdout)
    assert adapted["tokens"] == plain["tokens"]
    assert adapted["next_tokens"] != plain["next_tokens"]
    weights = load_file(copied / "model.safetensors")
    lost = "transformer.h.1.mlp.dense_h_to_4h.weight"
    save_file({name: value for name, value in weights.items() if name != lost}, copied / "model.safetensors")
    done = cli("check", copied)
    assert done.exit_code == 2
    assert lost in done.stderr


def test_the_dtype_of_a_folder_is_the_checkpoints_own(copied: Path) -> None:
    assert json.loads(cli("run", copied, TEXT, "--format", "json").stdout)["dtype"] == "float16"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    done = cli("run", tmp_path, TEXT)
    assert done.exit_code == 2
    assert "'t5'" in done.stderr


def test_the_commit_of_a_hub_model(monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_, **__: "cache/snapshots/abc123/config.json")
    assert models.commit_of(ModelChoice("bigscience/bloom-560m")) == "abc123"
    assert models.commit_of(ModelChoice("demo")) is None


# -- check -------------------------------------------------------------------------------------------------------------


def test_a_model_that_holds(checked: tuple[Any, CheckReport], monkeypatch: Any) -> None:
    done, report = checked
    assert done.exit_code == 0
    assert not done.stderr
    assert re.search(r"All \d+ checks hold for demo \(float32\)\.", done.stdout)
    assert "blocks.*.attn.hook_pattern" in done.stdout
    assert "looking" not in done.stdout
    monkeypatch.setattr(TransformerBridge, "verify", lambda *_, **__: report)
    assert "blocks.*.ln2.hook_normalized " in cli("check", "demo", COLUMNS="80").stdout


def test_every_line() -> None:
    done = cli("check", "demo", "--layers", "1,3", "--verbose")
    assert "blocks.1.attn.hook_q: as by Hugging Face" in done.stdout
    assert "blocks.3.attn.hook_q: looking" in done.stdout
    assert "blocks.0.attn.hook_q" not in done.stdout


def test_the_report_as_json(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = cli("check", "demo", "--layers", "0", "--format", "json", "--out", out)
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["failed"] == 0
    assert found["checks"] == len(found["results"]) > 100
    assert set(found["results"][0]) >= {"name", "held", "measured", "bound"}
    assert json.loads(out.read_text("utf-8")) == found
    assert cli("check", "demo", "--out", out).exit_code == 2


def test_a_planted_fault_is_named(not_finite: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = cli("check", not_finite, "--layers", "1", "--out", out)
    assert done.exit_code == 1
    failed = done.stdout[done.stdout.index("What does not hold") :]
    assert "transformer.h.1.mlp.dense_4h_to_h.bias" in failed
    assert re.search(r"\d+ of \d+ checks do not hold", failed)
    found = json.loads(out.read_text("utf-8"))
    assert found["ok"] is False
    assert found["results"][0]["detail"] == "transformer.h.1.mlp.dense_4h_to_h.bias"


def test_a_dead_hook_is_named(monkeypatch: Any) -> None:
    dead = _of_hook("blocks.2.attn.hook_z", "moves the logits", False, 0.0, 0.0, "an edit had no effect")
    alive = _of_hook("blocks.1.attn.hook_z", "moves the logits", True, 2.5, 0.0)
    monkeypatch.setattr(TransformerBridge, "verify", lambda *_, **__: CheckReport("demo", "float32", [alive, dead]))
    done = cli("check", "demo")
    assert done.exit_code == 1
    assert re.search(r"FAIL +blocks\.2\.attn\.hook_z: moves the logits +0 +> 0 +an edit had no effect", done.stdout)
    assert "1 of 2 checks do not hold for demo." in done.stdout


def test_a_summary_leaves_nothing_out(report: CheckReport, demo: TransformerBridge) -> None:
    kinds = summarise(report.results)
    assert sum(kind.count for kind in kinds) == len(report.results)
    hooks = {kind.name: kind for kind in kinds if kind.is_hook}
    assert all(kind.moved is not None and kind.moved > 0 for kind in hooks.values())
    assert hooks["blocks.*.attn.hook_q"].layers == {0, 2, 3}
    assert hooks["blocks.*.attn.hook_q"].count == 12
    expected = {re.sub(r"^blocks\.\d+", "blocks.*", name) for name in demo._tree.index}
    assert set(hooks) == expected


def test_a_summary_keeps_the_worst() -> None:
    lines = [
        _of_hook("blocks.0.attn.hook_q", "looking", True, 1e-3, 1e-2),
        _of_hook("blocks.1.attn.hook_q", "looking", True, 2e-3, 1e-2),
        _of_hook("blocks.0.attn.hook_q", "moves the logits", True, 5.0, 0.0),
        _of_hook("blocks.1.attn.hook_q", "moves the logits", True, 3.0, 0.0),
    ]
    (kind,) = summarise(lines)
    assert (kind.difference, kind.bound, kind.moved) == (2e-3, 1e-2, 3.0)


def test_ranges() -> None:
    assert ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"
    assert ranges(set()) == ""


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(story: Story, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What the command writes and says of the story; a process of its own computes one as well (further down)."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "run_demo", lambda *_: story)
        return out, cli("demo", "--out", out, COLUMNS="80")


def test_the_demo_tells_its_story(shown: tuple[Path, Any]) -> None:
    _, done = shown
    assert done.exit_code == 0
    assert not done.stderr
    for title in ("It has learnt something", "Some heads copy", "Scores are not effects", "Patch it back", "numbers"):
        assert title in done.stdout
    assert "L0H0 matters most" in done.stdout
    assert "Toda persona tiene derecho ▸ a" in done.stdout
    assert "-0.00" not in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last names the folder


def test_the_demo_writes_three_files(shown: tuple[Path, Any]) -> None:
    out, _ = shown
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.safetensors", "induction.svg"]
    story = json.loads((out / "demo.json").read_text("utf-8"))
    arrays = load_file(out / "demo.safetensors")
    assert torch.equal(arrays["effect"], torch.tensor(story["effect"]))
    with safe_open(out / "demo.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["pellucid"])["seed"] == 0
    root = ElementTree.parse(out / "induction.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{story['most_important']['head']['effect']:.2f}" in texts


def test_the_demo_does_not_overwrite(shown: tuple[Path, Any]) -> None:
    out, _ = shown
    done = cli("demo", "--out", out)
    assert done.exit_code == 2
    assert "--force" in done.stderr


SMALLER = """
import functools
from pellucid import TransformerBridge
from pellucid.demo import story
story.repeated_tokens.__defaults__ = (0, 4, story.LENGTH)
TransformerBridge.verify = functools.partialmethod(TransformerBridge.verify, layers=[0])
"""
"""The demonstration on fewer rows, and its check on one layer: what all of it says is shown above."""


def test_the_demo_as_json_in_a_process_of_its_own() -> None:
    done = process("demo", "--format", "json", "--seed", "3", before=SMALLER)
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout)
    assert story["seed"] == 3
    assert story["most_important"]["head"]["name"] == "L0H0"
    assert done.stderr == ""


def test_a_failed_check_in_the_demo_ends_with_1(story: Story, monkeypatch: Any) -> None:
    failed = CheckResult("logits, nothing hooked", False, 1.0, 0.0)
    monkeypatch.setattr(TransformerBridge, "verify", lambda *_, **__: CheckReport("demo", "float32", [failed]))
    monkeypatch.setattr(story_module, "ablation_effects", lambda *_, **__: torch.tensor(story.effect))
    done = cli("demo")
    assert done.exit_code == 1
    assert "0 of 1 checks" in done.stdout


def test_check_in_a_process_of_its_own() -> None:
    done = process("check", "demo", "--layers", "0")
    assert done.returncode == 0, done.stderr
    assert "checks hold for demo" in done.stdout


def _of_hook(hook: str, aspect: str, held: bool, measured: float, bound: float, detail: str = "") -> CheckResult:
    return CheckResult(f"{hook}: {aspect}", held, measured, bound, detail, hook, aspect)


def test_fast_attention_is_chosen_and_said() -> None:
    made = {}
    for choice in ("eager", "sdpa"):
        done = cli("run", "demo", TEXT, "--format", "json", "--attn-implementation", choice)
        assert done.exit_code == 0
        made[choice] = json.loads(done.stdout)
        assert made[choice]["attn_implementation"] == choice
    for exact, fast in zip(made["eager"]["next_tokens"], made["sdpa"]["next_tokens"], strict=True):
        assert exact["token"] == fast["token"]
        assert abs(exact["probability"] - fast["probability"]) < 1e-5
    done = cli("check", "demo", "--layers", "1", "--format", "json", "--attn-implementation", "sdpa")
    assert done.exit_code == 0
    names = [result["name"] for result in json.loads(done.stdout)["results"]]
    assert "layer 1: sdpa against the exact path: z" in names
    done = cli("run", "demo", TEXT, "--attn-implementation", "flash")
    assert done.exit_code == 2
    assert "'eager', 'sdpa'" in one_line(done.stderr)
