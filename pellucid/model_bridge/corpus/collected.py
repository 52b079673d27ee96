"""What a collection found: statistics by hook point and label, as labelled arrays, saved and merged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_path, check_text
from pellucid.corpora import Corpus, TokenContext
from pellucid.errors import InputError
from pellucid.names import HookSpec, nearest
from pellucid.running_stats import AveragePrecision, Statistic, TopK, Workspace, load_statistics, save_statistics
from pellucid.tables import BriefFields

DIMENSIONS: Mapping[str, str] = {"d_mlp": "neuron", "n_heads": "head", "n_key_value_heads": "kv_head"}
"""Words of analyses for feature axes (``kv_head``: one of keys and values that several heads of queries share); other axes
keep theirs (``d_model``, ``d_head``)."""


@dataclass(frozen=True, repr=False)
class Hook(BriefFields):
    """A hook point and the statistics asked for there."""

    spec: HookSpec
    asked: tuple[Statistic, ...]


@dataclass(frozen=True)
class Example:
    """A token at which a feature is large.

    Attributes:
        value: of the feature.
        document: number of the document within its label.
        position: of the token in the document.
        context: the token with the text around it.
    """

    value: float
    document: int
    position: int
    context: TokenContext


def describe_request(hooks: Sequence[Hook]) -> dict[str, Any]:
    """What was asked for (JSON)."""
    return {hook.spec.name: [[each.kind, each.settings()] for each in hook.asked] for hook in hooks}


class Collected:
    """Statistics of activations, one for each hook point, statistic and label.

    ``collected.get("blocks.0.mlp.hook_post", "count_positive", "en")`` is one statistic;
    ``collected.array("blocks.*.mlp.hook_post", "count_positive")`` puts layers and labels together.

    Attributes:
        hooks: the points, in firing order.
        labels: the labels, in the order of the corpus.
        n_tokens: real tokens seen, by label.
        n_rows: rows seen, by label.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        labels: Sequence[str],
        statistics: Mapping[tuple[str, str, str], Statistic],
        n_tokens: Mapping[str, int],
        n_rows: Mapping[str, int],
    ) -> None:
        self.hooks, self.labels = list(hooks), tuple(labels)
        self._statistics = dict(statistics)
        self.n_tokens, self.n_rows = dict(n_tokens), dict(n_rows)
        shared = Workspace()  # they are updated in turn
        for statistic in self._statistics.values():
            statistic.workspace = shared
        self._of = {
            (hook.spec.name, label): tuple(self._statistics[hook.spec.name, each.name, label] for each in hook.asked)
            for hook in self.hooks
            for label in self.labels
        }

    @classmethod
    def empty(cls, hooks: Sequence[Hook], labels: Sequence[str]) -> Collected:
        """Nothing seen yet."""
        statistics = {
            (hook.spec.name, each.name, label): each.fresh()
            for hook in hooks
            for each in hook.asked
            for label in labels
        }
        return cls(hooks, labels, statistics, dict.fromkeys(labels, 0), dict.fromkeys(labels, 0))

    def of(self, hook: str, label: str) -> tuple[Statistic, ...]:
        """The statistics of one point and label, in the order asked for."""
        self._hook(hook)
        self._need("label", label, self.labels)
        return self._of[hook, label]

    def saw(self, label: str, rows: int, tokens: int) -> None:
        """Count a batch."""
        self.n_rows[label] += rows
        self.n_tokens[label] += tokens

    # -- looking up ----------------------------------------------------------------------------------------------------

    def get(self, hook: str, statistic: str, label: str) -> Statistic:
        """One statistic.

        Raises:
            InputError: it was not collected; what was is listed.
        """
        for argument, value in (("hook", hook), ("statistic", statistic), ("label", label)):
            check_text(argument, value)
        found = self._statistics.get((hook, statistic, label))
        if found is None:
            self._hook(hook)
            self._need("statistic", statistic, sorted({key[1] for key in self._statistics if key[0] == hook}))
            self._need("label", label, self.labels)
            raise AssertionError  # one of the three was wrong
        return found

    def array(self, hook: str, statistic: str, field: str | None = None) -> xarray.DataArray:
        """A statistic of all layers and labels.

        Args:
            hook: a name, or a glob for the same point of several layers (``"blocks.*.mlp.hook_post"``).
            statistic: its name, such as ``"count_positive"``.
            field: which part of a result that has several (``"mean"`` or ``"variance"``).

        Returns:
            ``[layer, *features, *trailing, label]``; ``layer`` is absent for a single name. Features are ``neuron``,
            ``head``, ``kv_head``, ``d_head`` or ``d_model``. Attribute ``n_tokens`` has the numbers of tokens.

        Raises:
            InputError: not collected, different points at once, or a result that is no array by feature.
        """
        chosen, several = self._chosen(hook)
        layers = [
            np.stack(
                [self._values(self.get(each.spec.name, statistic, label), field) for label in self.labels], axis=-1
            )
            for each in chosen
        ]
        first = self.get(chosen[0].spec.name, statistic, self.labels[0])
        dims = [*feature_dims(chosen[0].spec), *first.trailing, "label"]
        coords: dict[str, Any] = {"label": list(self.labels), **first.trailing}
        attributes = {"hook": hook, "statistic": statistic, "n_tokens": [self.n_tokens[label] for label in self.labels]}
        if several:
            coords["layer"] = [each.spec.layer for each in chosen]
            return xarray.DataArray(np.stack(layers), coords, ["layer", *dims], field or statistic, attributes)
        return xarray.DataArray(layers[0], coords, dims, field or statistic, attributes)

    @property
    def tokens(self) -> xarray.DataArray:
        """``[label]``: real tokens seen."""
        return xarray.DataArray(
            [self.n_tokens[label] for label in self.labels], {"label": list(self.labels)}, ["label"]
        )

    def average_precision(self, hook: str, positive: str, statistic: str = "average_precision") -> xarray.DataArray:
        """How well each feature tells the documents of one label from those of all others.

        Args:
            hook: a name or a glob, as for :meth:`array`.
            positive: the label.
            statistic: ``"average_precision"`` (documents pooled by mean) or ``"average_precision_max"``.

        Returns:
            ``[layer, *features]`` float64; ``layer`` is absent for a single name.

        Raises:
            InputError: not collected; no other label.
        """
        chosen, several = self._chosen(hook)
        check_text("statistic", statistic)
        self._need("positive", positive, self.labels)
        if len(self.labels) < 2:
            raise InputError("Average precision compares labels; this collection has one.")
        layers = []
        for each in chosen:
            found = {label: self.get(each.spec.name, statistic, label) for label in self.labels}
            pooled = {label: one for label, one in found.items() if isinstance(one, AveragePrecision)}
            if len(pooled) < len(found):
                raise InputError(f"{statistic} is no average precision: collect AveragePrecision().")
            others = [one for label, one in pooled.items() if label != positive]
            layers.append(self._as_numpy(pooled[positive].against(others, each.spec.name)))
        dims = feature_dims(chosen[0].spec)
        attributes = {"hook": hook, "statistic": statistic, "positive": positive}
        if several:
            coords = {"layer": [each.spec.layer for each in chosen]}
            return xarray.DataArray(np.stack(layers), coords, ["layer", *dims], statistic, attributes)
        return xarray.DataArray(layers[0], None, dims, statistic, attributes)

    def _values(self, statistic: Statistic, field: str | None) -> np.ndarray[Any, Any]:
        found = statistic.result()
        if isinstance(found, tuple):
            fields = found._asdict()  # type: ignore[attr-defined]
            if field is None:
                raise InputError(f"{statistic.name} has {', '.join(fields)}: say which with field=.")
            self._need("field", field, list(fields))
            found = fields[field]
        elif field is not None:
            raise InputError(f"{statistic.name} has one result; leave field={field!r} out.")
        expected = (*(statistic.features or ()), *(len(values) for values in statistic.trailing.values()))
        if tuple(found.shape) != expected:
            otherwise = ", or .average_precision(hook, label)" if isinstance(statistic, AveragePrecision) else ""
            raise InputError(
                f"{field or statistic.name} is no array by feature: it has the shape {tuple(found.shape)}, of features "
                f"{statistic.features}. Take .get(hook, statistic, label).result(){otherwise}."
            )
        return self._as_numpy(found)

    @staticmethod
    def _as_numpy(values: Tensor) -> np.ndarray[Any, Any]:
        """On the CPU, as numpy has it: without bfloat16."""
        values = values.cpu().float() if values.dtype == torch.bfloat16 else values.cpu()
        found: np.ndarray[Any, Any] = values.numpy()
        return found

    def _hook(self, name: str) -> Hook:
        names = [hook.spec.name for hook in self.hooks]
        self._need("hook", name, names)
        return self.hooks[names.index(name)]

    def _chosen(self, hook: str) -> tuple[list[Hook], bool]:
        check_text("hook", hook)
        if not any(mark in hook for mark in "*?["):
            return [self._hook(hook)], False
        chosen = [each for each in self.hooks if fnmatch.fnmatchcase(each.spec.name, hook)]
        if not chosen:
            self._need("hook", hook, [each.spec.name for each in self.hooks])
        kinds = {(each.spec.component.partition(f"{each.spec.layer}")[2], each.spec.site) for each in chosen}
        if len(kinds) > 1 or any(each.spec.layer is None for each in chosen):
            raise InputError(
                f"{hook!r} matches different points ({', '.join(each.spec.name for each in chosen[:4])}, ...): an array is "
                "of one point over layers."
            )
        return chosen, True

    def _need(self, what: str, asked: str, known: Sequence[str]) -> None:
        if check_text(what, asked) not in known:
            near = ", ".join(map(repr, nearest(asked, known)))
            raise InputError(f"No {what} {asked!r} was collected. Nearest: {near}.")

    # -- text ----------------------------------------------------------------------------------------------------------

    def examples(
        self, corpus: Corpus, hook: str, label: str, feature: int | Sequence[int], statistic: str | None = None
    ) -> list[Example]:
        """The tokens at which a feature is largest, with the text around them, largest first.

        Args:
            corpus: the one that was collected over.
            hook: a name.
            label: whose examples.
            feature: its index, or several for several feature axes.
            statistic: ``"top_20"``; ``None`` takes the only one there is.

        Raises:
            InputError: no top examples were collected there; no such feature.
        """
        check_kind("corpus", corpus, Corpus, "a Corpus")
        if statistic is not None:
            check_text("statistic", statistic)
        self._need("label", label, self.labels)
        tops = [one for one in self.of(self._hook(hook).spec.name, label) if isinstance(one, TopK)]
        wanted = [one for one in tops if statistic in (None, one.name)]
        if len(wanted) != 1:
            raise InputError(
                f"{hook} has {len(wanted)} statistics of that kind; collect TopK(k) and name it, as in 'top_20'."
            )
        found = wanted[0].result()
        asked: Any = feature
        index = tuple(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else (feature,)
        axes = found[0].shape[:-1]
        if len(index) != len(axes):
            raise InputError(f"{hook} has features {tuple(axes)}: feature is {len(axes)} indices; found {feature!r}.")
        for place, size in zip(index, axes, strict=True):
            check_count("feature", place, 0, size - 1)
        values, documents, positions = (part[index].tolist() for part in found)
        held = [entry for entry in zip(values, documents, positions, strict=True) if entry[1] >= 0]
        contexts = corpus.contexts(label, [(document, position) for _, document, position in held])
        return [Example(*entry, context) for entry, context in zip(held, contexts, strict=True)]

    # -- merging and saving --------------------------------------------------------------------------------------------

    def merge(self, other: Collected) -> Collected:
        """Take in what another pass has seen, of rows that come after these.

        Integer statistics, extrema and top examples come out the same for any division of the corpus; moments are merged
        in float64 and round.

        Raises:
            InputError: other places, statistics or labels.
        """
        check_kind("other", other, Collected, "a collection")
        if describe_request(self.hooks) != describe_request(other.hooks) or self.labels != other.labels:
            raise InputError("Only collections of the same hooks, statistics and labels merge.")
        for key, statistic in self._statistics.items():
            statistic.merge(other._statistics[key])
        for label in self.labels:
            self.saw(label, other.n_rows[label], other.n_tokens[label])
        return self

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file: equal statistics, equal bytes."""
        write_collected(check_path("path", path), self, {})

    @classmethod
    def load(cls, path: str | Path) -> Collected:
        """What :meth:`save` wrote, or the state in a checkpoint folder.

        Raises:
            InputError: not such a file, or a damaged one.
        """
        return read_collected(check_path("path", path))[0]

    def __repr__(self) -> str:
        names = sorted({key[1] for key in self._statistics})
        return f"Collected({', '.join(names)} at {len(self.hooks)} hook points; {self.n_tokens} tokens)"


def feature_dims(spec: HookSpec) -> list[str]:
    """Names of the feature axes of a point."""
    return [DIMENSIONS.get(axis, axis) for axis in spec.axes if axis not in ("batch", "pos")]


def write_collected(path: Path, collected: Collected, extra: Mapping[str, Any]) -> None:
    """Write a collection, and ``extra`` (JSON) beside it.

    Raises:
        StorageFullError: no space is left.
    """
    keys = list(collected._statistics)
    table = {
        "hooks": [asdict(hook.spec) for hook in collected.hooks],
        "asked": describe_request(collected.hooks),
        "labels": list(collected.labels),
        "keys": [list(key) for key in keys],
        "n_tokens": collected.n_tokens,
        "n_rows": collected.n_rows,
    }
    statistics = {str(index): collected._statistics[key] for index, key in enumerate(keys)}
    save_statistics(path, statistics, {**extra, "collected": table})


def read_collected(path: Path) -> tuple[Collected, dict[str, Any]]:
    """A collection, and what was written beside it.

    Raises:
        InputError: not such a file, or a damaged one.
    """
    found, extra = load_statistics(path)
    try:
        table = extra.pop("collected")
        keys = [(hook, statistic, label) for hook, statistic, label in table["keys"]]
        statistics = {key: found[str(index)] for index, key in enumerate(keys)}
        first = table["labels"][0]
        hooks = []
        for entry in table["hooks"]:
            spec = HookSpec(**{**entry, "axes": tuple(entry["axes"]), "aliases": tuple(entry["aliases"])})
            asked = tuple(one for (hook, _, label), one in statistics.items() if hook == spec.name and label == first)
            hooks.append(Hook(spec, tuple(one.fresh() for one in asked)))
        return Collected(hooks, table["labels"], statistics, table["n_tokens"], table["n_rows"]), extra
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"{path} holds no collection, or one of another version: {error!r}") from None
