"""What hooking one point costs over a plain torch hook: the fixed cost of a run, and that of each further point.

    python benchmarks/bench_one_point.py           writes results/one_point_<hardware>_<yyyymm>.md
    python benchmarks/bench_one_point.py --quick   a few repetitions, prints and writes nothing

Every program shows the residual that leaves a block (of the middle layer, or of all 30) to a function that keeps it, and is
compared with torch's own ``register_forward_hook``, a forward, and ``remove``. The fixed cost is half a millisecond, which
is less than two forwards differ by on a shared machine, so it is measured three times:

* *passing*: a narrow Llama whose blocks pass on what they are given. All its modules are there; its run is short enough for
  the difference to be seen. A real forward of another model goes before each timed run, untimed, because what a run finds
  in the processor's caches is most of its fixed cost;
* *narrow*: the same Llama with its blocks at work;
* *SmolLM2*: its shape, with random weights.

All run one token, on one thread. A difference is taken inside a round; its median has quartiles, and the interval in which
the true median lies 19 times of 20.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import CLOCKS, Program, Report, Target, Timings, machine_lines, measure, table
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pellucid import TransformerBridge

N_LAYERS, MIDDLE = 30, 15
NARROW = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Sizes of SmolLM2-135M."""

BARE, NOTHING = "Hugging Face", "nothing hooked"
PLAIN, HOOKS, CACHE = "plain torch hook", "run_with_hooks", "run_with_cache"
RUN_BOUND, POINT_BOUND = 300.0, 10.0
"""Microseconds over a plain torch hook that were promised: of a run, of a point."""


class Passing(LlamaDecoderLayer):
    """A block that gives what it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def make(sizes: dict[str, Any], passing: bool = False) -> Any:
    """A Llama with random weights and eager attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    made: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if passing:
        for block in made.model.layers:
            block.__class__ = Passing
    return made.eval().requires_grad_(False)


def with_plain_hooks(model: Any, layers: list[int], tokens: Tensor) -> list[Tensor]:
    """Torch hooks that keep what the blocks give, for one forward."""
    kept: list[Tensor] = []
    handles = [
        model.model.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
        for layer in layers
    ]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def with_hooks(bridge: TransformerBridge, names: list[str], tokens: Tensor) -> list[Tensor]:
    """The same with functions on hook points."""
    kept: list[Tensor] = []
    bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: kept.append(tensor)) for name in names])
    return kept


def with_cache(bridge: TransformerBridge, names: list[str], tokens: Tensor) -> list[Tensor]:
    """The same with a cache."""
    return list(bridge.run_with_cache(tokens, names_filter=names)[1].values())


def differences(timings: Timings, name: str, base: str) -> list[float]:
    """Microseconds of ``name`` over ``base``, round by round, sorted."""
    pairs = zip(timings.seconds[name], timings.seconds[base], strict=True)
    return sorted((ours - theirs) * 1e6 for ours, theirs in pairs)


def per_point(timings: Timings, program: str) -> list[float]:
    """Microseconds that each point after the first costs over a plain torch hook, round by round, sorted."""

    def more(name: str) -> list[float]:
        return [all_ - one for one, all_ in zip(timings.seconds[name], timings.seconds[every(name)], strict=True)]

    pairs = zip(more(program), more(PLAIN), strict=True)
    return sorted((ours - theirs) * 1e6 / (N_LAYERS - 1) for ours, theirs in pairs)


def every(program: str) -> str:
    """What a program is called that has a point in each layer."""
    return f"{program}, {N_LAYERS} points"


def spread(values: list[float]) -> tuple[str, str, str]:
    """Median, its interval of 95 % and the quartiles of sorted values, in words."""
    first, median, third = statistics.quantiles(values, n=4)
    count = len(values)
    half = (
        0.98 * count**0.5
    )  # of the binomial distribution: how far the rank of the true median may lie from the middle
    low, high = values[max(0, int(count / 2 - half))], values[min(count - 1, int(count / 2 + half))]
    return f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{first:.1f}, {third:.1f}"


def target(what: str, values: list[float], bound: float) -> Target:
    """A target with the interval of its median beside it: one that holds the bound says neither."""
    return Target(what, statistics.median(values), bound, " us", note=f"95 % interval {spread(values)[1]}")


def case(report: Report, title: str, model: Any, before: Callable[[], Any] | None, rounds: int, clock: str) -> None:
    """One model: the numbers first, then the times."""
    report.section(f"{title}; {sum(1 for _ in model.modules())} modules, 1 token, {rounds} rounds")
    bridge = TransformerBridge(model)
    tokens = torch.tensor([[7]])
    layers = {"": [MIDDLE], "all": list(range(N_LAYERS))}
    programs = [
        Program(BARE, lambda: model(tokens, use_cache=False).logits),
        Program(NOTHING, lambda: bridge(tokens)),
    ]
    for which, chosen in layers.items():
        names = [f"blocks.{layer}.hook_resid_post" for layer in chosen]
        kept = with_plain_hooks(model, chosen, tokens)
        for found in (with_hooks(bridge, names, tokens), with_cache(bridge, names, tokens)):
            assert len(kept) == len(found) == len(chosen)
            assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
        runs: dict[str, Callable[[], Any]] = {
            PLAIN: lambda chosen=chosen: with_plain_hooks(model, chosen, tokens),  # type: ignore[misc]
            HOOKS: lambda names=names: with_hooks(bridge, names, tokens),  # type: ignore[misc]
            CACHE: lambda names=names: with_cache(bridge, names, tokens),  # type: ignore[misc]
        }
        programs += [Program(every(name) if which else name, run) for name, run in runs.items()]
    report.say("- same numbers: what torch hooks, functions and caches keep: equal to the bit")
    if before is not None:
        programs = [Program(each.name, each.run, before=before) for each in programs]
    found_times = measure(programs, rounds, warmup=20, clock=clock)
    report.timings(found_times, PLAIN)
    runs_found = {
        NOTHING: differences(found_times, NOTHING, BARE),
        HOOKS: differences(found_times, HOOKS, PLAIN),
        CACHE: differences(found_times, CACHE, PLAIN),
    }
    points_found = {program: per_point(found_times, program) for program in (HOOKS, CACHE)}
    rows = [(f"{name}, a run", *spread(values)) for name, values in runs_found.items()]
    rows += [(f"{name}, each further point", *spread(values)) for name, values in points_found.items()]
    head = ("over a plain torch hook (nothing hooked: over Hugging Face), us", "median", "95 % interval", "quartiles")
    report.say(table(head, rows) + "\n")
    for name in (HOOKS, CACHE):
        short = title.partition(":")[0]
        report.target(
            target(f"{short}, {name}, a run", runs_found[name], RUN_BOUND),
            target(f"{short}, {name}, each further point", points_found[name], POINT_BOUND),
        )


def main() -> None:
    """Run the three cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the name of the result file")
    parser.add_argument("--quick", action="store_true", help="a few repetitions; writes nothing")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--note", default="", help="written into the file")
    parser.add_argument(
        "--cases", nargs="+", choices=("passing", "narrow", "smollm2"), help="only these; writes nothing"
    )
    parser.add_argument("--rounds", type=float, default=1.0, help="times as many repetitions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    report = Report("One point")
    notes = [f"- note: {arguments.note}"] if arguments.note else []
    for line in [*machine_lines(), f"- clock: {arguments.clock}", *notes]:
        report.say(line)
    times = 0.02 if arguments.quick else arguments.rounds
    chosen = arguments.cases or ("passing", "narrow", "smollm2")

    def run(title: str, model: Any, before: Callable[[], Any] | None, rounds: int) -> None:
        case(report, title, model, before, max(10, round(rounds * times)), arguments.clock)

    if "passing" in chosen:
        other, token = make(NARROW), torch.tensor([[7]])
        title = "Passing: a narrow Llama of 30 layers whose blocks pass on what they are given"
        run(title, make(NARROW, passing=True), lambda: other(token, use_cache=False), 1000)
    if "narrow" in chosen:
        run("Narrow: a Llama of 30 layers, d_model 64", make(NARROW), None, 500)
    if "smollm2" in chosen:
        run("SmolLM2: its shape, 30 layers, d_model 576, random weights", make(SMOLLM2), None, 200)
    if not (arguments.quick or arguments.cases):
        report.write(Path(__file__).parent / "results" / f"one_point_{arguments.hardware}_{time.strftime('%Y%m')}.md")


if __name__ == "__main__":
    main()
