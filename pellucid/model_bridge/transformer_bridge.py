"""The bridge: a Hugging Face BLOOM under TransformerLens' names.

It assembles what the rooms below do: a model from :mod:`hf_source`, its components from :mod:`mounting`, tokens from
:mod:`tokens`, hooks from :mod:`hooked_model`. With nothing hooked a call goes straight to Hugging Face's model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellucid.activation_cache import ActivationCache
from pellucid.errors import GradientError, InputError
from pellucid.hook_points import LensHandle
from pellucid.model_bridge.cache_plan import (
    EMBEDDING,
    CacheEstimate,
    Keeper,
    PosSlice,
    cache_bytes,
    kept_positions,
    refuse_large,
    refuse_unseen,
)
from pellucid.model_bridge.checkpoint import RANDOM_WEIGHTS
from pellucid.model_bridge.corpus.collecting import CollectingModel
from pellucid.model_bridge.generation import check_arguments, generate, texts_of
from pellucid.model_bridge.hf_source import find_bloom, load_model, make_adapter
from pellucid.model_bridge.hook_session import HookSession
from pellucid.model_bridge.hooked_model import HookRequest
from pellucid.model_bridge.mounting import ComponentTree
from pellucid.model_bridge.running import (
    ATTN_IMPLEMENTATIONS,
    AttnImplementation,
    Prepared,
    ReturnType,
    check_output,
    refuse_rows,
    without_batch_dim,
)
from pellucid.model_bridge.self_check import CheckReport, run_checks
from pellucid.model_bridge.token_methods import TokenMethods
from pellucid.model_bridge.tokens import PaddingSide, TextOrTokens, TokenRules, check_choice, check_past, ids_as_given
from pellucid.model_bridge.weight_state import ProcessableWeights, refuse_early
from pellucid.names import HookSpec, NamesFilter, runs_through
from pellucid.run_context import set_fast_attention


class TransformerBridge(ProcessableWeights, CollectingModel, TokenMethods):
    """A BLOOM model whose every activation can be read and changed.

    Args:
        hf_model: a live ``BloomForCausalLM``, or a wrapper around one (PEFT, dispatched by accelerate, quantised). It is
            not copied and not changed; two bridges on one model share its hook points.
        tokenizer: its tokenizer; without one, only token ids can be run.

    Raises:
        UnsupportedModelError: no BLOOM inside, or one configured in a way we do not handle.
    """

    def __init__(self, hf_model: nn.Module, tokenizer: Any | None = None) -> None:
        bloom = find_bloom(hf_model)
        super().__init__(hf_model, ComponentTree.of(bloom, partial(make_adapter, bloom)))
        self._refuse_other_blocks()
        for component in self._tree.components.values():
            _ = component.original_component  # another bridge's tree may be older than a change of the model
        self.training = hf_model.training
        self._rules = TokenRules(tokenizer, self.cfg.d_vocab, self.cfg.default_prepend_bos)

    @classmethod
    def boot_transformers(
        cls,
        model_name: str | os.PathLike[str] = "",
        hf_config_overrides: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any | None = None,
        load_weights: bool = True,
        trust_remote_code: bool = False,
        hf_model: nn.Module | None = None,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        attn_implementation: AttnImplementation = "eager",
        use_safetensors: bool | None = True,
        process_weights: bool | Mapping[str, bool] = False,
        allow_missing_weights: bool = False,
    ) -> TransformerBridge:
        """Open a checkpoint: a hub name, a local folder, or a live model.

        Args:
            model_name: hub name (``"bigscience/bloom-560m"``) or folder, of a model or of a PEFT adapter. With
                ``hf_model`` it may be left out.
            hf_config_overrides: configuration attributes to set before loading.
            device: where to put the model.
            dtype: of the weights; by default the checkpoint's own, as with Hugging Face.
            tokenizer: to use instead of the checkpoint's.
            load_weights: ``False`` builds the architecture with fresh weights.
            trust_remote_code: run code from the repository.
            hf_model: a live model to use as it is.
            revision: branch, tag or commit, such as ``"global_step10000"``.
            device_map: accelerate's placement.
            max_memory: limit for each device.
            offload_folder: where accelerate may put weights.
            attn_implementation: ``"eager"``, bitwise Hugging Face's, or ``"sdpa"``, see :meth:`set_attn_implementation`. It
                is the bridge's own and never handed to Hugging Face, which has no other than eager for BLOOM.
            use_safetensors: ``False`` allows pickle files, which can run code when loaded.
            process_weights: ``True``, or arguments of :meth:`process_weights`, to process the weights where they were
                loaded; what the configuration forbids is refused before any weight is read.
            allow_missing_weights: leave weights that the checkpoint lacks random, with a warning that names them, instead
                of refusing it; :meth:`verify` then has a check that fails.

        Raises:
            InputError: contradicting arguments, no such folder, a damaged file in it, or no safetensors weights.
            WeightError: weights that are damaged, missing or of other sizes; see :meth:`process_weights`, too.
            UnsupportedModelError: not a BLOOM, or one configured in a way we do not handle.
        """
        check_choice("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
        if hf_model is not None:
            unused = {
                "hf_config_overrides": hf_config_overrides,
                "device": device,
                "dtype": dtype,
                "revision": revision,
                "device_map": device_map,
                "max_memory": max_memory,
                "offload_folder": offload_folder,
            }
            given = [name for name, value in unused.items() if value is not None] + (
                [] if load_weights else ["load_weights"]
            )
            if given:
                raise InputError(
                    f"hf_model is used as it is: {', '.join(given)} would have no effect. Convert or move the model "
                    "before bridging it."
                )
            bridge = cls(hf_model, tokenizer)._processed(process_weights)
            bridge.set_attn_implementation(attn_implementation)
            return bridge
        if not str(model_name):
            raise InputError("Give a hub name or a folder, or a live model as hf_model=.")
        loaded = load_model(
            os.fspath(model_name),
            dtype=dtype,
            device=device,
            revision=revision,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            hf_config_overrides=hf_config_overrides,
            load_weights=load_weights,
            trust_remote_code=trust_remote_code,
            use_safetensors=use_safetensors,
            allow_missing_weights=allow_missing_weights,
            tokenizer=tokenizer,
            inspect=partial(refuse_early, process_weights),
        )
        bridge = cls(loaded.model, loaded.tokenizer)._processed(process_weights)
        bridge._tree.notes[RANDOM_WEIGHTS] = loaded.missing
        bridge.set_attn_implementation(attn_implementation)
        return bridge

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformerBridge:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        vars(clone).update(copy.deepcopy(vars(self), memo))
        clone._tree.sync()
        return clone

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tree.sync()

    # -- running -------------------------------------------------------------------------------------------------------

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
    ) -> Any:
        """Run the model.

        Args:
            input: a string, strings, token ids ``[pos]`` or ``[batch, pos]``, or with ``start_at_layer`` the residual
                ``[batch, pos, d_model]`` that enters that block.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` (logits and loss) or ``None``.
            loss_per_token: losses ``[batch, pos - 1]``, zero where position or target is padding, and not their mean; only
                with a loss.
            prepend_bos: put the beginning-of-sequence token before strings.
            padding_side: of shorter strings; their mask is made with them. Refused with token ids.
            attention_mask: ``[batch, pos]``, cached positions included, 1 at real tokens. Never guessed from ids: rows
                that begin or end with the padding token are run as they are, and a ``PellucidWarning`` says so.
            past_key_values: a Hugging Face cache, read and extended.
            start_at_layer: begin with the residual that enters this block.
            stop_at_layer: return the residual that enters this block, and run nothing after; negative counts from the end.
            inputs_embeds: ``[batch, pos, d_model]`` of the model's dtype, in the place of ``input``: what the token
                embedding would give. A run of embeddings has no tokens, so no loss.

        Returns:
            Logits ``[batch, pos, d_vocab]``, loss, both, ``None``, or the residual with ``stop_at_layer``. ``pos`` are the
            positions of the run: those of the input, after the virtual ones that a wrapper (prompt tuning) puts before.

        Raises:
            InputError: an input that cannot be run, with what to give instead.
        """
        check_output(return_type, loss_per_token, start_at_layer, stop_at_layer)
        prepared = self._prepare(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            past_key_values,
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
        )
        self._check_return(prepared, return_type)
        return self._finish(prepared, self._run(prepared), return_type, loss_per_token)

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
    ) -> Any:
        """Run the model with functions attached for this run.

        Args:
            input: see :meth:`forward`.
            fwd_hooks: ``(name, glob, list or predicate, function)`` pairs.
            bwd_hooks: the same for gradients; they fire in ``backward()``, also after this call.
            reset_hooks_end: ``False`` leaves the functions on.
            clear_contexts: empty every point's ``ctx`` afterwards.
            return_type: see :meth:`forward`, as for the arguments below and ``inputs_embeds``.
            remove_batch_dim: give the output of a single row without its batch axis; hooks see it with it.
            assert_effect: raise if a forward function never ran or left its tensor unchanged to the bit.

        Raises:
            HookNameError: a name that matches nothing.
            HookUnreachableError: a named point that ``start_at_layer`` or ``stop_at_layer`` leaves out.
            NoEffectError: see ``assert_effect``.
        """
        check_output(return_type, loss_per_token, start_at_layer, stop_at_layer)
        prepared = self._prepare(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            past_key_values,
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
        )
        self._check_return(prepared, return_type)
        if remove_batch_dim:
            refuse_rows(prepared.given)
        span = self._span(prepared)
        forward = self._requests(fwd_hooks, "fwd", span)
        backward = self._requests(bwd_hooks, "bwd", span)
        for handle in forward:
            handle.must_change = assert_effect
        session = HookSession(self._tree, forward + backward, keep=not reset_hooks_end)
        try:
            output = session.during(partial(self._run_to_end, prepared, return_type, loss_per_token))
        finally:
            if clear_contexts:
                self.clear_contexts()
        if assert_effect:
            for handle in forward:
                handle.check_effect()
        return without_batch_dim(output) if remove_batch_dim else output

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
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            input: see :meth:`forward`.
            return_cache_object: ``False`` gives a plain dictionary.
            remove_batch_dim: drop the batch axis of a single row.
            names_filter: which points to keep; ``None`` keeps all, the logits among them.
            stop_at_layer: see :meth:`forward`.
            start_at_layer: see :meth:`forward`.
            pos_slice: which positions of the run to keep: one, a slice or a list; other positions are never stored. Virtual
                positions of a wrapper (prompt tuning) are counted.
            incl_bwd: run ``backward()`` on the loss and keep gradients too, under ``name + "_grad"``.
            reset_hooks_end: ``False`` leaves the caching functions on.
            clear_contexts: empty every point's ``ctx`` afterwards.
            device: where to keep tensors.
            dtype: as what to keep floating-point ones.
            max_cache_bytes: refuse before running if the cache would take more.
            return_type: see :meth:`forward`, as for the arguments below and ``inputs_embeds``.

        Returns:
            ``(output, cache)``. Tensors of the cache do not change afterwards, with one sharing to know of: the entry
            ``hook_unembed`` is the very tensor of logits that is returned. Clone one before writing to it.

        Raises:
            CacheTooLargeError: see ``max_cache_bytes``.
            GradientError: ``incl_bwd`` while gradients are off.
        """
        if incl_bwd:
            if return_type not in ("loss", "logits"):
                raise InputError(f"incl_bwd runs backward() on the loss; found return_type={return_type!r}.")
            if not torch.is_grad_enabled():
                raise GradientError("incl_bwd needs gradients, and they are off (torch.no_grad or inference_mode).")
            if loss_per_token:
                raise InputError("incl_bwd runs backward() on the mean loss; loss_per_token=True has no single number.")
            return_type = "loss"
        check_output(return_type, loss_per_token, start_at_layer, stop_at_layer)
        prepared = self._prepare(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            past_key_values,
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
        )
        self._check_return(prepared, return_type)
        run = self.positions_of(prepared)
        if remove_batch_dim:
            refuse_rows(prepared.given)
        if (names_filter is None or isinstance(names_filter, str)) and self._span(prepared) is None:
            group = self._tree.group_named(names_filter)
        else:
            group = self._tree.group(self._cached_specs(prepared, names_filter))
        if max_cache_bytes is not None:
            plan = cache_bytes(group.specs, self.cfg, self._size(prepared), pos_slice, dtype, incl_bwd)
            refuse_large(plan, max_cache_bytes)
        positions = kept_positions(pos_slice, run.length)
        shifts = {spec.name: run.virtual for spec in group.specs if run.virtual and spec.component == EMBEDDING}
        if shifts and pos_slice is not None:
            positions = torch.arange(run.length)[positions]
            refuse_unseen(positions, run.virtual, next(iter(shifts)))
        if pos_slice is not None:
            reshaped = [point.name for point in group.points if point.hook_conversion is not None]
            if reshaped:
                raise InputError(
                    f"pos_slice cannot find the positions of {reshaped[0]}, which is shown in another shape."
                )
        keeper = Keeper(
            group.pos_axes,
            positions,
            device,
            dtype,
            copies=self._others_may_write(),
            owned=_owned_by_caller(prepared),
            shifts=shifts,
        )
        handles = [LensHandle(point, keeper, "fwd", point.name, reads_only=True) for point in group.points]
        if incl_bwd:
            handles += [
                LensHandle(point, keeper.keep_gradient, "bwd", point.name, reads_only=True)
                for spec, point in zip(group.specs, group.points, strict=True)
                if spec.kind != "int"
            ]
        keeper.scope = session = HookSession(self._tree, handles, keep=not reset_hooks_end)
        try:
            output = session.during(partial(self._run_to_end, prepared, return_type, loss_per_token, incl_bwd))
        finally:
            if clear_contexts:
                self.clear_contexts()
        tokens = None if run.tokens is None else run.tokens.clone()
        cache = ActivationCache(keeper.kept, self._tree.index, tokens, run.attention_mask)
        if remove_batch_dim:
            cache = cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def _run_to_end(
        self, prepared: Prepared, return_type: ReturnType, loss_per_token: bool, backward: bool = False
    ) -> Any:
        output = self._finish(prepared, self._run(prepared), return_type, loss_per_token)
        if backward:
            output.backward()
        return output

    def _cached_specs(self, prepared: Prepared, names_filter: NamesFilter) -> list[HookSpec]:
        chosen = self._tree.index.select(names_filter, self.cfg.flags)
        span = self._span(prepared)
        if span is not None and names_filter is None:
            chosen = [pair for pair in chosen if runs_through(pair[0], *span, self.cfg.n_layers)]
        elif span is not None:
            chosen = self._reachable(chosen, names_filter, span)
        return [spec for spec, _ in chosen]

    def _others_may_write(self) -> bool:
        """Whether anything but our caching could change a tensor in place after it was kept."""
        if self._tree.is_mounted() and any(not handle.reads_only for handle in self._tree.handles()):
            return True
        return self._tree.has_torch_hooks()

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
            prepared = self._prepare(input, prepend_bos, stop_at_layer=stop_at_layer)
        if prepared.tokens is not None:
            self._rules.check_range(prepared.tokens)  # nothing runs that would refuse them
        specs = self._cached_specs(prepared, names_filter)
        return cache_bytes(specs, self.cfg, self._size(prepared), pos_slice, dtype, incl_bwd)

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        input: TextOrTokens = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
        output_logits: bool = False,
        return_input_tokens: bool = False,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any | None = None,
        attention_mask: Tensor | None = None,
        skip_special_tokens: bool = True,
        inputs_embeds: Tensor | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Generate with Hugging Face's ``generate``, hooks firing at each step.

        Signature and defaults are TransformerLens'. Of the checkpoint's generation configuration only token ids are taken;
        other fields on which tokens depend are left out and named in a warning. A hook reads the step, absolute positions
        and rows from ``hook.run``.

        Args:
            input: a string, strings, or token ids; leave it out with ``inputs_embeds``.
            max_new_tokens: how many tokens to add at most.
            stop_at_eos: end a row at the end-of-sequence token; finished rows are filled with the padding token.
            eos_token_id: another end-of-sequence token, or several.
            do_sample: sample; ``False`` takes the most probable token.
            top_k: sample among the ``top_k`` most probable.
            top_p: sample among those that make up ``top_p`` of the probability.
            temperature: divides the logits before sampling.
            freq_penalty: subtracted from a token's logit for each time it has occurred, greedy or sampled.
            repetition_penalty: Hugging Face's: divides a positive logit, and multiplies a negative one, of a token that has
                occurred.
            use_past_kv_cache: keep keys and values between steps.
            prepend_bos: see :meth:`to_tokens`.
            padding_side: of shorter strings; generation wants ``"left"``, the default here. Refused with token ids.
            return_type: ``"tokens"``, ``"str"``, or as the input came.
            verbose: show a progress bar over steps.
            output_logits: return Hugging Face's output object, with ``logits`` and ``sequences``.
            return_input_tokens: return ``(output, input tokens)``.
            stop_strings: end a row when one of these has been written.
            stopping_criteria: one of Hugging Face's, or several.
            attention_mask: ``[batch, pos]`` for token ids. Without one Hugging Face takes ids equal to the padding token
                for padding, and a ``PellucidWarning`` says so where there are any.
            skip_special_tokens: leave the tokenizer's special tokens out of texts, those of the prompt too. ``False``
                keeps them, and the end-of-sequence token that ended a row; padding is left out either way.
            inputs_embeds: see :meth:`forward`. What comes back are the new tokens alone: there are no others.
            hf_kwargs: anything else ``generate`` of Hugging Face takes (``num_beams``, ``streamer``, ...); it refuses
                what it does not know.

        Raises:
            InputError: see :meth:`forward`; an argument out of range, or one that would have no effect beside the others.
        """
        check_choice("return_type", return_type, ("input", "str", "tokens"))
        sampled = check_arguments(
            self._rules,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            stop_strings=stop_strings,
            hf_kwargs=hf_kwargs,
        )
        objects = output_logits or hf_kwargs.get("return_dict_in_generate")
        if objects and return_type == "str":
            raise InputError(
                "return_type='str' would have no effect: output_logits (return_dict_in_generate) returns Hugging Face's "
                "output object. Its texts are bridge.to_string(output.sequences)."
            )
        wants_text = not objects and (
            return_type == "str"
            or (return_type == "input" and inputs_embeds is None and isinstance(input, str | list | tuple))
        )
        if not wants_text and not skip_special_tokens:
            raise InputError(
                "skip_special_tokens=False would have no effect: this call returns token ids, and all of them."
            )
        if "generation_config" in hf_kwargs:
            raise InputError(
                "generation_config would be overridden by this call's own arguments; pass its fields as keywords, or call "
                "generate of bridge.hf_model inside `with bridge.hooks(...)`."
            )
        check_past(hf_kwargs.get("past_key_values"))
        if inputs_embeds is not None:
            given = None if isinstance(input, str) and not input else input
            prepared = self._prepare(given, prepend_bos, padding_side, attention_mask, inputs_embeds=inputs_embeds)
            self._refuse_generating(prepared, return_input_tokens)
        else:
            side = "left" if padding_side is None and not isinstance(input, Tensor) else padding_side
            prepared = self._prepare(input, prepend_bos, side, attention_mask, generates=True)
            if prepared.attention_mask is None and not isinstance(input, Tensor):
                # Text without padding, and Hugging Face guesses: it would take a "<pad>" written in the text for some.
                prepared.attention_mask = torch.ones_like(prepared.given)
        if wants_text:
            self._rules.need()
        # Of embeddings, Hugging Face returns the new tokens alone.
        length, mask = (0, None) if prepared.tokens is None else (prepared.tokens.shape[1], prepared.attention_mask)
        if "max_length" in hf_kwargs:
            count = prepared.given.shape[1]
            raise InputError(
                f"max_length counts the prompt too, which has {count} tokens here, and max_new_tokens has a default: give "
                f"max_new_tokens=max_length - {count} instead."
            )
        named = {"inputs_embeds": prepared.given} if prepared.tokens is None else {"input_ids": prepared.tokens}
        session = HookSession(self._tree, components=[*self._helpers(None, None), "generate"])

        def run() -> Any:
            set_fast_attention(self._fast_root())
            return generate(
                self.original_model,
                self._tree,
                self._rules,
                named,
                prepared.attention_mask,
                max_new_tokens=max_new_tokens,
                stop_at_eos=stop_at_eos,
                eos_token_id=eos_token_id,
                do_sample=sampled,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                freq_penalty=freq_penalty,
                repetition_penalty=repetition_penalty,
                use_past_kv_cache=use_past_kv_cache,
                verbose=verbose,
                output_logits=output_logits,
                stop_strings=stop_strings,
                stopping_criteria=stopping_criteria,
                hf_kwargs=hf_kwargs,
            )

        with self._safely(prepared.given):
            output, ends = session.during(run)
        if wants_text:
            texts = texts_of(self._rules, output, length, mask, ends, skip_special_tokens)
            output = texts if isinstance(input, list | tuple) or len(texts) > 1 else texts[0]
        return (output, prepared.tokens) if return_input_tokens else output

    def _refuse_generating(self, prepared: Prepared, return_input_tokens: bool) -> None:
        if return_input_tokens:
            raise InputError("return_input_tokens: a run of inputs_embeds has no input tokens.")
        run = self.positions_of(prepared)
        if run.virtual or run.cache_is_wrappers:
            raise InputError(
                f"The model's wrapper ({type(self.hf_model).__name__}) generates from token ids only: it embeds them itself "
                "and puts positions of its own before them. Give ids, or generate with the model inside."
            )

    # -- checking ------------------------------------------------------------------------------------------------------

    def verify(
        self,
        input: TextOrTokens | None = None,
        layers: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> CheckReport:
        """Check on this very model that what Pellucid promises holds; see :mod:`pellucid.model_bridge.self_check`.

        Args:
            input: what to run, by default random tokens.
            layers: which layers' hooks to try, by default the first, a middle one and the last.
            progress: show a bar; by default when it takes a while and a person is watching.
        """
        self._refresh()
        with ids_as_given():  # each check compares like with like, and has masks of its own
            tokens = None if input is None else self._prepare(input).tokens
            return run_checks(self, self._tree, tokens, layers, progress)


def _owned_by_caller(prepared: Prepared) -> frozenset[str]:
    """Points whose tensor the caller has given or will be given back (the logits are shared, and said to be)."""
    layers = [layer for layer in (prepared.start, prepared.stop) if layer is not None]
    return frozenset({"embed.hook_in", *(f"blocks.{layer}.hook_resid_pre" for layer in layers)})
