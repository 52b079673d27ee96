"""Heads and circuits: what each argument is refused with."""

from __future__ import annotations

import torch

from pellucid.analysis import composition, heads
from pellucid.factored_matrix import FactoredMatrix, composition_scores
from tests.arguments.bench import (
    BRIDGE,
    CORPUS,
    TEXT,
    Bench,
    Call,
    Line,
    a_text,
    bound,
    choice,
    made,
    not_run,
    whole,
)

MATRIX = FactoredMatrix(torch.ones(2, 3, 5, 2), torch.ones(2, 3, 2, 5))
PATTERN = heads.HeadPattern("own", heads.previous_token)


def circuits(bench: Bench) -> composition.Circuits:
    return composition.circuits_of(bench.bridge)


CALLS: dict[str, Call] = {
    "head_scores": made(heads.head_scores, bridge=BRIDGE, prompts=TEXT, prior=False),
    "HeadPattern": made(heads.HeadPattern, name="own", targets=heads.previous_token),
    "HeadPattern.of": bound(lambda _: PATTERN, heads.HeadPattern.of, tokens=torch.tensor([5, 6])),
    "register_head_pattern": not_run(made(heads.register_head_pattern, pattern=PATTERN)),
    "RandomRepeats": made(heads.RandomRepeats),
    "RandomRepeats.tokens": bound(lambda _: heads.RandomRepeats(3), heads.RandomRepeats.tokens, bridge=BRIDGE),
    "RandomRepeats.bos": bound(lambda _: heads.RandomRepeats(3), heads.RandomRepeats.bos, bridge=BRIDGE),
    "ordinary_tokens": made(heads.ordinary_tokens, bridge=BRIDGE),
    "stripe_ceiling": made(heads.stripe_ceiling, length=20, bos=True),
    "copying_scores": made(heads.copying_scores, bridge=BRIDGE),
    "in_context_learning": not_run(made(heads.in_context_learning, bridge=BRIDGE, corpus=CORPUS, early=2, late=8)),
    "composition_scores": made(composition_scores, left=MATRIX, right=MATRIX),
    "head_composition": made(composition.head_composition, ov=MATRIX, qk=MATRIX, mode="Q"),
    "by_query_head": made(composition.by_query_head, weights=torch.ones(1, 2, 3), n_heads=4),
    "circuits_of": made(composition.circuits_of, bridge=BRIDGE),
    "composition": made(composition.composition, bridge=BRIDGE, mode="V"),
    "Circuits.token_ov": bound(circuits, composition.Circuits.token_ov, layer=0, head=0),
    "Circuits.token_qk": bound(circuits, composition.Circuits.token_qk, layer=0, head=0),
}

REFUSED: list[Line] = [
    ("head_scores", {"prompts": 3}, "Input is a string"),
    ("head_scores", {"patterns": "inductoin"}, "no pattern 'inductoin'. Nearest: 'induction'"),
    ("head_scores", {"patterns": 3}, "patterns is a list of patterns"),
    ("head_scores", {"patterns": [3]}, "an entry of patterns is a name or a HeadPattern"),
    ("head_scores", {"patterns": ["induction", "induction"]}, "patterns has a name twice"),
    *a_text("HeadPattern", "name"),
    ("HeadPattern", {"targets": 3}, "targets is a function"),
    ("HeadPattern", {"doc": 3}, "doc is a string"),
    ("HeadPattern.of", {"tokens": 3}, r"tokens is a tensor of ids \[pos\]"),
    ("register_head_pattern", {"pattern": "induction"}, "pattern is a HeadPattern"),
    ("register_head_pattern", {"pattern": heads.HEAD_PATTERNS["induction"]}, "There is a pattern 'induction'"),
    *(line for name in ("length", "repeats", "prompts") for line in whole("RandomRepeats", name, 1)),
    *whole("RandomRepeats", "seed"),
    ("RandomRepeats", {"prepend_bos": 3}, "Invalid prepend_bos"),
    *whole("stripe_ceiling", "length", 1),
    ("in_context_learning", {"corpus": 3}, "corpus is a Corpus"),
    *whole("in_context_learning", "early", 2),
    *whole("in_context_learning", "late", 2),
    ("in_context_learning", {"early": 8}, "late comes after early"),
    *whole("in_context_learning", "batch_size", 1),
    *(
        (name, {argument: 3}, f"{argument} is a FactoredMatrix")
        for name, arguments in (("composition_scores", ("left", "right")), ("head_composition", ("ov", "qk")))
        for argument in arguments
    ),
    *choice("head_composition", "mode"),
    *choice("composition", "mode"),
    ("by_query_head", {"weights": 3}, "weights is a tensor"),
    ("by_query_head", {"weights": torch.ones(2, 3, 4)}, "a number of heads that divides 4"),
    *whole("by_query_head", "n_heads", 1),
    *(
        line
        for name in ("Circuits.token_ov", "Circuits.token_qk")
        for argument in ("layer", "head")
        for line in whole(name, argument, 0)
    ),
]
