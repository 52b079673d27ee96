"""Generation is Hugging Face's ``generate``; here its arguments are put together from TransformerLens' ones.

Hugging Face fills whatever a call leaves open from the checkpoint's own generation configuration. A call of the bridge takes
only token ids from there (end of sequence, padding): greedy means greedy, and sampling means what the arguments say. Every
other field that the checkpoint sets is set back, and those on which tokens depend are named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellucid.arguments import check_choice, check_count, check_function, check_number, check_texts
from pellucid.errors import InputError, warn
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.running.runner import Prepared, Runner
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens, TokenRules, check_past
from pellucid.run_context import set_fast_attention

KEPT = frozenset({"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "transformers_version"})
"""Fields of a checkpoint's generation configuration that are facts, about its vocabulary and about who wrote it."""
NEUTRAL: Mapping[str, Any] = {
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "typical_p": 1.0,
}
"""What sets a field back where ``None`` is no value for it: Hugging Face's own defaults."""
OURS = frozenset(
    {"do_sample", "max_length", "max_new_tokens", "repetition_penalty", "temperature", "top_k", "top_p", "use_cache"}
)
"""Fields that an argument of the call decides, so that setting them back needs no warning."""
TOKENS_DO_NOT_DEPEND_ON = frozenset(
    {
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "low_memory",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
    }
)
RENAMED = {"input_ids": "input", "inputs": "input", "use_cache": "use_past_kv_cache"}
"""Words of Hugging Face's for arguments of the call."""


@dataclass(frozen=True)
class EndTokens:
    """The ids that end a row, and the one that fills it afterwards."""

    eos: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True)
class GenerationSettings:
    """The arguments of :meth:`pellucid.TransformerBridge.generate` but for its input; see there."""

    max_new_tokens: int
    stop_at_eos: bool
    eos_token_id: int | Sequence[int] | None
    do_sample: bool
    top_k: int | None
    top_p: float | None
    temperature: float
    freq_penalty: float
    repetition_penalty: float
    use_past_kv_cache: bool
    return_type: Literal["input", "str", "tokens"]
    verbose: bool
    output_logits: bool
    stop_strings: str | Sequence[str] | None
    stopping_criteria: Any | None
    skip_special_tokens: bool
    hf_kwargs: Mapping[str, Any]

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled; a temperature of 0 is TransformerLens' way to ask for the most probable token."""
        return self.do_sample and self.temperature != 0

    @property
    def gives_object(self) -> bool:
        """Whether Hugging Face's output object is returned."""
        return bool(self.output_logits or self.hf_kwargs.get("return_dict_in_generate"))


def generate(runner: Runner, prepared: Prepared, settings: GenerationSettings) -> Any:
    """Run ``generate`` of the model, in a context of its own.

    Args:
        runner: what runs the model.
        prepared: the checked input.
        settings: checked, see :func:`check_settings`.

    Returns:
        Token ids ``[rows, pos]`` or Hugging Face's output object.
    """
    named = {"inputs_embeds": prepared.given} if prepared.tokens is None else {"input_ids": prepared.tokens}
    ends = end_tokens(runner.model, runner.rules, settings)
    session = HookSession(runner.tree, components=[*runner.helpers(None, None), "generate"])
    with runner.safely(prepared.given):
        return session.during(partial(_generate, runner, named, prepared.attention_mask, settings, ends))


def as_asked(
    runner: Runner, input: TextOrTokens, prepared: Prepared, settings: GenerationSettings, generated: Any
) -> Any:
    """What was generated, as text where that is asked for: one, or one a row.

    Args:
        runner: what ran the model.
        input: as the user gave it: text in, text out.
        prepared: the same, checked.
        settings: those of the generation.
        generated: what :func:`generate` gave.
    """
    if not wants_text(settings, input, prepared):
        return generated
    ends = end_tokens(runner.model, runner.rules, settings)
    # Of embeddings, Hugging Face returns the new tokens alone.
    length, mask = (0, None) if prepared.tokens is None else (prepared.tokens.shape[1], prepared.attention_mask)
    texts = texts_of(runner.rules, generated, length, mask, ends, settings.skip_special_tokens)
    return texts if isinstance(input, list | tuple) or len(texts) > 1 else texts[0]


def whole_sequences(
    runner: Runner, prepared: Prepared, settings: GenerationSettings, generated: Any
) -> tuple[Tensor, Tensor]:
    """Prompts and continuations ``[batch, pos]``, and their mask: that of the prompts, then 1 up to each row's end.

    Raises:
        InputError: there are more sequences than prompts.
    """
    tokens: Tensor = generated.sequences if settings.gives_object else generated
    prompts = prepared.given
    if tokens.shape[0] != prompts.shape[0]:
        raise InputError(
            f"return_cache runs each prompt's sequence once more; there are {tokens.shape[0]} sequences of "
            f"{prompts.shape[0]} prompts. Run them yourself: run_with_cache(sequences)."
        )
    mask = torch.ones_like(tokens)
    if prepared.attention_mask is not None:
        mask[:, : prompts.shape[1]] = prepared.attention_mask
    elif prepared.tokens is not None:
        mask[:, : prompts.shape[1]] = guessed_mask(runner, prepared.tokens, settings)
    ends = end_tokens(runner.model, runner.rules, settings).eos
    if ends:
        ended = torch.isin(tokens[:, prompts.shape[1] :], torch.tensor(ends, device=tokens.device)).long()
        mask[:, prompts.shape[1] :] = ended.cumsum(1) - ended == 0  # the end itself is a token
    return tokens, mask


def guessed_mask(runner: Runner, tokens: Tensor, settings: GenerationSettings) -> Tensor:
    """``[batch, pos]``: which ids Hugging Face's ``generate`` takes for padding where it is given no mask."""
    ends = end_tokens(runner.model, runner.rules, settings)
    if ends.pad is None or ends.pad in ends.eos or not bool((tokens == ends.pad).any()):
        return torch.ones_like(tokens)
    return (tokens != ends.pad).long()


def prepare_generation(
    runner: Runner,
    input: TextOrTokens,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    settings: GenerationSettings,
    return_input_tokens: bool,
) -> Prepared:
    """The checked input of a generation.

    Raises:
        InputError: it cannot be generated from, or ``settings`` have no effect beside it.
    """
    check_past(settings.hf_kwargs.get("past_key_values"))
    if inputs_embeds is not None:
        given = None if isinstance(input, str) and not input else input
        prepared = runner.prepare(given, prepend_bos, padding_side, attention_mask, inputs_embeds=inputs_embeds)
        if return_input_tokens:
            raise InputError("return_input_tokens: a run of inputs_embeds has no input tokens.")
        run = runner.positions_of(prepared)
        if run.virtual or run.cache_is_wrappers:
            raise InputError(
                f"The model's wrapper ({type(runner.model).__name__}) generates from token ids only: it embeds them "
                "itself and puts positions of its own before them. Give ids, or generate with the model inside."
            )
    else:
        side = "left" if padding_side is None and not isinstance(input, Tensor) else padding_side
        prepared = runner.prepare(input, prepend_bos, side, attention_mask, generates=True)
        if prepared.attention_mask is None and not isinstance(input, Tensor):
            # Text without padding, and Hugging Face guesses: it would take a "<pad>" written in the text for some.
            prepared.attention_mask = torch.ones_like(prepared.given)
    if not settings.skip_special_tokens and not wants_text(settings, input, prepared):
        raise InputError(
            "skip_special_tokens=False would have no effect: this call returns token ids, and all of them."
        )
    if "max_length" in settings.hf_kwargs:
        count = prepared.given.shape[1]
        raise InputError(
            f"max_length counts the prompt too, which has {count} tokens here, and max_new_tokens has a default: give "
            f"max_new_tokens=max_length - {count} instead."
        )
    if wants_text(settings, input, prepared):
        runner.rules.need()
    return prepared


def wants_text(settings: GenerationSettings, input: TextOrTokens, prepared: Prepared) -> bool:
    """Whether text is to be returned, not token ids."""
    if settings.gives_object:
        return False
    given_text = prepared.tokens is not None and isinstance(input, str | list | tuple)
    return settings.return_type == "str" or (settings.return_type == "input" and given_text)


def _generate(
    runner: Runner,
    named: Mapping[str, Tensor],
    attention_mask: Tensor | None,
    settings: GenerationSettings,
    ends: EndTokens,
) -> Any:
    set_fast_attention(runner.fast_root())
    model: Any = runner.model
    arguments: dict[str, Any] = {
        **_set_back(model, settings.hf_kwargs),
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.samples,
        "repetition_penalty": float(settings.repetition_penalty),
        "use_cache": settings.use_past_kv_cache,
        # -1 is no token, so nothing ends a row; None would mean "as configured".
        "eos_token_id": list(ends.eos) or -1,
        "pad_token_id": ends.pad,
    }
    if attention_mask is not None:
        # Without one Hugging Face makes its own: it takes ids equal to the padding token for padding.
        arguments["attention_mask"] = attention_mask
    if settings.samples:
        # Explicit: Hugging Face's own default cuts at the 50 most probable.
        arguments |= {
            "top_k": settings.top_k if settings.top_k is not None else 0,
            "top_p": settings.top_p if settings.top_p is not None else 1.0,
            "temperature": float(settings.temperature),  # Hugging Face takes no whole number
        }
    if settings.output_logits:
        arguments |= {"output_logits": True, "return_dict_in_generate": True}
    if settings.stop_strings is not None:
        arguments |= {"stop_strings": settings.stop_strings, "tokenizer": runner.rules.need()}
    if runner.tree.is_mounted():
        # A compiled step would be traced with or without the hooks of another.
        arguments["disable_compile"] = True
    arguments.update(settings.hf_kwargs)
    if settings.freq_penalty:
        penalty = FrequencyPenalty(settings.freq_penalty, attention_mask)
        arguments["logits_processor"] = [*arguments.get("logits_processor", ()), penalty]
    criteria = _as_list(settings.stopping_criteria)
    bar = _Bar(settings.max_new_tokens) if settings.verbose else None
    if bar is not None:
        criteria.append(bar)
    try:
        with torch.no_grad():
            return model.generate(**named, stopping_criteria=_criteria_list(criteria), **arguments)
    finally:
        if bar is not None:
            bar.close()


def check_settings(rules: TokenRules, settings: GenerationSettings) -> None:
    """Refuse what is out of range or without effect.

    Raises:
        InputError: naming the argument.
    """
    check_choice("return_type", settings.return_type, ("input", "str", "tokens"))
    for name, ours in RENAMED.items():
        if name in settings.hf_kwargs:
            raise InputError(f"{name} is Hugging Face's word for {ours}. Give that argument instead.")
    if "generation_config" in settings.hf_kwargs:
        raise InputError(
            "generation_config would be overridden by this call's own arguments; pass its fields as keywords, or call "
            "generate of bridge.hf_model inside `with bridge.hooks(...)`."
        )
    check_count("max_new_tokens", settings.max_new_tokens)
    check_number("temperature", settings.temperature, at_least=0)
    check_number("freq_penalty", settings.freq_penalty, at_least=0)
    check_number("repetition_penalty", settings.repetition_penalty, above=0)
    if settings.top_k is not None:
        check_count("top_k", settings.top_k)
    if settings.top_p is not None:
        check_number("top_p", settings.top_p, above=0, at_most=1)
    if not settings.samples:
        temperature = None if settings.temperature in (0, 1) else settings.temperature
        unused = {"top_k": settings.top_k, "top_p": settings.top_p, "temperature": temperature}
        given = [f"{name}={value}" for name, value in unused.items() if value is not None]
        if given:
            why = "temperature=0" if settings.do_sample else "do_sample=False"
            raise InputError(f"{' and '.join(given)} would have no effect: {why} takes the most probable token.")
    eos = settings.eos_token_id
    if eos is not None:
        if not settings.stop_at_eos:
            raise InputError(f"eos_token_id={eos} would have no effect: stop_at_eos=False ends a row nowhere.")
        ids = list(eos) if isinstance(eos, Iterable) else [eos]
        if not ids:
            raise InputError("eos_token_id is an empty list. stop_at_eos=False ends a row nowhere.")
        for token in ids:
            if check_count("eos_token_id", token, at_least=-1) == -1:
                raise InputError("eos_token_id=-1 is no token. stop_at_eos=False ends a row nowhere.")
            check_count("eos_token_id", token, 0, rules.d_vocab - 1)
    if settings.stop_strings is not None:
        strings = settings.stop_strings
        check_texts("stop_strings", [strings] if isinstance(strings, str) else strings)
        rules.need()
    if settings.gives_object and settings.return_type == "str":
        raise InputError(
            "return_type='str' would have no effect: output_logits (return_dict_in_generate) returns Hugging Face's "
            "output object. Its texts are bridge.to_string(output.sequences)."
        )


def end_tokens(model: nn.Module, rules: TokenRules, settings: GenerationSettings) -> EndTokens:
    """The ids that end a row of this generation."""
    config = getattr(model, "generation_config", None)
    eos = settings.eos_token_id
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    ids = () if eos is None else (int(eos),) if isinstance(eos, int) else tuple(map(int, eos))
    pad = settings.hf_kwargs.get("pad_token_id")
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    if pad is None and rules.tokenizer is not None:
        pad = rules.tokenizer.pad_token_id
    if pad is None and ids:
        pad = ids[0]
    return EndTokens(ids if settings.stop_at_eos else (), pad)


def _set_back(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that undo what the checkpoint's generation configuration sets, except token ids and what was ``given``."""
    from transformers import GenerationConfig

    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return {}
    found = {}
    for name, default in vars(GenerationConfig()).items():  # no custom field: nothing of Hugging Face's reads one
        value = getattr(config, name, None)
        ours_to_say = name not in KEPT and name not in given and not name.startswith("_")
        if ours_to_say and value not in (None, default, NEUTRAL.get(name)):
            found[name] = value
    told = {name: value for name, value in found.items() if name not in OURS and name not in TOKENS_DO_NOT_DEPEND_ON}
    if told:
        fields = ", ".join(f"{name}={value!r}" for name, value in told.items())
        warn(
            f"The checkpoint's generation configuration sets {fields}. bridge.generate leaves that out: tokens are chosen "
            f"as its arguments say. To have it, pass it: generate(..., {fields}).",
        )
    return {name: NEUTRAL.get(name) for name in found}


def texts_of(
    rules: TokenRules, rows: Tensor, prompt_length: int, mask: Tensor | None, ends: EndTokens, skip_special: bool
) -> list[str]:
    """Texts of generated rows ``[rows, pos]``, without the padding before them (by ``mask``) and after their end.

    Args:
        rules: with a tokenizer.
        rows: ids; of one prompt after the other, where each has several.
        prompt_length: columns of the prompts.
        mask: ``[batch, prompt_length]``.
        ends: how rows end.
        skip_special: leave out the tokenizer's special tokens.
    """
    texts = []
    for index, row in enumerate(rows.tolist()):
        prompt, added = row[:prompt_length], row[prompt_length:]
        if mask is not None:
            real = mask[index * mask.shape[0] // rows.shape[0]].tolist()
            prompt = [token for token, keep in zip(prompt, real, strict=True) if keep]
        end = next((place for place, token in enumerate(added) if token in ends.eos), None)
        if end is not None:
            added = added[: end + 1]
        else:
            while added and added[-1] == ends.pad:
                added.pop()
        text = rules.need().decode(prompt + added, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        texts.append(str(text))
    return texts


def _as_list(criteria: Any) -> list[Any]:
    if criteria is None:
        return []
    listed = list(criteria) if isinstance(criteria, Iterable) else [criteria]
    for entry in listed:
        check_function("stopping_criteria", entry, "a function of ids and scores, or a list of them")
    return listed


def _criteria_list(criteria: list[Any]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList(criteria)


class FrequencyPenalty:
    """A Hugging Face logits processor: subtracts ``penalty`` for each earlier occurrence of a token.

    Args:
        penalty: of one occurrence.
        mask: of the prompts, ``[batch, pos]``; padding is no occurrence.
    """

    def __init__(self, penalty: float, mask: Tensor | None = None) -> None:
        self.penalty = penalty
        self.mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[rows, pos]`` ids and ``[rows, d_vocab]`` logits to logits."""
        occurs = torch.ones_like(input_ids, dtype=scores.dtype)
        if self.mask is not None:
            beams = input_ids.shape[0] // self.mask.shape[0]
            occurs[:, : self.mask.shape[1]] = self.mask.repeat_interleave(beams, dim=0).to(scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, occurs)
        return scores - self.penalty * counts


class _Bar:
    """A progress bar over steps, as a stopping criterion that never stops anything."""

    def __init__(self, total: int) -> None:
        from pellucid.progress import progress_bar

        self._bar = progress_bar(total=total, desc="generate", unit="token")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._bar.update()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
