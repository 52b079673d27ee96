"""What every benchmark here shares: models with random weights, paired measuring, and the report.

Programs are measured in one process, interleaved: each round runs every program once, in an order shuffled with a fixed
seed, so that none always runs on the caches its neighbour left. Ratios and differences are taken inside a round and their
median reported, which a machine shared with others disturbs least; the minimum of each program stands beside it.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "pellucid")
CLOCKS: Mapping[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}

M = TypeVar("M", bound=nn.Module)


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads, "
            f"vocabulary {self.d_vocab}, float32, random weights"
        )


TINY = Shape("tiny", n_layers=3, d_model=64, n_heads=4, d_vocab=1000)
BLOOM_560M = Shape("560M-shaped", n_layers=24, d_model=1024, n_heads=16, d_vocab=250_880)
LONG = Shape("long context", n_layers=4, d_model=1024, n_heads=16, d_vocab=50_000)
"""560M's width for 1 x 1,024 tokens: with all layers and the real vocabulary a forward takes 4 GB and half a minute."""


def make_model(shape: Shape, seed: int = 0, scale: float = 1.0) -> BloomForCausalLM:
    """A BLOOM with random weights, norm gains and biases: a fresh one has gain 1 and bias 0 and hides differences.

    Args:
        shape: its sizes.
        seed: of the weights.
        scale: of the linear weights, relative to Hugging Face's initialisation.
    """
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        eos_token_id=None,  # decoding runs to its full length
        attn_implementation="eager",
    )
    model = BloomForCausalLM(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.add_(0.1 * torch.randn_like(module.weight))
            module.bias.add_(0.1 * torch.randn_like(module.bias))
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.weight.mul_(scale)
            module.bias.add_(0.02 * torch.randn_like(module.bias))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 3
    return model


def twin(model: M) -> M:
    """Another model of the same parameters: modules of its own to put hooks on, no weight copied."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def random_tokens(shape: Shape, batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids ``[batch, length]``."""
    return torch.randint(10, shape.d_vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- measuring ---------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _ignore(prepared: Any) -> None:
    pass


@dataclass(frozen=True)
class Program:
    """Something to time.

    Attributes:
        name: as it stands in the table.
        run: one repetition.
        before: made ready for it, not timed.
        after: what ``before`` gave is handed to this, not timed.
        rounds: take part in so many rounds only (slow peers of a large model), by default in all.
    """

    name: str
    run: Callable[[], Any]
    rounds: int | None = None
    before: Callable[[], Any] = _nothing
    after: Callable[[Any], Any] = _ignore


@dataclass
class Timings:
    """Seconds of each program, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def minimum(self, name: str) -> float:
        return min(self.seconds[name])

    def _pairs(self, name: str, base: str) -> list[tuple[float, float]]:
        return list(zip(self.seconds[name], self.seconds[base], strict=False))  # of the rounds both took part in

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of ``name / base``."""
        return statistics.median(a / b for a, b in self._pairs(name, base))

    def quartiles(self, name: str, base: str) -> tuple[float, float]:
        """Lower and upper quartile over rounds of ``name / base``."""
        lower, _, upper = statistics.quantiles([a / b for a, b in self._pairs(name, base)], n=4)
        return lower, upper

    def difference(self, name: str, base: str) -> float:
        """Median over rounds of ``name - base``, in seconds."""
        return statistics.median(a - b for a, b in self._pairs(name, base))

    def min_ratio(self, name: str, base: str) -> float:
        """Ratio of the minima."""
        return self.minimum(name) / self.minimum(base)

    def min_difference(self, name: str, base: str) -> float:
        """Difference of the minima, in seconds."""
        return self.minimum(name) - self.minimum(base)


def measure(programs: Sequence[Program], rounds: int, warmup: int, clock: str = "wall", seed: int = 0) -> Timings:
    """Run all programs in each of ``rounds`` rounds, after ``warmup`` rounds that are not counted.

    The garbage collector runs between rounds and not inside them, as in :mod:`timeit`.
    """
    now = CLOCKS[clock]
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {program.name: [] for program in programs}
    assert len(seconds) == len(programs), "two programs of one name"
    enabled = gc.isenabled()
    try:
        for index in range(-warmup, rounds):
            if index % 50 == 0:
                gc.collect()
            gc.disable()
            present = [program for program in programs if program.rounds is None or index < program.rounds]
            for program in order.sample(present, len(present)):
                prepared = program.before()
                start = now()
                result = program.run()
                elapsed = now() - start
                program.after(prepared)
                del result  # freeing what a program returned is not its time
                if index >= 0:
                    seconds[program.name].append(elapsed / 1e9)
    finally:
        if enabled:
            gc.enable()
    return Timings(seconds)


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A bound that was promised, and what was measured.

    Attributes:
        at_least: the measured value has to reach the bound; by default it must not exceed it.
    """

    what: str
    measured: float
    bound: float
    unit: str = ""
    note: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def cells(self) -> tuple[str, ...]:
        verdict = "met" if self.met else "**missed**"
        sign = ">=" if self.at_least else "<="
        return self.what, f"{self.measured:.4g}{self.unit}", f"{sign} {self.bound:.4g}{self.unit}", verdict, self.note


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned."""
    widths = [max(len(str(row[index])) for row in (head, *rows)) for index in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def timing_table(timings: Timings, base: str) -> str:
    """Median, minimum, and the paired comparison with ``base``."""
    rows = []
    for name, seconds in timings.seconds.items():
        rows.append(
            (
                name,
                f"{timings.median(name) * 1e3:.3f}",
                f"{timings.minimum(name) * 1e3:.3f}",
                f"{timings.ratio(name, base):.4f}",
                f"{timings.min_ratio(name, base):.4f}",
                f"{timings.difference(name, base) * 1e6:+.1f}",
                f"{timings.min_difference(name, base) * 1e6:+.1f}",
                str(len(seconds)),
            )
        )
    head = ("program", "median ms", "min ms", "ratio", "ratio of min", "diff us", "diff of min us", "rounds")
    return f"{table(head, rows)}\n\nRatio and difference: median over rounds, against `{base}`."


@dataclass
class Report:
    """The result file as it grows; everything is printed as well."""

    title: str
    parts: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        self.parts.append(text)
        print(text, flush=True)

    def section(self, text: str) -> None:
        self.say(f"\n## {text}\n")

    def timings(self, timings: Timings, base: str) -> None:
        self.say("\n" + timing_table(timings, base) + "\n")

    def check(self, what: str, value: float | bool, bound: float | None = None) -> None:
        """Note that two programs give the same numbers.

        Raises:
            AssertionError: they do not; times of different computations are not compared.
        """
        if bound is None:
            assert value is True, f"{what}: not equal to the bit"
            self.say(f"- same numbers: {what}: equal to the bit")
        else:
            assert float(value) <= bound, f"{what}: differs by {float(value):.3g}, over {bound:g}"
            self.say(f"- same numbers: {what}: differ by at most {float(value):.2g} (bound {bound:g})")

    def target(self, *targets: Target) -> None:
        self.targets += targets
        for target in targets:
            what, measured, bound, verdict, note = target.cells()
            self.say(f"- target: {what}: {measured}, {bound}: {verdict}{f' ({note})' if note else ''}")

    def text(self) -> str:
        rows = [target.cells() for target in self.targets]
        summary = table(("what", "measured", "target", "", "note"), rows) if rows else "No case with a target was run."
        return "\n".join([f"# {self.title}\n", "## Targets\n", summary, *self.parts]) + "\n"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text(), encoding="utf-8")
        print(f"\nwritten: {path}")


def installed(module: str) -> bool:
    """Whether a peer is installed (extra ``bench``)."""
    return importlib.util.find_spec(module) is not None


def package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if found["pellucid"] == "not installed":  # run from a checkout
        import pellucid

        found["pellucid"] = f"{pellucid.__version__} (checkout)"
    return found


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_lines() -> list[str]:
    """Date, machine and versions, one a line."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return [
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- CPU: {cpu_model()}, {os.cpu_count()} cores; load average at the start {load}",
        f"- threads: {torch.get_num_threads()}",
        f"- Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        *(f"- {name} {number}" for name, number in package_versions().items()),
    ]


def resident_bytes() -> int:
    """Resident memory of this process (Linux; 0 elsewhere)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def reset_peak() -> None:
    """Let :func:`peak_bytes` begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Largest resident memory of this process since :func:`reset_peak` (Linux' ``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report VmHWM")
