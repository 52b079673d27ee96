"""Corpora: text, JSON lines, Parquet, Hugging Face ``datasets`` or token ids, by label, as batches of token ids.

Nothing is held in memory but one chunk of text and its tokens, and of files that were read for their counts up to 32 MiB of
rows, so that they are not tokenised twice. What a document is, what stands between documents and what
happens to the rest is said by the caller and kept in the corpus' description; the order is that of the source.
"""

from pellucid.corpora.batches import CorpusBatch, LabelCount, TokenContext
from pellucid.corpora.corpus import Corpus

__all__ = ["Corpus", "CorpusBatch", "LabelCount", "TokenContext"]
