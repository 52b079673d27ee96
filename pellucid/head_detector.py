"""TransformerLens' head detector: its names, arguments and results. The patterns are those of
:mod:`pellucid.analysis.heads`.

Unlike 4.3.0's own, no cache is written to, and a list of texts keeps every argument. Errors are of a class that is
also an ``AssertionError``, which is what TransformerLens raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.analysis.heads import after_earlier_copy, duplicate_token, previous_token
from pellucid.errors import InputError, warn
from pellucid.model_bridge.transformer_bridge import TransformerBridge

HeadName: TypeAlias = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
ErrorMeasure: TypeAlias = Literal["abs", "mul"]
LayerHeadTuple: TypeAlias = tuple[int, int]
LayerToHead: TypeAlias = dict[int, list[int]]

HEAD_NAMES: tuple[HeadName, ...] = get_args(HeadName)

INVALID_HEAD_NAME_ERR = f"detection_pattern must be a Tensor or one of head names: {HEAD_NAMES}; got %s"
SEQ_LEN_ERR = "The sequence must be non-empty and must fit within the model's context window."
DET_PAT_NOT_SQUARE_ERR = (
    "The detection pattern must be a lower triangular matrix of shape (sequence_length, sequence_length); "
    "sequence_length=%d; got detection pattern of shape %s"
)
CACHE_WITH_SEQ_LIST_ERR = (
    "A single cache cannot be reused across multiple prompts, so `cache` is not supported when `seq` is a list. Pass one "
    "prompt at a time, or omit `cache` and let each prompt be run separately."
)


class DetectionError(InputError, AssertionError):
    """What cannot be detected with: a name, a sequence or a pattern."""


def detect_head(
    model: TransformerBridge,
    seq: str | list[str],
    detection_pattern: Tensor | HeadName,
    heads: list[LayerHeadTuple] | LayerToHead | None = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> Tensor:
    """How well each head's attention on a text is a pattern's.

    Args:
        model: the bridge.
        seq: a text, or several, whose scores are averaged.
        detection_pattern: ``[pos, key_pos]``, lower triangular; or the name of one.
        heads: some only, as pairs or ``{layer: heads}``; the others get -1.
        cache: of a run of ``seq``, without its batch axis; by default it is run.
        exclude_bos: leave attention to the first token out.
        exclude_current_token: leave attention of a token to itself out.
        error_measure: ``"mul"``: the share of the attention that is on the pattern. ``"abs"``: 1 less the mean difference
            times the length, rounded to three places.

    Returns:
        ``[n_layers, n_heads]``.

    Raises:
        DetectionError: no such name or measure, an empty or too long text, a pattern of another shape.
        InputError: a cache with several texts.
    """
    if error_measure not in get_args(ErrorMeasure):
        raise DetectionError(f"Invalid error_measure={error_measure}; valid values are {get_args(ErrorMeasure)}")
    if isinstance(detection_pattern, str) and detection_pattern not in HEAD_NAMES:
        raise DetectionError(INVALID_HEAD_NAME_ERR % detection_pattern)
    if isinstance(seq, list):
        if cache is not None:
            raise InputError(CACHE_WITH_SEQ_LIST_ERR)
        several = [
            detect_head(
                model,
                each,
                detection_pattern,
                heads,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=error_measure,
            )
            for each in seq
        ]
        return torch.stack(several).mean(0)
    tokens: Any = model.to_tokens(seq) if seq else torch.zeros(1, 0)
    length = tokens.shape[-1]
    if not 1 < length < model.cfg.n_ctx:
        raise DetectionError(SEQ_LEN_ERR)
    pattern = _PATTERNS[detection_pattern](tokens) if isinstance(detection_pattern, str) else detection_pattern
    if tuple(pattern.shape) != (length, length) or bool(pattern.triu(1).any()):
        raise DetectionError(DET_PAT_NOT_SQUARE_ERR % (length, pattern.shape))
    if error_measure == "mul" and not bool(((pattern == 0) | (pattern == 1)).all()):
        warn("Using detection pattern with values other than 0 or 1 with error_measure 'mul'")
    if cache is None:
        with torch.no_grad():
            found = model.run_with_cache(tokens, remove_batch_dim=True, names_filter="blocks.*.attn.hook_pattern")
        cache = found[1]
    return _scores(model, cache, pattern, _by_layer(model, heads), exclude_bos, exclude_current_token, error_measure)


def _by_layer(
    model: TransformerBridge, heads: Sequence[LayerHeadTuple] | Mapping[int, Sequence[int]] | None
) -> dict[int, list[int]]:
    if heads is None:
        return {layer: list(range(model.cfg.n_heads)) for layer in range(model.cfg.n_layers)}
    if isinstance(heads, Mapping):
        return {layer: list(some) for layer, some in heads.items()}
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        chosen.setdefault(layer, []).append(head)
    return chosen


def _scores(
    model: TransformerBridge,
    cache: ActivationCache,
    pattern: Tensor,
    heads: Mapping[int, Sequence[int]],
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> Tensor:
    matches = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=model.cfg.dtype)
    for layer, some in heads.items():
        for head in some:
            matches[layer, head] = compute_head_attention_similarity_score(
                cache["pattern", layer, "attn"][head],
                detection_pattern=pattern,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=error_measure,
            )
    return matches


def get_previous_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: the token before, for ids ``[1, pos]``."""
    return previous_token(tokens[0])


def get_duplicate_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: earlier copies of the token, for ids ``[1, pos]``."""
    return duplicate_token(tokens[0])


def get_induction_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: what followed earlier copies of the token, for ids ``[1, pos]``."""
    return after_earlier_copy(tokens[0])


_PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def get_supported_heads() -> None:
    """Print the names of the patterns."""
    print(f"Supported heads: {HEAD_NAMES}")  # noqa: T201 (what it is for)


def compute_head_attention_similarity_score(
    attention_pattern: Tensor,
    detection_pattern: Tensor,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> float:
    """How well one head's attention is a pattern's, see :func:`detect_head`.

    Args:
        attention_pattern: ``[pos, key_pos]``, not written to.
        detection_pattern: ``[pos, key_pos]``, lower triangular.
        exclude_bos: leave the first column out.
        exclude_current_token: leave the diagonal out.
        error_measure: ``"mul"`` or ``"abs"``.

    Raises:
        DetectionError: no square.
    """
    if attention_pattern.dim() != 2 or attention_pattern.shape[0] != attention_pattern.shape[1]:
        raise DetectionError(f"Attention pattern is not square; got shape {tuple(attention_pattern.shape)}")
    pattern = detection_pattern.to(attention_pattern.device)
    compared = attention_pattern.clone() if error_measure == "mul" else (attention_pattern - pattern).abs()
    if exclude_bos:
        compared[:, 0] = 0
    if exclude_current_token:
        compared.fill_diagonal_(0)
    if error_measure == "mul":
        return float((compared * pattern).sum() / compared.sum())
    return 1 - round(float(compared.mean() * len(compared)), 3)
