"""What processing a 560M-shaped model's weights takes: memory and time, TransformerLens beside it.

    python benchmarks/bench_processing.py                    every case, writes results/processing_<hardware>_<yyyymm>.md
    python benchmarks/bench_processing.py --cases tied peer  only these, prints and writes nothing
    python benchmarks/bench_processing.py --tiny             a tiny model, to try the program itself

Each case runs in a fresh process, one after the other. Memory is the largest resident set (Linux' ``VmHWM``, set back just
before) less what the process held before there was a model, as a multiple of the checkpoint's bytes. Each case first runs
the model, and again after processing: log-probabilities have to agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    BLOOM_560M,
    TINY,
    Report,
    Shape,
    Target,
    installed,
    machine_lines,
    make_model,
    peak_bytes,
    random_tokens,
    reset_peak,
    resident_bytes,
    table,
)
from torch import Tensor, nn

BOUND = 2e-5
"""Largest change of a log-probability that passes: two float32 runs of 24 layers that round differently."""

CASES = {
    "tied": "Pellucid, tied unembedding: process_weights()",
    "keep_tied": "Pellucid, keep_tied=True, without the centrings",
    "untied": "Pellucid, untied checkpoint: process_weights()",
    "loading": "Pellucid, from 200 MB shards: boot_transformers(process_weights=True)",
    "peer": "TransformerLens: enable_compatibility_mode()",
    "peer_untied": "TransformerLens, untied checkpoint",
}


@dataclass
class Result:
    """One case, as its process reports it."""

    case: str
    model_bytes: int
    base_bytes: int
    before_bytes: int
    peak_bytes: int
    after_bytes: int
    seconds: float
    cpu_seconds: float
    moved: float

    @property
    def multiple(self) -> float:
        """Peak, less what the process held without a model, in checkpoints."""
        return (self.peak_bytes - self.base_bytes) / self.model_bytes


# -- in the process of one case ----------------------------------------------------------------------------------------


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``run`` gives, its wall time and its processor time (all threads), in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(tokens)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.log_softmax(-1)


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def untied(model: Any) -> Any:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model


def peer_bridge(model: Any, folder: Path) -> Any:
    """TransformerLens' bridge of a live model; it wants a tokenizer, of which nothing is used."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge as PeerBridge
    from transformers import PreTrainedTokenizerFast

    logging.getLogger().setLevel(logging.ERROR)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="a", bos_token="b", eos_token="b", pad_token="b"
    ).save_pretrained(folder)
    model.config.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return PeerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer)


def run_case(case: str, shape: Shape, folder: Path) -> Result:
    """Measure one case in this process."""
    import pellucid.model_bridge.transformer_bridge as ours

    if case.startswith("peer"):
        import transformer_lens  # noqa: F401 (its own size is no part of the measurement)
    tokens = random_tokens(shape, 1, 8)
    base = resident_bytes()
    if case == "loading":
        before = torch.load(folder / "before.pt")
        reset_peak()
        bridge, seconds, cpu = timed(lambda: ours.TransformerBridge.boot_transformers(folder, process_weights=True))
        peak = peak_bytes()
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        moved = float((log_probabilities(bridge, tokens) - before).abs().max())
        return Result(case, size, base, base, peak, resident_bytes(), seconds, cpu, moved)
    model = make_model(shape)
    if case.endswith("untied"):
        model = untied(model)
    size = bytes_of(model)
    before = log_probabilities(model, tokens)
    bridge: Any
    run: Callable[[], Any]
    if case.startswith("peer"):
        bridge = peer_bridge(model, folder)
        run = lambda: bridge.enable_compatibility_mode(disable_warnings=True)  # noqa: E731
    elif case == "keep_tied":
        bridge = ours.TransformerBridge(model)
        run = lambda: bridge.process_weights(keep_tied=True, center_writing_weights=False, center_unembed=False)  # noqa: E731
    else:
        bridge = ours.TransformerBridge(model)
        run = bridge.process_weights
    gc.collect()
    resident = resident_bytes()
    reset_peak()
    _, seconds, cpu = timed(run)
    peak = peak_bytes()
    moved = float((log_probabilities(bridge, tokens) - before).abs().max())
    return Result(case, size, base, resident, peak, resident_bytes(), seconds, cpu, moved)


# -- all cases ---------------------------------------------------------------------------------------------------------


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """The checkpoint of the loading case, and the log-probabilities it has to give."""
    model = make_model(shape)
    torch.save(log_probabilities(model, random_tokens(shape, 1, 8)), folder / "before.pt")
    model.save_pretrained(folder, max_shard_size="200MB")


def measured(case: str, tiny: bool) -> Result:
    """A case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, __file__, "--folder", folder, *(["--tiny"] if tiny else [])]
        if case == "loading":
            subprocess.run([*call, "--write"], check=True, capture_output=True)
        done = subprocess.run([*call, "--worker", case], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
        return Result(**json.loads(done.stdout.splitlines()[-1]))


def targets(results: dict[str, Result]) -> list[Target]:
    """What was promised for the cases that were run."""
    found = []
    for case, bound in (("tied", 1.6), ("keep_tied", 1.1), ("untied", 1.1)):
        if case in results:
            found.append(Target(f"peak memory, {case}", results[case].multiple, bound, "x checkpoint"))
    for case, peer in (("tied", "peer"), ("untied", "peer_untied")):
        if case in results and peer in results:
            ratio = results[case].seconds / results[peer].seconds
            cpu = results[case].cpu_seconds / results[peer].cpu_seconds
            found.append(Target(f"wall time, {case} / TransformerLens", ratio, 0.25, note=f"CPU time {cpu:.2f}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="only these")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = TINY if arguments.tiny else BLOOM_560M
    if arguments.write:
        write_checkpoint(shape, arguments.folder)
        return
    if arguments.worker is not None:
        print(json.dumps(asdict(run_case(arguments.worker, shape, arguments.folder))))
        return
    report = Report("Processing weights")
    report.say("\n".join(machine_lines()))
    report.section(str(shape))
    results = {}
    for case in arguments.cases or CASES:
        if case.startswith("peer") and not installed("transformer_lens"):
            report.say(f"- {CASES[case]}: not installed")
            continue
        result = results[case] = measured(case, arguments.tiny)
        report.check(f"log-probabilities, {CASES[case]}", result.moved, BOUND)
    rows = [
        (
            CASES[case],
            f"{result.seconds:.2f}",
            f"{result.cpu_seconds:.2f}",
            f"{result.model_bytes / 2**20:.0f}",
            f"{(result.before_bytes - result.base_bytes) / 2**20:.0f}",
            f"{(result.peak_bytes - result.base_bytes) / 2**20:.0f}",
            f"{result.multiple:.2f}",
            f"{(result.after_bytes - result.base_bytes) / 2**20:.0f}",
        )
        for case, result in results.items()
    ]
    head = (
        "case",
        "seconds",
        "CPU seconds",
        "checkpoint MiB",
        "before MiB",
        "peak MiB",
        "peak / checkpoint",
        "after MiB",
    )
    report.say("\n" + table(head, rows))
    if not arguments.tiny:  # of a tiny model the processor, not the weights, is the larger part
        report.target(*targets(results))
    if arguments.cases is None and not arguments.tiny:
        name = f"processing_{arguments.hardware}_{time.strftime('%Y%m')}.md"
        report.write(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    main()
