"""Strings of any family tokenise exactly as ``tokenizer(text)`` does, and ``prepend_bos`` means what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import decoders

from pellucid import TransformerBridge
from pellucid.errors import InputError
from pellucid.token_text import token_bytes, token_labels, tokens_to_text
from tests.families import make_family
from tests.tiny_tokenizers import Puts, byte_level, metaspace

PUTS: tuple[Puts, ...] = ("nothing", "bos", "bos and eos")
BOS, EOS = 1, 2


def bridge_with(tokenizer: Any, family: str = "llama") -> TransformerBridge:
    return TransformerBridge(make_family(family), tokenizer)


@pytest.mark.parametrize("puts", PUTS)
def test_a_text_is_what_the_tokenizer_gives(puts: Puts) -> None:
    tokenizer = byte_level(puts)
    bridge = bridge_with(tokenizer)
    for text in ("the cat", " a", "<s>the"):
        given = tokenizer(text)["input_ids"]
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        tail = [EOS] if puts == "bos and eos" else []
        assert bridge.to_tokens(text).tolist() == [given]
        assert bridge.to_tokens(text, prepend_bos=True).tolist() == [[BOS, *own, *tail]]
        assert bridge.to_tokens(text, prepend_bos=False).tolist() == [[*own, *tail]]
        assert len(bridge.to_str_tokens(text, prepend_bos=True)) == len(own) + 1 + len(tail)
    assert bridge.get_token_position("c", "the cat") == 4 + (puts != "nothing")
    assert bridge.get_token_position("c", "the cat", prepend_bos=False) == 4
    assert bridge.get_token_position("c", "the cat", prepend_bos=True) == 5


@pytest.mark.parametrize("puts", PUTS)
def test_a_single_token_is_the_texts_own(puts: Puts) -> None:
    bridge = bridge_with(byte_level(puts))
    token = bridge.to_single_token("t")
    assert token == byte_level("nothing")("t")["input_ids"][0]
    assert bridge.to_single_token("<s>") == BOS
    with pytest.raises(InputError, match="2: "):
        bridge.to_single_token("ab")


def test_a_setting_of_the_tokenizer_that_is_changed_later_counts() -> None:
    tokenizer = byte_level("bos")
    bridge = bridge_with(tokenizer)
    assert bridge.to_tokens("a", prepend_bos=True).shape == (1, 2)
    tokenizer.backend_tokenizer.post_processor = byte_level("nothing").backend_tokenizer.post_processor
    assert bridge.to_tokens("a").shape == (1, 1)
    assert bridge.to_tokens("a", prepend_bos=True).shape == (1, 2)
    assert bridge.to_tokens("a", prepend_bos=False).shape == (1, 1)


def test_a_text_without_tokens_is_refused_also_where_only_the_beginning_token_is_left() -> None:
    bridge = bridge_with(byte_level("bos"))
    assert bridge.to_tokens("").tolist() == [[BOS]]
    with pytest.raises(InputError, match="no tokens"):
        bridge.to_tokens("", prepend_bos=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_beginning_token_comes_after_padding_on_the_left(side: Any) -> None:
    bridge = bridge_with(byte_level("bos"))
    tokens, mask = bridge.to_tokens(["the cat", "a"], padding_side=side, return_mask=True)
    first = (mask[1] == 1).nonzero()[0, 0]
    assert int(tokens[1, first]) == BOS
    assert int(mask[1].sum()) == 2
    alone = bridge("a")
    beside = bridge(["the cat", "a"], padding_side=side)[1][mask[1] == 1]
    torch.testing.assert_close(beside, alone[0], rtol=0, atol=1e-4)


def test_a_tokenizer_without_padding_says_what_to_do() -> None:
    bridge = bridge_with(byte_level(padding=False), "gpt2")
    with pytest.raises(InputError, match=r"set tokenizer\.pad_token"):
        bridge.to_tokens(["the cat", "a"])
    assert bridge.to_tokens(["ab", "ba"]).shape == (2, 2)


def test_every_method_takes_texts_as_the_tokenizer_does() -> None:
    tokenizer = byte_level("bos")
    bridge = bridge_with(tokenizer)
    ids = torch.tensor(tokenizer("the cat")["input_ids"])[None]
    assert torch.equal(bridge("the cat"), bridge(ids))
    assert torch.equal(bridge.run_with_cache("the cat")[0], bridge(ids))
    assert torch.equal(bridge("the cat", prepend_bos=False), bridge(ids[:, 1:]))
    assert torch.equal(bridge("the cat", prepend_bos=True), bridge(ids))
    given = bridge.generate("the cat", max_new_tokens=3, do_sample=False, return_type="tokens")
    assert torch.equal(given, bridge.generate(ids, max_new_tokens=3, do_sample=False, return_type="tokens"))


def test_labels_of_a_sentencepiece_tokenizer() -> None:
    tokenizer = metaspace()
    ids = tokenizer("the é法 Ġ", add_special_tokens=False)["input_ids"]
    labels = token_labels(tokenizer, ids)
    assert labels[0] == "·the"
    assert labels == ["·the", "·", "é", "⟨E6⟩", "⟨B3⟩", "⟨95⟩", "·", "Ġ"]
    assert tokens_to_text(tokenizer, [1, *ids]) == " the é法 Ġ"
    assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids("é")) == "é".encode()
    assert token_bytes(byte_level(), byte_level().convert_tokens_to_ids("Ġ")) == b" "


def stripping() -> Any:
    """SentencePiece's kind with Llama 2's decoder, which drops the space before the first token."""
    tokenizer = metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["the the the", "the  the", "théthe the", "t he é"])
def test_tokens_as_strings_are_the_text(text: str) -> None:
    bridge = TransformerBridge(make_family("llama", vocab_size=300), stripping())
    ids = bridge.to_tokens(text)
    pieces = bridge.to_str_tokens(text)
    assert "".join(pieces) == bridge.to_string(ids)[0] == f"<s> {text}"
    assert pieces == bridge.to_str_tokens(ids)
    assert any(piece.startswith(" the") or piece == " t" for piece in pieces)
    inner = bridge.to_str_tokens(ids[0, 1:])  # Hugging Face drops the first space of what it decodes
    assert "".join(inner) == bridge.to_string(ids[0, 1:]) == text


def test_part_of_a_character_stays_what_it_is() -> None:
    bridge = TransformerBridge(make_family("llama", vocab_size=300), stripping())
    assert bridge.to_str_tokens("法 the")[1:] == [" ", "\ufffd", "\ufffd", "\ufffd", " the"]
