"""Where to put a model, under TransformerLens' names."""

from __future__ import annotations

import torch

from pellucid.activation_cache import check_storage
from pellucid.errors import InputError, warn


def get_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``.

    Apple's ``"mps"`` is never chosen for a user: what is promised here is tested on CPU and CUDA only. ``device="mps"``
    asks for it.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def warn_if_mps(device: torch.device | str) -> None:
    """Warn that numbers on ``"mps"`` are not tested; silent for any other device.

    Raises:
        InputError: none that torch knows.
    """
    if device is None:
        raise InputError("device is a torch.device or its name; found None.")
    check_storage(device, None)
    if torch.device(device).type == "mps":
        warn("Numbers on Apple's mps are not tested here; compare with the CPU before you believe them.")


def print_gpu_mem(step_name: str = "") -> None:
    """Print how much memory torch has allocated on the current GPU, in GiB."""
    print(f"{step_name} ~ {torch.cuda.memory_allocated() / 2**30:.2f} GiB allocated on GPU.")  # noqa: T201 (its name says so)
