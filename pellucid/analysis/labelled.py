"""Saving of labelled results under its first address; it lives in :mod:`pellucid.experiments.labelled`."""

from pellucid.experiments.labelled import from_document, to_document

__all__ = ["from_document", "to_document"]
