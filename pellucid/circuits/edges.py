"""Edge attribution patching: what patching each edge would change, estimated for all edges at once.

For an edge from ``u`` to ``v``, the estimate of the change of the metric *in the base run* when what ``v`` reads of ``u`` is
taken from the source run:

    ``score(u, v) = sum over positions of (u(source) - u(base)) . dM/d input_v``

which is the sign of attribution patching and of :mod:`pellucid.experiments.path_patching` (``value="change"``). With
``direction="noising"`` the base run is the clean one: an edge that the behaviour needs has a score that takes the metric
from its clean value towards the corrupted one. EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient at the base run,
EAP-IG (Hanna et al. 2024, arXiv 2403.17806) its mean over points of the path between the two embeddings.

1. The source run is made, and what parts write kept, small: ``z`` and the outputs of MLPs.
2. The base run, or a point of the path, is made in autograd's graph, and one backward pass taken through it.
3. Both ends of the edges are made of these (:mod:`pellucid.circuits.ends`), the inputs one block at a time, and contracted.

So nothing of the size edges x positions x width exists; what is largest is ``[row, sender, pos, d_model]``, and rows run
together as memory allows. Positions before the first token in which the two prompts differ are left out: nothing differs
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pellucid.arguments import check_memory_limit
from pellucid.attribution.streaming import PairStream, PassState, Resuming, metric_identity
from pellucid.circuits.circuit import Circuit
from pellucid.circuits.ends import Ends, bytes_of_a_row, contracted, refuse_functions, wiring_of
from pellucid.circuits.options import EdgeChoices, Method, Rule
from pellucid.circuits.path_points import path_points
from pellucid.circuits.scores import EdgeScores
from pellucid.circuits.wiring import Wiring
from pellucid.corpora.pairs import PromptPairs
from pellucid.errors import GradientError, InputError
from pellucid.experiments.labelled import about_metrics
from pellucid.experiments.options import Direction, documented, option
from pellucid.experiments.pairs import PairBatch, PairMetric, check_pairs, pair_batches
from pellucid.experiments.places import Prompts, about_run
from pellucid.gradients import refuse_zero_gradient, run_with_gradients
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json
from pellucid.tables import BriefFields

SENDERS_TOGETHER = 256 * 2**20
"""Bytes of ``[row, sender, pos, d_model]`` beyond which rows do not run together; a row is never cut."""

MOST_ROWS = 16


@documented()
@dataclass(frozen=True, eq=False, repr=False)
class EdgeAttribution(EdgeChoices, BriefFields):
    """Scores of every edge over a data set of pairs of prompts; see the top of this module for sign and expansion point.

    Attributes:
        bridge: the model, in eval mode.
        pairs: the prompts.
        metric: what is measured: see :data:`~pellucid.experiments.pairs.PairMetric`; by default the logit difference of
            answer and foil, or without foils the log-probability of the answer.

    Raises:
        InputError: a word that an option does not know, or a number out of range.
    """

    bridge: TransformerBridge
    pairs: PromptPairs
    metric: PairMetric | None = None
    _: KW_ONLY
    memory_limit: int | None = option(
        None,
        "Of the scores of all pairs, beyond which the means of blocks of pairs are kept; by default half of what is "
        "available.",
        bytes=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairs(self.pairs, self.metric)
        check_memory_limit(self.memory_limit)

    def run(
        self, *, progress: bool | None = None, checkpoint: str | Path | None = None, every: float = 60.0
    ) -> Circuit:
        """The circuit of all edges, with their scores.

        Args:
            progress: show a bar on standard error; by default on a terminal.
            checkpoint: a folder for the state: the same call goes on from it after an interrupt, with equal bits.
            every: seconds between states.

        Raises:
            InputError: prompts of different numbers of tokens, an answer that is not one token, a metric that gives one
                number for many rows, a model in training mode, functions between the stream and a projection.
            GradientError: a metric without gradient, or whose gradient is zero at the base run.
            UnsupportedModelError: the residual stream is not the sum of what parts add to it.
            OtherJobError: the folder holds a state of another job.
        """
        resuming = Resuming(checkpoint, every)
        bridge, wiring = self.bridge, wiring_of(self.bridge)
        refuse_functions(bridge)
        batches = batches_of(bridge, wiring, self.pairs, self.metric, self.batch_size)
        settings = {} if checkpoint is None else self._settings()
        stream = PairStream(bridge, "edge attribution", settings, resuming, progress)
        kept = _Kept(stream.state, wiring, len(self.pairs), bridge.dtype, self.memory_limit)
        ends = Ends(bridge, wiring)
        with stream.running(len(self.pairs)):
            for batch in stream.left("scored", batches):
                kept.add(batch.rows, *self._scored(ends, batch))
        if not kept.flowed:
            raise GradientError(
                f"The gradient of the metric is zero at the {'clean' if self.direction == 'noising' else 'corrupted'} run, "
                "so every score is zero: a KL divergence from that very run has its minimum there. Take a logit difference, "
                "the other direction, or method='eap-ig'."
            )
        values, sizes = kept.blocks()
        return Circuit.whole(EdgeScores(wiring, values, sizes, self._about(batches[0])))

    def _scored(self, ends: Ends, batch: PairBatch) -> tuple[Tensor, bool]:
        """``[row, edge]``, and whether any gradient flows."""
        prompts = (batch.clean, batch.corrupted)
        base, source = prompts if self.direction == "noising" else prompts[::-1]
        unedited, other = base.unedited(self.bridge), source.unedited(self.bridge)
        there = other.observe(ends.writing_hooks).activations
        here: Mapping[str, Tensor] | None = None
        total: Tensor | None = None
        flowed = False
        first = _first_difference(base, source)
        embed = self.bridge.hook_spec("hook_embed").name
        points = path_points(self.method, self.points, self.rule)
        if points != [(1.0, 1.0)]:
            here = unedited.observe(ends.writing_hooks).activations
        sent: Tensor | None = None
        for at, weight in points:
            instead = None if here is None else {embed: there[embed] + at * (here[embed] - there[embed])}
            hooks = list(dict.fromkeys([*ends.gradient_hooks, *(ends.writing_hooks if here is None else [])]))
            run = run_with_gradients(unedited, batch.metric, hooks, instead=instead)
            if instead is None:
                refuse_zero_gradient(batch.metric, run.scores)
            gradients = _from(first, run.gradients(ends.gradient_hooks, last=True))
            values = _from(first, {name: value.detach() for name, value in run.activations.items()})
            del run
            with torch.no_grad():
                if sent is None:  # the same at every point
                    sent = ends.differences(_from(first, there), values if here is None else _from(first, here))
                flowed = flowed or bool(ends.at_the_end(gradients).any())
                found = weight * self._contracted(ends, sent, gradients, values)
            total = found if total is None else total + found
        assert total is not None
        return total, flowed

    def _contracted(
        self, ends: Ends, sent: Tensor, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """``[row, edge]``: the inputs of one block after the other, with the senders before them."""
        wiring, number, parts = ends.wiring, 0, []
        for layer in range(wiring.n_layers):
            flows = ends.flows_back(layer, gradients, ends.residual(layer, values))
            count = flows.shape[1]
            reached = wiring.reached[number : number + count]
            for some, until in ((flows[:, :-1], reached[0]), (flows[:, -1:], reached[-1])):
                parts.append(contracted(sent[:, :until], some).flatten(1))
            number += count
        parts.append(contracted(sent, ends.at_the_end(gradients)).flatten(1))
        return torch.cat(parts, 1)

    def _about(self, batch: PairBatch) -> dict[str, Any]:
        base, source = ("clean", "corrupted") if self.direction == "noising" else ("corrupted", "clean")
        ig = {"points": self.points, "rule": self.rule} if self.method == "eap-ig" else {}
        return about_run(
            self.bridge,
            "edge attribution",
            method=self.method,
            **ig,
            direction=self.direction,
            base_run=base,
            sign=f"estimated change of the metric in the {base} run when the edge is patched from the {source} run",
            pairs=self.pairs.name,
            n_pairs=len(self.pairs),
            prompts=self.pairs.content_hash,
            **about_metrics(batch.metric, "change"),
        )

    def _settings(self) -> dict[str, Json]:
        """All that the scores depend on beside the model."""
        ig: dict[str, Json] = {"points": self.points, "rule": self.rule} if self.method == "eap-ig" else {}
        return {
            "method": self.method,
            **ig,
            "direction": self.direction,
            "batch_size": self.batch_size,
            "memory_limit": self.memory_limit,
            "pairs_sha256": self.pairs.content_hash,
            "metric": metric_identity(self.metric),
        }


@documented(EdgeAttribution)
def edge_attribution(
    bridge: TransformerBridge,
    pairs: PromptPairs,
    metric: PairMetric | None = None,
    *,
    method: Method = "eap",
    direction: Direction = "noising",
    points: int = 5,
    rule: Rule = "gauss-legendre",
    batch_size: int | None = None,
    memory_limit: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
) -> Circuit:
    """Run :class:`EdgeAttribution`: the circuit of all edges of a model, with their scores over pairs of prompts.

    Arguments are its fields; ``progress``, ``checkpoint`` and ``every`` those of its ``run``.

    Raises:
        InputError: see :meth:`EdgeAttribution.run`.
        GradientError: the same.
        UnsupportedModelError: the same.
        OtherJobError: the same.
    """
    return EdgeAttribution(
        bridge,
        pairs,
        metric,
        method=method,
        direction=direction,
        points=points,
        rule=rule,
        batch_size=batch_size,
        memory_limit=memory_limit,
    ).run(progress=progress, checkpoint=checkpoint, every=every)


def batches_of(
    bridge: TransformerBridge,
    wiring: Wiring,
    pairs: PromptPairs,
    metric: PairMetric | None,
    batch_size: int | None,
) -> list[PairBatch]:
    """The batches of a data set, by default of as many rows as :data:`SENDERS_TOGETHER` lets run together."""
    if batch_size is not None:
        return pair_batches(bridge, pairs, metric, batch_size)
    batches = pair_batches(bridge, pairs, metric, MOST_ROWS)
    longest = max(batch.clean.length for batch in batches)
    together = max(1, SENDERS_TOGETHER // bytes_of_a_row(bridge, wiring, longest))
    return batches if together >= MOST_ROWS else pair_batches(bridge, pairs, metric, together)


def _first_difference(base: Prompts, source: Prompts) -> int:
    """The first column at which a row's prompts differ: before it, nothing of the two runs does."""
    return min(base.differing(source), default=base.length - 1)


def _from(first: int, run: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:, first:] for name, tensor in run.items()}


class _Kept:
    """Scores of all pairs, or the means of blocks of them where those would take too much memory.

    They are sums until the end, in the state of a pass, which may have been begun before: then with as many blocks.
    """

    def __init__(
        self, state: PassState, wiring: Wiring, n_pairs: int, dtype: torch.dtype, memory_limit: int | None
    ) -> None:
        self._state = state.tensors
        if "sums" not in self._state:
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            blocks = _blocks(len(wiring) * wide.itemsize, n_pairs, memory_limit)
            self._state["sums"] = torch.zeros(blocks, len(wiring), dtype=wide)
            self._state["sizes"] = torch.zeros(blocks, dtype=torch.int64)
            self._state["flowed"] = torch.zeros(1, dtype=torch.int64)
        self._block = -(-n_pairs // len(self._state["sums"]))

    @property
    def flowed(self) -> bool:
        """Whether any gradient did."""
        return bool(self._state["flowed"])

    def add(self, rows: tuple[int, ...], found: Tensor, flows: bool) -> None:
        """Take ``[row, edge]`` of these rows of the data set, and whether gradients flow."""
        for row, scores in zip(rows, found.cpu(), strict=True):
            self._state["sums"][row // self._block] += scores
            self._state["sizes"][row // self._block] += 1
        self._state["flowed"] += flows

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """``[block, edge]``, ``[block]``."""
        sums, sizes = self._state["sums"].numpy(), self._state["sizes"].numpy()
        return sums / sizes[:, None].astype(sums.dtype), sizes


def _blocks(each: int, n_pairs: int, memory_limit: int | None) -> int:
    """How many blocks of pairs are kept, of ``each`` bytes; they are of one size, but for the last.

    Raises:
        InputError: not even two fit.
    """
    limit = memory_limit if memory_limit is not None else int(psutil.virtual_memory().available) // 2
    fit = min(n_pairs, limit // each)
    if fit < min(n_pairs, 2):
        raise InputError(
            f"The scores of all edges take {each:,} bytes a pair, and two have to be kept; memory_limit={limit:,}. Give "
            "more."
        )
    return -(-n_pairs // -(-n_pairs // fit))
