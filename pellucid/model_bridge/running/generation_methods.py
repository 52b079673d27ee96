"""The bridge's words for generation, TransformerLens' names; it is Hugging Face's ``generate``, see :mod:`generation`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.arguments import check_count
from pellucid.errors import CombinationError, InputError
from pellucid.model_bridge.running.generation import (
    GenerationSettings,
    as_asked,
    check_settings,
    generate,
    prepare_generation,
    wants_text,
    whole_sequences,
)
from pellucid.model_bridge.running.run_methods import RunMethods
from pellucid.model_bridge.running.stream import StreamedText, in_steps
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.names import NamesFilter

OBJECT_FLAGS = ("output_scores", "output_attentions", "output_hidden_states")
"""Keywords of Hugging Face's whose results only its output object can hold."""


class GenerationMethods(RunMethods):
    """Generation, whole and as a stream."""

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
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
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
            prepend_bos: see :meth:`~pellucid.model_bridge.running.token_methods.TokenMethods.to_tokens`.
            padding_side: of shorter strings; generation wants ``"left"``, the default here. Refused with token ids.
            return_type: ``"tokens"``, ``"str"``, or as the input came.
            verbose: show a progress bar over steps.
            output_logits: return Hugging Face's output object, with ``logits`` and ``sequences``.
            return_input_tokens: return the input tokens too, last: ``(output, input tokens)``.
            stop_strings: end a row when one of these has been written.
            stopping_criteria: one of Hugging Face's, or several.
            attention_mask: ``[batch, pos]`` for token ids. Without one Hugging Face takes ids equal to the padding token
                for padding, and a ``PellucidWarning`` says so where there are any.
            skip_special_tokens: leave the tokenizer's special tokens out of texts, those of the prompt too. ``False``
                keeps them, and the end-of-sequence token that ended a row; padding is left out either way.
            inputs_embeds: see :meth:`forward`. What comes back are the new tokens alone: there are no others.
            return_cache: return the activations too, ``(output, cache)`` or ``(output, cache, input tokens)``: of one
                more run over prompt and continuation.
            names_filter: of the cache, see :meth:`run_with_cache`.
            device: of the cache, see :meth:`run_with_cache`.
            hf_kwargs: anything else ``generate`` of Hugging Face takes (``num_beams``, ``streamer``, ...); it refuses
                what it does not know.

        Raises:
            InputError: see :meth:`forward`; an argument out of range, or one that would have no effect beside the others.
            CombinationError: ``return_cache`` of embeddings.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            use_past_kv_cache=use_past_kv_cache,
            return_type=return_type,
            verbose=verbose,
            output_logits=output_logits,
            stop_strings=stop_strings,
            stopping_criteria=stopping_criteria,
            skip_special_tokens=skip_special_tokens,
            hf_kwargs=hf_kwargs,
        )
        check_settings(self._rules, settings)
        if not return_cache and (names_filter is not None or device is not None):
            raise InputError(
                "names_filter and device are for the activations: they have no effect without return_cache=True."
            )
        if return_cache and (inputs_embeds is not None or (isinstance(input, Tensor) and input.is_floating_point())):
            raise CombinationError(
                "return_cache: a run of inputs_embeds has no tokens to run again. Give text or token ids, not embeddings."
            )
        prepared = prepare_generation(
            self.runner,
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            inputs_embeds,
            settings,
            return_input_tokens,
        )
        generated = generate(self.runner, prepared, settings)
        found = [as_asked(self.runner, input, prepared, settings, generated)]
        if return_cache:
            tokens, mask = whole_sequences(self.runner, prepared, settings, generated)
            with torch.no_grad():
                _, cache = self.run_with_cache(
                    tokens, attention_mask=mask, names_filter=names_filter, device=device, return_type=None
                )
            found.append(cache)
        if return_input_tokens:
            found.append(prepared.tokens)
        return tuple(found) if len(found) > 1 else found[0]

    def generate_stream(
        self,
        input: TextOrTokens = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
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
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Any]:
        """:meth:`generate`, its tokens given as they come; between two of them nothing runs.

        The same tokens as one call of :meth:`generate` gives. Functions of open blocks of hooks act in it, as in the thread
        that iterates.

        Args:
            input: see :meth:`generate`, as for all but the one below.
            max_tokens_per_yield: give what has come as soon as it is so many tokens, the prompt counted in the first item.

        Returns:
            An iterator. Its first item is the prompt and the first tokens, the others are new tokens: ids ``[batch, n]``
            with ``return_type="tokens"``, else text, one string or one a row. A character whose bytes are not all there
            waits for the rest.

        Raises:
            InputError: see :meth:`generate`, and before anything has run.
        """
        check_count("max_tokens_per_yield", max_tokens_per_yield)
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            use_past_kv_cache=use_past_kv_cache,
            return_type=return_type,
            verbose=verbose,
            output_logits=False,
            stop_strings=stop_strings,
            stopping_criteria=stopping_criteria,
            skip_special_tokens=True,
            hf_kwargs={},
        )
        check_settings(self._rules, settings)
        prepared = prepare_generation(
            self.runner, input, prepend_bos, padding_side, attention_mask, None, settings, False
        )
        text = StreamedText(self.runner, prepared, settings) if wants_text(settings, input, prepared) else None
        return in_steps(self.runner, prepared, settings, max_tokens_per_yield, text)

    def hf_generate(
        self,
        input: TextOrTokens = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        use_past_kv_cache: bool = True,
        return_type: Literal["input", "str", "tokens"] = "input",
        **generation_kwargs: Any,
    ) -> Any:
        """TransformerLens' call for Hugging Face's ``generate`` with all it takes; here :meth:`generate` is that already.

        Args:
            input: see :meth:`generate`, as for all others.
            generation_kwargs: Hugging Face's. With ``output_scores``, ``output_attentions``, ``output_hidden_states`` or
                ``output_logits`` its output object comes back.
        """
        if any(generation_kwargs.get(flag) for flag in OBJECT_FLAGS):
            generation_kwargs.setdefault("return_dict_in_generate", True)
        return self.generate(
            input,
            max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id if stop_at_eos else None,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            use_past_kv_cache=use_past_kv_cache,
            return_type=return_type,
            verbose=False,
            **generation_kwargs,
        )
