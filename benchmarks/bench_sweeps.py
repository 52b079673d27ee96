"""What sweeps cost: Pellucid beside TransformerLens' patching, a loop with plain torch hooks, and nnsight.

    python benchmarks/bench_sweeps.py                  every case, writes results/sweeps_<hardware>_<yyyymm>.md
    python benchmarks/bench_sweeps.py --quick          few cells, prints and writes nothing
    python benchmarks/bench_sweeps.py --cases a c      only these

Cases: (a) ``resid_pre``, 560M-shaped, the metric given in three ways; (b) ``attn_out``, head ``z``, head pattern, zero
ablation; (c) how cost grows with tokens, layers, edits and threads, fitted; (d) tiny, and a long context.

Each case first checks that the programs give the same numbers. A sweep by one forward a cell takes minutes to half an
hour, so the programs that work so are timed on a few random cells, others in each round, and scaled to all of them; the
numbers of every round are compared too. Beside each sweep of ours stands its floor: the operations of its plan over the
rate of matrix products measured in the same minute.
"""

from __future__ import annotations

import argparse
import functools
import gc
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import (
    BLOOM_560M,
    TINY,
    Program,
    Report,
    Shape,
    Target,
    Timings,
    machine_lines,
    make_model,
    measure,
    table,
)
from sweep_programs import (
    ABLATION,
    ATTN_OUT,
    DECLARED,
    HEAD_Z,
    PATTERN,
    RESID_PRE,
    Cells,
    Site,
    Study,
    difference,
    first_layers,
    has_lens,
    has_nnsight,
    log_probability,
)
from torch import Tensor
from transformers import BloomForCausalLM

from pellucid.sweep import MetricLike, SweepPlan

LENS = "TransformerLens"
HOOKS = "plain torch hooks"
NNSIGHT = "nnsight"
DECLARED_NAME = "Pellucid, declared metric"
POSITIONS_NAME = "Pellucid, function, logit_positions=[-1]"
WHOLE_NAME = "Pellucid, function of the whole last position"

BOUND = 2e-5
"""Largest difference of two programs' numbers: float32 runs of 24 layers that round differently."""

VISIBLE = 20.0
"""The numbers must range over at least so many bounds, or equal numbers would say nothing."""

TARGET_RESID = 15.0
TARGET_RESID_WHOLE = 10.0
TARGET_Z = 15.0
TARGET_ABLATION = 8.0


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        quick: few cells, one round.
        threads: of torch.
    """

    quick: bool
    threads: int

    def rounds(self, full: int) -> int:
        return 1 if self.quick else full

    def sample(self, full: int) -> int:
        """Cells that a slow program is timed on."""
        return min(full, 2) if self.quick else full

    def ours(self, full: int | None) -> int | None:
        """Cells that ours is timed on, ``None`` for all."""
        return min(full or 24, 24) if self.quick else full


# -- one comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A sweep of ours: the metric, and the same one as a plain function for the others."""

    name: str
    metric: MetricLike
    function: Callable[[Tensor], Tensor]
    logit_positions: tuple[int, ...] | None = None


OURS = (
    Ours(DECLARED_NAME, DECLARED, difference),
    Ours(POSITIONS_NAME, difference, difference, (-1,)),
    Ours(WHOLE_NAME, log_probability, log_probability, (-1,)),
)


@dataclass
class Compared:
    """What one comparison found.

    Attributes:
        timings: seconds of one sweep over ``cells``, slow programs scaled.
        plans: of ours, by name.
        floors: seconds, of ours, by name.
        cells: number of them.
    """

    timings: Timings
    plans: dict[str, SweepPlan]
    floors: dict[str, float]
    cells: int

    def times(self, slow: str, ours: str) -> float:
        """How many times faster ours is: median over rounds."""
        return self.timings.ratio(slow, ours)

    def over_floor(self, ours: str) -> float:
        return self.timings.median(ours) / self.floors[ours]


@dataclass
class Recorder:
    """Runs a slow program on other random cells in each round, and keeps its numbers to be compared."""

    run: Callable[[Cells], Tensor]
    cells: Cells
    sample: int
    random: random.Random
    chosen: list[tuple[int, ...]] = field(default_factory=list)
    seen: dict[tuple[int, ...], float] = field(default_factory=dict)

    def choose(self) -> None:
        gc.collect()
        self.chosen = self.random.sample(list(self.cells), min(self.sample, len(self.cells)))

    def __call__(self) -> None:
        for cell, score in zip(self.chosen, self.run(self.chosen).tolist(), strict=True):
            self.seen[cell] = score

    @property
    def scale(self) -> float:
        return len(self.cells) / min(self.sample, len(self.cells))


def compare(
    report: Report,
    study: Study,
    site: Site,
    settings: Settings,
    *,
    ours: Sequence[Ours] = OURS[:1],
    peers: Mapping[str, int],
    rounds: int,
    part: int | None = None,
) -> Compared:
    """Check the numbers, then time.

    Args:
        report: where it is told.
        study: the model.
        site: what is swept.
        settings: how much is measured.
        ours: the ways in which ours is called; the first is the one that peers' numbers are compared with in each round.
        peers: slow programs, and on how many cells each is timed in a round.
        rounds: how many.
        part: sweep so many random cells only.
    """
    order = random.Random(0)
    whole = study.cells(site)
    part = settings.ours(part)
    cells = whole if part is None or part >= len(whole) else sorted(order.sample(whole, part))
    chosen = None if len(cells) == len(whole) else cells
    loops = {LENS: study.lens_loop, HOOKS: study.hook_loop, NNSIGHT: study.nnsight_loop}
    absent = {LENS: not has_lens() or not site.function, HOOKS: False, NNSIGHT: not has_nnsight()}
    peers = {name: settings.sample(count) for name, count in peers.items() if not absent[name]}

    few = order.sample(cells, min(len(cells), settings.sample(6)))
    for way in ours:
        found = study.ours(site, way.metric, few, way.logit_positions)
        for name in peers:
            gap = (loops[name](site, way.function, few) - found).abs().max()
            report.check(f"{name} and {way.name}, {len(few)} random cells", float(gap), BOUND)

    results: dict[str, Tensor] = {}

    def run_ours(way: Ours) -> None:
        results[way.name] = study.ours(site, way.metric, chosen, way.logit_positions)

    recorders = {
        name: Recorder(functools.partial(loops[name], site, ours[0].function), cells, count, order)
        for name, count in peers.items()
    }
    programs = [Program(way.name, functools.partial(run_ours, way), before=gc.collect) for way in ours]
    programs += [Program(name, recorder, before=recorder.choose) for name, recorder in recorders.items()]
    rate = product_rate(study.shape)
    timings = measure(programs, settings.rounds(rounds), warmup=0)
    rate = max(rate, product_rate(study.shape))

    scores = results[ours[0].name]
    by_cell = dict(zip(cells, scores.tolist(), strict=True))
    for name, recorder in recorders.items():
        worst = max(abs(by_cell[cell] - score) for cell, score in recorder.seen.items())
        what = f"{name} and {ours[0].name}, the {len(recorder.seen)} cells that were timed"
        report.check(what, worst, BOUND)
        timings.seconds[name] = [seconds * recorder.scale for seconds in timings.seconds[name]]
    spread = float(scores.max() - scores.min())
    visible = "" if spread >= VISIBLE * BOUND else "; **too narrow for the check to say much**"
    report.say(f"- the numbers range over {spread:.3g}{visible}")

    plans = {way.name: study.plan(site, way.metric, chosen) for way in ours}
    plan = plans[ours[0].name]
    floors = {name: plan.flops / rate for name, plan in plans.items()}
    of = "" if chosen is None else f" of {len(whole):,}, taken at random"
    report.say(f"- {len(cells):,} cells{of}; " + "; ".join(str(plan).splitlines()))
    report.say(f"- matrix products: {rate / 1e9:.0f} GFLOP/s")
    compared = Compared(timings, plans, floors, len(cells))
    report.say("\n" + compared_table(compared, recorders, ours[0].name) + "\n")
    return compared


def compared_table(compared: Compared, recorders: Mapping[str, Recorder], base: str) -> str:
    timings = compared.timings
    rows = []
    for name, seconds in timings.seconds.items():
        floor = compared.floors.get(name)
        timed = "whole" if name not in recorders else f"{len(recorders[name].chosen)} cells a round, scaled"
        rows.append(
            (
                name,
                f"{timings.median(name):.3f}",
                f"{timings.minimum(name):.3f}",
                f"{timings.median(name) / compared.cells * 1e3:.2f}",
                f"{timings.ratio(name, base):.2f}",
                "" if floor is None else f"{floor:.3f}",
                "" if floor is None else f"{timings.median(name) / floor:.2f}",
                timed,
                str(len(seconds)),
            )
        )
    head = ("program", "median s", "min s", "ms a cell", f"times `{base}`", "floor s", "times floor", "timed", "rounds")
    return table(head, rows)


def product_rate(shape: Shape, rows: int = 512, repetitions: int = 7) -> float:
    """Operations a second of the four projections of a block, on as many rows as a sweep packs together."""
    width = shape.d_model
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    operands = [(torch.randn(rows, inner), torch.randn(outer, inner)) for inner, outer in sizes]
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        for left, right in operands:
            torch.mm(left, right.T)
        best = min(best, time.perf_counter() - start)
    return sum(2 * rows * inner * outer for inner, outer in sizes) / best


# -- the cases ---------------------------------------------------------------------------------------------------------


def case_resid_pre(report: Report, study: Study, settings: Settings) -> None:
    """(a) The daily sweep, its metric given in three ways."""
    report.section(f"a. resid_pre: {study.shape}; 1 x {study.length} tokens, all of which differ")
    peers = {LENS: 24, HOOKS: 24, NNSIGHT: 8}
    found = compare(report, study, RESID_PRE, settings, ours=OURS, peers=peers, rounds=3)
    bounds = {DECLARED_NAME: TARGET_RESID, POSITIONS_NAME: TARGET_RESID, WHOLE_NAME: TARGET_RESID_WHOLE}
    if has_lens():
        for name, bound in bounds.items():
            report.target(faster(found, "resid_pre", name, LENS, bound))


def case_sites(report: Report, study: Study, settings: Settings) -> None:
    """(b) Other sites."""
    for site, rounds, slow, bound in (
        (ATTN_OUT, 2, LENS, None),
        (HEAD_Z, 1, LENS, TARGET_Z),
        (PATTERN, 2, LENS, None),
        (ABLATION, 2, HOOKS, TARGET_ABLATION),
    ):
        report.section(f"b. {site.name}: {study.shape}; 1 x {study.length} tokens")
        peers = {LENS: 24, HOOKS: 24}
        if site is HEAD_Z and not settings.quick:
            report.say("One round: a sweep of ours over all cells takes a minute and a half.\n")
        found = compare(report, study, site, settings, peers=peers, rounds=rounds)
        if bound is not None and slow in found.timings.seconds:
            report.target(faster(found, site.name, DECLARED_NAME, slow, bound))


def faster(found: Compared, what: str, ours: str, slow: str, bound: float) -> Target:
    note = f"{found.over_floor(ours):.2f} times its floor of {found.floors[ours]:.2f} s"
    name = f"{what}, {ours.removeprefix('Pellucid, ')}: times faster than {slow}"
    return Target(name, found.times(slow, ours), bound, "", note, at_least=True)


@dataclass(frozen=True)
class Point:
    """One measurement of how cost grows."""

    what: str
    row_layers: int
    edits: int
    seconds: float
    over_floor: float
    times_lens: float | None
    times_hooks: float | None
    fitted: bool = True


def row_layers(plan: SweepPlan, n_layers: int, length: int) -> int:
    """Packed rows that go through blocks, summed over layers."""
    total = 0
    for batch in plan.batches:
        for each in batch.edited:
            entering = len(each.columns) if 0 <= each.stage < n_layers else 0
            total += entering + (n_layers - max(each.stage + 1, 0)) * (length - each.first)
    return total


def point_of(what: str, study: Study, found: Compared, fitted: bool = True) -> Point:
    plan, timings = found.plans[DECLARED_NAME], found.timings
    return Point(
        what,
        row_layers(plan, study.shape.n_layers, study.length),
        found.cells,
        timings.median(DECLARED_NAME),
        found.over_floor(DECLARED_NAME),
        found.times(LENS, DECLARED_NAME) if LENS in timings.seconds else None,
        found.times(HOOKS, DECLARED_NAME) if HOOKS in timings.seconds else None,
        fitted,
    )


def case_growth(report: Report, model: BloomForCausalLM, study: Study, settings: Settings) -> None:
    """(c) How cost grows."""
    points: list[Point] = []
    for length, part, sample in ((4, None, 24), (16, 96, 12), (64, 96, 6), (128, 48, 3)):
        report.section(f"c. Tokens: 1 x {length}, resid_pre")
        study.set_length(length)
        found = compare(report, study, RESID_PRE, settings, peers={LENS: sample, HOOKS: sample}, rounds=2, part=part)
        points.append(point_of(f"{length} tokens, resid_pre", study, found))
    study.set_length(16)
    for part in (96, 384, 1536):
        report.section(f"c. Edits: {part} of head z, 1 x 16 tokens")
        found = compare(report, study, HEAD_Z, settings, peers={}, rounds=2 if part < 1000 else 1, part=part)
        points.append(point_of(f"{part} edits, head z", study, found))
    report.section("c. Threads: resid_pre, 1 x 16 tokens")
    for threads in sorted({1, settings.threads}):
        torch.set_num_threads(threads)
        found = compare(report, study, RESID_PRE, settings, peers={LENS: 6, HOOKS: 6}, rounds=2, part=96)
        points.append(point_of(f"{threads} thread(s), resid_pre", study, found, fitted=threads == settings.threads))
    torch.set_num_threads(settings.threads)
    for n_layers in (6, 12, 24):
        if n_layers >= study.shape.n_layers:
            continue  # the whole model is the measurement of 16 tokens
        report.section(f"c. Layers: the first {n_layers}, resid_pre, 1 x 16 tokens")
        cut = cut_study(model, study.shape, n_layers, 16)
        found = compare(report, cut, RESID_PRE, settings, peers={LENS: 12, HOOKS: 12}, rounds=2)
        points.append(point_of(f"{n_layers} layers, resid_pre", cut, found))
    report_growth(report, points, study.shape)


def cut_study(model: BloomForCausalLM, shape: Shape, n_layers: int, length: int) -> Study:
    name = f"{shape.name}, first {n_layers} layers"
    cut = Shape(name, n_layers, shape.d_model, shape.n_heads, shape.d_vocab)
    return Study(first_layers(model, n_layers), cut, length)


def report_growth(report: Report, points: Sequence[Point], shape: Shape) -> None:
    """Fit ``seconds = a * row_layers + b * edits`` to the relative errors, and print it beside what was measured."""
    fitted = [point for point in points if point.fitted]
    found = torch.tensor([[point.row_layers, point.edits] for point in fitted], dtype=torch.float64)
    seconds = torch.tensor([point.seconds for point in fitted], dtype=torch.float64)
    solution = torch.linalg.lstsq(found / seconds[:, None], torch.ones(len(fitted), 1, dtype=torch.float64)).solution
    per_row, per_edit = solution.flatten().tolist()
    report.section("c. How cost grows")
    rows = []
    for point in points:
        predicted = per_row * point.row_layers + per_edit * point.edits
        rows.append(
            (
                point.what,
                f"{point.row_layers:,}",
                f"{point.edits:,}",
                f"{point.seconds:.3f}",
                f"{predicted:.3f}" if point.fitted else "not in the fit",
                f"{point.over_floor:.2f}",
                "" if point.times_lens is None else f"{point.times_lens:.1f}",
                "" if point.times_hooks is None else f"{point.times_hooks:.1f}",
            )
        )
    head = (
        "sweep",
        "row-layers",
        "edits",
        "seconds",
        "by the fit",
        "times floor",
        f"faster than {LENS}",
        f"faster than {HOOKS}",
    )
    report.say(table(head, rows) + "\n")
    flops = 24 * shape.d_model**2
    report.say(
        f"Least squares over relative errors: {per_row * 1e6:.1f} us a packed row and layer ({flops / per_row / 1e9:.0f} "
        f"GFLOP/s without attention's own) and {per_edit * 1e6:+.0f} us an edit. A row-layer is one position of one edit in "
        "one block."
    )


def case_ends(report: Report, model: BloomForCausalLM | None, settings: Settings) -> None:
    """(d) A tiny model, and a long context."""
    report.section(f"d. resid_pre: {TINY}; 1 x 16 tokens")
    tiny = Study(make_model(TINY, scale=4.0), TINY, 16)
    compare(report, tiny, RESID_PRE, settings, peers={LENS: 24, HOOKS: 24, NNSIGHT: 24}, rounds=10)
    if model is None:
        return
    cut = cut_study(model, BLOOM_560M, 4, 1024)
    report.section(f"d. resid_pre: {cut.shape}; 1 x 1,024 tokens")
    compare(report, cut, RESID_PRE, settings, peers={LENS: 2, HOOKS: 2}, rounds=2, part=24)


# -- the command -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--quick", action="store_true", help="few cells; writes nothing unless --out is given")
    parser.add_argument("--cases", nargs="+", choices="abcd", default=list("abcd"), metavar="CASE")
    parser.add_argument("--no-large", action="store_true", help="leave the 560M-shaped model out (3 GB): only tiny")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=Path, help="the result file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    settings = Settings(arguments.quick, arguments.threads)
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = Report("What sweeps cost" + (" (quick: too few repetitions to quote)" if settings.quick else ""))
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    report.say("- float32, eval mode, gradients off; TransformerLens in compatibility mode, no weight processing")
    report.say("- clean activations are cached beforehand for every program and not timed")
    report.say(f"- metric: logit difference at the last position, but for {WHOLE_NAME!r}: log-probability")
    for peer, present in ((LENS, has_lens()), (NNSIGHT, has_nnsight())):
        if not present:
            report.say(f"- {peer} is not installed and was skipped (pip install 'pellucid[bench]')")

    cases, start = set(arguments.cases), time.perf_counter()
    model = None if arguments.no_large else make_model(BLOOM_560M, scale=3.0)
    if model is not None and cases & set("abc"):
        study = Study(model, BLOOM_560M, 16)
        if "a" in cases:
            case_resid_pre(report, study, settings)
        if "b" in cases:
            case_sites(report, study, settings)
        if "c" in cases:
            case_growth(report, model, study, settings)
        del study
    if "d" in cases:
        case_ends(report, model, settings)
    report.say(f"\nAll of it took {(time.perf_counter() - start) / 60:.1f} minutes.")
    print("\n" + report.text().split("\n## Configuration")[0])
    out: Path | None = arguments.out
    if out is None and not settings.quick and cases == set("abcd") and model is not None:
        out = Path(__file__).parent / "results" / f"sweeps_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
