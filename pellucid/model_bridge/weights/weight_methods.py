"""The bridge's words for weights, TransformerLens' names: accessors, right before and after processing, and processing.

What is done, and what is refused, is in :mod:`pellucid.model_bridge.weights.rewriting`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.arguments import check_path
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError, PellucidWarning, WeightError, warn
from pellucid.factored_matrix import FactoredMatrix
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.running.tokens import TokenRules, as_ids
from pellucid.model_bridge.weights.form import illegal_by_config, illegal_steps
from pellucid.model_bridge.weights.legality import Request, refuse_adapters, refuse_by_config, steps_of
from pellucid.model_bridge.weights.record import WeightsState, is_tied, record_of, state_of
from pellucid.model_bridge.weights.restoring import unprocess
from pellucid.model_bridge.weights.rewriting import process
from pellucid.model_bridge.weights.stream import ResidualStream
from pellucid.model_bridge.weights.unembedding_table import folded_unembedding, folded_unembedding_bias
from pellucid.run_context import hooks_suppressed


def refuse_early(asked: bool | Mapping[str, bool], cfg: TransformerBridgeConfig) -> None:
    """Refuse what a configuration forbids, of ``process_weights=`` at loading.

    Args:
        asked: ``True``, or arguments of ``process_weights``.
        cfg: the checkpoint's configuration.

    Raises:
        WeightError: see :meth:`WeightMethods.process_weights`.
    """
    if asked:
        steps = steps_of(asked if isinstance(asked, Mapping) else {}, illegal_by_config(cfg))
        refuse_by_config(cfg, steps)


COMPATIBILITY = "compatibility_mode"


class WeightMethods:
    """Weights by name, and their processing.

    ``bridge.blocks[i].attn.W_Q`` is a writable view; ``bridge.W_Q`` stacks copies over layers.
    """

    original_model: nn.Module
    _tree: ComponentTree
    _rules: TokenRules

    # -- processing ----------------------------------------------------------------------------------------------------

    def process_weights(
        self,
        *,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool = False,
        verbose: bool = False,
        keep_tied: bool = False,
        keep_originals: bool = False,
        progress: bool | None = None,
    ) -> WeightsState:
        """Turn the model's weights, in place, into the form that circuit analysis wants; log-probabilities stay.

        Any subset, once or several times: a later call applies what is missing and warns of what was there. It goes
        through the model part by part, hardly needs more memory than the model (and a second vocabulary-sized table if
        the unembedding has to be untied), and may be interrupted: the model is correct, a repeat does the rest.

        Which steps keep what a model computes depends on its family (``docs/processed_weights.md`` has the table): one that
        does not is refused with its reason where it is asked for (``True``), and left out where it is not named (``None``);
        ``weights_state.left_out`` says so. The refactoring is done only where it is asked for, the others unless ``False``.

        Weights are processed in float64 (BLOOM's, up to float32, in float32) and rounded once to their own dtype.

        Args:
            fold_ln: move the gains and biases of ``ln1``, ``ln2`` and ``ln_final`` into the weights that read them. Norms of
                queries and keys, and those after attention or MLP, have no such readers and stay.
            center_writing_weights: free ``W_O``, ``b_O``, ``W_out``, ``b_out`` and the embeddings, as the stream sees them,
                of their means over d_model. BLOOM's embedding is rewritten so that its norm gives the centred rows exactly:
                ``W_E`` is then small and only ``W_E_eff`` is readable, and ``embed.hook_out`` and the inside of
                ``embed_ln`` are in the new terms.
            center_unembed: free ``W_U`` and ``b_U`` of their means over the vocabulary; a position's logits move by a
                constant.
            fold_value_biases: move ``b_V`` into ``b_O`` (evaluation mode: with attention dropout active it is not exact).
            refactor_factored_attn_matrices: queries and keys, values and outputs, in the singular basis of their circuits.
            verbose: print a line for each part of the model.
            keep_tied: keep one table for embedding and unembedding: the final norm keeps its gain, and ``W_U`` and ``b_U``
                are folded when asked for. Excludes both centrings, which would change the table.
            keep_originals: keep a copy of the original weights in CPU memory, for :meth:`unprocess_weights`.
            progress: show a bar; by default for large models, on a terminal.

        Returns:
            What is done now, :attr:`weights_state`.

        Raises:
            WeightError: not legal for this model (a step that its family does not allow,
                ``apply_residual_connection_post_layernorm``, ``slow_but_exact`` with ``pretraining_tp > 1``, an adapter,
                quantised, offloaded, shared or not finite weights, ``keep_tied`` with centring). Nothing has been
                changed then.
        """
        wanted: dict[str, bool | None] = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        refuse_adapters(self.original_model)
        steps = steps_of(wanted, illegal_steps(self._tree))
        outcome = process(self._tree, Request(steps, keep_tied, keep_originals), verbose, progress)
        if outcome.already:
            done = ", ".join(sorted(outcome.applied)) or "nothing"
            warn(f"Already applied to these weights: {', '.join(sorted(outcome.already))}. Applied now: {done}.")
        return self.weights_state

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens' call for :meth:`process_weights`; hook names need no switching on here.

        Args:
            disable_warnings: do not warn of steps that were applied before.
            no_processing: leave the weights as they are; nothing is left to do then.
            fold_ln: see :meth:`process_weights`, as for the others.

        Raises:
            WeightError: see :meth:`process_weights`.
        """
        self._tree.notes[COMPATIBILITY] = True
        if no_processing:
            return
        with warnings.catch_warnings():
            if disable_warnings:
                warnings.simplefilter("ignore", PellucidWarning)
            self.process_weights(
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )

    @property
    def compatibility_mode(self) -> bool:
        """Whether :meth:`enable_compatibility_mode` was called. It decides no name: TransformerLens' are always there."""
        return bool(self._tree.notes.get(COMPATIBILITY, False))

    def unprocess_weights(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        """Put the original weights back, in place, and tie again what was tied.

        Args:
            checkpoint: folder with the safetensors files that the model was loaded from. Not needed if
                ``process_weights`` was told to ``keep_originals``.

        Raises:
            WeightError: neither is there, or the checkpoint does not fit. Nothing has been changed then.
        """
        unprocess(self._tree, None if checkpoint is None else check_path("checkpoint", checkpoint))

    @property
    def weights_state(self) -> WeightsState:
        """Which steps were applied to which part of the model; ``print(bridge.weights_state)`` gives a table."""
        return state_of(self._tree)

    @property
    def stream(self) -> ResidualStream:
        """What writes to the residual stream and what reads it: norms and output maps, as the model computes them now."""
        return ResidualStream(self._tree, self._folds_on_access())

    def _blocks(self) -> list[Any]:
        blocks, said = list(self._tree.blocks), self._tree.adapter.cfg.n_layers
        if len(blocks) != said:
            raise InputError(
                f"Configuration mismatch: cfg.n_layers is {said}, and {len(blocks)} blocks found. cfg says what the "
                f"model is and does not change it: set cfg.n_layers = {len(blocks)} again."
            )
        return blocks

    # -- weights -------------------------------------------------------------------------------------------------------

    @property
    def W_E(self) -> Tensor:
        """``[d_vocab, d_model]``: the token embedding's own table, before a norm or a factor that follows.

        In BLOOM, after ``process_weights(center_writing_weights=True)`` it is small and only :attr:`W_E_eff` is readable.
        """
        return cast(Tensor, self._tree.components["embed"].W_E)

    @property
    def W_E_eff(self) -> Tensor:
        """``[d_vocab, d_model]``: the token embedding as the residual stream sees it, computed anew.

        With the embedding norm (BLOOM) or the factor of the embedding's module (Gemma) or of the backbone (Granite);
        elsewhere ``W_E``, copied. Circuits from token to token start from it. Position embeddings (:attr:`W_pos`) are not in
        it.
        """
        norm = self._tree.components.get("embed_ln")
        with torch.no_grad():
            if norm is not None:
                return torch.cat([hooks_suppressed(norm.module, rows) for rows in self.W_E.split(16384)])
            embedding, table = self._tree.components["embed"].module, self.W_E
            ids = torch.arange(table.shape[0], device=table.device)
            found = torch.cat([hooks_suppressed(embedding, some) for some in ids.split(16384)])
            return found if self._tree.embed_factor == 1 else found * self._tree.embed_factor

    @property
    def W_pos(self) -> Tensor:
        """``[n_ctx, d_model]``: the table of position embeddings, the model's own parameter.

        Raises:
            WeightError: the model has none: positions enter by a rotation of queries and keys, or a bias of the scores.
        """
        table = self._tree.components.get("pos_embed")
        if table is None:
            how = self._tree.cfg.positional_embedding_type
            raise WeightError(f"The model has no table of position embeddings, W_pos: its positions are {how}.")
        return cast(Tensor, table.W_pos)

    @property
    def W_Q(self) -> Tensor:
        """``[n_layers, n_heads, d_model, d_head]``."""
        return torch.stack([block.attn.W_Q for block in self._blocks()])

    @property
    def W_K(self) -> Tensor:
        """``[n_layers, n_key_value_heads, d_model, d_head]``."""
        return torch.stack([block.attn.W_K for block in self._blocks()])

    @property
    def W_V(self) -> Tensor:
        """``[n_layers, n_key_value_heads, d_model, d_head]``."""
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
    def W_gate(self) -> Tensor | None:
        """``[n_layers, d_model, d_mlp]``: what is activated in a gated MLP; ``None`` where the MLPs have no gate."""
        gated = self._tree.cfg.gated_mlp
        return torch.stack([block.mlp.W_gate for block in self._blocks()]) if gated else None

    @property
    def b_gate(self) -> Tensor | None:
        """``[n_layers, d_mlp]``; ``None`` where the MLPs have no gate."""
        gated = self._tree.cfg.gated_mlp
        return torch.stack([block.mlp.b_gate for block in self._blocks()]) if gated else None

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
        """``[n_layers, n_key_value_heads, d_head]``."""
        return torch.stack([block.attn.b_K for block in self._blocks()])

    @property
    def b_V(self) -> Tensor:
        """``[n_layers, n_key_value_heads, d_head]``."""
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

    @property
    def W_U(self) -> Tensor:
        """``[d_model, d_vocab]``, a view; after ``process_weights(keep_tied=True)`` computed, the final norm folded."""
        return (
            folded_unembedding(self._tree)[0]
            if self._folds_on_access()
            else cast(Tensor, self._tree.components["unembed"].W_U)
        )

    @property
    def b_U(self) -> Tensor:
        """``[d_vocab]``; after ``process_weights(keep_tied=True)`` computed, the final norm folded."""
        return (
            folded_unembedding_bias(self._tree)
            if self._folds_on_access()
            else cast(Tensor, self._tree.components["unembed"].b_U)
        )

    def _folds_on_access(self) -> bool:
        return record_of(self._tree).on_access and is_tied(self._tree)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T``, ``[n_layers, n_heads, d_model, d_model]`` (queries, keys), without biases, unscaled.

        A head of keys stands beside each head of queries that it serves. A rotation of queries and keys, or a norm of them,
        is between the two and not in the product.
        """
        return FactoredMatrix(self.W_Q, self._by_query_head(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O``, ``[n_layers, n_heads, d_model, d_model]`` (source, destination); values as the keys of :attr:`QK`."""
        return FactoredMatrix(self._by_query_head(self.W_V), self.W_O)

    def _by_query_head(self, weights: Tensor) -> Tensor:
        """``[n_layers, n_key_value_heads, ...]`` to ``[n_layers, n_heads, ...]``."""
        group = self._tree.cfg.n_heads // self._tree.cfg.n_key_value_heads
        return weights if group == 1 else weights.repeat_interleave(group, dim=1)
