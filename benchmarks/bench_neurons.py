"""LAPE from end to end on a 560M-shaped BLOOM with random weights: the seconds and the memory of each step.

    python benchmarks/bench_neurons.py                  writes benchmarks/results/neurons_<hardware>_<yyyymm>.md
    python benchmarks/bench_neurons.py --shape tiny     a try, prints only

What is to be seen: memory that is the model's and one batch's, and does not grow with the text. So two lengths of text are
counted in processes of their own; the peak of each step is measured from where the model is loaded. Then the command that
users give, ``pellucid neurons``, runs on a folder with such a checkpoint and the embedded model's tokenizer and text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import (
    BLOOM_560M,
    TINY,
    Report,
    Target,
    machine_lines,
    make_model,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
)

from pellucid import TransformerBridge
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.perplexity import perplexity_change
from pellucid.corpora import Corpus
from pellucid.demo import MODEL_FOLDER
from pellucid.running_stats import CountPositive

LANGUAGES = ("en", "fr", "es", "id", "vi", "zh")
CONTEXT, BATCH = 128, 4
HOOK = "blocks.*.mlp.hook_post"
CHARACTERS = (4_000, 16_000)
GIVES_BACK = {name: str(2**20) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
"""Lets glibc give back what is freed, so that a peak is what was alive: what it keeps otherwise differs by some 200 MiB from
run to run of the same text."""
TARGET_GROWTH_MIB = 32.0
"""Peak memory may differ by so much between two texts: what the allocator and the interpreter do differently."""


class Steps:
    """Seconds and peak memory of the steps of one study, over what the process held once the model was loaded."""

    def __init__(self) -> None:
        self.base = resident_bytes()
        self.found: dict[str, float] = {"model and program, MiB": self.base / 2**20}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        reset_peak()
        started = time.perf_counter()
        yield
        self.found[f"{name}, s"] = time.perf_counter() - started
        self.found[f"{name}: peak over that, MiB"] = (peak_bytes() - self.base) / 2**20


def child(shape_name: str, rows: int) -> dict[str, float]:
    """One study: count, select, silence, with ``rows`` rows a language."""
    shape = TINY if shape_name == "tiny" else BLOOM_560M
    bridge = TransformerBridge(make_model(shape))
    generator = torch.Generator().manual_seed(0)
    width = shape.d_vocab // len(LANGUAGES)
    tokens = {
        # A language has tokens of its own: with random weights nothing else could tell languages apart.
        label: (torch.randint(0, width, (rows, CONTEXT), generator=generator) + place * width)
        for place, label in enumerate(LANGUAGES)
    }
    corpus = Corpus.from_tokens(tokens, context=CONTEXT)
    one = Corpus.from_tokens({label: rows_[:1] for label, rows_ in tokens.items()}, context=CONTEXT)
    steps = Steps()
    with steps.step("counting"):
        counted = bridge.collect(corpus, {HOOK: [CountPositive()]}, batch_size=BATCH)
    with steps.step("selecting"):
        found = lape(counted.array(HOOK, "count_positive"), counted.tokens)
    assert len(found.selected) == round(0.01 * shape.n_layers * 4 * shape.d_model)
    owners = {label: neurons for label, neurons in found.neurons.items() if neurons}
    with steps.step("silencing"):
        change = perplexity_change(bridge, one, owners, batch_size=BATCH)
    n_tokens = sum(counted.n_tokens.values())
    return steps.found | {
        "tokens counted": n_tokens,
        "tokens counted per second": n_tokens / steps.found["counting, s"],
        "neurons selected": len(found.selected),
        "languages with neurons": len(owners),
        "tokens run with neurons silenced": int(change["tokens"].sum()) * (len(owners) + 1),
    }


CHECKPOINT = """
import sys
from dataclasses import replace
sys.path.insert(0, {benchmarks!r})
from common import BLOOM_560M, TINY, make_model
make_model({shape}).save_pretrained({folder!r})
"""


def command(shape_name: str, characters: int, scratch: Path) -> dict[str, float]:
    """``pellucid neurons`` on a checkpoint in a folder, with so many characters of text a language."""
    folder = scratch / "checkpoint"
    if not folder.exists():
        # The tiny one has fewer tokens than the tokenizer.
        shape = "replace(TINY, d_vocab=4096)" if shape_name == "tiny" else "BLOOM_560M"
        # In a process of its own: a child's peak (ru_maxrss) begins at what its parent holds.
        program = CHECKPOINT.format(benchmarks=str(Path(__file__).parent), shape=shape, folder=str(folder))
        subprocess.run([sys.executable, "-c", program], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL_FOLDER / name, folder)
    words: list[str] = []
    for label, texts in json.loads((MODEL_FOLDER / "held_out.json").read_text("utf-8")).items():
        text = "\n".join(texts["declaration"] + texts["sampled"]) + "\n"
        path = scratch / f"{label}.txt"
        path.write_text((text * (1 + characters // len(text)))[:characters] + "\n", "utf-8")
        words += ["--text", f"{label}={path}"]
    sizes = ["--context", str(CONTEXT), "--batch-size", str(BATCH), "--measured-tokens", str(CONTEXT)]
    given = ["neurons", str(folder), *words, *sizes, "--random-sets", "1", "--examples", "0", "--format", "json"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pellucid", *given], stdout=subprocess.DEVNULL, env=os.environ | GIVES_BACK
    )
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return {"seconds": time.perf_counter() - started, "peak, MiB": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("560m", "tiny"), default="560m")
    parser.add_argument("--rows", type=int, nargs=2, default=(4, 16), help="rows a language, in two runs")
    parser.add_argument("--hardware", default="cpu", help="part of the result file's name")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.shape, arguments.child)))
        return
    report = Report("Language neurons of a model of real size")
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    runs = []
    for rows in arguments.rows:
        again = [sys.executable, __file__, "--shape", arguments.shape, "--child", str(rows)]
        done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVES_BACK)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    shape = TINY if arguments.shape == "tiny" else BLOOM_560M
    report.section(f"LAPE of {len(LANGUAGES)} languages ({shape})")
    report.say(f"Rows of {CONTEXT} tokens, batches of {BATCH}; each column is a process of its own.\n")
    names = [f"{rows} rows a language" for rows in arguments.rows]
    lines = [(name, *(f"{run[name]:,.1f}".removesuffix(".0") for run in runs)) for name in runs[0]]
    report.say(table(("", *names), lines))
    small, large = (run["counting: peak over that, MiB"] for run in runs)
    times = f"text x {arguments.rows[1] / arguments.rows[0]:.0f}"
    report.target(Target(f"growth of the peak of counting, {times}", large - small, TARGET_GROWTH_MIB, " MiB"))
    report.section("pellucid neurons FOLDER: count, select, silence each language's neurons and a random set, measure")
    with tempfile.TemporaryDirectory() as scratch:
        studies = {size: command(arguments.shape, size, Path(scratch)) for size in CHARACTERS}
    base = runs[0]["model and program, MiB"]
    lines = [
        (f"{size:,}", *(f"{value:,.0f}" for value in study.values()), f"{study['peak, MiB'] - base:,.0f}")
        for size, study in studies.items()
    ]
    report.say(table(("characters a language", "seconds", "peak, MiB", "over model and program, MiB"), lines))
    small, large = (study["peak, MiB"] for study in studies.values())
    times = f"text x {CHARACTERS[1] / CHARACTERS[0]:.0f}"
    report.target(Target(f"growth of the peak of the command, {times}", large - small, TARGET_GROWTH_MIB, " MiB"))
    out = arguments.out
    if out is None and arguments.shape != "tiny":
        out = Path(__file__).parent / "results" / f"neurons_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
