"""The reader: every row once, the same shuffle for the same seed, any row by number, and neither model nor corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellucid.errors import InputError, StoreError
from pellucid.scale.stored_activations import RowBatch, StoredActivations
from tests.scale.jobs import HOOKS, NEURONS, RESIDUAL, padded, run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoredActivations:
    out = tmp_path_factory.mktemp("read") / "store"
    run(out, corpus=padded(), dtype=torch.bfloat16)
    return StoredActivations(out)


@pytest.fixture(scope="module")
def everything(store: StoredActivations) -> dict[str, Tensor]:
    """All rows in order, put together shard by shard."""
    shards = range(store.n_shards)
    whole = {name: torch.cat([store.shard(index, name) for index in shards]) for name in HOOKS}
    whole |= {name: torch.cat([store.column(index, name) for index in shards]) for name in ("token", "sequence")}
    labels = [store.labels.index(store.label_of(index)) for index in shards]
    sizes = [len(store.column(index, "token")) for index in shards]
    return whole | {"label": torch.repeat_interleave(torch.tensor(labels), torch.tensor(sizes))}


def agrees(batch: RowBatch, everything: dict[str, Tensor]) -> bool:
    kept = all(torch.equal(values, everything[name][batch.row]) for name, values in batch.activations.items())
    return kept and all(torch.equal(vars(batch)[name], everything[name][batch.row]) for name in ("token", "label"))


@given(size=st.integers(1, 300), seed=st.none() | st.integers(0, 5), mixed=st.integers(1, 30), drop=st.booleans())
@settings(max_examples=25, deadline=None)
def test_batches_have_every_row_once(
    size: int, seed: int | None, mixed: int, drop: bool, store: StoredActivations, everything: dict[str, Tensor]
) -> None:
    batches = list(store.batches(size, seed=seed, shards_mixed=mixed, drop_last=drop))
    rows = torch.cat([batch.row for batch in batches]) if batches else torch.empty(0, dtype=torch.int64)
    assert len(rows) == (len(store) // size * size if drop else len(store))
    assert len(rows.unique()) == len(rows)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(agrees(batch, everything) for batch in batches)
    if seed is None:
        assert torch.equal(rows, torch.arange(len(rows)))


def test_a_seed_and_an_epoch_say_the_order(store: StoredActivations) -> None:
    def order(**given: Any) -> list[int]:
        return torch.cat([batch.row for batch in store.batches(50, **given)]).tolist()

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    assert order(seed=1) != order(seed=1, epoch=1)
    first = next(store.batches(64, seed=3))
    assert len(first.sequence.unique()) > 8  # rows of one batch come from many places
    assert len(first.label.unique()) == 2


def test_rows_in_the_order_asked_for(store: StoredActivations, everything: dict[str, Tensor]) -> None:
    numbers = [len(store) - 1, 0, 17, 17, 3]
    batch = store.rows(numbers)
    assert batch.row.tolist() == numbers
    assert agrees(batch, everything)
    assert agrees(store.random_rows(20, seed=1), everything)
    assert store.random_rows(20, seed=1).row.tolist() == store.random_rows(20, seed=1).row.tolist()
    assert len(store.random_rows(len(store)).row.unique()) == len(store)
    assert len(store.rows([])) == 0


def test_names_labels_and_what_is_not_there(store: StoredActivations) -> None:
    assert list(store.rows([0], hooks=["blocks.1.hook_out"]).activations) == [RESIDUAL]  # another name of it
    assert store.hooks[NEURONS].shape == (192,)
    assert repr(store) == f"StoredActivations({len(store):,} rows in {store.n_shards} shards: " + (
        f"{NEURONS} [192] BF16, {RESIDUAL} [48] BF16)"
    )
    one = StoredActivations(store.path, labels=["bb"])
    assert {one.label_of(index) for index in range(one.n_shards)} == {"bb"}
    assert set(next(one.batches(500)).label.tolist()) == {1}
    for wrong, message in (
        (lambda: store.shard(0, "blocks.1.hook_resid_pots"), "Nearest of what is: blocks.1.hook_resid_post"),
        (lambda: store.shard(99, RESIDUAL), "index must be at most"),
        (lambda: store.rows([len(store)]), f"0 to {len(store) - 1:,}; found"),
        (lambda: store.rows([-1]), "found -1"),
        (lambda: store.rows([0.5]), "numbers is a whole number"),  # type: ignore[list-item]
        (lambda: store.rows([0], hooks=RESIDUAL), "hooks is a list of strings"),
        (lambda: store.random_rows(10**6), "count must be at most"),
        (lambda: store.batches(0), "at least 1"),
        (lambda: store.column(0, "words"), "token.*document.*position.*sequence"),
        (lambda: StoredActivations(store.path, labels=["b"]), "no label 'b'"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_what_is_written_to_a_row_does_not_reach_the_file(store: StoredActivations) -> None:
    store.shard(0, RESIDUAL).zero_()
    StoredActivations(store.path).verify()
    store._maps.clear()
    assert bool(store.shard(0, RESIDUAL).any())


def test_maps_are_let_go(store: StoredActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.scale.stored_activations.MOST_MAPS", 3)
    fresh = StoredActivations(store.path)
    held = fresh.shard(0, RESIDUAL)
    before = held.clone()
    assert sum(len(batch) for batch in fresh.batches(32)) == len(store)
    assert len(fresh._maps) <= 3
    assert torch.equal(held, before)


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no stored activations"):
        StoredActivations(tmp_path)


def test_reading_loads_neither_transformers_nor_the_model(store: StoredActivations) -> None:
    code = (
        "import sys; from pellucid.scale.stored_activations import StoredActivations; "
        f"print(len(next(StoredActivations({str(store.path)!r}).batches(7)))); "
        "print([m for m in sys.modules if m == 'transformers' or m.startswith('pellucid.model_bridge')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["7", "[]"], done.stderr
