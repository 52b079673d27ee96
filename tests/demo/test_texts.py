"""Text that language neurons of the embedded model are found and measured on; what is found: tests/test_notebooks.py."""

from __future__ import annotations

from pellucid.demo.texts import held_out_halves, written_text


def test_text_to_measure_on_is_apart() -> None:
    written, (lent, unseen) = written_text(), held_out_halves()
    assert list(written) == list(lent) == list(unseen)
    for language, paragraphs in written.items():
        own = set(paragraphs)
        assert not own & set(unseen[language])
        assert not set(lent[language]) & set(unseen[language])
        assert "\ufffd" not in "".join(paragraphs)
