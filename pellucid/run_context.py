"""The run: what a hook can ask about the forward it is in, and which functions act in it.

Everything here is kept in context variables, so it belongs to the thread or task that opened it and to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class GenerationRun:
    """One call of ``generate``: how many prompts it serves and which step it is at (0 is the prompt itself)."""

    n_prompts: int
    step: int = -1


class RunContext:
    """Where in the sequence the tensors of this forward are; a hook reads it as ``hook.run``.

    Attributes:
        tokens: ``[batch, pos]`` ids given to this forward, or ``None`` if it was given embeddings.
        past_length: number of positions already in the key/value cache.
        step: the generation step (0 the prompt, then one a token), ``None`` outside ``generate``.
    """

    def __init__(
        self,
        given: Tensor,
        past_length: int,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        generation: GenerationRun | None,
    ) -> None:
        self._given = given
        self.past_length = past_length
        self.tokens = tokens
        self._attention_mask = attention_mask
        self._generation = generation
        self._whole: RunContext | None = None
        self.step = None if generation is None else generation.step

    def last(self, length: int) -> RunContext:
        """The same run seen from its last ``length`` positions: ``generate`` unembeds no more than it needs."""
        if length == self.length:
            return self
        tokens = None if self.tokens is None else self.tokens[:, -length:]
        past = self.past_length + self.length - length
        seen = RunContext(self._given[:, -length:], past, tokens, self._attention_mask, self._generation)
        seen._whole = self
        return seen

    def is_part_of(self, other: RunContext | None) -> bool:
        """Whether this is ``other``, or ``other`` seen from its last positions."""
        return other is not None and (self is other or self._whole is other)

    @property
    def batch(self) -> int:
        """Rows."""
        return self._given.shape[0]

    @property
    def length(self) -> int:
        """New positions."""
        return self._given.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self._given.device

    @property
    def columns(self) -> Tensor:
        """``[pos]``: index of each position in the padded sequence, cached positions counted."""
        return torch.arange(self.past_length, self.past_length + self.length, device=self.device)

    @property
    def real(self) -> Tensor:
        """``[batch, pos]`` bool: which positions hold real tokens, not padding."""
        mask = self._attention_mask
        if mask is None or mask.dim() != 2:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return mask[:, self.past_length : self.past_length + self.length].to(self.device).bool()

    @property
    def positions(self) -> Tensor:
        """``[batch, pos]``: how many real tokens of its row come before each position; -1 at padding."""
        mask = self._attention_mask
        if mask is None or mask.dim() != 2:
            return self.columns.expand(self.batch, self.length)
        before = (mask.long().cumsum(-1) - 1)[:, self.past_length : self.past_length + self.length]
        return before.to(self.device).masked_fill(~self.real, -1)

    @property
    def rows(self) -> Tensor:
        """``[batch]``: the prompt each row belongs to; under beam search several rows share one."""
        n_prompts = self.batch if self._generation is None else self._generation.n_prompts
        return torch.arange(self.batch, device=self.device) // max(1, self.batch // n_prompts)


@dataclass(frozen=True)
class LayerSpan:
    """Which blocks a run passes through: from ``start`` (its residual is given) up to, not including, ``stop``.

    ``generation`` is the call of ``generate`` that it is a step of, if it is one.
    """

    start: int | None = None
    stop: int | None = None
    generation: GenerationRun | None = None


WHOLE = LayerSpan()
"""A run of its own, through every block."""


class FastAttention:
    """A run whose attentions may take torch's fused kernel, and the bias that they all add to their scores.

    The bias is made by the first attention of a forward and kept for the others: they are given the very same ALiBi and
    mask.

    Args:
        root: the model that runs; attentions of another one, called meanwhile, are not meant.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._made_of: tuple[tuple[Tensor | None, int], ...] = ()
        self._bias: Tensor | None = None

    def bias(
        self, alibi: Tensor, mask: Tensor | None, make: Callable[[Tensor, Tensor | None], Tensor | None]
    ) -> Tensor | None:
        """``make(alibi, mask)``, made once for the same two tensors, as long as nobody writes to them."""
        made_of = (alibi, _version(alibi)), (mask, _version(mask))
        known = self._made_of
        if not known or any(a is not b or m != n for (a, m), (b, n) in zip(known, made_of, strict=True)):
            self._made_of, self._bias = (), None  # the last forward's goes before this one's comes
            self._bias = make(alibi, mask)
            self._made_of = made_of
        return self._bias


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class Scope:
    """The lifetime of a group of hook functions, in the thread or task that opened it. Compared by identity.

    Attributes:
        level: how many scopes were open with it when it was opened, itself counted.
        closed: whether it has ended.
    """

    level = 0
    closed = False


_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("pellucid_scopes", default=())
_QUIET: ContextVar[bool] = ContextVar("pellucid_quiet", default=False)
_RUN: ContextVar[RunContext | None] = ContextVar("pellucid_run", default=None)
_FINISHED: ContextVar[RunContext | None] = ContextVar("pellucid_finished", default=None)
_SPAN: ContextVar[LayerSpan] = ContextVar("pellucid_span", default=WHOLE)
_FAST: ContextVar[FastAttention | None] = ContextVar("pellucid_fast_attention", default=None)

# On the way of every hooked forward, where a Python function costs microseconds: the variables' own methods.
is_quiet: Callable[[], bool] = _QUIET.get
"""Whether hook points are silent because we are recomputing something beside the model."""
open_scopes: Callable[[], tuple[Scope, ...]] = _SCOPES.get
"""The groups of hook functions that act in this thread or task."""
set_open_scopes: Callable[[tuple[Scope, ...]], object] = _SCOPES.set
"""Say which groups of hook functions act in this thread or task."""
current_span: Callable[[], LayerSpan] = _SPAN.get
"""The blocks that the current run passes through."""
begin_run: Callable[[RunContext | None], Token[RunContext | None]] = _RUN.set
"""Tell the hooks of one forward where in the sequence they are, until :func:`end_run`.

No context manager: it is on the way of every hooked forward.
"""
end_run: Callable[[Token[RunContext | None]], None] = _RUN.reset
"""End the run that :func:`begin_run` began."""
keep_finished: Callable[[RunContext | None], Token[RunContext | None]] = _FINISHED.set
"""Remember a run that ends: the unembedding, which comes after, is part of it (:func:`begin_unembedding`)."""
current_run: Callable[[], RunContext | None] = _RUN.get
"""The forward that is running in this thread or task."""
current_fast_attention: Callable[[], FastAttention | None] = _FAST.get
"""What the attentions of the current run share, ``None`` if all of them take the exact path."""


@contextmanager
def quiet() -> Iterator[None]:
    """Call modules of the model without any hook firing."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


@contextmanager
def layer_span(start: int | None, stop: int | None) -> Iterator[None]:
    """Run from block ``start`` up to block ``stop``."""
    token = _SPAN.set(LayerSpan(start, stop, _SPAN.get().generation))
    try:
        yield
    finally:
        _SPAN.reset(token)


@contextmanager
def fast_attention(root: nn.Module | None) -> Iterator[None]:
    """Let the attentions of ``root`` take the fused kernel; ``None``: all attentions take the exact path."""
    token = _FAST.set(None if root is None else FastAttention(root))
    try:
        yield
    finally:
        _FAST.reset(token)


@contextmanager
def generation_run(n_prompts: int) -> Iterator[None]:
    """Count the forwards of one ``generate``."""
    span = _SPAN.get()
    token = _SPAN.set(LayerSpan(span.start, span.stop, GenerationRun(n_prompts)))
    try:
        yield
    finally:
        _SPAN.reset(token)


@contextmanager
def outside_run() -> Iterator[None]:
    """While a user's function runs: a model that it calls is in a run of its own."""
    span, fast = _SPAN.set(WHOLE), _FAST.set(None)
    try:
        yield
    finally:
        _FAST.reset(fast)
        _SPAN.reset(span)


def begin_unembedding(length: int) -> Token[RunContext | None]:
    """Let hooks fire on the last ``length`` positions of the run that has just left the blocks."""
    run = _FINISHED.get()
    _FINISHED.set(None)
    return _RUN.set(None if run is None else run.last(length))


def end_unembedding(token: Token[RunContext | None]) -> None:
    """End what :func:`begin_unembedding` began."""
    _RUN.reset(token)


def acts(scope: Scope | None) -> bool:
    """Whether what belongs to ``scope`` (``None``: for good) acts in this thread or task now."""
    return scope is None or (not scope.closed and scope in _SCOPES.get())
