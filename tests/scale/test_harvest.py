"""Harvesting: Hugging Face's numbers, the same bytes from anybody, resuming, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.errors import (
    CorpusError,
    HookDisabledError,
    HookNameError,
    InputError,
    OtherJobError,
    StorageFullError,
    StoreError,
)
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.scale import harvest as harvest_module
from pellucid.scale.harvest import Harvester, harvest
from pellucid.scale.shard_store import StoreFolder
from pellucid.scale.stored_activations import StoredActivations
from pellucid.scale.workers import Worker
from tests.scale.jobs import (
    BATCH,
    CONTEXT,
    HOOKS,
    NEURONS,
    RESIDUAL,
    SHARD,
    by_hand,
    contents,
    documents,
    make_bridge,
    packed,
    padded,
    run,
)
from tests.storage.test_safetensors_files import largest_file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("done") / "store"
    report = run(out)
    assert report.finished
    assert report.written == report.shards == report.share > 10
    return out


@pytest.fixture
def store(done: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(done, tmp_path / "store"))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [packed, padded])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_what_hugging_face_computes_bit_for_bit(
    make: Callable[[], Corpus], side: Literal["left", "right"], tmp_path: Path
) -> None:
    bridge, corpus = make_bridge(), make()
    run(tmp_path, bridge, corpus, padding_side=side)
    for label in corpus.labels:
        found, expected = StoredActivations(tmp_path, labels=[label]), by_hand(bridge, corpus, label, side)
        batches = list(corpus.batches(BATCH, labels=label, padding_side=side))
        real = [batch.attention_mask for batch in batches]
        for name, values in expected.items():
            stored = torch.cat([found.shard(index, name) for index in range(found.n_shards)])
            assert torch.equal(stored, values), name
        for column, given in (("token", "tokens"), ("document", "documents"), ("position", "positions")):
            stored = torch.cat([found.column(index, column) for index in range(found.n_shards)])
            values = torch.cat([vars(batch)[given][mask] for batch, mask in zip(batches, real, strict=True)])
            assert torch.equal(stored, values.to(stored.dtype)), column
        sequences = torch.cat([found.column(index, "sequence") for index in range(found.n_shards)])
        rows = [torch.arange(len(batch.tokens))[:, None] + batch.first_row for batch in batches]
        values = torch.cat([row.expand_as(mask)[mask] for row, mask in zip(rows, real, strict=True)])
        assert torch.equal(sequences, values)


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.2.hook_resid_pre",  # where the run stops: taken from what it returns
        "blocks.2.hook_resid_post",  # the last one, before the final norm
        "hook_embed",
        "blocks.1.attn.hook_z",
        "blocks.0.ln1.hook_scale",
        "ln_final.hook_out",
        "blocks.1.hook_out",  # another name
    ],
)
def test_any_hook_is_what_a_cache_of_the_same_batches_holds(hook: str, tmp_path: Path) -> None:
    bridge, corpus = make_bridge(), padded()
    run(tmp_path, bridge, corpus, hooks=hook)
    store = StoredActivations(tmp_path)
    expected = []
    with torch.no_grad():
        for batch in corpus.batches(BATCH):
            mask = batch.attention_mask if batch.is_padded else None
            _, cache = bridge.run_with_cache(batch.tokens, names_filter=hook, attention_mask=mask)
            expected.append(cache[hook].flatten(2)[batch.attention_mask])
    stored = torch.cat([store.shard(index, hook) for index in range(store.n_shards)])
    assert torch.equal(stored, torch.cat(expected))


@pytest.mark.parametrize(("model", "kept"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", None)])
def test_dtypes(model: str, kept: str | None, tmp_path: Path) -> None:
    bridge, corpus = make_bridge(getattr(torch, model)), padded()
    dtype = None if kept is None else getattr(torch, kept)
    run(tmp_path, bridge, corpus, dtype=dtype)
    expected = torch.cat([by_hand(bridge, corpus, label)[RESIDUAL] for label in corpus.labels])
    store = StoredActivations(tmp_path)
    stored = torch.cat([store.shard(index, RESIDUAL) for index in range(store.n_shards)])
    assert stored.dtype == (dtype or bridge.dtype)
    assert torch.equal(stored, expected.to(stored.dtype))


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    bridge = make_bridge()
    with torch.no_grad():
        bridge.hf_model.transformer.h[1].mlp.dense_4h_to_h.bias[3] = 1e5  # type: ignore[union-attr, index]
    with pytest.raises(StoreError, match=rf"{RESIDUAL} in shard 0 .* float16 cannot hold"):
        run(tmp_path / "half", bridge, dtype=torch.float16)
    assert run(tmp_path / "brain", bridge, dtype=torch.bfloat16).finished


def test_no_layer_after_the_last_one_asked_for_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, ran = make_bridge(), set()
    model: Any = bridge.hf_model
    numbers = {block.mlp: index for index, block in enumerate(model.transformer.h)} | {model.lm_head: 99}
    for kind in {type(module) for module in numbers}:
        forward = kind.forward

        def noted(self: Any, *given: Any, forward: Any = forward) -> Any:
            ran.add(numbers.get(self))
            return forward(self, *given)

        monkeypatch.setattr(kind, "forward", noted)
    harvest(bridge, packed(), RESIDUAL, tmp_path, batch_size=BATCH, progress=False)
    assert ran - {None} == {0, 1}


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 15])
def test_any_number_of_workers_makes_the_same_folder(count: int, done: Path, tmp_path: Path) -> None:
    order = [*range(count)][::-1]
    reports = [run(tmp_path / "x", worker=Worker(index, count)) for index in order]
    assert [report.finished for report in reports] == [False] * (count - 1) + [True]
    assert contents(tmp_path / "x") == contents(done)


def test_the_order_in_which_hooks_are_named_decides_nothing(done: Path) -> None:
    assert run(done, hooks=[*reversed(HOOKS), HOOKS[0]]).written == 0


def test_shards_one_by_one_in_any_order_make_the_same_folder(done: Path, tmp_path: Path) -> None:
    harvester = Harvester(
        make_bridge(), packed(), HOOKS, tmp_path / "x", batch_size=BATCH, batches_per_shard=SHARD, progress=False
    )
    n_shards = len(harvester.job.shards)
    for index in [*reversed(range(1, n_shards, 2)), *range(n_shards)]:
        assert harvester.harvest_shard(index).shard == index
    assert harvester.folder.finish()
    assert contents(tmp_path / "x") == contents(done)
    with pytest.raises(InputError, match=f"index must be at most {n_shards - 1}; found"):
        harvester.harvest_shard(n_shards)


def test_the_launchers_thread_count_does_not_reach_the_bytes(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch, seen = PassBatch.run, set()

    def note(self: PassBatch[Any]) -> Tensor:
        seen.add(torch.get_num_threads())
        return run_batch(self)

    monkeypatch.setattr(PassBatch, "run", note)
    try:
        torch.set_num_threads(2)
        run(tmp_path / "x")
        assert torch.get_num_threads() == 2  # as it was found
    finally:
        torch.set_num_threads(1)
    assert seen == {1}
    assert contents(tmp_path / "x") == contents(done)


def test_nothing_of_the_place_or_the_model_name_is_in_a_shard(done: Path, tmp_path: Path) -> None:
    run(tmp_path / "elsewhere", model_name="some/name", revision="abc")
    ours, other = contents(done), contents(tmp_path / "elsewhere")
    differing = {name for name in ours if ours[name] != other[name]}
    assert differing == {"job.json", "manifest.json"}
    assert json.loads((tmp_path / "elsewhere" / "job.json").read_text())["remarks"]["model"]["name"] == "some/name"


def test_two_at_once_are_harmless(done: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(tmp_path / "x")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert contents(tmp_path / "x") == contents(done)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_what_is_done_is_left_as_it_is(store: Path) -> None:
    before = {path.name: path.stat() for path in store.iterdir() if path.name != "manifest.json"}
    report = run(store)
    assert report.written == 0
    assert report.finished
    after = {path.name: path.stat() for path in store.iterdir() if path.name != "manifest.json"}
    assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in before.items()} == {
        name: (stat.st_ino, stat.st_mtime_ns) for name, stat in after.items()
    }


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "removed": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "one bit in the middle": lambda path: flip_bit(path, path.stat().st_size // 2),
    "the last bit": lambda path: flip_bit(path, -1),
    "a bit of the header": lambda path: flip_bit(path, 30),
}


@pytest.mark.parametrize("file", [f"00004.{RESIDUAL}.safetensors", "00004.rows.safetensors", "00004.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_mended(damage: str, file: str, store: Path, done: Path) -> None:
    DAMAGE[damage](store / file)
    if file != "00004.json":  # the reader goes by the manifest
        with pytest.raises(StoreError, match=rf"shard 4 .*{re.escape(file)}"):
            StoredActivations(store).verify()
        with pytest.raises(StoreError, match=rf"shard 4 .*{re.escape(file)}"):
            list(StoredActivations(store).batches(64))
    report = run(store)
    assert report.written == 1
    assert contents(store) == contents(done)


def test_a_damaged_job_or_manifest_is_named_and_mended(store: Path, done: Path) -> None:
    (store / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        StoredActivations(store)
    assert run(store).written == 0
    (store / "job.json").write_text("{")
    with pytest.raises(StoreError, match=r"job\.json is damaged.*Remove that file"):
        run(store)
    (store / "job.json").unlink()
    assert run(store).written == 0
    assert contents(store) == contents(done)


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = Harvester._compute, []

    def interrupt(self: Harvester, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        compute(self, *arguments)

    monkeypatch.setattr(Harvester, "_compute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x")
    with pytest.raises(StoreError, match="is not finished: .* shards are not there"):
        StoredActivations(tmp_path / "x")
    present = len(list((tmp_path / "x").glob("?????.json")))
    report = run(tmp_path / "x")
    assert 0 < present < 5
    assert report.written == report.shards - present
    assert contents(tmp_path / "x") == contents(done)


def test_no_space_keeps_what_is_done(tmp_path: Path, done: Path) -> None:
    size = (done / f"00000.{NEURONS}.safetensors").stat().st_size
    run(tmp_path / "x", worker=Worker(0, 4))
    before = contents(tmp_path / "x")
    with largest_file(size - 1):
        with pytest.raises(StorageFullError, match=r"shard 1 of \d+: .* needs [\d,]+ bytes"):
            run(tmp_path / "x")
    assert before.items() <= contents(tmp_path / "x").items()
    run(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(done)


def test_what_cannot_fit_is_refused_before_the_first_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(harvest_module.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(StorageFullError, match=r"need [\d,]+ bytes and .* has 10,000 left"):
        run(tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["job.json"]


# -- another job -------------------------------------------------------------------------------------------------------


def moved_weight() -> TransformerBridge:
    bridge = make_bridge()
    with torch.no_grad():
        bridge.hf_model.transformer.h[2].mlp.dense_4h_to_h.weight[0, 0] += 1e-3  # type: ignore[union-attr, index]
    return bridge


OTHERS: dict[str, dict[str, Any]] = {
    r"run\.threads 1 \(asked for: 2\)": {"threads": 2},
    r"run\.batch_size 3 \(asked for: 4\)": {"batch_size": 4},
    r"sequences_per_shard 6 \(asked for: 9\)": {"batches_per_shard": 3},
    r"padding_side": {"padding_side": "left"},
    r"hooks .*F32.*asked for: .*BF16": {"dtype": torch.bfloat16},
    r"hooks": {"hooks": [RESIDUAL]},
    r"labels": {"labels": ["aa"]},
    r"model\.weights_sha256": {"bridge": moved_weight},
    r"model\.dtype \"float32\" \(asked for: \"float64\"\)": {"bridge": lambda: make_bridge(torch.float64)},
    r"corpus\.sha256": {"corpus": lambda: packed(seed=1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_job_is_refused_by_what_differs(what: str, done: Path) -> None:
    given = {name: value() if callable(value) else value for name, value in OTHERS[what].items()}
    before = contents(done)
    with pytest.raises(OtherJobError, match=what):
        run(done, **given)
    assert contents(done) == before


def test_another_machine_or_build_is_refused_by_name(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    monkeypatch.setattr(torch.version, "git_version", "f00")
    with pytest.raises(OtherJobError, match=r"cpu_capability .*AVX1024.*torch_build .*f00"):
        run(done)


def test_a_folder_of_someone_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OtherJobError, match=r"thesis\.tex"):
        run(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        run(tmp_path / "thesis.tex")


def test_a_shard_of_another_job_is_not_taken_for_ours(store: Path, done: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", corpus=packed(seed=1))
    for path in (tmp_path / "other").glob("00002.*"):
        shutil.copy(path, store)
    with pytest.raises(StoreError, match="shard 2"):
        StoredActivations(store).verify()
    assert run(store).written == 1
    assert contents(store) == contents(done)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"hooks": "blocks.1.hook_resid_pots"}, HookNameError, r"Nearest names: blocks\.1\.hook_resid_post"),
        ({"hooks": "blocks.7.hook_resid_post"}, HookNameError, "3 layers"),
        ({"hooks": []}, HookNameError, "empty"),
        ({"hooks": "blocks.0.attn.hook_pattern"}, InputError, "no row for each token"),
        ({"hooks": "blocks.0.attn.hook_result"}, HookDisabledError, "use_attn_result"),
        ({"batch_size": 0}, InputError, "batch_size must be at least 1"),
        ({"threads": 0}, InputError, "threads must be at least 1"),
        ({"batches_per_shard": 0}, InputError, "batches_per_shard must be at least 1"),
        ({"dtype": torch.int32}, InputError, "torch.bfloat16"),
        ({"labels": ["cc"]}, InputError, "aa"),
        ({"padding_side": "top"}, InputError, "Invalid padding_side: 'top'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "x", **given)
    assert not (tmp_path / "x").exists()


def test_a_model_whose_numbers_are_not_its_weights_alone_is_refused(tmp_path: Path) -> None:
    bridge = make_bridge()
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        run(tmp_path / "x", bridge)
    bridge.eval()
    with bridge.hooks(fwd_hooks=[(RESIDUAL, lambda tensor, hook: tensor * 0)]):
        with pytest.raises(InputError, match=r"hooked on blocks\.1\.hook_resid_post"):
            run(tmp_path / "x", bridge)
    handle = bridge.hf_model.lm_head.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="hooked on lm_head"):
        run(tmp_path / "x", bridge)
    handle.remove()
    assert run(tmp_path / "x", bridge).finished


def test_a_corpus_that_shrinks_under_the_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvester = Harvester(make_bridge(), packed(), RESIDUAL, tmp_path, batch_size=BATCH, progress=False)
    monkeypatch.setattr(harvester, "_corpus", Corpus.from_tokens(documents(count=5), context=CONTEXT))
    with pytest.raises(CorpusError, match="has changed since it was read: shard 0"):
        harvester.run(progress=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_the_writer_meets_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StoreFolder, *given: Any) -> Tensor:
        raise PermissionError("no")

    monkeypatch.setattr(StoreFolder, "write_shard", refuse)
    with pytest.raises(PermissionError, match="no"):
        run(tmp_path)
    assert not any(thread.name == "pellucid-shard-writer" for thread in threading.enumerate())
