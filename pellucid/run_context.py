"""The run: what a hook can ask about the forward it is in, and which functions act in it.

Everything here is kept in context variables, so it belongs to the thread or task that opened it and to nobody else. A
variable is set only inside a context of its own (:func:`in_own_context`), which the interpreter leaves by itself when the
call ends, by an exception too: there is no line of Python at which an interrupt could leave one set. A context variable that
a user's hook sets during a run is gone with the run for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from threading import Thread
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import ParamSpec

from pellucid.errors import InputError
from pellucid.generation_run import GenerationRun
from pellucid.padding import counts, places, real_positions


class RunContext:
    """Where in the sequence the tensors of this forward are; a hook reads it as ``hook.run``.

    Attributes:
        tokens: ``[batch, pos]`` ids given to this forward, or ``None`` if it was given embeddings.
        past_length: number of positions already in the key/value cache.
        step: in ``generate``, how many tokens after the prompt this forward has read with its last position: 0 while the
            prompt or a part of it is read, then 1 for the first new token. So a forward's last position decides new token
            number ``step``, counted from 0, with a cache and without. In assisted decoding, which reads several tokens at
            once, drafted tokens count too (:attr:`steps` has each position's); with guidance, the second sequence has the
            step of the first, and so has what a logits processor or a stopping criterion runs. ``None`` outside
            ``generate``, and in what a torch hook of the model or a streamer runs beside it.
        fired: the hook points that this forward has passed so far.
    """

    def __init__(
        self,
        given: Tensor,
        past_length: int,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        generation: GenerationRun | None,
        prompt_end: int = 0,
    ) -> None:
        self._given = given
        self.past_length = past_length
        self.tokens = tokens
        self._attention_mask = attention_mask
        self._generation = generation
        self._prompt_end = prompt_end
        self._whole: RunContext | None = None
        self.fired: set[nn.Module] = set()
        self._kept: Tensor | None = None
        self.step = None if generation is None else max(0, past_length + given.shape[1] - prompt_end)

    def __repr__(self) -> str:
        end = self.past_length + self.length - 1
        step = "" if self.step is None else f", generation step {self.step}"
        return f"RunContext({self.batch} rows, columns {self.past_length} to {end}{step})"

    def at(self, kept: int | Tensor) -> RunContext:
        """The same run seen from the positions that are unembedded.

        Args:
            kept: Hugging Face's ``logits_to_keep``: the last so many (0 for all), or a tensor of positions, ``[pos]`` or
                ``[batch, pos]``.
        """
        if isinstance(kept, int) and (kept == 0 or kept >= self.length):
            return self
        here = torch.arange(self.length, device=self.device)
        kept = here[-kept:] if isinstance(kept, int) else kept.to(self.device)
        if kept.dim() == 1:
            kept = here[kept]  # from the end, or a mask
        seen = RunContext(
            self._given, self.past_length, self.tokens, self._attention_mask, self._generation, self._prompt_end
        )
        if self.tokens is not None:
            seen.tokens = torch.take_along_dim(self.tokens, kept.expand(self.batch, -1), 1)
        seen._kept, seen._whole, seen.fired = kept, self, self.fired
        if kept.numel() and self.step is not None:
            seen.step = max(0, self.past_length + int(kept.max()) + 1 - self._prompt_end)
        return seen

    def is_part_of(self, other: RunContext | None) -> bool:
        """Whether this is ``other``, or ``other`` seen from some of its positions."""
        return other is not None and (self is other or self._whole is other)

    @property
    def batch(self) -> int:
        """Rows."""
        return self._given.shape[0]

    @property
    def length(self) -> int:
        """New positions."""
        return self._given.shape[1] if self._kept is None else self._kept.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self._given.device

    @property
    def columns(self) -> Tensor:
        """``[pos]``: index of each position in the padded sequence, cached positions counted.

        ``[batch, pos]`` at the unembedding of a forward whose ``logits_to_keep`` names other positions in each row.
        """
        if self._kept is not None:
            return self._kept + self.past_length
        return torch.arange(self.past_length, self.past_length + self.length, device=self.device)

    @property
    def steps(self) -> Tensor | None:
        """As :attr:`columns`: the step of each position, 0 in the prompt; ``None`` outside ``generate``."""
        return None if self._generation is None else (self.columns + 1 - self._prompt_end).clamp(min=0)

    def _of_columns(self, values: Tensor) -> Tensor:
        """``[batch, columns of the whole sequence]`` to ``[batch, pos]``."""
        end = self.past_length + self.length
        if self._kept is None and values.shape[1] >= end:
            return values[:, self.past_length : end].to(self.device)
        return torch.take_along_dim(values.to(self.device), self.columns.expand(self.batch, -1), 1)

    @property
    def real(self) -> Tensor:
        """``[batch, pos]`` bool: which positions hold real tokens, not padding."""
        mask = self._attention_mask
        own = None if mask is None or mask.dim() != 2 else self._of_columns(mask)
        return real_positions(own, self.batch, self.length, self.device)

    @property
    def positions(self) -> Tensor:
        """``[batch, pos]``: how many real tokens of its row come before each position; -1 at padding."""
        mask = self._attention_mask
        if mask is None or mask.dim() != 2:
            return self.columns.expand(self.batch, self.length)
        return self._of_columns(places(mask))

    @property
    def prompt_lengths(self) -> Tensor:
        """``[batch]`` int64: how many real positions the prompt of each row has, so that ``positions`` from there on are
        generated ones; outside ``generate``, the real positions of this forward and of its cache.
        """
        mask, generation = self._attention_mask, self._generation
        end = self.past_length + self._given.shape[1] if generation is None else self._prompt_end
        if mask is None or mask.dim() != 2:
            return torch.full((self.batch,), end, device=self.device)
        known = counts(mask[:, :end].to(self.device))
        left = end - mask.shape[1]
        if left <= 0:
            return known
        whole = None if generation is None else generation.prompt_mask
        if whole is None or whole.shape[1] < left:
            return known + left
        return known + counts(whole[:, -left:].to(self.device))[self.rows]

    @property
    def rows(self) -> Tensor:
        """``[batch]``: the prompt each row belongs to; with beams or several sequences a prompt, rows share one."""
        n_prompts = self.batch if self._generation is None else self._generation.n_prompts
        if self.batch % n_prompts:
            n_prompts = self.batch
        return torch.arange(self.batch, device=self.device) // (self.batch // n_prompts)


@dataclass(frozen=True, eq=False)
class LayerSpan:
    """Which blocks a run passes through: from ``start``, which ``residual`` enters, up to, not including, ``stop``.

    ``generation`` is the call of ``generate`` that it is a step of, if it is one.
    """

    start: int | None = None
    stop: int | None = None
    generation: GenerationRun | None = None
    residual: Tensor | None = None


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


class ModelForward:
    """A forward of a whole model: the run of its blocks, and which of its positions go to the unembedding.

    Args:
        kept: Hugging Face's ``logits_to_keep``.
    """

    def __init__(self, kept: int | Tensor) -> None:
        self.kept = kept
        self.run: RunContext | None = None
        self._inside, self._has_run = current_run(), False

    def keep(self, run: RunContext) -> None:
        """Remember that its blocks have ended; blocks that something else runs meanwhile are not its own."""
        if current_run() is self._inside and not self._has_run:
            self.run, self._has_run = run, True

    def take(self) -> RunContext | None:
        """The run of its blocks, once."""
        run, self.run = self.run, None
        return run


class Scope:
    """Where and how long a group of hook functions acts. Compared by identity.

    One that was just made acts nowhere. It is opened in a thread or task (:func:`enter_scope`), or acts everywhere.

    Attributes:
        everywhere: whether its functions act in every thread: those that were added until they are removed.
        closed: whether it has ended; its functions act no more.
        components: components of the bridge that stay mounted while it is open, besides those its functions need.
        level: how many scopes were open with it when it was opened, itself counted.
        is_block: whether it is a user's ``with`` block, and not one run.
        threads: of a block, the threads that were there when it was opened.
        was_reported: whether a run in a later thread, in which it does not act, has been warned of.
        inside: the forward in which it was opened, ``None`` outside one.
        run: the first forward that began where it was opened, and not inside another one.
    """

    everywhere = False
    closed = False
    components: tuple[str, ...] = ()
    level = 0
    is_block = False
    threads: Container[Thread] = ()
    was_reported = False
    inside: object | None = None
    run: RunContext | None = None


ReturnedInputs: TypeAlias = dict[int, tuple[Tensor, Tensor]]
"""By layer: what a block was given, and the residual that a hook returned in its place.

Hugging Face keeps a block's input for ``output_hidden_states`` before it calls the block, so that an edit in place is among
its hidden states and a returned one is not.
"""

_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("pellucid_scopes", default=())
_QUIET: ContextVar[bool] = ContextVar("pellucid_quiet", default=False)
_RUN: ContextVar[RunContext | None] = ContextVar("pellucid_run", default=None)
_INSIDE: ContextVar[object | None] = ContextVar("pellucid_inside", default=None)
_FORWARD: ContextVar[ModelForward | None] = ContextVar("pellucid_forward", default=None)
_SPAN: ContextVar[LayerSpan] = ContextVar("pellucid_span", default=WHOLE)
_FAST: ContextVar[FastAttention | None] = ContextVar("pellucid_fast_attention", default=None)
_RETURNED: ContextVar[ReturnedInputs | None] = ContextVar("pellucid_returned_inputs", default=None)

is_quiet: Callable[[], bool] = _QUIET.get
"""Whether hook points are silent because we compute something beside the model."""
open_scopes: Callable[[], tuple[Scope, ...]] = _SCOPES.get
"""The groups of hook functions that act in this thread or task, besides those that act everywhere."""
current_span: Callable[[], LayerSpan] = _SPAN.get
"""The blocks that the current run passes through."""
current_run: Callable[[], RunContext | None] = _RUN.get
"""The forward that is running in this thread or task."""
current_fast_attention: Callable[[], FastAttention | None] = _FAST.get
"""What the attentions of the current run share, ``None`` if all of them take the exact path."""
returned_inputs: Callable[[], ReturnedInputs | None] = _RETURNED.get
"""Residuals that hooks returned in the current run, ``None`` where nothing is collected."""
set_returned_inputs: Callable[[ReturnedInputs | None], object] = _RETURNED.set
"""Say where blocks note the residuals that hooks return in the run of this context."""

P = ParamSpec("P")
T = TypeVar("T")


def the_run() -> RunContext:
    """The forward that is running in this thread or task.

    Raises:
        InputError: there is none.
    """
    run = current_run()
    if run is None:
        raise InputError("hook.run is known only while a forward of a bridged model is running.")
    return run


def in_own_context(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``work`` in a copy of this context: variables that it sets are as before afterwards, whatever happens."""
    return copy_context().run(work, *args, **kwargs)


def acts(scope: Scope) -> bool:
    """Whether what belongs to ``scope`` acts in this thread or task now."""
    return not scope.closed and (scope.everywhere or scope in _SCOPES.get())


def enter_scope(scope: Scope) -> None:
    """Let the functions of ``scope`` act in this thread or task."""
    scopes = _SCOPES.get()
    scope.level, scope.inside = len(scopes) + 1, _INSIDE.get()
    _SCOPES.set((*scopes, scope))


def leave_scope(scope: Scope) -> None:
    """Let them act here no more; so for scopes that were closed elsewhere. Leaving twice is harmless."""
    _SCOPES.set(tuple(each for each in _SCOPES.get() if each is not scope and not each.closed))


def set_span(start: int | None, stop: int | None, residual: Tensor | None = None) -> None:
    """Say that the run of this context goes from block ``start``, which ``residual`` enters, up to block ``stop``."""
    _RUN.set(None)  # of its own, wherever it is called
    _SPAN.set(LayerSpan(start, stop, _SPAN.get().generation, residual))


def set_whole() -> None:
    """Say that the run of this context is one of its own, through all blocks."""
    _SPAN.set(WHOLE)
    _FAST.set(None)


def set_generation(run: GenerationRun) -> None:
    """Say that the forwards of this context are those of one ``generate``."""
    span = _SPAN.get()
    _RUN.set(None)
    _SPAN.set(LayerSpan(span.start, span.stop, run, span.residual))


def set_forward(forward: ModelForward) -> None:
    """Say which forward of a whole model this context is."""
    _FORWARD.set(forward)


def set_fast_attention(root: nn.Module | None) -> None:
    """Let the attentions of ``root`` take the fused kernel in this context; ``None``: all attentions take the exact path."""
    _FAST.set(None if root is None else FastAttention(root))


def set_run(run: RunContext | None) -> None:
    """Tell the hooks of this context which forward they are in."""
    _RUN.set(run)
    if run is not None:
        inside = _INSIDE.get()
        for scope in _SCOPES.get():
            if scope.run is None and scope.inside is inside:
                scope.run = run
        _INSIDE.set(run)


def keep_finished(run: RunContext) -> None:
    """Remember a forward of the blocks that ended: the unembedding, which comes after, is part of it."""
    forward = _FORWARD.get()
    if forward is not None:
        forward.keep(run)


def take_finished() -> RunContext | None:
    """The run that has just left the blocks, once, seen from the positions that are unembedded.

    Raises:
        InputError: they are chosen by a mask ``[batch, pos]``, for which Hugging Face joins batch and positions.
    """
    forward = _FORWARD.get()
    run = None if forward is None else forward.take()
    if forward is None or run is None:
        return None
    kept = forward.kept
    if isinstance(kept, Tensor) and kept.dim() == 2 and kept.dtype == torch.bool:
        raise InputError(
            "logits_to_keep is a mask of rows and positions: Hugging Face joins both axes, and hooks at hook_unembed see "
            "[batch, pos, d_vocab]. Give positions as integers, [pos] or [batch, pos], or hook ln_final.hook_out."
        )
    return run.at(kept)


def hooks_suppressed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``work``, in which modules of the model run without any hook firing."""
    return in_own_context(_call_quietly, work, *args, **kwargs)  # type: ignore[arg-type]


def _call_quietly(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    _QUIET.set(True)
    return work(*args, **kwargs)


def outside_run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a user's function: a model that it calls is in a run of its own, through all blocks; a block, in none."""
    if _SPAN.get() is WHOLE and _FAST.get() is None and _RETURNED.get() is None:
        return function(*args, **kwargs)
    return in_own_context(_call_outside, function, *args, **kwargs)  # type: ignore[arg-type]


def beside_run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a user's function before a forward that is to begin: a model that it calls is in a run of its own."""
    return in_own_context(_call_beside, function, *args, **kwargs)  # type: ignore[arg-type]


def _call_beside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    _INSIDE.set(function)  # in no forward that anything was opened in
    _FORWARD.set(None)
    return _call_outside(function, *args, **kwargs)


def _call_outside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    _SPAN.set(WHOLE)
    _FAST.set(None)
    _RETURNED.set(None)
    return function(*args, **kwargs)
