"""The reader: stored activations without the model and without the corpus.

Shards are mapped, not read: a random row costs its own page, and what was read stays in the page cache, not in the process.
Before a shard's numbers are first given out its checksums are compared, so that what is damaged is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_path, check_text, check_texts, check_wholes
from pellucid.errors import InputError, StoreError
from pellucid.names import nearest
from pellucid.scale.job_folder import JOB_FILE, MANIFEST_FILE, ShardRecord, record_of_json
from pellucid.scale.shard_store import (
    COLUMNS,
    ROWS,
    StoredHook,
    StoreFolder,
    StoreJob,
    job_of_json,
    read_job,
)
from pellucid.storage.json_text import Json, json_errors
from pellucid.storage.safetensors_files import DTYPES, TensorPlace, as_tensor, map_tensor, read_header
from pellucid.tables import BriefFields

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_MAPS = 4096
"""Tensors that are mapped at a time: a process may have some 65,000 mappings on Linux."""


@dataclass(frozen=True, repr=False)
class RowBatch(BriefFields):
    """Rows of a store.

    Attributes:
        activations: ``[row, d]`` by canonical hook name, in the stored dtype.
        row: ``[row]`` int64, their numbers in the store.
        token: ``[row]`` int32, the token id at each.
        document: ``[row]`` int64, the document it is from, counted within its label.
        position: ``[row]`` int32, its position in its sequence.
        sequence: ``[row]`` int64, the sequence it is from, counted within its label.
        label: ``[row]`` int64, an index into ``store.labels``.
    """

    activations: Mapping[str, Tensor]
    row: Tensor
    token: Tensor
    document: Tensor
    position: Tensor
    sequence: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.row)


class StoredActivations:
    """Activations that :func:`~pellucid.scale.harvest.harvest` stored.

    Opening reads the manifest and looks at the length of every file. ``[row]`` numbers count through the shards in order.

    Args:
        path: the folder.
        labels: only shards of these labels.
        check_contents: compare a shard's checksums before its first numbers are given out; ``False`` compares lengths only.

    Attributes:
        path: the folder.
        job: what decided the bytes: hooks, settings, corpus.

    Raises:
        StoreError: no store, an unfinished one, or a missing or cut-off shard, by name.
        InputError: a label that is not stored.
    """

    def __init__(
        self, path: str | os.PathLike[str], labels: Sequence[str] | None = None, check_contents: bool = True
    ) -> None:
        self.path = check_path("path", path)
        self.job, records = _read_manifest(self.path)
        wanted = list(self.job.labels) if labels is None else check_texts("labels", labels)
        for label in wanted:
            if label not in self.job.labels:
                raise InputError(
                    f"The store has no label {label!r}. It has {', '.join(self.job.labels)}; nearest: "
                    f"{', '.join(nearest(label, self.job.labels, 1))}."
                )
        self._folder = StoreFolder(self.path, self.job)
        self._shards = [shard for shard in self.job.shards if shard.label in wanted]
        self._records = [records[shard.index] for shard in self._shards]
        self._unchecked = set(range(len(self._shards))) if check_contents else set()
        self._maps: dict[tuple[int, str], NDArray[np.generic]] = {}
        self._refuse_damage(contents=False)
        self._ends = np.cumsum([record.rows for record in self._records])

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def hooks(self) -> dict[str, StoredHook]:
        """What is stored, by canonical name."""
        return {hook.name: hook for hook in self.job.hooks}

    @property
    def labels(self) -> list[str]:
        """Every label of the corpus, in its order."""
        return list(self.job.labels)

    @property
    def settings(self) -> Mapping[str, Json]:
        """Model, corpus, settings of the run and versions."""
        return self.job.settings

    @property
    def n_shards(self) -> int:
        """How many shards there are (of the labels asked for)."""
        return len(self._shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.bytes for record in self._records for file in record.files.values())

    def __repr__(self) -> str:
        stored = ", ".join(f"{hook.name} [{hook.width}] {hook.dtype}" for hook in self.job.hooks)
        return f"StoredActivations({len(self):,} rows in {self.n_shards} shards: {stored})"

    def verify(self) -> None:
        """Read every byte and compare every checksum.

        Raises:
            StoreError: every damaged shard, by name.
        """
        self._refuse_damage(contents=True)
        self._unchecked.clear()

    def _refuse_damage(self, contents: bool) -> None:
        found = [self._folder.damage(record, contents=contents) for record in self._records]
        damaged = [what for what in found if what is not None]
        if damaged:
            raise StoreError(f"{self.path}: {'; '.join(damaged)}. {_REMEDY}")

    # -- shards --------------------------------------------------------------------------------------------------------

    def shard(self, index: int, hook: str) -> Tensor:
        """One hook's rows of one shard, mapped: ``[rows, d]``. Writing to it never reaches the file.

        Args:
            index: 0 to ``n_shards - 1``, counted among the labels asked for.
            hook: any name of a stored hook.

        Raises:
            InputError: no such shard or hook.
            StoreError: the shard is damaged.
        """
        found = self.job.hook(check_text("hook", hook))
        return as_tensor(self._array(index, found.name, found.name), found.dtype)

    def column(self, index: int, name: str) -> Tensor:
        """What is kept beside the activations of one shard: ``[rows]``.

        Args:
            index: of the shard.
            name: ``token``, ``document``, ``position`` or ``sequence``.

        Raises:
            InputError: no such shard or column.
            StoreError: the shard is damaged.
        """
        check_choice("name", name, tuple(COLUMNS))
        return torch.from_numpy(np.asarray(self._array(index, ROWS, name)))

    def label_of(self, index: int) -> str:
        """The label that all sequences of a shard have."""
        self._refuse_shard(index)
        return self._shards[index].label

    def sequences_of(self, index: int) -> tuple[int, int]:
        """First and last-but-one of the sequences in a shard, counted within its label."""
        self._refuse_shard(index)
        return self._shards[index].first, self._shards[index].stop

    def _refuse_shard(self, index: int) -> None:
        check_count("index", index, 0, self.n_shards - 1)

    def _array(self, index: int, file: str, name: str) -> NDArray[np.generic]:
        self._refuse_shard(index)
        if index in self._unchecked:
            damage = self._folder.damage(self._records[index])
            if damage is not None:
                raise StoreError(f"{self.path}: {damage}. {_REMEDY}")
            self._unchecked.discard(index)
        found = self._maps.get((index, name))
        if found is None:
            path = self._folder.file(self._shards[index].index, file)
            places, about = read_header(path)
            self._refuse_header(index, path, name, places, about)
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()  # tensors that were given out keep theirs
            found = self._maps[index, name] = map_tensor(path, places[name])
        return found

    def _refuse_header(
        self, index: int, path: Path, name: str, places: Mapping[str, TensorPlace], about: Mapping[str, Json]
    ) -> None:
        """A file that has its checksum can still be one that was put here from another folder."""
        rows, place = self._records[index].rows, places.get(name)
        if name in COLUMNS:
            expected: tuple[torch.dtype, tuple[int, ...]] = COLUMNS[name], (rows,)
        else:
            hook = self.hooks[name]
            expected = DTYPES[hook.dtype], (rows, hook.width)
        is_it = place is not None and (DTYPES[place.dtype], place.shape) == expected
        if not is_it or about.get("job") != self.job.sha256 or about.get("shard") != self._shards[index].index:
            raise StoreError(f"{path} is not shard {self._shards[index].index} of this store. {_REMEDY}")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, numbers: Sequence[int] | Tensor, hooks: Sequence[str] | None = None) -> RowBatch:
        """Any rows, in the order asked for; each is read from its own place in its file.

        Args:
            numbers: of rows, 0 to ``len(self) - 1``.
            hooks: which hooks, by default all.

        Raises:
            InputError: no such row or hook.
            StoreError: a shard they are in is damaged.
        """
        if not isinstance(numbers, Tensor | np.ndarray):
            numbers = check_wholes("numbers", numbers, empty=True)
        wanted = torch.as_tensor(numbers) if len(numbers) else torch.empty(0, dtype=torch.int64)
        if wanted.dim() != 1 or wanted.is_floating_point() or wanted.dtype == torch.bool:
            raise InputError(f"numbers is a list of whole numbers; found {wanted.dtype} of {wanted.dim()} axes.")
        places = wanted.long().numpy()
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise InputError(
                f"numbers of rows are 0 to {len(self) - 1:,}; found {int(places.min())} to {int(places.max())}."
            )
        return self._gather(places, self._chosen(hooks))

    def _chosen(self, hooks: Sequence[str] | None) -> list[StoredHook]:
        if hooks is None:
            return list(self.job.hooks)
        return [self.job.hook(name) for name in check_texts("hooks", hooks)]

    def _gather(self, numbers: NDArray[np.int64], hooks: Sequence[StoredHook]) -> RowBatch:
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        within = numbers - np.concatenate([[0], self._ends[:-1]])[shard_of]
        parts = [(int(index), np.flatnonzero(shard_of == index)) for index in np.unique(shard_of)]
        taken = {hook.name: torch.empty(len(numbers), hook.width, dtype=DTYPES[hook.dtype]) for hook in hooks}
        columns = {name: torch.empty(len(numbers), dtype=dtype) for name, dtype in COLUMNS.items()}
        label = torch.empty(len(numbers), dtype=torch.int64)
        names = self.labels
        for index, places in parts:
            source, target = torch.from_numpy(within[places]), torch.from_numpy(places)
            for hook in hooks:
                mapped = as_tensor(self._array(index, hook.name, hook.name), hook.dtype)
                taken[hook.name][target] = mapped[source]
            for name, column in columns.items():
                column[target] = torch.from_numpy(np.asarray(self._array(index, ROWS, name)))[source]
            label[target] = names.index(self._shards[index].label)
        return RowBatch(taken, torch.from_numpy(numbers.copy()), label=label, **columns)

    def random_rows(self, count: int, seed: int = 0, hooks: Sequence[str] | None = None) -> RowBatch:
        """Rows drawn without replacement; the same seed draws the same ones.

        Raises:
            InputError: more rows than there are.
        """
        check_count("count", count, 0, len(self))
        check_count("seed", seed, at_least=0)
        drawn = np.random.default_rng(seed).choice(len(self), size=count, replace=False)
        return self._gather(drawn.astype(np.int64), self._chosen(hooks))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = 0,
        epoch: int = 0,
        hooks: Sequence[str] | None = None,
        shards_mixed: int = 8,
        drop_last: bool = False,
    ) -> Iterator[RowBatch]:
        """Every row once, shuffled: shards in random order, and rows among those of ``shards_mixed`` shards at a time.

        Files are read in long stretches, as a disk likes it. The same arguments give the same batches.

        Args:
            batch_size: rows in a batch; the last one has the rest.
            seed: of the shuffle; ``None`` gives rows in their order.
            epoch: another one gives another shuffle.
            hooks: which hooks, by default all.
            shards_mixed: more mix better and keep more pages in memory.
            drop_last: leave the rest out.

        Raises:
            InputError: sizes below 1, or no such hook.
            StoreError: a shard is damaged.
        """
        check_count("batch_size", batch_size)
        check_count("shards_mixed", shards_mixed)
        check_count("epoch", epoch, at_least=0)
        if seed is not None:
            check_count("seed", seed, at_least=0)
        elif epoch:
            raise InputError(f"epoch={epoch} would have no effect: with seed=None rows come in their order.")
        return self._batches(batch_size, seed, epoch, self._chosen(hooks), shards_mixed, drop_last)

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        epoch: int,
        hooks: Sequence[StoredHook],
        shards_mixed: int,
        drop_last: bool,
    ) -> Iterator[RowBatch]:
        begins = np.concatenate([[0], self._ends])
        generator = None if seed is None else np.random.default_rng([seed, epoch])
        order = np.arange(self.n_shards) if generator is None else generator.permutation(self.n_shards)
        waiting = np.empty(0, dtype=np.int64)
        for first in range(0, self.n_shards, shards_mixed):
            self._maps.clear()  # pages of shards that are through are no longer this process's
            group = order[first : first + shards_mixed]
            numbers = np.concatenate([waiting, *(np.arange(begins[index], begins[index + 1]) for index in group)])
            if generator is not None:
                numbers = generator.permutation(numbers)
            whole = len(numbers) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield self._gather(numbers[start : start + batch_size], hooks)
            waiting = numbers[whole:]
        if len(waiting) and not drop_last:
            yield self._gather(waiting, hooks)


_REMEDY = "Run the same harvest again: it makes anew what is missing or damaged, and leaves the rest."


def _read_manifest(path: Path) -> tuple[StoreJob, dict[int, ShardRecord]]:
    manifest = path / MANIFEST_FILE
    if not manifest.exists():
        if not (path / JOB_FILE).exists():
            raise StoreError(f"{path} holds no stored activations: it has neither {MANIFEST_FILE} nor {JOB_FILE}.")
        job = read_job(path)
        folder = StoreFolder(path, job)
        missing = [shard.index for shard in job.shards if not folder.record_file(shard.index).exists()]
        raise StoreError(
            f"{path} is not finished: {len(missing)} of {len(job.shards)} shards are not there"
            + (f" (the first is shard {missing[0]})" if missing else "")
            + ". Run the same harvest again: it goes on where it was."
        )
    with json_errors(manifest):
        document = json.loads(manifest.read_text("utf-8"))
        job = job_of_json(document)
        folder = StoreFolder(path, job)
        found = [record_of_json(entry, folder.n_shards, folder.names) for entry in document["shards"]]
        records = {record.shard: record for record in found}
        if set(records) != set(range(len(job.shards))):
            raise StoreError(f"{manifest} lists other shards than the job has. {_REMEDY}")
        if sum(record.rows for record in records.values()) != document["rows"]:
            raise StoreError(f"{manifest} is damaged: its rows do not add up. {_REMEDY}")
    return job, records
