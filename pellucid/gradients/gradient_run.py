"""One run whose activations stay in autograd's graph, and as many backward passes through it as a method needs.

1. The model runs up to its final norm with functions on hook points: one begins the graph at the embedding (parameters may
   be frozen; nothing before is differentiated), others keep activations as they go on, the rules of
   :mod:`pellucid.gradients.rules` stand where they are asked for.
2. The final norm and the unembedding run on the positions that the metric reads alone: with a large vocabulary, unembedding
   every position would cost as much as the blocks do.
3. Each backward pass is of the sum of the rows' scores. A row's activations depend on that row alone, so that each row's
   gradients are its own.

The forward's bits are those of any run with functions on the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_kind, check_mapping
from pellucid.errors import GradientError, InputError
from pellucid.gradients.rules import Switch, layer_gates, refuse_rules, rule_hooks
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import BEFORE_BLOCKS
from pellucid.sweep.lazy_logits import Asked, Cells, LazyLogits, plain
from pellucid.sweep.metrics import KLDivergence, Metric, Normalized
from pellucid.sweep.scoring import MetricLike, check_metrics
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields

INTEGER_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Where torch keeps modules that compute in integers."""

Hook = tuple[str, Callable[..., Any]]

ZERO_DIVERGENCE = 1e-6
"""A KL divergence below is that of a run from itself, up to rounding in float32."""


@dataclass(frozen=True, eq=False, repr=False)
class GradientRun(BriefFields):
    """A run in autograd's graph.

    Attributes:
        scores: ``[row]``, the metric, in the graph.
        activations: by the name that was asked for, ``[row, ...]``, in the graph: not to be written to.
        switch: what the next backward pass goes through.
    """

    scores: Float[Tensor, " row"]
    activations: Mapping[str, Float[Tensor, "row ..."]]
    switch: Switch

    def gradients(
        self,
        hooks: Iterable[str] | None = None,
        *,
        rules: bool = False,
        without_layer: int | None = None,
        last: bool = False,
    ) -> dict[str, Float[Tensor, "row ..."]]:
        """What flows back from each row's score to its activations, in one backward pass.

        Args:
            hooks: of these; by default of all that were kept.
            rules: by RelP's rules, not by the gradient; the run has to have been made with them.
            without_layer: nothing flows back through what attention and MLP of this layer add to the stream (GradDrop); the
                run has to have been made with gates.
            last: no backward pass follows: what the graph holds is let go of on the way, and its memory taken for the
                gradients.

        Returns:
            By name, ``[row, ...]`` as the activation is; zeros where nothing flows back.

        Raises:
            InputError: a point that was not kept, a way back that the run was made without, or the run had its last pass.
        """
        if self.switch.has_ended:
            raise InputError(
                "This run had its last backward pass (last=True), and its graph is gone: give last=True at the last "
                "call alone, or make the run again."
            )
        names = list(self.activations if hooks is None else hooks)
        lacking = [name for name in names if name not in self.activations]
        if lacking:
            raise InputError(f"{lacking[0]} was not kept by this run: name it in run_with_gradients(..., hooks=).")
        with self.switch.set(rules, without_layer):
            self.switch.has_ended = last  # before: an interrupted pass has let go of a part
            found = torch.autograd.grad(
                self.scores.sum(), [self.activations[name] for name in names], retain_graph=not last, allow_unused=True
            )
        return {
            name: torch.zeros_like(self.activations[name]) if gradient is None else gradient
            for name, gradient in zip(names, found, strict=True)
        }


def run_with_gradients(
    unedited: Unedited,
    metric: MetricLike,
    hooks: Iterable[str],
    *,
    instead: Mapping[str, Float[Tensor, "row ..."]] | None = None,
    rules: bool = False,
    gates: bool = False,
) -> GradientRun:
    """Run an input once, its activations in the graph.

    Functions that are on the bridge act, as in any run.

    Args:
        unedited: the input, and the model, in eval mode.
        metric: one of :mod:`pellucid.sweep`, or a function of logits ``[row, pos, d_vocab]`` that gives a number a row.
        hooks: the points whose activations are kept; opt-in ones have to be on.
        instead: by hook, what goes on in the place of an activation, ``[row, ...]``: a point of a path, say.
        rules: make :meth:`GradientRun.gradients` with ``rules=True`` possible.
        gates: make ``without_layer=`` possible.

    Raises:
        InputError: a metric that cannot be read of this input, or gives one number for several rows.
        GradientError: a metric, or a model, through which no gradient flows.
        UnsupportedModelError: rules for a family that has a module without one.
    """
    check_kind("unedited", unedited, Unedited, "an input of the model: read_prompts(bridge, prompt).unedited(bridge)")
    check_mapping("instead", {} if instead is None else instead, "hook points to what goes on in their place")
    bridge, n_layers = unedited.bridge, unedited.bridge.cfg.n_layers
    bridge.runner.refuse_training()
    _refuse_integers(bridge)
    check_metrics({"metric": metric}, unedited.tokens, unedited.attention_mask, bridge.cfg.d_vocab, None)
    if rules:
        refuse_rules(bridge)
    switch, kept, starts = Switch(), dict[str, Tensor](), dict(instead or {})
    asked = list(dict.fromkeys(hooks))
    first = _earliest(bridge, asked)
    block_hooks, head_hooks = rule_hooks(bridge, switch) if rules else ([], [])

    def begin(tensor: Tensor, hook: Any) -> Tensor:
        given = starts.get(hook.name)
        value = tensor if given is None else given.to(tensor)
        if value.shape != tensor.shape:
            raise InputError(f"{hook.name} is {list(tensor.shape)}; what is to go on instead is {list(value.shape)}.")
        return value.detach().clone().requires_grad_()

    def keep(tensor: Tensor, hook: Any) -> None:
        kept[hook.name] = tensor

    begins = dict.fromkeys([*(first or ["blocks.0.hook_resid_pre"]), *starts])
    functions: list[Hook] = [(name, begin) for name in begins]
    functions += block_hooks
    functions += [(name, keep) for name in asked]
    functions += layer_gates(bridge, switch) if gates else []
    with torch.enable_grad():
        final = bridge.run_with_hooks(**unedited.input, fwd_hooks=functions, stop_at_layer=n_layers)
        scores = _scores(unedited, metric, final, head_hooks)
    return GradientRun(_checked(scores, unedited, metric, kept), {name: kept[name] for name in asked}, switch)


def _refuse_integers(bridge: TransformerBridge) -> None:
    """torch's own quantised modules give zeros to the backward pass, with no more than a warning.

    Raises:
        GradientError: there is one, with its name.
    """
    for path, module in bridge.hf_model.named_modules():
        if type(module).__module__.startswith(INTEGER_MODULES):
            raise GradientError(
                f"{path} is quantised ({type(module).__qualname__} of {type(module).__module__}): it computes in integers, "
                "and no gradient flows through it. Take the model before it was quantised."
            )


def _earliest(bridge: TransformerBridge, asked: Iterable[str]) -> list[str]:
    """Of points before the blocks, those that none of the others feeds: one of the tokens, and one of their positions."""
    names = {bridge.hook_spec(name).name for name in asked}
    before = [spec for spec in bridge.hook_index.values() if spec.name in names and spec.component in BEFORE_BLOCKS]
    of_positions = [spec.name for spec in before if spec.component == "pos_embed"]
    return [*[spec.name for spec in before if spec.component != "pos_embed"][:1], *of_positions[:1]]


def _scores(unedited: Unedited, metric: MetricLike, final: Tensor, head_hooks: list[Hook]) -> Any:
    """What the metric gives, in the graph of ``final`` ``[row, pos, d_model]``, what leaves the last layer."""
    bridge, tokens, mask = unedited.bridge, unedited.tokens, unedited.attention_mask

    def logits_at(columns: Tensor) -> Tensor:
        """``[row, read, d_vocab]`` of ``[row, read]``."""
        rows = torch.arange(final.shape[0], device=final.device)[:, None]
        read = final[rows, columns.to(final.device)]
        logits: Tensor = bridge.run_with_hooks(read, fwd_hooks=head_hooks, start_at_layer=bridge.cfg.n_layers)
        return logits

    if isinstance(metric, Metric):
        bound = metric.bound(tokens, mask)
        reads = bound.reads(tokens, mask)
        cells = logits_at(reads.columns)
        if reads.tokens is not None:
            cells = cells[..., torch.tensor(reads.tokens, device=cells.device)]
        return bound.score(cells[None], reads)[0]
    shape = (*tokens.shape, bridge.cfg.d_vocab)

    def fetch(asked: Asked, index: Any) -> Tensor:
        columns = sorted(asked.columns)
        numbers = logits_at(torch.tensor(columns).expand(len(tokens), -1))
        return Cells(numbers, columns, None, shape).fetch(asked, index)

    return plain(metric(LazyLogits(shape, bridge.dtype, bridge.device, fetch)))


def _checked(scores: Any, unedited: Unedited, metric: MetricLike, kept: Mapping[str, Tensor]) -> Tensor:
    """``[row]``, in the graph.

    Raises:
        InputError: something else.
        GradientError: it is in no graph.
    """
    rows = len(unedited.tokens)
    name = type(metric).__name__ if isinstance(metric, Metric) else repr(metric)
    if not isinstance(scores, Tensor) or not scores.requires_grad:
        found = "a tensor that is in no graph" if isinstance(scores, Tensor) else type(scores).__name__
        raise GradientError(
            f"The metric {name} has no gradient: it gave {found}. An argmax, a rank, .item(), .detach() or a comparison "
            "ends the graph: take a difference of logits, a log-probability or a loss. (A module that computes in integers, "
            "such as torch's dynamic int8, ends it too: take the model before it was quantised.)"
        )
    if scores.numel() == 1 and rows == 1:
        return scores.reshape(1)
    if scores.shape != (rows,):
        raise InputError(
            f"The metric {name} gives {list(scores.shape)} for {rows} rows, and an attribution is each row's own: let it "
            "give one number a row, [row]."
        )
    cut = [hook for hook, tensor in kept.items() if not tensor.requires_grad and tensor.is_floating_point()]
    if cut:
        raise GradientError(
            f"No gradient flows through {cut[0]}: a module before it computes in integers or without autograd. Take the "
            "model before it was quantised."
        )
    return scores


def refuse_zero_gradient(metric: MetricLike, scores: Float[Tensor, " row"]) -> None:
    """A divergence has its minimum where the run is the reference: nothing flows back from there.

    Raises:
        GradientError: it is at its minimum.
    """
    while isinstance(metric, Normalized):
        zero, one = (torch.as_tensor(end).to(scores) for end in (metric.zero, metric.one))
        scores, metric = scores * (one - zero) + zero, metric.metric
    if isinstance(metric, KLDivergence) and bool((scores.abs() < ZERO_DIVERGENCE).any()):
        raise GradientError(
            "KLDivergence is 0 at the run that is patched, which is its reference, and its gradient is zero there: nothing "
            "can be attributed. Take the other direction, so that the other prompt's run is patched, or a difference of "
            "logits."
        )
