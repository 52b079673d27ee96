"""The bridge's smaller words, TransformerLens' names: what its tools read, and a line for each name that is not here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pellucid.arguments import check_count
from pellucid.hook_points import HookPoint
from pellucid.losses import check_shapes, next_token_loss
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.running.generation_methods import GenerationMethods
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.peer_names import BRIDGE, absent
from pellucid.run_context import open_scopes


class PeerWords(GenerationMethods):
    """What TransformerLens' users and tools read of a bridge beyond runs, hooks, weights and tokens."""

    def __getattr__(self, name: str) -> Any:
        """A point or a component outside the blocks, an attribute of the Hugging Face model, or what to use instead."""
        tree = vars(self).get("_tree")
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if tree is None or name.startswith("_"):
                raise
        if name in tree.index:
            return tree.point(name)
        if name in tree.components and "." not in name:
            return tree.components[name]
        instead = absent(BRIDGE, name)
        if instead is not None:
            raise AttributeError(instead)
        if hasattr(self.original_model, name):
            return getattr(self.original_model, name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}, nor has the Hugging Face model in it "
            f"({type(self.original_model).__name__})."
        )

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Cross-entropy of each token given those before it, in nats.

        Args:
            logits: ``[batch, pos, d_vocab]``.
            tokens: ``[batch, pos]`` ids.
            attention_mask: ``[batch, pos]``; a position counts when it and its target are real.
            per_token: ``[batch, pos - 1]``, zeros where nothing counts, not the mean.

        Raises:
            InputError: no position counts; shapes that differ.
        """
        check_shapes(logits, tokens, attention_mask)
        return next_token_loss(logits, tokens, attention_mask, per_token)

    def input_to_embed(
        self,
        input: TextOrTokens,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """``(residual, tokens, None, mask)``: ``[batch, pos, d_model]`` that enters block 0, and what it is of.

        ``bridge(residual, start_at_layer=0, attention_mask=mask)`` gives the full run's logits. The third is
        TransformerLens' place for a kind of position embedding that no family has.

        Args:
            input: see :meth:`forward`, as for the others.
        """
        prepared = self.check_input(input, prepend_bos, padding_side, attention_mask)
        residual = self.forward(prepared.tokens, attention_mask=prepared.attention_mask, stop_at_layer=0)
        assert prepared.tokens is not None
        return residual, prepared.tokens, None, prepared.attention_mask

    @property
    def mod_dict(self) -> dict[str, GeneralizedComponent | HookPoint]:
        """Components and hook points by name, a point under each of its names."""
        points = {name: self._tree.point(name) for name in self._tree.index.all_names()}
        inside = {name: component for name, component in self._tree.components.items() if component.root is not None}
        return {**inside, **points}

    @property
    def n_params_total(self) -> int:
        """Parameters of the Hugging Face model, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.original_model.parameters())

    @property
    def context_level(self) -> int:
        """How many blocks of hooks, and runs, are open in this thread or task."""
        return len(open_scopes())

    def block_hooks(self, layer_idx: int) -> list[str]:
        """The hook points of one block that are on, named from the block on and sorted."""
        prefix = f"blocks.{check_count('layer_idx', layer_idx, 0, self.cfg.n_layers - 1)}."
        return sorted(name.removeprefix(prefix) for name in self.hook_dict if name.startswith(prefix))
