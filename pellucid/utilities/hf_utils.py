"""Files and data sets of the Hugging Face hub, under TransformerLens' names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pellucid.arguments import check_choice

DATASETS: Mapping[str, str] = {
    "c4": "NeelNanda/c4-10k",
    "c4-code": "NeelNanda/c4-code-20k",
    "c4_code": "NeelNanda/c4-code-20k",
    "code": "NeelNanda/code-10k",
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "python": "NeelNanda/code-10k",
    "wiki": "NeelNanda/wiki-10k",
}
"""Small data sets of the hub by TransformerLens' short names."""


def select_compatible_kwargs(kwargs_dict: Mapping[str, Any], callable: Callable[..., Any]) -> dict[str, Any]:
    """Those of the keywords that ``callable`` names in its signature."""
    named = inspect.signature(callable).parameters
    return {name: value for name, value in kwargs_dict.items() if name in named}


def get_rotary_pct_from_config(config: Any) -> float:
    """The share of a head's features that is rotated, of a Hugging Face configuration; 1.0 where it does not say."""
    found = getattr(config, "rotary_pct", None)
    if found is None:
        found = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    return 1.0 if found is None else float(found)


def download_file_from_hf(
    repo_name: str,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str | None = None,
    force_is_torch: bool = False,
    **kwargs: Any,
) -> Any:
    """A file of the hub: JSON and torch files read, of any other its path.

    A torch file is read as weights alone (``weights_only=True``): a pickle can run code. Keywords are those of
    ``hf_hub_download``, such as ``revision``; one that it does not have is an error.
    """
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        repo_id=repo_name,
        filename=file_name,
        subfolder=subfolder,
        cache_dir=cache_dir,
        **kwargs,
    )
    if force_is_torch or path.endswith(".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    return json.loads(Path(path).read_text("utf-8")) if path.endswith(".json") else path


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """A data set (of the library ``datasets``) without any column but one."""
    return dataset.remove_columns([name for name in dataset.features if name != col_name])


def get_dataset(dataset_name: str, **kwargs: Any) -> Any:
    """A small data set of the hub by its short name (extra ``datasets``).

    Raises:
        InputError: none of :data:`DATASETS`.
    """
    check_choice("dataset_name", dataset_name, tuple(DATASETS))
    from datasets import load_dataset

    return load_dataset(DATASETS[dataset_name], split="train", **kwargs)
