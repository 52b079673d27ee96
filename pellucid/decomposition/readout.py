"""The logit lens of a cache: what the model would say if each layer were its last.

A residual is given to the model as what enters its final norm, so that norm, unembedding and whatever caps or scales the
logits are the model's own: the lens at the last layer is what a run returns, to the bit where it is asked for all positions
of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_function, check_kind, check_list, check_whole
from pellucid.decomposition.residual import accumulated
from pellucid.decomposition.stream import CachedRun, StreamModel, model_of
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.slices import Slice, SliceInput
from pellucid.tables import BriefFields

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Quantity = Literal["logits", "log_probs", "probs"]
QUANTITIES = ("logits", "log_probs", "probs")
UNITS = {"logits": "logits", "log_probs": "nats", "probs": "1"}


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(BriefFields):
    """What a lens read: ``values`` ``[label, batch, pos, token]``, less axes that a slice or the cache dropped.

    Attributes:
        values: in the quantity ``return_type``; the last axis is the whole vocabulary, or what was asked for of it.
        labels: of the first axis: ``0_pre``, ``0_mid``, ..., ``final_post``.
        return_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        entropy: ``[label, batch, pos]`` of the whole distribution, in nats.
        token_ids: ids of the last axis: ``[token]``, or, of ``top_k`` and of targets row by row, with the shape of
            ``values``; ``None`` for the whole vocabulary.
        target_ranks: with targets, how many tokens have a larger logit, with the shape of ``values``.
        has_batch_dim: whether there is an axis of rows.
        targets: strings and ids as they were given, ``()`` for targets row by row or none.
    """

    values: Float[Tensor, "label ... token"]
    labels: list[str]
    return_type: Quantity
    entropy: Float[Tensor, "label ..."]
    token_ids: Int[Tensor, "..."] | None
    target_ranks: Int[Tensor, "label ... token"] | None
    has_batch_dim: bool
    targets: tuple[str | int, ...] = ()

    @property
    def top_ids(self) -> Int[Tensor, "label ... token"] | None:
        """The ids of ``top_k``, with the shape of ``values``."""
        return self.token_ids if self.target_ranks is None and self._by_cell() else None

    def _by_cell(self) -> bool:
        return self.token_ids is not None and self.token_ids.dim() > 1

    def rank_trajectory(self, target: str | int | None = None) -> Int[Tensor, "label ..."]:
        """``[label, batch, pos]``: how many tokens have a larger logit than a target, 0 for the most probable one.

        Args:
            target: as it was given, or its id; may be left out where there is one.

        Raises:
            InputError: the lens was not asked for it.
        """
        if self.target_ranks is None:
            raise InputError("Ranks are of targets: call logit_lens(targets=...).")
        if target is None and self.target_ranks.shape[-1] == 1:
            return self.target_ranks[..., 0]
        ids = [] if self._by_cell() or self.token_ids is None else self.token_ids.tolist()
        known = [*self.targets] if isinstance(target, str) else ids
        if target not in known:
            raise InputError(f"target is one of {', '.join(map(repr, self.targets or ids))}; found {target!r}.")
        return self.target_ranks[..., known.index(target)]

    def top_tokens(self, tokenizer: Any) -> dict[str, Any]:
        """By label, the texts of the ``top_k`` tokens, in nested lists ``[batch, pos, k]``.

        Args:
            tokenizer: the model's.

        Raises:
            InputError: the lens was not asked for ``top_k``.
        """
        ids = self.top_ids
        if ids is None:
            raise InputError("Top tokens are of top_k: call logit_lens(top_k=5).")
        return {label: _texts(row.tolist(), tokenizer) for label, row in zip(self.labels, ids, strict=True)}

    def to_dataframe(self) -> pd.DataFrame:
        """The values as a table: a line for each cell, with its layer, row, position, token (or rank) and value."""
        array = self.to_xarray()
        if "token_id" in array.coords:  # of top_k and of targets row by row: the last axis has no ids of its own
            array = array.rename(token="rank" if self.target_ranks is None else "target")
        return array.to_dataframe().reset_index()

    def to_xarray(self) -> xr.DataArray:
        """The values with named axes: ``layer`` (its labels), ``row``, ``pos``, ``token``."""
        import xarray as xr  # it takes longer to load than the bridge does

        values = self.values.detach().cpu()
        between = ["row", "pos"] if self.has_batch_dim else ["pos"]
        dims = ["layer", *between[: values.dim() - 2], "token"]
        coords: dict[str, Any] = {"layer": self.labels}
        if self.token_ids is None:
            coords["token"] = list(range(values.shape[-1]))
        elif not self._by_cell():
            coords["token"] = self.token_ids.tolist()
        else:
            coords["token_id"] = (dims, self.token_ids.cpu().numpy())
        about = {"analysis": "logit lens", "units": UNITS[self.return_type]}
        wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return xr.DataArray(wide.numpy(), coords, dims, self.return_type, about)


def _texts(ids: Any, tokenizer: Any) -> Any:
    return [_texts(part, tokenizer) for part in ids] if isinstance(ids, list) else str(tokenizer.decode([ids]))


Read: TypeAlias = tuple[
    Float[Tensor, "... token"], Float[Tensor, "..."], Int[Tensor, "..."] | None, Int[Tensor, "... token"] | None
]
"""Values, entropy, ids where they differ from cell to cell, and ranks."""


@dataclass(frozen=True)
class _Columns:
    """Which logits are kept: of the whole vocabulary, of some tokens, of the largest, or of a target a cell."""

    ids: Tensor | None = None
    top_k: int | None = None
    by_cell: Tensor | None = None
    ranked: bool = False

    def kept(self, logits: Tensor, quantity: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values, their ids where they differ from cell to cell, and ranks."""
        if self.top_k is not None:
            top = logits.topk(self.top_k).indices
            return quantity.gather(-1, top), top, None
        if self.by_cell is not None:
            ids = self.by_cell.to(logits.device).expand(logits.shape[:-1])[..., None]
        elif self.ids is not None:
            ids = self.ids.to(logits.device).expand(*logits.shape[:-1], -1)
        else:
            return quantity, None, None
        found = logits.gather(-1, ids)
        # A target at a time: all at once would be [..., target, d_vocab].
        ranks = [(logits > found[..., i : i + 1]).sum(-1) for i in range(ids.shape[-1])] if self.ranked else []
        return (
            quantity.gather(-1, ids),
            ids if self.by_cell is not None else None,
            torch.stack(ranks, -1) if ranks else None,
        )


def _columns(model: StreamModel, vocab: Any, targets: Any, top_k: int | None, cells: torch.Size) -> _Columns:
    if sum(given is not None for given in (vocab, targets, top_k)) > 1:
        raise InputError("Give at most one of vocab, targets and top_k.")
    if top_k is not None:
        return _Columns(top_k=check_count("top_k", top_k, 1, model.cfg.d_vocab))
    if vocab is not None:
        return _Columns(ids=_ids(model, vocab, "vocab").reshape(-1))
    if targets is None:
        return _Columns()
    if isinstance(targets, Tensor) and targets.dim():
        ids = _ids(model, targets, "targets")
        try:
            ids.expand(cells)
        except RuntimeError:
            raise InputError(
                f"A tensor of targets has one for each row and position, {list(cells)}; found shape {list(ids.shape)}. "
                "A list of tokens asks for each of them everywhere."
            ) from None
        return _Columns(by_cell=ids, ranked=True)
    return _Columns(ids=_ids(model, targets, "targets").reshape(-1), ranked=True)


def _ids(model: StreamModel, given: Any, argument: str) -> Tensor:
    """Token ids of an id, a string, several, or a tensor of ids."""
    if isinstance(given, str | int):
        given = [given]
    if not isinstance(given, Tensor):
        given = torch.tensor(
            [
                model.to_single_token(token)
                if isinstance(token, str)
                else check_whole(f"an entry of {argument}", token)
                for token in check_list(argument, given, "tokens")
            ]
        )
    if given.is_floating_point() or not given.numel() or int(given.min()) < 0 or int(given.max()) >= model.cfg.d_vocab:
        raise InputError(
            f"{argument} is token ids, 0 to {model.cfg.d_vocab - 1}; found {given.dtype} {given.tolist()}."
        )
    ids: Tensor = given.long()
    return ids


def lens(
    run: CachedRun,
    layers: Sequence[int] | None,
    incl_mid: bool,
    positions: Slice | SliceInput,
    batch_slice: Slice | SliceInput,
    lens: Callable[[Float[Tensor, "... d_model"], int], Float[Tensor, "... d_model"]] | None,
    apply_ln: bool,
    vocab: Any,
    targets: Any,
    return_type: Quantity,
    top_k: int | None,
    chunk_size: int | None,
    enable_grad: bool,
) -> LensResult:
    """See :meth:`DecompositionMethods.logit_lens`."""
    model, batch = model_of(run), Slice.of(batch_slice)
    check_choice("return_type", return_type, QUANTITIES)
    rows_at_once = None if chunk_size is None else check_count("chunk_size", chunk_size)
    if lens is not None:
        check_function("lens", lens, "a function of a residual and its place in the stack")
    stack, labels = accumulated(run, None, incl_mid, False, positions, False)
    places = range(len(labels)) if layers is None else _places(layers, labels)
    if run.has_batch_dim:
        stack = batch.apply(stack, 1)
    columns = _columns(model, vocab, targets, top_k, stack.shape[1:-1])
    found: list[Read] = []
    with torch.set_grad_enabled(enable_grad):
        for place in places:
            residual = stack[place] if lens is None else lens(stack[place], place)
            found.append(_read_whole(model, residual, apply_ln, rows_at_once, columns, return_type))
    values, entropy, cell_ids, ranks = (
        None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)
    )
    assert values is not None
    assert entropy is not None
    names = (
        ()
        if isinstance(targets, Tensor) or targets is None
        else tuple([targets] if isinstance(targets, str | int) else targets)
    )
    return LensResult(
        values,
        [labels[place] for place in places],
        return_type,
        entropy,
        columns.ids if cell_ids is None else cell_ids,
        ranks,
        run.has_batch_dim and batch.mode != "int",
        names,
    )


def vectors(
    model: StreamModel,
    given: Float[Tensor, "... d_model"],
    apply_ln: bool,
    vocab: Any,
    targets: Any,
    return_type: Quantity,
    top_k: int | None,
    chunk_size: int,
    enable_grad: bool,
) -> Read:
    """Values, entropy, ids and ranks of vectors ``[..., d_model]`` that are of no run: see :meth:`logit_lens`.

    Raises:
        InputError: no vectors of the model's width; more than one of ``vocab``, ``targets`` and ``top_k``.
    """
    check_choice("return_type", return_type, QUANTITIES)
    check_kind("vectors", given, Tensor, f"a tensor [..., {model.cfg.d_model}]")
    if not given.is_floating_point() or given.shape[-1:] != (model.cfg.d_model,) or not given.numel():
        raise InputError(
            f"vectors is a tensor [..., {model.cfg.d_model}] of numbers; found {list(given.shape)} in {given.dtype}."
        )
    columns = _columns(model, vocab, targets, top_k, given.shape[:-1])
    with torch.set_grad_enabled(enable_grad):
        found = _read_whole(model, given, apply_ln, check_count("chunk_size", chunk_size), columns, return_type)
    return found[0], found[1], columns.ids if found[2] is None else found[2], found[3]


def _read_whole(
    model: StreamModel, residual: Tensor, apply_ln: bool, at_once: int | None, columns: _Columns, return_type: Quantity
) -> Read:
    """Values, entropy, ids and ranks of a residual ``[..., d_model]``, each with its leading axes."""
    values, entropy, ids, ranks = zip(
        *_read(model, residual, apply_ln, at_once, columns, return_type), strict=True
    )  # a chunk each
    cells = residual.shape[:-1]
    whole = _joined(values, cells), _joined(entropy, cells)
    assert whole[0] is not None
    assert whole[1] is not None
    return whole[0], whole[1], _joined(ids, cells), _joined(ranks, cells)


def _read(
    model: StreamModel, residual: Tensor, apply_ln: bool, at_once: int | None, columns: _Columns, return_type: Quantity
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Values, entropy, ids and ranks of a residual ``[..., d_model]``, some cells at a time."""
    cells = residual.shape[:-1]
    flat = (
        residual[None] if residual.dim() == 2 else residual
    )  # as the run had it: the bits of a product depend on its shape
    if at_once is not None or flat.dim() != 3:
        flat = residual.reshape(1, -1, residual.shape[-1])
    by_cell = None if columns.by_cell is None else columns.by_cell.expand(cells).reshape(flat.shape[:-1])
    size = at_once or flat.shape[1]
    for start in range(0, flat.shape[1], size):
        logits = logits_of(model, flat[:, start : start + size], apply_ln)
        mine = columns if by_cell is None else _Columns(by_cell=by_cell[:, start : start + size], ranked=True)
        log_probs = widened(logits).log_softmax(-1)
        quantity = {"logits": logits, "log_probs": log_probs}.get(return_type)
        values, ids, ranks = mine.kept(logits, log_probs.exp() if quantity is None else quantity)
        yield values, -(log_probs.exp() * log_probs).sum(-1), ids, ranks


def _joined(parts: Sequence[Tensor | None], cells: torch.Size) -> Tensor | None:
    """Chunks of ``[row, pos, ...]`` as ``[*cells, ...]``."""
    if parts[0] is None:
        return None
    whole = torch.cat([part for part in parts if part is not None], 1)
    return whole.reshape((*cells, *whole.shape[2:]))


def logits_of(
    model: StreamModel, residual: Float[Tensor, "batch pos d_model"], apply_ln: bool = True
) -> Float[Tensor, "batch pos d_vocab"]:
    """``[batch, pos, d_model]`` that enters the final norm (``apply_ln=False``: the unembedding) to the model's logits.

    Hooks that are on the model act, as in any run.
    """
    given = residual.to(model.W_U.device, model.cfg.dtype)
    instead = [] if apply_ln else [("ln_final.hook_out", lambda tensor, hook: given)]
    logits: Tensor = model.run_with_hooks(given, fwd_hooks=instead, start_at_layer=model.cfg.n_layers)
    return logits


def _places(layers: Sequence[int], labels: Sequence[str]) -> list[int]:
    found = [check_whole("an entry of layers", layer) for layer in check_list("layers", layers, "places")]
    if any(not -len(labels) <= place < len(labels) for place in found):
        raise InputError(f"layers are places among {', '.join(labels)}, 0 to {len(labels) - 1}; found {found}.")
    return [place % len(labels) for place in found]
