"""Shared fixtures. Tests run on one thread: tiny models gain nothing from more, and a loaded machine loses much.

What takes seconds to import (transformers) is imported by the tests that use it.
"""

from __future__ import annotations

import functools
import gc
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import shapes

if TYPE_CHECKING:
    from pellucid import TransformerBridge
    from pellucid.demo.story import Story

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it; in the background of a script it is ignored
shapes.install()  # before the library is imported
gc.disable()  # while modules are imported: nearly all that they make stays


def pytest_collection_finish() -> None:
    """Look through what the imports made never again: a million objects, half a second each time that Python looks."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ctrl_c_is_left_alone() -> Iterator[None]:
    """What takes Ctrl-C for a while gives it back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    found = signal.signal(signal.SIGINT, before)
    assert found is before


@pytest.fixture(scope="session")
def demo() -> TransformerBridge:
    """The embedded, trained model."""
    from pellucid.demo import load_demo_bridge

    return load_demo_bridge()


@pytest.fixture(scope="session")
def story(demo: TransformerBridge) -> Story:
    """What the demonstration computes."""
    from pellucid.demo.story import run_demo

    return run_demo(demo)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call of the Hugging Face model is given, one after the other."""
    from transformers import BloomForCausalLM

    calls: list[int] = []
    forward = BloomForCausalLM.forward

    @functools.wraps(forward)
    def counting(self: Any, input_ids: Any = None, **settings: Any) -> Any:
        calls.append(input_ids.shape[1])
        return forward(self, input_ids, **settings)

    monkeypatch.setattr(BloomForCausalLM, "forward", counting)
    return calls
