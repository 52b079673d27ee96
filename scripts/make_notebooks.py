"""Make notebooks/*.ipynb from the scripts beside them, run in a kernel, with their output: make_notebooks.py [NAME ...]

A notebook is written as a script with ``# %%`` before each cell. Of what a cell shows, text and drawings are kept (SVG), not
the interactive forms, which hold the whole of a plotting library's data. ``--check`` only looks whether the cells are those
of the scripts. Running them needs nbclient and ipykernel (extra ``notebooks``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
KEPT = ("text/plain", "image/svg+xml")
MARK = "# %%"


def cells_of(script: str) -> list[tuple[str, str]]:
    """Kind and source of each cell: ``"markdown"`` or ``"code"``."""
    cells = []
    for part in ("\n" + script).split(f"\n{MARK}")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip()))
    return cells


def notebook_of(script: Path) -> dict[str, Any]:
    """A notebook without output."""
    cells: list[dict[str, Any]] = []
    for place, (kind, source) in enumerate(cells_of(script.read_text("utf-8"))):
        cell: dict[str, Any] = {"id": f"cell{place}", "cell_type": kind, "metadata": {}, "source": source}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its output."""
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    node = nbformat.from_dict(notebook)
    NotebookClient(node, timeout=600).execute()
    for cell in node.cells:
        outputs = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if "data" in output:
                drawn = "image/svg+xml" in output.data
                output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
                output.metadata = {}
                if drawn:
                    output.data["text/plain"] = "a picture"
            outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
        cell.metadata = {}
    node.metadata = notebook["metadata"]
    made: dict[str, Any] = json.loads(nbformat.writes(node))
    return made


def is_current(script: Path) -> bool:
    """Whether the notebook has the script's cells."""
    found = script.with_suffix(".ipynb")
    if not found.exists():
        return False
    cells = json.loads(found.read_text("utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return sources == cells_of(script.read_text("utf-8"))


def main() -> int:
    """Make or check them."""
    scripts = sorted(FOLDER.glob("*.py"))
    if "--check" in sys.argv:
        old = [script.stem for script in scripts if not is_current(script)]
        if old:
            print(f"not up to date: {', '.join(old)}; run python scripts/make_notebooks.py")
        return len(old)
    wanted = [script for script in scripts if script.stem in sys.argv[1:]] or scripts
    for script in wanted:
        text = json.dumps(run(notebook_of(script)), indent=1, ensure_ascii=False).replace(f"{ROOT}/", "") + "\n"
        script.with_suffix(".ipynb").write_text(text, "utf-8")
        print(script.with_suffix(".ipynb").relative_to(ROOT), f"{len(text) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
