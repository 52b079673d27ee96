"""The base run of a sweep: computed once, and what of it every edit needs afterwards.

Kept are the residual entering each layer (and leaving the last), each layer's keys and values as attention meets them, what
Hugging Face hands to each block beside the residual (mask, ALiBi, rotations: they may differ between layers), and the
activations that edits change. All activations can come from a cache that the user already has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.errors import CacheKeyError, InputError, UnsupportedModelError
from pellucid.model_bridge.generalized_components import PosEmbedBridge
from pellucid.model_bridge.generalized_components.hf_arguments import CACHE_NAMES, by_name, forward_parameters
from pellucid.model_bridge.running.runner import Prepared
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import BEFORE_BLOCKS
from pellucid.tables import BriefFields


@dataclass(eq=False, repr=False)
class BaseRun(BriefFields):
    """Activations of the unedited run.

    Attributes:
        tokens: ``[row, pos]``, ``NO_TOKEN`` at virtual positions.
        embeddings: ``[row, pos, d_model]``, if those entered the model and not the tokens.
        logits: ``[row, pos, d_vocab]``, if edits are whole forwards: hooks of the user's own may act on them.
        attention_mask: ``[row, pos]``, or ``None``.
        residual: by layer, ``[row, pos, d_model]``: what enters it; under ``n_layers`` what leaves the last.
        keys: by layer, ``[row, n_key_value_heads, key_pos, d_head]``.
        values: by layer, the same.
        handed: by layer, what its block is given beside the residual, by name.
        sites: activations that edits change, by hook name.
        positions: ``[1 or row, pos]``, what the table of positions is asked for; ``None`` where there is none.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    residual: Mapping[int, Tensor]
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    handed: Mapping[int, Mapping[str, Any]]
    sites: Mapping[str, Tensor]
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    logits: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """``[row, pos, d_model]``: what leaves the last layer."""
        return self.residual[max(self.residual)]

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Columns of the padded sequence."""
        return self.tokens.shape[1]

    @property
    def alibi(self) -> Tensor | None:
        """``[row, n_heads, 1, key_pos]``, where the model has it."""
        alibi: Tensor | None = next(iter(self.handed.values()), {}).get("alibi")
        return None if alibi is None else alibi.view(self.n_rows, -1, *alibi.shape[-2:])

    def mask(self, layer: int) -> Tensor | None:
        """``[row or 1, 1, pos, key_pos]``: what a layer's scores are masked with, additive or, for a fused kernel, bool.

        ``None`` says that nothing is masked. A fused kernel that is given none masks later positions by itself, which rows
        at other columns could not rely on: so the mask is written out.
        """
        mask: Tensor | None = self.handed[layer].get("attention_mask")
        if mask is None and self.alibi is None:
            return torch.ones(self.length, self.length, dtype=torch.bool, device=self.tokens.device).tril()[None, None]
        return mask

    def handed_at(self, layer: int, places: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """What a block is given beside packed rows: what belongs to positions taken where they stand.

        Args:
            layer: the block.
            places: by group in packed order, the rows of the base run ``[edited row]`` and the columns ``[col]``.
        """
        return {
            name: _taken(value, places) if name in PER_POSITION else value for name, value in self.handed[layer].items()
        }


def cached_keys(bridge: TransformerBridge) -> str:
    """The point of an attention that holds its keys as queries meet them."""
    attention = bridge.adapter.family.attention
    return "hook_rot_k" if attention.rotary else "hook_k_normed" if attention.k_norm else "hook_k"


def needed_names(bridge: TransformerBridge, first_layer: int, sites: Iterable[str]) -> list[str]:
    """The hooks that a base run keeps for edits from ``first_layer`` on.

    Args:
        bridge: the model.
        first_layer: the first layer that any edit enters; ``n_layers`` for none.
        sites: hooks that edits change.
    """
    n_layers, keys = bridge.cfg.n_layers, cached_keys(bridge)
    names = [f"blocks.{n_layers - 1}.hook_resid_post"]
    for layer in range(max(first_layer, 0), n_layers):
        names += [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.{keys}", f"blocks.{layer}.attn.hook_v"]
    return list(dict.fromkeys([*names, *sites]))


def base_bytes(bridge: TransformerBridge, rows: int, length: int, first_layer: int) -> int:
    """Bytes of residuals, keys and values that a base run keeps, sites apart."""
    cfg = bridge.cfg
    layers = cfg.n_layers - max(first_layer, 0)
    features = layers * (cfg.d_model + 2 * cfg.n_key_value_heads * cfg.d_head) + cfg.d_model
    return features * rows * length * bridge.dtype.itemsize


def run_base(
    bridge: TransformerBridge,
    prepared: Prepared,
    first_layer: int,
    sites: Iterable[str],
    given: Mapping[str, Tensor] | None = None,
    with_logits: bool = False,
) -> BaseRun:
    """Run the model once and keep what edits from ``first_layer`` on need.

    Args:
        bridge: the model.
        prepared: its checked input.
        first_layer: see :func:`needed_names`.
        sites: hooks that edits change.
        given: a cache of this very run, to take activations from in place of running.
        with_logits: keep the logits too.

    Raises:
        CacheKeyError: ``given`` did not keep what is needed.
        InputError: ``given`` is of a run of another size, of other tokens, or with another mask.
    """
    positions = bridge.positions_of(prepared)
    tokens = positions.tokens
    assert tokens is not None
    n_layers, keys_at = bridge.cfg.n_layers, cached_keys(bridge)
    names = needed_names(bridge, first_layer, sites)
    cache: dict[str, Tensor]
    with _watched(bridge) as seen:
        if given is None:
            logits, cache = _run(bridge, prepared, names, with_logits)
        else:
            entering = bridge(prepared.tokens, attention_mask=prepared.attention_mask, stop_at_layer=0)
            _check_given(given, names, prepared, entering)
            logits, cache = None, {name: given[name] for name in names}
            # A run that begins after the last block hands every block what it would be given, and computes none.
            bridge(entering, attention_mask=prepared.attention_mask, start_at_layer=n_layers, stop_at_layer=n_layers)
            if with_logits:
                logits = bridge(prepared.tokens, attention_mask=prepared.attention_mask)
    layers = range(max(first_layer, 0), n_layers)
    residual = {layer: cache[f"blocks.{layer}.hook_resid_pre"] for layer in layers}
    residual[n_layers] = cache[f"blocks.{n_layers - 1}.hook_resid_post"]
    edited = {name: cache[name] for name in sites}
    # One layer after the other, letting go of the cached copy: both at once would double the base run's memory.
    keys = {layer: _by_head(cache.pop(f"blocks.{layer}.attn.{keys_at}")) for layer in layers}
    values = {layer: _by_head(cache.pop(f"blocks.{layer}.attn.hook_v")) for layer in layers}
    return BaseRun(
        tokens=tokens,
        attention_mask=positions.attention_mask,
        residual=residual,
        keys=keys,
        values=values,
        handed={layer: seen.handed[layer] for layer in layers},
        sites=edited,
        positions=seen.positions,
        embeddings=positions.embeddings,
        logits=logits,
    )


@dataclass(eq=False, repr=False)
class KeptRun(BriefFields):
    """An unedited run that nothing is edited in: activations of it, and what its logits are made from.

    Attributes:
        activations: by hook name, ``[row, ...]``.
        final: ``[row, pos, d_model]``, what leaves the last layer.
        logits: ``[row, pos, d_vocab]``, if they were asked for.
    """

    activations: Mapping[str, Tensor]
    final: Tensor
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        kept = [*self.activations.values(), self.final, *([] if self.logits is None else [self.logits])]
        return sum(tensor.nbytes for tensor in kept)


def keep_run(bridge: TransformerBridge, prepared: Prepared, names: Sequence[str], with_logits: bool = False) -> KeptRun:
    """Run the model once and keep the activations at ``names``, canonical names of hooks.

    Args:
        bridge: the model.
        prepared: its checked input.
        names: hooks.
        with_logits: keep the logits too, where they are not what the final norm and the unembedding alone make.
    """
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    logits, cache = _run(bridge, prepared, list(dict.fromkeys([*names, last])), with_logits)
    return KeptRun({name: cache[name] for name in names}, cache[last], logits)


def _run(
    bridge: TransformerBridge, prepared: Prepared, names: list[str], with_logits: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Keep ``names`` of one run, which stops before the unembedding if nothing of it is kept."""
    specs = [bridge.hook_spec(name) for name in names]
    after = any(spec.layer is None and spec.component not in BEFORE_BLOCKS for spec in specs)
    output, kept = bridge.run_with_cache(
        prepared.tokens,
        attention_mask=prepared.attention_mask,
        names_filter=names,
        return_type=None if after and not with_logits else "logits",
        stop_at_layer=None if after or with_logits else bridge.cfg.n_layers,
        return_cache_object=False,
    )
    return output if with_logits else None, dict(kept)


def _by_head(kv_bknh: Tensor) -> Tensor:
    """``[row, pos, head, d_head]`` to ``[row, head, pos, d_head]`` in memory, the order that products read."""
    return kv_bknh.transpose(1, 2).contiguous()


PER_POSITION = ("position_embeddings", "position_ids", "cache_position")
"""What Hugging Face hands to a block for each position: tensors ``[row or 1, pos, ...]`` or ``[pos]``, or tuples of them."""

ABOUT_KEYS = ("attention_mask", "alibi")
"""What it hands to a block for queries and keys, which whoever mixes packed rows takes apart."""


@dataclass
class _Seen:
    """What a run hands to its blocks, by layer, and to its table of positions."""

    handed: dict[int, dict[str, Any]]
    positions: Tensor | None = None


@contextmanager
def _watched(bridge: TransformerBridge) -> Iterator[_Seen]:
    """What Hugging Face hands on, filled in by a run inside the ``with`` block."""
    seen, tree = _Seen({}), bridge.runner.tree

    def look(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        left_out = (forward_parameters(type(module))[0], *CACHE_NAMES)  # the residual, and a cache that rows have not
        handed = by_name(module, args, kwargs)
        seen.handed[layer] = {name: value for name, value in handed.items() if name not in left_out}

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.positions = cast(PosEmbedBridge, tree.components["pos_embed"]).positions_of(args, kwargs)

    handles = [
        block.module.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
        for layer, block in enumerate(tree.blocks)
    ]
    if "pos_embed" in tree.components:
        handles.append(tree.components["pos_embed"].module.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def refuse_unknown(bridge: TransformerBridge, base: BaseRun) -> None:
    """See that everything that blocks are handed can be taken at the positions of packed rows.

    Raises:
        UnsupportedModelError: tensors of which that is not known.
    """
    known = (*PER_POSITION, *ABOUT_KEYS)
    for handed in base.handed.values():
        for name, value in handed.items():
            if name not in known and isinstance(value, Tensor | tuple | list):
                raise UnsupportedModelError(
                    f"{bridge.adapter.family.title} of the installed transformers hands its blocks {name!r}, and what "
                    "a sweep's rows need of it is not known: their numbers could be others. Run bridge.run_with_hooks "
                    "for each edit, or install a release of docs/compatibility.md."
                )


def _taken(value: Any, places: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """``[1, packed row, ...]`` of ``[row or 1, pos, ...]``, or ``[packed row]`` of ``[pos]``."""
    if isinstance(value, tuple | list):
        return tuple(_taken(part, places) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1:
        return torch.cat([value[columns].repeat(len(rows)) for rows, columns in places])
    parts = [
        value[(rows if value.shape[0] > 1 else rows * 0)[:, None], columns].flatten(0, 1) for rows, columns in places
    ]
    return torch.cat(parts)[None]


def _check_given(given: Mapping[str, Tensor], names: list[str], prepared: Prepared, entering: Tensor) -> None:
    """See that a cache is of the base run: by its tokens, positions and mask, and by the residual that enters the blocks.

    Args:
        given: the cache.
        names: what is taken from it.
        prepared: the base run's input.
        entering: ``[row, pos, d_model]``: what enters block 0 in the base run.

    Raises:
        CacheKeyError: an activation is missing.
        InputError: the cache is of another run, with what differs.
    """
    tokens = prepared.tokens
    assert tokens is not None
    missing = [name for name in names if name not in given]
    if missing:
        raise CacheKeyError(
            f"The base cache lacks {len(missing)} of the {len(names)} activations that these edits need, {missing[0]} "
            "first. Cache with names_filter=sweep.needed_names(edits), or leave base_cache out."
        )
    shape = tuple(tokens.shape)
    wrong = [name for name in names if tuple(given[name].shape[:2]) != shape or given[name].dim() < 3]
    if wrong:
        raise InputError(
            f"The base cache's {wrong[0]} has shape {tuple(given[wrong[0]].shape)}; the base run has {shape[0]} rows of "
            f"{shape[1]} positions. Cache all positions, and keep the batch axis."
        )
    kind = (entering.dtype, entering.device)
    other = [name for name in names if ".hook_resid_" in name and (given[name].dtype, given[name].device) != kind]
    if other:
        found = given[other[0]]
        raise InputError(
            f"The base cache's {other[0]} is {found.dtype} on {found.device}; the base run has {kind[0]} on {kind[1]}."
        )
    if isinstance(given, ActivationCache):
        if given.tokens is not None and not torch.equal(given.tokens.to(tokens.device), tokens):
            raise InputError("The base cache was made from other tokens than the base run's.")
        masks = [
            torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).bool()
            for mask in (given.attention_mask, prepared.attention_mask)
        ]
        if not torch.equal(*masks):
            raise InputError("The base cache was made with another attention mask than the base run's.")
    first = given.get("blocks.0.hook_resid_pre")
    if first is not None and not (first.shape == entering.shape and torch.equal(first.to(entering), entering)):
        raise InputError(
            "The base cache is of another run: blocks.0.hook_resid_pre holds other numbers than the base run's tokens give "
            "in this model now. Leave base_cache out, or cache this run anew."
        )
