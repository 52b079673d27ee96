"""Python processes that begin with torch, transformers and Pellucid imported: a tenth of a second instead of six.

Many tests want a process of its own for what happens after the imports: a terminal, a signal, an exit code, an example. Such
a process is forked from a server (``multiprocessing``'s) that has done the imports and nothing else; it has its own standard
streams, environment, folder and signals, and ends as an interpreter ends (exit functions, threads, streams). Where start-up
itself is tested (what is imported, the locale, switches that a library reads when it is imported), a test starts an
interpreter as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def start(
    words: Sequence[str],
    streams: tuple[int, int, int],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    before: str = "",
) -> BaseProcess:
    """Start what ``python words`` starts: ``-m module``, ``-c code`` or a file, each with its arguments.

    Args:
        words: After ``python``.
        streams: File descriptors of standard input, output and error; they stay open here.
        cwd: The folder it runs in.
        env: All of its environment; by default this process' own.
        before: Python code that it runs first.
    """
    given = list(map(str, words)), [DupFd(stream) for stream in streams], str(cwd), dict(env or os.environ), before
    process = _server().Process(target=_become, args=given)
    process.start()
    return process


def run(
    words: Sequence[str],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    before: str = "",
    timeout: int = 300,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; what it wrote, as UTF-8."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, open(os.devnull) as nothing:
        streams = nothing.fileno(), out.fileno(), errors.fileno()
        process = start(words, streams, cwd=cwd, env=env, before=before)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(words), timeout)
        wrote = []
        for file in (out, errors):
            file.seek(0)
            wrote.append(file.read().decode())
        return subprocess.CompletedProcess(list(words), process.exitcode, *wrote)


def _server() -> ForkServerContext:
    """The server's context. It starts with the first process, in the project's folder: what it imports is found there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked_imports"])
    from multiprocessing import forkserver

    with _in_folder(ROOT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _become(words: list[str], streams: list[Any], cwd: str, env: dict[str, str], before: str) -> None:
    """In the new process: run ``python words``, and end as an interpreter does."""
    for number, stream in enumerate(streams):
        given = stream.detach()
        os.dup2(given, number)
        os.close(given)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        text = io.TextIOWrapper(buffer, "utf-8", errors, line_buffering=number == 2 or os.isatty(number))
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    code: Any = 0
    try:
        exec(before, {})
        _run(words)
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _end(int(code or 0))


def _end(code: int) -> None:
    """End as an interpreter does, but for taking down modules one by one, which would copy all that the server shares."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code)


def _run(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
