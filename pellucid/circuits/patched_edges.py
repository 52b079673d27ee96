"""A run in which edges are really patched: each input reads some parts as the run itself makes them, the others as given.

For an input ``v`` and edges ``u -> v`` that are patched, what it reads becomes

    ``stream + sum over patched u of (u(given) - u(this run))``

where ``u(this run)`` is what the part writes in that very run, so that what an earlier patch changed reaches later parts by
the edges that are not patched, and by no others. With no edge patched nothing is added and the run is the base run to the
bit; with all of them every input reads the given run, and the metric is that run's up to rounding.

Inputs are edited where they are split: ``hook_q_input``, ``hook_k_input``, ``hook_v_input``, ``hook_mlp_in``, switched on
meanwhile. A family whose MLP has no copy of the stream of its own is edited where its module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.circuits.ends import Ends
from pellucid.conversion_utils.fused_qkv import PARTS
from pellucid.names import Flag
from pellucid.run_context import hooks_suppressed
from pellucid.sweep.unedited import Unedited

Hook = tuple[str, Callable[..., Any]]


class PatchedEdges:
    """Runs of one batch with edges patched.

    Args:
        ends: of the model's edges.
        unedited: the base run's input.
        given: ``[row, sender, pos, d_model]``, what patched edges carry.
    """

    def __init__(self, ends: Ends, unedited: Unedited, given: Float[Tensor, "row sender pos d_model"]) -> None:
        self.ends, self.wiring, self.unedited, self.given = ends, ends.wiring, unedited, given
        self.bridge = ends.bridge
        self._no_copy = "blocks.0.hook_mlp_in" not in self.bridge.hook_index

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Opt-in points that are on meanwhile."""
        return ("use_split_qkv_input",) if self._no_copy else ("use_split_qkv_input", "use_hook_mlp_in")

    def final(self, patched: np.ndarray) -> Float[Tensor, "row pos d_model"]:
        """``[row, pos, d_model]``: what leaves the last layer with these edges, ``[edge]`` bool, patched."""
        run = _Run(self, patched)
        with torch.no_grad(), self.bridge.points_on(self.flags), run.torch_hooks(self._no_copy):
            left: Tensor = self.bridge.run_with_hooks(
                **self.unedited.input, fwd_hooks=run.hooks(not self._no_copy), stop_at_layer=self.wiring.n_layers
            )
        return left


class _Run:
    """The functions of one run, and what they know of it: what each part writes less than given, as the run goes on."""

    def __init__(self, of: PatchedEdges, patched: np.ndarray) -> None:
        self.of, self.wiring, self.ends = of, of.wiring, of.ends
        self.patched = patched
        self.left = torch.zeros_like(of.given)
        self._z: Tensor | None = None
        self._entering: Tensor | None = None

    def hooks(self, copies: bool) -> list[Hook]:
        """By point; those of MLPs only where they have copies of the stream."""
        made: list[Hook] = [("hook_embed", partial(self._wrote, 0))]
        heads, kv = self.wiring.n_heads, self.wiring.n_key_value_heads
        for layer in range(self.wiring.n_layers):
            block, first = f"blocks.{layer}.", 1 + layer * (heads + 1)
            number = self.wiring.receiver_number(f"L{layer}H0.q")
            for part, count in zip(PARTS, (heads, kv, kv), strict=True):
                if self._is_patched(number, count):
                    made.append((f"{block}hook_{part}_input", partial(self._into_heads, number, count)))
                number += count
            if copies and self._is_patched(number, 1):
                made.append((f"{block}hook_mlp_in", partial(self._into_stream, number)))
            made.append((f"{block}attn.hook_z", partial(self._attended, layer, first)))
            if self.ends.norm_after(layer) is not None:
                made.append((f"{block}ln1_post.hook_scale", partial(self._scaled, layer, first)))
            made.append((f"{block}hook_mlp_out", partial(self._wrote, first + heads)))
        if self._is_patched(len(self.wiring.receivers) - 1, 1):
            last = f"blocks.{self.wiring.n_layers - 1}.hook_resid_post"
            made.append((last, partial(self._into_stream, len(self.wiring.receivers) - 1)))
        return made

    @contextmanager
    def torch_hooks(self, needed: bool) -> Iterator[None]:
        """Functions on the modules of MLPs, where there are no copies of the stream."""
        handles = []
        bridge, family = self.of.bridge, self.of.bridge.adapter.family
        for layer in range(self.wiring.n_layers) if needed else ():
            number = self.wiring.receiver_number(f"L{layer}.mlp_in")
            if not self._is_patched(number, 1):
                continue
            block = bridge.blocks[layer]
            norm = block.submodules["ln1"] if family.block.parallel and family.block.ln1 else None
            handles.append(
                block.submodules["mlp"].module.register_forward_pre_hook(partial(self._into_mlp, number, norm))
            )
            if norm is not None:
                handles.append(block.module.register_forward_pre_hook(self._entered, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_patched(self, number: int, count: int) -> bool:
        return any(bool(self.patched[self.wiring.edges_of(number + i)].any()) for i in range(count))

    # -- what parts write ----------------------------------------------------------------------------------------------

    def _wrote(self, sender: int, tensor: Tensor, hook: Any) -> None:
        self.left[:, sender] = self.of.given[:, sender] - tensor

    def _attended(self, layer: int, first: int, z: Tensor, hook: Any) -> None:
        if self.ends.norm_after(layer) is None:
            self._wrote_heads(layer, first, z, None)
        else:
            self._z = z.clone()

    def _scaled(self, layer: int, first: int, scale: Tensor, hook: Any) -> None:
        assert self._z is not None
        self._wrote_heads(layer, first, self._z, scale)
        self._z = None

    def _wrote_heads(self, layer: int, first: int, z: Tensor, scale: Tensor | None) -> None:
        until = first + self.wiring.n_heads
        self.left[:, first:until] = self.of.given[:, first:until] - self.ends.heads(layer, z, scale)

    # -- what inputs read ----------------------------------------------------------------------------------------------

    def _added(self, number: int, count: int) -> Tensor:
        """``[row, receiver, pos, d_model]`` of inputs that the same senders come before."""
        reached = int(self.wiring.reached[number])
        which = np.stack([self.patched[self.wiring.edges_of(number + i)] for i in range(count)])
        mask = torch.from_numpy(which).to(self.left)
        added: Tensor = mask @ self.left[:, :reached].flatten(2)
        return added.view(*added.shape[:2], *self.left.shape[2:])

    def _into_heads(self, number: int, count: int, tensor: Tensor, hook: Any) -> Tensor:
        return tensor + self._added(number, count).transpose(1, 2)

    def _into_stream(self, number: int, tensor: Tensor, hook: Any) -> Tensor:
        return tensor + self._added(number, 1)[:, 0]

    def _entered(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._entering = args[0] if args else kwargs["hidden_states"]

    def _into_mlp(self, number: int, norm: Any, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        added = self._added(number, 1)[:, 0]
        if norm is None:
            return (args[0] + added, *args[1:])
        assert self._entering is not None
        return (hooks_suppressed(norm.forward, self._entering + added), *args[1:])
