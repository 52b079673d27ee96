"""No argument is accepted and ignored: a value out of range, and a combination without effect, are refused by name.

The tables of ``tests/arguments`` are lines: a call, the arguments that are changed in one that works, and words of the error,
which name the argument. Nothing has run, and nothing is written, when it is raised. Further tests ask the signatures: every
public callable is in a table, or among those of which it is said why not, and every argument of each has a line, or a reason.
"""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomForCausalLM

from pellucid import TransformerBridge
from pellucid.errors import PellucidError
from tests.arguments import (
    attribution,
    circuits,
    corpora,
    head_detector,
    heads,
    lenses,
    model_bridge,
    neurons,
    patching,
    peer_modules,
    plots,
    scale,
    steering,
    sweeps,
    utilities,
)
from tests.arguments.bench import Bench, Call, Line, make_bench
from tests.arguments.public import NOT_TRIED, arguments_of, bare, public
from tests.arguments.reasons import EXPLAINED, NO_LINE_NEEDED
from tests.models import is_pristine

ROOMS = (
    *(model_bridge, sweeps, patching, attribution, circuits, corpora, heads, lenses, neurons, scale, plots, steering),
    *(peer_modules, utilities, head_detector),
)
CALLS: dict[str, Call] = {name: call for room in ROOMS for name, call in room.CALLS.items()}
REFUSED: list[Line] = [line for room in ROOMS for line in room.REFUSED]
PUBLIC = dict(public())


@pytest.fixture(scope="module")
def bench(demo: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(demo, tmp_path_factory.mktemp("bench"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which an empty path would mean."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward of the model."""
    ran: list[int] = []
    native = BloomForCausalLM.forward

    @wraps(native)
    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return native(*args, **kwargs)

    monkeypatch.setattr(BloomForCausalLM, "forward", counted)
    return ran


def _in_words(value: object) -> str:
    """What is short enough to be read in a list."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


def _needs(call: str) -> None:
    if call == "Corpus.from_parquet":
        pytest.importorskip("pyarrow", reason="the extra `datasets` is not installed")


@pytest.mark.parametrize("call", dict.fromkeys(line[0] for line in REFUSED))
def test_refused_before_anything_runs(bench: Bench, here: Path, forwards: list[int], call: str) -> None:
    """Every line of a call, in one test: thousands of tests of a millisecond cost more around them than they do."""
    _needs(call)
    wrong = []
    for _, given, words in (line for line in REFUSED if line[0] == call):
        try:
            _is_refused(bench, here, forwards, call, given, words)
        except (Exception, pytest.fail.Exception) as error:  # the other lines are tried all the same
            wrong.append(f"{_in_words(given)}, {words!r}: {error!r}")
    assert not wrong, "\n".join(wrong)


def _is_refused(bench: Bench, here: Path, forwards: list[int], call: str, given: dict[str, Any], words: str) -> None:
    entry = CALLS[call]
    function, arguments = entry.make(bench), entry.works(bench) | given
    forwards.clear()
    with pytest.raises(PellucidError, match=words):
        function(**arguments)
    assert not forwards or "Token id" in words  # on a CPU the embedding says it
    assert not list(here.iterdir())
    assert is_pristine(bench.bridge.hf_model)
    assert not bench.bridge.live_hooks()


@pytest.mark.parametrize("call", [name for name, call in CALLS.items() if call.is_run])
def test_what_the_lines_change_works(bench: Bench, here: Path, call: str) -> None:
    _needs(call)
    entry = CALLS[call]
    entry.make(bench)(**entry.works(bench))
    bench.bridge.reset_hooks(including_permanent=True)


def test_every_public_callable_is_tried() -> None:
    tried = {id(bare(call.of)) for call in CALLS.values()}
    left = {label for label, function in PUBLIC.items() if id(bare(function)) not in tried} - set(NOT_TRIED)
    assert not left


def test_what_is_said_of_public_callables_is_of_some() -> None:
    tried = {id(bare(call.of)) for call in CALLS.values()}
    types = {"AxisNames", "Reduce", "Batch", "Text"}
    stale = {label for label in set(NOT_TRIED) - types if label in PUBLIC and id(bare(PUBLIC[label])) in tried}
    assert not stale


@pytest.mark.parametrize("call", CALLS)
def test_every_argument_has_a_line(call: str) -> None:
    of = bare(CALLS[call].of)
    same = {name for name, other in CALLS.items() if bare(other.of) is of}
    tried = {argument for name, given, _ in REFUSED if name in same for argument in given}
    explained = {argument for name, argument in EXPLAINED if name in same}
    left = set(arguments_of(of)) - tried - explained - set(NO_LINE_NEEDED)
    assert not left


def test_a_reason_is_of_an_argument() -> None:
    arguments = {name: set(arguments_of(call.of)) for name, call in CALLS.items()}
    assert set(NO_LINE_NEEDED) <= set().union(*arguments.values())
    assert not [(name, argument) for name, argument in EXPLAINED if argument not in arguments[name]]


def test_words_say_which_argument() -> None:
    """The argument's name, or enough of a sentence that no other error has it."""
    loose = [line for line in REFUSED if len(line[2]) < 12 and not any(name in line[2] for name in line[1])]
    assert not loose
