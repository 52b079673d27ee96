"""What sweeps cost on a real model of grouped queries: SmolLM2-135M, beside a loop with torch hooks and TransformerLens.

    python benchmarks/bench_smollm2_sweeps.py           writes results/smollm2_sweeps_<hardware>_<yyyymm>.md
    python benchmarks/bench_smollm2_sweeps.py --quick   few cells, prints and writes nothing

Two prompts of random tokens that differ everywhere; each cell of ``resid_pre`` by layer and position, and of ``z`` by layer,
position and head, is patched with the clean run's activation. A program that runs one forward a cell is timed on a few
random cells in each round and scaled. TransformerLens replaces functions inside transformers: it runs in a process of its
own, beside the same loop with torch hooks there, and its ratio to that loop carries over.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import CLOCKS, Program, Report, Target, installed, machine_lines, measure, table
from torch import Tensor

HOOKS, LENS, OURS = "plain torch hooks", "TransformerLens", "Pellucid"
SITES = {
    "resid_pre": ("get_act_patch_resid_pre", "hook_resid_pre", ("layer", "pos"), 10.0),
    "z by head and position": ("get_act_patch_attn_head_out_by_pos", "attn.hook_z", ("layer", "pos", "head"), 12.0),
}
"""Site: function of ``patching``, hook point, axes of the index, times faster than the loop that were promised."""

LENGTH, ANSWER, FOIL = 16, 1100, 1700
BOUND = 5e-5
"""Largest difference of two programs' numbers: float32 runs of 30 layers that round differently; they range over 3."""

Cells = Sequence[tuple[int, ...]]


def metric(logits: Tensor) -> Tensor:
    """A plain function that reads two logits."""
    return logits[0, -1, ANSWER] - logits[0, -1, FOIL]


def prompts() -> tuple[Tensor, Tensor]:
    """Clean and corrupted ids ``[1, pos]``, other tokens at every position."""
    clean, corrupted = torch.randint(100, 40_000, (2, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    assert bool((clean != corrupted).all())
    return clean, corrupted


def frame(axes: tuple[str, ...], cells: Cells) -> pd.DataFrame:
    return pd.DataFrame([list(cell) for cell in cells], columns=list(axes))


def hook_loop(model: Any, corrupted: Tensor, site: str, clean: dict[int, Tensor], cells: Cells) -> Tensor:
    """``[cell]``: one forward of bare Hugging Face for each cell, with a torch hook on the block or on ``o_proj``."""
    scores = []
    for layer, pos, *head in cells:
        block = model.model.layers[layer]
        module = block if site == "resid_pre" else block.self_attn.o_proj
        width = model.config.head_dim
        part = slice(head[0] * width, (head[0] + 1) * width) if head else slice(None)

        def patch(module: Any, args: Any, pos: int = pos, part: slice = part, layer: int = layer) -> Any:
            tensor = args[0].clone()
            tensor[:, pos, part] = clean[layer][:, pos, part]
            return (tensor, *args[1:])

        handle = module.register_forward_pre_hook(patch)
        try:
            scores.append(metric(model(corrupted, use_cache=False).logits))
        finally:
            handle.remove()
    return torch.stack(scores)


def clean_inputs(model: Any, clean: Tensor, site: str) -> dict[int, Tensor]:
    """The clean run's tensors at the hooked modules, by layer."""
    kept: dict[int, Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        module = block if site == "resid_pre" else block.self_attn.o_proj
        keep = functools.partial(lambda layer, module, args: kept.update({layer: args[0].clone()}), layer)
        handles.append(module.register_forward_pre_hook(keep))
    model(clean, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


class Sample:
    """Runs a slow program on other random cells in each round, and keeps its numbers to be compared."""

    def __init__(self, run: Callable[[Cells], Tensor], cells: Cells, count: int) -> None:
        self._run, self._cells, self._count = run, cells, count
        self._random = random.Random(0)
        self._chosen: list[tuple[int, ...]] = []
        self.seen: dict[tuple[int, ...], float] = {}

    def choose(self) -> None:
        self._chosen = self._random.sample(list(self._cells), self._count)

    def __call__(self) -> None:
        self.seen.update(zip(self._chosen, self._run(self._chosen).tolist(), strict=True))

    @property
    def scale(self) -> float:
        return len(self._cells) / self._count


def all_cells(axes: tuple[str, ...], config: Any) -> list[tuple[int, ...]]:
    sizes = {"layer": config.num_hidden_layers, "pos": LENGTH, "head": config.num_attention_heads}
    return list(product(*(range(sizes[axis]) for axis in axes)))


def case(report: Report, bridge: Any, site: str, rounds: int, sample: int, clock: str) -> None:
    """One site: numbers first, then times."""
    from pellucid import patching
    from pellucid.sweep import LogitDifference

    function, point, axes, bound = SITES[site]
    clean, corrupted = prompts()
    model = bridge.hf_model
    cells = all_cells(axes, model.config)
    report.section(f"{site}: {len(cells):,} cells, 1 x {LENGTH} tokens")
    names = [f"blocks.{layer}.{point}" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(clean, names_filter=names)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        run = vars(patching)[function]
        found["scores"] = run(bridge, corrupted, cache, LogitDifference(ANSWER, FOIL), verbose=False).flatten()

    loop = Sample(functools.partial(hook_loop, model, corrupted, site, clean_inputs(model, clean, site)), cells, sample)
    timings = measure([Program(OURS, ours), Program(HOOKS, loop, before=loop.choose)], rounds, warmup=1, clock=clock)
    timings.seconds[HOOKS] = [seconds * loop.scale for seconds in timings.seconds[HOOKS]]
    scores = dict(zip(cells, found["scores"].tolist(), strict=True))
    worst = max(abs(scores[cell] - value) for cell, value in loop.seen.items())
    report.check(f"{HOOKS} and {OURS}, {len(loop.seen)} random cells", worst, BOUND)
    report.say(f"- the numbers range over {float(found['scores'].max() - found['scores'].min()):.3g}")
    peer = peer_ratio(site, rounds, sample, clock, scores, report)
    rows = [(name, f"{timings.median(name):.2f}", f"{timings.ratio(name, OURS):.1f}") for name in (OURS, HOOKS)]
    if peer is not None:
        times = peer * timings.ratio(HOOKS, OURS)
        rows.append((LENS, f"{peer * timings.median(HOOKS):.2f} (its process: {peer:.2f} of the loop)", f"{times:.1f}"))
    report.say("\n" + table(("program", "median s", f"times {OURS}"), rows) + "\n")
    report.target(Target(f"{site}: times faster than the loop", timings.ratio(HOOKS, OURS), bound, at_least=True))


# -- the peer, in a process of its own ---------------------------------------------------------------------------------


def peer_ratio(
    site: str, rounds: int, sample: int, clock: str, scores: dict[tuple[int, ...], float], report: Report
) -> float | None:
    """TransformerLens' time over the loop's; ``None`` where it is not installed."""
    if not installed("transformer_lens"):
        return None
    call = [sys.executable, __file__, "--peer", site, "--rounds", str(rounds), "--sample", str(sample)]
    call += ["--clock", clock]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        report.say(f"- TransformerLens did not run: {done.stderr.strip().splitlines()[-1:]}")
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    worst = max(abs(scores[tuple(cell)] - value) for cell, value in found["seen"])
    report.say(f"- {LENS} and {OURS} on {len(found['seen'])} random cells differ by at most {worst:.2g}")
    ratio: float = found["ratio"]
    return ratio


def run_peer(site: str, rounds: int, sample: int, clock: str) -> None:
    """Print TransformerLens' ratio to the loop, and its numbers, as JSON."""
    import transformer_lens.patching  # type: ignore[import-not-found, unused-ignore]
    import transformers
    from transformer_lens.model_bridge import (
        TransformerBridge as LensBridge,  # type: ignore[import-not-found, unused-ignore]
    )

    from pellucid.demo.smollm2 import FOLDER, default_cache_folder

    folder = default_cache_folder() / FOLDER

    def load() -> Any:
        made = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        return made.eval().requires_grad_(False)

    model, (clean, corrupted) = load(), prompts()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lens = LensBridge.boot_transformers("HuggingFaceTB/SmolLM2-135M", hf_model=load(), tokenizer=tokenizer)
    lens.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    function, point, axes, _ = SITES[site]
    cells = all_cells(axes, model.config)
    _, cache = lens.run_with_cache(clean, names_filter=lambda name: name.endswith(point))

    def lens_loop(cells: Cells) -> Tensor:
        run = vars(transformer_lens.patching)[function]
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            scores: Tensor = run(lens, corrupted, cache, metric, index_axis_names=None, index_df=frame(axes, cells))
        return scores

    plain = Sample(
        functools.partial(hook_loop, model, corrupted, site, clean_inputs(model, clean, site)), cells, sample
    )
    theirs = Sample(lens_loop, cells, sample)
    programs = [Program(HOOKS, plain, before=plain.choose), Program(LENS, theirs, before=theirs.choose)]
    timings = measure(programs, rounds, warmup=1, clock=clock)
    print(json.dumps({"ratio": timings.ratio(LENS, HOOKS), "seen": list(theirs.seen.items())}))


def main() -> None:
    """Run both sites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the name of the result file")
    parser.add_argument("--quick", action="store_true", help="few cells; writes nothing")
    parser.add_argument("--note", default="", help="written into the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=24, help="cells of a slow program in a round")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--peer", choices=list(SITES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    if arguments.peer:
        run_peer(arguments.peer, arguments.rounds, arguments.sample, arguments.clock)
        return
    from pellucid.demo.smollm2 import is_installed, load_smollm2

    report = Report("Sweeps on SmolLM2-135M")
    notes = [f"- note: {arguments.note}"] if arguments.note else []
    for line in [*machine_lines(), f"- clock: {arguments.clock}", *notes]:
        report.say(line)
    if not is_installed():
        report.say("SmolLM2 is not installed: nothing was run.")
        return
    bridge = load_smollm2()
    bridge.hf_model.requires_grad_(False)
    rounds, sample = (1, 4) if arguments.quick else (arguments.rounds, arguments.sample)
    for site in SITES:
        case(report, bridge, site, rounds, sample, arguments.clock)
    if not arguments.quick:
        path = Path(__file__).parent / "results" / f"smollm2_sweeps_{arguments.hardware}_{time.strftime('%Y%m')}.md"
        report.write(path)


if __name__ == "__main__":
    main()
