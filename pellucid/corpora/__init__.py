"""Corpora: text, JSON lines, Parquet, Hugging Face ``datasets`` or token ids, by label, as batches of token ids.

Nothing is held in memory but one chunk of text and its tokens, and of files that were read for their counts up to 32 MiB of
rows, so that they are not tokenised twice. What a document is, what stands between documents and what
happens to the rest is said by the caller and kept in the corpus' description; the order is that of the source.

Beside them, pairs of prompts (:class:`PromptPairs`), and sets of pairs ready to use, made for any tokenizer.
"""

from pellucid.corpora.agreement import agreement_pairs
from pellucid.corpora.batches import CorpusBatch, LabelCount, TokenContext
from pellucid.corpora.corpus import Corpus
from pellucid.corpora.greater_than import greater_than_pairs
from pellucid.corpora.indirect_objects import indirect_object_pairs
from pellucid.corpora.pairs import PromptPairs
from pellucid.corpora.repeated_sequences import docstring_pairs, induction_pairs
from pellucid.corpora.single_tokens import single_tokens, vocabulary_words

__all__ = [
    "Corpus",
    "CorpusBatch",
    "LabelCount",
    "PromptPairs",
    "TokenContext",
    "agreement_pairs",
    "docstring_pairs",
    "greater_than_pairs",
    "indirect_object_pairs",
    "induction_pairs",
    "single_tokens",
    "vocabulary_words",
]
