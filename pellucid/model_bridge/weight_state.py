"""The bridge's words for weight processing: TransformerLens' calls, and weights that tell the truth before and after.

What is done, and what is refused, is in :mod:`pellucid.model_bridge.processed_weights`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_path
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import PellucidWarning, warn
from pellucid.factored_matrix import FactoredMatrix
from pellucid.model_bridge.checkpoint import RANDOM_WEIGHTS
from pellucid.model_bridge.hooked_model import HookedModel
from pellucid.model_bridge.processed_weights import (
    folded_unembedding,
    folded_unembedding_bias,
    portable_state,
    process,
    unprocess,
)
from pellucid.model_bridge.weight_record import (
    Request,
    WeightsState,
    is_tied,
    record_of,
    refuse_adapters,
    refuse_by_config,
    state_of,
)
from pellucid.model_bridge.weight_views import WeightViews
from pellucid.weight_processing import STEPS, Step

DEFAULTS: Mapping[str, bool] = {step: step != "refactor_factored_attn_matrices" for step in STEPS}
"""What ``process_weights()`` does without arguments, as TransformerLens."""


def _steps(wanted: Mapping[str, bool]) -> frozenset[Step]:
    return frozenset(step for step in STEPS if wanted.get(step))


def refuse_early(asked: bool | Mapping[str, bool], cfg: TransformerBridgeConfig) -> None:
    """Refuse what a configuration forbids, of ``process_weights=`` at loading.

    Args:
        asked: ``True``, or arguments of ``process_weights``.
        cfg: the checkpoint's configuration.

    Raises:
        WeightError: see :meth:`ProcessableWeights.process_weights`.
    """
    refuse_by_config(
        cfg, _steps(dict(DEFAULTS) | dict(asked if isinstance(asked, Mapping) else {})) if asked else frozenset()
    )


class ProcessableWeights(WeightViews, HookedModel):
    """A hooked model whose weights can be folded, centred and recombined, and put back."""

    def process_weights(
        self,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
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

        float64 stays float64, float32 is processed in float32, bfloat16 and float16 in float32 and rounded once.

        Args:
            fold_ln: move the gains and biases of ``ln1``, ``ln2`` and ``ln_f`` into the weights that read them.
            center_writing_weights: free ``W_O``, ``b_O``, ``W_out``, ``b_out`` and the embedding, as the stream sees it,
                of their means over d_model. The embedding is rewritten so that its norm gives the centred rows exactly:
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
            WeightError: not legal for this model (``apply_residual_connection_post_layernorm``, ``slow_but_exact`` with
                ``pretraining_tp > 1``, an adapter, quantised, offloaded, shared or not finite weights, ``keep_tied`` with
                centring). Nothing has been changed then.
        """
        wanted = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        refuse_adapters(self.original_model)
        outcome = process(self._tree, Request(_steps(wanted), keep_tied, keep_originals), verbose, progress)
        if outcome.already:
            done = ", ".join(sorted(outcome.applied)) or "nothing"
            warn(f"Already applied to these weights: {', '.join(sorted(outcome.already))}. Applied now: {done}.")
        return self.weights_state

    def _processed(self, asked: bool | Mapping[str, bool]) -> Self:
        """Process the weights as ``boot_transformers`` was told to."""
        if asked:
            self.process_weights(**dict(asked if isinstance(asked, Mapping) else {}))
        return self

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
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

    # -- weights that tell the truth -----------------------------------------------------------------------------------

    @property
    def W_U(self) -> Tensor:
        """``[d_model, d_vocab]``, a view; after ``process_weights(keep_tied=True)`` computed, the final norm folded."""
        return folded_unembedding(self._tree)[0] if self._folds_on_access() else super().W_U

    @property
    def b_U(self) -> Tensor:
        """``[d_vocab]``; after ``process_weights(keep_tied=True)`` computed, the final norm folded."""
        return folded_unembedding_bias(self._tree) if self._folds_on_access() else super().b_U

    def _folds_on_access(self) -> bool:
        return record_of(self._tree).on_access and is_tied(self._tree)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T``, ``[n_layers, n_heads, d_model, d_model]`` (queries, keys), without biases, unscaled."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O``, ``[n_layers, n_heads, d_model, d_model]`` (source, destination)."""
        return FactoredMatrix(self.W_V, self.W_O)

    def explain(self, name: str) -> str:
        """What a hook point holds, see :meth:`HookedModel.explain`; says where processing changed its meaning."""
        text = super().explain(name)
        inside = self._tree.index[name].name in ("embed.hook_out", "embed_ln.hook_scale", "embed_ln.hook_normalized")
        if inside and "center_writing_weights" in self.weights_state.done["embed"]:
            text += (
                "\n  note    in the terms of the rewritten embedding: W_E is small, its norm gives the centred W_E_eff"
            )
        return text

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``save_pretrained``, the tokenizer's included; a processed model loses nothing by it.

        ``lm_head.bias`` (``b_U``) would be dropped on loading without an error. It is written as the final norm's bias
        instead, with the same log-probabilities; the reloaded model's ``W_U`` and ``b_U`` are as here again after
        ``process_weights()``. Hugging Face's own ``bridge.hf_model.save_pretrained`` does not know this.

        Args:
            save_directory: the folder, made if need be.
            args: as Hugging Face's, like the keywords.
        """
        state = kwargs.get("state_dict")
        if state is None and (portable := portable_state(self._tree)) is not None:
            kwargs["state_dict"] = portable
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if self._rules.tokenizer is not None and kwargs.get("is_main_process", True):
            shared = {name: kwargs[name] for name in ("push_to_hub", "repo_id", "token", "private") if name in kwargs}
            self._rules.tokenizer.save_pretrained(save_directory, **shared)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the Hugging Face model; what was done to the weights before is forgotten."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        record_of(self._tree).clear()
        self._tree.notes.pop(RANDOM_WEIGHTS, None)
        return result
