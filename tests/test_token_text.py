"""Labels against golden texts of several scripts, and against the bytes of real tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid import TransformerBridge
from pellucid.errors import InputError
from pellucid.token_text import token_bytes, token_label, token_labels, tokens_to_text


@dataclass
class Added:
    content: str
    special: bool = True


@dataclass
class FakeTokenizer:
    """A tokenizer of the given names; the special tokens come after them."""

    names: list[str]
    special: list[str] = field(default_factory=list)

    @property
    def added_tokens_decoder(self) -> dict[int, Added]:
        return {len(self.names) + number: Added(content) for number, content in enumerate(self.special)}

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        names = [*self.names, *self.special]
        return names[ids] if ids < len(names) else None

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        names = [*self.names, *self.special]
        return names.index(tokens) if tokens in names else None


def spelled(data: bytes) -> str:
    """Bytes as a byte-level tokenizer names them; written apart from the code under test, after GPT-2's encoder."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    names, extra = {byte: chr(byte) for byte in kept}, 0
    for byte in range(256):
        if byte not in names:
            names[byte] = chr(256 + extra)
            extra += 1
    return "".join(names[byte] for byte in data)


def label(data: str | bytes) -> str:
    return token_label(FakeTokenizer([spelled(data.encode() if isinstance(data, str) else data)]), 0)


GOLDEN = [
    ("word", "word"),
    (" leading", "·leading"),
    ("    ", "····"),
    ("\n", "⏎"),
    ("\n\n\t", "⏎⏎⇥"),
    (" السلام", "·السلام"),
    ("ية", "ية"),
    (" नमस्ते", "·नमस्ते"),
    ("ा", "◌ा"),
    (" ि", "·◌ि"),
    ("தமிழ்", "தமிழ்"),
    ("்", "◌்"),
    ("人权", "人权"),
    (" được", "·được"),
    ("🙂", "🙂"),
    ("<s>", "<s>"),
    ("[/INST]", "[/INST]"),
    ("[bold]", "[bold]"),
    ("</script>", "</script>"),
    (":smile:", ":smile:"),
    ("é", "é"),
    ("e\u0301", "e\u0301"),
    # What cannot be seen, or would be taken for something else.
    ("\u200d", "⟨U+200D⟩"),
    ("\u202e", "⟨U+202E⟩"),
    ("\u00a0", "⟨U+00A0⟩"),
    ("\x1b[31m", "⟨U+001B⟩[31m"),
    ("\r\n", "⟨U+000D⟩⏎"),
    ("l·l", "l⟨U+00B7⟩l"),
    ("⟨E5⟩", "⟨U+27E8⟩E5⟨U+27E9⟩"),
    ("⟦<s>⟧", "⟨U+27E6⟩<s>⟨U+27E7⟩"),
    ("\ufffd", "⟨U+FFFD⟩"),
]


@pytest.mark.parametrize(("text", "shown"), GOLDEN)
def test_a_whole_token(text: str, shown: str) -> None:
    assert label(text) == shown


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\xe5\x9b", "⟨E5⟩⟨9B⟩"),
        (b" \xe5", "·⟨E5⟩"),
        ("🙂".encode()[2:], "⟨99⟩⟨82⟩"),
        (b"\x9b" + "人".encode(), "⟨9B⟩人"),
        ("人".encode() + b"\xe6\x9d", "人⟨E6⟩⟨9D⟩"),
        (b"\xff", "⟨FF⟩"),
        (b"\xed\xa0\x80", "⟨ED⟩⟨A0⟩⟨80⟩"),
    ],
)
def test_part_of_a_character(data: bytes, shown: str) -> None:
    assert label(data) == shown


def test_the_name_a_byte_level_tokenizer_gives() -> None:
    assert spelled("法".encode()) == "æ³ķ"
    assert token_label(FakeTokenizer(["æ³ķ"]), 0) == "法"
    assert token_label(FakeTokenizer(["Ġthe"]), 0) == "·the"


def test_a_special_token_is_told_from_its_letters() -> None:
    tokenizer = FakeTokenizer(["<s>"], special=["<s>"])
    assert token_labels(tokenizer, [0, 1]) == ["<s>", "⟦<s>⟧"]
    assert token_bytes(tokenizer, 0) == b"<s>"
    assert token_bytes(tokenizer, 1) is None


def test_an_id_without_a_token() -> None:
    assert token_label(FakeTokenizer(["a"]), 250_700) == "⟦250700⟧"
    with pytest.raises(InputError, match="-1"):
        token_label(FakeTokenizer(["a"]), -1)


def test_a_tokenizer_that_is_not_byte_level_names_its_tokens_by_their_text() -> None:
    assert token_label(FakeTokenizer(["人権"]), 0) == "人権"


def test_joined_text_makes_whole_what_tokens_share() -> None:
    head, tail = "🙂".encode()[:2], "🙂".encode()[2:]
    tokenizer = FakeTokenizer([spelled(head), spelled(tail), spelled(b" a\n")], special=["</s>"])
    assert tokens_to_text(tokenizer, [2, 0, 1, 3]) == " a\n🙂"
    assert tokens_to_text(tokenizer, [0, 2]) == "⟨F0⟩⟨9F⟩ a\n"


@given(st.binary(min_size=1, max_size=12), st.binary(min_size=1, max_size=12))
def test_labels_are_visible_and_tell_every_two_tokens_apart(one: bytes, other: bytes) -> None:
    shown = label(one)
    assert shown
    assert shown.isprintable()
    assert " " not in shown
    assert "\ufffd" not in shown
    assert (shown == label(other)) == (one == other)


@given(st.text(max_size=40))
def test_the_bytes_of_real_tokens_are_those_of_the_text(demo: TransformerBridge, text: str) -> None:
    tokenizer: Any = demo.tokenizer
    if any(str(special) in text for special in tokenizer.all_special_tokens):
        return
    ids = tokenizer(text)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) or b"" for token in ids) == text.encode()
    assert len(token_labels(tokenizer, ids)) == len(ids)


def test_the_whole_vocabulary_has_labels_of_its_own(demo: TransformerBridge) -> None:
    labels = token_labels(demo.tokenizer, range(demo.cfg.d_vocab))
    assert len(set(labels)) == demo.cfg.d_vocab
    assert labels[:4] == ["⟦<unk>⟧", "⟦<s>⟧", "⟦</s>⟧", "⟦<pad>⟧"]
    assert all(text.isprintable() and text for text in labels)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("<s>Everyone has", ["⟦<s>⟧", "Everyone", "·has"]),
        ("a\n\tb", ["a", "⏎", "⇥", "b"]),
        (" 🙂", ["·", "⟨F0⟩", "⟨9F⟩", "⟨99⟩", "⟨82⟩"]),
    ],
)
def test_the_demo_tokenizer(demo: TransformerBridge, text: str, labels: list[str]) -> None:
    assert token_labels(demo.tokenizer, demo.tokenizer(text)["input_ids"]) == labels
