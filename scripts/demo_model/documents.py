"""Training batches: repeats, which teach induction, beside text, which teaches languages.

A model learns to continue a repeated sequence soonest if it first meets short repeats of random tokens: the earlier
occurrence is then one of few places to look at. So the context grows in stages, and with it the share of text.

Each document has a weight per token. A random token that repeats nothing cannot be predicted: in the early stages it
weighs little, so that the gradient is about what can be learnt, and fully in the last, so that the model also learns
to expect nothing there.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from demo_model.corpus import LanguageText
from demo_model.tokenizer import BOS, SPECIAL_TOKENS, VOCABULARY_SIZE

TOKENS_PER_STEP = 3072
TILED_SHARE = 0.7
DECLARATION_SHARE = 0.4
PARAGRAPH_START_SHARE = 0.5
QUOTING_SHARE = 0.6
BOS_SHARE = 0.3


@dataclass(frozen=True)
class Stage:
    """A part of training, from the fraction `start` of all steps on."""

    start: float
    length: int
    repeat_share: float
    novel_weight: float


CURRICULUM = (
    Stage(start=0.0, length=32, repeat_share=0.9, novel_weight=0.1),
    Stage(start=0.18, length=64, repeat_share=0.55, novel_weight=0.3),
    Stage(start=0.4, length=128, repeat_share=0.35, novel_weight=1.0),
)


def stage_at(progress: float) -> Stage:
    """The stage in force when `progress` (0 to 1) of the steps are done."""
    return [stage for stage in CURRICULUM if stage.start <= progress][-1]


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end, each closed by `</s>`; `starts` are the positions where one begins."""

    ids: np.ndarray
    starts: np.ndarray

    def window(self, length: int, rng: np.random.Generator, at_start: bool = False) -> np.ndarray:
        """`length` tokens in a row, from a random place or from the beginning of a random document."""
        last = len(self.ids) - length
        start = rng.choice(self.starts[self.starts <= last]) if at_start else rng.integers(0, last, endpoint=True)
        return self.ids[start : start + length].copy()


def to_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """Tokenise documents and join them."""
    rows = [[*row, tokenizer.eos_token_id] for row in tokenizer(documents)["input_ids"]]
    ends = np.cumsum([len(row) for row in rows])
    return TokenStream(np.concatenate(rows), np.concatenate([[0], ends[:-1]]))


@dataclass(frozen=True)
class LanguageStreams:
    """The two kinds of text of one language, as tokens."""

    declaration: TokenStream
    sampled: TokenStream

    def window(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """A piece of the declaration or of sampled sentences, some of the latter quoting themselves.

        Sentences of independent words hold nothing that induction could use; the quotations put its use into text.
        """
        if rng.random() < DECLARATION_SHARE:
            return self.declaration.window(length, rng, at_start=rng.random() < PARAGRAPH_START_SHARE)
        ids = self.sampled.window(length, rng)
        if rng.random() < QUOTING_SHARE:
            copy_segments(ids, int(rng.integers(1, 2, endpoint=True)), rng)
        return ids


def to_streams(texts: dict[str, LanguageText], tokenizer: PreTrainedTokenizerFast) -> dict[str, LanguageStreams]:
    """The streams of every language, by language code."""
    return {
        code: LanguageStreams(to_stream(text.declaration, tokenizer), to_stream(text.sampled, tokenizer))
        for code, text in texts.items()
    }


def training_batch(
    streams: dict[str, LanguageStreams], stage: Stage, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss weights, both [document, position]."""
    ids, weights = zip(*(_document(streams, stage, rng) for _ in range(TOKENS_PER_STEP // stage.length)), strict=True)
    return np.stack(ids), np.stack(weights)


def _document(
    streams: dict[str, LanguageStreams], stage: Stage, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    if rng.random() < stage.repeat_share:
        ids, predictable = repeated_document(stage.length, rng)
        weights = np.where(predictable, 1.0, stage.novel_weight)
    else:
        language = str(rng.choice(list(streams)))
        ids, weights = streams[language].window(stage.length, rng), np.ones(stage.length)
    if rng.random() < BOS_SHARE:
        ids = np.concatenate([[BOS], ids[:-1]])
        weights = np.concatenate([[0.0], weights[:-1]])
    return ids, weights


def repeated_document(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens that repeat themselves, and which of them the tokens before give away.

    Most are one sequence over and over; the others random tokens throughout, with two segments that come back.
    """
    if rng.random() < TILED_SHARE:
        period = int(rng.integers(3, length // 2, endpoint=True))
        return np.resize(random_tokens(period, rng), length), np.arange(length) > period
    ids = random_tokens(length, rng)
    return ids, copy_segments(ids, 2, rng)


def random_tokens(count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens drawn uniformly, special ones excepted."""
    return rng.integers(len(SPECIAL_TOKENS), VOCABULARY_SIZE, size=count)


def copy_segments(ids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Copy `count` (1 or 2) segments of the first half of `ids`, in place, into its third and its last quarter.

    Returns where a token is predictable from its earlier occurrence: in a copy, but for the copy's first token.
    """
    length = len(ids)
    predictable = np.zeros(length, dtype=bool)
    for quarter in range(4 - count, 4):
        width = rng.integers(4, length // 4, endpoint=True)
        source = rng.integers(0, length // 2 - width, endpoint=True)
        target = quarter * length // 4 + rng.integers(0, length // 4 - width, endpoint=True)
        ids[target : target + width] = ids[source : source + width]
        predictable[target + 1 : target + width] = True
    return predictable
