"""What all running statistics have in common, and how they are saved."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_kind, check_mapping, check_path
from pellucid.errors import InputError, StoreError
from pellucid.storage.json_text import to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch come from.

    Attributes:
        documents: ``[batch, pos]`` int64, number of each token's document; -1 at padding.
        positions: ``[batch, pos]`` int64, its position there; -1 at padding.
    """

    documents: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]


class Workspace:
    """Memory for intermediate results that statistics updated one after another may share.

    Fresh memory for each update costs more than what is computed in it: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, "..."]:
        """An uninitialised tensor, valid until the next call with this dtype and device."""
        size = 1
        for length in shape:
            size *= length
        held = self._held.get((dtype, device))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=device)
            self._held[dtype, device] = held
        return held[:size].view(*shape)


class Statistic(ABC):
    """Something known of a tensor ``[batch, pos, *features]`` over all real tokens seen so far.

    Attributes:
        n: real tokens seen.
        features: sizes of the feature axes, ``None`` before the first update.
        device: where the state is: with the values.
        workspace: shared with other statistics by whoever updates several in turn.
    """

    kind: ClassVar[str]
    """The word under which it is saved."""

    def __init__(self) -> None:
        self.n = 0
        self.features: tuple[int, ...] | None = None
        self.device = torch.device("cpu")
        self.workspace = Workspace()

    # -- to be had by each ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """A word that tells it from others with other settings."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with (JSON)."""

    @abstractmethod
    def result(self) -> Any:
        """What is known; see each class."""

    @abstractmethod
    def _begin(self, device: torch.device) -> None:
        """Make the empty state for ``features``."""

    @abstractmethod
    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        """Take in ``values`` ``[token, feature]``; ``mask`` ``[token]`` is ``None`` where all are real."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Take in another that has seen something, of equal settings and features."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The state."""

    @abstractmethod
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state."""

    # -- what each does ------------------------------------------------------------------------------------------------

    def fresh(self) -> Self:
        """An empty one with the same settings."""
        return type(self)(**self.settings())

    def update(
        self,
        values: Shaped[Tensor, "batch pos *features"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        places: Places | None = None,
    ) -> None:
        """Take in a batch. Batches come in the order of the corpus.

        Args:
            values: ``[batch, pos, *features]``.
            mask: ``[batch, pos]`` bool, ``False`` at padding; ``None`` if every token is real.
            places: where the tokens come from, for statistics that remember it.

        Raises:
            InputError: shapes that do not fit one another or what was seen before; places that are needed and missing.
        """
        check_kind("values", values, Tensor, "a tensor [batch, pos, *features]")
        if mask is not None and check_kind("mask", mask, Tensor, "a tensor [batch, pos] bool").dtype != torch.bool:
            raise InputError(f"mask is a tensor [batch, pos] bool; found {mask.dtype}.")
        if places is not None:
            check_kind("places", places, Places, "Places: the document and position of each token")
        features = tuple(values.shape[2:])
        if values.dim() < 3 or (mask is not None and mask.shape != values.shape[:2]):
            found = f"{tuple(values.shape)}" + ("" if mask is None else f" with a mask {tuple(mask.shape)}")
            raise InputError(
                f"{self.name} takes values [batch, pos, *features] and a mask [batch, pos]; found {found}."
            )
        if self.features is None:
            self.features = features
            self._begin(values.device)
        elif features != self.features:
            raise InputError(f"{self.name} has seen features of shape {self.features}; found {features}.")
        elif self.device != values.device:
            self.to(values.device)  # one that was loaded
        self.device = values.device
        flat = values.detach().reshape(values.shape[0] * values.shape[1], -1)
        keep = None if mask is None else mask.reshape(-1).to(values.device)
        self._add(flat, keep, places)
        self.n += flat.shape[0] if keep is None else int(keep.sum())

    def merge(self, other: Statistic) -> Self:
        """Take in what ``other`` has seen, which comes after what this one has.

        Raises:
            InputError: another kind, other settings or other features.
        """
        check_kind("other", other, Statistic, "a statistic")
        if type(other) is not type(self) or other.settings() != self.settings():
            raise InputError(
                f"{self.name} with {self.settings()} merges with its like; found {other.name} with {other.settings()}."
            )
        if other.features is None:
            return self
        if self.features is None:
            self.features, self.device = other.features, other.device
            self._begin(other.device)
        elif other.features != self.features:
            raise InputError(f"{self.name} of features {self.features} cannot merge with features {other.features}.")
        self._merge(other)
        self.n += other.n
        return self

    def state_dict(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The state as tensors, for :meth:`load_state_dict` of one with the same settings; empty before any update."""
        if self.features is None:
            return {}
        return {
            "n": torch.tensor(self.n),
            "features": torch.tensor(self.features, dtype=torch.int64),
            **self._tensors(),
        }

    def load_state_dict(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Take over a state."""
        if not tensors:
            return
        self.n = int(tensors["n"])
        self.device = next(
            (tensor.device for name, tensor in tensors.items() if name not in ("n", "features")), self.device
        )
        self.features = tuple(tensors["features"].tolist())
        self._restore({name: tensor for name, tensor in tensors.items() if name not in ("n", "features")})

    def to(self, device: torch.device) -> Self:
        """Move the state."""
        if self.features is not None:
            self.load_state_dict({name: tensor.to(device) for name, tensor in self.state_dict().items()})
        self.device = device
        return self

    @property
    def trailing(self) -> dict[str, list[float] | range]:
        """Axes that ``result()`` has after the features, with what stands along them."""
        return {}

    def _shaped(self, tensor: Tensor) -> Tensor:
        """``[feature, ...]`` with its feature axes apart.

        Raises:
            InputError: nothing has been seen.
        """
        return tensor.reshape(*self._seen(), *tensor.shape[1:])

    def _seen(self) -> tuple[int, ...]:
        if self.features is None:
            raise InputError(f"{self.name} has seen no token yet.")
        return self.features

    @property
    def _width(self) -> int:
        size = 1
        for length in self._seen():
            size *= length
        return size

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({arguments}): {self.n} tokens"


def real_tokens(
    values: Shaped[Tensor, "token feature"], mask: Bool[Tensor, " token"] | None
) -> Shaped[Tensor, "_ feature"]:
    """``[token, feature]`` without padding; a copy only if there is some."""
    return values if mask is None else values[mask]


# -- saving ------------------------------------------------------------------------------------------------------------


def _kinds() -> dict[str, type[Statistic]]:
    """Every class that has a word of its own, by it: what a file may name."""
    return {kind.kind: kind for kind in _below(Statistic) if "kind" in vars(kind)}  # type: ignore[type-abstract]


def _below(kind: type[Statistic]) -> list[type[Statistic]]:
    return [each for below in kind.__subclasses__() for each in (below, *_below(below))]


def _checksum(held: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over JSON and tensors, as they are read back: a flipped bit of a count is as legal as the count."""
    digest = hashlib.sha256(to_line(held, ascii_only=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_statistics(path: Path, statistics: Mapping[str, Statistic], extra: Mapping[str, Any]) -> None:
    """Write statistics by name, and ``extra`` (JSON), into one safetensors file: equal states, equal bytes.

    A file is whole or as it was before, and has a checksum over all that is read back.


    Raises:
        InputError: no such names or statistics; one whose class has no word of its own, by which it would be found again.
        StorageFullError: no space is left.
    """
    path = check_path("path", path)
    kinds = _kinds()
    for key, statistic in check_mapping("statistics", statistics, "names to statistics").items():
        check_kind(f"statistics[{key!r}]", statistic, Statistic, "a statistic")
        if kinds.get(statistic.kind) is not type(statistic):
            raise InputError(
                f"statistics[{key!r}] is a {type(statistic).__name__} of the kind {statistic.kind!r}, another class': it "
                "would be read back as that. Give the class a `kind` of its own."
            )
    check_mapping("extra", extra, "names to what JSON can hold")
    tensors, described = {}, {}
    for key, statistic in statistics.items():
        described[key] = {"kind": statistic.kind, "settings": statistic.settings()}
        for name, tensor in statistic.state_dict().items():
            tensors[f"{key}|{name}"] = tensor.detach().cpu().contiguous()
    held = json.loads(json.dumps({"statistics": described, "extra": extra}))  # as it is read back
    about = to_line({**held, "sha256": _checksum(held, tensors)}, ascii_only=True)
    write_safetensors(path, tensors, about)


def load_statistics(path: Path) -> tuple[dict[str, Statistic], dict[str, Any]]:
    """What :func:`save_statistics` wrote: statistics by name, and the rest.

    Raises:
        InputError: not such a file, or a damaged one.
    """
    path = check_path("path", path)
    try:
        tensors, described = read_safetensors(path)
        held = {"statistics": described["statistics"], "extra": described["extra"]}
        found = described.get("sha256")
    except (StoreError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no statistics, or is damaged: {error}") from None
    if found is None:
        raise InputError(
            f"{path} has no checksum: it was written by an older version of Pellucid, or is damaged. Collect again."
        )
    if found != _checksum(held, tensors):
        raise InputError(f"{path} is damaged: it does not have the checksum that it was written with. Collect again.")
    kinds = _kinds()
    statistics: dict[str, Statistic] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition("|")
        states.setdefault(owner, {})[name] = tensor
    for key, entry in described["statistics"].items():
        if entry["kind"] not in kinds:
            raise InputError(f"{path} holds a statistic of the unknown kind {entry['kind']!r}.")
        statistic = kinds[entry["kind"]](**entry["settings"])
        statistic.load_state_dict(states.get(key, {}))
        statistics[key] = statistic
    return statistics, described["extra"]
