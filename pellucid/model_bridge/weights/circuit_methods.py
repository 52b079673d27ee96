"""The bridge's words for weights as circuits, TransformerLens' names: all parameters by name, biases, composition, heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_text
from pellucid.decomposition.stream import BranchName
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.factored_matrix import FactoredMatrix, composition_scores
from pellucid.model_bridge.generalized_components.normalization import NormalizationBridge
from pellucid.model_bridge.weights.weight_methods import WeightMethods


class CompositionScores(Tensor):
    """``[n_layers, n_heads, n_layers, n_heads]``: a tensor that knows its axes; what is computed from it is a plain one.

    Attributes:
        layer_indices: the layer of each entry of the first and the third axis.
        head_labels: ``"L0H0"``, ``"L0H1"``, ..., layer-major.
    """

    layer_indices: list[int]
    head_labels: list[str]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, scores: Tensor, layer_indices: list[int], head_labels: list[str]) -> CompositionScores:
        """The scores with their labels."""
        made = scores.as_subclass(cls)
        made.layer_indices, made.head_labels = layer_indices, head_labels
        return made

    @property
    def scores(self) -> Tensor:
        """The plain tensor."""
        return self.as_subclass(Tensor)


class CircuitMethods(WeightMethods):
    """Parameters under TransformerLens' names, and what circuits they make."""

    def tl_parameters(self) -> dict[str, Tensor]:
        """Every weight by TransformerLens' name (``blocks.0.attn.W_Q``), as it is now, processed or not.

        Views of the model's parameters, except where there is none: a bias that a family has not is zeros, and ``unembed.*``
        is computed under ``keep_tied``. ``W_K``, ``W_V`` and their biases have ``n_key_value_heads`` heads, as the weight
        accessors have (TransformerLens repeats them for each head of queries).

        Raises:
            WeightError: one of them is no weight of this model: of experts, or of heads that lie in groups (Falcon).
        """
        components = self._tree.components
        found: dict[str, Tensor] = {"embed.W_E": self.W_E}
        if "pos_embed" in components:
            found["pos_embed.W_pos"] = self.W_pos
        if "embed_ln" in components:
            found |= _of_norm("embed_ln", components["embed_ln"])
        for layer, block in enumerate(self._blocks()):
            parts = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
            found |= {f"blocks.{layer}.attn.{part}": getattr(block.attn, part) for part in parts}
            parts = ("W_in", "W_out", "b_in", "b_out", *(("W_gate", "b_gate") if self._tree.cfg.gated_mlp else ()))
            found |= {f"blocks.{layer}.mlp.{part}": getattr(block.mlp, part) for part in parts}
            for name, child in block.submodules.items():
                found |= _of_norm(f"blocks.{layer}.{name}", child)
        return found | _of_norm("ln_final", components["ln_final"]) | {"unembed.W_U": self.W_U, "unembed.b_U": self.b_U}

    def get_params(self) -> dict[str, Tensor]:
        """The same as :meth:`tl_parameters`."""
        return self.tl_parameters()

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The entries of :meth:`tl_parameters`."""
        return iter(self.tl_parameters().items())

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """``[d_model]``: the sum of the output biases, as they run, in the residual stream that enters block ``layer``.

        Args:
            layer: a block, or ``n_layers`` for the end.
            mlp_input: the stream that enters the MLP of block ``layer``: with the bias of its attention.
            include_mlp_biases: ``b_out`` too, not ``b_O`` alone.

        Raises:
            InputError: no such block.
            UnsupportedModelError: what is added to the stream is not the branches' output: a norm follows it, or the stream
                is taken after a norm.
        """
        cfg = self._tree.cfg
        check_count("layer", layer, 0, cfg.n_layers - bool(mlp_input))
        if self._tree.adapter.family.block.ln1_post or cfg.apply_residual_connection_post_layernorm:
            raise UnsupportedModelError(
                "accumulated_bias: this model norms what its branches add, or takes its stream after a norm "
                "(apply_residual_connection_post_layernorm): biases are no part of the stream."
            )
        total, stream = torch.zeros(cfg.d_model, dtype=cfg.dtype, device=self.W_E.device), self.stream
        branches: list[tuple[int, BranchName]] = [(below, "attn") for below in range(layer + bool(mlp_input))]
        if include_mlp_biases:
            branches = sorted(branches + [(below, "mlp") for below in range(layer)])
        for below, branch in branches:
            bias = stream.bias(below, branch)
            if bias is not None:
                total = total + (bias * stream.factor(below)).to(total.device)
        return total

    @torch.no_grad()
    def all_composition_scores(self, mode: str) -> CompositionScores:
        """``[n_layers, n_heads, n_layers, n_heads]``: how much of what one head writes another one reads (Elhage 2021).

        Of the raw weights, norms between the two left out: process the weights for gains to count. Zero unless the second
        head's layer is later. A head of keys or values is taken beside each head of queries that it serves.

        Args:
            mode: what of the second head reads: its queries ``"Q"``, keys ``"K"`` or values ``"V"``.
        """
        check_choice("mode", mode, ("Q", "K", "V"))
        writes = self.OV
        reads = writes if mode == "V" else self.QK if mode == "Q" else self.QK.T
        scores = composition_scores(writes, reads)
        layers = torch.arange(self._tree.cfg.n_layers, device=scores.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        return CompositionScores.of(
            scores.masked_fill(~later, 0.0), self.composition_layer_indices(), self.all_head_labels
        )

    def composition_layer_indices(self) -> list[int]:
        """The layers whose heads :meth:`all_composition_scores` has: all of them."""
        return list(range(self._tree.cfg.n_layers))

    @property
    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``, layer-major."""
        cfg = self._tree.cfg
        return [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]

    @property
    def attn_head_labels(self) -> list[str]:
        """The same: each block has attention."""
        return self.all_head_labels

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """All layers, and :attr:`QK`."""
        return self.composition_layer_indices(), self.QK

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """All layers, and :attr:`OV`."""
        return self.composition_layer_indices(), self.OV

    @property
    def W_E_pos(self) -> Tensor:
        """``[d_vocab + n_ctx, d_model]``: the tables of tokens and of positions, one below the other.

        Raises:
            WeightError: the model has no table of positions.
        """
        return torch.cat([self.W_E, self.W_pos])

    def layer_types(self) -> list[str]:
        """What each block is made of: ``"attn+mlp"``."""
        return ["+".join(name for name in ("attn", "mlp") if name in block.submodules) for block in self._blocks()]

    def block_submodules(self, layer_idx: int) -> list[str]:
        """The components of one block: ``["ln1", "attn", "ln2", "mlp"]``."""
        check_count("layer_idx", layer_idx, 0, self._tree.cfg.n_layers - 1)
        return list(self._blocks()[layer_idx].submodules)

    def blocks_with(self, submodule: str) -> list[tuple[int, Any]]:
        """``(layer, block)`` of the blocks that have a component."""
        check_text("submodule", submodule)
        return [(layer, block) for layer, block in enumerate(self._blocks()) if submodule in block.submodules]

    def stack_params_for(
        self, submodule: str, attr_path: str, reshape_fn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[list[int], Tensor]:
        """One weight of each block that has a component: the layers, and ``[layers, ...]`` copies.

        Args:
            submodule: the component, ``"attn"``.
            attr_path: the weight, from the block on, ``"attn.W_Q"``.
            reshape_fn: applied to each before they are stacked.

        Raises:
            InputError: no block has it.
        """
        there = self.blocks_with(submodule)
        if not there:
            raise InputError(
                f"No block has a component {submodule!r}. They have: {', '.join(self.block_submodules(0))}."
            )
        weights = [reduce(getattr, check_text("attr_path", attr_path).split("."), block) for _, block in there]
        changed = weights if reshape_fn is None else [reshape_fn(weight) for weight in weights]
        return [layer for layer, _ in there], torch.stack(changed)


def _of_norm(name: str, component: Any) -> dict[str, Tensor]:
    """Gain and bias of a norm; of any other component nothing."""
    if not isinstance(component, NormalizationBridge):
        return {}
    return {f"{name}.{part}": getattr(component, part) for part in ("w", "b") if hasattr(component, part)}
