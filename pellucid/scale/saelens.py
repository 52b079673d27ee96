"""From a store to the layout in which SAELens reads cached activations.

That layout is a Hugging Face data set saved to disk: a column for each hook, under the hook's name, of ``[context, d]``
arrays, and ``token_ids`` ``[context]`` int32. It has no mask, so only packed corpora can be exported, and no bfloat16,
which is widened to float32. SAELens reads rows in their order, so they are shuffled here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_path, check_texts
from pellucid.errors import InputError, MissingExtraError
from pellucid.progress import progress_bar
from pellucid.scale.stored_activations import StoredActivations
from pellucid.storage.safetensors_files import DTYPES
from pellucid.storage.whole_files import whole_folder

FILE_BYTES = 512 * 2**20
"""About how large an Arrow file is."""

SHARDS_MIXED = 8
"""Of how many shards rows are mixed: files are read in long stretches, and memory holds one batch."""

WRITE_ROWS = 64


def export_to_saelens(
    store: StoredActivations,
    hooks: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    seed: int | None = 0,
    progress: bool | None = None,
) -> int:
    """Write hooks of a store as SAELens' ``cached_activations_path``.

    Args:
        store: activations of a packed corpus.
        hooks: one name or several; a column is called what its hook is called here.
        out: a folder that does not exist or is empty.
        seed: of the shuffle of sequences; ``None`` keeps the corpus' order, label after label.
        progress: show a bar; ``None`` shows it on a terminal only.

    Returns:
        The number of data set rows, one for each sequence.

    Raises:
        InputError: a padded corpus, a hook that is not stored, a folder that is not empty.
        MissingExtraError: no ``datasets``.
        StoreError: a damaged shard.
    """
    check_kind("store", store, StoredActivations, "a StoredActivations")
    check_path("out", out)
    if seed is not None:
        check_count("seed", seed, at_least=0)
    names = check_texts("hooks", [hooks] if isinstance(hooks, str) else hooks)
    if len(set(names)) != len(names):
        raise InputError(f"hooks are names to export, each once; found {names}.")
    if not store.job.packed:
        raise InputError(
            "SAELens' layout has no mask, so padding would be trained on: harvest a packed corpus (packing='packed', "
            "tail='drop') to export it."
        )
    stored = {name: store.job.hook(name) for name in names}
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: give another one.")
    try:
        import datasets
        from datasets.arrow_writer import ArrowWriter
    except ImportError:
        raise MissingExtraError("Exporting needs Hugging Face datasets: pip install 'pellucid[datasets]'.") from None
    context = store.job.length
    features: Any = datasets.Features(
        {
            **{
                name: datasets.Array2D((context, hook.width), _column_type(hook.dtype)) for name, hook in stored.items()
            },
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context),
        }
    )
    row_bytes = context * sum(hook.width * 4 for hook in stored.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as draft:
        _save_description(features, draft)
        files: list[str] = []
        total, in_file, writer = 0, 0, None
        sequences = len(store) // context
        with progress_bar(total=sequences, desc="exporting", unit=" sequences", show=progress) as bar:
            for numbers in _in_order(store, context, seed):
                if writer is None:
                    files.append(f"data-{len(files):05d}.arrow")
                    writer, in_file = ArrowWriter(features=features, path=str(draft / files[-1])), 0
                writer.write_batch(_columns(store, stored, numbers, context))
                total += len(numbers)
                in_file += len(numbers)
                bar.update(len(numbers))
                if in_file * row_bytes >= FILE_BYTES:
                    writer.finalize()
                    writer = None
        if writer is not None:
            writer.finalize()
        state_file = draft / "state.json"
        state = json.loads(state_file.read_text("utf-8"))
        state["_data_files"] = [{"filename": name} for name in files]
        state_file.write_text(json.dumps(state, indent=2, sort_keys=True), "utf-8")
    return total


def _save_description(features: Any, folder: Path) -> None:
    """What ``save_to_disk`` writes beside the Arrow files."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()
    for stray in folder.glob("*.arrow"):
        stray.unlink()


def _column_type(dtype: str) -> str:
    return {"F16": "float16", "F64": "float64"}.get(dtype, "float32")


def _in_order(store: StoredActivations, context: int, seed: int | None) -> Iterator[Tensor]:
    """Numbers of sequences through the store, a few at a time."""
    counts = [len(store.column(index, "token")) // context for index in range(store.n_shards)]
    begins = np.concatenate([[0], np.cumsum(counts)])
    generator = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(counts)) if generator is None else generator.permutation(len(counts))
    for first in range(0, len(order), SHARDS_MIXED):
        numbers = np.concatenate([np.arange(begins[k], begins[k + 1]) for k in order[first : first + SHARDS_MIXED]])
        if generator is not None:
            numbers = generator.permutation(numbers)
        yield from torch.from_numpy(numbers).split(WRITE_ROWS)


def _columns(store: StoredActivations, stored: Any, numbers: Tensor, context: int) -> dict[str, Any]:
    rows = (numbers[:, None] * context + torch.arange(context)).flatten()
    batch = store.rows(rows, list(stored))
    columns: dict[str, Any] = {"token_ids": batch.token.view(-1, context).numpy()}
    for name, hook in stored.items():
        values = batch.activations[hook.name]
        values = values.float() if DTYPES[hook.dtype] is torch.bfloat16 else values
        columns[name] = values.view(-1, context, hook.width).numpy()
    return columns
