"""Path patching under its first address; it lives in :mod:`pellucid.experiments.path_patching`."""

from pellucid.experiments.path_patching import by_head, path_patching

__all__ = ["by_head", "path_patching"]
