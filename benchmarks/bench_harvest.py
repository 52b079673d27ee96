"""What storing activations costs: a harvest beside a bare forward stopped at the same layer, plain hooks, TransformerLens.

    python benchmarks/bench_harvest.py                  every case, writes benchmarks/results/harvest_<hardware>_<yyyymm>.md
    python benchmarks/bench_harvest.py --quick          a few rounds, prints and writes nothing
    python benchmarks/bench_harvest.py --cases speed    only these
    python benchmarks/bench_harvest.py --tiny           a tiny model (to see that it runs)

speed    one residual of the 560M shape, 4 x 128 tokens: tokens per second, checksums and syncs included
memory   peak memory of a process that harvests a small and a large corpus, and of one that reads them
reader   rows per second, shuffled and random

The programs of the first case are first shown to store the same numbers (see common.py).
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_corpora import write_text
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
    random_tokens,
    table,
    twin,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.scale.harvest import Harvester
from pellucid.scale.stored_activations import StoredActivations

BARE = "bare forward, stopped there"
PLAIN = "plain torch hook, save_file a shard"
HARVEST = "Pellucid, harvest"
LENS = "TransformerLens, run_with_cache, save_file a shard"

TARGET_SPEED = 0.95
TARGET_MEMORY_MIB = 32.0
"""Peak memory may differ by so much between two corpora: what the allocator and the interpreter do differently."""

ROWS, CONTEXT, BATCHES_PER_SHARD = 4, 128, 4
CORPUS_MB = (4, 16)
"""Of text, five bytes a token: both over what is held at a time, 2**18 tokens of the corpus, and, while reading, two groups
of eight shards."""

CASES = ("speed", "memory", "reader")


class Bench:
    """A model, a corpus of a few batches, and the loops that people write."""

    def __init__(self, shape: Shape, batches: int, scratch: Path) -> None:
        self.shape, self.layer, self.scratch = shape, shape.n_layers // 2, scratch
        self.model = make_model(shape)
        self.bridge = TransformerBridge(self.model)
        self.cut = twin(self.model).transformer
        self.cut.h = nn.ModuleList(self.cut.h[: self.layer])
        self.cut.ln_f = nn.Identity()
        self.tokens = random_tokens(shape, batches * ROWS, CONTEXT)
        self.corpus = Corpus.from_tokens({"random": self.tokens}, context=CONTEXT)
        self.corpus.index()
        self.hook = f"blocks.{self.layer}.hook_resid_pre"

    def bare(self) -> None:
        with torch.no_grad():
            for tokens in self.tokens.split(ROWS):
                self.cut(tokens, use_cache=False)

    def plain(self, out: Path) -> None:
        """As it is usually written: kept, put together and saved in the loop, neither hashed nor synced."""
        kept: list[Tensor] = []
        handle = self.cut.h[-1].register_forward_hook(lambda module, given, output: kept.append(output[0]))
        try:
            with torch.no_grad():
                for index, tokens in enumerate(self.tokens.split(ROWS)):
                    self.cut(tokens, use_cache=False)
                    self._save(kept, index, out)
        finally:
            handle.remove()

    def lens(self, lens: Any, out: Path) -> None:
        kept: list[Tensor] = []
        name = f"blocks.{self.layer - 1}.hook_resid_post"
        with torch.no_grad():
            for index, tokens in enumerate(self.tokens.split(ROWS)):
                _, cache = lens.run_with_cache(tokens, names_filter=name, stop_at_layer=self.layer)
                kept.append(cache[name])
                self._save(kept, index, out)

    def _save(self, kept: list[Tensor], index: int, out: Path) -> None:
        if (index + 1) % BATCHES_PER_SHARD == 0 or (index + 1) * ROWS == len(self.tokens):
            save_file({"x": torch.cat(kept).flatten(0, 1)}, out / f"{index:05d}.safetensors")
            kept.clear()

    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def harvester(self) -> Harvester:
        """Begun, with weights hashed and corpus read: once a job, not once a token."""
        return Harvester(
            self.bridge, self.corpus, self.hook, self.folder(), batch_size=ROWS, batches_per_shard=BATCHES_PER_SHARD
        )


def stored(folder: Path) -> Tensor:
    """What a loop saved, ``[rows, d]``."""
    from safetensors.torch import load_file

    return torch.cat([load_file(path)["x"] for path in sorted(folder.glob("*.safetensors"))])


def case_speed(report: Report, shape: Shape, batches: int, rounds: int, scratch: Path) -> None:
    """Target 1: 0.95 of the tokens per second."""
    report.section(f"One residual stored ({shape})")
    bench = Bench(shape, batches, scratch)
    report.say(
        f"{bench.hook}, {batches} batches of {ROWS} x {CONTEXT} tokens, a shard is {BATCHES_PER_SHARD} batches.\n"
    )
    harvester, plain = bench.harvester(), bench.folder()
    harvester.run(progress=False)
    bench.plain(plain)
    store = StoredActivations(harvester.folder.path)
    rows = torch.cat([store.shard(index, bench.hook) for index in range(store.n_shards)])
    report.check("harvest and a plain torch hook", torch.equal(rows, stored(plain)))
    holders: dict[str, Any] = {}

    def begin() -> Path:
        holders["harvester"] = bench.harvester()
        return holders["harvester"].folder.path  # type: ignore[no-any-return]

    programs = [
        Program(BARE, bench.bare),
        Program(
            HARVEST, lambda: holders["harvester"].run(progress=False), before=begin, after=lambda path: shutil.rmtree(path)
        ),
        Program(
            PLAIN, lambda: bench.plain(holders["plain"]), before=lambda: holders.update(plain=bench.folder()),
            after=lambda _: shutil.rmtree(holders["plain"]),
        ),
    ]  # fmt: skip
    lens = make_lens(bench)
    if lens is not None:
        programs.append(
            Program(
                LENS, lambda: bench.lens(lens, holders["lens"]), before=lambda: holders.update(lens=bench.folder()),
                after=lambda _: shutil.rmtree(holders["lens"]), rounds=3,
            )
        )  # fmt: skip
    timings = measure(programs, rounds, warmup=1)
    report.timings(timings, BARE)
    tokens = bench.tokens.numel()
    for program in programs:
        report.say(f"- {program.name}: {tokens / timings.median(program.name):,.0f} tokens per second")
    speed = 1 / timings.ratio(HARVEST, BARE)
    # Targets are upper bounds: the part of the speed that is lost.
    report.target(
        Target(
            f"speed lost by harvesting one residual, {shape.name}",
            1 - speed,
            1 - TARGET_SPEED,
            "",
            f"{speed:.3f} of it",
        )
    )


def make_lens(bench: Bench) -> Any | None:
    """TransformerLens around the same weights, if it is installed."""
    if not installed("transformer_lens"):
        return None
    from bench_bridge import open_lens

    return open_lens(twin(bench.model))


# VmHWM and not ru_maxrss: the latter begins at what the parent had.
MEMORY = """
import sys
sys.path.insert(0, {benchmarks!r})
from bench_bridge import small_tokenizer
from common import TINY, make_model
from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.scale.harvest import harvest
corpus = Corpus.from_text({{"text": {text!r}}}, small_tokenizer(), context=128, separator=2)
bridge = TransformerBridge(make_model(TINY))
harvest(bridge, corpus, "blocks.1.mlp.hook_post", {out!r}, batch_size=8, batches_per_shard=8, progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

READING = """
from pellucid.scale.stored_activations import StoredActivations
for batch in StoredActivations({out!r}).batches(3000):  # leaves rows of one group of shards for the next
    pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def case_memory(report: Report, scratch: Path, sizes: tuple[int, int]) -> None:
    """Target 2: memory does not grow with the corpus."""
    report.section(
        "Peak memory (resident, mapped files counted) of a process of its own, tiny model, MLP neurons of a layer"
    )
    peaks: dict[str, list[float]] = {"harvest": [], "read": []}
    rows = []
    for size in sizes:
        text, out = scratch / f"{size}.txt", scratch / f"store{size}"
        write_text(text, size)
        given = {"benchmarks": str(Path(__file__).parent), "text": str(text), "out": str(out)}
        for name, program in (("harvest", MEMORY), ("read", READING)):
            done = subprocess.run(
                [sys.executable, "-c", program.format(**given)], capture_output=True, text=True, check=True
            )
            peaks[name].append(int(done.stdout) / 1024)
        gib = sum(path.stat().st_size for path in out.iterdir()) / 2**30
        rows.append(
            (
                f"{size} MB",
                f"{len(StoredActivations(out)):,}",
                f"{gib:.2f} GiB",
                *(f"{peaks[name][-1]:.0f} MiB" for name in peaks),
            )
        )
        shutil.rmtree(out)
    report.say(table(("text", "rows", "stored", "peak, harvesting", "peak, reading all batches"), rows))
    for name, (small, large) in peaks.items():
        grown = large - small
        report.target(
            Target(f"growth of peak memory, {name}, corpus x {sizes[1] // sizes[0]}", grown, TARGET_MEMORY_MIB, " MiB")
        )


def case_reader(report: Report, scratch: Path) -> None:
    """No target: orders of magnitude."""
    report.section("Reading")
    bench = Bench(TINY, 400, scratch)
    harvester = Harvester(bench.bridge, bench.corpus, "blocks.0.mlp.hook_post", bench.folder(), batches_per_shard=8)
    harvester.run(progress=False)
    store = StoredActivations(harvester.folder.path)
    store.verify()
    programs = [
        Program("shuffled batches of 4096", lambda: [None for _ in store.batches(4096)]),
        Program("2048 random rows", lambda: store.random_rows(2048)),
    ]
    timings = measure(programs, 5, warmup=1)
    for program, rows in zip(programs, (len(store), 2048), strict=True):
        seconds = timings.median(program.name)
        report.say(f"- {program.name}: {rows / seconds:,.0f} rows, {rows * 1024 / seconds / 2**20:,.0f} MiB per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is written")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of the 560M shape")
    parser.add_argument("--hardware", default="cpu", help="part of the result file's name")
    parser.add_argument("--out", type=Path, help="the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the job's own number
    report = Report("Harvesting activations")
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "speed" in arguments.cases:
            shape = TINY if arguments.tiny else BLOOM_560M
            case_speed(report, shape, 8 if arguments.quick else 16, 2 if arguments.quick else 7, scratch)
        if "memory" in arguments.cases:
            small, large = CORPUS_MB
            case_memory(report, scratch, (small, large // 2) if arguments.quick else (small, large))
        if "reader" in arguments.cases:
            case_reader(report, scratch)
    report.say(f"\nPeak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    out = arguments.out
    if out is None and not arguments.quick:
        out = Path(__file__).parent / "results" / f"harvest_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
