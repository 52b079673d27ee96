"""Make docs/pictures of what the blocks of the how-to pages save: python scripts/make_pictures.py

A page that shows ``../pictures/x.svg`` has a block that saves ``x.svg``, so that a picture is the result beside it and
nothing is drawn twice. README shows some of them. ``tests/test_docs.py``, which runs every page, compares what it saved with
these files; numbers may differ by what another processor rounds otherwise.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.pages import PICTURE, blocks_of  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"


def pages() -> dict[Path, list[str]]:
    """Pages of docs/howto that show pictures, with the names of those."""
    found = {page: PICTURE.findall(page.read_text("utf-8")) for page in sorted((ROOT / "docs" / "howto").glob("*.md"))}
    return {page: names for page, names in found.items() if names}


def main() -> None:
    """Run the pages and keep what they saved."""
    FOLDER.mkdir(exist_ok=True)
    for page, names in pages().items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            namespace: dict[str, Any] = {"__name__": "__main__"}
            for block in blocks_of(page.read_text("utf-8")):
                if block.info == "python":
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(block.body, namespace)
            for name in names:
                shutil.copyfile(name, FOLDER / name)
                print(f"{page.relative_to(ROOT)}: {name}, {(FOLDER / name).stat().st_size / 1024:.0f} KiB", flush=True)
            os.chdir(ROOT)


if __name__ == "__main__":
    main()
