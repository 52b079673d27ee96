"""Hugging Face's names of the arguments that Pellucid gives to its forwards or reads there.

They are read from the signatures of the installed release, through decorators (``inspect.signature`` follows
``__wrapped__``), because releases rename them: transformers 5.24 calls the key/value cache of BLOOM ``cache``, which was
``past_key_values`` before. BLOOM's forwards also take ``**kwargs``, so a name that is no longer known would be swallowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from pellucid.errors import UnsupportedModelError

CACHE_NAMES: tuple[str, ...] = ("cache", "past_key_values", "layer_past")
"""What Hugging Face's releases and modules call the key/value cache, the newest name first."""


_FOUND: WeakKeyDictionary[type[nn.Module], tuple[str, ...]] = WeakKeyDictionary()


def forward_parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of Hugging Face's forward of a class, ``self``, ``*args`` and ``**kwargs`` left out.

    A subclass may pass everything on as ``*args, **kwargs``: the forward that names its arguments is asked.
    """
    names = _FOUND.get(kind)
    if names is None:
        names = _FOUND[kind] = next((found for owner in kind.__mro__ if (found := _named(owner))), ())
    return names


def _named(owner: type) -> tuple[str, ...]:
    """Arguments that the forward which a class defines itself takes by name."""
    if "forward" not in vars(owner):
        return ()
    parameters = list(inspect.signature(vars(owner)["forward"]).parameters.values())[1:]
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    )


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of one call of ``module``, positional ones under their names."""
    if not args:
        return kwargs
    return {**dict(zip(forward_parameters(type(module)), args, strict=False)), **kwargs}


def given_cache(arguments: Mapping[str, Any]) -> Any | None:
    """The key/value cache among named arguments, whichever name the caller used."""
    for name in CACHE_NAMES:
        if name in arguments:
            return arguments[name]
    return None


def cache_name(kind: type[nn.Module]) -> str:
    """What the installed release calls the key/value cache in the forward of a class.

    Raises:
        UnsupportedModelError: it has none of the names that Pellucid knows.
    """
    parameters = forward_parameters(kind)
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedModelError(
        f"{kind.__name__}.forward takes no key/value cache under a name that Pellucid knows ({', '.join(CACHE_NAMES)}); "
        f"it takes: {', '.join(parameters)}. Install a transformers release of docs/compatibility.md."
    )


def check_parameters(kind: type[nn.Module], needed: tuple[str, ...], only: bool = False) -> None:
    """See that the forward of a class takes the arguments that Pellucid names.

    Args:
        kind: the class; one whose forward names no argument cannot be read and is left alone.
        needed: names that it has to take.
        only: Pellucid computes in its place, so that it may take no others.

    Raises:
        UnsupportedModelError: an argument is missing, or with ``only`` there is one more.
    """
    parameters = forward_parameters(kind)
    if not parameters:
        return
    missing = [name for name in needed if name not in parameters]
    unknown = [name for name in parameters if name not in needed] if only else []
    if missing or unknown:
        what = [f"takes no argument {', '.join(missing)}"] if missing else []
        what += [f"takes {', '.join(unknown)}, which Pellucid does not know"] if unknown else []
        raise UnsupportedModelError(
            f"{kind.__name__}.forward of the installed transformers {' and '.join(what)}: its numbers could not be "
            "vouched for. Install a release of docs/compatibility.md."
        )
