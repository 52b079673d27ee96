"""What the bridge costs on each family: beside bare Hugging Face, plain torch hooks, TransformerLens and nnsight.

    python benchmarks/bench_families.py                    every case, writes results/families_<hardware>_<yyyymm>.md
    python benchmarks/bench_families.py --quick            a few repetitions, prints and writes nothing
    python benchmarks/bench_families.py --families llama   only these tiny models, without SmolLM2

Tiny models (3 layers, width 64) are reported; the targets are at real width, on SmolLM2-135M, where it is installed. Each
case first shows that the programs give the same numbers. TransformerLens replaces functions inside transformers, so it is
timed in a process of its own, beside the same bare model there.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import CLOCKS, Program, Report, Target, installed, machine_lines, measure, table
from torch import Tensor, nn

from pellucid import TransformerBridge

BARE = "Hugging Face"
SIGHT_ONE, SIGHT_ALL = "nnsight, one block saved", "nnsight, every module saved"
NOTHING, ONE, PATTERNS, ALL = "nothing hooked", "one residual kept", "all patterns kept", "every point cached"
PLAIN_ONE, PLAIN_ALL, OURS_ALL = "plain hook on one block", "plain hooks on every module", "the same points cached"

_LLAMA = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
TINY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 16}),
    "gpt2": ("GPT2Config", {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gemma2": ("Gemma2Config", _LLAMA | {"head_dim": 16}),
    "phi3": ("Phi3Config", _LLAMA | {"pad_token_id": 0}),
}
"""Class of the configuration, and its sizes."""

LLAMA_POINTS: tuple[tuple[str, str, str], ...] = (
    ("hook_resid_pre", "", "input"),
    ("ln1.hook_out", "input_layernorm", "output"),
    ("attn.hook_q", "self_attn.q_proj", "output"),
    ("attn.hook_k", "self_attn.k_proj", "output"),
    ("attn.hook_v", "self_attn.v_proj", "output"),
    ("attn.hook_z", "self_attn.o_proj", "input"),
    ("hook_attn_out", "self_attn.o_proj", "output"),
    ("mlp.hook_in", "post_attention_layernorm", "output"),
    ("mlp.hook_pre", "mlp.gate_proj", "output"),
    ("mlp.hook_pre_linear", "mlp.up_proj", "output"),
    ("mlp.hook_post", "mlp.down_proj", "input"),
    ("hook_mlp_out", "mlp.down_proj", "output"),
    ("hook_resid_post", "", "output"),
)
"""Points of a Llama's block at whose tensors a plain torch hook can stand: name, module in the block, what of it."""


def tiny_model(name: str) -> Any:
    """A tiny model with random weights, running eager attention."""
    import transformers

    kind, sizes = TINY[name]
    config = getattr(transformers, kind)(**sizes)
    torch.manual_seed(0)
    return (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    )


def bare(model: Any, tokens: Tensor) -> Tensor:
    """Hugging Face's logits without a key/value cache."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def with_plain_hook(model: Any, block: nn.Module, tokens: Tensor) -> list[Tensor]:
    """One torch hook that keeps a block's output, put on and taken off."""
    kept: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        bare(model, tokens)
    finally:
        handle.remove()
    return kept


def with_plain_hooks(model: Any, blocks: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What somebody without a library writes: a torch hook on each module, which keeps what the bridge's cache keeps."""
    kept: dict[str, Tensor] = {}
    handles = []

    def of_input(name: str) -> Callable[..., None]:
        return lambda module, args: kept.update({name: args[0].detach()})

    def of_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: kept.update({name: output.detach()})

    for layer, block in enumerate(blocks):
        for name, path, place in LLAMA_POINTS:
            module, full = block.get_submodule(path), f"blocks.{layer}.{name}"
            if place == "input":
                handles.append(module.register_forward_pre_hook(of_input(full)))
            else:
                handles.append(module.register_forward_hook(of_output(full)))
    try:
        bare(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def programs_of(bridge: TransformerBridge, model: Any, tokens: Tensor) -> list[Program]:
    """What is timed on every family."""
    blocks = model.get_submodule(bridge.adapter.blocks_path)
    residual = "blocks.1.hook_resid_post"
    return [
        Program(BARE, lambda: bare(model, tokens)),
        Program(NOTHING, lambda: bridge(tokens)),
        Program(PLAIN_ONE, lambda: with_plain_hook(model, blocks[1], tokens)),
        Program(ONE, lambda: bridge.run_with_cache(tokens, names_filter=residual)),
        Program(PATTERNS, lambda: bridge.run_with_cache(tokens, names_filter="*.hook_pattern")),
        Program(ALL, lambda: bridge.run_with_cache(tokens)),
    ]


# nnsight runs the body of a `with` block elsewhere: what is saved has to be a name there and returned after it (RET504).


def sight_one(sight: Any, block: Any, tokens: Tensor) -> Any:
    with sight.trace(tokens, use_cache=False):
        residual = block.output.save()
    return residual  # noqa: RET504


def sight_all(sight: Any, tokens: Tensor) -> Any:
    with sight.trace(tokens, use_cache=False) as tracer:
        cache = tracer.cache(include_inputs=True)
    return cache  # noqa: RET504


def sight_programs(model: Any, blocks_path: str, tokens: Tensor) -> list[Program]:
    """nnsight on a model of its own; none where it is not installed."""
    if not installed("nnsight"):
        return []
    import nnsight  # type: ignore[import-not-found, unused-ignore]

    sight: Any = nnsight.NNsight(model)
    block = functools.reduce(getattr, blocks_path.split("."), sight)[1]
    return [
        Program(SIGHT_ONE, lambda: sight_one(sight, block, tokens)),
        Program(SIGHT_ALL, lambda: sight_all(sight, tokens)),
    ]


def check_numbers(report: Report, bridge: TransformerBridge, model: Any, tokens: Tensor) -> None:
    """See that the programs compute the same."""
    native = model(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
    logits, cache = bridge.run_with_cache(tokens)
    report.check("logits, nothing hooked", torch.equal(bridge(tokens), native.logits))
    report.check("logits, every point cached", torch.equal(logits, native.logits))
    equal = all(
        torch.equal(cache["resid_pre", layer], native.hidden_states[layer])
        and torch.equal(cache["pattern", layer], native.attentions[layer])
        for layer in range(bridge.cfg.n_layers)
    )
    report.check("residual streams and patterns of all layers", equal)


def case_tiny(report: Report, names: list[str], rounds: int, clock: str, peer: bool) -> None:
    """Ratios to bare Hugging Face, mounting and unmounting included; nothing is promised of a model of 1 ms."""
    report.section("Tiny models: 3 layers, d_model 64, 4 x 32 tokens; medians of paired ratios to bare Hugging Face")
    rows = []
    for name in names:
        model = tiny_model(name)
        bridge = TransformerBridge(model)
        tokens = torch.randint(10, 1000, (4, 32), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            check_numbers(report, bridge, tiny_model(name), tokens)
            sight = sight_programs(tiny_model(name), bridge.adapter.blocks_path, tokens)
            found = measure(programs_of(bridge, model, tokens) + sight, rounds, warmup=10, clock=clock)
            points = len(bridge.run_with_cache(tokens)[1])
        columns = [f"{found.ratio(program, BARE):.2f}" for program in (NOTHING, PLAIN_ONE, ONE, PATTERNS, ALL)]
        beside = peer_ratios(name, rounds, clock) if peer else {}
        peers = [f"{beside[key]:.2f}" if key in beside else "" for key in ("nothing", "one", "all")]
        peers += [f"{found.ratio(key, BARE):.2f}" if sight else "" for key in (SIGHT_ONE, SIGHT_ALL)]
        rows.append((name, f"{found.median(BARE) * 1e3:.2f}", *columns, str(points), *peers))
    head = ("family", "bare ms", NOTHING, PLAIN_ONE, ONE, PATTERNS, ALL, "points", "TL: nothing", "TL: one", "TL: all")
    head += ("nnsight: one", "nnsight: all")
    report.say("\n" + table(head, rows) + "\n")


def case_smollm2(report: Report, rounds: int, clock: str) -> None:
    """At real width: SmolLM2-135M, beside plain torch hooks that keep the same tensors."""
    from pellucid.demo.smollm2 import load_smollm2

    bridge = load_smollm2()
    model: Any = bridge.hf_model.requires_grad_(False)
    tokens = torch.randint(10, 40_000, (1, 64), generator=torch.Generator().manual_seed(1))
    report.section("SmolLM2-135M: 30 layers, d_model 576, float32, 1 x 64 tokens")
    blocks = model.get_submodule(bridge.adapter.blocks_path)
    names = [f"blocks.{layer}.{name}" for layer in range(bridge.cfg.n_layers) for name, _, _ in LLAMA_POINTS]
    with torch.no_grad():
        check_numbers(report, bridge, model, tokens)
        plain = with_plain_hooks(model, blocks, tokens)
        _, cache = bridge.run_with_cache(tokens, names_filter=names)
        equal = all(torch.equal(plain[name], cache[name].reshape(plain[name].shape)) for name in names)
        report.check(f"{len(names)} tensors, plain hooks and cache", equal)
        programs = programs_of(bridge, model, tokens)
        programs += [
            Program(PLAIN_ALL, lambda: with_plain_hooks(model, blocks, tokens)),
            Program(OURS_ALL, lambda: bridge.run_with_cache(tokens, names_filter=names)),
        ]
        found = measure(programs, rounds, warmup=2, clock=clock)
    report.timings(found, BARE)
    report.target(
        Target("SmolLM2, nothing hooked / Hugging Face", found.ratio(NOTHING, BARE), 1.01),
        Target("SmolLM2, one point kept over a plain torch hook", found.difference(ONE, PLAIN_ONE) * 1e3, 0.31, " ms"),
        Target("SmolLM2, points cached / plain torch hooks that keep the same", found.ratio(OURS_ALL, PLAIN_ALL), 1.02),
    )


# -- the peer, in a process of its own ---------------------------------------------------------------------------------


def peer_ratios(name: str, rounds: int, clock: str) -> dict[str, float]:
    """TransformerLens' ratios to bare Hugging Face; none where it is not installed or does not open the model."""
    if not installed("transformer_lens"):
        return {}
    call = [sys.executable, __file__, "--peer", name, "--rounds", str(rounds), "--clock", clock]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        print(f"TransformerLens does not run {name}: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_peer(name: str, rounds: int, clock: str) -> None:
    """Print TransformerLens' ratios as JSON."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import (
        TransformerBridge as LensBridge,  # type: ignore[import-not-found, unused-ignore]
    )
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(1000)}, unk_token="w0"))
    model = tiny_model(name)
    with tempfile.TemporaryDirectory(prefix="bench_tokenizer_") as folder:
        special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w3"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        lens = LensBridge.boot_transformers(PEER_NAMES[name], hf_model=tiny_model(name), tokenizer=tokenizer)
    tokens = torch.randint(10, 1000, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float((lens(tokens) - bare(model, tokens)).abs().max()) < 1e-3
        programs = [
            Program(BARE, lambda: bare(model, tokens)),
            Program("nothing", lambda: lens(tokens)),
            Program("one", lambda: lens.run_with_cache(tokens, names_filter=lambda n: n == "blocks.1.hook_resid_post")),
            Program("all", lambda: lens.run_with_cache(tokens)),
        ]
        found = measure(programs, rounds, warmup=10, clock=clock)
    print(json.dumps({key: found.ratio(key, BARE) for key in ("nothing", "one", "all")}))


PEER_NAMES = {
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gpt2": "gpt2",
    "gpt_neox": "EleutherAI/pythia-70m",
    "gemma2": "google/gemma-2-2b",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
}
"""What TransformerLens calls a model of the family."""


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the name of the result file")
    parser.add_argument("--quick", action="store_true", help="a few repetitions; writes nothing")
    parser.add_argument("--families", nargs="+", choices=list(TINY), help="only these tiny models")
    parser.add_argument("--rounds", type=int, default=200, help="repetitions on a tiny model")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall time or processor time")
    parser.add_argument("--note", default="", help="written into the file")
    parser.add_argument("--peer", choices=list(TINY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peer:
        run_peer(arguments.peer, arguments.rounds, arguments.clock)
        return
    report = Report("Families")
    for line in [*machine_lines(), f"- clock: {arguments.clock}"] + (
        [f"- note: {arguments.note}"] if arguments.note else []
    ):
        report.say(line)
    rounds = 10 if arguments.quick else arguments.rounds
    case_tiny(report, arguments.families or list(TINY), rounds, arguments.clock, peer=True)
    if not arguments.families:
        from pellucid.demo.smollm2 import is_installed

        if is_installed():
            case_smollm2(report, 3 if arguments.quick else 30, arguments.clock)
        else:
            report.say("SmolLM2 is not installed: no case at real width was run.")
    if not arguments.quick:
        month = time.strftime("%Y%m")
        report.write(Path(__file__).parent / "results" / f"families_{arguments.hardware}_{month}.md")


if __name__ == "__main__":
    main()
