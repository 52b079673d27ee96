"""Saving of labelled results: arrays (:mod:`pellucid.experiments.labelled`), and data sets of several arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from pellucid.arguments import check_kind, check_mapping
from pellucid.errors import InputError
from pellucid.experiments.labelled import from_document, to_document

__all__ = ["data_set_from_document", "data_set_to_document", "from_document", "to_document"]


def data_set_to_document(result: xr.Dataset) -> dict[str, Any]:
    """A data set as JSON has it: ``attrs``, and of each variable what :func:`to_document` gives.

    :func:`data_set_from_document` is its inverse.
    """
    check_kind("result", result, xr.Dataset, "a data set, as a lens' read gives it")
    return {
        "attrs": {str(key): list(value) if isinstance(value, tuple) else value for key, value in result.attrs.items()},
        "variables": {str(name): to_document(result[name]) for name in result.data_vars},
    }


def data_set_from_document(document: Mapping[str, Any]) -> xr.Dataset:
    """What :func:`data_set_to_document` was given.

    Raises:
        InputError: it lacks something.
    """
    check_mapping("document", document, "names to what data_set_to_document gave")
    missing = [key for key in ("attrs", "variables") if key not in document]
    if missing:
        raise InputError(
            f"document is no saved data set: it has no {missing[0]!r}. data_set_to_document(result) makes one."
        )
    variables = {name: from_document(each) for name, each in document["variables"].items()}
    return xr.Dataset(variables, attrs=dict(document["attrs"]))
