"""What a check of a model found: a line a check, and the report of all of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pellucid.tables import Table

MOVES = "moves the logits"
"""The check of a hook whose number is better large: an edit there must not be lost."""


@dataclass(frozen=True)
class CheckResult:
    """One check: what was held against what, and what came out.

    Attributes:
        name: what was checked, in words.
        held: whether it holds.
        measured: a largest difference, or a count.
        bound: what ``measured`` may be at most; for "moves the logits", what it must exceed.
        detail: what to look at when it does not hold.
        hook: the hook point that was tried, if one was.
        aspect: what of it: looking, returned = in place, as by Hugging Face, moves the logits.
    """

    name: str
    held: bool
    measured: float
    bound: float
    detail: str = ""
    hook: str = ""
    aspect: str = ""


@dataclass(repr=False)
class CheckReport:
    """All checks of one model."""

    model: str
    dtype: str
    results: list[CheckResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(result.held for result in self.results)

    @property
    def failed(self) -> list[CheckResult]:
        """The checks that did not hold."""
        return [result for result in self.results if not result.held]

    def to_json(self) -> str:
        """Everything, as JSON; a measurement that is not finite is ``null``."""
        results = [asdict(result) for result in self.results]
        for result in results:
            result["measured"] = result["measured"] if math.isfinite(result["measured"]) else None
        head = {"model": self.model, "dtype": self.dtype, "ok": self.ok}
        return json.dumps(head | {"results": results}, indent=1, allow_nan=False)

    def _table(self) -> Table:
        """What does not hold, line by line; else a line for each kind of check."""
        name, total = self.model or "this model", len(self.results)
        if self.failed:
            rows = [(each.name, f"{each.measured:.3g}", f"{each.bound:.3g}", each.detail) for each in self.failed]
            heading = f"{len(self.failed)} of {total} checks do not hold for {name} ({self.dtype}):"
            return Table(heading, ("what does not hold", "measured", "bound", "detail"), rows)
        kinds: dict[str, list[CheckResult]] = {}
        for result in self.results:
            kind = f"hooks: {result.aspect}" if result.hook else re.sub(r"\b(blocks\.|layer )\d+", r"\1*", result.name)
            kinds.setdefault(kind, []).append(result)
        rows = [(kind, str(len(held)), *_worst(held)) for kind, held in kinds.items()]
        heading = f"All {total} checks hold for {name} ({self.dtype}); print(report) shows each."
        return Table(heading, ("what holds", "checks", "measured", "bound"), rows)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def __str__(self) -> str:
        width = max((len(result.name) for result in self.results), default=0)
        lines = [
            f"{'ok  ' if result.held else 'FAIL'} {result.name:<{width}}  {result.measured:.3g} (bound {result.bound:.3g})"
            + (f"  {result.detail}" if result.detail and not result.held else "")
            for result in self.results
        ]
        held = sum(result.held for result in self.results)
        return "\n".join([*lines, f"{held} of {len(self.results)} checks hold"])


def _worst(held: Sequence[CheckResult]) -> tuple[str, str]:
    """Measured and bound of the check that is nearest to its bound."""
    if held[0].aspect == MOVES:
        least = min(held, key=lambda result: result.measured)
        return f"{least.measured:.3g} at least", f"> {least.bound:.3g}"
    most = max(held, key=lambda result: result.measured)
    return f"{most.measured:.3g} at most", f"{most.bound:.3g}"
