"""Progress bars: on standard error, silent where nobody watches, switched off the way Hugging Face's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def progress_bar(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    show: bool | None = None,
) -> Any:
    """A tqdm bar named ``pellucid.<desc>``, so that ``huggingface_hub``'s switches reach it.

    Args:
        iterable: what to go through; without one, call ``update()``.
        total: how many steps.
        desc: what is being done.
        unit: what a step is.
        show: ``None`` shows it on a terminal only.
    """
    from huggingface_hub.utils import tqdm

    disable = None if show is None else not show
    return tqdm(
        iterable, total=total, desc=desc, unit=unit, leave=False, disable=disable, name=f"pellucid.{desc.split()[0]}"
    )
