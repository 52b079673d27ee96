"""Many edits of one run, computed only where each can matter: see :class:`Sweep`."""

from pellucid.sweep.edits import Add, Apply, Edit, FromRun, Scale, SetTo, Value, Zero
from pellucid.sweep.engine import Sweep
from pellucid.sweep.metrics import (
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    NextTokenLoss,
    Normalized,
    Probability,
    ProbabilityDifference,
    Reads,
)
from pellucid.sweep.plan import SweepPlan
from pellucid.sweep.result import SweepResult
from pellucid.sweep.scoring import MetricLike
from pellucid.sweep.unedited import EditSet

__all__ = [
    "Add",
    "Apply",
    "Edit",
    "EditSet",
    "FromRun",
    "KLDivergence",
    "LogProbability",
    "LogitDifference",
    "Metric",
    "MetricLike",
    "NextTokenLoss",
    "Normalized",
    "Probability",
    "ProbabilityDifference",
    "Reads",
    "Scale",
    "SetTo",
    "Sweep",
    "SweepPlan",
    "SweepResult",
    "Value",
    "Zero",
]
