"""The layout that SAELens reads, as Hugging Face datasets see it (SAELens itself: scripts/train_sae_on_harvest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pellucid.errors import InputError
from pellucid.scale import saelens
from pellucid.scale.saelens import export_to_saelens
from pellucid.scale.stored_activations import StoredActivations
from tests.scale.jobs import CONTEXT, NEURONS, RESIDUAL, packed, padded, run

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("dtype", "column"), [(None, "float32"), (torch.bfloat16, "float32"), (torch.float16, "float16")]
)
@pytest.mark.parametrize("seed", [None, 0])
def test_the_layout(
    dtype: torch.dtype | None, column: str, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saelens, "FILE_BYTES", 20_000)  # several files
    monkeypatch.setattr(saelens, "WRITE_ROWS", 5)
    corpus = packed()
    run(tmp_path / "store", corpus=corpus, dtype=dtype)
    store = StoredActivations(tmp_path / "store")
    asked = "blocks.1.hook_out"  # the column has the name that was asked for
    count = export_to_saelens(store, [asked, NEURONS], tmp_path / "sae", seed=seed)
    found = datasets.load_from_disk(str(tmp_path / "sae"))
    assert len(found) == count == sum(corpus.rows(label) for label in corpus.labels)
    assert found.features[asked] == datasets.Array2D((CONTEXT, 48), column)
    assert found.features["token_ids"] == datasets.Sequence(datasets.Value("int32"), length=CONTEXT)
    assert len(list((tmp_path / "sae").glob("*.arrow"))) > 1
    tokens = torch.cat([batch.tokens for batch in corpus.batches(4)]).int()
    found.set_format("torch")
    order = torch.arange(count)
    if seed is not None:
        assert not torch.equal(torch.as_tensor(found["token_ids"][:]).int(), tokens)
        places = {tuple(row): index for index, row in enumerate(tokens.tolist())}
        order = torch.tensor([places[tuple(row)] for row in found["token_ids"][:].tolist()])
        assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(found["token_ids"][:].int(), tokens[order])
    for name, width in ((asked, 48), (NEURONS, 192)):
        stored = torch.cat([store.shard(index, name) for index in range(store.n_shards)]).view(-1, CONTEXT, width)
        assert torch.equal(found[name][:], stored[order].to(found[name][:].dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae", "store"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "padded", corpus=padded())
    run(tmp_path / "packed")
    store = StoredActivations(tmp_path / "packed")
    with pytest.raises(InputError, match="no mask"):
        export_to_saelens(StoredActivations(tmp_path / "padded"), RESIDUAL, tmp_path / "sae")
    with pytest.raises(InputError, match="not stored"):
        export_to_saelens(store, "blocks.2.hook_resid_post", tmp_path / "sae")
    with pytest.raises(InputError, match="each once"):
        export_to_saelens(store, [RESIDUAL, RESIDUAL], tmp_path / "sae")
    with pytest.raises(InputError, match="not an empty folder"):
        export_to_saelens(store, RESIDUAL, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "padded"]
