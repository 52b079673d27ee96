"""Attention in another place than over the rows of the batch: who is to mix values, said for the length of a block.

It is what an attention function is to Hugging Face's models. Whoever runs a block with :func:`mixing_by` knows which
positions attend to which; the arithmetic is asked of the component (:class:`Attends`), or of Hugging Face's own attention
function (:class:`FunctionAttends`), which know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

from torch import Tensor


class Attends(Protocol):
    """An attention component, as far as somebody who mixes its values needs it."""

    def may_fuse(self) -> bool:
        """Whether a fused kernel would do what the exact steps do: nothing looks at scores or pattern."""

    def attend(
        self,
        q_bqnh: Tensor,
        k_bnkh: Tensor,
        v_bnkh: Tensor,
        attention_mask: Tensor | None,
        alibi: Any,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values ``[batch, pos, n_heads, d_head]``, and the pattern if there is one; ``alibi`` may be ``None``."""


class FunctionAttends:
    """Hugging Face's attention function, as whoever mixes values calls it.

    Args:
        function: ``(queries, keys, values, mask)``, heads before positions, to ``(z, pattern)``.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    ) -> None:
        self._function = function

    def may_fuse(self) -> bool:
        """See :class:`Attends`: which kernel runs is the function's own affair."""
        return False

    def attend(
        self,
        q_bqnh: Tensor,
        k_bnkh: Tensor,
        v_bnkh: Tensor,
        attention_mask: Tensor | None,
        alibi: Tensor | None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`Attends`; keys and values may have fewer heads than queries."""
        return self._function(q_bqnh.transpose(1, 2), k_bnkh, v_bnkh, attention_mask)


Projection: TypeAlias = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values ``[batch, pos, head, d_head]``, after their hooks; computed when it is called."""

Mixing: TypeAlias = Callable[[Attends, Projection], Tensor]
"""``(component, project)`` to ``z`` ``[batch, pos, n_heads, d_head]``, whose hook is still to fire."""

_MIXING: ContextVar[Mixing | None] = ContextVar("pellucid_mixing", default=None)


def current_mixing() -> Mixing | None:
    """What mixes values in this context; ``None`` for the component itself."""
    return _MIXING.get()


@contextmanager
def mixing_by(mixing: Mixing) -> Iterator[None]:
    """For the length of a ``with`` block let ``mixing`` make z. What is run with hooks suppressed knows nothing of it."""
    token = _MIXING.set(mixing)
    try:
        yield
    finally:
        _MIXING.reset(token)
