"""Every example in README.md and docs/ runs, prints what the page says it prints, and every link and command exists.

A page's blocks marked ``python`` run in order in one namespace. A block marked ``text`` right after one is what it prints;
``...`` in it stands for anything. Blocks marked ``python no-run`` are only compiled (they need the hub, or a device).
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid.demo import smollm2
from tests import forked
from tests.pages import FENCE, PICTURE, as_printed, blocks_of, command_lines, same_drawing

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path, namespace: dict[str, Any]) -> int:
    """Run a page's blocks; the number of those that ran."""
    printed, ran = "", 0
    for block in blocks_of(page.read_text("utf-8")):
        place = f"{name_of(page)}:{block.line}"
        if block.info in ("python", "python no-run"):
            code = compile("\n" * (block.line - 1) + block.body, name_of(page), "exec")
            if block.info == "python":
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    exec(code, namespace)
                printed, ran = output.getvalue(), ran + 1
        elif block.info == "text" and ran and not block.follows:
            found = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
            assert as_printed(block.body).fullmatch(found), f"{place} says\n{block.body}\nbut this is printed:\n{found}"
    return ran


NEEDS_SMOLLM2 = ("docs/howto/smollm2.md",)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name_of(page) in NEEDS_SMOLLM2 and not smollm2.is_installed():
        pytest.skip("SmolLM2 is not installed")
    monkeypatch.chdir(tmp_path)  # what an example writes, it writes here
    with torch.random.fork_rng():
        run_page(page, {"__name__": "__main__"})
    if page.parent != ROOT:
        for name in PICTURE.findall(page.read_text("utf-8")):
            assert (tmp_path / name).is_file(), f"{name_of(page)} shows {name}, and no block of it saves that"
            drawn = (tmp_path / name).read_text("utf-8")
            shown = (ROOT / "docs" / "pictures" / name).read_text("utf-8")
            assert same_drawing(shown, drawn), f"{name} is not what {name_of(page)} draws: scripts/make_pictures.py"


def test_a_picture_that_is_out_of_date_is_found() -> None:
    drawing = (ROOT / "docs" / "pictures" / "patch.svg").read_text("utf-8")
    assert same_drawing(drawing, drawing)
    assert not same_drawing(drawing, drawing.replace("Where is the word kept?", "Where was it?"))
    for printed in re.findall(r">(0\.9\d)<", drawing)[:2]:
        assert not same_drawing(drawing, drawing.replace(f">{printed}<", f">{float(printed) - 0.05:.2f}<"))
    assert not same_drawing(drawing, re.sub("#[0-9a-f]{6}", "#123456", drawing))


def test_every_picture_is_shown_and_made() -> None:
    files = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    shown = [set(PICTURE.findall(page.read_text("utf-8"))) for page in PAGES]
    assert set().union(*shown) == files
    made = set().union(*(names for page, names in zip(PAGES, shown, strict=True) if page.parent.name == "howto"))
    assert made == files, "those of README and other pages are made by a how-to page"
    assert len(PICTURE.findall((ROOT / "README.md").read_text("utf-8"))) == 2


def test_what_is_planted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('a b c')\n```\n\n```text\na ... c\n```\n", "utf-8")
    assert run_page(page, {}) == 1
    page.write_text("```python\nprint('a')\n```\n\n```text\nb\n```\n", "utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page, {})
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "utf-8")
    with pytest.raises(AssertionError):
        run_page(page, {})
    page.write_text("```python no-run\nx = (\n```\n", "utf-8")
    with pytest.raises(SyntaxError):
        run_page(page, {})


def test_every_page_has_only_known_blocks() -> None:
    known = {"python", "python no-run", "text", "bash"}
    found = {(name_of(page), block.info) for page in PAGES for block in blocks_of(page.read_text("utf-8"))}
    assert {info for _, info in found} <= known, found


def test_the_hook_table_is_up_to_date() -> None:
    done = forked.run(["scripts/make_hook_table.py", "--check"])
    assert done.returncode == 0, "run: python scripts/make_hook_table.py"


def test_the_page_of_families_is_up_to_date() -> None:
    done = forked.run(["scripts/make_families_page.py", "--check"])
    assert done.returncode == 0, "run: python scripts/make_families_page.py (--data-only leaves the table of what ran)"


def anchors_of(page: Path) -> set[str]:
    """What a heading can be linked by."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors_of(file), f"{name_of(page)}: {link}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "index.md" or f"({name})" in index, name


def test_every_error_has_a_section_with_what_it_derives_from() -> None:
    from pellucid import errors

    def heading(kind: type[BaseException]) -> str:
        bases = [base.__name__ for base in kind.__bases__ if base is not errors.PellucidError]
        return f"## {kind.__name__} ({', '.join(bases)})"

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    found = re.findall("^## .*$", page, re.MULTILINE)
    assert sorted(found) == sorted(heading(kind) for kind in kinds if kind is not errors.PellucidError)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``pellucid ...`` line in a bash block, with the page."""
    for page in PAGES:
        for block in blocks_of(page.read_text("utf-8")):
            if block.info == "bash":
                for line in command_lines(block.body):
                    words = shlex.split(line, comments=True)
                    if words[0] in ("pellucid", "scripts/demo"):
                        yield name_of(page), ["demo", *words[1:]] if words[0] == "scripts/demo" else words[1:]


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_the_commands_of_a_page_are_commands(page: str, words: list[str]) -> None:
    from typer.main import get_command

    from pellucid.cli.app import app

    group: Any = get_command(app)
    command = group.commands[words[0]]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
    for word in words[1:]:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in options, f"{page}: {words[0]} has no {word}"


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/check", ".ci/run"])
def test_the_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_every_line_of_the_readme_is_tried_or_skipped_by_name() -> None:
    """``scripts/check readme`` runs them; what it would run and skip is asked for here."""
    listed = subprocess.run(
        [sys.executable, "scripts/try_readme.py", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for block in blocks_of((ROOT / "README.md").read_text("utf-8")):
        if block.info == "bash":
            for line in command_lines(block.body):
                assert line in listed.splitlines() or f"skipped  {line.split()[0]}: " in listed, line
        elif block.info == "python":
            assert block.body in listed
        elif block.info != "text":
            assert f"skipped  README.md:{block.line} ({block.info}): " in listed
    assert listed.count("skipped  ") == 2
