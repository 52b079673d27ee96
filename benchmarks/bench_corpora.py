"""What collecting statistics over a corpus costs: bridge.collect beside a bare forward, plain hooks and TransformerLens.

    python benchmarks/bench_corpora.py                  every case, writes benchmarks/results/corpora_<hardware>_<yyyymm>.md
    python benchmarks/bench_corpora.py --quick          a few rounds, prints and writes nothing
    python benchmarks/bench_corpora.py --cases counts   only these
    python benchmarks/bench_corpora.py --tiny           a tiny model (to see that it runs)

counts      counts of all MLP neurons: time beside a bare forward of the same layers without the unembedding
statistics  each statistic at all MLP neurons, beside the same
memory      peak memory of a process that collects over a small and over a large corpus

The programs of a case are first shown to give the same numbers (see common.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    BLOOM_560M,
    TINY,
    Program,
    Report,
    Shape,
    Target,
    installed,
    machine_lines,
    make_model,
    measure,
    peak_bytes,
    random_tokens,
    table,
    twin,
)
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.running_stats import (
    CountPositive,
    Histogram,
    MeanVariance,
    MinMax,
    Quantiles,
    Statistic,
    TopK,
)

POST = "blocks.*.mlp.hook_post"
BARE = "bare forward, no unembedding"
PLAIN = "plain torch hooks"
COLLECT = "Pellucid, collect"
LENS = "TransformerLens, run_with_cache"

TARGET_COUNTS = 1.04
TARGET_MEMORY_MIB = 32.0
"""Peak memory may differ by so much between two corpora: what the allocator and the interpreter do differently."""

CASES = ("counts", "statistics", "memory")
ROWS, CONTEXT = 4, 128
CORPUS_MB = (2, 16)


class Bench:
    """A model, a corpus of a few batches, and the loops that people write."""

    def __init__(self, shape: Shape, batches: int) -> None:
        self.reference = make_model(shape)
        self.model = twin(self.reference)
        self.bridge = TransformerBridge(self.model)
        self.tokens = random_tokens(shape, batches * ROWS, CONTEXT)
        self.corpus = Corpus.from_tokens({"random": self.tokens}, context=CONTEXT)
        self.corpus.index()

    def bare(self) -> None:
        with torch.no_grad():
            for tokens in self.tokens.split(ROWS):
                self.model.transformer(tokens, use_cache=False)

    def plain(self) -> Tensor:
        """Counts by forward hooks, as they are usually written."""
        counts: dict[int, Tensor] = {}

        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = (args[0] > 0).sum((0, 1))
            counts[id(module)] = counts.get(id(module), 0) + found

        blocks = self.model.transformer.h
        handles = [block.mlp.dense_4h_to_h.register_forward_pre_hook(count) for block in blocks]
        try:
            self.bare()
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([counts[id(block.mlp.dense_4h_to_h)] for block in blocks])

    def collect(self, statistics: Callable[[], Statistic]) -> Any:
        return self.bridge.collect(self.corpus, {POST: [statistics()]}, batch_size=ROWS, progress=False)

    def counts(self) -> Tensor:
        found = self.collect(CountPositive).array(POST, "count_positive")
        return torch.from_numpy(found.sel(label="random").values)

    def lens_counts(self, lens: Any) -> Tensor:
        """Counts from TransformerLens' caches, one batch after another."""
        total: Tensor | int = 0
        with torch.no_grad():
            for tokens in self.tokens.split(ROWS):
                _, cache = lens.run_with_cache(tokens, names_filter=lambda name: name.endswith("mlp.hook_post"))
                layers = [(cache[name] > 0).sum((0, 1)) for name in sorted(cache, key=_layer)]
                total = total + torch.stack(layers)
        assert isinstance(total, Tensor)
        return total


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def case_counts(report: Report, shape: Shape, rounds: int, batches: int, clock: str) -> None:
    bench = Bench(shape, batches)
    expected = bench.plain()
    report.check("counts of collect and of plain hooks", bool(torch.equal(bench.counts(), expected)))
    programs = [
        Program(BARE, bench.bare),
        Program(PLAIN, bench.plain),
        Program(COLLECT, lambda: bench.collect(CountPositive)),
    ]
    if installed("transformer_lens"):
        from bench_bridge import open_lens

        lens = open_lens(twin(bench.reference))
        counts = bench.lens_counts(lens)
        share = float((counts != expected).float().mean())
        report.check("share of neurons whose count TransformerLens has otherwise", share, 0.01)
        programs.append(Program(LENS, lambda: bench.lens_counts(lens), rounds=max(2, rounds // 4)))
    else:
        report.say(f"- {LENS}: not installed")
    timings = measure(programs, rounds, warmup=1, clock=clock)
    report.timings(timings, BARE)
    tokens = batches * ROWS * CONTEXT
    report.say("\n".join(f"- {name}: {tokens / timings.median(name):,.0f} tokens/s" for name in timings.seconds))
    if shape is BLOOM_560M:
        report.target(
            Target("counts of all MLP neurons, over a bare forward", timings.ratio(COLLECT, BARE), TARGET_COUNTS)
        )


STATISTICS: dict[str, Callable[[], Statistic]] = {
    "CountPositive()": CountPositive,
    "MeanVariance()": MeanVariance,
    "MinMax()": MinMax,
    "Quantiles()": Quantiles,
    "Histogram of 16 bins": lambda: Histogram([index / 4 for index in range(-8, 9)]),
    "TopK(20)": lambda: TopK(20),
}


def case_statistics(report: Report, shape: Shape, rounds: int, batches: int, clock: str) -> None:
    bench = Bench(shape, batches)
    programs = [Program(BARE, bench.bare)]
    programs += [Program(name, lambda made=made: bench.collect(made)) for name, made in STATISTICS.items()]
    report.timings(measure(programs, max(2, rounds // 2), warmup=1, clock=clock), BARE)
    report.say("TopK over a short corpus is its worst case: every batch still brings new examples to every neuron.")


# -- memory ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, megabytes: int) -> None:
    """Lines of words, the same for each size as far as they go."""
    import random

    words = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < megabytes * 10**6:
            line = " ".join(f"w{words.randrange(1000)}" for _ in range(200)) + "\n"
            written += file.write(line)


def worker(path: Path) -> None:
    """Collect over a file with a tiny model, and print the peak memory before and after."""
    from bench_bridge import small_tokenizer

    bridge = TransformerBridge(make_model(TINY))
    corpus = Corpus.from_text({"text": path}, small_tokenizer(), context=CONTEXT, separator=2)
    statistics: list[Statistic] = [CountPositive(), MeanVariance(), TopK(20)]
    collected = bridge.collect(corpus, {POST: statistics}, batch_size=64, progress=False)
    # Not ru_maxrss, which begins at what the parent had.
    print(json.dumps({"peak": peak_bytes(), "tokens": collected.n_tokens["text"]}))


def case_memory(report: Report, quick: bool) -> None:
    peaks, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (1, 4) if quick else CORPUS_MB:
            path = Path(folder) / f"{megabytes}.txt"
            write_text(path, megabytes)
            started = time.perf_counter()
            command = [sys.executable, __file__, "--worker", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks.append(found["peak"] / 2**20)
            seconds = time.perf_counter() - started
            rows.append((str(megabytes), f"{found['tokens']:,}", f"{peaks[-1]:.0f}", f"{seconds:.0f}"))
    report.say(table(("corpus MB", "tokens", "peak MiB", "seconds"), rows))
    report.target(
        Target(
            "growth of peak memory",
            peaks[1] - peaks[0],
            TARGET_MEMORY_MIB,
            " MiB",
            f"{rows[1][0]} MB against {rows[0][0]}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, help="only these")
    parser.add_argument("--quick", action="store_true", help="a few rounds; writes nothing")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    shape = TINY if arguments.tiny else BLOOM_560M
    rounds, batches = (3, 1) if arguments.quick else (20, 2)
    report = Report("Corpora: what collecting costs")
    report.say("\n".join(machine_lines()))
    report.say(f"- clock: {arguments.clock}; {shape}; batches of {ROWS} x {CONTEXT} tokens")
    for case in arguments.cases or CASES:
        report.section(case)
        if case == "memory":
            case_memory(report, arguments.quick)
        else:
            run = case_counts if case == "counts" else case_statistics
            run(report, shape, rounds, batches, arguments.clock)
    if arguments.cases is None and not arguments.tiny and not arguments.quick:
        name = f"corpora_{arguments.hardware}_{time.strftime('%Y%m')}.md"
        report.write(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    main()
