"""Without the packages of the extra ``plots``, the functions that need them say how to get them."""

from __future__ import annotations

from importlib.util import find_spec

from pellucid.errors import MissingExtraError


def need(*packages: str) -> None:
    """See that packages of the extra ``plots`` are installed.

    Raises:
        MissingExtraError: one is not.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"Pictures need {' and '.join(missing)}, which is not installed: pip install 'pellucid[plots]'"
        )
