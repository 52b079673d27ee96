"""What a logit's attribution to every head costs, beside a forward of Hugging Face's model: time and memory.

    python benchmarks/bench_attribution.py              560M-shaped, writes results/attribution_<hardware>_<yyyymm>.md
    python benchmarks/bench_attribution.py --layers 3   fewer layers; the file says how many
    python benchmarks/bench_attribution.py --quick      a tiny model; writes nothing

``stack`` is TransformerLens' way: ``run_with_cache``, ``stack_head_results`` (all vectors of each head) and
``logit_attrs``. ``labelled`` is ``logit_attribution(by="head", positions="all")``, which makes no vectors. Both end with the
same numbers, which is checked. Time is paired and interleaved, see ``common.py``; memory is the growth of the largest
resident set (Linux' ``VmHWM``) over what the process held before, each program in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
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
from pellucid.analysis.attribution import logit_attribution

LENGTH, ANSWER, FOIL = 64, 20, 30
KEPT = ["blocks.*.attn.hook_z", "ln_final.hook_scale"]


def programs(shape: Shape) -> dict[str, Callable[[], Any]]:
    """A forward, and the two ways to an attribution ``[layer * head, batch, pos]``."""
    model = make_model(shape)
    bridge, tokens = TransformerBridge(model), random_tokens(shape, 1, LENGTH)

    def stack() -> Tensor:
        cache = bridge.run_with_cache(tokens, names_filter=KEPT)[1]
        attributed: Tensor = cache.logit_attrs(cache.stack_head_results(), ANSWER, FOIL)
        return attributed

    def labelled() -> Tensor:
        found = logit_attribution(bridge, tokens, ANSWER, FOIL, by="head", positions="all")
        return torch.from_numpy(found.values).flatten(0, 1)[:, None]

    return {"hugging face": lambda: model(tokens, use_cache=False).logits, "stack": stack, "labelled": labelled}


def growth(route: str, shape: Shape) -> float:
    """MiB that one program takes at its highest over what was there before; in a process of its own."""
    run = programs(shape)[route]
    with torch.no_grad():
        run()  # what libraries allocate once
        gc.collect()
        before = resident_bytes()
        reset_peak()
        run()
        return (peak_bytes() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--layers", type=int, help="fewer layers than 24; the file says how many")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--note", default="", help="a sentence for the result file, such as what else was running")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = TINY if arguments.quick else replace(BLOOM_560M, n_layers=arguments.layers or BLOOM_560M.n_layers)
    if arguments.alone is not None:
        print(json.dumps(growth(arguments.alone, shape)))
        return
    report = Report("Direct logit attribution of every head")
    report.say("\n".join(machine_lines()))
    report.say(f"- clock: {arguments.clock}")
    if arguments.note:
        report.say(f"- note: {arguments.note}")
    report.section(f"{shape}, 1 x {LENGTH} tokens")
    runs = programs(shape)
    with torch.no_grad():
        one, other = runs["stack"](), runs["labelled"]()
        report.check("attributions", float((one - other).abs().max() / one.abs().max()), 1e-4)
        timings = measure([Program(name, run) for name, run in runs.items()], arguments.rounds, 1, arguments.clock)
    report.timings(timings, "hugging face")
    del runs
    gc.collect()
    rows = []
    for route in ("hugging face", "stack", "labelled"):
        call = [sys.executable, __file__, "--alone", route, "--layers", str(shape.n_layers)]
        done = subprocess.run(call + ["--quick"] * arguments.quick, capture_output=True, text=True, check=True)
        grown = float(json.loads(done.stdout.splitlines()[-1]))
        rows.append((route, f"{grown:.0f}"))
        if route != "hugging face":
            report.target(
                Target(f"time, {route} / Hugging Face's forward", timings.ratio(route, "hugging face"), 3),
                Target(f"memory, {route}", grown, 200, " MiB"),
            )
    report.say("\n" + table(("program", "peak growth, MiB"), rows))
    if not arguments.quick:
        report.write(Path(__file__).parent / "results" / f"attribution_{arguments.hardware}_{time.strftime('%Y%m')}.md")


if __name__ == "__main__":
    main()
