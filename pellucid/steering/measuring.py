"""Directions out of texts: difference of means, contrast pairs, means, samples.

Texts are run a batch at a time, each to the last layer that is asked for and no further, and looked at there. Nothing of a
text is kept but its vector at one position, or a running sum in float64. A text's positions are its own: padding is none of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pellucid.arguments import check_choice, check_count, check_kind, check_text
from pellucid.axes import Index
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.places import find_site
from pellucid.model_bridge.corpus.corpus_pass import PassBatch, Tap, corpus_pass, stop_after
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.padding import counts
from pellucid.progress import progress_bar
from pellucid.steering.directions import Direction, Origin, Samples, features_of, model_identity, site_of
from pellucid.storage.json_text import Json

Text: TypeAlias = str | Tensor | Sequence[int]
"""A text, or its token ids ``[pos]`` without padding."""

Position: TypeAlias = int | Literal["last", "mean"]
"""Where a text is looked at: at its last token, at the mean over all, or at one: from 0, negative from the end."""

Method: TypeAlias = Literal["mean", "principal"]


@dataclass(frozen=True, eq=False)
class _Rows:
    """A batch of texts, as a pass over a corpus takes it."""

    label: str
    tokens: Tensor
    attention_mask: Tensor
    first: int


class _Reader:
    """What a text is at the points asked for: one vector a layer.

    Raises:
        InputError: arguments that cannot be; a model in training mode.
        HookNameError: no such site.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        at: str,
        layers: Index,
        position: Position,
        batch_size: int,
        prepend_bos: bool | None,
        progress: bool | None,
        name: str,
    ) -> None:
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        check_count("batch_size", batch_size)
        if isinstance(position, str) or not isinstance(position, int) or isinstance(position, bool):
            check_choice("position", position, ("last", "mean"))
        check_kind("name", name, str, "a string")
        self.bridge, self._batch_size, self._prepend_bos, self._progress = bridge, batch_size, prepend_bos, progress
        self.position, self.name = position, name
        self.specs: list[HookSpec] = list(find_site(bridge, check_text("at", at), layers).specs.values())
        self.features = features_of(bridge, self.specs[0])
        bridge.runner.refuse_training()
        if self.specs[0].flag is not None:
            bridge.get_hook_point(self.specs[0].name)  # says which call switches it on

    def origin(self, **made_by: Json) -> Origin:
        """What the vectors that are made are of."""
        first = self.specs[0]
        layers = None if first.layer is None else tuple(spec.layer for spec in self.specs if spec.layer is not None)
        said: dict[str, Json] = {**made_by, "position": self.position}
        return Origin(site_of(first), tuple(self.features), layers, model_identity(self.bridge), self.name, said)

    def vectors(self, label: str, texts: Iterable[Text]) -> Iterator[Tensor]:
        """``[text, layer, *features]`` of a batch of texts after the other, in float64 on the model's device.

        Raises:
            InputError: one that is no text or too short; with its number.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Tap:
            def take(values: Tensor, batch: PassBatch[_Rows]) -> None:
                seen[name] = self._at_position(values, batch.rows)

            return take

        taps: Mapping[str, Tap] = {spec.name: keep(spec.name) for spec in self.specs}
        stop = stop_after(self.specs, self.bridge.cfg.n_layers)
        total = len(texts) if isinstance(texts, Sequence | Tensor) else None
        with progress_bar(total=total, desc=f"steering: {label}", unit=" texts", show=self._progress) as bar:
            for batch in corpus_pass(self.bridge, self._batches(label, texts), taps, stop=stop):
                batch.run()
                yield torch.stack([seen[spec.name] for spec in self.specs], dim=1)
                bar.update(len(batch.rows.tokens))

    def mean(self, label: str, texts: Iterable[Text]) -> tuple[Tensor, int]:
        """``[layer, *features]`` float64: the mean over texts, each of which weighs the same; and how many there were."""
        total, count = None, 0
        for vectors in self.vectors(label, texts):
            added = vectors.sum(0)
            total = added if total is None else total + added
            count += len(vectors)
        assert total is not None
        return total / count, count

    def in_models_dtype(self, vectors: Tensor) -> Tensor:
        """In the model's dtype, float32 at least."""
        return vectors.to(widened(torch.empty(0, dtype=self.bridge.dtype)).dtype)

    def _batches(self, label: str, texts: Iterable[Text]) -> Iterator[_Rows]:
        rest, first = iter(texts), 0
        while listed := list(islice(rest, self._batch_size)):
            tokens, mask = self._tokens(label, listed, first)
            yield _Rows(label, tokens, mask, first)
            first += len(listed)

    def _tokens(self, label: str, listed: Sequence[Text], first: int) -> tuple[Tensor, Tensor]:
        """``[text, pos]`` ids and mask, padded on the right."""
        texts = [text for text in listed if isinstance(text, str)]
        if texts and len(texts) == len(listed):
            empty = [place for place, text in enumerate(texts, first) if not text]
            if empty:
                raise InputError(f"{label}: text {empty[0]} is empty.")
            tokens, mask = self.bridge.to_tokens(texts, self._prepend_bos, "right", return_mask=True)
            return tokens, mask.bool()
        if texts:
            raise InputError(f"{label} has texts and token ids: give one kind.")
        if self._prepend_bos is not None:
            raise InputError("prepend_bos is for texts; token ids are run as they are.")
        rows = [_as_ids(label, place, ids) for place, ids in enumerate(listed, first)]
        tokens = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        return tokens.to(self.bridge.device), mask.to(self.bridge.device)

    def _at_position(self, values: Tensor, rows: _Rows) -> Tensor:
        """``[batch, pos, *features]`` to ``[batch, *features]`` float64."""
        mask = rows.attention_mask.to(values.device)
        lengths = counts(mask)
        if self.position == "mean":
            weights = mask.double().view(*mask.shape, *[1] * (values.dim() - 2))
            return (values.double() * weights).sum(1) / lengths.view(-1, *[1] * (values.dim() - 2))
        place: Any = -1 if self.position == "last" else self.position
        column = lengths + place if place < 0 else torch.full_like(lengths, place)  # padded on the right
        short = ((column < 0) | (column >= lengths)).nonzero().flatten().tolist()
        if short:
            raise InputError(
                f"{rows.label}: text {rows.first + short[0]} has {int(lengths[short[0]])} tokens; position {place} was "
                "asked for."
            )
        return values[torch.arange(len(column), device=values.device), column].double()


def _some(label: str, texts: Iterable[Text]) -> Iterable[Text]:
    """The texts, of which there is one at least; asked of all sets before any is run.

    Raises:
        InputError: none, or nothing that texts are read from.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"{label} is a list of texts, or another iterable of them; found {type(texts).__name__}.")
    rest = iter(texts)
    first = list(islice(rest, 1))
    if not first:
        raise InputError(f"{label} is empty: there is nothing to measure. Give at least one text.")
    if not isinstance(first[0], str):
        _as_ids(label, 0, first[0])
    return texts if isinstance(texts, Sequence | Tensor) else chain(first, rest)


def _as_ids(label: str, place: int, ids: Any) -> Tensor:
    try:
        row = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.dim() != 1 or row.numel() == 0 or row.is_floating_point() or row.dtype == torch.bool:
        raise InputError(f"{label}: entry {place} is neither a text nor token ids [pos]; found {type(ids).__name__}.")
    return row.long().cpu()


def difference_of_means(
    bridge: TransformerBridge,
    positive: Iterable[Text],
    negative: Iterable[Text],
    at: str = "resid_post",
    layers: Index = None,
    position: Position = "last",
    *,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    name: str = "",
    progress: bool | None = None,
) -> Direction:
    """The mean activation over some texts, minus that over others.

    Args:
        bridge: the model. Hooks that are on it act.
        positive: texts, or token ids ``[pos]`` of each; any iterable, read once.
        negative: other texts.
        at: the activation: ``resid_post``, ``z``, ``mlp_post``, ..., see :mod:`pellucid.experiments.places`.
        layers: which; by default all.
        position: of each text: ``"last"``, ``"mean"`` over all of its tokens, or one: from 0, negative from the end.
        batch_size: texts of a forward.
        prepend_bos: texts with the beginning-of-sequence token first or without; by default as the tokenizer does.
        name: what to call the direction.
        progress: show a bar; by default on a terminal.

    Returns:
        ``[layer, *features]`` in the model's dtype, float32 at least; summed in float64.

    Raises:
        InputError: no texts, one that is too short, a point without features, layers that the model does not have.
        HookNameError: no such site.
    """
    reader = _Reader(bridge, at, layers, position, batch_size, prepend_bos, progress, name)
    towards, away = _some("positive", positive), _some("negative", negative)
    high, n_positive = reader.mean("positive", towards)
    low, n_negative = reader.mean("negative", away)
    origin = reader.origin(by="difference_of_means", positive=n_positive, negative=n_negative)
    return Direction(reader.in_models_dtype(high - low), origin)


def contrast_pairs(
    bridge: TransformerBridge,
    pairs: Iterable[tuple[Text, Text]],
    at: str = "resid_post",
    layers: Index = None,
    position: Position = "last",
    *,
    method: Method = "mean",
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    name: str = "",
    progress: bool | None = None,
) -> Direction:
    """The direction in which the first text of each pair differs from the second.

    Args:
        bridge: see :func:`difference_of_means`, as for all that is not said here.
        pairs: ``(positive, negative)`` texts or token ids that differ in what you study alone.
        at: where.
        layers: which.
        position: of each text.
        method: ``"mean"``: the mean of the differences, as contrastive activation addition has it (Rimsky et al. 2023, arXiv
            2312.06681). ``"principal"``: their first principal component, at length 1, on the side on which the differences
            lie: the line on which ``positive`` and ``negative`` are furthest apart about the middle of each pair
            (repeng's ``pca_center``).
        batch_size: texts of a forward; of a pair both are in one.
        prepend_bos: for texts.
        name: what to call the direction.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: no pairs, an entry that is none; see :func:`difference_of_means`.
        HookNameError: no such site.
    """
    check_choice("method", method, ("mean", "principal"))
    reader = _Reader(
        bridge, at, layers, position, 2 * check_count("batch_size", batch_size), prepend_bos, progress, name
    )
    found = [
        reader.in_models_dtype(vectors[0::2] - vectors[1::2])
        if method == "principal"
        else (vectors[0::2] - vectors[1::2])
        for vectors in reader.vectors("pairs", _some("pairs", _flat(pairs)))
    ]
    differences = torch.cat(found)
    origin = reader.origin(by="contrast_pairs", method=method, pairs=len(differences))
    if method == "mean":
        return Direction(reader.in_models_dtype(differences.mean(0)), origin)
    components = [_principal(differences[:, place].double().flatten(1)) for place in range(differences.shape[1])]
    vectors = torch.stack(components).view(differences.shape[1:])
    return Direction(reader.in_models_dtype(vectors), origin)


def _flat(pairs: Iterable[tuple[Text, Text]]) -> Iterator[Text]:
    if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Iterable):
        raise InputError(f"pairs is a list of (positive, negative) pairs; found {type(pairs).__name__}.")
    for place, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"pairs: entry {place} is no pair (positive, negative); found {pair!r}.")
        yield from pair


def _principal(differences: Tensor) -> Tensor:
    """``[pair, feature]`` to ``[feature]``: the first right singular vector, on the side of the differences' mean."""
    direction: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return -direction if float(differences.mean(0) @ direction) < 0 else direction


def mean_activation(
    bridge: TransformerBridge,
    texts: Iterable[Text],
    at: str = "resid_post",
    layers: Index = None,
    position: Position = "mean",
    *,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    name: str = "",
    progress: bool | None = None,
) -> Direction:
    """The mean activation over texts, each of which weighs the same: what :class:`~pellucid.steering.Replace` ablates to.

    Args:
        bridge: see :func:`difference_of_means`, as for all that is not said here.
        texts: texts or token ids.
        at: where.
        layers: which.
        position: of each text.
        batch_size: texts of a forward.
        prepend_bos: for texts.
        name: what to call it.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: see :func:`difference_of_means`.
        HookNameError: no such site.
    """
    reader = _Reader(bridge, at, layers, position, batch_size, prepend_bos, progress, name)
    mean, count = reader.mean("texts", _some("texts", texts))
    return Direction(reader.in_models_dtype(mean), reader.origin(by="mean_activation", texts=count))


def sample_activations(
    bridge: TransformerBridge,
    texts: Iterable[Text],
    at: str = "resid_post",
    layers: Index = None,
    position: Position = "last",
    *,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    name: str = "",
    progress: bool | None = None,
) -> Samples:
    """One activation of each text: what :class:`~pellucid.steering.Resample` draws from.

    Args:
        bridge: see :func:`difference_of_means`, as for all that is not said here.
        texts: texts or token ids.
        at: where.
        layers: which.
        position: of each text.
        batch_size: texts of a forward.
        prepend_bos: for texts.
        name: what to call them.
        progress: show a bar; by default on a terminal.

    Returns:
        ``[layer, text, *features]``.

    Raises:
        InputError: see :func:`difference_of_means`.
        HookNameError: no such site.
    """
    reader = _Reader(bridge, at, layers, position, batch_size, prepend_bos, progress, name)
    kept = [reader.in_models_dtype(vectors) for vectors in reader.vectors("texts", _some("texts", texts))]
    values = torch.cat(kept).transpose(0, 1).contiguous()
    return Samples(values, reader.origin(by="sample_activations", texts=values.shape[1]))
