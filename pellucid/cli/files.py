"""Paths of a command line: what is read has to be there, and what is made goes over nothing unasked.

Knows no torch, so that a wrong path is refused at once: a command asks here before it imports what does the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pellucid.cli.options import ModelChoice
from pellucid.errors import InputError

DEMO_FILES = ("demo.json", "demo.safetensors", "induction.svg")
"""What ``pellucid demo`` writes."""

PATCH_FILES = ("patch.json", "patch.csv")
"""What ``pellucid patch`` writes."""

ATTRIBUTE_FILES = ("attribution.json", "attribution.csv")
"""What ``pellucid attribute`` writes."""

ATTRIBUTION_PATCHING_FILES = ("attribution_patching.json", "attribution_patching.csv")
"""What ``pellucid attribute --method`` writes for another method than ``direct``."""

CIRCUIT_FILES = ("circuit.json", "circuit.safetensors", "circuit.graphml", "circuit.csv")
"""What ``pellucid circuit`` writes."""

STUDY_PICTURES = ("layers.html", "overlap.html", "change.html", "examples.html", "criteria.html")
STUDY_FILES = (
    "neurons.json",
    "neurons.csv",
    "counts.safetensors",
    "change.csv",
    "overlap.csv",
    "layers.csv",
    "examples.csv",
    "experts.csv",
    "continuations.csv",
    "relevance.csv",
    "criteria.csv",
    *STUDY_PICTURES,
)
"""What ``pellucid neurons`` writes, the last only where Plotly is installed."""


def refuse_model(choice: ModelChoice) -> None:
    """See that MODEL, where it has to be a folder, is one.

    Raises:
        InputError: no such folder, or one without a model.
    """
    if not choice.is_demo:
        model_folder(choice.name)


def model_folder(name: str) -> str | None:
    """The folder that a MODEL other than demo names, ``None`` for a hub name.

    Raises:
        InputError: no such folder, or one without a model.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if not any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json")):
            raise InputError(
                f"The folder {path} holds no config.json and no adapter_config.json: it is not a Hugging Face model."
            )
        return path
    if path.startswith((os.sep, ".")) or path != name or path.count("/") > 1 or os.path.exists(path):
        raise InputError(
            f"There is no folder {path}. MODEL is a folder, a hub name such as openai-community/gpt2, or demo."
        )
    return None


def refuse_activations(out: Path, hooks: Sequence[str] | None, force: bool) -> None:
    """See that what ``pellucid run`` keeps can be written to ``out``.

    Raises:
        InputError: nothing to keep, another ending, a file in the way.
    """
    if not hooks:
        raise InputError("--out needs --hooks: say what to keep, such as --hooks 'blocks.*.attn.hook_pattern'.")
    if out.suffix != ".safetensors":
        raise InputError(f"--out is a safetensors file: give it that ending, {out.with_suffix('.safetensors')}.")
    refuse_out(out, force)


def refuse_direction(out: Path, force: bool) -> None:
    """See that ``pellucid steer`` can write its direction to ``out``.

    Raises:
        InputError: another ending, a file in the way.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out is a safetensors file: give it that ending, {out.with_suffix('.safetensors')}.")
    refuse_out(out, force)


def refuse_folder(folder: Path, names: Iterable[str] = (), force: bool = False) -> None:
    """See that results can be written to a folder, which is made with the first of them.

    Raises:
        InputError: it is a file or cannot be written, or a result is there and ``force`` is off.
    """
    refuse_file(folder)
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    refuse_file(there)
    if not os.access(there, os.W_OK):
        raise InputError(f"--out: the folder {there} cannot be written: give another one.")
    for name in names if folder.exists() else ():
        refuse_out(folder / name, force)


def refuse_file(folder: Path) -> None:
    """See that what is given as a folder is no file.

    Raises:
        InputError: it is one.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder.")


def refuse_used_folder(folder: Path) -> None:
    """See that a folder to be made is not there, or empty.

    Raises:
        InputError: it is a file, or holds something.
    """
    refuse_file(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is not an empty folder: give another one.")


# -- what an interrupt leaves ------------------------------------------------------------------------------------------

COUNTING_FOLDER = "counting"
"""In the folder of ``pellucid neurons``: what was counted so far."""


def kept_of_nothing() -> str:
    """Of a command that writes its files at its end."""
    return "Nothing was written. Give the same command again."


def kept_of_study(out: Path | None) -> str:
    """Of ``pellucid neurons``."""
    if out is None:
        return "Nothing was kept: with --out FOLDER the counting is, and the same command goes on from there."
    counted = out / COUNTING_FOLDER
    if not any(counted.glob("**/*.safetensors")):
        return f"Nothing was counted yet; {out} has no result. Give the same command again."
    return f"What was counted is in {counted}: the same command goes on from there. No result was written."


UNFINISHED_FOLDER = "unfinished"
"""In the folder of ``pellucid circuit`` or ``attribute --method``: what was computed so far, until there is a result."""


def kept_of_pairs(out: Path | None) -> str:
    """Of ``pellucid circuit`` and ``attribute --method``, which go through pairs of prompts."""
    if out is None:
        return "Nothing was kept: with --out FOLDER what was computed is, and the same command goes on from there."
    unfinished = out / UNFINISHED_FOLDER
    if not any(unfinished.glob("*.safetensors")):
        return kept_of_nothing()
    return f"What was computed is in {unfinished}: the same command goes on from there. No result was written."


def kept_of_store(out: Path) -> str:
    """Of ``pellucid harvest``."""
    done = sum(1 for record in out.glob("*.json") if record.stem.isdecimal())
    if not done:
        return f"No shard was finished; {out} has the job. Give the same command again."
    return f"{done} finished shards are kept in {out}: the same command goes on from there."


def refuse_picture(path: Path, force: bool) -> None:
    """See that a picture can be drawn and written to ``path``.

    Raises:
        InputError: another ending, a file in the way, no such folder.
        MissingExtraError: the extra ``plots`` is not installed.
    """
    from pellucid.plots import check_picture_path

    try:
        check_picture_path(path, overwrite=force)
    except InputError as error:  # the same advice in the words of the command line
        said = str(error).replace("overwrite=True", "--force")
        raise InputError(f"--picture{said.removeprefix('path')}" if said.startswith("path:") else said) from error


def labelled_files(pairs: Sequence[str]) -> dict[str, list[Path]]:
    """``LABEL=FILE`` entries of ``--corpus`` by label; without a label it is the file's name.

    Raises:
        InputError: none, or a file that does not exist.
    """
    if not pairs:
        raise InputError("Say what to run: --corpus LABEL=FILE, such as --corpus en=english.txt; it may be repeated.")
    files: dict[str, list[Path]] = {}
    for entry in pairs:
        label, found, path = entry.partition("=")
        if not found or os.sep in label or not label:
            label, path = Path(entry).stem, entry
        file = Path(path).expanduser()
        if not file.is_file():
            what = "is a folder: give a file in it" if file.is_dir() else "does not exist"
            raise InputError(f"--corpus {entry}: {file} {what}.")
        files.setdefault(label, []).append(file)
    return files


def language_files(pairs: Sequence[str], option: str) -> dict[str, list[Path]]:
    """``LANGUAGE=FILE`` options as files by language; a language given several times has several files.

    Raises:
        InputError: another form, a file that does not exist, or a single language.
    """
    found: dict[str, list[Path]] = {}
    for pair in pairs:
        language, equals, path = pair.partition("=")
        if not (equals and language and path):
            raise InputError(f"{option} takes LANGUAGE=FILE, such as en=english.txt; found {pair!r}.")
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"{option} {pair}: there is no file {file}.")
        found.setdefault(language, []).append(file)
    if len(found) == 1:
        raise InputError(
            f"{option} has one language, {next(iter(found))}: neurons of a language are told from others'."
        )
    return found


def refuse_out(path: Path, force: bool) -> None:
    """See, before anything is computed, that ``path`` can be written.

    Raises:
        InputError: it exists and ``force`` is off, or there is no such folder.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file in it.")
    if path.exists() and not force:
        raise InputError(f"{path} exists: give another --out, or --force to overwrite it.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent}: make it first, or give another --out.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"The folder {path.parent} cannot be written: give another --out.")
