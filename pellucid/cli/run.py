"""``pellucid run``: a text through the model, the next tokens it expects, and the activations asked for in one file.

The file is safetensors: each tensor under its hook's canonical name, the ids that were run as ``tokens``, and under the
one metadata key ``pellucid`` a JSON object that says what made it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from pellucid.cli.models import open_bridge, read_hook_index, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.terminal import results
from pellucid.demo.predictions import Prediction, next_tokens
from pellucid.errors import HookDisabledError, InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag, HookIndex, HookSpec
from pellucid.storage.json_text import Json, to_line
from pellucid.storage.safetensors_files import write_safetensors
from pellucid.token_text import token_labels

TOKENS = "tokens"

_OFF: Mapping[Flag, bool] = {
    "use_attn_result": False,
    "use_split_qkv_input": False,
    "use_attn_in": False,
    "use_hook_mlp_in": False,
}
_ON: Mapping[Flag, bool] = dict.fromkeys(_OFF, True)


@dataclass(frozen=True)
class RunRequest:
    """What to run and what to keep of it."""

    text: str
    hooks: tuple[str, ...] = ()
    out: Path | None = None
    top_k: int = 10
    prepend_bos: bool | None = None


@dataclass(frozen=True)
class Kept:
    """One tensor of the file."""

    name: str
    shape: list[int]
    axes: list[str]
    dtype: str
    bytes: int


def run_text(choice: ModelChoice, request: RunRequest, format: Format) -> None:
    """Run, write the file, print.

    Raises:
        InputError: hooks that exclude each other, text without tokens.
        HookNameError: a hook that matches nothing.
        PellucidError: the model cannot be opened.
    """
    index = read_hook_index(choice)
    names, flags = choose_hooks(index, request.hooks)
    bridge = open_bridge(choice)
    tokens = bridge.to_tokens(request.text, prepend_bos=request.prepend_bos)
    with bridge.points_on(flags):
        kept, logits = _run(bridge, tokens, names, request.out)
    lines = [_line(index, name, tensor) for name, tensor in kept.items()]
    about: dict[str, Json] = {
        **source_of(choice),
        "dtype": _dtype(bridge.dtype),
        "attn_implementation": bridge.attn_implementation,
        "tokens": token_labels(bridge.tokenizer, tokens[0].tolist()),
    }
    if request.out is not None:
        hooks = {line.name: line.axes for line in lines}
        made = about | {"asked": request.hooks, "hooks": hooks}
        write_safetensors(request.out, {TOKENS: tokens, **kept}, to_line(made, sort_keys=False))
    expected = next_tokens(bridge.tokenizer, logits[0, -1], request.top_k)
    file = None if request.out is None else str(request.out)
    if format is Format.json:
        write_json(
            about
            | {
                "next_tokens": [asdict(token) for token in expected],
                "tensors": [asdict(line) for line in lines],
                "file": file,
            }
        )
    else:
        _print(bridge, tokens, expected, lines, file, format)


def choose_hooks(index: HookIndex, asked: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """Canonical names of what was asked for, and the opt-in switches they need.

    A name or glob that matches only opt-in points asks for these; a wider glob leaves them out.

    Raises:
        HookNameError: one that matches nothing.
        InputError: two switches that exclude each other.
    """
    chosen: dict[str, HookSpec] = {}
    for name in asked:
        try:
            found = index.select(name, _OFF, argument="--hooks")
        except HookDisabledError:
            found = index.select(name, _ON, argument="--hooks")
        chosen |= {spec.name: spec for spec, _ in found}
    flags = list(dict.fromkeys(spec.flag for spec in chosen.values() if spec.flag is not None))
    if "use_attn_in" in flags and "use_split_qkv_input" in flags:
        raise InputError(
            "hook_attn_in and hook_q_input, hook_k_input, hook_v_input exclude each other: run them apart."
        )
    return list(chosen), flags


@torch.no_grad()
def _run(
    bridge: TransformerBridge, tokens: Tensor, names: list[str], out: Path | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations by name, and logits."""
    if not names:
        return {}, bridge(tokens)
    if out is not None:
        needed = sum(bridge.estimate_cache(tokens, names_filter=names).values())
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise InputError(
                f"The file would take {needed:,} bytes and {out.parent} has {free:,} left: keep fewer hooks."
            )
    logits, cache = bridge.run_with_cache(tokens, names_filter=names)
    return {name: cache[name] for name in names}, logits


def _line(index: HookIndex, name: str, tensor: Tensor) -> Kept:
    return Kept(name, list(tensor.shape), list(index[name].axes), _dtype(tensor.dtype), tensor.nbytes)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(
    bridge: TransformerBridge,
    tokens: Tensor,
    expected: Sequence[Prediction],
    lines: Sequence[Kept],
    file: str | None,
    format: Format,
) -> None:
    console = results(format)
    labels = token_labels(bridge.tokenizer, tokens[0].tolist())
    console.print(Text.assemble((f"{len(labels)} tokens  ", "bold"), " ".join(labels)))
    console.print()
    predictions = table("next token", "id", "probability", numbers=("id", "probability"))
    for token in expected:
        predictions.add_row(token.token, str(token.id), f"{token.probability:.4f}")
    console.print(predictions)
    if not lines:
        return
    console.print()
    tensors = table("kept", "shape", "axes", "dtype", "bytes", numbers=("bytes",))
    for line in lines:
        tensors.add_row(line.name, " × ".join(map(str, line.shape)), " ".join(line.axes), line.dtype, f"{line.bytes:,}")
    console.print(tensors)
    total = sum(line.bytes for line in lines)
    where = f"written to {file}" if file is not None else "not written: give --out FILE.safetensors to keep them"
    console.print(Text(f"{len(lines)} tensors, {total:,} bytes, {where}", "bold"))
