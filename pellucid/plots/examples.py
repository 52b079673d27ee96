"""Texts with a number for each token, such as those on which a neuron fires most: a page of coloured tokens.

Each token is a box of its own whose text is set apart from its neighbours (right-to-left scripts keep their order), shaded
by its value, 0 being white; the largest is marked, and each says its value under the pointer. No script.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pellucid.arguments import check_kind, check_list, check_mapping
from pellucid.errors import InputError
from pellucid.plots.axis import check_words
from pellucid.plots.sheet import INKS, LIGHT_PAGE
from pellucid.plots.text import FONTS, visible
from pellucid.tables import BriefFields

_INK, _FAINT = INKS["ink"], INKS["faint"]
_ABOVE, _BELOW = (196, 101, 72), (11, 102, 189)
_STYLE = f"""
{LIGHT_PAGE}
body {{ margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem; font: 15px/1.9 {FONTS}; }}
h1 {{ font-size: 1.3rem; line-height: 1.3; }} h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .3rem; }}
p {{ margin: .2rem 0; color: {_FAINT}; }}
ol {{ padding-left: 2.2rem; }} li {{ margin: .3rem 0; }}
.note {{ color: {_FAINT}; font-size: 13px; margin-left: .6rem; }}
.t {{ display: inline-block; unicode-bidi: isolate; padding: 0 1px; border-radius: 2px;
  line-height: 1.5; white-space: pre; }}
.most {{ outline: 2px solid {_INK}; position: relative; }}
.gap {{ background: #b3b3b3; }}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, repr=False)
class TokenExample(BriefFields):
    """One text.

    Attributes:
        tokens: labels ``[pos]``, as :func:`pellucid.token_text.token_labels` makes them.
        values: a number for each, ``[pos]``.
        note: where it is from; empty for nothing.
    """

    tokens: Sequence[str]
    values: Sequence[float] | np.ndarray
    note: str = ""

    def __post_init__(self) -> None:
        for token in check_list("tokens", self.tokens, "labels"):
            check_kind("an entry of tokens", token, str, "a string")
        check_kind("note", self.note, str, "a string")


def examples_page(
    examples: Mapping[str, Sequence[TokenExample]], *, title: str, unit: str, subtitle: str | None = None
) -> str:
    """An HTML page of texts under headings, for instance the top examples of each neuron.

    Colours of one heading run from white at 0 to its largest absolute value, red above 0 and blue below.

    Args:
        examples: for each heading its texts, in the order to show them.
        title: what is shown.
        unit: what a token's number is.
        subtitle: a line below the title.

    Returns:
        the whole page, to be given to :func:`save_picture`; it asks no other place for anything and has no script.

    Raises:
        InputError: no examples, one without tokens, or not a number for each token.
    """
    check_words(title, unit, subtitle)
    check_mapping("examples", examples, "headings to lists of TokenExample")
    for heading, texts in examples.items():
        check_kind("a heading of examples", heading, str, "a string")
        for text in check_list(f"examples[{heading!r}]", texts, "TokenExample", empty=True):
            check_kind(f"an entry of examples[{heading!r}]", text, TokenExample, "a TokenExample")
    if not any(examples.values()):
        raise InputError("There is nothing to show: there are no examples.")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>",
    ]
    if subtitle is not None:
        parts.append(f"<p>{_text(subtitle)}</p>")
    parts.append(f"<p>Shade: {_text(unit)}. Outlined: the largest of the text.</p>")
    for heading, texts in examples.items():
        values = [_checked(text, heading) for text in texts]
        finite = np.concatenate([row[np.isfinite(row)] for row in values]) if values else np.zeros(0)
        most = float(np.abs(finite).max()) if finite.size else 0.0
        parts.append(f"<h2>{_text(heading)}</h2>")
        parts.append(f"<p>Up to {most:.4g}.</p>\n<ol>" if finite.size else "<p>No finite numbers.</p>\n<ol>")
        parts += [_row(text, row, most, unit) for text, row in zip(texts, values, strict=True)]
        parts.append("</ol>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _checked(example: TokenExample, heading: str) -> np.ndarray:
    try:
        # One by one: numpy does not read a tensor in bfloat16.
        values = np.array([float(value) for value in example.values])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"An example has a number for each of its tokens; one of {heading!r} has values of another kind: {error}."
        ) from None
    if not len(example.tokens) or values.shape != (len(example.tokens),):
        raise InputError(
            f"An example has a number for each of its tokens; one of {heading!r} has {len(example.tokens)} tokens and "
            f"numbers of shape {list(values.shape)}."
        )
    return values


def _row(example: TokenExample, values: np.ndarray, most: float, unit: str) -> str:
    finite = np.isfinite(values)
    largest = int(np.where(finite, values, -math.inf).argmax()) if finite.any() else -1
    tokens = "".join(
        _token(label, float(value), most, unit, place, place == largest)
        for place, (label, value) in enumerate(zip(example.tokens, values, strict=True))
    )
    note = f'<span class="note">{_text(example.note)}</span>' if example.note else ""
    return f"<li>{tokens}{note}</li>"


def _token(label: str, value: float, most: float, unit: str, place: int, largest: bool) -> str:
    says = html.escape(f"pos {place}: {value:.4g} {visible(unit)}")
    if not math.isfinite(value):
        return f'<span class="t gap" dir="auto" title="{says}">{_text(label)}</span>'
    share = abs(value) / most if most else 0.0
    colour = ",".join(str(round(255 + share * (end - 255))) for end in (_ABOVE if value >= 0 else _BELOW))
    ink = ";color:#fff" if share > 0.85 and value < 0 else ""
    kind = "t most" if largest else "t"
    return f'<span class="{kind}" dir="auto" style="background:rgb({colour}){ink}" title="{says}">{_text(label)}</span>'


def _text(text: str) -> str:
    return html.escape(visible(text))
