"""Rows and positions that a block lays into one axis, shown as two.

OPT's blocks give their MLP ``[batch * pos, features]``. Functions at its points see ``[batch, pos, features]`` all the same;
the module is given what Hugging Face gives it.
"""

from __future__ import annotations

from torch import Tensor

from pellucid.run_context import current_run


def rows_apart(flat: Tensor) -> Tensor:
    """``[batch * pos, ...]`` as ``[batch, pos, ...]`` of the forward that is running; outside one, of a single row."""
    run = current_run()
    apart: Tensor = flat.unflatten(0, (1 if run is None else run.batch, -1))
    return apart
