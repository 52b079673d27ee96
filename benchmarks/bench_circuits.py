"""What edge attribution costs beside a forward, and what circuits of trained models keep.

    python benchmarks/bench_circuits.py             560M-shaped and SmolLM2, writes results/circuits_<hardware>_<yyyymm>.md
    python benchmarks/bench_circuits.py --layers 6  fewer layers of the 560M shape; the file says how many
    python benchmarks/bench_circuits.py --quick     a tiny model and the embedded one; writes nothing
    python benchmarks/bench_circuits.py --smollm2   the cost on SmolLM2 alone, in a file of its own

Cost: one pair of prompts of 64 tokens that differ from the first token on, beside one forward of Hugging Face's model that
gives all logits. Trained models: CPR, CMD and Jaccard of indirect object
identification (SmolLM2) and of a repeated word (the embedded model), EAP and EAP-IG.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from common import (
    BLOOM_560M,
    CLOCKS,
    TINY,
    Program,
    Report,
    Target,
    machine_lines,
    make_model,
    measure,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
)

from pellucid import TransformerBridge
from pellucid.circuits import EdgeAttribution, edge_attribution, faithfulness
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo import load_demo_bridge
from pellucid.demo.smollm2 import is_installed, load_smollm2

LENGTH, ANSWER, FOIL = 64, 20, 30
NAMES = (" Mary", " John", " Tom", " James", " Dan", " Martin", " Amy", " Sarah")
PLACES = (("store", "drink"), ("park", "ball"), ("office", "letter"))


def cost(report: Report, bridge: TransformerBridge, d_vocab: int, title: str, rounds: int, clock: str) -> None:
    """Time and memory of one pair."""
    report.section(f"{title}, 1 pair of {LENGTH} tokens")
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(5, min(d_vocab, 1000), (2, LENGTH), generator=generator).tolist()
    pairs = PromptPairs([clean], [corrupted], [ANSWER], [FOIL])
    model, tokens = bridge.hf_model, torch.tensor([clean])

    def forward() -> Any:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    runs = {"hugging face": forward, "EAP": lambda: edge_attribution(bridge, pairs)}
    for points in (1, 5):
        runs[f"EAP-IG {points}"] = EdgeAttribution(bridge, pairs, method="eap-ig", points=points).run
    timings = measure([Program(name, run) for name, run in runs.items()], rounds, 1, clock)
    report.timings(timings, "hugging face")
    for name in list(runs)[1:]:
        low, high = timings.quartiles(name, "hugging face")
        report.say(f"- {name}: quartiles over rounds {low:.2f} and {high:.2f} forwards")
    before = resident_bytes()
    reset_peak()
    circuit = runs["EAP"]()
    grown = (peak_bytes() - before) / 2**20
    wiring = circuit.wiring
    report.say(
        f"{len(wiring):,} edges of {len(wiring.senders):,} senders; EAP grows the resident set by {grown:.0f} MiB at most."
    )
    report.target(Target(f"{title}: EAP / forward", timings.ratio("EAP", "hugging face"), 4.5))
    for points in (1, 5):
        ratio = timings.ratio(f"EAP-IG {points}", "hugging face")
        report.target(Target(f"{title}: EAP-IG, {points} points / forward", ratio, 3 * points + 1.5))


def indirect_objects(bridge: TransformerBridge, count: int) -> PromptPairs:
    """Pairs in which the other name is said twice; those whose prompts have as many tokens."""
    return PromptPairs.from_rows(list(_indirect_objects(bridge))[:count], name="indirect object identification")


def _indirect_objects(bridge: TransformerBridge) -> Iterator[dict[str, str]]:
    for number, (first, second) in enumerate(permutations(NAMES, 2)):
        place, thing = PLACES[number % len(PLACES)]
        begins = f"When{first} and{second} went to the {place},"
        clean, corrupted = (f"{begins}{giver} gave a {thing} to" for giver in (second, first))
        if bridge.to_tokens(clean).shape == bridge.to_tokens(corrupted).shape:
            yield {"clean": clean, "corrupted": corrupted, "answer": first, "foil": second}


def repeated_words() -> PromptPairs:
    """What the embedded model says again."""
    sentence = "Everyone has the right to {0} and{1}. Everyone has the right to {0} and"
    words = ((" work", " freedom"), (" freedom", " work"), (" freedom", " religion"), (" work", " religion"))
    rows = [
        {"clean": sentence.format(a, b), "corrupted": sentence.format(a, c), "answer": b, "foil": c}
        for a in ("religion", "life")
        for b, c in words
    ]
    return PromptPairs.from_rows(rows, name="repeated word")


def trained(report: Report, bridge: TransformerBridge, pairs: PromptPairs, title: str, top: int) -> None:
    """What the circuits of a trained model keep, and how sure they are."""
    report.section(f"{title}: {pairs.name}, {len(pairs)} pairs")
    rows = []
    for method in ("eap", "eap-ig"):
        start = time.perf_counter()
        whole = edge_attribution(bridge, pairs, method=method, progress=False)  # type: ignore[arg-type]
        scored = time.perf_counter() - start
        start = time.perf_counter()
        stability = whole.top(top).stability()
        drawn = time.perf_counter() - start
        curve = faithfulness(bridge, whole, pairs, progress=False)
        attrs, at = curve.attrs, float(curve.faithfulness.sel(size=curve["size"].values[-3]))
        resamples, halves = stability.resamples, stability.halves
        rows.append(
            (
                method,
                f"{attrs['cpr']:.2f} ({attrs['cpr_interval'][0]:.2f} to {attrs['cpr_interval'][1]:.2f})",
                f"{attrs['cmd']:.2f}",
                f"{attrs['random_cpr'][0]:.2f}",
                f"{at:.2f}",
                f"{resamples.mean:.2f} ({resamples.low:.2f} to {resamples.high:.2f})",
                f"{halves.mean:.2f} ({halves.low:.2f} to {halves.high:.2f})",
                f"{scored:.1f} s",
                f"{drawn / scored:.1%}",
            )
        )
        report.target(Target(f"{title}, {method}: resampling / attribution", drawn / scored, 0.05))
    head = ("method", "CPR", "CMD", "CPR, random", "kept by 20 %", f"Jaccard of resamples, top {top}", "halves")
    report.say("\n" + table((*head, "attribution", "resampling"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and the embedded one; writes nothing")
    parser.add_argument("--smollm2", action="store_true", help="the cost on SmolLM2 alone, in a file of its own")
    parser.add_argument("--layers", type=int, help="fewer layers than 24; the file says how many")
    parser.add_argument("--pairs", type=int, default=12, help="pairs for SmolLM2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu does not count the time of others")
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--note", default="", help="a sentence for the result file, such as what else was running")
    arguments = parser.parse_args()
    shape = TINY if arguments.quick else replace(BLOOM_560M, n_layers=arguments.layers or BLOOM_560M.n_layers)
    report, results = Report("Edge attribution and circuits"), Path(__file__).parent / "results"
    report.say("\n".join(machine_lines()))
    report.say(f"- clock: {arguments.clock}")
    if arguments.note:
        report.say(f"- note: {arguments.note}")
    if arguments.smollm2:
        bridge = load_smollm2()
        cost(report, bridge, bridge.cfg.d_vocab, "SmolLM2-135M", arguments.rounds, arguments.clock)
        report.write(results / f"circuits_smollm2_{arguments.hardware}_{time.strftime('%Y%m')}.md")
        return
    cost(report, TransformerBridge(make_model(shape)), shape.d_vocab, str(shape), arguments.rounds, arguments.clock)
    trained(report, load_demo_bridge(), repeated_words(), "the embedded model", 40)
    if is_installed() and not arguments.quick:
        bridge = load_smollm2()
        cost(report, bridge, bridge.cfg.d_vocab, "SmolLM2-135M", arguments.rounds, arguments.clock)
        trained(report, bridge, indirect_objects(bridge, arguments.pairs), "SmolLM2-135M", 200)
    if not arguments.quick:
        report.write(results / f"circuits_{arguments.hardware}_{time.strftime('%Y%m')}.md")


if __name__ == "__main__":
    main()
