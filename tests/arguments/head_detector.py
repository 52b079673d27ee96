"""TransformerLens' head detector: what each argument is refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pellucid import ActivationCache, head_detector
from tests.arguments.bench import BRIDGE, TEXT, Bench, Call, Line, Of, made, not_run

SHORT = "Everyone has"
PATTERN = torch.ones(3, 3).tril(-1)
ATTENTION = torch.full((3, 3), 0.5).tril()
FINDERS = tuple(f"get_{name}_detection_pattern" for name in head_detector.HEAD_NAMES)


def run_of(bench: Bench, text: str, remove_batch_dim: bool = True) -> ActivationCache:
    return bench.bridge.run_with_cache(text, remove_batch_dim=remove_batch_dim)[1]


def without_ids(bench: Bench) -> ActivationCache:
    """One whose length alone says of what it is."""
    return ActivationCache(run_of(bench, SHORT).cache_dict, bench.bridge, has_batch_dim=False)


def with_cache(cache: Callable[[Bench], ActivationCache]) -> Call:
    return made(head_detector.detect_head, model=BRIDGE, seq=SHORT, detection_pattern="induction_head", cache=Of(cache))


CALLS: dict[str, Call] = {
    "detect_head": made(
        head_detector.detect_head, model=BRIDGE, seq=TEXT, detection_pattern="induction_head", heads=[(0, 1), (-1, -1)]
    ),
    **{
        f"detect_head with {words}": given
        for words, given in {
            "a cache": with_cache(lambda bench: run_of(bench, SHORT)),
            "a cache that does not say its ids": with_cache(without_ids),
            "a cache of rows": not_run(with_cache(lambda bench: run_of(bench, SHORT, remove_batch_dim=False))),
        }.items()
    },
    **{name: made(getattr(head_detector, name), tokens=torch.tensor([[5, 6, 5]])) for name in FINDERS},
    "compute_head_attention_similarity_score": made(
        head_detector.compute_head_attention_similarity_score,
        attention_pattern=ATTENTION,
        detection_pattern=PATTERN,
        exclude_bos=False,
        exclude_current_token=True,
        error_measure="abs",
    ),
}

OF_ONE_HEAD: list[tuple[dict[str, Any], str]] = [
    ({"attention_pattern": 3}, "attention_pattern is a tensor"),
    ({"attention_pattern": ATTENTION[:2]}, "Attention pattern is not square"),
    ({"attention_pattern": ATTENTION[None]}, "Attention pattern is not square"),
    ({"detection_pattern": 3}, "detection_pattern is a tensor"),
    ({"detection_pattern": PATTERN[:1, :1]}, "detection_pattern has the shape of the attention"),
    ({"detection_pattern": torch.ones(3)}, "detection_pattern has the shape of the attention"),
    ({"detection_pattern": torch.full((3, 3), torch.nan).tril()}, "detection_pattern has entries that are not finite"),
    ({"detection_pattern": torch.ones(3, 3)}, "detection_pattern differ above the diagonal"),
    *(({"error_measure": value}, "Invalid error_measure") for value in ("mean", "", None)),
    (
        {"attention_pattern": ATTENTION[:2, :2], "detection_pattern": PATTERN[:2, :2], "exclude_bos": True},
        "exclude_bos=True and exclude_current_token=True leave no pair",
    ),
]

REFUSED: list[Line] = [
    *(("detect_head", {"model": model}, "model is a bridge; found") for model in (3, None, "gpt2")),
    *(
        ("detect_head", {"seq": seq}, "seq is a (list of texts|string)")
        for seq in (3, [], [3], {"a": 1}, torch.ones(1, 3))
    ),
    *(("detect_head", {"seq": seq}, "The sequence must be non-empty") for seq in ("", [TEXT, ""], TEXT * 1000)),
    *(
        ("detect_head", {"detection_pattern": value}, "detection_pattern must be a Tensor or one of")
        for value in ("nonsense", "", 3, None, ["induction_head"], PATTERN.numpy())
    ),
    *(
        ("detect_head", {"detection_pattern": value}, "detection pattern must be a lower triangular matrix")
        for value in (PATTERN, torch.ones(6, 6), torch.zeros(1, 6, 6))
    ),
    *(("detect_head", {"heads": value}, "heads is a list of") for value in (3, "0.1", [], [3], [(0, 1, 2)], ["01"])),
    ("detect_head", {"heads": {0: 3}}, r"heads\[0\] is a list of"),
    ("detect_head", {"heads": {0: []}}, "heads names no head"),
    *(
        ("detect_head", {"heads": [pair]}, words)
        for pair, words in {
            (400, 0): "heads has the layer 400",
            (-400, 0): "heads has the layer -400",
            (0, 400): "heads has the head 400",
            (0, -400): "heads has the head -400",
            (1.5, 0): "a layer of heads is a whole number",
            (0, True): "a head of heads is a whole number",
        }.items()
    ),
    *(("detect_head", {"cache": cache}, "cache is of a run of seq") for cache in (3, {"blocks.0": ATTENTION})),
    ("detect_head with a cache", {"seq": TEXT}, "cache is of a run of other tokens than seq"),
    ("detect_head with a cache", {"seq": [SHORT]}, "A single cache cannot be reused"),
    ("detect_head with a cache that does not say its ids", {"seq": TEXT}, "cache has the attention of one text"),
    ("detect_head with a cache of rows", {}, "cache has the attention of one text"),
    *(("detect_head", {"error_measure": value}, "Invalid error_measure") for value in ("mean", "", 3, None)),
    *((name, {"tokens": 3}, "tokens is a tensor of ids") for name in FINDERS),
    *(
        (name, {"tokens": tokens}, "tokens is of one text")
        for name in FINDERS
        for tokens in (torch.tensor(5), torch.tensor([[5, 6], [5, 7]]), torch.ones(1, 2, 3))
    ),
    *(("compute_head_attention_similarity_score", given, words) for given, words in OF_ONE_HEAD),
]
