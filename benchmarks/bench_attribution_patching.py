"""What attribution patching costs, and how far its estimates agree with patching itself.

    python benchmarks/bench_attribution_patching.py           writes results/attribution_patching_<hardware>_<yyyymm>.md
    python benchmarks/bench_attribution_patching.py --quick   two pairs, few points of integrated gradients; writes nothing
    python benchmarks/bench_attribution_patching.py --quick --write   writes what a quick run found, and says so

Prediction: every cell of a site is really patched, by :func:`activation_patching` on the same pairs, and Pearson's
correlation of each method's estimate with it is told. Cost: one call for every node, position and neuron by AtP and RelP
together, in forwards of bare Hugging Face, beside the least that plain torch can do for AtP alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BLOOM_560M, TINY, machine_lines, make_model
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.attribution import AttributionPatching, attribution_patching
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo import load_demo_bridge
from pellucid.demo.smollm2 import load_smollm2
from pellucid.experiments.activation_patching import activation_patching
from pellucid.sweep import LogitDifference

SITES = {
    "resid_pre": ("layer", "pos"),
    "attn_out": ("layer", "pos"),
    "mlp_out": ("layer", "pos"),
    "z": ("layer", "head"),
}
NAMES = ("John", "Mary", "Tom", "James", "Anna", "Sarah", "Peter", "Paul")
RIGHTS = ("work", "freedom", "education", "life", "religion", "marriage", "property")
TARGET = 4.0
LENGTH = 64


# -- pairs -------------------------------------------------------------------------------------------------------------


def one_length(bridge: TransformerBridge, rows: list[dict[str, str]], count: int) -> PromptPairs:
    """The first pairs whose prompts all have as many tokens as the first's, and whose answers are one token."""
    found: list[dict[str, str]] = []
    for row in rows:
        try:
            for word in ("answer", "foil"):
                bridge.to_single_token(row[word])
        except ValueError:
            continue
        lengths = {bridge.to_tokens(row[word]).shape[1] for word in ("clean", "corrupted")}
        if found:
            lengths.add(bridge.to_tokens(found[0]["clean"]).shape[1])
        if len(lengths) == 1 and len(found) < count:
            found.append(row)
    return PromptPairs.from_rows(found)


def said_before(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Induction in the demo's own language: a sentence that goes on as it did before."""
    rows = [
        {
            "clean": f"Everyone has the right to religion and {one}. Everyone has the right to religion and",
            "corrupted": f"Everyone has the right to religion and {other}. Everyone has the right to religion and",
            "answer": f" {one}",
            "foil": f" {other}",
        }
        for one in RIGHTS
        for other in RIGHTS
        if one != other and "religion" not in (one, other)
    ]
    return one_length(bridge, rows, count)


def indirect_object(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Who is given a drink: the name that is not said twice (Wang et al. 2022)."""
    rows = [
        {
            "clean": f"When {one} and {other} went to the store, {other} gave a drink to",
            "corrupted": f"When {one} and {other} went to the store, {one} gave a drink to",
            "answer": f" {one}",
            "foil": f" {other}",
        }
        for one, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    ]
    return one_length(bridge, rows, count)


def repeated(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Induction on words at random: ``a b c d a b c`` goes on with ``d``; the corrupted prompt had another there."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(1000, min(bridge.cfg.d_vocab, 20_000), (7,), generator=generator).tolist()
        others = [*ids[:5], ids[6]]  # the same words, another one last
        rows.append(
            {
                "clean": [*ids[:6], *ids[:5]],
                "corrupted": [*others, *ids[:5]],
                "answer": ids[5],
                "foil": ids[6],
            }
        )
    return PromptPairs.from_rows(rows)


# -- prediction --------------------------------------------------------------------------------------------------------


def predictions(bridge: TransformerBridge, pairs: PromptPairs, n_points: int) -> list[list[str]]:
    """A line for each site: Pearson of each method with patching, over all cells."""
    from pellucid.experiments.pairs import pair_batches

    (batch,) = pair_batches(bridge, pairs, batch_size=len(pairs))
    assert isinstance(batch.metric, LogitDifference)
    lines = []
    for site, by in SITES.items():
        measured = activation_patching(
            bridge, batch.clean.tokens, batch.corrupted.tokens, batch.metric, site, by
        ).values
        start, line = time.perf_counter(), [site, str(measured.size)]
        found = attribution_patching(
            bridge, pairs, site=site, by=by, method=["atp", "atp*", "relp", "ig"], n_points=n_points, check=0
        )
        for method in ("atp", "atp*", "relp", "ig"):
            estimate = found.effect.sel(estimator=method).values  # type: ignore[union-attr]
            line.append(f"{np.corrcoef(estimate.ravel(), measured.ravel())[0, 1]:.3f}")
        lines.append([*line, f"{np.abs(measured).max():.2f}"])
        print(f"{site}: {line} ({time.perf_counter() - start:.0f} s)", flush=True)
    return lines


# -- cost --------------------------------------------------------------------------------------------------------------


def plain_torch(model: Any, clean: Tensor, corrupted: Tensor, score: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """AtP of what each block adds to the stream, by torch hooks on bare Hugging Face: two runs and a backward pass."""
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
        score(logits).sum().backward()
        for source, base in zip(*kept, strict=True):
            assert base.grad is not None
            ((source - base) * base.grad).sum(-1)

    return run


def costs(name: str, model: Any, d_vocab: int, rounds: int) -> list[str]:
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

    programs: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "plain torch": plain_torch(model, clean, corrupted, lambda logits: logits[:, -1, 7] - logits[:, -1, 9]),
        "ours": lambda: ours.run(progress=False),
    }
    taken: dict[str, list[float]] = {label: [] for label in programs}
    for number in range(rounds + 1):
        for label, program in programs.items():
            start = time.perf_counter()
            program()
            if number:  # the first round warms up
                taken[label].append(time.perf_counter() - start)
    ratios = {
        label: statistics.median(one / of for one, of in zip(taken[label], taken["forward"], strict=True))
        for label in ("plain torch", "ours")
    }
    n_cells = sum(ours.plan().cells.values())
    line = [
        name,
        f"{min(taken['forward']) * 1e3:.0f}",
        f"{ratios['plain torch']:.2f}",
        f"{ratios['ours']:.2f}",
        f"{n_cells:,}",
    ]
    print(line, flush=True)
    return line


def rows_of(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="with --quick: write the file all the same")
    parser.add_argument("--parts", nargs="+", default=["prediction", "cost"])
    arguments = parser.parse_args()
    pairs, of_demo, points, rounds = (1, 6, 3, 3) if arguments.quick else (8, 12, 20, 9)
    body = ["# Attribution patching: prediction against experiment, and cost", ""]
    if arguments.quick:
        body += [
            f"A quick run on a machine that others used at the time: {of_demo} pairs on the embedded model, {pairs} a task "
            f"on SmolLM2, {points} points of integrated gradients, {rounds} rounds. Correlations do not depend on the "
            "machine; times do.",
            "",
        ]
    body += [*machine_lines(), ""]
    if "prediction" in arguments.parts:
        demo, smollm2 = load_demo_bridge(), load_smollm2()
        header = ["site", "cells", "AtP", "AtP*", "RelP", "IG", "largest measured"]
        for title, bridge, task in (
            ("Embedded BLOOM, a sentence said before", demo, said_before(demo, of_demo)),
            ("SmolLM2-135M, indirect object", smollm2, indirect_object(smollm2, pairs)),
            ("SmolLM2-135M, induction on random tokens", smollm2, repeated(smollm2, pairs)),
        ):
            print(title, len(task), flush=True)
            body += [f"## {title} ({len(task)} pairs)", "", "Pearson with activation patching, over all cells:", ""]
            body += [rows_of(header, predictions(bridge, task, points)), ""]
    if "cost" in arguments.parts:
        lines = []
        shape = TINY if arguments.quick and not arguments.write else BLOOM_560M
        lines.append(costs(str(shape.name), make_model(shape), shape.d_vocab, rounds))
        lines.append(costs("SmolLM2-135M", load_smollm2().hf_model, 40_000, rounds))
        header = ["model", "forward, ms", "plain torch, AtP of blocks", "AtP and RelP of everything", "cells"]
        body += [f"## Cost, {LENGTH} tokens, in forwards of bare Hugging Face (target: at most {TARGET})", ""]
        body += [rows_of(header, lines), ""]
    text = "\n".join(body)
    print(text)
    if arguments.write or not arguments.quick:
        month = time.strftime("%Y%m")
        path = Path(__file__).parent / "results" / f"attribution_patching_{arguments.hardware}_{month}.md"
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
