"""What is asked of a loader, seen to before Hugging Face reads a weight: its own errors come late and blame the weights."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pellucid.arguments import check_mapping, check_path
from pellucid.errors import InputError

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's words for ``device_map``."""


def check_loading(
    *,
    dtype: Any,
    device: Any,
    device_map: Any,
    max_memory: Any,
    offload_folder: Any,
    hf_config_overrides: Any,
    load_weights: bool,
    use_safetensors: Any,
    tokenizer: Any,
) -> None:
    """Refuse arguments that no loader can use, or that would have no effect beside the others.

    Raises:
        InputError: one is of another kind, names nothing that is here, or would have no effect.
    """
    check_dtype(dtype)
    if device is not None:
        check_device("device", device)
    if device is not None and device_map is not None:
        raise InputError("device and device_map both say where the model goes; give one.")
    if device_map is not None and not isinstance(device_map, Mapping) and device_map not in PLACEMENTS:
        check_device("device_map", device_map, f", one of accelerate's words {', '.join(PLACEMENTS)}, or a mapping")
    if device_map is not None and not load_weights:
        raise InputError("device_map would have no effect: load_weights=False reads no weights. Give device=.")
    for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
        if value is not None and device_map is None:
            raise InputError(f"{name} would have no effect: it belongs to device_map, which is not given.")
    if max_memory is not None:
        check_mapping("max_memory", max_memory, 'devices to sizes, such as {0: "10GiB", "cpu": "30GiB"}')
    if offload_folder is not None:
        check_path("offload_folder", offload_folder)
    if hf_config_overrides is not None:
        given = check_mapping("hf_config_overrides", hf_config_overrides, "attributes of the configuration to values")
        wrong = [key for key in given if not isinstance(key, str)]
        if wrong:
            raise InputError(f"hf_config_overrides maps names of attributes to values; found the key {wrong[0]!r}.")
    if use_safetensors not in (True, False, None) or isinstance(use_safetensors, str):
        raise InputError(f"use_safetensors is True, False or None; found {use_safetensors!r}.")
    if tokenizer is not None and not callable(tokenizer):
        raise InputError(
            f"tokenizer is a tokenizer of Hugging Face's, not its name; found {tokenizer!r}. "
            "transformers.AutoTokenizer.from_pretrained(name) gives one."
        )


def check_dtype(dtype: Any) -> None:
    """Refuse what is no dtype of weights.

    Raises:
        InputError: so it is.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return
    raise InputError(
        f"dtype is a floating-point one of torch's, such as torch.float32 or torch.bfloat16; found {dtype!r}."
    )


def check_device(name: str, device: Any, more: str = "") -> None:
    """Refuse what is no device, or one that this machine has not.

    Raises:
        InputError: with the reason, and the words that would be right.
    """
    kind = isinstance(device, (str, torch.device)) or (isinstance(device, int) and not isinstance(device, bool))
    reason = f"a {type(device).__name__}"
    if kind:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
        else:
            return
    raise InputError(f"{name} is a device that is here, such as 'cpu' or 'cuda:0'{more}; found {device!r} ({reason}).")


def check_save_folder(save_directory: Any) -> None:
    """Refuse what no model can be saved to: Hugging Face logs that a file is in the way, and saves nothing.

    Raises:
        InputError: so it is.
    """
    place = check_path("save_directory", save_directory).expanduser()
    if os.path.lexists(place) and not place.is_dir():
        raise InputError(f"save_directory is a folder; {os.fspath(save_directory)} is a file. Give another path.")


PUSHES = ("repo_id", "commit_message", "create_pr")
"""Read of the ``**kwargs`` of Hugging Face's ``save_pretrained`` when it uploads; the rest of them makes the repository."""


def check_save_keywords(save: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Refuse what a ``save_pretrained`` would take among its ``**kwargs`` and never read.

    Args:
        save: the method of the model, transformers' or PEFT's; of any other, Python knows what it takes.
        keywords: what it is given.

    Raises:
        InputError: a keyword that is not read, or only with ``push_to_hub``.
    """
    library = save.__module__.partition(".")[0]
    if library not in ("transformers", "peft"):
        return
    known = [name for name, each in inspect.signature(save).parameters.items() if each.kind is not each.VAR_KEYWORD]
    of_push: list[str] = []
    if library == "peft":
        known.append("state_dict")  # read of its **kwargs
    else:
        from huggingface_hub import HfApi

        of_repository = inspect.signature(HfApi.create_repo).parameters
        of_push = [*PUSHES, *(name for name in of_repository if name not in ("self", "exist_ok", *PUSHES, *known))]
    for name in keywords:
        if name in of_push and not keywords.get("push_to_hub"):
            raise InputError(f"{name}= would have no effect: it is of the upload, push_to_hub=True.")
        if name not in (*known, *of_push):
            near = difflib.get_close_matches(name, [*known, *of_push], 1)
            hint = f" Did you mean {near[0]}=?" if near else f" It takes {', '.join(known)}."
            raise InputError(f"save_pretrained of {library} does not read {name}=.{hint}")
