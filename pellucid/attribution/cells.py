"""From an activation's numbers to the cells of a result: products are summed over what a cell reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pellucid.axes import HEADS
from pellucid.errors import InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import WORD_OF_AXIS, Cells, Prompts, check_by, default_by, find_cells, find_site
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.tables import BriefFields

ON_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Points that a layer's own attention and MLP do not stand between and the metric."""


@dataclass(frozen=True, eq=False, repr=False)
class SiteCells(BriefFields):
    """The cells of one site, and how an activation's numbers fall into them.

    Attributes:
        cells: where they lie.
    """

    cells: Cells

    @property
    def name(self) -> str:
        """The site, as it was asked for."""
        return self.cells.site.name

    @property
    def specs(self) -> Mapping[int | None, HookSpec]:
        """Its hook points by layer."""
        return self.cells.site.specs

    @property
    def hooks(self) -> list[str]:
        """Their names."""
        return [spec.name for spec in self.specs.values()]

    @property
    def is_on_the_stream(self) -> bool:
        """Whether something of it reaches the metric past its own layer's attention and MLP."""
        return None in self.specs or self.cells.site.first.name.rpartition(".")[2] in ON_THE_STREAM

    def summed(self, products: Mapping[int | None, Float[Tensor, "row ..."]]) -> Float[Tensor, " row *by"]:
        """``[row, *by]`` of products by layer, each ``[row, *axes of the point]``; a last axis of features may be 1 long."""
        return self.summed_from(products.__getitem__)

    def summed_from(self, product: Callable[[int | None], Float[Tensor, "row ..."]]) -> Float[Tensor, " row *by"]:
        """The same, ``[row, *by]``, of products that are made layer by layer, each where the one before it lay."""
        if "layer" not in self.cells.by:
            (only,) = self.specs
            return self._layer(product(only))
        axis = 1 + self.cells.by.index("layer")
        found: Tensor | None = None
        for place, layer in enumerate(self.specs):
            part = self._layer(product(layer))
            if found is None:
                found = part.new_empty(*part.shape[:axis], len(self.specs), *part.shape[axis:])
            found.select(axis, place).copy_(part)
        assert found is not None
        return found

    def _layer(self, product: Tensor) -> Tensor:
        """``[row, *by]`` without the layer."""
        by, axes = self.cells.by, self.cells.site.first.axes
        words = [word for word in by if word != "layer"]
        found = product
        for axis in range(len(axes) - 1, 0, -1):
            word = WORD_OF_AXIS.get(axes[axis])
            kept_here = word is not None and word in words
            found = self._kept(found, axis, str(word)) if kept_here else self._chosen(found, axis).sum(axis)
        kept = [WORD_OF_AXIS[axis] for axis in axes[1:] if WORD_OF_AXIS.get(axis) in words]
        return found.permute(0, *(1 + kept.index(word) for word in words))

    def _kept(self, tensor: Tensor, axis: int, word: str) -> Tensor:
        """The places of an axis of the result, on which consecutive neurons of a cell are summed."""
        places = self.cells.places[word]
        if word == "neuron":
            size = len(next(iter(self.cells.groups[places[0]].values())))
            if size == 1:  # the usual, and 1,536 parts of one neuron each would take as long as a run
                return tensor
            return torch.stack([part.sum(axis) for part in tensor.split(size, axis)], axis)
        return _select(tensor, axis, places)

    def _chosen(self, tensor: Tensor, axis: int) -> Tensor:
        """Of an axis that is summed, what an edit reaches."""
        word, cells = self.cells.site.first.axes[axis], self.cells
        if word == "pos" and cells.columns is not None:
            return _select(tensor, axis, cells.columns)
        if word in HEADS and cells.heads is not None:
            return _select(tensor, axis, cells.heads)
        return tensor

    def spread(self, chosen: Bool[Tensor, "*by"], sizes: Mapping[str, int]) -> dict[str, Bool[Tensor, "1 ..."]]:
        """By hook, which of its numbers ``[1, *axes]`` (bool) belong to the cells of ``chosen`` ``[*by]`` (bool)."""
        by, axes = self.cells.by, self.cells.site.first.axes
        words = [word for word in by if word != "layer"]
        order = [WORD_OF_AXIS[axis] for axis in axes[1:] if WORD_OF_AXIS.get(axis) in words]
        found = {}
        for place, (layer, spec) in enumerate(self.specs.items()):
            part = chosen.select(by.index("layer"), place) if layer is not None else chosen
            part = part.permute(*(words.index(word) for word in order)) if order else part
            shape = [1] + [
                part.shape[order.index(WORD_OF_AXIS[axis])] if WORD_OF_AXIS.get(axis) in words else 1
                for axis in axes[1:]
            ]
            part = part.reshape(shape)
            for axis in range(1, len(axes)):
                part = self._widened(part, axis, sizes[axes[axis]])
            found[spec.name] = part
        return found

    def _widened(self, part: Tensor, axis: int, size: int) -> Tensor:
        """The inverse of what :meth:`summed` does to an axis."""
        word, cells = self.cells.site.first.axes[axis], self.cells
        own = WORD_OF_AXIS.get(word)
        if own in cells.by and own is not None:
            places = cells.places[own]
            if own == "neuron":
                each = len(next(iter(cells.groups[places[0]].values())))
                return part.repeat_interleave(each, axis).narrow(axis, 0, size)
            return _placed(part, axis, places, size)
        whole = part.expand(*part.shape[:axis], size, *part.shape[axis + 1 :])
        limited = cells.columns if word == "pos" else cells.heads if word in HEADS else None
        return whole if limited is None else _placed(_select(whole, axis, limited), axis, limited, size)


def find_site_cells(
    bridge: TransformerBridge, prompts: Prompts, site: str, by: str | Sequence[str] | None, options: SweepOptions
) -> SiteCells:
    """The cells of a site that an attribution can be given for.

    Args:
        bridge: the model.
        prompts: the base run's.
        site: where.
        by: axes of the result; by default layer and head, or layer and position.
        options: layers, positions, heads and neurons of them.

    Raises:
        HookNameError: no such site.
        InputError: axes or indices that the site does not have; no ``layer`` among the axes; a site without gradients.
    """
    found = find_site(bridge, site, options.layers)
    words = check_by(found, default_by(found, ("head", "pos")) if by is None else by)
    if "group" in words:
        raise InputError(
            "by='group' names neurons of several layers that are patched together, and what flows back to one layer counts "
            "what goes through the next: take by=('layer', 'neuron')."
        )
    if None not in found.specs and "layer" not in words:
        raise InputError(
            f"by={list(words)!r} leaves layer out: the effects of one layer's {found.name} go through the next layer's, and "
            f"their sum would count them again. Take by={['layer', *words]!r}."
        )
    if found.first.kind == "int":
        raise InputError(f"{found.first.name} holds token ids, which have no gradient: take embed.")
    return SiteCells(find_cells(bridge, prompts, found, words, options))


def _select(tensor: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    if list(places) == list(range(tensor.shape[axis])):
        return tensor
    return tensor.index_select(axis, torch.tensor(list(places), device=tensor.device))


def _placed(part: Tensor, axis: int, places: Sequence[int], size: int) -> Tensor:
    """``part``'s places of an axis among ``size``, false elsewhere."""
    made = torch.zeros(*part.shape[:axis], size, *part.shape[axis + 1 :], dtype=part.dtype, device=part.device)
    return made.index_copy(axis, torch.tensor(list(places), device=part.device), part)
