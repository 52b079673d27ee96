"""Generation is Hugging Face's ``generate``; here its arguments are put together from TransformerLens' ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import InputError
from pellucid.model_bridge.mounting import ComponentTree
from pellucid.model_bridge.tokens import TokenRules
from pellucid.run_context import set_generation


def generate(
    model: nn.Module,
    tree: ComponentTree,
    rules: TokenRules,
    tokens: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    stop_at_eos: bool,
    eos_token_id: int | None,
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
) -> Any:
    """Run ``model.generate``, in a context of its own; arguments as :meth:`TransformerBridge.generate`.

    Raises:
        InputError: ``max_new_tokens`` below 1, or no padding token for several rows.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1; found {max_new_tokens}.")
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "repetition_penalty": repetition_penalty,
        "use_cache": use_past_kv_cache,
        **_eos(model, rules, stop_at_eos, eos_token_id),
    }
    if attention_mask is not None:
        # Without one Hugging Face makes its own: it takes ids equal to the padding token for padding.
        arguments["attention_mask"] = attention_mask
    if do_sample:
        # Explicit, so that the model's own generation configuration cannot cut what the user did not ask to cut.
        arguments |= {
            "top_k": top_k if top_k is not None else 0,
            "top_p": top_p if top_p is not None else 1.0,
            "temperature": temperature,
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
        arguments["logits_processor"] = [*arguments.get("logits_processor", ()), FrequencyPenalty(freq_penalty)]
    criteria = list(stopping_criteria) if stopping_criteria is not None else []
    bar = _Bar(max_new_tokens) if verbose else None
    if bar is not None:
        criteria.append(bar)
    try:
        with torch.no_grad():
            set_generation(tokens.shape[0])
            return model.generate(input_ids=tokens, stopping_criteria=_criteria_list(criteria), **arguments)  # type: ignore[operator]
    finally:
        if bar is not None:
            bar.close()


def _eos(model: nn.Module, rules: TokenRules, stop_at_eos: bool, eos_token_id: int | None) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    eos = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    if pad is None and rules.tokenizer is not None:
        pad = rules.tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    # -1 is no token, so nothing ends a row; None would mean "as configured".
    return {"eos_token_id": eos if stop_at_eos else -1, "pad_token_id": pad}


def _criteria_list(criteria: list[Any]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList(criteria)


class FrequencyPenalty:
    """A Hugging Face logits processor: subtracts ``penalty`` for each earlier occurrence of a token."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[rows, pos]`` ids and ``[rows, d_vocab]`` logits to logits."""
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
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
