"""Edge attribution and faithfulness over a data set: gone on with after an interrupt; pairs of several lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.attribution.streaming import PairStream
from pellucid.circuits import Circuit, EdgeAttribution, Faithfulness, edge_attribution
from pellucid.circuits.patched_edges import PatchedEdges
from pellucid.corpora.pairs import PromptPairs
from pellucid.errors import OtherJobError
from tests.circuits.layouts import bridge_of, pairs_of, tokens


def several_lengths() -> PromptPairs:
    """Five pairs, of 7 tokens and of 5, mixed."""
    (clean, corrupted), (short, other) = tokens(3), tokens(2, seed=9)
    pairs = PromptPairs(
        [*clean.tolist(), *short[:, :5].tolist()], [*corrupted.tolist(), *other[:, :5].tolist()], [5] * 5, [9] * 5
    )
    return pairs[[0, 3, 1, 4, 2]]


def scored(**given: Any) -> Callable[..., Circuit]:
    return EdgeAttribution(bridge_of("llama"), several_lengths(), **{"batch_size": 2, **given}).run


def measured(**given: Any) -> Callable[..., Any]:
    whole = edge_attribution(bridge_of("llama"), several_lengths())
    options = {"sizes": [40, 90], "batch_size": 2, "randoms": 2, **given}
    return Faithfulness(bridge_of("llama"), whole, several_lengths(), **options).run


def interrupted(run: Callable[..., Any], folder: Path, after: int, monkeypatch: Any) -> None:
    """A run that is broken off when so many batches are done, before their state is written, but for those before."""
    seen: list[int] = []
    plain = PairStream._after_batch

    def interrupt(self: PairStream) -> None:
        seen.append(1)
        if len(seen) == after:
            raise KeyboardInterrupt
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(PairStream, "_after_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=folder, every=0)


def counted(monkeypatch: Any, kind: type, name: str) -> list[int]:
    """A list that grows with each call of a method."""
    calls: list[int] = []
    plain = vars(kind)[name]
    monkeypatch.setattr(kind, name, lambda *given: calls.append(1) or plain(*given))
    return calls


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_interrupted_scores_go_on_with_equal_bits(method: str, blocks: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Three batches, interrupted after the second one, of which the first is in the state."""
    more = {"memory_limit": 3 * 304 * 8} if blocks else {}
    run = scored(method=method, points=2, **more)
    expected = run()
    interrupted(run, tmp_path, 2, monkeypatch)
    ran = counted(monkeypatch, EdgeAttribution, "_scored")
    found = run(checkpoint=tmp_path)
    assert len(ran) == 2
    assert len(found.scores.values) == (3 if blocks else 5)
    np.testing.assert_array_equal(found.scores.values, expected.scores.values)
    np.testing.assert_array_equal(found.scores.sizes, expected.scores.sizes)
    again = run(checkpoint=tmp_path)  # of the whole: nothing runs
    assert len(ran) == 2
    np.testing.assert_array_equal(again.scores.values, expected.scores.values)


@pytest.mark.parametrize("outside", ["source", "mean"])
def test_an_interrupted_curve_goes_on_with_equal_bits(outside: str, tmp_path: Path, monkeypatch: Any) -> None:
    run = measured(outside=outside)
    expected = run()
    interrupted(run, tmp_path, 2, monkeypatch)
    ran = counted(monkeypatch, PatchedEdges, "final")
    assert run(checkpoint=tmp_path).identical(expected)
    assert len(ran) == 2 * 8  # two batches; two sizes with two random circuits each, no edges, all


@pytest.mark.parametrize(
    ("made", "other", "words"),
    [
        (scored, {"batch_size": 3}, r"batch_size 2 \(asked for: 3\)"),
        (scored, {"direction": "denoising"}, r'direction "noising" \(asked for: "denoising"\)'),
        (scored, {"method": "eap-ig"}, r'method "eap" \(asked for: "eap-ig"\)'),
        (scored, {"metric": lambda logits: logits[:, -1, 3]}, "metric"),
        (measured, {"outside": "mean"}, r'outside "source" \(asked for: "mean"\)'),
        (measured, {"seed": 1}, "circuits_sha256"),
    ],
)
def test_another_job_is_refused_by_name(
    made: Callable[..., Any], other: dict[str, Any], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    interrupted(made(), tmp_path, 2, monkeypatch)
    with pytest.raises(OtherJobError, match=words):
        made(**other)(checkpoint=tmp_path)


def test_both_jobs_have_room_in_one_folder(tmp_path: Path) -> None:
    whole = scored()(checkpoint=tmp_path)
    Faithfulness(bridge_of("llama"), whole, pairs_of(*tokens()), sizes=[3], randoms=0).run(checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edge_attribution.safetensors",
        "faithfulness.safetensors",
    ]
