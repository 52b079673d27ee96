"""JSON, as every file of Pellucid spells it, and back.

Two spellings: :func:`to_json` for files and for people, a value a line; :func:`to_line` for what stands in another file (the
metadata of safetensors) or is hashed. JSON has no NaN and no infinity: :func:`finite` makes them ``null``. What differs
between two descriptions of a job is said by :func:`differences`, each entry by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pellucid.errors import StoreError
from pellucid.storage.whole_files import whole_file

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


def to_json(value: Json, *, sort_keys: bool = False, ascii_only: bool = False) -> str:
    """The text of a JSON file, its last line ended.

    Args:
        value: what to say.
        sort_keys: equal values have equal bytes, in whichever order their keys were put in.
        ascii_only: escape other characters, for a stream that cannot take them.

    Raises:
        ValueError: a number that is not finite; see :func:`finite`.
    """
    return json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def to_line(value: Json, *, sort_keys: bool = True, compact: bool = False, ascii_only: bool = False) -> str:
    """JSON in one line: with sorted keys, equal values have equal bytes.

    Args:
        value: what to say.
        sort_keys: ``False`` where the order of keys says something, such as that of firing.
        compact: without spaces, as shards have it.
        ascii_only: other characters escaped, as saved statistics have it.
    """
    separators = (",", ":") if compact else (", ", ": ")
    return json.dumps(value, sort_keys=sort_keys, separators=separators, ensure_ascii=ascii_only)


def sha256_of_json(value: Json) -> str:
    """The SHA-256 of :func:`to_json` with sorted keys, in hexadecimal."""
    return hashlib.sha256(to_json(value, sort_keys=True).encode()).hexdigest()


def finite(value: Any) -> Any:
    """The same with ``None`` for each float that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [finite(entry) for entry in value]
    return value


def with_nan(value: Any) -> Any:
    """A nested list of numbers with NaN for each ``None``: the inverse of :func:`finite` where nothing was infinite."""
    if isinstance(value, list):
        return [with_nan(entry) for entry in value]
    return math.nan if value is None else value


def write_json_file(path: Path, value: Json) -> None:
    """Write a JSON file, whole or not at all; numbers that are not finite become ``null``.

    Raises:
        StorageFullError: no space is left.
    """
    with whole_file(path) as draft:
        draft.write_text(to_json(finite(value)), "utf-8")


def read_exact_json(path: Path) -> Any:
    """What a file says that :func:`to_json` wrote with sorted keys; call it within :func:`json_errors`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not as it was written.
    """
    text = path.read_text("utf-8")
    value = json.loads(text)
    if to_json(value, sort_keys=True) != text:
        raise ValueError("not as it was written")
    return value


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Say which JSON file cannot be read.

    Raises:
        StoreError: it is missing, or what it says makes no sense.
    """
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged, or none of ours ({type(error).__name__}: {error}).") from error


# -- two descriptions ------------------------------------------------------------------------------------------------

UNKNOWN = "unknown"
"""What a description says of what its version did not know."""


def differences(found: Json, asked: Json) -> list[str]:
    """What differs between two descriptions, each thing with both values: ``run.threads 1 (asked for: 2)``.

    What only one of them has is ``unknown`` in the other.
    """
    before, after = _flat("", found), _flat("", asked)
    return [
        f"{key.removeprefix('settings.')} {_short(before, key)} (asked for: {_short(after, key)})"
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or before[key] != after[key]
    ]


def _flat(prefix: str, value: Json) -> dict[str, Json]:
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    return {
        inner: leaf
        for key, entry in value.items()
        for inner, leaf in _flat(f"{prefix}.{key}" if prefix else str(key), entry).items()
    }


def _short(described: Mapping[str, Json], key: str) -> str:
    if key not in described:
        return UNKNOWN
    value = described[key]
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        value = [f"{entry['name']} ({entry.get('dtype') or str(entry.get('sha256'))[:12]})" for entry in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
