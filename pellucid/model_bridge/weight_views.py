"""A model's weights under TransformerLens' names, per layer as views, over layers as stacked copies."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pellucid.model_bridge.mounting import ComponentTree
from pellucid.model_bridge.tokens import TokenRules, as_ids
from pellucid.run_context import hooks_suppressed


class WeightViews:
    """``W_Q`` and its kin. ``bridge.blocks[i].attn.W_Q`` is a writable view; ``bridge.W_Q`` stacks copies over layers."""

    _tree: ComponentTree
    _rules: TokenRules

    @property
    def W_E(self) -> Tensor:
        """``[d_vocab, d_model]``: ``word_embeddings``, before the embedding norm.

        After ``process_weights(center_writing_weights=True)`` it is small and only :attr:`W_E_eff` is readable.
        """
        return cast(Tensor, self._component("embed").W_E)

    @property
    def W_E_eff(self) -> Tensor:
        """``[d_vocab, d_model]``: the embedding as the residual stream sees it, computed anew.

        BLOOM has no position embedding, so the embedding norm of ``word_embeddings`` is one table; circuits from token to
        token start from it.
        """
        norm = self._tree.components["embed_ln"].module
        with torch.no_grad():
            return torch.cat([hooks_suppressed(norm, rows) for rows in self.W_E.split(16384)])

    @property
    def W_U(self) -> Tensor:
        """``[d_model, d_vocab]``, a view."""
        return cast(Tensor, self._component("unembed").W_U)

    @property
    def b_U(self) -> Tensor:
        """``[d_vocab]``."""
        return cast(Tensor, self._component("unembed").b_U)

    @property
    def W_Q(self) -> Tensor:
        """``[n_layers, n_heads, d_model, d_head]``."""
        return torch.stack([block.attn.W_Q for block in self._blocks()])

    @property
    def W_K(self) -> Tensor:
        """``[n_layers, n_heads, d_model, d_head]``."""
        return torch.stack([block.attn.W_K for block in self._blocks()])

    @property
    def W_V(self) -> Tensor:
        """``[n_layers, n_heads, d_model, d_head]``."""
        return torch.stack([block.attn.W_V for block in self._blocks()])

    @property
    def W_O(self) -> Tensor:
        """``[n_layers, n_heads, d_head, d_model]``."""
        return torch.stack([block.attn.W_O for block in self._blocks()])

    @property
    def W_in(self) -> Tensor:
        """``[n_layers, d_model, d_mlp]``."""
        return torch.stack([block.mlp.W_in for block in self._blocks()])

    @property
    def W_out(self) -> Tensor:
        """``[n_layers, d_mlp, d_model]``."""
        return torch.stack([block.mlp.W_out for block in self._blocks()])

    @property
    def b_Q(self) -> Tensor:
        """``[n_layers, n_heads, d_head]``."""
        return torch.stack([block.attn.b_Q for block in self._blocks()])

    @property
    def b_K(self) -> Tensor:
        """``[n_layers, n_heads, d_head]``."""
        return torch.stack([block.attn.b_K for block in self._blocks()])

    @property
    def b_V(self) -> Tensor:
        """``[n_layers, n_heads, d_head]``."""
        return torch.stack([block.attn.b_V for block in self._blocks()])

    @property
    def b_O(self) -> Tensor:
        """``[n_layers, d_model]``."""
        return torch.stack([block.attn.b_O for block in self._blocks()])

    @property
    def b_in(self) -> Tensor:
        """``[n_layers, d_mlp]``."""
        return torch.stack([block.mlp.b_in for block in self._blocks()])

    @property
    def b_out(self) -> Tensor:
        """``[n_layers, d_model]``."""
        return torch.stack([block.mlp.b_out for block in self._blocks()])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The unembedding vectors of tokens: ``[d_model]`` for one, else ``[..., d_model]``.

        Raises:
            InputError: no token ids, or some outside the vocabulary; a string that is no single token.
        """
        if isinstance(tokens, str):
            tokens = self._rules.single_token(tokens)
        ids = as_ids(tokens)
        if ids.numel():
            self._rules.check_range(ids)
        directions = self.W_U.T[ids.to(self.W_U.device)]
        return directions[0] if ids.dim() == 1 and ids.numel() == 1 else directions

    def _component(self, name: str) -> Any:
        return self._tree.components[name]

    def _blocks(self) -> list[Any]:
        return list(self._tree.blocks)
