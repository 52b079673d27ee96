"""Run every benchmark, one after the other, each in a process of its own.

    python benchmarks/run_all.py --hardware 2core_cpu   writes every result file
    python benchmarks/run_all.py --quick                tries everything, prints and writes nothing
    python benchmarks/run_all.py --only sweeps import   only these

Ends with status 1 if one failed: numbers that differ stop a benchmark, a missed target does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK = {"processing": ("--tiny",), "attention": ("--tiny", "--quick"), "neurons": ("--shape", "tiny")}
"""How a benchmark is told to be quick, if not by ``--quick`` alone."""


def benchmarks() -> dict[str, Path]:
    """Every ``bench_*.py`` beside this file, by what its name adds to that."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def main() -> None:
    found = benchmarks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the names of the result files")
    parser.add_argument("--quick", action="store_true", help="a few repetitions; writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(found), default=list(found), metavar="NAME")
    arguments = parser.parse_args()
    lines, failed = [], False
    for name in arguments.only:
        call = [sys.executable, str(found[name]), "--hardware", arguments.hardware]
        if arguments.quick:
            call += QUICK.get(name, ("--quick",))
        print(f"\n==== {found[name].name}\n", flush=True)
        start = time.perf_counter()
        status = subprocess.run(call, cwd=HERE).returncode
        failed |= status != 0
        outcome = "done" if status == 0 else f"FAILED with status {status}"
        lines.append(f"{found[name].name}: {outcome}, {(time.perf_counter() - start) / 60:.1f} minutes")
    print("\n==== all\n\n" + "\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
