"""What fast attention (``attn_implementation="sdpa"``) saves at length: memory and time, beside the exact path.

    python benchmarks/bench_attention.py              every case, writes results/attention_<hardware>_<yyyymm>.md
    python benchmarks/bench_attention.py --quick      fewer sizes
    python benchmarks/bench_attention.py --tiny       a tiny model, to try the program itself
    python benchmarks/bench_attention.py --parts time --dtypes float32   one part alone; prints, and writes nothing

The model is 560M-shaped but for its vocabulary, whose logits (2 GB at 2,048 tokens) would cover what attention takes.

Memory: each case runs in a fresh process, one after the other, and is the growth of the largest resident set (Linux'
``VmHWM``, set back just before) over what the process held before the run. Time: paired and interleaved in one process, see
``common.py``. Each case first shows that both give the same numbers, within the bound of ``bridge.verify()``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    BLOOM_560M,
    CLOCKS,
    TINY,
    Program,
    Report,
    Shape,
    Target,
    machine_lines,
    make_model,
    measure,
    peak_bytes,
    random_tokens,
    reset_peak,
    resident_bytes,
    table,
)
from torch import Tensor

from pellucid import TransformerBridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (128, 512, 1024, 2048)
PARTS = ("memory", "time")
ROUTES = ("hugging face", "eager", "sdpa", "sdpa, one pattern kept")
"""Hugging Face's model; our exact path in every layer (a function that only looks at each ``hook_pattern``); the fused
kernel in every layer; the fused kernel in all layers but one."""


@dataclass(frozen=True)
class Memory:
    """One forward in a process of its own."""

    route: str
    dtype: str
    batch: int
    length: int
    before_bytes: int
    peak_bytes: int
    after_bytes: int

    @property
    def growth(self) -> float:
        """MiB that the forward took at its highest."""
        return (self.peak_bytes - self.before_bytes) / 2**20


def model_shape(tiny: bool, layers: int | None) -> Shape:
    """The model's sizes: few words, so that attention is what is measured."""
    shape = TINY if tiny else BLOOM_560M
    return replace(
        shape, name=f"{shape.name}, small vocabulary", d_vocab=1000, n_layers=layers if layers else shape.n_layers
    )


def look(tensor: Tensor, hook: Any) -> None:
    """A function that changes nothing."""


def runner(bridge: TransformerBridge, route: str, tokens: Tensor) -> Callable[[], Tensor]:
    """One forward by ``route``."""
    n_layers = bridge.cfg.n_layers
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]

    def hugging_face() -> Tensor:
        return bridge.hf_model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def exact() -> Tensor:
        bridge.set_attn_implementation("eager")
        return bridge.run_with_hooks(tokens, fwd_hooks=[(patterns, look)])  # type: ignore[no-any-return]

    def fast() -> Tensor:
        bridge.set_attn_implementation("sdpa")
        return bridge(tokens)  # type: ignore[no-any-return]

    def mixed() -> Tensor:
        bridge.set_attn_implementation("sdpa")
        return bridge.run_with_hooks(tokens, fwd_hooks=[(patterns[n_layers // 2], look)])  # type: ignore[no-any-return]

    return dict(zip(ROUTES, (hugging_face, exact, fast, mixed), strict=True))[route]


def make_bridge(shape: Shape, dtype: str) -> TransformerBridge:
    return TransformerBridge(make_model(shape).to(DTYPES[dtype]))


# -- memory ------------------------------------------------------------------------------------------------------------


def run_alone(route: str, dtype: str, batch: int, length: int, shape: Shape) -> Memory:
    """One forward in this process, which has done nothing but a short one before."""
    bridge = make_bridge(shape, dtype)
    with torch.no_grad():
        runner(bridge, route, random_tokens(shape, 1, 4))()  # what is loaded on first use
        gc.collect()
        run = runner(bridge, route, random_tokens(shape, batch, length))
        before = resident_bytes()
        reset_peak()
        logits = run()
        peak = peak_bytes()
    del logits
    return Memory(route, dtype, batch, length, before, peak, resident_bytes())


def memory_of(route: str, dtype: str, batch: int, length: int, shape: Shape) -> Memory:
    """The same in a process of its own."""
    call = [sys.executable, __file__, "--alone", route, dtype, str(batch), str(length), "--layers", str(shape.n_layers)]
    call += ["--tiny"] if shape.d_model == TINY.d_model else []
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{route} failed:\n{done.stderr[-3000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def report_memory(report: Report, shape: Shape, dtypes: list[str], tiny: bool, quick: bool) -> None:
    """Growth by route, and by length."""
    report.section("Memory of one forward")
    sizes = [(1, 64), (2, 64)] if tiny else [(1, 512), (1, 1024), (1, 2048), (4, 1024)]
    if quick:
        sizes = sizes[-2:-1]
    growth: dict[tuple[str, str, int, int], float] = {}
    rows = []
    for dtype in dtypes:
        for batch, length in sizes:
            for route in ROUTES:
                found = memory_of(route, dtype, batch, length, shape)
                growth[dtype, route, batch, length] = found.growth
            row = [growth[dtype, route, batch, length] for route in ROUTES]
            rows.append((dtype, f"{batch} x {length}", *(f"{mib:.0f}" for mib in row), f"{row[2] / row[0]:.2f}"))
    report.say(table(("dtype", "tokens", *(f"{route}, MiB" for route in ROUTES), "sdpa / hugging face"), rows))
    length = max(length for _, length in sizes)
    bias = shape.n_heads * length**2 * 4 / 2**20
    report.say(
        f"\nThe bias of 1 x {length} in float32 is {bias:.0f} MiB: n_heads * pos * pos numbers, made once. The exact path "
        "holds scores and pattern at once, in each layer anew."
    )
    if not tiny:
        for dtype in dtypes:
            ratio = growth[dtype, "sdpa", 1, 2048] / growth[dtype, "hugging face", 1, 2048]
            report.target(Target(f"peak memory at 1 x 2048, {dtype}: sdpa / Hugging Face", ratio, 0.5))


# -- time --------------------------------------------------------------------------------------------------------------


def report_time(
    report: Report, shape: Shape, dtypes: list[str], tiny: bool, quick: bool, rounds: int, clock: str
) -> None:
    """Time by length, every route on one model object."""
    for dtype in dtypes:
        bridge = make_bridge(shape, dtype)
        for length in (16, 64) if tiny else LENGTHS[:-1] if quick else LENGTHS:
            report.section(f"Time of one forward, {dtype}, 1 x {length}")
            tokens = random_tokens(shape, 1, length)
            runs = {route: runner(bridge, route, tokens) for route in ROUTES}
            with torch.no_grad():
                exact, fast = runs["hugging face"](), runs["sdpa"]()
                report.check("logits, our exact path", torch.equal(runs["eager"](), exact))
                eps = torch.finfo(DTYPES[dtype]).eps
                bound = (64 + 2 * length) * shape.n_layers * eps * float(exact.abs().max())
                report.check("logits, sdpa", float((fast.double() - exact.double()).abs().max()), bound)
                few = max(2, rounds * 128 // max(length, 128))
                timings = measure([Program(route, run) for route, run in runs.items()], few, 1, clock)
            report.timings(timings, "hugging face")
            if length == 2048:
                ratio = timings.ratio("sdpa", "hugging face")
                report.target(Target(f"time at 1 x 2048, {dtype}: sdpa / Hugging Face", ratio, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--quick", action="store_true", help="memory at 1 x 2048 and time up to 1,024 tokens only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layers", type=int, help="fewer layers than 24, to be quicker; the file says how many")
    parser.add_argument("--rounds", type=int, default=48, help="at 128 tokens; fewer at more")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--note", default="", help="a sentence for the result file, such as what else was running")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = model_shape(arguments.tiny, arguments.layers)
    if arguments.alone is not None:
        route, dtype, batch, length = arguments.alone
        print(json.dumps(asdict(run_alone(route, dtype, int(batch), int(length), shape))))
        return
    report = Report("Fast attention")
    report.say("\n".join(machine_lines()))
    report.say(f"- clock: {arguments.clock}")
    if arguments.note:
        report.say(f"- note: {arguments.note}")
    report.section(str(shape).replace(", float32", ""))
    dtypes, tiny, quick = arguments.dtypes, arguments.tiny, arguments.quick
    if "memory" in arguments.parts:
        report_memory(report, shape, dtypes, tiny, quick)
    if "time" in arguments.parts:
        report_time(report, shape, dtypes, tiny, quick, arguments.rounds, arguments.clock)
    if not tiny and len(arguments.parts) == len(PARTS) and len(dtypes) == len(DTYPES):
        name = f"attention_{arguments.hardware}_{time.strftime('%Y%m')}.md"
        report.write(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    main()
