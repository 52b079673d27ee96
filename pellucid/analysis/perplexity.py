"""What a change of the model does to the probability of text, and to the language of what it writes.

Perplexities are logarithms here: mean negative log-probability of a token, in nats. Only real tokens are counted, and only
those with a real token before them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.analysis.neurons import Neuron, NeuronChange, NeuronEdit, refuse_no_effect, zero
from pellucid.arguments import (
    check_choice,
    check_count,
    check_function,
    check_kind,
    check_list,
    check_mapping,
    check_number,
    check_texts,
)
from pellucid.errors import InputError, NoEffectError
from pellucid.losses import next_token_loss
from pellucid.model_bridge.corpus.corpus_pass import LabelledRows, corpus_pass
from pellucid.model_bridge.corpus.job_identity import Watched
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import targets
from pellucid.progress import progress_bar
from pellucid.token_text import tokens_to_text

Average: TypeAlias = Literal["tokens", "rows"]
"""``"tokens"``: every token weighs the same. ``"rows"``: the mean of the rows' means, as arXiv 2402.16438's code has it."""


UNCHANGED = "none"
"""What is silenced in the unmodified model."""


class Text(Protocol):
    """Text by label: a :class:`~pellucid.corpora.Corpus`, or anything else with batches."""

    def batches(self, batch_size: int) -> Iterable[LabelledRows]:
        """Rows, ``batch_size`` at a time."""
        ...


@dataclass
class _Sum:
    """Losses of one label: over tokens, and over rows' means."""

    loss: float = 0.0
    tokens: int = 0
    row_means: float = 0.0
    rows: int = 0

    def add(self, losses: Tensor, counted: Tensor) -> None:
        """Take in ``[batch, pos - 1]``."""
        by_row, sizes = losses.double().sum(-1), counted.sum(-1)
        real = sizes > 0
        self.loss += float(by_row.sum())
        self.tokens += int(sizes.sum())
        self.row_means += float((by_row[real] / sizes[real]).sum())
        self.rows += int(real.sum())

    def mean(self, average: Average) -> float:
        """Nats a token."""
        return self.loss / self.tokens if average == "tokens" else self.row_means / self.rows


def log_perplexity(
    bridge: TransformerBridge,
    text: Text,
    *,
    batch_size: int = 8,
    average: Average = "tokens",
    progress: bool | None = None,
) -> xr.DataArray:
    """``[language]`` float64: mean negative log-probability of a token of each label, in nats.

    Runs under whatever hooks are attached.

    Args:
        bridge: the model.
        text: a corpus.
        batch_size: rows of a run.
        average: see :data:`Average`; ``"tokens"`` is the usual definition.
        progress: show a bar; ``None`` shows it on a terminal only.

    Raises:
        InputError: another average; a label without a token that has one before it; a model in training mode, or one that
            changes during the measurement.
    """
    sums = _measure(bridge, text, [[]], batch_size, average, progress)
    means = [entry[0].mean(average) for entry in sums.values()]
    return xr.DataArray(means, {"language": list(sums)}, ("language",), name="log-perplexity (nats)")


def perplexity_change(
    bridge: TransformerBridge,
    text: Text,
    neurons: Mapping[Any, Sequence[Neuron]],
    *,
    random_sets: Sequence[Mapping[Any, Sequence[Neuron]]] = (),
    change: Callable[[Sequence[Neuron]], NeuronChange] = zero,
    batch_size: int = 8,
    average: Average = "tokens",
    assert_effect: bool = True,
    progress: bool | None = None,
) -> xr.Dataset:
    """How much the log-perplexity of each language rises when the neurons of each are silenced.

    Every run is compared to the unmodified model on the very same batch. Random sets of the same sizes go through the
    same runs: what they do is what any neurons would do.

    Args:
        bridge: the model.
        text: a corpus; text that neither the model was trained on nor the neurons were found on.
        neurons: by language, its neurons.
        random_sets: controls, such as :meth:`LanguageNeurons.random_sets` draws them.
        change: what is done to neurons, :func:`~pellucid.analysis.neurons.zero` by default.
        batch_size: rows of a run.
        average: see :data:`Average`.
        assert_effect: refuse a language without neurons, and raise if a change changed no neuron or no loss.
        progress: show a bar; ``None`` shows it on a terminal only.

    Returns:
        a data set with

        - ``change`` ``[silenced, language]``: rise of the log-perplexity, nats;
        - ``random`` ``[set, silenced, language]``: the same for the controls;
        - ``before`` ``[language]``: log-perplexity of the unmodified model, nats;
        - ``tokens`` ``[language]``: tokens measured;
        - ``size`` ``[silenced]``: neurons silenced.

    Raises:
        InputError: neurons that the model does not have; a language without neurons; controls of other languages.
        NoEffectError: see ``assert_effect``.
    """
    rows = _languages(neurons)
    check_function("change", change, "a function from a list of neurons to a change, such as zero")
    empty = [row for row in rows if not neurons[row]]
    if empty and assert_effect:
        raise InputError(
            f"The language {empty[0]!r} has no neurons: silencing none changes nothing. Select more (a larger top_rate), or "
            "pass assert_effect=False."
        )
    for control in check_list("random_sets", random_sets, "mappings such as neurons", empty=True):
        check_mapping("an entry of random_sets", control, "each language to a list of (layer, neuron) pairs")
        if set(control) != set(rows):
            raise InputError(f"random_sets has one with the languages {list(control)}; the neurons have {rows}.")
    # A random set may consist of neurons that are silent already: only the languages' own have to change something.
    edits = [change(sets[row]).edits(bridge) for sets in (neurons, *random_sets) for row in rows]
    sums = _measure(bridge, text, [[], *edits], batch_size, average, progress)
    means = np.array([[entry.mean(average) for entry in each] for each in sums.values()]).T
    before, rise = means[0], means[1:] - means[0]
    if assert_effect:
        for row, own, values in zip(rows, edits, rise, strict=False):
            refuse_no_effect(own, f"the neurons of {row!r}")
            if not values.any():
                raise NoEffectError(
                    f"The change of the {len(neurons[row])} neurons of {row!r} left the log-perplexity of every language "
                    "as it was, to the last bit: it does not reach the logits. If that is what you expect, pass "
                    "assert_effect=False."
                )
    languages = list(sums)
    shape = (len(random_sets), len(rows), len(languages))
    return xr.Dataset(
        {
            "change": (("silenced", "language"), rise[: len(rows)]),
            "random": (("set", "silenced", "language"), rise[len(rows) :].reshape(shape)),
            "before": (("language",), before),
            "tokens": (("language",), [entry[0].tokens for entry in sums.values()]),
            "size": (("silenced",), [len(set(neurons[row])) for row in rows]),
        },
        {"silenced": rows, "language": languages, "set": np.arange(len(random_sets))},
        {"unit": "nats a token", "average": average},
    )


def own_and_others(change: xr.DataArray) -> xr.Dataset:
    """Of a matrix ``[..., silenced, language]``: ``own`` ``[..., silenced]``, ``others`` (mean) and ``largest_other``.

    Raises:
        InputError: a silenced language of which there is no text.
    """
    check_kind("change", change, xr.DataArray, "an array [..., silenced, language], as perplexity_change gives it")
    for axis in ("silenced", "language"):
        if axis not in change.coords:
            raise InputError(f"change is [..., silenced, language] with labels on both; found {list(change.dims)}.")
    own, others, largest = [], [], []
    languages = change.coords["language"].values.tolist()
    rows = change.coords["silenced"].values.tolist()
    for row in rows:
        if row not in languages:
            raise InputError(
                f"There is no text of {row!r}: the matrix has columns for {', '.join(map(str, languages))}."
            )
        line = change.sel(silenced=row)
        rest = line.drop_sel(language=row)
        own.append(line.sel(language=row, drop=True))
        others.append(rest.mean("language"))
        largest.append(rest.max("language"))
    dim = xr.DataArray(rows, dims="silenced", name="silenced")
    return xr.Dataset(
        {
            name: xr.concat([part.drop_vars("silenced") for part in parts], dim)
            for name, parts in (("own", own), ("others", others), ("largest_other", largest))
        }
    )


def continuations(
    bridge: TransformerBridge,
    prompts: Sequence[str],
    neurons: Mapping[Any, Sequence[Neuron]],
    *,
    change: Callable[[Sequence[Neuron]], NeuronChange] = zero,
    max_new_tokens: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    assert_effect: bool = True,
) -> xr.DataArray:
    """How the model goes on with each prompt, as it is and with the neurons of each language silenced (or forced).

    Args:
        bridge: the model.
        prompts: texts to be continued.
        neurons: by language, its neurons.
        change: what is done to them.
        max_new_tokens: length of a continuation.
        do_sample: sample instead of taking the most probable token.
        temperature: of the sampling.
        seed: torch's, set before each set of continuations and restored after.
        assert_effect: raise if a change changed no neuron.

    Returns:
        ``[silenced, prompt]`` strings, without the prompts and special tokens (see ``token_text.tokens_to_text``); the first
        ``silenced`` is ``"none"``, the unmodified model.

    Raises:
        InputError: no prompts; neurons that the model does not have.
        NoEffectError: see ``assert_effect``.
    """
    prompts = check_texts("prompts", prompts)
    _languages(neurons)
    check_function("change", change, "a function from a list of neurons to a change, such as zero")
    check_count("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, above=0)
    if temperature != 1 and not do_sample:
        raise InputError(f"temperature={temperature} would have no effect: it is of the sampling, do_sample=True.")
    check_count("seed", seed, -(2**63), 2**64 - 1)  # what torch takes
    contexts: dict[str, AbstractContextManager[Any]] = {UNCHANGED: nullcontext()}
    for language, own in neurons.items():
        if str(language) in contexts:
            raise InputError(
                f"neurons: a language is called {language!r} twice, or {UNCHANGED!r}, which is the unmodified model."
            )
        changed = change(own)
        changed.check(bridge)  # before the first text is written
        contexts[str(language)] = changed.on(bridge, assert_effect=assert_effect)
    ids = [bridge.to_tokens(prompt) for prompt in prompts]
    texts = []
    for context in contexts.values():
        with torch.random.fork_rng(), context:
            torch.manual_seed(seed)
            texts.append([_continued(bridge, prompt, max_new_tokens, do_sample, temperature) for prompt in ids])
    return xr.DataArray(texts, {"silenced": list(contexts), "prompt": list(prompts)}, ("silenced", "prompt"), "text")


def _continued(bridge: TransformerBridge, prompt: Tensor, length: int, do_sample: bool, temperature: float) -> str:
    written = bridge.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=do_sample,
        temperature=temperature,
        return_type="tokens",
        verbose=False,
    )
    return tokens_to_text(bridge.tokenizer, written[0, prompt.shape[1] :].tolist())


def language_shares(texts: xr.DataArray, language_of: Callable[[str], str]) -> xr.DataArray:
    """In which languages continuations are.

    Args:
        texts: ``[silenced, prompt]``, of :func:`continuations`.
        language_of: from a text to a label; a classifier of the caller's.

    Returns:
        ``[silenced, generated]``: share of the prompts continued in each language.

    Raises:
        InputError: a label that is no string.
    """
    check_function("language_of", language_of, "a function from a text to the label of its language")
    check_kind("texts", texts, xr.DataArray, "an array [silenced, prompt], as continuations gives it")
    if set(texts.dims) != {"silenced", "prompt"} or not texts.size:
        raise InputError(f"texts is [silenced, prompt] and not empty; found {dict(texts.sizes)}.")
    labels = [[language_of(text) for text in row] for row in texts.transpose("silenced", "prompt").values.tolist()]
    wrong = [label for row in labels for label in row if not isinstance(label, str)]
    if wrong:
        raise InputError(f"language_of gives the label of a text, a string; it gave {wrong[0]!r}.")
    generated = sorted({label for row in labels for label in row})
    share = [[row.count(label) / len(row) for label in generated] for row in labels]
    coords = {"silenced": texts.coords["silenced"].values.tolist(), "generated": generated}
    return xr.DataArray(share, coords, ("silenced", "generated"), "share")


def _languages(neurons: Mapping[Any, Sequence[Neuron]]) -> list[Any]:
    """The languages that have a list of neurons."""
    rows = list(check_mapping("neurons", neurons, "each language to a list of (layer, neuron) pairs"))
    if not rows:
        raise InputError("neurons maps each language to a list of (layer, neuron) pairs; found no language.")
    for row in rows:
        if not isinstance(neurons[row], Collection) or isinstance(neurons[row], str):
            raise InputError(f"neurons[{row!r}] is a list of (layer, neuron) pairs; found {neurons[row]!r}.")
    return rows


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(
    bridge: TransformerBridge,
    text: Text,
    runs: Sequence[Sequence[NeuronEdit]],
    batch_size: int,
    average: Average,
    progress: bool | None,
) -> dict[str, list[_Sum]]:
    """By label, the losses under each of the edits, batch by batch so that the text is read once."""
    check_choice("average", average, ("tokens", "rows"))
    check_count("batch_size", batch_size)
    if not callable(getattr(text, "batches", None)):
        raise InputError(f"text is a Corpus, or has batches as one has; found {type(text).__name__}.")
    bridge.runner.refuse_training()
    sums: dict[str, list[_Sum]] = {}
    watched = Watched(bridge, "the measurement")
    with progress_bar(desc="perplexity", unit=" tokens", show=progress) as bar:
        for batch in corpus_pass(bridge, text.batches(batch_size), bar=bar):
            run = batch.positions
            assert run.tokens is not None
            counted = targets(run.tokens, run.attention_mask)
            totals = sums.setdefault(batch.rows.label, [_Sum() for _ in runs])
            if not bool(counted.any()):
                continue
            for edits, total in zip(runs, totals, strict=True):
                with bridge.hooks(fwd_hooks=[(edit.name, edit) for edit in edits]):
                    losses = next_token_loss(batch.run(), run.tokens, run.attention_mask, per_token=True)
                total.add(losses.cpu(), counted.cpu())
    watched.refuse_change()
    for label, totals in sums.items():
        if totals[0].tokens == 0:
            raise InputError(
                f"The text of {label!r} has no two real tokens next to each other: nothing can be predicted."
            )
    return sums
