"""What steering costs a decoding: edits of :mod:`pellucid.steering` beside the same generation with nothing hooked.

    python benchmarks/bench_steering.py --hardware 2core_cpu
    python benchmarks/bench_steering.py --quick             a few repetitions; writes nothing

The target is of real width: at most 2 % of the time of an unhooked generation, for one edited layer. What an edit costs
does not depend on the width (a few operations on one position), and on a busy machine 2 % of a wide forward are less than
its times scatter. So the cost of a forward is measured on a narrow model, and divided by the time of a wide one; the wide
generation is timed steered too, for comparison. Tokens are first compared with those of a torch hook that does the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import CLOCKS, TINY, Program, Report, Shape, Target, machine_lines, make_model, measure, random_tokens
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.steering import Add, Edit, ProjectOut, Steering, direction_of

WIDE = Shape("real width, few layers", n_layers=3, d_model=1024, n_heads=16, d_vocab=50_000)
NEW = 16
PLAIN, HOOK, ONE = "generate, nothing hooked", "a torch hook at one layer", "added at one layer"


def case(
    report: Report, shape: Shape, rounds: int, clock: str, only: tuple[str, ...] = ()
) -> tuple[float, dict[str, float]]:
    """Seconds of an unhooked forward of decoding, and what each program takes beyond it."""
    bridge = TransformerBridge(make_model(shape))
    tokens = random_tokens(shape, 2, 12)
    report.section(f"{NEW} tokens decoded greedily, 2 x 12 tokens, with a key/value cache: {shape}")
    several = direction_of(bridge, torch.randn(shape.d_model, generator=torch.Generator().manual_seed(2)))
    one = several.only(1)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}

    def plain() -> Tensor:
        ids: Tensor = bridge.generate(tokens, stop_at_eos=False, verbose=False, **settings)
        return ids

    def hooked() -> Tensor:
        block: Any = bridge.hf_model.get_submodule(bridge.blocks[1].path)
        vector = 40 * one.at()
        handle = block.register_forward_hook(lambda module, args, output: (output[0] + vector, *output[1:]))
        try:
            return plain()
        finally:
            handle.remove()

    def steered(steering: Steering) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with steering.on(bridge):
                return plain()

        return run

    cases = {
        ONE: Steering(Edit(Add(one, 40.0))),
        "added at one layer, generated positions": Steering(Edit(Add(one, 40.0), positions="generated")),
        "projected out at one layer": Steering(Edit(ProjectOut(one))),
        "added at every layer": Steering(Edit(Add(several, 40.0))),
    }
    reference = hooked()
    assert not torch.equal(reference, plain()), "steering has no effect: nothing is compared"
    report.check("tokens, one layer, beside a torch hook", torch.equal(reference, steered(cases[ONE])()))
    programs = [Program(PLAIN, plain), Program(HOOK, hooked)]
    programs += [Program(name, steered(steering)) for name, steering in cases.items() if name in (only or cases)]
    timings = measure(programs, rounds, warmup=2, clock=clock)
    report.timings(timings, PLAIN)
    beyond = {program.name: timings.difference(program.name, PLAIN) / NEW for program in programs[1:]}
    return timings.median(PLAIN) / NEW, beyond


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the name of the result file")
    parser.add_argument("--quick", action="store_true", help="a few repetitions; writes nothing")
    parser.add_argument("--rounds", type=int, default=100, help="repetitions on the narrow model")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall time or processor time")
    parser.add_argument("--note", default="", help="written into the file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # of every generation: that -1 ends no row
    report = Report("Steering a generation")
    for line in [*machine_lines(), f"- clock: {arguments.clock}"] + (
        [f"- note: {arguments.note}"] if arguments.note else []
    ):
        report.say(line)
    rounds = 3 if arguments.quick else arguments.rounds
    _, beyond = case(report, TINY, rounds, arguments.clock)
    wide, _ = case(report, WIDE, max(2, rounds // 10), arguments.clock, only=(ONE,))
    report.section("What an edit costs, per forward")
    for name, seconds in beyond.items():
        report.say(
            f"- {name}: {seconds * 1e6:+.0f} us (narrow), {seconds / wide:.2%} of the wide model's {wide * 1e3:.1f} ms"
        )
    for name in (ONE, "added at one layer, generated positions"):
        share = 1 + beyond[name] / wide
        report.target(Target(f"{name}: narrow cost over wide forward", share, 1.02))
    if not arguments.quick:
        month = time.strftime("%Y%m")
        report.write(Path(__file__).parent / "results" / f"steering_{arguments.hardware}_{month}.md")


if __name__ == "__main__":
    main()
