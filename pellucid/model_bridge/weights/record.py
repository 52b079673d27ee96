"""What was done to a model's weights.

The record of a model is kept with its component tree, so bridges on one model share it and a copy has its own; it is held
against the weights when read, since a state dict may have been loaded over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import WeightError
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.generalized_components.weights import adapted
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.form import form_of, illegal_steps, is_identity
from pellucid.tables import BriefFields
from pellucid.weight_processing import BLOCK_STEPS, STEPS, BlockForm, Step

Unit: TypeAlias = str
"""``"unembed"``, ``"embed"`` or ``"blocks.{i}"``: what is changed in one go."""

CHUNK = 2**17
"""Numbers of a vocabulary-sized table that are worked on at a time: a chunk stays in the processor's cache."""


# -- what was done -----------------------------------------------------------------------------------------------------


@dataclass
class WeightsRecord:
    """What was done to a model's weights, kept with its component tree and copied with it."""

    done: dict[Unit, frozenset[Step]] = field(default_factory=dict)
    on_access: bool = False
    """The final norm's gain is where it was; ``W_U`` and ``b_U`` are folded when asked for (``keep_tied``)."""
    damaged: Unit | None = None
    """A table whose rewriting failed half-way and could not be put back."""
    originals: dict[str, Tensor] | None = None
    """Copies, on the CPU, of parameters as they were before the first change."""
    was_tied: bool = False

    def clear(self) -> None:
        """Nothing was done: the weights have been replaced."""
        self.done, self.on_access, self.damaged = {}, False, None
        self.originals, self.was_tied = None, False


@dataclass(frozen=True, repr=False)
class WeightsState(BriefFields):
    """How far a model's weights are processed; ``bridge.weights_state``.

    Attributes:
        done: for each unit (``"unembed"``, ``"embed"``, ``"blocks.0"`` ...) the steps applied to it.
        final_norm_on_access: ``keep_tied``: ``ln_f`` keeps its gain, ``W_U`` and ``b_U`` are folded when asked for.
        has_originals: ``unprocess_weights()`` can restore the model without its checkpoint.
        damaged: the unit that could not be finished or put back, ``None`` in a sound model.
        left_out: steps that would change what this model computes, each with its reason.
    """

    done: Mapping[Unit, frozenset[Step]]
    final_norm_on_access: bool = False
    has_originals: bool = False
    damaged: Unit | None = None
    left_out: Mapping[Step, str] = field(default_factory=dict)

    @property
    def complete(self) -> frozenset[Step]:
        """Steps applied to every unit that they concern."""
        return frozenset(
            step
            for step in STEPS
            if step not in self.left_out
            and all(step in done for unit, done in self.done.items() if step in concerns(unit))
        )

    @property
    def partial(self) -> frozenset[Step]:
        """Steps that an interrupted call applied to some units only."""
        return frozenset(step for done in self.done.values() for step in done) - self.complete

    @property
    def is_processed(self) -> bool:
        """Whether anything was applied anywhere."""
        return any(self.done.values())

    def __str__(self) -> str:
        if not self.is_processed and self.damaged is None:
            return "weights as loaded"
        lines = []
        for step in STEPS:
            if step in self.left_out:
                lines.append(f"{step:<32}not for this model: {self.left_out[step]}")
                continue
            units = [unit for unit in self.done if step in concerns(unit)]
            count = sum(step in self.done[unit] for unit in units)
            word = "done" if count == len(units) else "not done" if count == 0 else f"{count} of {len(units)} units"
            note = "; final norm folded on access" if step == "fold_ln" and self.final_norm_on_access else ""
            lines.append(f"{step:<32}{word}{note}")
        if self.damaged is not None:
            lines.append(f"{self.damaged} could not be finished: load the model again")
        return "\n".join(lines)


def units_of(cfg: TransformerBridgeConfig) -> list[Unit]:
    """All units, in the order in which they are processed."""
    return ["unembed", "embed", *(f"blocks.{layer}" for layer in range(cfg.n_layers))]


def concerns(unit: Unit) -> frozenset[Step]:
    """The steps that change a unit."""
    if unit == "unembed":
        return frozenset({"fold_ln", "center_unembed"})
    return frozenset({"center_writing_weights"}) if unit == "embed" else BLOCK_STEPS


def record_of(tree: ComponentTree) -> WeightsRecord:
    """The record of a model, made when first asked for."""
    record = tree.notes.setdefault("weights", WeightsRecord())
    assert isinstance(record, WeightsRecord)
    return record


def state_of(tree: ComponentTree) -> WeightsState:
    """A snapshot of the record, held against the weights."""
    record = record_of(tree)
    done = {unit: steps_still_valid(tree, unit) for unit in units_of(tree.cfg)}
    return WeightsState(done, record.on_access, record.originals is not None, record.damaged, illegal_steps(tree))


def steps_still_valid(tree: ComponentTree, unit: Unit) -> frozenset[Step]:
    """What the record says of a unit, unless its weights have been replaced since (a state dict loaded, training).

    Vectors tell, at no cost: a folded norm has gain 1 and bias 0, a centred bias has mean 0, a folded value bias is 0, the
    norm of a centred embedding has one gain and no bias, or its first rows have mean 0 where no norm follows. Where one of
    these no longer holds, no step is valid any more.
    """
    record = record_of(tree)
    done = record.done.get(unit, frozenset())
    after_embedding = "embed_ln" if "embed_ln" in tree.components else "embed"
    witness = tree.components[{"unembed": "ln_final", "embed": after_embedding}.get(unit, unit)]
    if not done or any(parameter.is_meta for parameter in witness.module.parameters()):
        return done  # offloaded since: there is nothing to look at
    if unit == "unembed":
        holds = "fold_ln" not in done or record.on_access or is_identity(witness)
    elif unit == "embed" and after_embedding == "embed":
        holds = all(is_centred(row) for row in cast(Tensor, witness.module.weight)[:8])
    elif unit == "embed":
        gain, shift = cast(Tensor, witness.module.weight), cast(Tensor, witness.module.bias)
        holds = bool((gain == gain[0]).all()) and not bool(shift.any())
    else:
        try:
            holds = _block_holds(witness, done, form_of(tree, witness))
        except WeightError:  # pruned or quantised since
            holds = False
    return done if holds else frozenset()


def _block_holds(block: GeneralizedComponent, done: frozenset[Step], form: BlockForm) -> bool:
    attention, mlp = cast(Any, block.submodules["attn"]), cast(Any, block.submodules["mlp"])
    if "fold_ln" in done and not all(is_identity(block.submodules[norm]) for norm in form.readers):
        return False
    if done & {"fold_value_biases", "refactor_factored_attn_matrices"} and bool(attention.b_V.any()):
        return False
    return "center_writing_weights" not in done or all(is_centred(bias) for bias in (attention.b_O, mlp.b_out))


def is_centred(vector: Tensor) -> bool:
    """Whether a vector has mean zero, up to the rounding of its own numbers."""
    wide = vector.detach().double()
    return bool(wide.mean().abs() <= torch.finfo(vector.dtype).eps * wide.abs().max())


def is_tied(tree: ComponentTree) -> bool:
    """Whether embedding and unembedding are one storage."""
    modules = (adapted(tree.components[name].module) for name in ("embed", "unembed"))
    embedding, head = (module._parameters.get("weight") for module in modules)
    if head is None or embedding is None:  # quantised or parametrised: whatever they are, they are not one parameter
        return False
    if head is embedding:
        return True
    return not head.is_meta and not embedding.is_meta and head.data_ptr() == embedding.data_ptr()


def chunks(table: Tensor) -> Iterator[Tensor]:
    """A tensor in views of rows, each of about :data:`CHUNK` numbers."""
    if table.dim() < 2:
        yield table
    else:
        yield from table.split(chunk_rows(table))


def chunk_rows(table: Tensor) -> int:
    """How many rows :func:`chunks` takes at a time."""
    return max(1, CHUNK // table.shape[-1])


def parameter_at(root: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter of that dotted name, if there is one."""
    owner, _, name = path.rpartition(".")
    try:
        return root.get_submodule(owner)._parameters.get(name)
    except AttributeError:  # there is no such module
        return None
