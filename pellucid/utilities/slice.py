"""``Slice``: which entries of an axis are meant. The rule is :mod:`pellucid.slices`'."""

from __future__ import annotations

from pellucid.slices import Slice as Slice
from pellucid.slices import SliceInput as SliceInput
from pellucid.slices import _one as to_python_int  # noqa: F401 (TransformerLens' name of it)
