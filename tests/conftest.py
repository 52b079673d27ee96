"""Shared fixtures. Tests run on one thread: tiny models gain nothing from more, and a loaded machine loses much."""

from __future__ import annotations

import pytest
import torch

from pellucid import TransformerBridge

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo() -> TransformerBridge:
    """The embedded, trained model."""
    from pellucid.demo import load_demo_bridge

    return load_demo_bridge()
