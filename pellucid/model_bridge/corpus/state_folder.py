"""A folder with the state of an unfinished pass: written between batches, gone on with by the same call, equal bits.

Ctrl-C is put off until the state is written: the first one ends the batch, the second one raises at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pellucid.errors import OtherJobError
from pellucid.model_bridge.corpus.collected import Collected, read_collected, write_collected
from pellucid.model_bridge.corpus.job_identity import Watched, hooks_on
from pellucid.model_bridge.running import RunnableModel
from pellucid.storage.json_text import differences
from pellucid.storage.whole_files import remove_abandoned_parts

STATE_FILE = "collected.safetensors"


class StateFolder:
    """The state of one job in its folder.

    Hooks are part of the job as they are when a state is written, not as they were when it was begun: one that counts its
    calls goes on with equal bits only from the count at which it stood then.

    Args:
        model: the bridge.
        folder: made if it is not there.
        job: what the bits depend on (JSON).
        every: seconds between states.
        empty: the state of a job that begins here.

    Attributes:
        state: what was seen so far: of the folder, or ``empty``.

    Raises:
        OtherJobError: the folder holds another job's state.
        InputError: a damaged state.
    """

    def __init__(self, model: RunnableModel, folder: Path, job: dict[str, Any], every: float, empty: Collected) -> None:
        self.path = folder / STATE_FILE
        self._model, self._job, self._every = model, job, every
        self._watched = Watched(model, "the collection")
        self._interrupted = False
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned_parts(folder)
        self.state = self._held() if self.path.exists() else empty
        self._written = time.monotonic()

    def _held(self) -> Collected:
        held, extra = read_collected(self.path)
        found = extra.get("job")
        if not isinstance(found, dict):
            raise OtherJobError(f"{self.path} was saved by hand, not by an unfinished collect: give another folder.")
        different = differences(found, self._job)
        if different:
            raise OtherJobError(
                f"{self.path.parent} holds the state of another job. It has:\n"
                + "\n".join(f"  {each}" for each in different)
                + "\nGive the settings it was begun with, or another folder."
            )
        return held

    def after_batch(self) -> None:
        """Write the state if it is time to, or if Ctrl-C was pressed, which then interrupts.

        Raises:
            KeyboardInterrupt: the state is written.
        """
        if self._interrupted or time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write the state in place of the last one.

        Raises:
            InputError: the model is no longer the one that the pass began with; the last state stays.
            StorageFullError: no space is left; the last state stays.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; the state is written.
        """
        self._watched.refuse_change()
        self._job["hooks"] = hooks_on(self._model)
        write_collected(self.path, self.state, {"job": self._job})
        self._written = time.monotonic()
        if self._interrupted:
            raise KeyboardInterrupt(f"the state is in {self.path}; the same call goes on from there")

    @contextmanager
    def interrupt_put_off(self) -> Iterator[None]:
        """Note the first Ctrl-C instead of raising, so that a batch is counted whole; the second one raises at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
