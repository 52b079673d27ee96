"""Every error Pellucid raises, in one place, so that a caller can catch a kind and a reader can see them all.

An error says what was asked, what was found and what to do; where a name was wrong it lists the nearest valid ones.
Each class also derives from the built-in exceptions that TransformerLens (or plain Python) raises in that situation, so
that code which catches ``KeyError`` or ``ValueError`` goes on working. ``docs/errors.md`` has each, with an
example.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings


class PellucidError(Exception):
    """Base of every error raised on purpose by Pellucid."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would escape line breaks and quotes of our messages.
        return "\n".join(str(argument) for argument in self.args)


class HookNameError(PellucidError, KeyError):
    """A hook name, glob, filter or list entry that matches no hook point."""


class HookDisabledError(PellucidError, ValueError):
    """An opt-in hook point was named while it is switched off."""


class HookUnreachableError(PellucidError, ValueError):
    """A hook was put on a point that this run does not pass (``start_at_layer``, ``stop_at_layer``, ``inputs_embeds``)."""


class HookNotFiredError(PellucidError, RuntimeError):
    """A forward passed the place of a hooked point and the point did not fire: its functions were not called."""


class HookValueError(PellucidError, ValueError):
    """A hook function returned something that cannot stand in for the tensor it was given."""


class NoEffectError(PellucidError, RuntimeError):
    """``assert_effect=True`` was asked for and a hook left its tensor unchanged to the bit, or never ran."""


class NoReferenceError(PellucidError, NotImplementedError):
    """A hook point of a family's table for which ``reference_edits`` does not say what an edit there means."""


class GradientError(PellucidError, RuntimeError, ValueError):
    """A backward hook, or a backward pass, that cannot be honoured: what autograd would raise, said beforehand."""


class InputError(PellucidError, ValueError):
    """Tokens, masks, keywords or sizes that cannot be run."""


class CombinationError(InputError, NotImplementedError):
    """Arguments that mean something each, and nothing that is made together."""


class IndexingError(InputError, IndexError):
    """An index that a factored matrix cannot take: too long, two ellipses, a mask across its axes."""


class AttributePathError(InputError, AttributeError):
    """A dotted name of an attribute that an object has not, or that cannot be set."""


class DetectionError(InputError, AssertionError):
    """What the head detector cannot compare: a pattern, text or measure that it does not know or that does not fit."""


class KindError(InputError, TypeError):
    """A value of another kind than a parameter or attribute takes."""


class TokenNotFoundError(InputError, AssertionError):
    """A token whose place in a prompt was asked for, and that is not in it."""


class ShapeError(InputError, AssertionError, RuntimeError):
    """Factors of a matrix, or a tensor beside them, whose shapes do not fit."""


class UnsupportedModelError(PellucidError, ValueError):
    """The model is of no family that Pellucid opens, or its configuration sets something we do not handle."""


class WeightError(PellucidError, ValueError):
    """Weights with a wrong name, shape or dtype, not finite, or not readable where they are."""


class StateDictError(WeightError, RuntimeError):
    """A state dict that is not one of the model: names that it lacks or has too many, other sizes. Nothing was loaded."""


class CacheKeyError(PellucidError, KeyError):
    """A key that an :class:`~pellucid.ActivationCache` does not hold."""


class ResultKeyError(PellucidError, KeyError):
    """A name that a result, such as a :class:`~pellucid.patching.PatchingResult`, has nothing under."""


class CacheTooLargeError(PellucidError, MemoryError):
    """What was asked to be cached needs more than ``max_cache_bytes``."""


class CorpusError(PellucidError, ValueError):
    """A corpus that cannot be read (with the file and the place in it), or has no tokens to run."""


class OtherJobError(PellucidError, ValueError):
    """A folder that holds the unfinished or finished work of another job: other weights, corpus or settings."""


class StoreError(PellucidError, ValueError):
    """Stored activations that are unfinished, missing or damaged, with the shard and the file."""


class StorageFullError(PellucidError, OSError):
    """No space is left for what has to be written, with what it needs; what was written before is whole."""


class HubError(PellucidError, OSError):
    """A name that is no folder here, and that the hub does not give: no such model, no right to see it, no network."""


class MissingExtraError(PellucidError, ImportError):
    """Something was asked for that needs a package of one of Pellucid's extras, and it is not installed."""


class NotSetUpError(PellucidError, RuntimeError):
    """A component was used before it was given the Hugging Face module it stands for."""


class PellucidWarning(UserWarning):
    """Something the user should know: a fallback that was taken, or a surprise that was left as it was found."""


_LIBRARIES = tuple(os.path.join("site-packages", name, "") for name in ("torch", "transformers", "accelerate", "peft"))
_OWN = (os.path.join(os.path.dirname(os.path.abspath(__file__)), ""), contextlib.__file__)


def warn(message: str) -> None:
    """Give a :class:`PellucidWarning` that points at the user's line, however many calls of libraries lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_passed_over(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, PellucidWarning, stacklevel=level)


def _is_passed_over(file: str) -> bool:
    return file.startswith(_OWN) or any(library in file for library in _LIBRARIES)
