"""Run parity, hook table, generation, run context and families against several transformers releases: scripts/check matrix

Each release has an environment of its own under .venv-matrix/RELEASE, made with the interpreter that runs this script:
the lowest release that pyproject.toml allows, the one of constraints.txt and the newest that the registry has. The table
goes to docs/compatibility.md, which is written when all of them have passed. Releases may be named, and run one at a time:
python scripts/matrix.py 5.4.0. What passed is kept beside the environment until a file of the package or of the tests
changes, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = {
    "parity": ["tests/oracles/test_parity.py"],
    "hook table": ["tests/oracles/test_hook_table.py"],
    "generation": ["tests/model_bridge/test_generation.py"],
    "run context": ["tests/model_bridge/test_run_context.py"],
    "names of arguments": ["tests/model_bridge/test_releases.py"],
    "families: parity": ["tests/oracles/test_family_parity.py"],
    "families: edits": ["tests/oracles/test_family_edits.py"],
    "families: generation": ["tests/oracles/test_family_generate.py"],
    "families: sweeps": ["tests/sweep/test_families.py"],
}
PACKAGES = (
    "accelerate einops huggingface_hub hypothesis jaxtyping numpy pandas peft psutil pytest rich safetensors tqdm typer "
    "xarray"
)
FOLLOWS_TRANSFORMERS = ("transformers", "tokenizers", "huggingface_hub")
"""Packages whose version a transformers release chooses."""


def lowest() -> str:
    """The lower bound in pyproject.toml."""
    found = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1] + ".0" * (2 - found[1].count("."))


def pinned() -> str:
    """The release in constraints.txt."""
    found = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def newest() -> str:
    """What pip would install today."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"transformers \(([\d.]+)\)", listed)
    assert found is not None, listed
    return found[1]


def environment(release: str) -> Path:
    """The interpreter of a release's environment, made when it is not there, was not finished or lacks a package."""
    folder = ROOT / ".venv-matrix" / release
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text() != PACKAGES:
        venv.create(folder, with_pip=True, clear=True)
        constraints = folder / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        constraints.write_text(
            "\n".join(line for line in lines if not line.startswith(tuple(f"{p}==" for p in FOLLOWS_TRANSFORMERS)))
        )
        torch = next(line for line in lines if line.startswith("torch=="))
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, f"transformers=={release}", *PACKAGES.split()], check=True)
        done.write_text(PACKAGES)
    return python


def run(python: Path, paths: list[str]) -> str:
    """What pytest counts: ``82 passed``."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-rN",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--strict-markers",
        *paths,
    ]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1] if done.stdout else "")
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    return ", ".join(counts) or f"no test ran (exit code {done.returncode})"


def source_hash() -> str:
    """Of every file that decides what a check finds."""
    found = hashlib.sha256()
    for path in sorted([*ROOT.glob("pellucid/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def passed(release: str, source: str) -> dict[str, str]:
    """What of this source has passed with a release before, by check."""
    path = ROOT / ".venv-matrix" / release / "passed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["checks"] if known.get("source") == source else {}


def keep_passed(release: str, source: str, checks: dict[str, str]) -> None:
    """Remember what has passed."""
    path = ROOT / ".venv-matrix" / release / "passed.json"
    path.write_text(json.dumps({"source": source, "checks": checks}, indent=1))


def version_in(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    command = [str(python), "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def page(results: dict[str, dict[str, str]], torch: str) -> str:
    """The page of the documentation."""
    lines = [
        "# Compatibility",
        "",
        "`scripts/check matrix` runs these checks against the lowest transformers release that `pyproject.toml` allows,",
        "the one that `constraints.txt` pins and the newest of the registry, and writes this page: what passed.",
        "",
        f"| transformers | {' | '.join(CHECKS)} |",
        f"| --- |{' --- |' * len(CHECKS)}",
        *(f"| {release} | {' | '.join(counts.values())} |" for release, counts in results.items()),
        "",
        f"Run on {datetime.date.today().isoformat()} with Python {platform.python_version()} and torch {torch}.",
        "",
        "A release whose forwards take other arguments than Pellucid knows is refused when a model is opened. transformers",
        "5.0 to 5.3 are such: their attention takes `cache_position`, and with a static cache Pellucid's would give other",
        "numbers (with 5.0.0, 24 tests of parity and one of generation fail). From 5.4 to 5.20 Hugging Face's own BLOOM",
        "raises an error with a static cache (the bias is as long as the text, the keys as the cache); with 5.4.0 those 25",
        "tests fail, and one that pins names of arguments, while the other 734 pass. Pellucid asks for the first release",
        "that passes all.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the matrix."""
    supported = list(dict.fromkeys([lowest(), pinned(), newest()]))
    source, failed = source_hash(), False
    for release in sys.argv[1:] or supported:
        python, checks = environment(release), passed(release, source)
        for name, paths in CHECKS.items():
            if name in checks:
                continue
            counts = run(python, paths)
            print(f"transformers {release}: {name}: {counts}", flush=True)
            if re.fullmatch(r"\d+ passed(, \d+ skipped)?", counts):
                checks[name] = counts
                keep_passed(release, source, checks)
            else:
                failed = True
    results = {release: passed(release, source) for release in supported}
    missing = [f"{release} {name}" for release in supported for name in CHECKS if name not in results[release]]
    if missing:
        print(f"docs/compatibility.md stays as it is; not passed yet: {', '.join(missing)}")
    else:
        ordered = {release: {name: results[release][name] for name in CHECKS} for release in supported}
        (ROOT / "docs" / "compatibility.md").write_text(page(ordered, version_in(environment(pinned()), "torch")))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
