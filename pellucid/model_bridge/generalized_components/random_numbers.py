"""What is computed beside the model draws the random numbers that the model drew, and takes none of the run's.

An adapter's dropout is inside a layer that Pellucid calls once more where a hook acts on one part of what goes in or comes
out. A second draw there would be another mask than the model's, and would move every draw after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Draws:
    """Where the generators stood before a layer was called; made just before that call.

    Args:
        layer: what is called. Only a layer with a module in training draws.
        device: where it computes.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state, self._cuda_state = None, None
        if any(module.training for module in layer.modules()):
            self._state = torch.get_rng_state()
            self._cuda_state = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same numbers inside; after it the generators stand where they stood at its beginning."""
        if self._state is None:
            yield
            return
        with torch.random.fork_rng([] if self._cuda is None else [self._cuda]):
            torch.set_rng_state(self._state)
            if self._cuda is not None and self._cuda_state is not None:
                torch.cuda.set_rng_state(self._cuda_state, self._cuda)
            yield
