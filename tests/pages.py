"""Blocks of a Markdown page, and what they print. Only the standard library: a script without dependencies reads it too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: what is written after the fence, its text, its first line in the page, and what stands before it."""

    info: str
    body: str
    line: int
    follows: str


def blocks_of(text: str) -> Iterator[Block]:
    end = 0
    for match in FENCE.finditer(text):
        yield Block(
            match["info"].strip(),
            match["body"],
            text.count("\n", 0, match.start()) + 2,
            text[end : match.start()].strip(),
        )
        end = match.end()


def as_printed(expected: str) -> re.Pattern[str]:
    """A pattern for expected output, in which ``...`` stands for anything."""
    return re.compile(".*".join(map(re.escape, expected.rstrip().split("..."))), re.S)


def command_lines(body: str) -> list[str]:
    """Commands of a bash block, those continued over several lines in one."""
    return [line for line in body.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


PICTURE = re.compile(r"!\[[^\]]+\]\([^)]*?pictures/([^)/]+)\)")
"""A drawing that a page shows: its file is one that the page's own blocks have saved under that name."""

_NUMBER = re.compile(r"#[0-9a-f]{6}|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def same_drawing(one: str, other: str) -> bool:
    """Whether two SVGs are equal, but for numbers and shades that another processor rounds otherwise."""
    if _NUMBER.sub("0", one) != _NUMBER.sub("0", other):
        return False
    return all(map(_alike, _NUMBER.findall(one), _NUMBER.findall(other)))


def _alike(one: str, other: str) -> bool:
    if one[0] == "#" and other[0] == "#":
        return all(abs(a - b) <= 3 for a, b in zip(bytes.fromhex(one[1:]), bytes.fromhex(other[1:]), strict=True))
    if "#" in one + other:
        return False
    return abs(float(one) - float(other)) <= 2e-3 + 2e-3 * abs(float(one))
