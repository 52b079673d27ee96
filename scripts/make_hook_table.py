"""Write the hook table of docs/hooks.md from Pellucid's own table; with ``--check`` only say whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pellucid.model_bridge.hook_tables import hook_table
from pellucid.model_bridge.supported_architectures.bloom import BLOOM
from pellucid.names import SETTERS, HookSpec

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"
BEGIN, END = "<!-- begin: scripts/make_hook_table.py -->", "<!-- end -->"
DTYPES = {"model": "", "wide": ", float32 at least", "int": ", int64"}
LAYER = 0
"""Stands for each layer."""


def table() -> str:
    """Both tables: the points that are always there, and the opt-in ones."""
    made = hook_table(BLOOM, shares_heads=False)
    specs = [*made.before, *(spec.at_layer(LAYER) for spec in made.block), *made.after]
    lines = ["| name | other names | shape | the tensor |", "| --- | --- | --- | --- |"]
    lines += [row(spec) for spec in specs if spec.flag is None]
    lines += ["", "Opt-in points:", ""]
    lines += ["| name | other names | shape | the tensor | switched on by |", "| --- | --- | --- | --- | --- |"]
    lines += [f"{row(spec)} `{SETTERS[spec.flag]}` |" for spec in specs if spec.flag is not None]
    return "\n".join(lines)


def row(spec: HookSpec) -> str:
    """One line of a table."""
    others = ", ".join(f"`{alias}`" for alias in spec.aliases)
    return f"| `{spec.name}` | {others} | `[{', '.join(spec.axes)}]`{DTYPES[spec.kind]} | {spec.doc} |"


def with_table(page: str) -> str:
    """``page`` with the table between its marks."""
    before, found, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        sys.exit(f"{PAGE} has no {BEGIN} ... {END}.")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text("utf-8")
    made = with_table(page)
    if arguments.check:
        sys.exit(int(made != page))
    PAGE.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
