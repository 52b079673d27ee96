"""LAPE from end to end on a 560M-shaped BLOOM with random weights: the seconds and the memory of each step.

What is to be seen: memory that is the model's and one batch's, and does not grow with the text. So two lengths of text
are counted in processes of their own, and their peaks compared.

    python benchmarks/bench_neurons.py                       # 24 layers x 4096 neurons, 6 languages
    python benchmarks/bench_neurons.py --shape tiny          # a try
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

LANGUAGES = ("en", "fr", "es", "id", "vi", "zh")
CONTEXT, BATCH = 128, 4


def peak_mb() -> float:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """The resident size now."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def child(shape_name: str, rows: int) -> dict[str, float]:
    """One study: count, select, silence, with ``rows`` rows a language; seconds and MB."""
    import torch

    from benchmarks.common import BLOOM_560M, TINY, make_model
    from pellucid import TransformerBridge
    from pellucid.analysis.language_neurons import lape
    from pellucid.analysis.perplexity import perplexity_change
    from pellucid.corpora import Corpus
    from pellucid.running_stats import CountPositive

    shape = TINY if shape_name == "tiny" else BLOOM_560M
    bridge = TransformerBridge(make_model(shape))
    generator = torch.Generator().manual_seed(0)
    width = shape.d_vocab // len(LANGUAGES)
    tokens = {
        # A language has tokens of its own: with random weights nothing else could tell languages apart.
        label: (torch.randint(0, width, (rows, CONTEXT), generator=generator) + place * width)
        for place, label in enumerate(LANGUAGES)
    }
    corpus = Corpus.from_tokens(tokens, context=CONTEXT)
    hook = "blocks.*.mlp.hook_post"
    before = peak_mb()
    loaded = resident_mb()
    started = time.perf_counter()
    counted = bridge.collect(corpus, {hook: [CountPositive()]}, batch_size=BATCH)
    counting, counting_peak = time.perf_counter() - started, peak_mb()
    started = time.perf_counter()
    found = lape(counted.array(hook, "count_positive"), counted.tokens)
    selecting, selecting_peak = time.perf_counter() - started, peak_mb()
    assert len(found.selected) == round(0.01 * shape.n_layers * 4 * shape.d_model)
    owners = {label: neurons for label, neurons in found.neurons.items() if neurons}
    one = Corpus.from_tokens({label: rows_[:1] for label, rows_ in tokens.items()}, context=CONTEXT)
    started = time.perf_counter()
    change = perplexity_change(bridge, one, owners, batch_size=BATCH)
    return {
        "rows": rows,
        "tokens": sum(counted.n_tokens.values()),
        "neurons selected": len(found.selected),
        "of no language": len(found.unassigned),
        "languages with neurons": len(owners),
        "peak after loading, MB": before,
        "resident after loading, MB": loaded,
        "counting, s": counting,
        "tokens per second": sum(counted.n_tokens.values()) / counting,
        "peak after counting, MB": counting_peak,
        "selecting, s": selecting,
        "peak after selecting, MB": selecting_peak,
        "silencing, s": time.perf_counter() - started,
        "tokens silenced": int(change["tokens"].sum()) * (len(owners) + 1),
        "peak at the end, MB": peak_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("560m", "tiny"), default="560m")
    parser.add_argument("--rows", type=int, nargs=2, default=(4, 16), help="rows a language, in two runs")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--allowed", type=float, default=64.0, help="MB by which the longer text may need more")
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.shape, arguments.child)))
        return
    runs = []
    for rows in arguments.rows:
        command = [sys.executable, __file__, "--shape", arguments.shape, "--child", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"| {arguments.shape}, rows of {CONTEXT} tokens, batches of {BATCH} | " + " | ".join("" for _ in runs) + " |")
    print("| --- |" + " ---: |" * len(runs))
    for name in runs[0]:
        print(f"| {name} | " + " | ".join(f"{run[name]:,.1f}".removesuffix(".0") for run in runs) + " |")
    growth = runs[1]["peak after counting, MB"] - runs[0]["peak after counting, MB"]
    print(f"\nPeak of counting grows by {growth:.1f} MB for {runs[1]['rows'] / runs[0]['rows']:.0f} times the text.")
    if growth > arguments.allowed:
        sys.exit(f"That is more than {arguments.allowed:.0f} MB.")


if __name__ == "__main__":
    main()
