"""Patch setters: which part of a corrupted activation is replaced by the clean one, for an index such as (layer, pos).

A setter is called as ``setter(corrupted_activation, index, clean_activation)``. It may write into the corrupted activation
(a copy of its own) and return it or nothing, or return another tensor of the same shape. Those here write in place. The
first entry of ``index`` is the layer, which says whose activation it is and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Shaped
from torch import Tensor

from pellucid.errors import InputError

_ALL = slice(None)


def layer_pos_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch pos *features"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch pos *features"]:
    """One position; ``index`` is ``[layer, pos]``.

    Args:
        corrupted_activation: ``[batch, pos, ...]``: anything but scores and patterns.
        index: the layer and the position.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, pos = _parts(index, "layer", "pos")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, pos))


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch pos head *features"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch pos head *features"]:
    """One head at one position; ``index`` is ``[layer, pos, head]``.

    Args:
        corrupted_activation: ``[batch, pos, n_heads, ...]``: queries, keys, values, z, per-head results.
        index: layer, position and head.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, pos, head = _parts(index, "layer", "pos", "head")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, pos, head))


def layer_head_vector_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch pos head *features"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch pos head *features"]:
    """One head at all positions; ``index`` is ``[layer, head]``.

    Args:
        corrupted_activation: ``[batch, pos, n_heads, ...]``: queries, keys, values, z, per-head results.
        index: layer and head.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, head = _parts(index, "layer", "head")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, _ALL, head))


def layer_head_pattern_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch head pos key_pos"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch head pos key_pos"]:
    """One head's whole pattern; ``index`` is ``[layer, head]``.

    Args:
        corrupted_activation: ``[batch, n_heads, pos, key_pos]``: attention scores or patterns.
        index: layer and head.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, head = _parts(index, "layer", "head")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, head))


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch head pos key_pos"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch head pos key_pos"]:
    """One head's pattern at one query position; ``index`` is ``[layer, head, dest_pos]``.

    Args:
        corrupted_activation: ``[batch, n_heads, pos, key_pos]``: attention scores or patterns.
        index: layer, head and query position.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, head, dest = _parts(index, "layer", "head", "dest_pos")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, head, dest))


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Shaped[Tensor, "batch head pos key_pos"],
    index: Sequence[int],
    clean_activation: Shaped[Tensor, "..."],
) -> Shaped[Tensor, "batch head pos key_pos"]:
    """One entry of one head's pattern; ``index`` is ``[layer, head, dest_pos, src_pos]``.

    Args:
        corrupted_activation: ``[batch, n_heads, pos, key_pos]``: attention scores or patterns.
        index: layer, head, query position and key position.
        clean_activation: the same activation of the clean run.

    Returns:
        ``corrupted_activation``, changed.

    Raises:
        InputError: the index has another length, or lies outside either activation.
    """
    _, head, dest, src = _parts(index, "layer", "head", "dest_pos", "src_pos")
    return _copy(corrupted_activation, clean_activation, index, (_ALL, head, dest, src))


def _parts(index: Sequence[int], *words: str) -> Sequence[int]:
    if len(index) != len(words):
        raise InputError(
            f"This setter takes an index of {len(words)}, [{', '.join(words)}]; found {list(index)}. Its entries are the "
            "columns of index_df, or index_axis_names."
        )
    return index


def _copy(corrupted: Tensor, clean: Tensor, index: Sequence[int], place: tuple[int | slice, ...]) -> Tensor:
    if corrupted.dim() != clean.dim() or clean.shape[0] not in (1, corrupted.shape[0]):
        raise InputError(
            f"The clean activation has shape {tuple(clean.shape)}, the corrupted one {tuple(corrupted.shape)}: they need "
            "the same axes and rows (or one clean row). Cache the clean run with its batch axis, with as many prompts."
        )
    try:
        corrupted[place] = clean[place]
    except (IndexError, RuntimeError, TypeError) as error:
        raise InputError(
            f"Index {list(index)} cannot be patched: the corrupted activation has shape {tuple(corrupted.shape)}, the "
            f"clean one {tuple(clean.shape)}. Indices are whole numbers inside both, and clean and corrupted prompts "
            "need the same number of tokens."
        ) from error
    return corrupted
