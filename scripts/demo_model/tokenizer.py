"""BLOOM's kind of tokenizer, learnt on little text: byte-level BPE, so that every string round-trips.

Structure, special tokens and their ids are those of the released BLOOM models; only the merges are our own.
"""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.corpus import LanguageText

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(len(SPECIAL_TOKENS))
VOCABULARY_SIZE = 2048

WORD = r" ?[^(\s|[.,!?…。，、।۔،])]+"
"""BLOOM's pattern of a word, to the letter: a run of anything but spaces and this punctuation, with one space."""

DECLARATION_COPIES = 3
SAMPLED_DOCUMENTS = 300


def train_tokenizer(training: dict[str, LanguageText]) -> PreTrainedTokenizerFast:
    """Learn the merges from the training text alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(training), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_text(training: dict[str, LanguageText]) -> Iterator[str]:
    for text in training.values():
        yield from text.declaration * DECLARATION_COPIES
        yield from text.sampled[:SAMPLED_DOCUMENTS]
