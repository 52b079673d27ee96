"""Files and data sets of the Hugging Face hub, under TransformerLens' names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pellucid.arguments import check_choice, check_function, check_mapping, check_number, check_path, check_text
from pellucid.errors import InputError, MissingExtraError
from pellucid.utilities.checks import check_dataset

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
    """Those of the keywords that ``callable`` names in its signature.

    Raises:
        InputError: no mapping; nothing that can be called, or a function whose signature Python does not know.
    """
    check_mapping("kwargs_dict", kwargs_dict, "keywords to values")
    named = _keywords_of(callable)
    return {name: value for name, value in kwargs_dict.items() if name in named}


def _keywords_of(callable: Callable[..., Any]) -> set[str]:
    check_function("callable", callable, "a function or a class")
    try:
        parameters = inspect.signature(callable).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"callable has no signature that Python knows: {error}.") from error
    return {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}


def get_rotary_pct_from_config(config: Any) -> float:
    """The share of a head's features that is rotated, of a Hugging Face configuration; 1.0 where it does not say.

    Raises:
        InputError: no configuration, such as its dictionary; a share that is no number from 0 to 1.
    """
    if config is not None and not hasattr(config, "__dict__"):
        raise InputError(
            f"config is a configuration with attributes, or None; found {type(config).__name__}, which has none. Of a "
            "dictionary give types.SimpleNamespace(**dictionary)."
        )
    found = getattr(config, "rotary_pct", None)
    if found is None:
        rope = getattr(config, "rope_parameters", None)
        found = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return 1.0 if found is None else check_number("the share of config that is rotated", found, at_least=0, at_most=1)


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

    Raises:
        InputError: no names; a keyword that ``hf_hub_download`` does not have, or that is given by another name here.
    """
    from huggingface_hub import hf_hub_download

    for argument, name in (("repo_name", repo_name), ("file_name", file_name), ("subfolder", subfolder)):
        check_text(argument, name)
    if cache_dir is not None:
        check_path("cache_dir", cache_dir)
    other = sorted(set(kwargs) & {"repo_id", "filename"})
    if other:
        raise InputError(f"{other[0]} would be given twice: it is repo_name and file_name here.")
    unknown = sorted(set(kwargs) - _keywords_of(hf_hub_download))
    if unknown:
        raise InputError(f"hf_hub_download has no keyword {unknown[0]!r}.")
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
    """A data set (of the library ``datasets``) without any column but one.

    Raises:
        InputError: no data set, or no such column.
    """
    check_text("col_name", col_name)
    check_dataset(dataset, col_name)
    return dataset.remove_columns([name for name in dataset.features if name != col_name])


def get_dataset(dataset_name: str, **kwargs: Any) -> Any:
    """A small data set of the hub by its short name (extra ``datasets``).

    Raises:
        InputError: none of :data:`DATASETS`; a keyword that the name already says.
        MissingExtraError: the library ``datasets`` is not installed.
    """
    check_choice("dataset_name", dataset_name, tuple(DATASETS))
    said = sorted(set(kwargs) & {"path", "split"})
    if said:
        raise InputError(
            f"{said[0]} would be given twice: get_dataset says it, {DATASETS[dataset_name]!r}, split 'train'."
        )
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise MissingExtraError("get_dataset needs the library datasets: pip install 'pellucid[datasets]'.") from error
    return load_dataset(DATASETS[dataset_name], split="train", **kwargs)
