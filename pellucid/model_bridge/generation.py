"""Generation is Hugging Face's ``generate``; here its arguments are put together from TransformerLens' ones.

Hugging Face fills whatever a call leaves open from the checkpoint's own generation configuration. A call of the bridge takes
only token ids from there (end of sequence, padding): greedy means greedy, and sampling means what the arguments say. Every
other field that the checkpoint sets is set back, and those on which tokens depend are named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.arguments import check_count, check_function, check_number, check_texts
from pellucid.errors import InputError, warn
from pellucid.model_bridge.mounting import ComponentTree
from pellucid.model_bridge.tokens import TokenRules

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


def generate(
    model: nn.Module,
    tree: ComponentTree,
    rules: TokenRules,
    given: Mapping[str, Tensor],
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    stop_at_eos: bool,
    eos_token_id: int | Sequence[int] | None,
    do_sample: bool,
    top_k: int | None,
    top_p: float | None,
    temperature: float,
    freq_penalty: float,
    repetition_penalty: float,
    use_past_kv_cache: bool,
    verbose: bool,
    output_logits: bool,
    stop_strings: str | Sequence[str] | None,
    stopping_criteria: Any | None,
    hf_kwargs: Mapping[str, Any],
) -> tuple[Any, EndTokens]:
    """Run ``model.generate``, in a context of its own; arguments as :meth:`TransformerBridge.generate`.

    ``given`` is the input by Hugging Face's name.

    Returns:
        What Hugging Face gives, and how its rows end.
    """
    ends = _end_tokens(model, rules, stop_at_eos, eos_token_id, hf_kwargs)
    arguments: dict[str, Any] = {
        **_set_back(model, hf_kwargs),
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "repetition_penalty": float(repetition_penalty),
        "use_cache": use_past_kv_cache,
        # -1 is no token, so nothing ends a row; None would mean "as configured".
        "eos_token_id": list(ends.eos) or -1,
        "pad_token_id": ends.pad,
    }
    if attention_mask is not None:
        # Without one Hugging Face makes its own: it takes ids equal to the padding token for padding.
        arguments["attention_mask"] = attention_mask
    if do_sample:
        # Explicit: Hugging Face's own default cuts at the 50 most probable.
        arguments |= {
            "top_k": top_k if top_k is not None else 0,
            "top_p": top_p if top_p is not None else 1.0,
            "temperature": float(temperature),  # Hugging Face takes no whole number
        }
    if output_logits:
        arguments |= {"output_logits": True, "return_dict_in_generate": True}
    if stop_strings is not None:
        arguments |= {"stop_strings": stop_strings, "tokenizer": rules.need()}
    if tree.is_mounted():
        # A compiled step would be traced with or without the hooks of another.
        arguments["disable_compile"] = True
    arguments.update(hf_kwargs)
    if freq_penalty:
        penalty = FrequencyPenalty(freq_penalty, attention_mask)
        arguments["logits_processor"] = [*arguments.get("logits_processor", ()), penalty]
    criteria = _as_list(stopping_criteria)
    bar = _Bar(max_new_tokens) if verbose else None
    if bar is not None:
        criteria.append(bar)
    try:
        with torch.no_grad():
            output = model.generate(**given, stopping_criteria=_criteria_list(criteria), **arguments)  # type: ignore[operator]
            return output, ends
    finally:
        if bar is not None:
            bar.close()


def check_arguments(
    rules: TokenRules,
    *,
    max_new_tokens: int,
    stop_at_eos: bool,
    eos_token_id: int | Sequence[int] | None,
    do_sample: bool,
    top_k: int | None,
    top_p: float | None,
    temperature: float,
    freq_penalty: float,
    repetition_penalty: float,
    stop_strings: str | Sequence[str] | None,
    hf_kwargs: Mapping[str, Any],
) -> bool:
    """Refuse what is out of range or without effect; whether tokens are sampled.

    Raises:
        InputError: naming the argument.
    """
    for name, ours in RENAMED.items():
        if name in hf_kwargs:
            raise InputError(f"{name} is Hugging Face's word for {ours}. Give that argument instead.")
    check_count("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, at_least=0)
    check_number("freq_penalty", freq_penalty, at_least=0)
    check_number("repetition_penalty", repetition_penalty, above=0)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p, above=0, at_most=1)
    sampled = do_sample and temperature != 0  # 0 is TransformerLens' way to ask for the most probable token
    if not sampled:
        unused = {"top_k": top_k, "top_p": top_p, "temperature": None if temperature in (0, 1) else temperature}
        given = [f"{name}={value}" for name, value in unused.items() if value is not None]
        if given:
            why = "temperature=0" if do_sample else "do_sample=False"
            raise InputError(f"{' and '.join(given)} would have no effect: {why} takes the most probable token.")
    if eos_token_id is not None:
        if not stop_at_eos:
            raise InputError(f"eos_token_id={eos_token_id} would have no effect: stop_at_eos=False ends a row nowhere.")
        ids = list(eos_token_id) if isinstance(eos_token_id, Iterable) else [eos_token_id]
        if not ids:
            raise InputError("eos_token_id is an empty list. stop_at_eos=False ends a row nowhere.")
        for token in ids:
            if check_count("eos_token_id", token, at_least=-1) == -1:
                raise InputError("eos_token_id=-1 is no token. stop_at_eos=False ends a row nowhere.")
            check_count("eos_token_id", token, 0, rules.d_vocab - 1)
    if stop_strings is not None:
        check_texts("stop_strings", [stop_strings] if isinstance(stop_strings, str) else stop_strings)
        rules.need()
    return sampled


def _end_tokens(
    model: nn.Module, rules: TokenRules, stop_at_eos: bool, eos_token_id: Any, hf_kwargs: Mapping[str, Any]
) -> EndTokens:
    config = getattr(model, "generation_config", None)
    eos = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
    ids = () if eos is None else (int(eos),) if isinstance(eos, int) else tuple(map(int, eos))
    pad = hf_kwargs.get("pad_token_id")
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    if pad is None and rules.tokenizer is not None:
        pad = rules.tokenizer.pad_token_id
    if pad is None and ids:
        pad = ids[0]
    return EndTokens(ids if stop_at_eos else (), pad)


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
