"""Lists of neurons, and what can be done to them: silenced, forced, scaled, shifted, in forward runs and in generation.

A neuron is ``(layer, index)``. What an index means is said by a place: a hook of a block, ``mlp.hook_post`` (after the
activation, the neurons of arXiv 2402.16438) unless told otherwise. At places with heads (``attn.hook_q``) it is ``head *
d_head + dim``.

A change that changes nothing is an error by default: published work has silenced a copy of the neurons, found no effect,
and reported that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_kind, check_list, check_number, check_text, check_wholes
from pellucid.dtypes import cast
from pellucid.errors import InputError, NoEffectError, UnsupportedModelError
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.hooking.hooks import HookRequest
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.tables import BriefFields

Neuron: TypeAlias = tuple[int, int]
"""``(layer, index)``, both from 0."""

RandomMatch: TypeAlias = Literal["uniform", "layer"]
Change: TypeAlias = Literal["set", "scale", "add"]

NEURONS = "mlp.hook_post"
"""What goes into the MLP's last projection, ``blocks.{layer}.mlp.hook_post``: after the activation (GELU), in a gated MLP
the activated gate times what it gates."""


def activity_place(bridge: TransformerBridge) -> str:
    """The place of a block whose values are above zero where a neuron is active.

    ``mlp.hook_post`` after GELU. In a gated MLP the neuron is ``act(gate) * up``, whose sign is the product's; it is active
    where the activated gate is above zero, as the published procedure counts it for Llama. SiLU and GELU are above
    zero where what they are given is: ``mlp.hook_pre``.
    """
    return "mlp.hook_pre" if bridge.cfg.gated_mlp else NEURONS


def refuse_without_neurons(bridge: TransformerBridge) -> None:
    """Refuse a model whose MLP has no neurons at every position.

    Raises:
        UnsupportedModelError: it has experts.
    """
    if f"blocks.0.{NEURONS}" not in bridge.hook_index:
        raise UnsupportedModelError(
            f"{bridge.adapter.family.title} has experts: a router sends each token to a few of them, so no neuron is there "
            "at every token, and none can be compared over languages. Take a model without experts."
        )


def activity_words(bridge: TransformerBridge) -> str:
    """In words, where a neuron of the model is active."""
    if bridge.cfg.gated_mlp:
        return f"{bridge.cfg.act_fn}(gate) > 0, before it is multiplied by what it gates: {activity_place(bridge)} > 0"
    return f"{bridge.cfg.act_fn}(pre) > 0: {activity_place(bridge)} > 0"


def place_of(bridge: TransformerBridge, place: str, layer: int = 0) -> HookSpec:
    """The hook point of a place in a block, whose axes after ``batch`` and ``pos`` count units.

    Args:
        bridge: the model.
        place: name of a hook within a block: ``mlp.hook_pre``, ``mlp.hook_post``, ``attn.hook_q``, ``attn.hook_k``,
            ``attn.hook_v``, ``hook_attn_out``, ``hook_mlp_out``, ....
        layer: the block.

    Raises:
        HookNameError: no such hook.
        InputError: one without units at positions.
    """
    spec = bridge.hook_spec(f"blocks.{layer}.{check_text('place', place)}")
    if spec.axes[:2] != ("batch", "pos") or len(spec.axes) < 3:
        raise InputError(f"{spec.name} holds [{', '.join(spec.axes)}]: it has no units at positions, as {NEURONS} has.")
    return spec


def unit_shape(bridge: TransformerBridge, spec: HookSpec) -> tuple[int, ...]:
    """Sizes of the axes after ``batch`` and ``pos``: ``(d_mlp,)``, ``(d_model,)`` or ``(n_heads, d_head)``."""
    sizes = spec.sizes(bridge.cfg.sizes())
    return tuple(sizes[axis] for axis in spec.axes[2:])


@dataclass(frozen=True, repr=False)
class NeuronChange(BriefFields):
    """A change of listed neurons at every position of every run it is attached to.

    Made by :func:`zero`, :func:`force`, :func:`scale` or :func:`add`.

    Attributes:
        change: ``"set"`` to the value, ``"scale"`` by it, or ``"add"`` it.
        values: by neuron, the value.
        place: hook of the block that holds the neurons.
    """

    change: Change
    values: Mapping[Neuron, float]
    place: str = NEURONS

    @property
    def neurons(self) -> tuple[Neuron, ...]:
        """The neurons, sorted."""
        return tuple(sorted(self.values))

    def check(self, bridge: TransformerBridge) -> None:
        """Refuse neurons that the model does not have.

        Raises:
            InputError: naming one, with the range.
        """
        width = int(np.prod(unit_shape(bridge, place_of(bridge, self.place))))
        n_layers = bridge.cfg.n_layers
        for layer, index in self.neurons:
            if not 0 <= layer < n_layers:
                raise InputError(
                    f"There is no layer {layer} (neuron {index}): the model has layers 0 to {n_layers - 1}."
                )
            if not 0 <= index < width:
                raise InputError(
                    f"There is no neuron {index} in layer {layer}: {self.place} has {width} of them, 0 to {width - 1}."
                )

    def fwd_hooks(self, bridge: TransformerBridge) -> list[HookRequest]:
        """``(name, function)`` pairs for ``run_with_hooks`` and ``bridge.hooks``, one for each layer that has neurons.

        They only change; whether anything changed is checked by :meth:`on`, or by ``run_with_hooks(assert_effect=True)``.

        Raises:
            InputError: neurons that the model does not have.
        """
        return [(edit.name, edit) for edit in self.edits(bridge)]

    @contextmanager
    def on(self, bridge: TransformerBridge, assert_effect: bool = True) -> Iterator[TransformerBridge]:
        """Change the neurons in every run and generation of the block.

        Args:
            bridge: the model; it is what the block is given.
            assert_effect: raise at the end of the block if nothing was changed in any run.

        Raises:
            InputError: neurons that the model does not have; no neurons at all with ``assert_effect``.
            NoEffectError: see ``assert_effect``.
        """
        with changed(bridge, [self], assert_effect=assert_effect):
            yield bridge

    def edits(self, bridge: TransformerBridge) -> list[NeuronEdit]:
        """The change at each hook point, each noting whether it changed anything.

        Raises:
            InputError: neurons that the model does not have.
        """
        self.check(bridge)
        by_layer: dict[int, list[int]] = {}
        for layer, index in self.neurons:
            by_layer.setdefault(layer, []).append(index)
        edits = []
        for layer, indices in by_layer.items():
            spec = place_of(bridge, self.place, layer)
            values = torch.tensor([self.values[layer, index] for index in indices], dtype=torch.float64)
            where = np.unravel_index(np.array(indices), unit_shape(bridge, spec))
            edits.append(NeuronEdit(spec.name, self.change, tuple(torch.from_numpy(axis) for axis in where), values))
        return edits


@dataclass(repr=False)
class NeuronEdit(BriefFields):
    """The change at one hook point, as a hook function; notes whether it changed anything."""

    name: str
    change: Change
    where: tuple[Int[Tensor, "..."], ...]
    values: Float[Tensor, "..."]
    runs: int = 0
    changed: bool = False
    _ready: tuple[tuple[slice | Tensor, ...], Tensor] | None = field(default=None, repr=False)

    def __call__(self, activation: Float[Tensor, "batch pos ..."], hook: HookPoint) -> None:
        """Change ``[batch, pos, ...]`` in place."""
        where, values = self._prepared(activation)
        before = activation[where]
        if self.change == "set":
            after = values.expand_as(before)
        else:
            after = before * values if self.change == "scale" else before + values
        self.runs += 1
        # Asked by value (-0. is 0.), and only until it has happened once: on a GPU the question waits for the answer.
        self.changed = self.changed or not torch.equal(before, after)
        activation[where] = after

    def job_identity(self) -> dict[str, Any]:
        """All that its numbers depend on, as JSON, without what it notes (see `function_hash`)."""
        where = [axis.tolist() for axis in self.where]
        return {"change": self.change, "where": where, "values": self.values.tolist(), "dtype": str(self.values.dtype)}

    def _prepared(self, activation: Tensor) -> tuple[tuple[slice | Tensor, ...], Tensor]:
        ready = self._ready
        if ready is None or ready[1].device != activation.device or ready[1].dtype != activation.dtype:
            units = (axis.to(activation.device) for axis in self.where)
            ready = self._ready = (
                (slice(None), slice(None), *units),
                cast(self.values, activation.dtype, f"A value for the neurons of {self.name}", activation.device),
            )
        return ready


@contextmanager
def changed(
    bridge: TransformerBridge, changes: Sequence[NeuronChange], assert_effect: bool = True
) -> Iterator[TransformerBridge]:
    """Several changes together, such as of units at several places, in every run and generation of the block.

    Args:
        bridge: the model; it is what the block is given.
        changes: applied in this order where they meet.
        assert_effect: raise at the end of the block if nothing was changed in any run.

    Raises:
        HookNameError: a place that there is not.
        InputError: neurons that the model does not have; no neurons at all with ``assert_effect``.
        NoEffectError: see ``assert_effect``.
    """
    if isinstance(changes, NeuronChange):
        raise InputError("changes is a list of changes; found one. Give [change], or use change.on(bridge).")
    edits = [
        edit
        for change in check_list("changes", changes, "changes (zero, force, scale, add)", empty=True)
        for edit in check_kind("an entry of changes", change, NeuronChange, "a change of neurons").edits(bridge)
    ]
    if assert_effect and not edits:
        raise InputError(
            "The list of neurons is empty: the change would change nothing. Give neurons, or assert_effect=False."
        )
    with bridge.hooks(fwd_hooks=[(edit.name, edit) for edit in edits]):
        yield bridge
    if assert_effect:
        refuse_no_effect(edits)


def refuse_no_effect(edits: Sequence[NeuronEdit], whose: str = "the neurons given") -> None:
    """Raise if none of the edits ever changed anything.

    Raises:
        NoEffectError: so it is.
    """
    if any(edit.changed for edit in edits):
        return
    found = (
        "ran, and every one of them already had the value it was to be given"
        if any(edit.runs for edit in edits)
        else "never ran: nothing was run in the block, or it stopped before their layers"
    )
    where = ", ".join(edit.name for edit in edits)
    raise NoEffectError(
        f"The change of {whose} (at {where}) {found}. If that is what you expect, pass assert_effect=False."
    )


def zero(neurons: Iterable[Neuron], place: str = NEURONS) -> NeuronChange:
    """Silence neurons: set them to 0, as arXiv 2402.16438 does."""
    return force(neurons, 0.0, place)


def force(
    neurons: Iterable[Neuron], values: float | Sequence[float] | Mapping[Neuron, float], place: str = NEURONS
) -> NeuronChange:
    """Hold neurons at values, such as their medians on text of a language (arXiv 2404.02431).

    Args:
        neurons: as (layer, index).
        values: one for all, one for each in order, or by neuron.
        place: see :func:`place_of`.

    Raises:
        InputError: another number of values, one that is not finite, or two values for one neuron.
    """
    return _change("set", neurons, values, place)


def scale(
    neurons: Iterable[Neuron], factors: float | Sequence[float] | Mapping[Neuron, float], place: str = NEURONS
) -> NeuronChange:
    """Multiply neurons by factors; arguments and errors as :func:`force`."""
    return _change("scale", neurons, factors, place)


def add(
    neurons: Iterable[Neuron], amounts: float | Sequence[float] | Mapping[Neuron, float], place: str = NEURONS
) -> NeuronChange:
    """Add amounts to neurons; arguments and errors as :func:`force`."""
    return _change("add", neurons, amounts, place)


def _change(
    change: Change, neurons: Iterable[Neuron], values: float | Sequence[float] | Mapping[Neuron, float], place: str
) -> NeuronChange:
    check_text("place", place)
    listed = as_neurons(neurons)
    argument = {"set": "values", "scale": "factors", "add": "amounts"}[change]
    if isinstance(values, Mapping):
        missing = [neuron for neuron in listed if neuron not in values]
        if missing:
            raise InputError(f"{argument} has no value for neuron {missing[0]}.")
        given = [check_number(f"an entry of {argument}", values[neuron]) for neuron in listed]
    elif isinstance(values, Real):
        given = [check_number(argument, values)] * len(listed)
    else:
        numbers: Any = values
        numbers = numbers.tolist() if isinstance(numbers, Tensor | np.ndarray) else numbers
        listed_values = check_list(argument, numbers, "numbers", empty=True)
        given = [check_number(f"an entry of {argument}", value) for value in listed_values]
        if len(given) != len(listed):
            raise InputError(
                f"There are {len(listed)} neurons and {len(given)} {argument}: give one value, or one for each."
            )
    chosen: dict[Neuron, float] = {}
    for neuron, value in zip(listed, given, strict=True):
        if chosen.setdefault(neuron, value) != value:
            raise InputError(f"Neuron {neuron} is listed twice, with the {argument} {chosen[neuron]} and {value}.")
    return NeuronChange(change, chosen, place)


def as_neurons(neurons: Iterable[Any]) -> list[Neuron]:
    """A list of (layer, index) pairs: pairs, rows of an array, or a mapping from layers to indices.

    Raises:
        InputError: an entry that is no pair of whole numbers.
    """
    entries: Any = neurons
    if isinstance(neurons, Mapping):
        entries = [
            (layer, index)
            for layer, indices in neurons.items()
            for index in check_list(f"neurons[{layer!r}]", indices, "indices", empty=True)
        ]
    elif isinstance(neurons, Tensor | np.ndarray):
        entries = neurons.tolist()
    listed: list[Neuron] = []
    for entry in check_list("neurons", entries, "(layer, index) pairs", empty=True):
        try:
            layer, index = entry
            pair = (int(layer), int(index))
            whole = pair == (layer, index) and not isinstance(layer, bool) and not isinstance(index, bool)
        except (TypeError, ValueError):
            raise InputError(f"neurons is a list of (layer, index) pairs; found {entry!r} in it.") from None
        if not whole:
            raise InputError(f"neurons is a list of pairs of whole numbers; found {entry!r} in it.")
        listed.append(pair)
    return listed


def random_neurons(
    neurons: Sequence[Neuron], n_layers: int, width: int, seed: Sequence[int] | int, match: RandomMatch = "uniform"
) -> tuple[Neuron, ...]:
    """As many different neurons as ``neurons`` has, drawn at random.

    Args:
        neurons: the set to be matched.
        n_layers: layers of the model.
        width: neurons of a layer.
        seed: of NumPy's generator.
        match: ``"uniform"`` draws among all neurons of the model, ``"layer"`` within each layer as many as it has in
            ``neurons``.

    Returns:
        (layer, index) pairs, sorted.

    Raises:
        InputError: another ``match``; neurons that so many layers of that width do not have.
    """
    check_choice("match", match, ("uniform", "layer"))
    check_count("n_layers", n_layers)
    check_count("width", width)
    several: Any = seed
    if isinstance(several, str) or not isinstance(several, Sequence):
        check_count("seed", seed, at_least=0)
    else:
        check_wholes("seed", seed)
    listed = sorted(set(as_neurons(neurons)))
    for layer, index in listed:
        if not (0 <= layer < n_layers and 0 <= index < width):
            raise InputError(f"neurons has {(layer, index)}; there are {n_layers} layers of {width} neurons, from 0.")
    generator = np.random.default_rng(seed)
    if match == "uniform":
        drawn = generator.choice(n_layers * width, size=len(listed), replace=False)
        return tuple(sorted((int(flat) // width, int(flat) % width) for flat in drawn))
    sizes = np.bincount([layer for layer, _ in listed], minlength=n_layers) if listed else np.zeros(n_layers, int)
    return tuple(
        (layer, int(index))
        for layer, size in enumerate(sizes.tolist())
        for index in np.sort(generator.choice(width, size=size, replace=False))
    )
