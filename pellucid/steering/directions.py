"""Vectors that were measured of a model, or given to one: what they are of, and which model.

A :class:`Direction` holds one vector for each of some layers, a :class:`Samples` several of them. Both carry an
:class:`Origin`: the activation that they belong to, the layers, what made them, and the model, known by the hash of its
weights. A vector of one model means nothing in another of equal sizes, and nothing would show it: the edit runs, and does
something. So it is refused, unless :meth:`Direction.for_model` says that it is meant.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pellucid.arguments import check_kind, check_list, check_text
from pellucid.axes import Index
from pellucid.dtypes import widened
from pellucid.errors import InputError, WeightError
from pellucid.experiments.places import find_site
from pellucid.model_bridge.corpus.job_identity import weight_marks
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.steering import files
from pellucid.storage.json_text import Json
from pellucid.sweep.edits import indices
from pellucid.tables import BriefFields


@dataclass(frozen=True)
class ModelIdentity:
    """Which model vectors are of.

    Attributes:
        name: as it was opened.
        d_model: width of its residual stream.
        n_layers: its blocks.
        weights: SHA-256 over every parameter and buffer (``bridge.weights_hash()``); ``None`` where they are not in memory.
    """

    name: str
    d_model: int
    n_layers: int
    weights: str | None = None

    def __str__(self) -> str:
        shown = "weights unknown" if self.weights is None else f"weights {self.weights[:12]}"
        return f"{self.name} ({self.n_layers} layers, d_model {self.d_model}, {shown})"


_HASHES: WeakKeyDictionary[nn.Module, tuple[object, str | None]] = WeakKeyDictionary()
"""Of models whose weights were hashed, the places and versions of their weights then, and the hash."""


def model_identity(bridge: TransformerBridge) -> ModelIdentity:
    """Which model a bridge is around. Its weights are hashed once, and again when they were written to."""
    cfg, model, marks = bridge.cfg, bridge.hf_model, weight_marks(bridge)
    known = _HASHES.get(model)
    if known is None or known[0] != marks:
        try:
            found: str | None = bridge.weights_hash()
        except WeightError:  # offloaded
            found = None
        known = _HASHES[model] = (marks, found)
    # Of a folder, its name: where it lies on this machine is nobody else's business.
    name = os.path.basename(cfg.model_name.rstrip("/")) if os.path.isabs(cfg.model_name) else cfg.model_name
    return ModelIdentity(name, cfg.d_model, cfg.n_layers, known[1])


@dataclass(frozen=True)
class Origin:
    """What vectors are of.

    Attributes:
        site: hook name within a block (``hook_resid_post``, ``attn.hook_z``), or a whole one outside the blocks.
        axes: axis words of one vector: ``("d_model",)``, ``("n_heads", "d_head")``.
        layers: the block of each vector; ``None`` outside the blocks, where there is one vector.
        model: ``None`` for vectors that are tied to no model; their sizes are checked all the same.
        name: what to call them.
        made_by: the function that made them, and its arguments, as JSON.
    """

    site: str
    axes: tuple[str, ...]
    layers: tuple[int, ...] | None
    model: ModelIdentity | None = None
    name: str = ""
    made_by: Mapping[str, Json] = field(default_factory=dict)

    def specs(self, bridge: TransformerBridge) -> dict[int | None, HookSpec]:
        """Its hook points by layer."""
        return dict(find_site(bridge, self.site, self.layers).specs)

    def check_model(self, bridge: TransformerBridge) -> None:
        """Refuse another model than the vectors are of.

        Raises:
            InputError: naming both.
        """
        if self.model is None:
            return
        here = model_identity(bridge)
        sizes = (self.model.d_model, self.model.n_layers) != (here.d_model, here.n_layers)
        known = self.model.weights is not None and here.weights is not None
        if sizes or (known and self.model.weights != here.weights):
            what = f"The direction {self.name!r}" if self.name else f"A direction at {self.site}"
            advice = "Make it anew of this model."
            if not sizes:
                advice += (
                    " If this is the same model in another dtype, or a fine-tuned copy, and you mean it: "
                    "direction.for_model(bridge)."
                )
            raise InputError(f"{what} is of another model: it was made of {self.model}, and this is {here}. {advice}")


@dataclass(frozen=True, eq=False, repr=False)
class Direction(BriefFields):
    """A vector for each of some layers.

    Made by :func:`~pellucid.steering.difference_of_means`, :func:`~pellucid.steering.contrast_pairs`,
    :func:`~pellucid.steering.mean_activation`, or from vectors of your own by :func:`direction_of`.

    Attributes:
        vectors: ``[layer, *features]`` floating point, finite; it may need gradients.
        origin: what they are of.
    """

    vectors: Float[Tensor, " layer *features"]
    origin: Origin

    def __post_init__(self) -> None:
        _check_vectors("vectors", self.vectors, self.origin, 1)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The block of each vector."""
        return self.origin.layers

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """``[layer]`` float64: the length of each vector."""
        norms: Tensor = torch.linalg.vector_norm(self.vectors.detach().double().flatten(1), dim=1)
        return norms

    def at(self, layer: int | None = None) -> Float[Tensor, "*features"]:
        """``[*features]``: the vector of a layer; of the only one if there is one.

        Raises:
            InputError: a layer that it has none of.
        """
        layers = self.origin.layers
        if layers is None or (layer is None and len(layers) == 1):
            return self.vectors[0]
        if layer not in layers:
            raise InputError(f"The direction has vectors of the layers {list(layers)}; layer {layer} was asked for.")
        return self.vectors[layers.index(layer)]

    def only(self, layers: int | Sequence[int]) -> Direction:
        """The direction of some of its layers.

        Raises:
            InputError: a layer that it has none of.
        """
        if self.origin.layers is None:
            raise InputError(f"The direction is of {self.origin.site}, outside the blocks: it has no layers to choose.")
        chosen = [layers] if isinstance(layers, int) else check_list("layers", layers, "layers")
        vectors = torch.stack([self.at(layer) for layer in chosen])
        return Direction(vectors, dataclasses.replace(self.origin, layers=tuple(chosen)))

    def unit(self) -> Direction:
        """The same with every vector of length 1 (all its features taken as one vector).

        Raises:
            InputError: a vector of zeros.
        """
        norms = self.vectors.double().flatten(1).norm(dim=1)
        if bool((norms == 0).any()):
            raise InputError(f"A vector of the direction {self.origin.name!r} is zero: it points nowhere.")
        shaped = norms.view([-1] + [1] * (self.vectors.dim() - 1))
        return Direction((self.vectors.double() / shaped).to(self.vectors.dtype), self.origin)

    def __neg__(self) -> Direction:
        return Direction(-self.vectors, self.origin)

    def for_model(self, bridge: TransformerBridge) -> Direction:
        """The same vectors, said to be of this model: for one that you know to be a copy, in another dtype or fine-tuned.

        Raises:
            InputError: a model of other widths or layers.
        """
        return Direction(self.vectors, _of_this(bridge, self.origin, self.vectors.shape[1:]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``vectors``, and the origin as JSON in its one metadata key.

        Raises:
            InputError: a path that does not end in ``.safetensors``.
            StorageFullError: no space is left.
        """
        files.write(path, "direction", {"origin": dataclasses.asdict(self.origin)}, {"vectors": self.vectors})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing, damaged, or of something else.
        """
        tensors, found = files.read(path, "direction")
        with files.damage(path):
            return cls(tensors["vectors"], _origin_of_json(found["origin"]))


@dataclass(frozen=True, eq=False, repr=False)
class Samples(BriefFields):
    """Activations that were kept, several of each layer: what :class:`~pellucid.steering.Resample` takes from.

    Made by :func:`~pellucid.steering.sample_activations`.

    Attributes:
        values: ``[layer, sample, *features]`` floating point, finite.
        origin: what they are of.
    """

    values: Float[Tensor, "layer sample *features"]
    origin: Origin

    def __post_init__(self) -> None:
        _check_vectors("values", self.values, self.origin, 2)

    def at(self, layer: int | None = None) -> Float[Tensor, " sample *features"]:
        """``[sample, *features]``: those of a layer."""
        layers = self.origin.layers
        if layers is None or (layer is None and len(layers) == 1):
            return self.values[0]
        if layer not in layers:
            raise InputError(f"There are samples of the layers {list(layers)}; layer {layer} was asked for.")
        return self.values[layers.index(layer)]

    def for_model(self, bridge: TransformerBridge) -> Samples:
        """See :meth:`Direction.for_model`."""
        return Samples(self.values, _of_this(bridge, self.origin, self.values.shape[2:]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`Direction.save`; the tensor is called ``values``."""
        files.write(path, "samples", {"origin": dataclasses.asdict(self.origin)}, {"values": self.values})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Samples:
        """See :meth:`Direction.load`."""
        tensors, found = files.read(path, "samples")
        with files.damage(path):
            return cls(tensors["values"], _origin_of_json(found["origin"]))


def _check_vectors(argument: str, vectors: Any, origin: Any, before: int) -> None:
    check_kind("origin", origin, Origin, "an Origin")
    check_kind(argument, vectors, Tensor, "a tensor")
    words = ("layer", "sample")[:before] + tuple(origin.axes)
    if not vectors.is_floating_point():
        raise InputError(f"{argument} [{', '.join(words)}] is a floating-point tensor; found {vectors.dtype}.")
    if vectors.dim() != len(words):
        raise InputError(f"{argument} has the axes [{', '.join(words)}]; found shape {tuple(vectors.shape)}.")
    count = 1 if origin.layers is None else len(origin.layers)
    if vectors.shape[0] != count:
        raise InputError(f"{argument} has {vectors.shape[0]} layers; its origin names {count}.")
    if vectors.numel() == 0:
        raise InputError(f"{argument} is empty: shape {tuple(vectors.shape)}.")
    refuse_not_finite(argument, vectors)


def refuse_not_finite(what: str, vectors: Float[Tensor, "..."]) -> None:
    """Refuse numbers that are none.

    Raises:
        InputError: NaN or infinite.
    """
    wrong = ~vectors.detach().isfinite()
    if bool(wrong.any()):
        kind = "NaN" if bool(vectors.detach().isnan().any()) else "infinite"
        raise InputError(f"{what}: {int(wrong.sum())} of {vectors.numel()} numbers are {kind}.")


def features_of(bridge: TransformerBridge, spec: HookSpec) -> dict[str, int]:
    """The axes of a hook's tensor at one position, and their sizes.

    Raises:
        InputError: a point that has no vectors of features: token ids, scores, patterns.
    """
    if spec.kind == "int" or spec.axes[:2] != ("batch", "pos") or len(spec.axes) < 3:
        raise InputError(
            f"{spec.name} holds [{', '.join(spec.axes)}]: it has no vector of features at a position, as "
            "hook_resid_post has."
        )
    sizes = spec.sizes(bridge.cfg.sizes())
    return {axis: sizes[axis] for axis in spec.axes[2:]}


def site_of(spec: HookSpec) -> str:
    """The name of a hook without its block."""
    return spec.name if spec.layer is None else spec.name.removeprefix(f"blocks.{spec.layer}.")


def _of_this(bridge: TransformerBridge, origin: Origin, shape: Sequence[int]) -> Origin:
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    check_width(bridge, origin, shape, next(iter(origin.specs(bridge).values())))
    return dataclasses.replace(origin, model=model_identity(bridge))


def check_width(bridge: TransformerBridge, origin: Origin, shape: Sequence[int], spec: HookSpec) -> None:
    """Refuse vectors that are no activations of a point.

    Raises:
        InputError: other axes or sizes.
    """
    features = features_of(bridge, spec)
    if tuple(features) != origin.axes or tuple(features.values()) != tuple(shape):
        wanted = ", ".join(f"{axis} {size}" for axis, size in features.items())
        found = ", ".join(f"{axis} {size}" for axis, size in zip(origin.axes, shape, strict=True))
        raise InputError(
            f"The vectors are of {origin.site}, [{found}] at a position; {spec.name} of {bridge.cfg.model_name} has "
            f"[{wanted}]."
        )


def direction_of(
    bridge: TransformerBridge,
    vectors: Float[Tensor, "*features"] | Float[Tensor, " layer *features"],
    at: str = "resid_post",
    layers: Index = None,
    name: str = "",
) -> Direction:
    """A direction of vectors that you have: a probe's, a lens', a column of a weight, a feature of an autoencoder.

    Args:
        bridge: the model that they are of.
        vectors: ``[*features]``, one for all layers asked for, or ``[layer, *features]``, one for each.
        at: the activation: ``resid_post``, ``z``, ``mlp_post``, ..., see :mod:`pellucid.experiments.places`.
        layers: which; by default all.
        name: what to call it.

    Raises:
        InputError: other sizes than the model has, another number of vectors, or not finite.
        HookNameError: no such site.
    """
    check_kind("vectors", vectors, Tensor, "a tensor")
    if not vectors.is_floating_point():
        raise InputError(f"vectors is a floating-point tensor; found {vectors.dtype}.")
    check_kind("name", name, str, "a string")
    specs = find_site(bridge, check_text("at", at), layers).specs
    first = next(iter(specs.values()))
    features = features_of(bridge, first)
    words, sizes = ", ".join(features), tuple(features.values())
    count = len(specs)
    if tuple(vectors.shape) == sizes:
        vectors = vectors.expand(count, *sizes)
    elif tuple(vectors.shape) != (count, *sizes):
        raise InputError(
            f"vectors are [{words}] = {sizes}, or one for each of {count} layers, {(count, *sizes)}; found shape "
            f"{tuple(vectors.shape)}."
        )
    elif first.layer is not None:  # one for each layer, in the order in which the layers were asked for
        asked = indices(layers, bridge.cfg.n_layers, "layers")
        vectors = vectors[sorted(range(count), key=asked.__getitem__)]
    of = None if first.layer is None else tuple(layer for layer in specs if layer is not None)
    made: dict[str, Json] = {"by": "direction_of"}
    origin = Origin(site_of(first), tuple(features), of, model_identity(bridge), name, made)
    return Direction(widened(vectors), origin)


# -- files -------------------------------------------------------------------------------------------------------------


def vector_to_json(
    vector: Direction | Samples | Float[Tensor, "..."], tensors: dict[str, Float[Tensor, "..."]], name: str
) -> dict[str, Json]:
    """Vectors as JSON: what they are and their origin; the numbers go into ``tensors`` under ``name``."""
    if isinstance(vector, Tensor):
        tensors[name] = vector
        return {"is": "tensor", "tensor": name}
    is_direction = isinstance(vector, Direction)
    tensors[name] = vector.vectors if isinstance(vector, Direction) else vector.values
    return {
        "is": "direction" if is_direction else "samples",
        "tensor": name,
        "origin": dataclasses.asdict(vector.origin),
    }


def vector_of_json(
    found: Mapping[str, Any], tensors: Mapping[str, Float[Tensor, "..."]]
) -> Direction | Samples | Float[Tensor, "..."]:
    """The inverse of :func:`vector_to_json`."""
    tensor = tensors[found["tensor"]]
    if found["is"] == "tensor":
        return tensor
    made = Direction if found["is"] == "direction" else Samples
    return made(tensor, _origin_of_json(found["origin"]))


def _origin_of_json(found: Mapping[str, Any]) -> Origin:
    layers, model = found["layers"], found["model"]
    return Origin(
        found["site"],
        tuple(found["axes"]),
        None if layers is None else tuple(layers),
        None if model is None else ModelIdentity(**model),
        found["name"],
        found["made_by"],
    )
