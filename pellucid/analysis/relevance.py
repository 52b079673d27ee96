"""Relevance of neurons: how much the loss of a language's text depends on each, beside how often it is active (LAPE).

A neuron may fire for one language and matter little to it, and another fire seldom and matter much: preference is no
necessity. The relevance of a neuron at a token is ``|gradient x activation|``, the change, to first order, of the row's loss
if the neuron were silent at that token; the gradient is that of the loss, or what RelP's rules send back in its place
(Rezaei Jafari et al. 2025, arXiv 2508.21258). Its mean over the tokens of a language ranks the neurons.

The loss is the sum over the row's tokens, not their mean, so that the numbers are of one token's neuron on all the tokens
after it, in nats, whatever the length of a row. Gated or not, the neuron is what goes into the MLP's last projection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.analysis.language_neurons import Language, LanguageNeurons
from pellucid.analysis.neurons import NEURONS, Neuron, refuse_without_neurons
from pellucid.arguments import check_choice, check_count, check_kind, check_list, check_number, check_path
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import InputError
from pellucid.gradients.gradient_run import run_with_gradients
from pellucid.losses import next_token_loss
from pellucid.model_bridge.corpus.collected import Collected
from pellucid.model_bridge.corpus.collecting import collected_by, requested_hooks
from pellucid.model_bridge.corpus.corpus_pass import PaddingSide, PassBatch, RowPlan
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import targets
from pellucid.running_stats import MeanVariance
from pellucid.sweep import Metric, Reads
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields

Method: TypeAlias = Literal["gradient", "relp"]
Against: TypeAlias = Literal["nothing", "others"]

METHODS: tuple[Method, ...] = ("gradient", "relp")
AGAINST: tuple[Against, ...] = ("nothing", "others")
PLACES = f"blocks.*.{NEURONS}"


@dataclass(frozen=True, eq=False, repr=False)
class NeuronRelevance(BriefFields):
    """The relevance of every neuron for every language.

    Attributes:
        mean: ``[method, layer, neuron, language]`` float64, nats: mean over tokens of ``|gradient x activation|``.
        standard_error: of the mean, tokens taken as independent.
        n: ``[language]`` int64, tokens.
        collected: what both were made from.
    """

    mean: xr.DataArray
    standard_error: xr.DataArray
    n: xr.DataArray
    collected: Collected

    @classmethod
    def of(cls, collected: Collected) -> NeuronRelevance:
        """From what was collected.

        Raises:
            InputError: something else was collected.
        """
        check_kind("collected", collected, Collected, "a collection of neuron_relevance")
        names = {each.name for hook in collected.hooks for each in hook.asked}
        methods = [method for method in METHODS if MeanVariance(label=method).name in names]
        if not methods or not all(hook.spec.name.endswith(NEURONS) for hook in collected.hooks):
            raise InputError("The collection holds no relevance of neurons: neuron_relevance makes one.")
        fields = {}
        for field in ("mean", "variance"):
            each = [collected.array(PLACES, MeanVariance(label=method).name, field) for method in methods]
            fields[field] = xr.concat(each, xr.DataArray(methods, dims="method", name="method"), combine_attrs="drop")
        named = {name: values.rename(label="language") for name, values in fields.items()}
        n = collected.tokens.rename(label="language")
        mean = named["mean"].transpose("method", "layer", "neuron", "language").rename("relevance (nats)")
        error = (named["variance"] / n) ** 0.5
        error = error.transpose("method", "layer", "neuron", "language").rename("standard error (nats)")
        return cls(mean, error, n, collected)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Which there are."""
        return tuple(self.mean.coords["method"].values.tolist())

    @property
    def languages(self) -> tuple[Language, ...]:
        """Labels, in the order of the language axis."""
        return tuple(self.mean.coords["language"].values.tolist())

    def scores(self, method: Method = "relp", against: Against = "nothing") -> xr.DataArray:
        """``[layer, neuron, language]``: what neurons are ranked by.

        Args:
            method: ``"gradient"`` or ``"relp"``.
            against: ``"nothing"``: the relevance for the language. ``"others"``: less the mean of its relevance for the
                other languages.

        Raises:
            InputError: a method that was not collected; one language with ``against="others"``.
        """
        check_choice("method", method, self.methods)
        check_choice("against", against, AGAINST)
        own = self.mean.sel({"method": method}, drop=True)  # sel has an argument method of its own
        if against == "nothing":
            return own
        others = own.sizes["language"] - 1
        if not others:
            raise InputError("against='others' compares languages; there is one.")
        return own - (own.sum("language") - own) / others

    def top(
        self,
        sizes: int | Mapping[Language, int] | LanguageNeurons,
        method: Method = "relp",
        against: Against = "nothing",
    ) -> dict[Language, tuple[Neuron, ...]]:
        """Of each language the neurons of the highest score, as (layer, neuron), sorted; equal ones by layer, neuron.

        Args:
            sizes: how many: a number, one a language, or as many as the languages of
                :func:`~pellucid.analysis.language_neurons.lape` have.
            method: see :meth:`scores`.
            against: see :meth:`scores`.

        Raises:
            InputError: more than there are; a language that is not there.
        """
        if isinstance(sizes, LanguageNeurons):
            sizes = {language: len(neurons) for language, neurons in sizes.neurons.items()}
        asked = sizes if isinstance(sizes, Mapping) else dict.fromkeys(self.languages, sizes)
        scores = self.scores(method, against)
        width = scores.sizes["neuron"]
        found = {}
        for language, size in asked.items():
            if language not in self.languages:
                raise InputError(
                    f"sizes has the language {language!r}; relevance is of {', '.join(map(str, self.languages))}."
                )
            check_count("sizes", size, 0, scores.sizes["layer"] * width)
            order = np.argsort(-scores.sel(language=language).values.reshape(-1), kind="stable")[:size]
            found[language] = tuple(sorted((int(place) // width, int(place) % width) for place in order))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that :meth:`load` reads.

        Raises:
            StorageFullError: no space is left.
        """
        self.collected.save(check_path("path", path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NeuronRelevance:
        """Read a file of :meth:`save`.

        Raises:
            InputError: it is damaged, or holds something else.
        """
        return cls.of(Collected.load(check_path("path", path)))


def neuron_relevance(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    methods: Sequence[Method] = METHODS,
    batch_size: int = 8,
    labels: str | Sequence[str] | None = None,
    start_row: int = 0,
    stop_row: int | None = None,
    padding_side: PaddingSide = "right",
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
) -> NeuronRelevance:
    """How much the loss on a corpus depends on each neuron: one pass, a forward and a backward pass for each method.

    Args:
        bridge: the model, in eval mode. Hooks that are on it act.
        corpus: text by language.
        methods: ``"gradient"``, ``"relp"`` or both, which share their forward.
        batch_size: rows of a run; its graph is kept until the batch is done.
        labels: of these; ``None`` for all.
        start_row: first row of each label.
        stop_row: the row after the last; ``None`` for all.
        padding_side: of rows shorter than the batch.
        progress: show a bar; ``None`` shows it on a terminal only.
        checkpoint: a folder for the state: the same call goes on from there, with equal bits.
        every: seconds between states.

    Raises:
        InputError: a method that there is not; rows that there are not; a model in training mode.
        UnsupportedModelError: a model with experts.
        GradientError: a model through which no gradient flows.
        OtherJobError: the folder holds another job's state.
    """
    check_kind("corpus", corpus, Corpus, "a Corpus")
    check_number("every", every, at_least=0)
    wanted = check_list("methods", methods, "methods, 'gradient' or 'relp'")
    for method in wanted:
        check_choice("methods", method, METHODS)
    folder = None if checkpoint is None else check_path("checkpoint", checkpoint)
    plan = RowPlan(corpus.chosen(labels), batch_size, start_row, stop_row, padding_side)
    refuse_without_neurons(bridge)
    bridge.runner.refuse_training()
    asked = [method for method in METHODS if method in wanted]
    hooks = requested_hooks(bridge, {PLACES: [MeanVariance(label=method) for method in asked]})
    names = [hook.spec.name for hook in hooks]

    def read(state: Collected, batch: PassBatch[CorpusBatch]) -> None:
        unedited = Unedited(bridge, batch.prepared)
        loss = _RowLoss(unedited.tokens, unedited.attention_mask)
        run = run_with_gradients(unedited, loss, names, rules="relp" in asked)
        for place, method in enumerate(asked):
            for name, gradient in run.gradients(rules=method == "relp").items():
                values = batch.positions.of_input((gradient * run.activations[name].detach()).abs())
                state.of(name, batch.rows.label)[place].update(values, batch.mask)

    return NeuronRelevance.of(
        collected_by(
            bridge,
            corpus,
            hooks,
            plan,
            read,
            job={"relevance": "|gradient x activation| of the summed next-token loss of a row"},
            title="relevance",
            progress=progress,
            checkpoint=folder,
            every=every,
        )
    )


class _RowLoss(Metric):
    """The next-token loss of each row, summed over its tokens; 0 where there is nothing to predict."""

    def __init__(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        self._tokens, self._mask = tokens, attention_mask

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """Everything."""
        rows, length = tokens.shape
        return Reads(torch.arange(length).expand(rows, length), None)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        if not bool(targets(self._tokens, self._mask).any()):
            return logits.sum((2, 3)) * 0
        return torch.stack([next_token_loss(each, self._tokens, self._mask, per_token=True).sum(-1) for each in logits])
