"""Running statistics: what is kept of activations that are looked at once and never stored.

Each one is updated batch by batch on the device of the activations, counts real tokens only, can be merged with what
another process saw, and is saved as tensors with its settings beside them. Integer states (counts, quantile sketches,
histograms) merge exactly, in any order and any grouping; so do extrema and top examples. Moments are floats (float64):
merging rounds, so equal bits need equal updates and merges in an equal order.
"""

from pellucid.running_stats.base import Places, Statistic, Workspace, load_statistics, save_statistics
from pellucid.running_stats.counts import CountPositive, CountTogether, Histogram, Quantiles
from pellucid.running_stats.documents import AveragePrecision, average_precision
from pellucid.running_stats.moments import Covariance, MeanVariance, MinMax
from pellucid.running_stats.top import TopK

__all__ = [
    "AveragePrecision",
    "CountPositive",
    "CountTogether",
    "Covariance",
    "Histogram",
    "MeanVariance",
    "MinMax",
    "Places",
    "Quantiles",
    "Statistic",
    "TopK",
    "Workspace",
    "average_precision",
    "load_statistics",
    "save_statistics",
]
