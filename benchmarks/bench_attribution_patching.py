"""What attribution patching costs, and how far its estimates agree with patching itself.

    python benchmarks/bench_attribution_patching.py             writes both files of results/
    python benchmarks/bench_attribution_patching.py --parts agreement   or cost: one of them
    python benchmarks/bench_attribution_patching.py --quick     two pairs, few points of integrated gradients; writes nothing
    python benchmarks/bench_attribution_patching.py --smollm2   the cost on SmolLM2 alone, in a file of its own

Agreement (``results/attribution_agreement_<hardware>_<yyyymm>.md``): cells of a site are really patched on the same pairs,
and Pearson's correlation of each method's estimate with what patching did is told. Cells before the first position at which
the prompts of a pair differ have no effect, by any method, and are left out. Where more than ``MOST`` are left, as many of
them at random are patched. Integrated gradients need a pass for each site, layer and point: on SmolLM2 they are computed
for every sixth layer, and compared on the cells there. Correlations do not depend on what else the machine does.

Cost (``results/attribution_patching_<hardware>_<yyyymm>.md``): one call for every node, position and neuron by AtP and RelP
together, in forwards of bare Hugging Face, beside the least that plain torch can do for AtP alone, and with a second
backward pass, for two estimates. ``--clock cpu`` does not count the time of others.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BLOOM_560M, CLOCKS, TINY, Program, machine_lines, make_model, measure, table
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.attribution import AttributionPatching, attribution_patching
from pellucid.attribution.cells import SiteCells, find_site_cells
from pellucid.corpora import indirect_object_pairs, induction_pairs
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo import load_demo_bridge
from pellucid.demo.smollm2 import load_smollm2
from pellucid.experiments.options import Method, SweepOptions
from pellucid.experiments.pairs import PairBatch, pair_batches
from pellucid.sweep import FromRun, Sweep

SITES = {
    "resid_pre": ("layer", "pos"),
    "attn_out": ("layer", "pos"),
    "mlp_out": ("layer", "pos"),
    "z": ("layer", "head"),
}
ONE_PASS: tuple[Method, ...] = ("atp", "atp*", "relp")
RIGHTS = ("work", "freedom", "religion", "law", "protection", "person")
MOST = 300
"""Cells of a site that are patched."""
PERIOD = 20
"""Tokens before the repetition."""
TARGET = 4.0
LENGTH = 64


# -- pairs -------------------------------------------------------------------------------------------------------------


def said_before(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Induction in the demo's own language: a sentence that goes on as it did before."""
    said = "Everyone has the right to {0} and {1}. Everyone has the right to {0} and"
    rows = [
        {
            "clean": said.format(first, one),
            "corrupted": said.format(first, other),
            "answer": f" {one}",
            "foil": f" {other}",
        }
        for one, other, first in permutations(RIGHTS, 3)
    ]
    return alike(bridge, random.Random(0).sample(rows, len(rows)), count)


def indirect_object(bridge: TransformerBridge, count: int, solved: bool = True) -> PromptPairs:
    """Who is given something: the name that is not said twice (Wang et al. 2022), in one template and order.

    Args:
        bridge: the model.
        count: of the pairs.
        solved: the template that the model most often answers right, clean and corrupted; else the one it does least.
    """
    rows = [row for row in indirect_object_pairs(bridge.tokenizer, 20 * count).rows() if row["order"] == "ABBA"]
    right: dict[Any, list[float]] = {}
    for row in rows[: 5 * count]:
        ids = [bridge.to_single_token(row[word]) for word in ("answer", "foil")]
        logits = [bridge(row[word])[0, -1, ids] for word in ("clean", "corrupted")]
        is_right = bool(logits[0][0] > logits[0][1] and logits[1][0] < logits[1][1])
        right.setdefault(row["template"], []).append(is_right)
    told = sorted((float(np.mean(each)), str(template)) for template, each in right.items())
    print(told, flush=True)
    return alike(bridge, [row for row in rows if str(row["template"]) == told[-1 if solved else 0][1]], count)


def induction(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Words at random that are said again: what followed the last of them?"""
    return alike(bridge, list(induction_pairs(bridge.tokenizer, 4 * count, length=6).rows()), count)


def repeated(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Tokens at random, and half of them again; in the corrupted prompt another stood where the last one stood before."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        *ids, other = (torch.randperm(bridge.cfg.d_vocab - 4, generator=generator)[: PERIOD + 1] + 4).tolist()
        last = PERIOD // 2
        changed = [*ids[:last], other, *ids[last + 1 :]]
        again = ids[: last + 1]
        rows.append({"clean": [*ids, *again], "corrupted": [*changed, *again], "answer": ids[last + 1], "foil": other})
    return PromptPairs.from_rows(rows)


def alike(bridge: TransformerBridge, rows: Sequence[dict[str, Any]], count: int) -> PromptPairs:
    """The first pairs among those of the commonest number of tokens."""
    lengths = [[bridge.to_tokens(row[word]).shape[1] for word in ("clean", "corrupted")] for row in rows]
    common = Counter(clean for clean, corrupted in lengths if clean == corrupted).most_common(1)[0][0]
    found = [row for row, both in zip(rows, lengths, strict=True) if both == [common, common]][:count]
    return PromptPairs.from_rows(
        [{name: row[name] for name in ("clean", "corrupted", "answer", "foil")} for row in found]
    )


# -- agreement ---------------------------------------------------------------------------------------------------------


def agreement(
    bridge: TransformerBridge, pairs: PromptPairs, n_points: int, layers: Sequence[int]
) -> list[tuple[str, ...]]:
    """A line for each site: Pearson of each method with patching; integrated gradients at some layers."""
    (batch,) = pair_batches(bridge, pairs, batch_size=len(pairs))
    differs = int((batch.clean.tokens != batch.corrupted.tokens).any(0).nonzero()[0])
    options = SweepOptions(positions=list(range(differs, batch.clean.length)))
    clock = time.perf_counter()
    given: dict[str, Any] = {"by": SITES, "positions": options.positions, "check": 0, "resamples": 2}
    given["batch_size"] = len(pairs)
    found = attribution_patching(bridge, pairs, site=list(SITES), method=ONE_PASS, **given)
    print(f"AtP, AtP*, RelP: {time.perf_counter() - clock:.0f} s", flush=True)
    clock = time.perf_counter()
    by_points = attribution_patching(
        bridge, pairs, site=list(SITES), method="ig", n_points=n_points, layers=list(layers), **given
    )
    print(f"integrated gradients: {time.perf_counter() - clock:.0f} s", flush=True)
    lines = []
    for site, by in SITES.items():
        clock = time.perf_counter()
        cells = find_site_cells(bridge, batch.corrupted, site, by, options)
        n_cells = math.prod(cells.cells.shape)
        chosen = np.sort(np.random.default_rng(0).permutation(n_cells)[:MOST])
        change = patched(bridge, batch, cells, chosen.tolist())
        attrs = found[site].attrs
        measured = change / (attrs["clean_metric"] - attrs["corrupted_metric"])
        estimates = {method: found[site].effect.sel(estimator=method).values.ravel()[chosen] for method in ONE_PASS}
        print(f"{site}: {len(chosen)} cells patched, {time.perf_counter() - clock:.0f} s", flush=True)
        integrated = by_points[site]
        n_each = n_cells // cells.cells.shape[0]
        here = np.flatnonzero(np.isin(chosen // n_each, layers))
        where = [list(layers).index(int(cell) // n_each) * n_each + int(cell) % n_each for cell in chosen[here]]
        by_ig = integrated.effect.values.ravel()[where]
        delta = float(integrated.completeness_delta.max())
        lines.append(
            (
                site,
                f"{len(chosen)} of {n_cells}",
                *(f"{pearson(estimates[method], measured):.3f}" for method in ONE_PASS),
                str(len(here)),
                f"{pearson(estimates['relp'][here], measured[here]):.3f}",
                f"{pearson(by_ig, measured[here]):.3f}",
                f"{delta:.1e}",
                f"{np.abs(measured).max():.2f}",
            )
        )
        print(f"{lines[-1]} ({time.perf_counter() - clock:.0f} s)", flush=True)
    return lines


def patched(bridge: TransformerBridge, batch: PairBatch, site: SiteCells, chosen: Sequence[int]) -> Any:
    """``[cell]``: what patching each does to the metric, mean over pairs."""
    source = FromRun(batch.clean.unedited(bridge).observe(site.hooks).activations)
    edits = [site.cells.edits(site.cells.at(cell), lambda spec: source) for cell in chosen]
    done = Sweep(bridge, batch.corrupted.unedited(bridge), batch.metric).run(edits, progress=False)
    return (done.values["metric"] - done.base["metric"]).double().mean(-1).numpy()


def pearson(one: Any, other: Any) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def agreement_report(quick: bool, only: Sequence[str]) -> str:
    """Each task's table."""
    of_each, points, of_demo = (2, 2, 3) if quick else (12, 4, 20)
    demo, smollm2 = load_demo_bridge(), load_smollm2()
    every, some = list(range(demo.cfg.n_layers)), list(range(0, smollm2.cfg.n_layers, 6))
    header = ("site", "cells patched", "AtP", "AtP*", "RelP", "cells of IG", "RelP there", "IG", "IG misses", "largest")
    body = ["# Attribution patching: prediction against experiment", "", *machine_lines(), ""]
    body += [
        "Pearson with activation patching (denoising), over cells, of means over pairs. `IG misses`: the largest",
        "completeness error of a layer and pair, `largest` the largest measured effect, both in units of the clean run's",
        "metric less the corrupted run's. Positions before the first at which the prompts differ are left out.",
    ]
    tasks: dict[str, tuple[str, TransformerBridge, Callable[..., PromptPairs]]] = {
        "said": ("Embedded BLOOM, a sentence said before", demo, said_before),
        "repeated": (f"Embedded BLOOM, {PERIOD} tokens at random said again", demo, repeated),
        "induction": ("SmolLM2-135M, induction", smollm2, induction),
        "object": ("SmolLM2-135M, indirect object", smollm2, indirect_object),
        "unsolved": (
            "SmolLM2-135M, indirect object, the template it answers worst",
            smollm2,
            partial(indirect_object, solved=False),
        ),
    }
    for name in only or tasks:
        title, bridge, make = tasks[name]
        task = make(bridge, of_each)
        n_points, layers = (of_demo, every) if bridge is demo else (points, some)
        print(title, len(task), flush=True)
        body += ["", f"## {title} ({len(task)} pairs)", ""]
        body += [f"Integrated gradients: {n_points} points, layers {', '.join(map(str, layers))}.", ""]
        body += [table(header, agreement(bridge, task, n_points, layers))]
    return "\n".join(body) + "\n"


# -- cost --------------------------------------------------------------------------------------------------------------


def plain_torch(
    model: Any, clean: Tensor, corrupted: Tensor, score: Callable[[Tensor], Tensor], passes: int
) -> Callable[[], None]:
    """AtP of what each block adds to the stream, by torch hooks on bare Hugging Face: two runs and a backward pass.

    A second pass through the same graph is the least that another estimate of the same runs (RelP) can take beside it.
    """
    blocks = [
        module for name, module in model.named_modules() if name.count(".") == 2 and name.rsplit(".", 1)[1].isdigit()
    ]

    def run() -> None:
        kept: list[list[Tensor]] = [[], []]
        for number, tokens in enumerate((clean, corrupted)):

            def keep(module: Any, args: Any, output: Any, number: int = number) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.retain_grad()
                kept[number].append(hidden)

            handles = [block.register_forward_hook(keep) for block in blocks]
            begin = model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.detach().requires_grad_()
            )
            with torch.set_grad_enabled(number == 1):
                logits = model(tokens, use_cache=False).logits
            for handle in [*handles, begin]:
                handle.remove()
        for left in reversed(range(passes)):
            score(logits).sum().backward(retain_graph=left > 0)
        for source, base in zip(*kept, strict=True):
            assert base.grad is not None
            ((source - base) * base.grad).sum(-1)

    return run


def costs(name: str, model: Any, d_vocab: int, rounds: int, clock: str) -> tuple[str, ...]:
    """A line: forwards that AtP and RelP together take for everything, and plain torch for AtP of the blocks alone."""
    bridge = TransformerBridge(model.requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(10, d_vocab, (2, 1, LENGTH), generator=generator)
    pairs = PromptPairs(clean.tolist(), corrupted.tolist(), [7], [9])
    sites = ["resid_pre", "attn_out", "mlp_out", "z", "mlp_post"]
    by: dict[str, Any] = {"z": ("layer", "pos", "head"), "mlp_post": ("layer", "pos", "neuron")}
    ours = AttributionPatching(
        bridge, pairs, site=sites, by=by, method=["atp", "relp"], check=0, resamples=2, normalize=False
    )

    def forward() -> None:
        with torch.no_grad():
            model(clean, use_cache=False)

    def score(logits: Tensor) -> Tensor:
        return logits[:, -1, 7] - logits[:, -1, 9]

    programs = [
        Program("forward", forward),
        Program("plain torch", plain_torch(model, clean, corrupted, score, 1)),
        Program("plain torch, two passes", plain_torch(model, clean, corrupted, score, 2)),
        Program("ours", lambda: ours.run(progress=False)),
    ]
    taken = measure(programs, rounds, 1, clock)
    n_cells = sum(ours.plan().cells.values())
    ratios = []
    for label in ("plain torch", "plain torch, two passes", "ours"):
        low, high = taken.quartiles(label, "forward")
        ratios.append(f"{taken.ratio(label, 'forward'):.2f} ({low:.2f} to {high:.2f})")
    line = (name, f"{taken.minimum('forward') * 1e3:.0f}", *ratios, f"{n_cells:,}")
    print(line, flush=True)
    return line


def cost_report(quick: bool, clock: str, rounds: int, smollm2_alone: bool) -> str:
    """Both models' line, or SmolLM2's."""
    rounds, shape = (3, TINY) if quick else (rounds, BLOOM_560M)
    lines = [] if smollm2_alone else [costs(str(shape.name), make_model(shape), shape.d_vocab, rounds, clock)]
    lines += [costs("SmolLM2-135M", load_smollm2().hf_model, 40_000, rounds, clock)]
    plain = ("plain torch, AtP of blocks", "the same, two backward passes")
    header = ("model", "forward, ms", *plain, "AtP and RelP of everything", "cells")
    body = ["# Attribution patching: cost", "", *machine_lines(), f"- clock: {clock}; rounds: {rounds}", ""]
    body += [
        f"{LENGTH} tokens, in forwards of bare Hugging Face (target: at most {TARGET}); ratios are medians over rounds of"
    ]
    body += ["two times in a round, quartiles beside them.", ""]
    return "\n".join([*body, table(header, lines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--parts", nargs="+", default=["agreement", "cost"], choices=["agreement", "cost"])
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="of agreement: said, repeated, induction, object, unsolved"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the cost")
    parser.add_argument("--smollm2", action="store_true", help="the cost on SmolLM2 alone, in a file of its own")
    arguments = parser.parse_args()
    for part in ["cost"] if arguments.smollm2 else arguments.parts:
        quick = arguments.quick
        if part == "agreement":
            text = agreement_report(quick, arguments.tasks)
        else:
            text = cost_report(quick, arguments.clock, arguments.rounds, arguments.smollm2)
        print(text)
        if not quick:
            name = "attribution_agreement" if part == "agreement" else "attribution_patching"
            name += "_smollm2" * arguments.smollm2
            file = f"{name}_{arguments.hardware}_{time.strftime('%Y%m')}.md"
            (Path(__file__).parent / "results" / file).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
