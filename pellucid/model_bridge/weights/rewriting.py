"""Weight processing on a live model: what is legal is decided first, then one part after another is changed for good.

The model is taken in *units*: the unembedding with the final norm, the embedding with its norm, and each block. The new
weights of a unit are computed beside it, checked, and written into the storage that is there, so that views, optimisers
and other references stay valid and no second model is ever in memory. Each unit's change alone keeps the function: a
call that is interrupted between two units leaves a correct model, and a repeat does the rest. Within a unit Ctrl-C
waits, and if writing fails the unit is put back.

Where ``b_U`` lives: folding the final norm gives the unembedding a bias, which BLOOM's ``lm_head`` has not. In memory it
is ``lm_head.bias``, so that every route computes with it. Hugging Face's loader drops that key without an error, so
:func:`portable_state` writes it in a form that survives.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.record import (
    Request,
    Unit,
    WeightsRecord,
    believed,
    chunk_rows,
    chunks,
    concerns,
    is_identity,
    is_tied,
    plain_parameters,
    record_of,
    refuse_illegal,
    units_of,
)
from pellucid.progress import progress_bar
from pellucid.weight_processing import (
    BLOCK_KEYS,
    STEPS,
    Step,
    centred_rows,
    embedding_gain,
    fold_layer_norm,
    mean_square,
    process_block,
    rows_for_gain,
    working_dtype,
)

LARGE = 3 * 10**8
"""Parameters from which on a progress bar is shown, on a terminal."""


# -- doing it ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a call did: steps that it applied, and asked ones that were there already."""

    applied: frozenset[Step]
    already: frozenset[Step]


def process(tree: ComponentTree, request: Request, verbose: bool = False, progress: bool | None = None) -> Outcome:
    """Process a model's weights in place, unit by unit.

    Args:
        tree: the model's components.
        request: which steps and how.
        verbose: print a line a unit.
        progress: show a bar; by default for large models on a terminal.

    Raises:
        WeightError: the call is not legal for this model; nothing was changed.
    """
    refuse_illegal(tree, request)
    record = record_of(tree)
    already: set[Step] = set()
    applied: set[Step] = set()
    todo: dict[Unit, frozenset[Step]] = {}
    for unit in units_of(tree.cfg):
        has = believed(tree, unit)
        asked = request.steps & concerns(unit)
        if unit == "unembed" and record.on_access and not request.keep_tied and "fold_ln" in asked:
            has -= {"fold_ln"}
        already |= asked & has
        if asked - has:
            applied |= asked - has
            todo[unit] = asked | has  # steps keep each other's invariants only when they run together
    # A parameter made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        processor = Processor(tree, request, record)
        for unit in _watched(list(todo), tree, progress):
            processor.process(unit, todo[unit])
            if verbose:
                print(f"{unit}: {', '.join(step for step in STEPS if step in todo[unit])}")  # noqa: T201 (asked for)
    return Outcome(frozenset(applied), frozenset(already - applied))


def _watched(units: list[Unit], tree: ComponentTree, progress: bool | None) -> Any:
    if progress is None and sum(parameter.numel() for parameter in tree.root.parameters()) < LARGE:
        progress = False
    return progress_bar(units, total=len(units), desc="process weights", unit="unit", show=progress)


class Processor:
    """Applies steps to the units of one model.

    Args:
        tree: its components.
        request: what the call asked for.
        record: what was done before, kept up to date.
    """

    def __init__(self, tree: ComponentTree, request: Request, record: WeightsRecord) -> None:
        self.tree, self.request, self.record = tree, request, record
        self._spare: list[Tensor] = []  # a block's old values while it is written
        if request.keep_originals and record.originals is None:
            record.originals, record.was_tied = {}, is_tied(tree)

    def process(self, unit: Unit, steps: frozenset[Step]) -> None:
        """Apply ``steps`` to ``unit``, all or nothing; the record says so in the very section that writes."""
        if unit == "unembed":
            self._unembed(steps)
        elif unit == "embed":
            self._embed(steps)
        else:
            self._block(unit, steps)

    def _is_done(self, unit: Unit, steps: frozenset[Step]) -> None:
        self.record.done[unit] = steps

    def _block(self, unit: Unit, steps: frozenset[Step]) -> None:
        block = self.tree.components[unit]
        targets = block.weight_targets()
        needed = {key for step in steps for key in BLOCK_KEYS[step]}
        places = {key: targets[key]()[0] for key in targets if key in needed}
        old = {key: place.storage.detach().reshape(place.shape) for key, place in places.items()}
        new = process_block(old, steps, self.tree.cfg.n_heads)
        rounded = {key: new.pop(key).to(places[key].storage.dtype) for key in list(new)}
        writes = block.plan_writes(rounded)
        self._remember(*(f"{block.path}.{name}" for name, _ in block.module.named_parameters()))
        write_all([(write.target, write.value) for write in writes], self._spare, partial(self._is_done, unit, steps))

    # -- the two tables ------------------------------------------------------------------------------------------------

    def _unembed(self, steps: frozenset[Step]) -> None:
        head = cast(nn.Linear, self.tree.components["unembed"].module)
        norm = cast(nn.LayerNorm, self.tree.components["ln_final"].module)
        tied = is_tied(self.tree)
        if tied and self.request.keep_tied:
            self._is_done("unembed", steps)
            self.record.on_access = True
            return
        fold, centre = "fold_ln" in steps, "center_unembed" in steps
        change = TableChange.of(head, norm, fold, centre)
        if tied and not change.needed:
            self._is_done("unembed", steps)
            return
        self._remember("lm_head.weight", "lm_head.bias", "transformer.ln_f.weight", "transformer.ln_f.bias")
        old = head.weight.detach()
        if old.dtype == torch.float16:
            change.refuse_overflow(old)
        if tied:
            new = torch.empty_like(old)
            bias = change.write(old, new, _bias_of(head))
            with undisturbed(), self._at_risk("unembed"):
                untie(self.tree, new)
                self._finish_unembed(head, norm, bias, steps)
            return
        with undisturbed(), self._at_risk("unembed"):
            bias = change.write(old, old, _bias_of(head))
            self._finish_unembed(head, norm, bias, steps)

    def _finish_unembed(self, head: nn.Linear, norm: nn.LayerNorm, bias: Tensor | None, steps: frozenset[Step]) -> None:
        if bias is not None and _bias_of(head) is not None:
            head.bias.copy_(bias)
        elif bias is not None:
            head.register_parameter("bias", nn.Parameter(bias, requires_grad=head.weight.requires_grad))
        if "fold_ln" in steps:
            norm.weight.fill_(1)
            norm.bias.zero_()
        self._is_done("unembed", steps)
        self.record.on_access = False

    def _embed(self, steps: frozenset[Step]) -> None:
        table = cast(Tensor, self.tree.components["embed"].module.weight).detach()
        norm = cast(nn.LayerNorm, self.tree.components["embed_ln"].module)
        gain, shift = norm.weight.detach(), norm.bias.detach()
        if bool((gain == gain[0]).all()) and not bool(shift.any()):
            self._is_done("embed", steps)  # a normalised vector times one number has mean zero already
            return
        if is_tied(self.tree):
            self._remember("lm_head.weight")
            untie(self.tree, table.clone())
        self._remember(
            "transformer.word_embeddings.weight",
            "transformer.word_embeddings_layernorm.weight",
            "transformer.word_embeddings_layernorm.bias",
        )
        eps = float(norm.eps)
        power = max(float(mean_square(centred_rows(rows, gain, shift, eps)).max()) for rows in chunks(table))
        scale = embedding_gain(power, gain.dtype)
        with undisturbed(), self._at_risk("embed"):
            for rows in chunks(table):
                rows.copy_(rows_for_gain(centred_rows(rows, gain, shift, eps), scale, eps))
            gain.fill_(scale)
            shift.zero_()
            self._is_done("embed", steps)

    # -- originals -----------------------------------------------------------------------------------------------------

    def _remember(self, *paths: str) -> None:
        """Keep copies of parameters before their first change, if that was asked for."""
        originals = self.record.originals
        if originals is None:
            return
        for path in paths:
            parameter = _parameter(self.tree.root, path)
            if (
                parameter is not None
                and path not in originals
                and not (path == "lm_head.weight" and self.record.was_tied)
            ):
                originals[path] = parameter.detach().to("cpu", copy=True)

    @contextmanager
    def _at_risk(self, unit: Unit) -> Iterator[None]:
        """While a table is rewritten in place, chunk by chunk: there is no room for a second one to go back to."""
        try:
            yield
        except BaseException as error:
            self.record.damaged = unit
            way = "unprocess_weights() restores it." if self.record.originals is not None else "Load the model again."
            raise WeightError(f"{unit} could not be rewritten ({error!r}) and is left half done. {way}") from error


@dataclass(frozen=True)
class TableChange:
    """What folding the final norm and centring do to the unembedding, row by row.

    Attributes:
        gain: of the norm to fold, or ``None``.
        shift: its bias, or ``None``.
        mean: mean over the vocabulary of the folded rows, ``[1, d_model]``, to subtract, or ``None``.
        needed: whether the logits, or their mean, depend on it.
    """

    gain: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    needed: bool

    @classmethod
    def of(cls, head: nn.Linear, norm: nn.LayerNorm, fold: bool, centre: bool) -> TableChange:
        """The change for an unembedding and the norm before it."""
        gain, shift = (norm.weight.detach(), norm.bias.detach()) if fold else (None, None)
        mean = None
        if centre:
            table = head.weight.detach()
            wide = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
            for rows in chunks(table):
                wide += rows.to(working_dtype(table.dtype)).sum(0)
            mean = (wide / table.shape[0]).to(working_dtype(table.dtype))[None]
            if gain is not None and shift is not None:
                mean, _ = fold_layer_norm(mean, None, gain, shift)  # folding is linear: the mean of the folded rows
        needed = (fold and not is_identity(norm)) or (mean is not None and bool(mean.any()))
        return cls(gain, shift, mean, needed)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows of the new table, and what they add to ``b_U``, in the working dtype."""
        if self.gain is None or self.shift is None:
            wide = rows.to(working_dtype(rows.dtype))
            return (wide if self.mean is None else wide - self.mean), None
        new, added = fold_layer_norm(rows, None, self.gain, self.shift)
        return (new if self.mean is None else new.sub_(self.mean)), added

    def write(self, table: Tensor, into: Tensor, bias: Tensor | None) -> Tensor | None:
        """Write the new table, row by row; ``into`` may be the table itself.

        Returns:
            The new ``b_U`` ``[d_vocab]`` in the table's dtype, ``None`` where there is none to have.
        """
        added = self._added(table)
        for rows, place, part in zip(chunks(table), chunks(into), added.split(chunk_rows(table)), strict=True):
            new, more = self.rows(rows)
            place.copy_(new)
            if more is not None:
                part.copy_(more)
        return self._bias(added, bias, table.dtype)

    def bias(self, table: Tensor, bias: Tensor | None) -> Tensor | None:
        """The new ``b_U`` alone."""
        added = self._added(table)
        for rows, part in zip(chunks(table), added.split(chunk_rows(table)), strict=True):
            more = self.rows(rows)[1]
            if more is not None:
                part.copy_(more)
        return self._bias(added, bias, table.dtype)

    def _added(self, table: Tensor) -> Tensor:
        # One vector from the start: many small ones, kept between large ones that are freed, would tear the heap apart.
        return torch.zeros(table.shape[0], dtype=working_dtype(table.dtype), device=table.device)

    def _bias(self, added: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if bias is None and not (self.shift is not None and bool(self.shift.any())):
            return None
        new = added if bias is None else added + bias.detach()
        return (new if self.mean is None else new - new.mean()).to(dtype)

    def refuse_overflow(self, table: Tensor) -> None:
        """Refuse a change whose result the table's dtype cannot hold, before anything is written.

        Raises:
            WeightError: it cannot.
        """
        for rows in chunks(table):
            if not bool(torch.isfinite(self.rows(rows)[0].to(table.dtype)).all()):
                raise WeightError(
                    f"lm_head.weight does not fit {table.dtype} once processed. Load the model in a wider dtype."
                )


def folded_unembedding(tree: ComponentTree) -> tuple[Tensor, Tensor]:
    """``W_U`` ``[d_model, d_vocab]`` and ``b_U`` ``[d_vocab]``, the final norm folded, beside the tied table."""
    head = cast(nn.Linear, tree.components["unembed"].module)
    change = TableChange.of(head, cast(nn.LayerNorm, tree.components["ln_final"].module), fold=True, centre=False)
    with torch.no_grad():
        table = head.weight.detach()
        new = torch.empty_like(table)
        bias = change.write(table, new, _bias_of(head))
    return new.T, table.new_zeros(table.shape[0]) if bias is None else bias


def folded_unembedding_bias(tree: ComponentTree) -> Tensor:
    """``b_U`` ``[d_vocab]`` of :func:`folded_unembedding` alone, without the table."""
    head = cast(nn.Linear, tree.components["unembed"].module)
    change = TableChange.of(head, cast(nn.LayerNorm, tree.components["ln_final"].module), fold=True, centre=False)
    with torch.no_grad():
        bias = change.bias(head.weight.detach(), _bias_of(head))
    return head.weight.new_zeros(head.weight.shape[0]) if bias is None else bias


def untie(tree: ComponentTree, table: Tensor) -> None:
    """Give the unembedding ``table`` as its own parameter, and say so in the configurations.

    Hugging Face ties again (``tie_weights``, loading, resizing) whenever its configuration says that it should.
    """
    head = tree.components["unembed"].module
    head.weight = nn.Parameter(table, requires_grad=cast(nn.Parameter, head.weight).requires_grad)
    _say_tied(tree, False)


def _say_tied(tree: ComponentTree, tied: bool) -> None:
    tree.cfg.tie_word_embeddings = tied
    cast(Any, tree.root).config.tie_word_embeddings = tied
    keys = getattr(tree.root, "all_tied_weights_keys", None)
    if isinstance(keys, dict):
        keys.pop("lm_head.weight", None)
        if tied:
            keys["lm_head.weight"] = "transformer.word_embeddings.weight"


def _bias_of(head: nn.Linear) -> nn.Parameter | None:
    return head._parameters.get("bias")


def _parameter(root: nn.Module, path: str) -> nn.Parameter | None:
    owner, _, name = path.rpartition(".")
    try:
        return root.get_submodule(owner)._parameters.get(name)
    except AttributeError:  # there is no such module
        return None


# -- all or nothing ----------------------------------------------------------------------------------------------------


def write_all(
    writes: Sequence[tuple[Tensor, Tensor]],
    spare: list[Tensor] | None = None,
    done: Callable[[], None] | None = None,
) -> None:
    """Copy each value into its storage; put everything back if one copy fails. Ctrl-C waits until it is through.

    Args:
        writes: ``(storage, value)`` pairs.
        spare: where to keep the old values meanwhile; filled, and used again by a call with the same shapes.
        done: called when all is written, in the section that puts everything back if it is not.
    """
    targets = [target.detach() for target, _ in writes]
    before = [] if spare is None else spare
    if [(old.shape, old.dtype, old.device) for old in before] != [
        (new.shape, new.dtype, new.device) for new in targets
    ]:
        before[:] = [torch.empty(new.shape, dtype=new.dtype, device=new.device) for new in targets]
    with undisturbed():
        for target, old in zip(targets, before, strict=True):
            old.copy_(target)
        try:
            for target, (_, value) in zip(targets, writes, strict=True):
                target.copy_(value)
            if done is not None:
                done()
        except BaseException:
            for target, old in zip(targets, before, strict=True):
                target.copy_(old)
            raise


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, then let it act. Only the main thread is ever interrupted by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
        if held:
            signal.raise_signal(signal.SIGINT)


# -- and back ----------------------------------------------------------------------------------------------------------


def unprocess(tree: ComponentTree, checkpoint: str | os.PathLike[str] | None = None) -> None:
    """Put the original weights back, in place; ties that processing undid are tied again.

    Args:
        tree: the model's components.
        checkpoint: folder with the safetensors files the model was loaded from; not needed after ``keep_originals``.

    Raises:
        WeightError: neither originals nor a checkpoint, or one that does not fit. Nothing was changed then.
    """
    record = record_of(tree)
    if record.originals is not None:
        source, tied = dict(record.originals), record.was_tied
    elif checkpoint is not None:
        source = read_checkpoint(checkpoint)
        tied = "lm_head.weight" not in source
    elif not any(record.done.values()):
        return
    else:
        raise WeightError(
            "The original weights were not kept: pass the folder of the checkpoint (unprocess_weights(folder)), or process "
            "with keep_originals=True."
        )
    places = {path: _parameter(tree.root, path) for path in source}
    for path, value in source.items():
        place = places.get(path)
        if place is None or place.shape != value.shape:
            found = "no such parameter" if place is None else f"shape {tuple(place.shape)}"
            raise WeightError(f"{path} {tuple(value.shape)} of the original weights does not fit the model: {found}.")
    if checkpoint is not None and record.originals is None:
        lacking = [path for path, _ in plain_parameters(tree) if path not in source and not path.startswith("lm_head.")]
        if lacking:
            raise WeightError(
                f"{os.fspath(checkpoint)} lacks {lacking[0]} and {len(lacking) - 1} more of the model's weights."
            )
    head = cast(nn.Linear, tree.components["unembed"].module)
    with undisturbed(), torch.no_grad():
        for path, value in source.items():
            cast(nn.Parameter, places[path]).detach().copy_(value)
        if "lm_head.bias" not in source:
            head.register_parameter("bias", None)
        if tied:
            head.weight = cast(nn.Parameter, tree.components["embed"].module.weight)
            _say_tied(tree, True)
        record.clear()


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files by the names a ``BloomForCausalLM`` has; lazily mapped, not copied.

    Raises:
        WeightError: no such files.
    """
    from safetensors.torch import load_file

    names = (
        sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")) if os.path.isdir(folder) else []
    )
    if not names:
        raise WeightError(f"{os.fspath(folder)} is not a folder with .safetensors files.")
    tensors: dict[str, Tensor] = {}
    for name in names:
        for key, value in load_file(os.path.join(os.fspath(folder), name)).items():
            tensors[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = value
    return tensors


def portable_state(tree: ComponentTree) -> dict[str, Tensor] | None:
    """A state dict that Hugging Face loads without loss, or ``None`` where the model's own is one.

    ``lm_head.bias`` is a key that ``from_pretrained`` drops. Its home in a checkpoint is the final norm's bias. Folded
    rows ``w_v`` sum to zero, so with ``ln_f.bias = t`` throughout and ``b_v / (t d_model)`` added to every number of row
    ``v``, the row gives ``b_v`` for the norm's bias, and for the normalised input, whose mean is zero, what it gave
    before. No gain is divided by, so a gain of 0 is no obstacle, and an edited ``W_U`` or ``b_U`` is written as it is. ``t``
    is the power of two that keeps what is added no larger than the table.
    """
    head = cast(nn.Linear, tree.components["unembed"].module)
    if _bias_of(head) is None:
        return None
    norm = cast(nn.LayerNorm, tree.components["ln_final"].module)
    with torch.no_grad():
        change = TableChange.of(head, norm, fold=True, centre=False)
        old = head.weight.detach()
        bias = cast(Tensor, change.bias(old, _bias_of(head))).to(working_dtype(old.dtype))
        size = float(torch.linalg.vector_norm(old, dtype=torch.float64)) / old.numel() ** 0.5
        level = float(bias.square().mean().sqrt()) / old.shape[1]
        t = _power_of_two(level / size) if size > 0 and level > 0 else 1.0
        table = torch.empty_like(old)
        per_row = bias / (t * old.shape[1])
        for rows, place, added in zip(chunks(old), chunks(table), per_row.split(chunk_rows(old)), strict=True):
            place.copy_(change.rows(rows)[0] + added[:, None])
    state = {key: value for key, value in tree.root.state_dict().items() if key != "lm_head.bias"}
    return state | {
        "lm_head.weight": table,
        "transformer.ln_f.weight": torch.ones_like(norm.weight),
        "transformer.ln_f.bias": torch.full_like(norm.bias, t),
    }


def _power_of_two(value: float) -> float:
    """The power of two at or above ``value``, between 2^-10 and 2^10."""
    return float(2.0 ** min(10, max(-10, math.ceil(math.log2(value)))))
