"""What a run kept: activations by hook name, each tensor once, with the tokens it was run on.

A cache knows names and shapes, not weights. Its tensors never change after they were kept: they were copied where
something else could have written to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pellucid.arguments import check_kind, check_mapping
from pellucid.dtypes import cast, check_dtype
from pellucid.errors import CacheKeyError, InputError
from pellucid.names import HookIndex, get_act_name, nearest
from pellucid.padding import real_positions
from pellucid.tables import NamesView, Table, merge_layers

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


class HasHookPoints(Protocol):
    """A bridge, as a cache sees it."""

    @property
    def hook_index(self) -> HookIndex:
        """Every hook point of the model."""


class ActivationCache(Mapping[str, Tensor]):
    """Activations of one run.

    ``cache["blocks.0.attn.hook_pattern"]``, any other name of that point, ``cache["pattern", 0]``,
    ``cache["scale", 0, "ln1"]`` and ``cache["pattern", -1]`` (the last layer) all work; with ``incl_bwd`` the gradient of
    an entry is under its name with ``_grad`` appended.

    Args:
        activations: tensors by canonical name; with a bridge, by any of a point's names.
        index: every hook point of the model, or a bridge, which has them.
        tokens: ``[batch, pos]`` ids that were run, ``None`` if a residual was.
        attention_mask: ``[batch, pos]`` mask of the run, ``None`` if nothing was padding.
        has_batch_dim: whether tensors have their batch axis.

    Raises:
        InputError: ``tokens`` is no tensor.
    """

    def __init__(
        self,
        activations: Mapping[str, Tensor],
        index: HookIndex | HasHookPoints,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        has_batch_dim: bool = True,
    ) -> None:
        if tokens is not None and not isinstance(tokens, Tensor):
            raise InputError(
                f"tokens is a tensor of ids; found {tokens!r}. TransformerLens' third argument is has_batch_dim=."
            )
        check_mapping("activations", activations, "hook names to tensors")
        if attention_mask is not None:
            check_kind("attention_mask", attention_mask, Tensor, "a tensor [batch, pos]")
        if not isinstance(index, HookIndex) and not hasattr(index, "hook_index"):
            raise InputError(f"index is a bridge, or its hook_index; found {type(index).__name__}.")
        self.cache_dict: dict[str, Tensor] = dict(activations)
        if isinstance(index, HookIndex):
            self.index = index
        else:  # a dictionary of the user's own, whose names may be any of a point's
            self.index = index.hook_index
            self.cache_dict = {self._canonical(name): tensor for name, tensor in activations.items()}
        self.tokens = tokens
        self.attention_mask = attention_mask
        self.has_batch_dim = has_batch_dim

    # -- looking up ----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
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
    def real(self) -> Tensor:
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
        """A cache with its tensors moved; ``dtype`` is applied to floating-point ones.

        Raises:
            InputError: no device; a value that ``dtype`` cannot hold, with its hook point; a dtype that is not floating
                point.
        """
        check_storage(device, dtype)
        moved = {name: cast(tensor, dtype, name, device) for name, tensor in self.cache_dict.items()}
        return self._like(moved, self.has_batch_dim)

    def remove_batch_dim(self) -> ActivationCache:
        """A cache of a single row, without its batch axis.

        Raises:
            InputError: there are several rows.
        """
        if not self.has_batch_dim:
            return self
        rows = {tensor.shape[0] for tensor in self.cache_dict.values()}
        if rows - {1}:
            raise InputError(f"remove_batch_dim needs a batch of one row; this run had {max(rows)}.")
        return self._like({name: tensor[0] for name, tensor in self.cache_dict.items()}, False)

    def _like(self, activations: dict[str, Tensor], has_batch_dim: bool) -> ActivationCache:
        return ActivationCache(activations, self.index, self.tokens, self.attention_mask, has_batch_dim)
