"""Tokenizers of a few bytes, made here by the ``tokenizers`` library: what families' tokenizers do, without a network.

Byte-level ones know only single bytes of ``ALPHABET``, so a text of n such characters is n tokens, and all ids are below the
vocabulary of the tests' models.
"""

from __future__ import annotations

from typing import Any, Literal

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ALPHABET = [*"ĠĊabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?'-0123456789"]
"""A space, a line feed, and characters that are themselves, as byte-level tokenizers write them."""

SPECIAL = ["<pad>", "<s>", "</s>"]

Puts = Literal["nothing", "bos", "bos and eos"]
"""What stands around a text: GPT-2's, Qwen's and BLOOM's tokenizers put nothing, Llama's and Gemma's the first."""

_AROUND = {"nothing": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>"}


def byte_level(puts: Puts = "nothing", padding: bool = True) -> Any:
    """A byte-level tokenizer; ids 0 to 2 are padding, beginning and end of sequence."""
    names = [*SPECIAL, *ALPHABET]
    made = Tokenizer(BPE({name: index for index, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _finish(made, puts, padding)


def metaspace(puts: Puts = "bos") -> Any:
    """A tokenizer of SentencePiece's kind: a space is ``▁``, a byte that has no token of its own ``<0xE5>``."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁theéĠ", "▁t", "he", "▁the"]
    made = Tokenizer(
        BPE(
            {name: index for index, name in enumerate(names)},
            [("▁", "t"), ("h", "e"), ("▁t", "he")],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(made, puts, padding=True)


def _finish(made: Tokenizer, puts: Puts, padding: bool) -> Any:
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single=_AROUND[puts], special_tokens=[(name, SPECIAL.index(name)) for name in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if padding else None
    )
