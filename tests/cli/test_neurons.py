"""``pellucid neurons``: what it writes is what the library finds, it goes on where it stopped, and it says what is wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pellucid import TransformerBridge
from pellucid.analysis.criteria import compare_criteria
from pellucid.analysis.language_neurons import LanguageNeurons, lape
from pellucid.analysis.perplexity import perplexity_change
from pellucid.analysis.relevance import neuron_relevance
from pellucid.analysis.stopping import count_until_stable
from pellucid.cli import neurons as neurons_module
from pellucid.cli.neurons_output import ratio
from pellucid.corpora import Corpus
from pellucid.demo.texts import held_out_halves, written_text
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.running_stats import CountPositive
from tests.command_line import invoke
from tests.storage.test_safetensors_files import largest_file

QUICK = ("--context", "32", "--measured-tokens", "96", "--random-sets", "1", "--examples", "2", "--shown-neurons", "1")
FILES = {"neurons.json", "neurons.csv", "counts.safetensors", "change.csv", "overlap.csv", "layers.csv", "examples.csv"}
PICTURE_ORDER = ("layers.html", "overlap.html", "change.html", "examples.html")
PICTURES = {"layers.html", "overlap.html", "change.html", "examples.html"}


def cli(*arguments: str | Path) -> Any:
    return invoke("neurons", *arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few paragraphs of three languages, a line each."""
    folder = tmp_path_factory.mktemp("text")
    paths = {}
    for language in ("en", "vi", "zh"):
        paths[language] = folder / f"{language}.txt"
        paths[language].write_text("\n".join(written_text()[language][:40]) + "\n", "utf-8")
    return paths


def given(files: dict[str, Path], option: str = "--text") -> list[str]:
    return [part for language, path in files.items() for part in (option, f"{language}={path}")]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_what_the_library_finds(
    demo: TransformerBridge, files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    unseen = {language: tmp_path / f"{language}.jsonl" for language in files}
    for language, path in unseen.items():
        lines = [json.dumps({"text": text}) for text in held_out_halves()[1][language][:8]]
        path.write_text("\n".join(lines), "utf-8")
    done = cli(
        "demo",
        *given(files),
        *given(unseen, "--held-out"),
        *QUICK,
        "--out",
        out,
        "--format",
        "json",
        "--experts",
        "3",
        "--prompt",
        "No one",
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)

    hook = "blocks.*.mlp.hook_post"
    corpus = Corpus.from_text(dict(files), demo.tokenizer, context=32)
    counted = demo.collect(corpus, {hook: [CountPositive()]}, batch_size=8)
    found = lape(counted.array(hook, "count_positive"), counted.tokens, top_rate=0.05)
    assert shown["neurons"] == {label: [list(pair) for pair in pairs] for label, pairs in found.neurons.items()}
    measured = Corpus.from_json_lines(dict(unseen), demo.tokenizer, context=32)
    text = [batch for label in measured.labels for batch in measured.batches(8, labels=label, stop_row=3)]

    class Rows:
        def batches(self, batch_size: int) -> Any:
            return iter(text)

    change = perplexity_change(demo, Rows(), found.neurons, random_sets=found.random_sets(1))
    assert shown["change"]["own"] == change["change"].values.tolist()
    assert shown["change"]["random"] == change["random"].values.tolist()
    assert shown["change"]["tokens"] == [93] * 3
    assert shown["pictures"] == ["layers.html", "overlap.html", "change.html", "examples.html"]
    assert shown["tokens_counted"] == counted.n_tokens

    assert {path.name for path in out.iterdir()} == FILES | PICTURES | {"counting", "experts.csv", "continuations.csv"}
    assert json.loads((out / "neurons.json").read_text("utf-8"))["neurons"] == shown["neurons"]
    assert LanguageNeurons.load(out / "counts.safetensors").neurons == found.neurons
    rows = read(out / "neurons.csv")
    assert [(row["language"], int(row["layer"]), int(row["neuron"])) for row in rows] == [
        (label, *pair) for label, pairs in found.neurons.items() for pair in pairs
    ]
    changes = read(out / "change.csv")
    assert len(changes) == 2 * 3 * 3
    assert float(changes[0]["change"]) == change["change"].values[0, 0]
    examples = read(out / "examples.csv")
    assert len(examples) == 3 * 2
    for example in examples:
        top = (int(example["layer"]), int(example["neuron"]))
        assert top in found.neurons[example["language"]]
        assert example["token"] in files[example["language"]].read_text("utf-8") or "⟨" in example["token"]
    assert len(read(out / "experts.csv")) == 3 * 6
    assert {row["silenced"] for row in read(out / "continuations.csv")} == {"none", *files}
    for name in PICTURES:
        page = (out / name).read_text("utf-8")
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", page)
        assert "Content-Security-Policy" in page


def test_both_criteria_side_by_side(demo: TransformerBridge, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "study"
    asked = ("--relevance", "relp", "--against", "others", "--relevance-tokens", "96", "--stop-when-stable", "0.3")
    done = cli("demo", *given(files), *QUICK, *asked, "--out", out, "--format", "json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    corpus = Corpus.from_text(dict(files), demo.tokenizer, context=32)
    rows = {label: int(each.rows * 0.8) for label, each in corpus.index().items()}
    counted = count_until_stable(demo, corpus, stable_at=0.3, last_rows=rows, top_rate=0.05)
    assert shown["neurons"] == {label: [list(pair) for pair in pairs] for label, pairs in counted.found.neurons.items()}
    assert [look["tokens"] for look in shown["looks"]] == [dict(look.tokens) for look in counted.looks]
    assert [look["within"] for look in shown["looks"]] == [look.within for look in counted.looks]
    measured = neuron_relevance(demo, corpus, methods=["relp"], stop_row=3)
    top = measured.top(counted.found, "relp", "others")
    said = shown["criteria"]
    assert said["neurons"] == {label: [list(pair) for pair in pairs] for label, pairs in top.items()}
    assert (said["method"], said["against"], said["tokens"]) == ("relp", "others", dict.fromkeys(files, 96))
    table = compare_criteria(counted.found, measured, "relp", "others")
    assert [line["shared"] for line in said["by_language"]] == table["shared"].values.tolist()
    assert {(line["criterion"], line["silenced"]) for line in said["effects"]} == {
        (criterion, label) for criterion in ("entropy", "relp") for label in files
    }
    assert shown["active_where"] == "gelu_fast(pre) > 0: mlp.hook_post > 0"
    chosen = {(row["language"], int(row["layer"]), int(row["neuron"])): row for row in read(out / "relevance.csv")}
    assert set(chosen) == {
        (label, *pair) for sets in (counted.found.neurons, top) for label, pairs in sets.items() for pair in pairs
    }
    for (label, layer, neuron), row in chosen.items():
        assert row["by_relevance"] == str((layer, neuron) in top[label])
        cell = {"method": "relp", "layer": layer, "neuron": neuron, "language": label}
        assert float(row["relevance"]) == float(measured.mean.sel(cell))
    assert len(read(out / "criteria.csv")) == len(files)
    assert shown["pictures"] == [*PICTURE_ORDER[:3], "criteria.html", "examples.html"]
    line = read(out / "neurons.csv")[0]
    own = line["language"]
    assert float(line[f"low_{own}"]) < float(line[f"p_{own}"]) < float(line[f"high_{own}"])


def test_the_last_rows_are_measured_where_nothing_else_is_given(files: dict[str, Path], tmp_path: Path) -> None:
    done = cli("demo", *given(files), *QUICK, "--held-out-share", "0.5", "--format", "json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["measured_on"] == "the last 50% of each language's rows"
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_stopped_and_counts_once(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cli("demo", *given(files), *QUICK, "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    run, calls = PassBatch.run, []

    def interrupted(self: Any) -> Any:
        if self._taps:  # perplexities are measured without
            calls.append(1)
        if self._taps and len(calls) == 4:
            raise KeyboardInterrupt
        return run(self)

    out = tmp_path / "resumed"
    monkeypatch.setattr(PassBatch, "run", interrupted)
    assert cli("demo", *given(files), *QUICK, "--out", out).exit_code == 130
    assert not (out / "neurons.json").exists()
    done = cli("demo", *given(files), *QUICK, "--out", out)
    assert done.exit_code == 0, done.output
    for name in FILES - {"neurons.json"}:
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    total = len(calls)

    # Other thresholds: nothing is counted again, and nothing is overwritten unasked.
    refused = cli("demo", *given(files), *QUICK, "--out", out, "--top-rate", "0.1")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    again = cli("demo", *given(files), *QUICK, "--out", out, "--top-rate", "0.1", "--force")
    assert again.exit_code == 0, again.output
    assert len(calls) == total
    assert json.loads((out / "neurons.json").read_text("utf-8"))["selected"] == 205
    files["en"].write_text(files["en"].read_text("utf-8") + "More.\n" * 50, "utf-8")
    other = cli("demo", *given(files), *QUICK, "--out", out, "--force")
    assert other.exit_code == 2
    assert "corpus" in other.stderr


def test_without_plotly_there_are_tables_and_a_note(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("pellucid.plots")]:
        monkeypatch.delitem(sys.modules, name)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find_spec(name, *rest)
    )
    done = cli("demo", *given(files), *QUICK, "--out", tmp_path / "study", "--examples", "0", "--measured-tokens", "0")
    assert done.exit_code == 0, done.output
    assert "note: no pictures: Pictures need plotly" in done.stderr
    assert "pellucid[plots]" in done.stderr
    assert {path.name for path in (tmp_path / "study").iterdir()} == FILES - {"change.csv", "examples.csv"} | {
        "counting"
    }


@pytest.mark.filterwarnings("default::pellucid.errors.PellucidWarning")
def test_languages_without_neurons_are_told(files: dict[str, Path]) -> None:
    done = cli("demo", *given(files), *QUICK, "--top-rate", "0.001", "--measured-tokens", "0")
    assert done.exit_code == 0, done.output
    assert "warning: No neuron belongs to" in done.stderr
    none = cli("demo", *given(files), *QUICK, "--top-rate", "0.0001")
    assert none.exit_code == 2
    assert "No language has a neuron at --top-rate 0.0001: 0 of 2048" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/model", "--text", "en={en}"), "There is no folder no/such/model"),
        (("bigscience/bloom-560m",), "Give text of two languages"),
        (("demo", "--text", "en"), "LANGUAGE=FILE"),
        (("demo", "--text", "=x"), "LANGUAGE=FILE"),
        (("demo", "--text", "en=no.txt"), "there is no file no.txt"),
        (("demo", "--text", "en={en}"), "one language, en"),
        (("demo", "--held-out", "en={en}", "--held-out", "zh={zh}"), "--held-out needs --text"),
        (
            ("demo", "--text", "en={en}", "--text", "zh={zh}", "--held-out", "en={en}", "--held-out", "vi={vi}"),
            "give both",
        ),
        (("demo", "--text", "en={en}", "--text", "zh={zh}", "--context", "4096"), "has no row"),
        (("demo", "--text", "en={en}", "--text", "zh={zh}", "--measured-tokens", "5"), "less than one row"),
        (("demo", "--top-rate", "0"), "--top-rate is a share"),
        (("demo", "--filter-rate", "1.5"), "--filter-rate is a share"),
        (("demo", "--held-out-share", "1"), "--held-out-share"),
        (("demo", "--against", "others"), "--against others would have no effect without --relevance"),
        (("demo", "--stop-when-stable", "1.5"), "--stop-when-stable is a share"),
        (("demo", "--relevance", "lrp"), "lrp"),
        (("demo", "--match", "layers"), "layers"),
        (("demo", "--document", "page"), "page"),
        (("demo", "--out", "{en}"), "is a file"),
    ],
)
def test_a_mistake_is_told(arguments: tuple[str, ...], said: str, files: dict[str, Path]) -> None:
    done = cli(*(argument.format(**files) for argument in arguments))
    assert done.exit_code == 2
    assert re.search(said, " ".join((done.stderr or done.output).split())), done.stderr
    assert "Traceback" not in done.output


def test_text_of_one_row_cannot_be_divided(files: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n".join(written_text()["fr"][1:3]), "utf-8")
    done = cli("demo", "--text", f"en={files['en']}", "--text", f"fr={short}", "--context", "32")
    assert done.exit_code == 2
    assert re.search("'fr' makes 1 rows of 32 tokens: too few", done.stderr)


def test_bad_text_is_told_with_its_place(files: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good line\n\xff\xfe bad\n")
    done = cli("demo", "--text", f"en={files['en']}", "--text", f"fr={bad}", *QUICK)
    assert done.exit_code == 2
    assert "bad.txt" in done.stderr
    empty = tmp_path / "empty.txt"
    empty.touch()
    done = cli("demo", "--text", f"en={files['en']}", "--text", f"fr={empty}", *QUICK)
    assert done.exit_code == 2
    assert "empty" in done.stderr or "'fr'" in done.stderr


def test_ratio() -> None:
    assert ratio(1.0, 0.1) == "10.0"
    assert ratio(1.0, 0.0) == ratio(1.0, -0.1) == ratio(1.0, None) == "-"


def test_what_cannot_fit_is_refused_before_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = neurons_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(neurons_module.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr(neurons_module, "count", None)
    done = cli("demo", "--out", tmp_path / "study", *QUICK)
    assert done.exit_code == 2
    assert re.search(r"need about [\d,]+ bytes and .*study has 10,000 left", done.stderr.replace("\n", " "))


@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_fills_after_the_counting_keeps_what_was_counted(
    full: bool, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the kernel refuses to let a file grow, or the folder is gone: a sentence, no traceback, and nothing is lost."""
    out, write = tmp_path / "study", neurons_module.write_study

    def fails(study: Any, folder: Path) -> list[str]:
        if not full:
            raise PermissionError("may not be written")
        with largest_file(500):
            return write(study, folder)

    command = (*given(files), "--out", out, *QUICK, "--measured-tokens", "0")
    with monkeypatch.context() as patch:
        patch.setattr(neurons_module, "write_study", fails)
        done = cli("demo", *command)
    assert done.exit_code == 2
    assert done.exception is None or isinstance(done.exception, SystemExit)
    said = " ".join(done.stderr.split())
    assert ("No space for" if full else "may not be written") in said
    assert "What was counted is kept in" in said
    with monkeypatch.context() as patch:
        patch.setattr(PassBatch, "run", None)  # nothing is counted again
        assert cli("demo", *command).exit_code == 0
    assert FILES - {"change.csv"} <= {path.name for path in out.iterdir()}
