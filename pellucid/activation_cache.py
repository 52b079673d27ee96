"""What a run kept: activations by hook name, each tensor once, with the tokens it was run on.

A cache knows names and shapes, not weights: what needs them (:mod:`pellucid.decomposition`) it asks its bridge. Its tensors
never change after they were kept: they were copied where something else could have written to them.
"""

from __future__ import annotations

import os
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from pellucid.arguments import check_kind, check_mapping, check_path
from pellucid.config import TransformerBridgeConfig
from pellucid.decomposition.methods import DecompositionMethods
from pellucid.decomposition.stream import CachedRun
from pellucid.dtypes import cast, check_dtype
from pellucid.errors import CacheKeyError, InputError, StoreError, warn
from pellucid.names import HookIndex, get_act_name, nearest
from pellucid.padding import real_positions
from pellucid.slices import Slice, SliceInput
from pellucid.storage.json_text import Json, to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors
from pellucid.tables import NamesView, Table, merge_layers
from pellucid.version import __version__

GRADIENT = "_grad"
"""Suffix of the entries that hold gradients."""


def check_storage(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Refuse what tensors cannot be kept on, or as.

    Raises:
        InputError: no device, or no floating-point dtype.
    """
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device={device!r} is none that torch knows: {str(error).splitlines()[0]}") from None
    check_dtype(dtype)


_KIND, _RUN = "activation cache", "run."
"""What a saved cache says it is, and the names in it of what was run."""


class HasHookPoints(Protocol):
    """A bridge, as a cache sees it."""

    @property
    def hook_index(self) -> HookIndex:
        """Every hook point of the model."""

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The model's sizes."""


class _Shown:
    """A view of a cache, shown as the table of its entries."""

    _mapping: ActivationCache

    def __repr__(self) -> str:
        return repr(self._mapping)

    def _repr_html_(self) -> str:
        return self._mapping._repr_html_()


class CacheItems(_Shown, ItemsView[str, Tensor]):
    """``cache.items()``."""


class CacheValues(_Shown, ValuesView[Tensor]):
    """``cache.values()``."""


class ActivationCache(DecompositionMethods, Mapping[str, Tensor]):
    """Activations of one run.

    ``cache["blocks.0.attn.hook_pattern"]``, any other name of that point, ``cache["pattern", 0]``,
    ``cache["scale", 0, "ln1"]`` and ``cache["pattern", -1]`` (the last layer) all work; with ``incl_bwd`` the gradient of
    an entry is under its name with ``_grad`` appended.

    Args:
        cache_dict: tensors by canonical name; with a bridge, by any of a point's names.
        model: the bridge, or the index of its hook points: what needs weights is then refused.
        has_batch_dim: whether tensors have their batch axis.
        tokens: ``[batch, pos]`` ids that were run, ``None`` if a residual was.
        attention_mask: ``[batch, pos]`` mask of the run, ``None`` if nothing was padding.

    Attributes:
        model: the bridge, or ``None``. A cache keeps its model in memory; a pickled one leaves it behind.

    Raises:
        InputError: no mapping, no bridge, ``tokens`` no tensor.
    """

    def __init__(
        self,
        cache_dict: Mapping[str, Shaped[Tensor, "..."]],
        model: HookIndex | HasHookPoints,
        has_batch_dim: bool = True,
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> None:
        check_kind("has_batch_dim", has_batch_dim, bool, "True or False")
        check_mapping("cache_dict", cache_dict, "hook names to tensors")
        for name, given in (("tokens", tokens), ("attention_mask", attention_mask)):
            if given is not None:
                check_kind(name, given, Tensor, "a tensor [batch, pos]")
        if not isinstance(model, HookIndex) and not hasattr(model, "hook_index"):
            raise InputError(f"model is a bridge, or its hook_index; found {type(model).__name__}.")
        self.model: Any = None
        self.cache_dict: dict[str, Tensor] = dict(cache_dict)
        if isinstance(model, HookIndex):
            self.index = model
        else:  # a dictionary of the user's own, whose names may be any of a point's
            self.model, self.index = model, model.hook_index
            known = self.index.canonical_names()  # as all names of a run are
            self.cache_dict = {
                name if name in known else self._canonical(name): tensor for name, tensor in cache_dict.items()
            }
        self.has_batch_dim = has_batch_dim
        self.tokens = tokens
        self.attention_mask = attention_mask

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"model": None}

    def _run(self) -> CachedRun:
        return self

    def _keep(self, entries: dict[str, Tensor]) -> None:
        self.cache_dict.update(entries)

    # -- looking up ----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Shaped[Tensor, "..."]:
        name = self._canonical(key)
        found = self.cache_dict.get(name)
        if found is None:
            raise CacheKeyError(self._missing(name))
        return found

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str | tuple):
            return False
        try:
            return self._canonical(key) in self.cache_dict
        except CacheKeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def keys(self) -> NamesView:
        """The canonical names of what was kept; a notebook shows them as a table."""
        return NamesView(self)

    def items(self) -> CacheItems:
        """Name and tensor of each entry; a notebook shows names and shapes."""
        return CacheItems(self)

    def values(self) -> CacheValues:
        """The tensors; a notebook shows names and shapes."""
        return CacheValues(self)

    def _table(self) -> Table:
        rows = [
            (name, " × ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.cache_dict.items()
        ]
        heading = f"ActivationCache with {len(self)} entries, {self.nbytes:,} bytes"
        return Table(heading, ("name", "layers", "shape", "dtype"), merge_layers(rows))

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _canonical(self, key: str | tuple[Any, ...]) -> str:
        if isinstance(key, tuple):
            if len(key) not in (2, 3) or not isinstance(key[0], str):
                raise CacheKeyError(f"A key is a name, (name, layer) or (name, layer, section); found {key!r}.")
            name, layer, *rest = key
            if isinstance(layer, int):
                if not -self.index.n_layers <= layer < self.index.n_layers:
                    raise CacheKeyError(
                        f"The model has layers 0 to {self.index.n_layers - 1}; {key!r} asks for {layer}."
                    )
                layer %= self.index.n_layers
            key = get_act_name(name, layer, rest[0] if rest else None)
        elif not isinstance(key, str):
            raise CacheKeyError(f"A key is a name, (name, layer) or (name, layer, section); found {key!r}.")
        elif key not in self.index and key not in self.cache_dict:
            key = get_act_name(key)
        stem = key.removesuffix(GRADIENT)
        if stem in self.index:
            return self.index[stem].name + key[len(stem) :]
        return key

    def _missing(self, name: str) -> str:
        stem = name.removesuffix(GRADIENT)
        if stem not in self.index:
            return (
                f"No hook point is called {stem!r}. Nearest names: {', '.join(nearest(stem, self.index.all_names()))}."
            )
        if stem != name:
            return f"The gradient of {stem} was not kept: run with incl_bwd=True and a filter that includes it."
        spec = self.index[stem]
        why = f" It is opt-in: switch {spec.flag} on first." if spec.flag is not None else ""
        return (
            f"{stem} exists but was not kept by this run: names_filter or stop_at_layer left it out.{why} "
            f"Kept: {', '.join(list(self.cache_dict)[:8])}{', ...' if len(self) > 8 else ''}."
        )

    # -- whole-cache operations ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(tensor.nbytes for tensor in self.cache_dict.values())

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """``[batch, pos]`` bool: which positions hold real tokens.

        Raises:
            InputError: the run was given a residual and no mask, so nothing says how long it was.
        """
        known = self.tokens if self.attention_mask is None else self.attention_mask
        if known is None:
            raise InputError("This run was given a residual and no mask.")
        batch, length = known.shape
        return real_positions(self.attention_mask, batch, length, known.device)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ActivationCache:
        """Move the tensors, in place; ``dtype`` is applied to floating-point ones.

        Returns:
            The cache itself.

        Raises:
            InputError: no device; a value that ``dtype`` cannot hold, with its hook point; a dtype that is not floating
                point. The cache is as it was then.
        """
        check_storage(device, dtype)
        self.cache_dict.update({name: cast(tensor, dtype, name, device) for name, tensor in self.cache_dict.items()})
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Take the batch axis off the tensors of a single row, in place.

        Returns:
            The cache itself.

        Raises:
            InputError: there are several rows.
        """
        if not self.has_batch_dim:
            return self
        rows = self._rows()
        if rows > 1:
            raise InputError(f"remove_batch_dim needs a batch of one row; this run had {rows}.")
        self.cache_dict.update({name: tensor[0] for name, tensor in self.cache_dict.items()})
        self.has_batch_dim = False
        return self

    def _rows(self) -> int:
        return max((tensor.shape[0] for tensor in self.cache_dict.values()), default=1)

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> ActivationCache:
        """Another cache, of some of the rows; one row given as an integer drops the batch axis.

        Args:
            batch_slice: an integer, ``(start, stop[, step])``, a list, array or mask of rows, or a ``Slice``.

        Raises:
            InputError: the cache has no batch axis, or not these rows.
        """
        if not self.has_batch_dim:
            raise InputError("This cache has no batch axis to take rows of.")
        rows = Slice.of(batch_slice)
        keep_axis = Slice([rows.slice]) if isinstance(rows.slice, int) else rows
        taken = {name: rows.apply(tensor) for name, tensor in self.cache_dict.items()}
        given = [None if ids is None else keep_axis.apply(ids) for ids in (self.tokens, self.attention_mask)]
        made = ActivationCache(taken, self.index, rows.mode != "int", *given)
        made.model = self.model
        return made

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn gradients on or off for the whole process's thread, as ``torch.set_grad_enabled(mode)`` does, with a warning.

        Args:
            mode: on or off.
        """
        check_kind("mode", mode, bool, "True or False")
        warn(
            f"toggle_autodiff: gradients are {'on' if mode else 'off'} from here on, for everything that torch computes."
        )
        torch.set_grad_enabled(mode)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, each tensor under its hook's name; :meth:`load` reads it back, to the bit.

        Args:
            path: the file; one of that name is replaced.

        Raises:
            InputError: a tensor of a type that is not written.
            StorageFullError: no space is left.
        """
        run = {"tokens": self.tokens, "attention_mask": self.attention_mask}
        more = {f"{_RUN}{name}": tensor.long() for name, tensor in run.items() if tensor is not None}
        about: dict[str, Json] = {
            "kind": _KIND,
            "version": __version__,
            "has_batch_dim": self.has_batch_dim,
            "names": list(self.cache_dict),
            "mask_dtype": None
            if self.attention_mask is None
            else str(self.attention_mask.dtype).removeprefix("torch."),
        }
        write_safetensors(check_path("path", path), self.cache_dict | more, to_line(about))

    @classmethod
    def load(cls, path: str | os.PathLike[str], bridge: HookIndex | HasHookPoints) -> ActivationCache:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            bridge: the model it was run on, or the index of its hook points.

        Raises:
            StoreError: no file of that kind, or one that is damaged.
            InputError: activations of another model: names or sizes that this one has not.
        """
        file = check_path("path", path)
        tensors, about = read_safetensors(file)
        if (
            not isinstance(about, Mapping)
            or about.get("kind") != _KIND
            or sorted(tensors) != sorted([*about["names"], *(name for name in tensors if name.startswith(_RUN))])
        ):
            raise StoreError(f"{file.name} is no cache that was saved: cache.save(path) writes one.")
        tokens, mask = (tensors.get(f"{_RUN}{name}") for name in ("tokens", "attention_mask"))
        if mask is not None and about["mask_dtype"] == "bool":
            mask = mask.bool()
        made = cls({name: tensors[name] for name in about["names"]}, bridge, about["has_batch_dim"], tokens, mask)
        made._refuse_other_model(file.name)
        return made

    def _refuse_other_model(self, file: str) -> None:
        """Refuse entries that this model's points do not have.

        Raises:
            InputError: a name, or a size, that it has not.
        """
        for name, tensor in self.cache_dict.items():
            stem = name.removesuffix(GRADIENT)
            if stem not in self.index:
                raise InputError(f"{file} is of another model: this one has no {stem}.")
            if self.model is None:
                continue
            axes = self.index[stem].axes[0 if self.has_batch_dim else 1 :]
            sizes = self.index[stem].sizes(self.model.cfg.sizes())
            for axis, size in zip(axes, tensor.shape, strict=True):
                if axis not in ("batch", "pos", "key_pos") and sizes[axis] != size:
                    raise InputError(
                        f"{file} is of another model: {name} has {axis} {size}, and this model's is {sizes[axis]}."
                    )
