"""The bridge's words for runs, TransformerLens' names: forward, with hooks, with a cache.

A run is checked and made in :mod:`runner`, and what a cache keeps is decided in :mod:`caching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.arguments import check_choice
from pellucid.errors import GradientError, InputError
from pellucid.model_bridge.hooking.cache_plan import CacheEstimate, PosSlice, cache_bytes
from pellucid.model_bridge.hooking.hook_methods import HookMethods
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.hooking.hooks import HookRequest
from pellucid.model_bridge.running.caching import CacheRequest, cached_specs, caching_functions
from pellucid.model_bridge.running.outputs import of_one_row, one_cache, refuse_rows
from pellucid.model_bridge.running.run_positions import RunPositions
from pellucid.model_bridge.running.runner import ATTN_IMPLEMENTATIONS, AttnImplementation, Prepared, ReturnType, Runner
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens, TokenRules, ids_as_given
from pellucid.names import NamesFilter


class RunMethods(HookMethods):
    """Runs of the model.

    Attributes:
        runner: what makes them.
    """

    runner: Runner
    _rules: TokenRules

    @property
    def device(self) -> torch.device:
        """Where token ids are sent."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.cfg.dtype

    @property
    def attn_implementation(self) -> str:
        """``"eager"`` or ``"sdpa"``, see :meth:`set_attn_implementation`; a live model may have come with another."""
        return self.runner.attn_implementation

    def set_attn_implementation(self, attn_implementation: AttnImplementation) -> None:
        """Choose how runs compute attention.

        For BLOOM, of which Hugging Face has the eager one only, ``"sdpa"`` is Pellucid's and a matter of this bridge alone:
        calls of the Hugging Face model, and of another bridge on it, stay as they are. For every other family it is Hugging
        Face's own: the model is switched (its ``set_attn_implementation``), for all who call it.

        Args:
            attn_implementation: ``"eager"``: Hugging Face's own arithmetic, to the bit. ``"sdpa"``: torch's
                ``scaled_dot_product_attention`` in each layer whose ``hook_attn_scores`` and ``hook_pattern`` nothing acts
                on in that run; the same numbers up to rounding (bound: ``docs/fast_attention.md``), in less memory and time.
                A layer that is looked at runs Hugging Face's eager function. In BLOOM so do layers that need the pattern
                otherwise: dropout on it in training, ``output_attentions``, torch hooks on the attention, autocast; and all
                layers under gradient checkpointing, and in float16 where a row of a forward has everything masked (left
                padding).

        Raises:
            InputError: another value.
            UnsupportedModelError: ``"sdpa"`` of a model for which Hugging Face has none, such as Gemma 2.
        """
        check_choice("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
        self.runner.attn_implementation = attn_implementation

    def forward(
        self,
        input: TextOrTokens | None = None,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        inputs_embeds: Tensor | None = None,
        past_kv_cache: Any | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: a string, strings, token ids ``[pos]`` or ``[batch, pos]``, or with ``start_at_layer`` the residual
                ``[batch, pos, d_model]`` that enters that block.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` (logits and loss), ``"logits_and_cache"`` (logits and the
                key/value cache, a new one without ``past_key_values``) or ``None``.
            loss_per_token: losses ``[batch, pos - 1]``, zero where position or target is padding, and not their mean; only
                with a loss.
            prepend_bos: see :meth:`~pellucid.model_bridge.running.token_methods.TokenMethods.to_tokens`; for strings.
            padding_side: of shorter strings; their mask is made with them. Refused with token ids.
            attention_mask: ``[batch, pos]``, cached positions included, 1 at real tokens. Never guessed from ids: rows
                that begin or end with the padding token are run as they are, and a ``PellucidWarning`` says so.
            past_key_values: a Hugging Face cache, read and extended.
            start_at_layer: begin with the residual that enters this block.
            stop_at_layer: return the residual that enters this block, and run nothing after; negative counts from the end.
            inputs_embeds: ``[batch, pos, d_model]`` of the model's dtype, in the place of ``input``: what the token
                embedding would give. A run of embeddings has no tokens, so no loss.
            past_kv_cache: another name of ``past_key_values``.
            use_cache: what the run does anyway: ``True`` with ``return_type="logits_and_cache"`` or ``past_key_values``,
                ``False`` without. Anything else is refused.

        Returns:
            Logits ``[batch, pos, d_vocab]``, loss, both, ``None``, or the residual with ``stop_at_layer``. ``pos`` are the
            positions of the run: those of the input, after the virtual ones that a wrapper (prompt tuning) puts before.

        Raises:
            InputError: an input that cannot be run, with what to give instead.
        """
        prepared = self.runner.prepare_run(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            one_cache(past_key_values, past_kv_cache, use_cache, return_type),
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
            return_type,
            loss_per_token,
        )
        return self.runner.to_end(prepared, return_type, loss_per_token)

    def run_with_hooks(
        self,
        input: TextOrTokens | None = None,
        fwd_hooks: Sequence[HookRequest] = (),
        bwd_hooks: Sequence[HookRequest] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        assert_effect: bool = False,
        inputs_embeds: Tensor | None = None,
        past_kv_cache: Any | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Run the model with functions attached for this run.

        Args:
            input: see :meth:`forward`.
            fwd_hooks: ``(name, glob, list or predicate, function)`` pairs.
            bwd_hooks: the same for gradients; they fire in ``backward()``, also after this call.
            reset_hooks_end: ``False`` leaves the functions on.
            clear_contexts: empty every point's ``ctx`` afterwards.
            return_type: see :meth:`forward`, as for the arguments below that have no line here.
            remove_batch_dim: show functions the tensors of a single row without their batch axis; what they return is given
                it again. The output has it, as in TransformerLens.
            assert_effect: raise if a forward function never ran or left its tensor unchanged to the bit.

        Raises:
            HookNameError: a name that matches nothing.
            HookUnreachableError: a named point that ``start_at_layer`` or ``stop_at_layer`` leaves out.
            NoEffectError: see ``assert_effect``.
        """
        prepared = self.runner.prepare_run(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            one_cache(past_key_values, past_kv_cache, use_cache, return_type),
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
            return_type,
            loss_per_token,
        )
        if remove_batch_dim:
            refuse_rows(prepared.given)
        span = self.runner.span(prepared)
        forward = self._hooks.requests(fwd_hooks, "fwd", span)
        handles = forward + self._hooks.requests(bwd_hooks, "bwd", span)
        if remove_batch_dim:
            for handle in handles:
                handle.user_hook = of_one_row(handle.user_hook)
        for handle in forward:
            handle.must_change = assert_effect
        session = HookSession(self._tree, handles, keep=not reset_hooks_end)
        try:
            output = session.during(partial(self.runner.to_end, prepared, return_type, loss_per_token))
        finally:
            if clear_contexts:
                self.clear_contexts()
        if assert_effect:
            for handle in forward:
                handle.check_effect()
        return output

    def run_with_cache(
        self,
        input: TextOrTokens | None = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: PosSlice = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_cache_bytes: int | None = None,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        past_kv_cache: Any | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            input: see :meth:`forward`.
            return_cache_object: ``False`` gives a plain dictionary.
            remove_batch_dim: drop the batch axis of a single row.
            names_filter: which points to keep; ``None`` keeps all, the logits among them.
            stop_at_layer: see :meth:`forward`.
            start_at_layer: see :meth:`forward`.
            pos_slice: which positions of the run to keep: one, a range ``(start, stop[, step])``, a list or a mask; other
                positions are never stored. Virtual positions of a wrapper (prompt tuning) are counted.
            incl_bwd: run ``backward()`` on the loss and keep gradients too, under ``name + "_grad"``; the output
                is the loss (``return_type`` is left, or ``"loss"``).
            reset_hooks_end: ``False`` leaves the caching functions on: the cache then holds what the last run showed them.
                Not with ``remove_batch_dim``.
            clear_contexts: empty every point's ``ctx`` afterwards.
            device: where to keep tensors.
            dtype: as what to keep floating-point ones.
            max_cache_bytes: refuse before running if the cache would take more.
            return_type: see :meth:`forward`, as for the arguments below that have no line here.

        Returns:
            ``(output, cache)``. Tensors of the cache do not change afterwards, with one sharing to know of: the entry
            ``hook_unembed`` is the very tensor of logits that is returned. Clone one before writing to it.

        Raises:
            CacheTooLargeError: see ``max_cache_bytes``.
            GradientError: ``incl_bwd`` while gradients are off.
            InputError: see :meth:`forward`; ``incl_bwd`` of what is no single number.
        """
        if incl_bwd:
            if return_type not in ("loss", "logits") or loss_per_token:
                found = "loss_per_token=True" if loss_per_token else f"return_type={return_type!r}"
                raise InputError(
                    "incl_bwd runs backward() on the mean loss, a scalar output: ask for it, return_type='loss'; found "
                    f"{found}. For another number use the functions of get_caching_hooks(incl_bwd=True)."
                )
            if not torch.is_grad_enabled():
                raise GradientError(
                    "incl_bwd needs gradients, and gradient tracking is off (torch.no_grad or inference_mode)."
                )
            return_type = "loss"
        prepared = self.runner.prepare_run(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            one_cache(past_key_values, past_kv_cache, use_cache, return_type),
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
            return_type,
            loss_per_token,
        )
        if remove_batch_dim:
            refuse_rows(prepared.given)
            if not reset_hooks_end:
                raise InputError(
                    "reset_hooks_end=False with remove_batch_dim=True: later runs would be kept with a batch axis."
                )
        asked = CacheRequest(names_filter, pos_slice, incl_bwd, device, dtype, max_cache_bytes)
        recorder, handles = caching_functions(self.runner, self._hooks, prepared, asked)
        recorder.scope = session = HookSession(self._tree, handles, keep=not reset_hooks_end)
        try:
            output = session.during(partial(self.runner.to_end, prepared, return_type, loss_per_token, incl_bwd))
        finally:
            if clear_contexts:
                self.clear_contexts()
        run = self.runner.positions_of(prepared)
        tokens = None if run.tokens is None else run.tokens.clone()
        cache = ActivationCache(recorder.kept, self, tokens=tokens, attention_mask=run.attention_mask)
        recorder.kept = cache.cache_dict  # where functions that are left on keep what later runs show them
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def estimate_cache(
        self,
        input: TextOrTokens,
        names_filter: NamesFilter = None,
        pos_slice: PosSlice = None,
        dtype: torch.dtype | None = None,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        incl_bwd: bool = False,
    ) -> CacheEstimate:
        """Bytes that :meth:`run_with_cache` would keep, without running anything.

        Returns:
            A dictionary of bytes by canonical name, with ``total`` and ``largest(count)``; printed, it is a short table.
        """
        with ids_as_given():  # nothing runs that a mask could change
            prepared = self.runner.prepare(input, prepend_bos, stop_at_layer=stop_at_layer)
        if prepared.tokens is not None:
            self._rules.check_range(prepared.tokens)  # nothing runs that would refuse them
        specs = cached_specs(self.runner, self._hooks, prepared, names_filter)
        return cache_bytes(specs, self.cfg, self.runner.size(prepared), pos_slice, dtype, incl_bwd)

    def check_input(
        self,
        input: TextOrTokens,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
    ) -> Prepared:
        """Token ids and mask of an input as :meth:`forward` would run it, without running it.

        Raises:
            InputError: it cannot be run.
        """
        prepared = self.runner.prepare(input, prepend_bos, padding_side, attention_mask)
        assert prepared.tokens is not None
        self._rules.check_range(prepared.tokens)
        return prepared

    def positions_of(self, prepared: Prepared) -> RunPositions:
        """The positions of the run of a checked input: a wrapper of the model may add some to those of the input.

        Raises:
            InputError: the wrapper changes the input in a way that does not say which positions hold the tokens.
        """
        return self.runner.positions_of(prepared)
