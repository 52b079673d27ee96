"""Build the API reference from the docstrings, searchable, as a folder of HTML pages: python scripts/make_api_pages.py OUT

The generator is pdoc. What is ours: which modules are public, and references such as ``:class:`~pellucid.sweep.Sweep```,
which become links. A reference that leads nowhere, or a link to what is not there, ends it with status 1.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PACKAGES = ("patching", "sweep", "running_stats", "corpora", "plots", "demo", "steering", "utilities")
"""Whose ``__init__`` lists what is public."""

ROOMS = ("analysis", "experiments", "scale")
"""Of which every module is public."""

MODULES = (
    "activation_cache",
    "axes",
    "config",
    "decomposition.methods",
    "errors",
    "factored_matrix",
    "hook_points",
    "model_bridge.architecture_adapter",
    "model_bridge.corpus.collected",
    "model_bridge.family",
    "model_bridge.generalized_components",
    "model_bridge.hooking.caching_methods",
    "model_bridge.hooking.hook_methods",
    "model_bridge.peer_words",
    "model_bridge.running.generation_methods",
    "model_bridge.running.run_methods",
    "model_bridge.running.token_methods",
    "model_bridge.supported_architectures",
    "model_bridge.transformer_bridge",
    "model_bridge.verification.check_report",
    "model_bridge.weights.circuit_methods",
    "model_bridge.weights.weight_methods",
    "names",
    "run_context",
    "slices",
)
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc):`([^`]+)`")
"""A reference in a docstring: ``~`` in front shows the last name alone; one without dots is of the same module or class."""


def public_modules() -> list[str]:
    """Full names of the modules that get a page."""
    names = [f"pellucid.{name}" for name in (*PACKAGES, *MODULES)]
    for room in ROOMS:
        package = importlib.import_module(f"pellucid.{room}")
        names += [f"pellucid.{room}", *(f"pellucid.{room}.{m.name}" for m in pkgutil.iter_modules(package.__path__))]
    return sorted(names)


# -- references in docstrings ------------------------------------------------------------------------------------------


def resolved(reference: str, module: Any, owner: Any | None) -> str | None:
    """The full name that a reference means, ``None`` if it leads nowhere.

    It is looked for in the class that it stands in, in its module, among the modules of its package, and as a full name.
    """
    parts = _target(reference).lstrip("~").removesuffix("()").split(".")
    if owner is not None and _reached(owner, parts):
        return ".".join([module.__name__, owner.__qualname__, *parts])
    if _reached(module, parts):
        found = getattr(module, parts[0])
        home = getattr(found, "__module__", None)
        start = [home, found.__qualname__] if isinstance(home, str) and hasattr(found, "__qualname__") else None
        return ".".join([*(start or [module.__name__, parts[0]]), *parts[1:]])
    beside = [module.__name__.rpartition(".")[0], *parts]
    return next((".".join(path) for path in (beside, parts) if _exists(path)), None)


def _exists(parts: list[str]) -> bool:
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return _reached(found, parts[cut:])
    return False


def _reached(start: Any, names: list[str]) -> bool:
    for name in names:
        # A field of a dataclass may have no value yet.
        if not hasattr(start, name) and name not in getattr(start, "__annotations__", {}):
            return False
        start = getattr(start, name, None)
    return True


def docstrings(module: Any) -> Iterator[tuple[str, str, Any | None]]:
    """Place, text and class of each docstring written in a module."""
    yield module.__name__, module.__doc__ or "", None
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__ or not callable(value):
            continue
        yield f"{module.__name__}.{name}", vars(value).get("__doc__") or "", value if inspect.isclass(value) else None
        for own, member in list(vars(value).items()) if inspect.isclass(value) else ():
            if inspect.isroutine(member) or isinstance(member, property):
                yield f"{module.__name__}.{name}.{own}", member.__doc__ or "", value


def dead_references() -> list[str]:
    """References in docstrings of the whole package that lead nowhere, with their places."""
    import pellucid

    dead = []
    for found in pkgutil.walk_packages(pellucid.__path__, "pellucid."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for place, text, owner in docstrings(module):
            dead += [f"{place}: {target}" for target in ROLE.findall(text) if resolved(target, module, owner) is None]
    return dead


def _target(reference: str) -> str:
    """``text <target>`` or ``target``."""
    return reference.rpartition("<")[2].rstrip(">") if "<" in reference else reference


# -- pages -------------------------------------------------------------------------------------------------------------


def build(folder: Path) -> list[str]:
    """Write the pages; gives links among them that lead nowhere."""
    import jinja2
    import pdoc.render
    from pdoc.render_helpers import to_markdown_with_context

    @jinja2.pass_context
    def with_links(context: Any, docstring: str) -> str:
        name = context["module"].modulename
        module = importlib.import_module(name) if name else None  # the index of all modules is of none

        def full(match: re.Match[str]) -> str:
            owners = [None, *(value for value in vars(module).values() if inspect.isclass(value))] if module else []
            names = (resolved(match[1], module, owner) for owner in owners)
            return f"`{next((name for name in names if name), match[1])}`"  # pdoc makes a link of a full name

        return to_markdown_with_context(context, ROLE.sub(full, docstring))

    pdoc.render.env.filters["to_markdown"] = with_links
    pdoc.render.configure(docformat="google", search=True, show_source=False, footer_text="Pellucid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that modules take from torch
        pdoc.pdoc(*public_modules(), output_directory=folder)
    for page in folder.rglob("*.html"):
        page.write_text(without_empty_anchors(page), "utf-8")
    return dead_links(folder)


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if given.get("id"):
            self.anchors.add(str(given["id"]))


def without_empty_anchors(page: Path) -> str:
    """A page whose links to itself lead somewhere: pdoc links the name of any attribute, and lists documented ones only."""
    text, there = page.read_text("utf-8"), _Page(page).anchors

    def unlinked(match: re.Match[str]) -> str:
        return match[0] if unquote(match[1]) in there else match[2]

    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', unlinked, text)


def dead_links(folder: Path) -> list[str]:
    """Links from page to page whose page or anchor is not there."""
    pages = {page.resolve(): _Page(page) for page in folder.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            found = pages.get((path.parent / target).resolve() if target else path)
            if found is None or (anchor and anchor not in found.anchors):
                dead.append(f"{path.relative_to(folder.resolve())}: {link}")
    return dead


def main() -> int:
    """Build and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pages")
    folder: Path = parser.parse_args().out
    dead = dead_references() + build(folder)
    for line in dead:
        print(line)
    print(f"{folder / 'index.html'}: {len(public_modules())} modules, {len(dead)} dead links")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
