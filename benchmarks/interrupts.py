"""Ctrl-C at every line of every public operation, and at random moments: what is left afterwards.

    python benchmarks/interrupts.py [--signals 2000] [--every 1]

The first part raises ``KeyboardInterrupt`` at each line of the package that an operation runs, by a trace function; the
second lets a timer send real signals at random moments of untraced operations. After each interrupt nothing may act that
was not there before, and the next call has to find (or make) the model as it was. The tests run a sample of the first.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.interrupts import OPERATIONS, count_lines, interrupt_at, what_is_wrong, zero
from tests.models import make_pair, random_tokens


def main() -> int:
    """Run both parts and say what was found; 1 if anything was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=2000, help="interrupts by a timer, over all operations")
    parser.add_argument("--every", type=int, default=1, help="try every N-th line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = by_line(options.every) + by_signal(options.signals)
    for line in wrong:
        print(line)
    print(f"{len(wrong)} interrupts left something")
    return 1 if wrong else 0


def by_line(every: int) -> list[str]:
    """Interrupt each operation at its lines."""
    wrong = []
    for name, operation in OPERATIONS.items():
        bridge, native = make_pair()
        tokens = random_tokens()
        expected = native(tokens).logits
        edited = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])
        operation(bridge, tokens)
        total = count_lines(lambda operation=operation, bridge=bridge, tokens=tokens: operation(bridge, tokens))
        bridge.reset_hooks()
        tried = 0
        for line in range(1, total + 1, every):
            if interrupt_at(line, lambda operation=operation, bridge=bridge, tokens=tokens: operation(bridge, tokens)):
                tried += 1
            else:
                bridge.reset_hooks()
            found = what_is_wrong(bridge, tokens, expected, edited)
            if found is not None:
                wrong.append(f"{name}, line {line} of {total}: {found}")
                bridge.detach()
        print(f"{name}: {total} lines, interrupted at {tried}", flush=True)
    return wrong


def by_signal(count: int) -> list[str]:
    """Interrupt operations by a timer, at random moments of their usual length."""
    chance = random.Random(0)
    wrong, hit = [], Counter[str]()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for name, operation in OPERATIONS.items():
            bridge, native = make_pair()
            tokens = random_tokens()
            expected = native(tokens).logits
            edited = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])
            operation(bridge, tokens)
            bridge.reset_hooks()
            started = time.perf_counter()
            operation(bridge, tokens)
            usual = time.perf_counter() - started
            bridge.reset_hooks()
            for number in range(count // len(OPERATIONS)):
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-6, chance.random() * usual * 1.05))
                    operation(bridge, tokens)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    bridge.reset_hooks()
                except KeyboardInterrupt:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    hit[name] += 1
                found = what_is_wrong(bridge, tokens, expected, edited)
                if found is not None:
                    wrong.append(f"{name}, signal {number}: {found}")
                    bridge.detach()
            print(f"{name}: {hit[name]} of {count // len(OPERATIONS)} signals interrupted it", flush=True)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
