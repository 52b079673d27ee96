"""What importing costs: Pellucid beside torch, transformers, TransformerLens and nnsight, each in fresh processes.

    python benchmarks/bench_import.py          writes results/import_<hardware>_<yyyymm>.md
    python benchmarks/bench_import.py --quick  one round, prints and writes nothing

A process that only starts is the base. Files are in the system's cache: a first round is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import Program, Report, installed, machine_lines, measure

NOTHING = "pass"
STATEMENTS = (
    (NOTHING, ""),
    ("import torch", ""),
    ("from transformers import BloomForCausalLM", ""),
    ("import pellucid", ""),
    ("from pellucid import TransformerBridge", ""),
    ("from transformer_lens.model_bridge import TransformerBridge", "transformer_lens"),
    ("import nnsight", "nnsight"),
)
"""What is run, and the peer that it needs."""


def started(statement: str) -> Callable[[], None]:
    """Run a statement in a process of its own, with this checkout's package first."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    environment = os.environ | {"PYTHONPATH": path}

    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True, env=environment)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--quick", action="store_true", help="one round; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path, help="the result file")
    arguments = parser.parse_args()
    report = Report("What importing costs" + (" (quick: too few repetitions to quote)" if arguments.quick else ""))
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    report.section("Processes that import and end")
    programs = []
    for statement, peer in STATEMENTS:
        if peer and not installed(peer):
            report.say(f"- {peer} is not installed and was skipped (pip install 'pellucid[bench]')")
        else:
            programs.append(Program(statement, started(statement)))
    report.timings(measure(programs, rounds=1 if arguments.quick else 5, warmup=1), NOTHING)
    out: Path | None = arguments.out
    if out is None and not arguments.quick:
        out = Path(__file__).parent / "results" / f"import_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
