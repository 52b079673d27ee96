"""What the bridge costs: Pellucid beside bare Hugging Face, plain torch hooks, TransformerLens and nnsight.

    python benchmarks/bench_bridge.py                  every case, writes benchmarks/results/bridge_<hardware>_<yyyymm>.md
    python benchmarks/bench_bridge.py --quick          a few repetitions, prints and writes nothing
    python benchmarks/bench_bridge.py --cases 2 3      only these

Each case first checks that the programs it compares give the same numbers, and then times them (see common.py).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from common import (
    BLOOM_560M,
    CLOCKS,
    LONG,
    TINY,
    Program,
    Report,
    Shape,
    Target,
    installed,
    machine_lines,
    make_model,
    measure,
    random_tokens,
    resident_bytes,
    table,
    twin,
)
from torch import Tensor, nn
from transformers import BloomForCausalLM

from pellucid import TransformerBridge

HF = "Hugging Face, use_cache=False"
HF_DEFAULT = "Hugging Face, model(x)"
HF_TUPLE = "Hugging Face, use_cache=False, return_dict=False"
"""What the bridge asks for while nobody else sees it: no output objects are made."""
PELLUCID = "Pellucid"
LENS = "TransformerLens"
NNSIGHT = "nnsight"

PEER_BOUND = 1e-3
"""Largest difference of a peer's logits or activations from Hugging Face's: TransformerLens computes otherwise."""

TARGET_UNHOOKED = 1.01
TARGET_ONE_HOOK_US = 310.0
"""0.3 ms a run and 10 us a point, at real width; a microsecond of a 1 ms model is reported and not promised."""
TARGET_CACHED = 1.02
"""Of the time of plain torch hooks that keep the same tensors, at real width."""
TARGET_WRAP_SECONDS = 0.2
TARGET_WRAP_MB = 3.0

# name of the point, module below the backbone, where the plain hook finds the tensor
POINTS: tuple[tuple[str, str, str], ...] = (
    ("blocks.1.hook_resid_post", "h.1", "output[0]"),
    ("blocks.1.attn.hook_pattern", "h.1.self_attention", "output[1]"),
    ("blocks.1.attn.hook_z", "h.1.self_attention.dense", "input"),
    ("blocks.1.mlp.hook_post", "h.1.mlp.dense_4h_to_h", "input"),
)

# name of a point of a block, module below the block, where a plain hook finds the tensor
REACHED: tuple[tuple[str, str, str], ...] = (
    ("hook_resid_pre", "", "input"),
    ("ln1.hook_out", "input_layernorm", "output"),
    ("attn.hook_q", "self_attention.query_key_value", "part 0"),
    ("attn.hook_k", "self_attention.query_key_value", "part 1"),
    ("attn.hook_v", "self_attention.query_key_value", "part 2"),
    ("attn.hook_pattern", "self_attention", "output[1]"),
    ("attn.hook_z", "self_attention.dense", "input"),
    ("hook_attn_out", "self_attention.dense", "output"),
    ("hook_resid_mid", "self_attention", "output[0]"),
    ("ln2.hook_out", "post_attention_layernorm", "output"),
    ("mlp.hook_pre", "mlp.dense_h_to_4h", "output"),
    ("mlp.hook_post", "mlp.dense_4h_to_h", "input"),
    ("hook_mlp_out", "mlp.dense_4h_to_h", "output"),
    ("hook_resid_post", "", "output[0]"),
)
"""Points of a block at whose tensors a plain torch hook can stand."""


# -- the programs ------------------------------------------------------------------------------------------------------


class Bench:
    """One model under every program, all around the same parameters.

    Hugging Face, plain torch hooks and Pellucid run the very same modules, of which the bridge leaves nothing changed: two
    copies of a tiny model differ by 20 microseconds for no other reason than where they lie in memory. The peers change
    the modules they wrap and have copies of their own. ``reference`` is a model that nothing was ever done to.
    """

    def __init__(self, model: BloomForCausalLM, shape: Shape, rounds: Callable[[int], int], clock: str) -> None:
        self.reference = model
        self.model = twin(model)
        self.bridge = TransformerBridge(self.model)
        self.shape = shape
        self.rounds = rounds
        self.clock = clock

    @cached_property
    def lens(self) -> Any:
        return open_lens(twin(self.reference))

    @cached_property
    def sight(self) -> Any:
        import nnsight  # type: ignore[import-not-found, unused-ignore]

        return nnsight.NNsight(twin(self.reference))

    def logits(self, tokens: Tensor) -> Tensor:
        return run_bare(self.model, tokens)


def run_bare(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hugging Face's logits, no key/value cache: what Pellucid, asked for logits, asks Hugging Face for."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def open_lens(model: BloomForCausalLM) -> Any:
    """TransformerLens' bridge on ``model``, raw as it comes."""
    from transformer_lens.model_bridge import (  # type: ignore[import-not-found, unused-ignore]
        TransformerBridge as LensBridge,
    )

    # It opens its tokenizer a second time by path, so there has to be one on disk.
    return LensBridge.boot_transformers("bigscience/bloom-560m", hf_model=model, tokenizer=small_tokenizer())


def small_tokenizer() -> Any:
    """A tokenizer of a thousand words. Only ids are run; TransformerLens does not open a model without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(1000)}, unk_token="w0"))
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w3"}
    folder = scratch().name
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone when the program ends."""
    return tempfile.TemporaryDirectory(prefix="bench_tokenizer_")


def has_lens() -> bool:
    return installed("transformer_lens")


def has_nnsight() -> bool:
    return installed("nnsight")


# nnsight runs the body of a `with` block elsewhere: what is saved has to be a name there and returned after it (RET504).


def nnsight_logits(sight: Any, tokens: Tensor) -> Tensor:
    with sight.trace(tokens):
        logits = sight.lm_head.output.save()
    return logits  # type: ignore[no-any-return]  # noqa: RET504


def nnsight_residual(sight: Any, tokens: Tensor) -> Tensor:
    with sight.trace(tokens):
        residual = sight.transformer.h[1].output[0].save()
    return residual  # type: ignore[no-any-return]  # noqa: RET504


def nnsight_everything(sight: Any, tokens: Tensor) -> Any:
    with sight.trace(tokens) as tracer:
        cache = tracer.cache(include_inputs=True)
    return cache  # noqa: RET504


class Look:
    """A hook that looks: it keeps a reference to what it is shown, in each library's calling convention."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.seen: Tensor | None = None

    def lens_hook(self, tensor: Tensor, hook: Any) -> None:
        self.seen = tensor

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen = output[0] if self.place == "output[0]" else output[1]

    def on_input(self, module: nn.Module, args: Any) -> None:
        self.seen = args[0]

    def register(self, module: nn.Module) -> Any:
        if self.place == "input":
            return module.register_forward_pre_hook(self.on_input)
        return module.register_forward_hook(self.on_output)

    def take(self) -> Tensor:
        seen, self.seen = self.seen, None
        assert seen is not None, "the hook never ran"
        return seen


def worst(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, ``b`` in the shape of ``a`` (Hugging Face keeps heads flat)."""
    return float((a - b.reshape(a.shape)).abs().max())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b.reshape(a.shape))


# -- the cases ---------------------------------------------------------------------------------------------------------


def case_unhooked(report: Report, bench: Bench, batch: int, length: int, rounds: int, peer_rounds: int) -> None:
    """(1) A forward with nothing hooked."""
    tokens = random_tokens(bench.shape, batch, length)
    report.section(f"1. Nothing hooked: {bench.shape}; {batch} x {length} tokens")
    bare = run_bare(bench.reference, tokens)
    report.check(f"{PELLUCID} against an untouched Hugging Face copy", same_bits(bare, bench.bridge(tokens)))
    programs = [
        Program(HF, lambda: bench.logits(tokens)),
        Program(HF_DEFAULT, lambda: bench.model(tokens).logits),
        Program(HF_TUPLE, lambda: bench.model(input_ids=tokens, use_cache=False, return_dict=False)[0]),
        Program(PELLUCID, lambda: bench.bridge(tokens)),
    ]
    if has_lens():
        report.check(f"{LENS} against Hugging Face", worst(bare, bench.lens(tokens)), PEER_BOUND)
        programs.append(Program(LENS, lambda: bench.lens(tokens), bench.rounds(peer_rounds)))
    if has_nnsight():
        report.check(f"{NNSIGHT} against Hugging Face", worst(bare, nnsight_logits(bench.sight, tokens)), PEER_BOUND)
        name = f"{NNSIGHT}, logits saved"
        programs.append(Program(name, lambda: nnsight_logits(bench.sight, tokens), bench.rounds(peer_rounds)))
    del bare
    timings = measure(programs, bench.rounds(rounds), warmup=bench.rounds(rounds // 10), clock=bench.clock)
    report.timings(timings, HF)
    what = f"nothing hooked, {bench.shape.name}, {batch} x {length}: ratio to Hugging Face"
    note = f"minima {timings.min_ratio(PELLUCID, HF):.4f}; to model(x) {timings.ratio(PELLUCID, HF_DEFAULT):.4f}, "
    note += f"to a tuple {timings.ratio(PELLUCID, HF_TUPLE):.4f}"
    report.target(Target(what, timings.ratio(PELLUCID, HF), TARGET_UNHOOKED, "", note))


def case_one_hook(
    report: Report, bench: Bench, where: tuple[str, str, str], size: tuple[int, int], rounds: int, peer_rounds: int
) -> None:
    """(2) One hook that looks; the target is the 560M-shaped model's."""
    point, path, place = where
    tokens = random_tokens(bench.shape, *size)
    report.section(f"2. One hook that looks, {point}: {bench.shape}; {size[0]} x {size[1]} tokens")
    report.say(f"The plain torch hook is on `transformer.{path}` and takes its {place}.\n")
    look = Look(place)
    module = bench.model.transformer.get_submodule(path)

    def torch_once() -> Tensor:
        handle = look.register(module)
        try:
            return bench.logits(tokens)
        finally:
            handle.remove()

    def bridge_once(bridge: Any) -> Any:
        return bridge.run_with_hooks(tokens, fwd_hooks=[(point, look.lens_hook)])

    def remove(handles: Any) -> None:
        for handle in handles:
            handle.remove()

    plain, kept = "torch hook, registered and removed", "torch hook, kept"
    ours, ours_kept = f"{PELLUCID} run_with_hooks", f"{PELLUCID} add_hook, kept"
    programs = [
        Program(HF, lambda: bench.logits(tokens)),
        Program(plain, torch_once),
        Program(ours, lambda: bridge_once(bench.bridge)),
        Program(kept, lambda: bench.logits(tokens), None, lambda: [look.register(module)], remove),
        Program(
            ours_kept, lambda: bench.bridge(tokens), None, lambda: bench.bridge.add_hook(point, look.lens_hook), remove
        ),
    ]
    bare = run_bare(bench.reference, tokens)
    torch_once()
    seen = look.take()
    for program in programs[1:]:
        prepared = program.before()
        report.check(f"{program.name}, logits", same_bits(bare, program.run()))
        program.after(prepared)
        report.check(f"{program.name}, activation", same_bits(look.take(), seen))
    if has_lens():
        report.check(f"{LENS}, logits", worst(bare, bridge_once(bench.lens)), PEER_BOUND)
        report.check(f"{LENS}, activation", worst(look.take(), seen), PEER_BOUND)
        programs.append(Program(f"{LENS} run_with_hooks", lambda: bridge_once(bench.lens), bench.rounds(peer_rounds)))
    if has_nnsight() and path == "h.1":
        report.check(f"{NNSIGHT}, activation", worst(seen, nnsight_residual(bench.sight, tokens)), PEER_BOUND)
        programs.append(
            Program(f"{NNSIGHT} trace, saved", lambda: nnsight_residual(bench.sight, tokens), bench.rounds(peer_rounds))
        )
    timings = measure(programs, bench.rounds(rounds), warmup=bench.rounds(rounds // 10), clock=bench.clock)
    report.timings(timings, HF)
    for name, base in ((ours, plain), (ours_kept, kept)):
        what = f"{name}, {point.removeprefix('blocks.1.')}: over a plain torch hook"
        note = f"minima {timings.min_difference(name, base) * 1e6:+.1f} us"
        difference = timings.difference(name, base) * 1e6
        if bench.shape is TINY:
            report.say(f"- {what}: {difference:+.1f} us ({note})")
        else:
            report.target(Target(what, difference, TARGET_ONE_HOOK_US, " us", note))


class PlainCache:
    """What somebody without a library writes: a torch hook on each module, which keeps what the cache of the bridge keeps.

    Queries, keys and values are parts of one tensor, of which the bridge keeps copies, and so does this.
    """

    def __init__(self, model: Any, n_heads: int) -> None:
        self.model, self.n_heads = model, n_heads

    def run(self, tokens: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        handles = []
        for layer, block in enumerate(self.model.transformer.h):
            for name, path, place in REACHED:
                module = block.get_submodule(path)
                keep = self._keeper(kept, f"blocks.{layer}.{name}", place)
                register = module.register_forward_pre_hook if place == "input" else module.register_forward_hook
                handles.append(register(keep))
        try:
            run_bare(self.model, tokens)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def _keeper(self, kept: dict[str, Tensor], name: str, place: str) -> Callable[..., None]:
        def of_input(module: nn.Module, args: Any) -> None:
            kept[name] = args[0].detach()

        def of_output(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output.detach()

        def of_entry(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output[int(place[-2])].detach()

        def of_part(module: nn.Module, args: Any, output: Any) -> None:
            fused = output.view(*output.shape[:2], self.n_heads, 3, -1)
            kept[name] = fused[..., int(place[-1]), :].detach().clone()

        return {"input": of_input, "output": of_output}.get(place) or (of_part if "part" in place else of_entry)


def case_everything_cached(report: Report, bench: Bench, size: tuple[int, int], rounds: int, peer_rounds: int) -> None:
    """(3) Every activation cached, mounting and unmounting included."""
    tokens = random_tokens(bench.shape, *size)
    report.section(
        f"3. Everything cached, mounting and unmounting included: {bench.shape}; {size[0]} x {size[1]} tokens"
    )
    bare = bench.reference(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
    logits, cache = bench.bridge.run_with_cache(tokens)
    report.check(f"{PELLUCID}, logits", same_bits(bare.logits, logits))
    for layer in range(bench.shape.n_layers):
        assert same_bits(bare.hidden_states[layer], cache["resid_pre", layer]), layer
        assert same_bits(bare.attentions[layer], cache["pattern", layer]), layer
    report.check(f"{PELLUCID}, residual streams and patterns of all layers", True)
    report.say(f"- {PELLUCID} keeps {len(cache)} tensors, {cache.nbytes:,} bytes")

    ours = f"{PELLUCID} run_with_cache"
    outputs = "Hugging Face, its own outputs (hidden states, attentions)"
    programs = [
        Program(HF, lambda: bench.logits(tokens)),
        Program(HF_DEFAULT, lambda: bench.model(tokens).logits),
        Program(HF_TUPLE, lambda: bench.model(input_ids=tokens, use_cache=False, return_dict=False)[0]),
        Program(
            outputs, lambda: bench.model(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
        ),
        Program(ours, lambda: bench.bridge.run_with_cache(tokens)),
    ]
    plain = PlainCache(bench.model, bench.shape.n_heads)
    reached = [f"blocks.{layer}.{name}" for layer in range(bench.shape.n_layers) for name, _, _ in REACHED]
    some, some_plain = f"{PELLUCID}, {len(reached)} points", f"torch hooks, the same {len(reached)} tensors"
    programs += [
        Program(some_plain, lambda: plain.run(tokens)),
        Program(some, lambda: bench.bridge.run_with_cache(tokens, names_filter=reached)),
    ]
    by_hand = plain.run(tokens)
    assert all(same_bits(cache[name], by_hand[name]) for name in reached)
    report.check(f"{some_plain}", True)
    del by_hand
    if has_lens():
        lens_logits, lens_cache = bench.lens.run_with_cache(tokens)
        report.check(f"{LENS}, logits", worst(bare.logits, lens_logits), PEER_BOUND)
        shared = [name for name in cache if name in lens_cache.cache_dict and "attn_scores" not in name]
        gap = max(worst(cache[name].float(), lens_cache[name].float()) for name in shared)
        report.check(f"{LENS}, {len(shared)} activations of the same names", gap, PEER_BOUND)
        report.say(f"- {LENS} keeps {len({id(tensor) for tensor in lens_cache.cache_dict.values()})} tensors")
        programs.append(
            Program(f"{LENS} run_with_cache", lambda: bench.lens.run_with_cache(tokens), bench.rounds(peer_rounds))
        )
    if has_nnsight():
        kept = nnsight_everything(bench.sight, tokens)
        gap = worst(bare.logits, kept.model.lm_head.output)
        report.check(f"{NNSIGHT}, logits", gap, PEER_BOUND)
        report.say(f"- {NNSIGHT} keeps inputs and outputs of {len(kept.keys())} modules, nothing from inside one")
        programs.append(
            Program(
                f"{NNSIGHT} tracer.cache", lambda: nnsight_everything(bench.sight, tokens), bench.rounds(peer_rounds)
            )
        )
    timings = measure(programs, bench.rounds(rounds), warmup=bench.rounds(rounds // 10), clock=bench.clock)
    report.timings(timings, HF)
    note = f"minima {timings.min_ratio(ours, HF):.4f}; to model(x) {timings.ratio(ours, HF_DEFAULT):.4f}, "
    note += f"to a tuple {timings.ratio(ours, HF_TUPLE):.4f}"
    what = f"everything cached, {bench.shape.name}: ratio to Hugging Face"
    report.say(f"- {what}: {timings.ratio(ours, HF):.4f} ({note})")
    what = f"{len(reached)} points cached, {bench.shape.name}: ratio to torch hooks that keep the same tensors"
    ratio, note = timings.ratio(some, some_plain), f"minima {timings.min_ratio(some, some_plain):.4f}"
    if bench.shape is TINY:
        report.say(f"- {what}: {ratio:.4f} ({note})")
    else:
        report.target(Target(what, ratio, TARGET_CACHED, "", note))


def case_one_residual(report: Report, bench: Bench, size: tuple[int, int], rounds: int, peer_rounds: int) -> None:
    """(4) The cache of one residual."""
    tokens = random_tokens(bench.shape, *size)
    point, path, place = POINTS[0]
    report.section(f"4. One residual cached, {point}: {bench.shape}; {size[0]} x {size[1]} tokens")
    look = Look(place)
    module = bench.model.transformer.get_submodule(path)

    def torch_once() -> Tensor:
        handle = look.register(module)
        try:
            bench.logits(tokens)
        finally:
            handle.remove()
        return look.take()

    def bridge_once(bridge: Any) -> Tensor:
        tensor: Tensor = bridge.run_with_cache(tokens, names_filter=point)[1][point]
        return tensor

    seen = torch_once()
    report.check(f"{PELLUCID} against the plain hook", same_bits(bridge_once(bench.bridge), seen))
    plain, ours = "torch hook, registered and removed", f"{PELLUCID} run_with_cache"
    programs = [
        Program(HF, lambda: bench.logits(tokens)),
        Program(plain, torch_once),
        Program(ours, lambda: bridge_once(bench.bridge)),
    ]
    if has_lens():
        report.check(f"{LENS}", worst(seen, bridge_once(bench.lens)), PEER_BOUND)
        programs.append(Program(f"{LENS} run_with_cache", lambda: bridge_once(bench.lens), bench.rounds(peer_rounds)))
    if has_nnsight():
        report.check(f"{NNSIGHT}", worst(seen, nnsight_residual(bench.sight, tokens)), PEER_BOUND)
        programs.append(
            Program(f"{NNSIGHT} trace, saved", lambda: nnsight_residual(bench.sight, tokens), bench.rounds(peer_rounds))
        )
    timings = measure(programs, bench.rounds(rounds), warmup=bench.rounds(rounds // 10), clock=bench.clock)
    report.timings(timings, HF)
    report.say(f"Over a plain torch hook: {timings.difference(ours, plain) * 1e6:+.1f} us (no target).")


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@contextmanager
def traced(result: list[int]) -> Iterator[None]:
    """Bytes of Python objects made inside and still there at the end."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        result.append(after - before)
    finally:
        tracemalloc.stop()


def case_wrapping(report: Report, bench: Bench, rounds: int) -> None:
    """(5) Wrapping a live model."""
    report.section(f"5. Wrapping: {bench.shape}")
    openers: dict[str, Callable[[BloomForCausalLM], Any]] = {PELLUCID: TransformerBridge}
    if has_lens():
        openers[LENS] = open_lens
        open_lens(make_model(TINY))  # its imports are not its wrapping
    TransformerBridge(make_model(TINY))
    before = {name: tensor.data_ptr() for name, tensor in bench.model.named_parameters()}
    count = sum(tensor.numel() for tensor in bench.model.parameters())
    own = storages(list(bench.model.parameters()))
    rows = []
    for name, opener in openers.items():
        times, python_bytes, resident = [], list[int](), []
        for _ in range(bench.rounds(rounds)):
            target = twin(bench.reference)
            gc.collect()
            start, rss = time.perf_counter(), resident_bytes()
            wrapped = opener(target)
            times.append(time.perf_counter() - start)
            resident.append(resident_bytes() - rss)
            del wrapped, target
        target = twin(bench.reference)
        with traced(python_bytes):
            wrapped = opener(target)
        parameters = list(wrapped.parameters())
        same_pointers = {key: tensor.data_ptr() for key, tensor in target.named_parameters()} == before
        added = sum(size for pointer, size in storages(parameters).items() if pointer not in own)
        total = sum(tensor.numel() for tensor in parameters)
        points = "-"
        if name == PELLUCID:
            assert same_pointers, "a parameter has moved"
            assert total == count, "the number of parameters has changed"
            with traced(python_bytes):
                points = f"{len(wrapped.hook_points())}"
            mb = max(python_bytes[0], sorted(resident)[len(resident) // 2]) / 1e6
            report.target(
                Target(f"wrapping, {bench.shape.name}: seconds", min(times), TARGET_WRAP_SECONDS, " s"),
                Target(f"wrapping, {bench.shape.name}: memory added", mb, TARGET_WRAP_MB, " MB"),
            )
            points += f" points made: {python_bytes[1] / 1e6:.2f} MB more"
        rows.append(
            (
                name,
                f"{sorted(times)[len(times) // 2]:.4f}",
                f"{min(times):.4f}",
                f"{python_bytes[0] / 1e6:.2f}",
                f"{resident[0] / 1e6:.2f} / {sorted(resident)[len(resident) // 2] / 1e6:.2f}",
                f"{added / 1e6:.1f}",
                "unchanged" if same_pointers else "changed",
                "unchanged" if total == count else f"{total / count:.3f} times as many",
                points,
            )
        )
        del wrapped, target, parameters
    head = (
        "program",
        "median s",
        "min s",
        "Python MB",
        "resident MB, first / median",
        "weights added MB",
        "data_ptr of every parameter",
        "number of parameters",
        "hook points",
    )
    report.say("\n" + table(head, rows) + "\n")
    report.say("Memory of the target is the greater of Python's (tracemalloc) and the median of resident memory.")


def nnsight_steered(language_model: Any, tokens: Tensor, count: int, vector: Tensor) -> Tensor:
    with language_model.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=-1) as tracer:
        for _ in tracer.iter[:count]:
            output = language_model.transformer.h[1].output
            language_model.transformer.h[1].output = (output[0] + vector, *output[1:])
        ids = tracer.result.save()
    return ids  # type: ignore[no-any-return]  # noqa: RET504


def case_decoding(report: Report, bench: Bench, rounds: int, count: int = 32) -> None:
    """(6) Greedy decoding with a steering hook."""
    tokens = random_tokens(bench.shape, 2, 12)
    point, path, _ = POINTS[0]
    report.section(f"6. {count} tokens decoded greedily, steered at {point}: {bench.shape}; 2 x 12 tokens")
    vector = 40.0 * torch.randn(bench.shape.d_model, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
    ours_settings = settings | {"stop_at_eos": False, "verbose": False}

    def plain_generate() -> Tensor:
        mask = torch.ones_like(tokens)
        # -1 is no token: the stopping rule is asked at each step and never says yes, as for the others.
        ids: Tensor = bench.model.generate(input_ids=tokens, attention_mask=mask, eos_token_id=-1, **settings)
        return ids

    def torch_steered() -> Tensor:
        module = bench.model.transformer.get_submodule(path)
        handle = module.register_forward_hook(lambda module, args, output: (output[0] + vector, *output[1:]))
        try:
            return plain_generate()
        finally:
            handle.remove()

    def steered(bridge: Any) -> Tensor:
        with bridge.hooks(fwd_hooks=[(point, lambda tensor, hook: tensor + vector)]):
            ids: Tensor = bridge.generate(tokens, **ours_settings)
        return ids

    reference = torch_steered()
    assert not torch.equal(reference, plain_generate()), "steering has no effect: nothing is compared"
    report.check(f"{PELLUCID}, tokens", torch.equal(reference, steered(bench.bridge)))
    plain, ours = "generate with a torch hook", f"{PELLUCID} generate in hooks()"
    programs = [
        Program("generate, no hook", plain_generate),
        Program(plain, torch_steered),
        Program(ours, lambda: steered(bench.bridge)),
    ]
    if has_lens():
        report.check(f"{LENS}, tokens", torch.equal(reference, steered(bench.lens)))
        programs.append(Program(f"{LENS} generate in hooks()", lambda: steered(bench.lens), bench.rounds(20)))
    if has_nnsight():
        from nnsight import TransformersModel

        sight = TransformersModel(twin(bench.reference), tokenizer=small_tokenizer(), task="text-generation")
        report.check(f"{NNSIGHT}, tokens", torch.equal(reference, nnsight_steered(sight, tokens, count, vector)))
        programs.append(
            Program(f"{NNSIGHT} generate", lambda: nnsight_steered(sight, tokens, count, vector), bench.rounds(20))
        )
    timings = measure(programs, bench.rounds(rounds), warmup=1, clock=bench.clock)
    report.timings(timings, plain)
    per_token = timings.difference(ours, plain) / count * 1e6
    report.say(f"Over a plain torch hook: {per_token:+.1f} us a token (no target).")


def case_compiled(report: Report, bench: Bench, rounds: int) -> None:
    """(7) torch.compile of the unhooked model."""
    tokens = random_tokens(bench.shape, 2, 12)
    report.section(f"7. torch.compile(fullgraph=True), nothing hooked: {bench.shape}; 2 x 12 tokens")
    bare = run_bare(bench.reference, tokens)
    for name, function in compiled_forms(bench).items():
        torch._dynamo.reset()
        explained = torch._dynamo.explain(function)(tokens)
        report.say(f"- {name}: {explained.graph_count} graph(s), {explained.graph_break_count} break(s)")
        report.target(Target(f"torch.compile, {name}: graphs", float(explained.graph_count), 1.0))
    torch._dynamo.reset()
    reason = compiler_missing()
    if reason is not None:
        report.say(f"- compiled runs skipped: {reason}")
        return
    programs = []
    for name, function in compiled_forms(bench).items():
        try:
            run = torch.compile(function, fullgraph=True)
            report.check(f"{name}, compiled against eager", worst(bare, run(tokens)), PEER_BOUND)
        except torch._dynamo.exc.TorchDynamoException as error:
            report.say(f"- {name}: fullgraph=True refused: {str(error).strip().splitlines()[0]}")
            continue
        programs.append(Program(name, lambda run=run: run(tokens)))  # type: ignore[misc]
    timings = measure(programs, bench.rounds(rounds), warmup=3, clock=bench.clock)
    report.timings(timings, programs[0].name)
    report.say("Compiled runs are compared with the first; there is no target for their time.")


def compiled_forms(bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compiled: the bare model, the model inside the bridge, and the bridge itself."""
    inner = bench.bridge.hf_model
    return {
        "Hugging Face": lambda tokens: run_bare(bench.model, tokens),
        "Pellucid's hf_model": lambda tokens: run_bare(inner, tokens),
        "Pellucid's bridge": lambda tokens: bench.bridge(tokens),
    }


def compiler_missing() -> str | None:
    """Why torch cannot compile here, or ``None``."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(2))
    except Exception as error:  # whatever the toolchain raises is the reason that is printed
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


# -- the command -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2core_cpu", help="name of the machine in the result file's name")
    parser.add_argument("--quick", action="store_true", help="a few repetitions; writes nothing unless --out is given")
    parser.add_argument("--cases", nargs="+", type=int, choices=range(1, 8), default=list(range(1, 8)), metavar="N")
    parser.add_argument("--no-large", action="store_true", help="leave the 560M-shaped model out (2.2 GB)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of this process only")
    parser.add_argument("--out", type=Path, help="the result file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = Report("What the bridge costs" + (" (quick: too few repetitions to quote)" if arguments.quick else ""))
    report.section("Configuration")
    for line in machine_lines():
        report.say(line)
    report.say("- float32, eval mode, gradients off; TransformerLens raw (no weight processing)")
    report.say(f"- clock: {arguments.clock}; order of programs shuffled in each round")
    for peer, present in ((LENS, has_lens()), (NNSIGHT, has_nnsight())):
        if not present:
            report.say(f"- {peer} is not installed and was skipped (pip install 'pellucid[bench]')")

    def rounds(full: int) -> int:
        return max(2, full // 20) if arguments.quick else max(1, full)

    cases = set(arguments.cases)
    if cases - {5}:
        tiny = Bench(make_model(TINY, scale=4.0), TINY, rounds, arguments.clock)
        if 1 in cases:
            case_unhooked(report, tiny, 2, 12, rounds=3000, peer_rounds=300)
        if 2 in cases:
            for where in POINTS:
                case_one_hook(report, tiny, where, (2, 12), rounds=3000, peer_rounds=200)
        if 3 in cases:
            case_everything_cached(report, tiny, (2, 12), rounds=2000, peer_rounds=200)
        if 4 in cases:
            case_one_residual(report, tiny, (2, 12), rounds=2000, peer_rounds=200)
        if 6 in cases:
            case_decoding(report, tiny, rounds=60)
        if 7 in cases:
            case_compiled(report, tiny, rounds=500)
    if cases & {1, 3} and not arguments.no_large:
        long = Bench(make_model(LONG), LONG, rounds, arguments.clock)
        if 1 in cases:
            case_unhooked(report, long, 1, 1024, rounds=10, peer_rounds=3)
        if 3 in cases:
            case_everything_cached(report, long, (1, 1024), rounds=5, peer_rounds=3)
        del long
    if cases - {7} and not arguments.no_large:
        large = Bench(make_model(BLOOM_560M), BLOOM_560M, rounds, arguments.clock)
        if 5 in cases:
            case_wrapping(report, large, rounds=20)
        if 1 in cases:
            case_unhooked(report, large, 1, 16, rounds=100, peer_rounds=20)
            case_unhooked(report, large, 4, 128, rounds=12, peer_rounds=3)
        if 2 in cases:
            case_one_hook(report, large, POINTS[0], (1, 16), rounds=40, peer_rounds=10)
        if 3 in cases:
            case_everything_cached(report, large, (1, 16), rounds=20, peer_rounds=5)
        if 4 in cases:
            case_one_residual(report, large, (1, 16), rounds=40, peer_rounds=10)
        if 6 in cases:
            case_decoding(report, large, rounds=6)
    print("\n" + report.text().split("\n## Configuration")[0])
    out: Path | None = arguments.out
    everything = cases == set(range(1, 8)) and not arguments.no_large  # a part would replace the file of the whole
    if out is None and everything and not arguments.quick:
        name = f"bridge_{arguments.hardware}_{time.strftime('%Y%m')}.md"
        out = Path(__file__).parent / "results" / name
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    main()
