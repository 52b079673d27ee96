"""A generation that is given token by token: Hugging Face's ``generate`` in a thread that runs only while it is waited for.

``generate`` calls a streamer at each step and returns at the end. Here the streamer hands the step over and stops until the
next one is asked for, so that two threads never run at once: random numbers are drawn in the order of one call, and whatever
the user does between two items happens between two steps. The thread is in a copy of the context in which the stream was
begun (open blocks of hooks act), and under the caller's autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import replace
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor

from pellucid.model_bridge.running.generation import GenerationSettings, end_tokens, generate, texts_of
from pellucid.model_bridge.running.runner import Prepared, Runner

PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class _Abandoned(Exception):  # noqa: N818 (a signal, never seen by a user)
    """Ends a generation whose stream is not asked for more."""


class _Steps:
    """A streamer of Hugging Face's: hands each step's ids over, and waits until the next one is asked for."""

    def __init__(self) -> None:
        self._wanted, self._there = Semaphore(0), Semaphore(0)
        self._found: Tensor | None = None
        self._closed = False
        self._saw_prompt = False
        self.error: BaseException | None = None

    def put(self, value: Tensor) -> None:
        """The prompt ``[batch, pos]``, then each step's ids ``[batch]``; called by ``generate``, in its thread."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self._found = value.clone()
        self._there.release()
        self.wait()

    def end(self) -> None:
        """Called by ``generate`` after the last step."""

    def wait(self) -> None:
        """In the thread of ``generate``: run no further until the next step is asked for."""
        self._wanted.acquire()
        if self._closed:
            raise _Abandoned

    def next(self) -> Tensor | None:
        """In the user's thread: the next step's ids ``[batch]``, ``None`` after the last."""
        self._found = None
        self._wanted.release()
        self._there.acquire()
        if self.error is not None:
            raise self.error
        return self._found

    def finish(self, error: BaseException | None = None) -> None:
        """In the thread of ``generate``: there is no further step."""
        self._found, self.error = None, error
        self._there.release()

    def close(self) -> None:
        """In the user's thread: no more will be asked for."""
        self._closed = True
        self._wanted.release()


def in_steps(
    runner: Runner, prepared: Prepared, settings: GenerationSettings, at_once: int, text: StreamedText | None
) -> Iterator[Any]:
    """Run ``generate``, and give what it makes as it comes.

    Args:
        runner: what runs the model.
        prepared: the checked input.
        settings: checked.
        at_once: give what has come when it is so many tokens, the prompt's among them.
        text: how ids become text; ``None`` gives ids ``[batch, n]``.
    """
    steps = _Steps()
    streamed = replace(settings, hf_kwargs={**settings.hf_kwargs, "streamer": steps})
    kind = prepared.given.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def work() -> None:
        try:
            steps.wait()
            with torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]):
                generate(runner, prepared, streamed)
        except _Abandoned:
            pass
        except BaseException as error:
            steps.finish(error)
        else:
            steps.finish()

    thread = Thread(target=copy_context().run, args=(work,), name="pellucid-generate", daemon=True)
    thread.start()
    try:
        waiting = prepared.given
        while (found := steps.next()) is not None:
            waiting = torch.cat([waiting, found.to(waiting.device)[:, None]], dim=1)
            if waiting.shape[1] >= at_once:
                yield waiting if text is None else text.piece(waiting)
                waiting = waiting[:, :0]
        if waiting.shape[1]:
            yield waiting if text is None else text.piece(waiting)
        rest = None if text is None else text.rest()
        if rest is not None:
            yield rest
    finally:
        steps.close()
        thread.join()


class StreamedText:
    """The text of a stream, piece by piece, one row or several; part of a character waits for its other bytes.

    Args:
        runner: whose tokenizer decodes.
        prepared: the prompt.
        settings: how rows end.
    """

    def __init__(self, runner: Runner, prepared: Prepared, settings: GenerationSettings) -> None:
        self._rules, self._prepared, self._settings = runner.rules, prepared, settings
        self._ends = end_tokens(runner.model, runner.rules, settings)
        self._ids: Tensor | None = None
        self._given = [0] * prepared.given.shape[0]

    def __repr__(self) -> str:
        return f"StreamedText({len(self._given)} rows, {sum(self._given)} characters given)"

    def piece(self, ids: Tensor) -> str | list[str]:
        """What ``[batch, n]`` further ids add to the text."""
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        return self._added(hold=True)

    def rest(self) -> str | list[str] | None:
        """What was held back, after the last ids; ``None`` if that is nothing."""
        if self._ids is None:
            return None
        added = self._added(hold=False)
        return added if any(added) else None

    def _added(self, hold: bool) -> str | list[str]:
        assert self._ids is not None
        length, mask = self._prepared.given.shape[1], self._prepared.attention_mask
        texts = texts_of(self._rules, self._ids, length, mask, self._ends, self._settings.skip_special_tokens)
        added = []
        for row, whole in enumerate(texts):
            text = whole.rstrip(PARTIAL) if hold else whole
            added.append(text[self._given[row] :])
            self._given[row] = max(self._given[row], len(text))
        return added if len(added) > 1 else added[0]
