"""Try README.md as a newcomer would: each command and each block of it, in a fresh copy and a fresh environment.

    python scripts/try_readme.py           # exit code 1 at the first that fails
    python scripts/try_readme.py --list    # what would be tried, and what is skipped and why

The copy holds the files that git knows or would add. Commands run in it, in the order of the page, in one shell; then the
Python blocks, in the environment that the commands made. There is no hub: where README names a hub model, the copy has a
folder of that name with the embedded model, and ``english.txt`` is there to stand for a text of the reader's own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.pages import as_printed, blocks_of, command_lines  # noqa: E402

SKIPPED = {
    "scripts/check": "this script is a stage of it",
    "python no-run": "needs the hub, an adapter and peft; tests/test_docs.py compiles it",
}
"""What is not tried, by the first word of a command or the kind of a block, and why."""

HUB_MODELS = ("bigscience/bloom-560m",)
"""Hub names that commands of README use."""


def steps() -> tuple[list[str], list[tuple[str, str | None]], list[str]]:
    """Commands; Python blocks, each with what it has to print; what is skipped."""
    commands: list[str] = []
    programs: list[tuple[str, str | None]] = []
    skipped = []
    for block in blocks_of((ROOT / "README.md").read_text("utf-8")):
        if block.info in SKIPPED:
            skipped.append(f"README.md:{block.line} ({block.info}): {SKIPPED[block.info]}")
        elif block.info == "bash":
            for line in command_lines(block.body):
                first = shlex.split(line, comments=True)[0]
                if first in SKIPPED:
                    skipped.append(f"{first}: {SKIPPED[first]}")
                else:
                    commands.append(line)
        elif block.info == "python":
            programs.append((block.body, None))
        elif block.info == "text" and programs:
            programs[-1] = (programs[-1][0], block.body)
    return commands, programs, skipped


def make_copy(folder: Path) -> None:
    """The files of the project, and what stands for the hub and for a text of the reader's."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file that was removed and not committed yet is listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in HUB_MODELS:
        shutil.copytree(ROOT / "pellucid" / "demo" / "model", folder / name)
    (folder / "english.txt").write_text("Everyone has the right to life, liberty and security of person.\n" * 100)


def main() -> int:
    """Try everything; the exit code."""
    commands, programs, skipped = steps()
    for line in skipped:
        print(f"skipped  {line}")
    if "--list" in sys.argv:
        print("\n".join(commands + [program for program, _ in programs]))
        return 0
    unset = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    with tempfile.TemporaryDirectory(prefix="pellucid-readme-") as made:
        folder = Path(made) / "clone"
        folder.mkdir()
        make_copy(folder)
        environment["PIP_COMPILE"] = "0"  # of what is installed, most is never imported; Python compiles what is
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{made}/hub", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        lines = ["set -euo pipefail"]
        for command in commands:
            lines += [f"printf '== %s\\n' {shlex.quote(command)} >&2", command]
        for number, (program, _) in enumerate(programs):
            (folder / f"block{number}.py").write_text(program, "utf-8")
            lines += [f"echo '== Python block {number}' >&2", f"python block{number}.py > block{number}.out"]
        started = time.monotonic()
        script = "\n".join(lines)
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            print(f"README.md: the last command above ended with exit code {done.returncode}.", file=sys.stderr)
            return 1
        for number, (_, expected) in enumerate(programs):
            printed = (folder / f"block{number}.out").read_text("utf-8")
            if expected is not None and not as_printed(expected).fullmatch(printed.rstrip()):
                print(f"README.md says\n{expected}\nbut Python block {number} prints\n{printed}", file=sys.stderr)
                return 1
    n_tried = len(commands) + len(programs)
    print(f"README.md: {n_tried} commands and blocks tried in a fresh environment, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
