"""What memory a sweep takes: peak growth of resident memory beside the plan's estimate and the stated limit.

    python benchmarks/bench_sweep_memory.py          every case, writes results/sweep_memory_<hardware>_<yyyymm>.md
    python benchmarks/bench_sweep_memory.py --quick  small models only, prints and writes nothing

Each case runs in a fresh process, one after the other: what a process has already freed and kept hides growth. Growth is
the largest resident set (Linux' ``VmHWM``, set back just before) less the resident set before the sweep is made; the model
is loaded and has run a few tokens by then. All weights are one number: sizes of tensors do not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import BLOOM_560M, Report, Shape, Target, machine_lines, random_tokens, resident_bytes, table
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from pellucid import TransformerBridge
from pellucid.sweep import (
    Edit,
    EditSet,
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    SetTo,
    Sweep,
    SweepPlan,
    Zero,
)
from pellucid.sweep.plan import SAFETY

LOOSEST = 3.0
"""The estimate is a bound; it may be so many times the growth where something large is swept."""

MB = 10**6

SMALL = Shape("small", n_layers=6, d_model=256, n_heads=8, d_vocab=50_000)
WIDE = Shape("560M's width, 4 layers", n_layers=4, d_model=1024, n_heads=16, d_vocab=50_000)


@dataclass(frozen=True)
class Case:
    """One sweep.

    Attributes:
        shape: of the model.
        rows: rows of the base run.
        length: its tokens.
        edits: what is edited, a word of :func:`edits_of`.
        metric: ``"difference"``, ``"log-probability"``, ``"KL"`` or ``"function"``.
        limit: memory limit in MB, ``None`` for the default.
    """

    shape: Shape
    rows: int
    length: int
    edits: str
    metric: str
    limit: int | None = None

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.rows} x {self.length}, {self.edits}, {self.metric}"


CASES: tuple[Case, ...] = (
    *(Case(BLOOM_560M, 1, 16, "resid_pre", "difference", limit) for limit in (None, 200, 120)),
    *(Case(BLOOM_560M, 1, 16, "z", "difference", limit) for limit in (None, 200, 120)),
    *(Case(BLOOM_560M, 1, 16, "resid_pre", "log-probability", limit) for limit in (None, 200, 120)),
    Case(WIDE, 1, 16, "resid_pre", "difference"),
    Case(WIDE, 1, 128, "resid_pre", "difference"),
    Case(WIDE, 1, 128, "z", "difference"),
    Case(WIDE, 1, 1024, "some resid_pre", "difference"),
    Case(WIDE, 1, 1024, "some resid_pre", "difference", 700),
    Case(WIDE, 4, 64, "resid_pre", "difference"),
    Case(WIDE, 4, 64, "resid_pre", "KL"),
    Case(SMALL, 1, 16, "resid_pre", "difference"),
    Case(SMALL, 1, 16, "z", "function"),
    Case(SMALL, 1, 64, "resid_pre", "log-probability"),
    Case(SMALL, 8, 32, "pattern", "difference"),
)


@dataclass(frozen=True)
class Result:
    """What one case found, in bytes."""

    number: int
    grown: int
    estimate: int
    limit: int
    base: int
    n_edits: int
    batches: int
    rows_at_once: int
    seconds: float

    @property
    def factor(self) -> float:
        """What the process grew by for a byte alive beside the base run, as the plan counts them."""
        return (self.grown - self.base) / ((self.estimate - self.base) / SAFETY)


# -- in the process of one case ----------------------------------------------------------------------------------------


def status(field: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def edits_of(kind: str, shape: Shape, length: int) -> list[EditSet]:
    """Edits of a case: given vectors at each layer and position, or each head set to zero."""
    generator = torch.Generator().manual_seed(3)

    def vector() -> SetTo:
        return SetTo(torch.randn(shape.d_model, generator=generator))

    layers, heads = range(shape.n_layers), range(shape.n_heads)
    if kind == "resid_pre":
        return [Edit(f"blocks.{i}.hook_resid_pre", vector(), positions=p) for i in layers for p in range(length)]
    if kind == "some resid_pre":
        places = range(0, length, length // 8)
        return [Edit(f"blocks.{i}.hook_resid_pre", vector(), positions=p) for i in layers for p in places]
    if kind == "z":
        return [Edit(f"blocks.{i}.attn.hook_z", Zero(), heads=head) for i in layers for head in heads]
    assert kind == "pattern"
    return [Edit(f"blocks.{i}.attn.hook_pattern", Zero(), heads=head, keys=1) for i in layers for head in heads]


def metric_of(kind: str, bridge: TransformerBridge, tokens: Tensor) -> Metric | Function:
    if kind == "difference":
        return LogitDifference(3, 5)
    if kind == "log-probability":
        return LogProbability(4)
    if kind == "function":
        return Function()
    assert kind == "KL"
    return KLDivergence(bridge(tokens)[:, -1].clone())


class Function:
    """A plain function of logits that reads a whole position."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[0, -1].log_softmax(-1)[4]


def blank_model(shape: Shape) -> BloomForCausalLM:
    """A model of that shape without the half minute that random weights take; every page of it is in memory."""
    config = BloomConfig(
        vocab_size=shape.d_vocab, hidden_size=shape.d_model, n_layer=shape.n_layers, n_head=shape.n_heads
    )
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    assert not list(model.buffers()), "a buffer without numbers"
    return model


def run_case(number: int) -> Result:
    case = CASES[number]
    bridge = TransformerBridge(blank_model(case.shape))
    tokens = random_tokens(case.shape, case.rows, case.length)
    for _ in range(2):  # buffers of the libraries are not the sweep's
        bridge(tokens[:1, :4])
    edits = edits_of(case.edits, case.shape, case.length)
    metric = metric_of(case.metric, bridge, tokens)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = status("VmRSS"), time.perf_counter()
    limit = None if case.limit is None else case.limit * MB
    plan: SweepPlan = Sweep(bridge, tokens, metric, memory_limit=limit).run(edits, progress=False).plan
    seconds = time.perf_counter() - start
    return Result(
        number=number,
        grown=status("VmHWM") - before,
        estimate=plan.peak_bytes,
        limit=plan.memory_limit,
        base=plan.base_bytes,
        n_edits=plan.n_edits,
        batches=len(plan.batches),
        rows_at_once=plan.rows_at_once,
        seconds=seconds,
    )


# -- the command -------------------------------------------------------------------------------------------------------


def measured(number: int, threads: int) -> Result:
    """A case in a process of its own."""
    call = [sys.executable, __file__, "--worker", str(number), "--threads", str(threads)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{CASES[number]} failed:\n{done.stderr[-3000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def result_table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        case = CASES[result.number]
        rows.append(
            (
                str(case),
                "default" if case.limit is None else str(case.limit),
                f"{result.grown / MB:.1f}",
                f"{result.estimate / MB:.1f}",
                f"{result.estimate / result.grown:.2f}",
                f"{result.factor:.2f}",
                f"{result.base / MB:.1f}",
                str(result.n_edits),
                str(result.batches),
                str(result.rows_at_once),
                f"{result.seconds:.1f}",
            )
        )
    head = (
        "case",
        "limit MB",
        "grown MB",
        "estimate MB",
        "estimate / grown",
        "grown for a byte alive",
        "base run MB",
        "edits",
        "batches",
        "rows at once",
        "seconds",
    )
    return table(head, rows)


def targets(results: Sequence[Result]) -> list[Target]:
    """Growth within the limit and the estimate, and the estimate no more than a few times the growth."""
    found = []
    for result in results:
        case = CASES[result.number]
        name = f"{case}{'' if case.limit is None else f', limit {case.limit} MB'}"
        found.append(Target(f"growth, {name}", result.grown / MB, result.limit / MB, " MB"))
        found.append(Target(f"growth by the estimate, {name}", result.grown / MB, result.estimate / MB, " MB"))
        if result.estimate > 100 * MB:
            times = result.estimate / result.grown
            found.append(Target(f"estimate over growth, {name}", times, LOOSEST, ""))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--quick", action="store_true", help="small models only; writes nothing unless --out is given")
    parser.add_argument("--cases", nargs="+", type=int, choices=range(len(CASES)), metavar="N", help="only these")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.worker is not None:
        print(json.dumps(asdict(run_case(arguments.worker))))
        return
    if not resident_bytes():
        raise SystemExit("Peak memory is read from Linux' /proc, which this system does not have.")
    report = Report("What memory a sweep takes")
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    report.say(f"- {arguments.threads} torch thread(s), float32; MB are 10^6 bytes")
    report.say(f"- the estimate is the base run and {SAFETY} bytes for each byte alive beside it")
    report.section("Growth and estimate")
    chosen = arguments.cases
    if chosen is None:
        chosen = [n for n, case in enumerate(CASES) if not arguments.quick or case.shape is SMALL]
    results = []
    for number in chosen:
        results.append(measured(number, arguments.threads))
        last = results[-1]
        print(f"{CASES[number]}: grown {last.grown / MB:.1f} MB, estimate {last.estimate / MB:.1f} MB", flush=True)
    report.say(result_table(results))
    report.target(*targets(results))
    out: Path | None = arguments.out
    if out is None and not arguments.quick and arguments.cases is None:
        out = Path(__file__).parent / "results" / f"sweep_memory_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
