"""What edge attribution and the faithfulness of a circuit can be told, each written once.

Knows neither torch nor numpy, so that the command line's help comes up at once.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pellucid.arguments import check_choice, check_count
from pellucid.experiments.options import Direction, option

Method: TypeAlias = Literal["eap", "eap-ig"]
Rule: TypeAlias = Literal["gauss-legendre", "midpoint", "right"]
Outside: TypeAlias = Literal["source", "mean"]

METHODS: tuple[Method, ...] = ("eap", "eap-ig")
RULES: tuple[Rule, ...] = ("gauss-legendre", "midpoint", "right")


@dataclass(frozen=True, kw_only=True)
class EdgeChoices:
    """What edge attribution is told beside its pairs and its metric: see its options.

    Raises:
        InputError: a word that an option does not know, or a number out of range.
    """

    method: Method = option(
        "eap", "eap: the gradient at the base run; eap-ig: its mean over points of the path to it.", command=True
    )
    direction: Direction = option(
        "noising",
        "noising: the base run is the clean one, edges are patched from the corrupted run; denoising the other way round.",
        command=True,
    )
    points: int = option(5, "Points of the path, for eap-ig.", command=True)
    rule: Rule = option(
        "gauss-legendre",
        "Which points: gauss-legendre, midpoint of equal steps, or their right ends, the last of which is the base run.",
        command=True,
    )
    batch_size: int | None = option(None, "Pairs that run together; by default as many as memory allows, up to 16.")

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("direction", self.direction, ("denoising", "noising"))
        check_choice("rule", self.rule, RULES)
        check_count("points", self.points)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class CurveChoices:
    """What the faithfulness of a circuit is told beside its pairs and its metric: see its options.

    Raises:
        InputError: a word that an option does not know, or a number out of range.
    """

    outside: Outside = option(
        "source",
        "What edges outside a circuit carry: source, what their sender writes in the source run; mean, its mean over all "
        "source runs and their positions.",
        command=True,
    )
    randoms: int = option(1, "Random circuits beside each size.", command=True)
    seed: int = option(0, "Of what is drawn at random.", command=True)

    def __post_init__(self) -> None:
        check_choice("outside", self.outside, ("source", "mean"))
        check_count("randoms", self.randoms, 0)
        check_count("seed", self.seed, 0)
