"""The two ends of every edge in a run: what each part writes to the stream, and what flows back to each input that reads it.

No input is split and no head's result is asked of the model: both ends come from what every family has.

* A head writes its ``z`` through its slice of ``W_O``, times the block's factor (Granite), through the norm after the branch
  with the scale of that run (Gemma 2, OLMo 2): the heads' shares sum to what the branch adds, biases apart.
* To the input of a head's queries flows the gradient at ``hook_q``, back through ``W_Q`` and through the block's norm at
  that run. Keys and values are taken by their own heads: the gradient there is a sum over the queries of the group already.
* To an MLP's input flows what the stream's gradient gains across it: in front of a branch it is what it is behind it, and
  what flows back through the branch. That holds for any MLP: experts, with or without a norm before or after.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.circuits.wiring import Wiring
from pellucid.conversion_utils.fused_qkv import PARTS, Part
from pellucid.decomposition.stream import Frozen, Norm
from pellucid.dtypes import widened
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.paths import Stream
from pellucid.model_bridge.hooking.hooks import refuse_reshaped
from pellucid.model_bridge.transformer_bridge import TransformerBridge


def wiring_of(bridge: TransformerBridge) -> Wiring:
    """The edges of a model.

    Raises:
        UnsupportedModelError: its residual stream is not the sum of what its parts add.
    """
    cfg, family = bridge.cfg, bridge.adapter.family
    if cfg.apply_residual_connection_post_layernorm:
        raise UnsupportedModelError(
            "An edge needs a residual stream that is the sum of what its parts add. This model continues the stream from "
            "each norm's output (apply_residual_connection_post_layernorm), where what a part adds is rescaled on the way."
        )
    for layer in range(cfg.n_layers):
        if bridge.stream.norm_after(layer, "attn") is not None and bridge.stream.bias(layer, "attn") is not None:
            raise UnsupportedModelError(
                f"{family.title} norms what the heads of layer {layer} and their bias b_O give together: the bias's part "
                "differs between runs and is no head's, so that edges from heads would not sum to what attention adds."
            )
    return Wiring(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, family.block.parallel)


def refuse_functions(bridge: TransformerBridge) -> None:
    """Refuse functions on points between the stream and a projection, which a gradient is pulled back past.

    Raises:
        InputError: with the point; a point that is shown in another shape.
    """
    refuse_reshaped(bridge.hook_points(), "A circuit")
    for handle in bridge.live_hooks():
        name = str(handle.name)
        spec = bridge.hook_spec(name)
        between = spec.name.endswith((".hook_in", "_input")) and ".attn." in f"{spec.name}.attn."
        if spec.name.startswith("blocks.") and (".ln1.hook_" in spec.name or between):
            raise InputError(
                f"A function is on {name}, between the residual stream and a projection that an edge leads to: remove it "
                "first (bridge.reset_hooks())."
            )


class Ends:
    """Both ends of a model's edges.

    Weights that have to be asked of a module by running it (adapters, quantised ones) are asked once.

    Args:
        bridge: the model.
        wiring: its edges.
    """

    def __init__(self, bridge: TransformerBridge, wiring: Wiring) -> None:
        self.bridge, self.wiring = bridge, wiring
        self.stream = Stream(wiring.n_layers, wiring.parallel)
        self._writing: dict[int, Tensor] = {}
        self._reading: dict[int, Mapping[Part, Tensor]] = {}

    def _name(self, name: str) -> str:
        return self.bridge.hook_spec(name).name

    # -- what parts write ----------------------------------------------------------------------------------------------

    @property
    def writing_hooks(self) -> list[str]:
        """The points that :meth:`differences` reads, by canonical name."""
        names = ["hook_embed"]
        for layer in range(self.wiring.n_layers):
            names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
            names += [f"blocks.{layer}.ln1_post.hook_scale"] if self.norm_after(layer) is not None else []
        return [self._name(name) for name in names]

    def norm_after(self, layer: int) -> Norm | None:
        """The norm between the heads and the stream."""
        return self.bridge.stream.norm_after(layer, "attn")

    def heads(
        self, layer: int, z: Float[Tensor, "row pos head d_head"], scale: Float[Tensor, "row pos 1"] | None
    ) -> Float[Tensor, "row head pos d_model"]:
        """What each head of a layer writes, ``[row, head, pos, d_model]``.

        Args:
            layer: the layer.
            z: ``[row, pos, head, d_head]``.
            scale: of the norm after the heads, ``[row, pos, 1]``.
        """
        if layer not in self._writing:
            self._writing[layer] = self.bridge.stream.weight(layer, "attn")
        written = torch.einsum("xphd,hdm->xhpm", z, self._writing[layer].to(z)) * self.bridge.stream.factor(layer)
        norm = self.norm_after(layer)
        if norm is None:
            return written
        assert scale is not None
        return Frozen(norm, scale.unsqueeze(1))(written).to(written)

    def head_differences(
        self, layer: int, source: Mapping[str, Shaped[Tensor, "row ..."]], base: Mapping[str, Shaped[Tensor, "row ..."]]
    ) -> Float[Tensor, "row head pos d_model"]:
        """``[row, head, pos, d_model]``: what each head writes more in one run than in another; by canonical names."""
        z = self._name(f"blocks.{layer}.attn.hook_z")
        if self.norm_after(layer) is None:
            return self.heads(layer, source[z] - base[z], None)
        scale = f"blocks.{layer}.ln1_post.hook_scale"
        return self.heads(layer, source[z], source[scale]) - self.heads(layer, base[z], base[scale])

    def written(self, run: Mapping[str, Shaped[Tensor, "row ..."]]) -> Float[Tensor, "row sender pos d_model"]:
        """``[row, sender, pos, d_model]``: what each part writes in a run; by canonical names."""
        found = [run[self._name("hook_embed")][:, None]]
        for layer in range(self.wiring.n_layers):
            z = run[self._name(f"blocks.{layer}.attn.hook_z")]
            scale = None if self.norm_after(layer) is None else run[f"blocks.{layer}.ln1_post.hook_scale"]
            found += [self.heads(layer, z, scale), run[f"blocks.{layer}.hook_mlp_out"][:, None]]
        return torch.cat(found, 1)

    def differences(
        self, source: Mapping[str, Shaped[Tensor, "row ..."]], base: Mapping[str, Shaped[Tensor, "row ..."]]
    ) -> Float[Tensor, "row sender pos d_model"]:
        """``[row, sender, pos, d_model]``: what each part writes more in one run than in another."""
        embed = self._name("hook_embed")
        written = source[embed] - base[embed]
        # Written in place: parts and what they are put together to would be two of the largest tensor.
        found = written.new_empty(len(written), len(self.wiring.senders), *written.shape[1:])
        found[:, 0] = written
        number = 1
        for layer in range(self.wiring.n_layers):
            mlp = f"blocks.{layer}.hook_mlp_out"
            found[:, number : number + self.wiring.n_heads] = self.head_differences(layer, source, base)
            number += self.wiring.n_heads
            found[:, number] = source[mlp] - base[mlp]
            number += 1
        return found

    # -- what flows back to inputs -------------------------------------------------------------------------------------

    @property
    def gradient_hooks(self) -> list[str]:
        """The points whose gradients :meth:`flows_back` takes, by canonical name."""
        names = [f"blocks.{layer}.attn.hook_{part}" for layer in range(self.wiring.n_layers) for part in PARTS]
        names += [self.stream.hook(place) for place in range(self.stream.last + 1)]
        return list(dict.fromkeys(self._name(name) for name in names))

    def flows_back(
        self,
        layer: int,
        gradients: Mapping[str, Float[Tensor, "row pos ..."]],
        residual: Float[Tensor, "row pos d_model"],
    ) -> Float[Tensor, "row receiver pos d_model"]:
        """``[row, receiver, pos, d_model]``: what flows back to each input of a block, in the order of the wiring.

        Args:
            layer: the block.
            gradients: by canonical name, those of :attr:`gradient_hooks`, ``[row, pos, ...]``.
            residual: ``[row, pos, d_model]``, what enters the block in that run.
        """
        if layer not in self._reading:
            self._reading[layer] = self.bridge.stream.reading(layer)
        reading = self._reading[layer]
        flows = [
            torch.einsum("xphd,hmd->xhpm", given, reading[part].to(given))
            for part in PARTS
            for given in (gradients[self._name(f"blocks.{layer}.attn.hook_{part}")],)
        ]
        attention = torch.cat(flows, 1)
        norm = self.bridge.stream.norm(f"blocks.{layer}.ln1")
        if norm is not None:
            attention = through_norm(norm, self.bridge.cfg.eps, residual, attention)
        before, after = self.stream.before_mlp(layer), self.stream.entering(layer + 1)
        mlp = self._at(gradients, before) - self._at(gradients, after)
        if self.wiring.parallel:
            mlp = mlp - attention.sum(1)
        return torch.cat([attention, mlp[:, None]], 1)

    def at_the_end(self, gradients: Mapping[str, Float[Tensor, "row pos ..."]]) -> Float[Tensor, "row 1 pos d_model"]:
        """``[row, 1, pos, d_model]``: what flows back to ``final``."""
        return self._at(gradients, self.stream.last)[:, None]

    def residual(self, layer: int, run: Mapping[str, Shaped[Tensor, "row ..."]]) -> Float[Tensor, "row pos d_model"]:
        """What enters a block in a run."""
        return run[self._name(self.stream.hook(self.stream.entering(layer)))]

    def _at(self, run: Mapping[str, Tensor], place: int) -> Tensor:
        return run[self._name(self.stream.hook(place))]


def through_norm(
    norm: Norm, eps: float, x: Float[Tensor, "row pos d_model"], flows: Float[Tensor, "row receiver pos d_model"]
) -> Float[Tensor, "row receiver pos d_model"]:
    """What flows back through a norm to its input.

    Args:
        norm: the norm.
        eps: what it adds under the root.
        x: ``[row, pos, d_model]``, what it was given.
        flows: ``[row, receiver, pos, d_model]``, gradients of what it gave.

    Returns:
        ``[row, receiver, pos, d_model]``: ``(g - mean(g) - y mean(g y)) / scale``, with ``g`` the gradients times the gain,
        ``y`` the normalised input, and no ``mean(g)`` where the norm does not centre.
    """
    wide = widened(x)
    if norm.centres:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    normalized, scale = (wide / scale)[:, None], scale[:, None]
    given = widened(flows)
    if norm.gain is not None:
        given = given * norm.gain.to(given)
    along = (given * normalized).mean(-1, keepdim=True)
    left = given - normalized * along
    if norm.centres:
        left = left - given.mean(-1, keepdim=True)
    return (left / scale).to(flows)


def contracted(
    sent: Float[Tensor, "row sender pos d_model"], flows: Float[Tensor, "row receiver pos d_model"]
) -> Float[Tensor, "row receiver sender"]:
    """``[row, receiver, sender]``: products over positions and features, in float32 at least.

    Args:
        sent: ``[row, sender, pos, d_model]``.
        flows: ``[row, receiver, pos, d_model]``.
    """
    return widened(flows).flatten(2) @ widened(sent).flatten(2).mT


def bytes_of_a_row(bridge: TransformerBridge, wiring: Wiring, length: int) -> int:
    """Bytes that one row's senders, ``[sender, pos, d_model]``, and the inputs of one block take."""
    itemsize = max(bridge.dtype.itemsize, 4)
    receivers = wiring.n_heads + 2 * wiring.n_key_value_heads + 1
    return (len(wiring.senders) + 3 * receivers) * length * bridge.cfg.d_model * itemsize
