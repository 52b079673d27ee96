"""From the MODEL of a command line to a bridge, and to its hook names before any weight is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache

import pellucid
from pellucid.cli.files import model_folder
from pellucid.cli.options import Dtype, ModelChoice
from pellucid.demo import MODEL_FOLDER, load_demo_bridge
from pellucid.errors import InputError
from pellucid.model_bridge.running.checkpoint import ADAPTER_CONFIG, CONFIG
from pellucid.model_bridge.running.loading import read_adapter
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookIndex
from pellucid.storage.json_text import Json

DTYPES = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
    Dtype.float64: torch.float64,
}
"""``auto`` is not among them: it leaves the choice to the checkpoint, or to the model."""


def read_hook_index(choice: ModelChoice) -> HookIndex:
    """The model's hook names, from its configuration alone.

    Raises:
        InputError: no such folder, or a file in it that is damaged.
        UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
        OSError: no such model, or no network to ask.
    """
    return read_adapter(_folder(choice) or choice.name, choice.revision).hook_index()


def open_bridge(choice: ModelChoice) -> TransformerBridge:
    """Load the model.

    Raises:
        InputError: no such folder or device, or no safetensors weights.
        WeightError: weights that are damaged, missing or of other sizes.
        UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
        OSError: no such model, or no network to ask.
    """
    if choice.is_demo or not sys.stderr.isatty():
        with _without_bars_of_loading():
            bridge = _load(choice)
    else:
        bridge = _load(choice)
    bridge.set_attn_implementation(choice.attention.value)
    return bridge


@contextmanager
def _without_bars_of_loading() -> Iterator[None]:
    """Without transformers' bars, for this long only: its switch also turns off huggingface_hub's, and ours with them."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    if shown:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _load(choice: ModelChoice) -> TransformerBridge:
    device, dtype = parse_device(choice.device), DTYPES.get(choice.dtype)
    if choice.is_demo:
        torch.set_num_threads(1)  # as fast when the machine is idle, many times faster when it is not
        if choice.revision is not None:
            raise InputError("The embedded model has no revisions: leave --revision out.")
        return load_demo_bridge(dtype=dtype or torch.float32, device=device)
    try:
        return TransformerBridge.boot_transformers(
            _folder(choice) or choice.name,
            dtype=dtype,
            device=device,
            revision=choice.revision,
            use_safetensors=None if choice.allow_pickle else True,
        )
    except InputError as error:  # the same advice in the words of the command line
        raise InputError(re.sub("pass use_safetensors=(False|None)", "add --allow-pickle", str(error))) from error


def parse_device(name: str | None) -> torch.device | None:
    """A device that this machine has.

    Raises:
        InputError: it has none of that name.
    """
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}). cpu always can.") from None


def commit_of(choice: ModelChoice) -> str | None:
    """The commit that a hub model's files came from; ``None`` for a folder."""
    if choice.is_demo or _folder(choice) is not None:
        return None
    for file in (ADAPTER_CONFIG, CONFIG):
        found = try_to_load_from_cache(choice.name, file, revision=choice.revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def source_of(choice: ModelChoice) -> dict[str, Json]:
    """What every command's document begins with: Pellucid's version, and which model it was."""
    return {
        "pellucid": pellucid.__version__,
        "model": choice.name,
        "revision": choice.revision,
        "commit": commit_of(choice),
    }


def _folder(choice: ModelChoice) -> str | None:
    """The folder that MODEL names, ``None`` for a hub name."""
    if choice.is_demo:
        return str(MODEL_FOLDER)
    return model_folder(choice.name)
