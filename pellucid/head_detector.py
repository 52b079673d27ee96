"""TransformerLens' head detector: its names, arguments and results. The patterns are those of
:mod:`pellucid.analysis.heads`.

Unlike 4.3.0's own, no cache is written to, and a list of texts keeps every argument. Errors are of a class that is
also an ``AssertionError``, which is what TransformerLens raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.analysis.heads import after_earlier_copy, duplicate_token, previous_token
from pellucid.arguments import check_kind, check_list, check_whole
from pellucid.errors import DetectionError, InputError, warn
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
        DetectionError: no such name or measure, an empty or too long text, a pattern of another shape, nothing that is
            compared.
        InputError: a cache with several texts, or of other tokens; no bridge, no text, no head of the model.
    """
    check_kind("model", model, TransformerBridge, "a bridge")
    _check_measure(error_measure)
    if not isinstance(detection_pattern, Tensor) and not (
        isinstance(detection_pattern, str) and detection_pattern in HEAD_NAMES
    ):
        raise DetectionError(INVALID_HEAD_NAME_ERR % (detection_pattern,))
    chosen = _by_layer(model, heads)
    if isinstance(seq, str):
        texts = [seq]
    else:
        texts = [check_kind("an entry of seq", text, str, "a string") for text in check_list("seq", seq, "texts")]
        if cache is not None:
            raise InputError(CACHE_WITH_SEQ_LIST_ERR)
    if cache is not None:
        check_kind("cache", cache, ActivationCache, "of a run of seq: an ActivationCache without its batch axis")
    prepared = []  # every text is looked at before one is run
    for text in texts:
        tokens: Any = model.to_tokens(text) if text else torch.zeros(1, 0)
        length = tokens.shape[-1]
        if not 1 < length < model.cfg.n_ctx:
            raise DetectionError(SEQ_LEN_ERR)
        _check_anything_is_left(length, exclude_bos, exclude_current_token)
        pattern = _PATTERNS[detection_pattern](tokens) if isinstance(detection_pattern, str) else detection_pattern
        if tuple(pattern.shape) != (length, length) or bool(pattern.triu(1).any()):
            raise DetectionError(DET_PAT_NOT_SQUARE_ERR % (length, pattern.shape))
        _check_finite(pattern)
        if cache is not None:
            _check_cache(cache, tokens, chosen)
        prepared.append((tokens, pattern))
    if error_measure == "mul" and any(not bool(((pattern == 0) | (pattern == 1)).all()) for _, pattern in prepared):
        warn("Using detection pattern with values other than 0 or 1 with error_measure 'mul'")
    several = []
    for tokens, pattern in prepared:
        kept = _attention(model, tokens) if cache is None else cache
        matches = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=model.cfg.dtype)
        for layer, some in chosen.items():
            for head in some:
                matches[layer, head] = compute_head_attention_similarity_score(
                    kept["pattern", layer, "attn"][head],
                    detection_pattern=pattern,
                    exclude_bos=exclude_bos,
                    exclude_current_token=exclude_current_token,
                    error_measure=error_measure,
                )
        several.append(matches)
    return several[0] if isinstance(seq, str) else torch.stack(several).mean(0)


def _attention(model: TransformerBridge, tokens: Tensor) -> ActivationCache:
    with torch.no_grad():
        found = model.run_with_cache(tokens, remove_batch_dim=True, names_filter="blocks.*.attn.hook_pattern")
    cache: ActivationCache = found[1]
    return cache


def _by_layer(model: TransformerBridge, heads: Any) -> dict[int, list[int]]:
    """The heads asked for by layer, each of the model; negative numbers count from the end, as a tensor's indices do.

    Raises:
        InputError: no pairs and no mapping, no such layer or head, none at all.
    """
    if heads is None:
        return {layer: list(range(model.cfg.n_heads)) for layer in range(model.cfg.n_layers)}
    words = "(layer, head) pairs, or maps layers to heads"
    if isinstance(heads, Mapping):
        pairs = [
            (layer, head)
            for layer, some in heads.items()
            for head in check_list(f"heads[{layer!r}]", some, "heads", empty=True)
        ]
    else:
        pairs = check_list("heads", heads, words)
    chosen: dict[int, list[int]] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"heads is a list of {words}; found {pair!r} in it.")
        for what, value, count in (("layer", pair[0], model.cfg.n_layers), ("head", pair[1], model.cfg.n_heads)):
            if not -count <= check_whole(f"a {what} of heads", value) < count:
                raise InputError(f"heads has the {what} {value}; the model's are 0 to {count - 1}.")
        chosen.setdefault(int(pair[0]), []).append(int(pair[1]))
    if not chosen:
        raise InputError("heads names no head: give None for all of them.")
    return chosen


def _check_measure(error_measure: Any) -> None:
    if error_measure not in get_args(ErrorMeasure):
        raise DetectionError(f"Invalid error_measure={error_measure}; valid values are {get_args(ErrorMeasure)}")


def _check_anything_is_left(length: int, exclude_bos: bool, exclude_current_token: bool) -> None:
    """Of one position, or two, all keys that a query sees can be left out: the score would be 0 / 0."""
    if length <= bool(exclude_bos) + bool(exclude_current_token):
        raise DetectionError(
            f"exclude_bos={exclude_bos} and exclude_current_token={exclude_current_token} leave no pair of positions of "
            f"{length} to compare: give a longer text, or leave one of them out."
        )


def _check_finite(pattern: Tensor) -> None:
    if not bool(pattern.isfinite().all()):
        raise DetectionError("detection_pattern has entries that are not finite.")


def _check_cache(cache: ActivationCache, tokens: Tensor, heads: Mapping[int, list[int]]) -> None:
    """Refuse a cache that is not of these tokens, or has its batch axis.

    Raises:
        InputError: see above.
    """
    length = tokens.shape[-1]
    if cache.tokens is not None and not torch.equal(cache.tokens.reshape(-1).cpu(), tokens[0].cpu()):
        raise InputError(
            f"cache is of a run of other tokens than seq: {cache.tokens.tolist()}; those of seq are {tokens[0].tolist()}."
        )
    for layer in heads:
        found = cache["pattern", layer, "attn"]
        if found.dim() != 3 or tuple(found.shape[1:]) != (length, length):
            raise InputError(
                f"cache has the attention of one text, [head, {length}, {length}]; found {list(found.shape)}. Run it with "
                "remove_batch_dim=True."
            )


def _row(tokens: Tensor) -> Tensor:
    """``[pos]`` ids of the one text there is.

    Raises:
        InputError: no tensor, or of several texts.
    """
    if check_kind("tokens", tokens, Tensor, "a tensor of ids [1, pos]").dim() not in (1, 2) or (
        tokens.dim() == 2 and len(tokens) != 1
    ):
        raise InputError(f"tokens is of one text, ids [1, pos]; found shape {tuple(tokens.shape)}.")
    return tokens.reshape(-1)


def get_previous_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: the token before, for ids ``[1, pos]``."""
    return previous_token(_row(tokens))


def get_duplicate_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: earlier copies of the token, for ids ``[1, pos]``."""
    return duplicate_token(_row(tokens))


def get_induction_head_detection_pattern(tokens: Tensor) -> Tensor:
    """``[pos, key_pos]``: what followed earlier copies of the token, for ids ``[1, pos]``."""
    return after_earlier_copy(_row(tokens))


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
        DetectionError: no square, another shape, no such measure, nothing that is compared; with ``"abs"`` a pattern that
            differs above the diagonal.
        InputError: no tensors.
    """
    _check_measure(error_measure)
    check_kind("attention_pattern", attention_pattern, Tensor, "a tensor [pos, key_pos]")
    check_kind("detection_pattern", detection_pattern, Tensor, "a tensor [pos, key_pos]")
    if attention_pattern.dim() != 2 or attention_pattern.shape[0] != attention_pattern.shape[1]:
        raise DetectionError(f"Attention pattern is not square; got shape {tuple(attention_pattern.shape)}")
    if detection_pattern.shape != attention_pattern.shape:
        raise DetectionError(
            f"detection_pattern has the shape of the attention, {tuple(attention_pattern.shape)}; found "
            f"{tuple(detection_pattern.shape)}."
        )
    _check_anything_is_left(len(attention_pattern), exclude_bos, exclude_current_token)
    _check_finite(detection_pattern)
    # Patterns of integers and truth values are patterns too.
    dtype = torch.promote_types(detection_pattern.dtype, attention_pattern.dtype)
    pattern = detection_pattern.to(attention_pattern.device, dtype)
    compared = attention_pattern.clone() if error_measure == "mul" else (attention_pattern - pattern).abs()
    if error_measure == "abs" and bool(compared.triu(1).any()):
        raise DetectionError(
            "attention_pattern and detection_pattern differ above the diagonal, where no query sees a key."
        )
    if exclude_bos:
        compared[:, 0] = 0
    if exclude_current_token:
        compared.fill_diagonal_(0)
    if error_measure == "mul":
        return float((compared * pattern).sum() / compared.sum())
    return 1 - round(float(compared.mean() * len(compared)), 3)
