"""What differs between two descriptions of a job, in words: each entry by its name, with both values."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pellucid.storage.json_text import Json

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
