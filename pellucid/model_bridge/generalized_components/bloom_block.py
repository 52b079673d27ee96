"""BLOOM's block and backbone: where a run begins and ends, and where hooks learn which positions they see.

Neither repeats Hugging Face's arithmetic: both call the forward that was there. The block adds what a run from or to a
layer needs, and remembers the residual before its first norm for the per-head inputs of attention. The backbone also sees
to it that a hooked forward is one: every point that was to fire has fired when it ends, and gradient checkpointing, which
runs blocks again during the backward pass, runs them with the hooks that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import GradientError, HookNotFiredError
from pellucid.hook_points import LensHandle
from pellucid.hook_values import describe_function
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, StopForward
from pellucid.model_bridge.generalized_components.block import BlockBridge
from pellucid.model_bridge.generalized_components.hf_arguments import by_name, given_cache
from pellucid.model_bridge.generalized_components.joint_qkv_attention import PRE_NORM
from pellucid.run_context import (
    RunContext,
    Scope,
    current_run,
    current_span,
    in_own_context,
    keep_finished,
    open_scopes,
    set_run,
    set_whole,
)

BRANCH_POINTS: tuple[tuple[str, str, str], ...] = (
    # site of the block, child, site of the child
    ("hook_attn_in", "attn", "hook_attn_in"),
    ("hook_q_input", "attn", "hook_q_input"),
    ("hook_k_input", "attn", "hook_k_input"),
    ("hook_v_input", "attn", "hook_v_input"),
    ("hook_attn_out", "attn", "hook_attn_out"),
    ("hook_resid_mid", "attn", "hook_out"),
    ("hook_mlp_in", "ln2", "hook_branch_in"),
    ("hook_mlp_out", "mlp", "hook_mlp_out"),
)
"""Points of a block that its branches fire."""

SHARED_TENSORS: tuple[tuple[str, str, str, str], ...] = (
    # child, its site, the component that fires the same tensor ("" for the block), its site
    ("ln1", "hook_in", "", "hook_in"),
    ("attn", "hook_in", "ln1", "hook_out"),
    ("ln2", "hook_in", "attn", "hook_out"),
    ("mlp", "hook_in", "ln2", "hook_out"),
    ("mlp", "hook_out", "", "hook_out"),
)
"""Sites where two components of a block meet at one tensor."""


_RETURNED_INPUTS: ContextVar[dict[int, Tensor] | None] = ContextVar("_RETURNED_INPUTS", default=None)
"""By layer, residuals that a hook returned in the place of what Hugging Face collects for ``output_hidden_states``.

``None`` where nothing is collected. Hugging Face keeps a block's input before it calls the block, so that an edit in place
was among its hidden states and a returned one was not.
"""


_TO_RUN_AGAIN: ContextVar[tuple[LensHandle, ...] | None] = ContextVar("pellucid_to_run_again", default=None)
"""In a hooked forward under gradient checkpointing: functions that have to be attached when its blocks are run again."""


class BloomBlockBridge(BlockBridge):
    """Stands for a Hugging Face ``BloomBlock``.

    Args:
        name: the module's name inside its parent, or ``"transformer.h"`` for the list of blocks.
        config: the bridge's configuration.
        submodules: ``ln1``, ``attn``, ``ln2``, ``mlp``.
        conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
    """

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        conversion_rule: BaseTensorConversion | None = None,
    ) -> None:
        super().__init__(name, config, submodules, conversion_rule)
        self.layer_index: int | None = None
        present = {"": self, **self.submodules}
        for site, child, child_site in BRANCH_POINTS:
            if child in present:
                self.link(site, present[child], child_site)
        for child, site, source, source_site in SHARED_TENSORS:
            if child in present and source in present:
                present[child].link(site, present[source], source_site)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """``hidden_states`` ``[batch, pos, d_model]`` and Hugging Face's keywords to ``(residual, pattern)``."""
        span = current_span()
        if self.layer_index is not None and span.start is not None and self.layer_index < span.start:
            return hidden_states, None
        original = self.original()
        # A residual that the run was given belongs to the caller.
        residual = self.fire("hook_in", hidden_states, private=span.start is not None)
        if self.layer_index is not None and self.layer_index == span.stop:
            raise StopForward(residual)
        if residual is not hidden_states:
            returned = _RETURNED_INPUTS.get()
            if returned is not None and self.layer_index is not None:
                returned[self.layer_index] = residual
        outputs: tuple[Any, ...]
        cfg = self.config
        if cfg is not None and (cfg.use_attn_in or cfg.use_split_qkv_input):
            # Attention's per-head inputs are switched on, which are copies of this block's residual.
            token = PRE_NORM.set((residual, self.module.input_layernorm))
            try:
                outputs = original(residual, *args, **kwargs)
            finally:
                PRE_NORM.reset(token)
        else:
            outputs = original(residual, *args, **kwargs)
        return (self.fire("hook_out", outputs[0]), *outputs[1:])


class BackboneBridge(GeneralizedComponent):
    """Stands for a Hugging Face ``BloomModel`` while anything in it is hooked: it has no points of its own.

    It tells hooks of a forward where in the sequence they are (``hook.run``), and puts the block inputs that hooks returned
    among the hidden states that Hugging Face collected.

    Attributes:
        expected_handles: ``(has_tokens)`` to the functions that act now and have to be called in a forward that begins; the
            bridge gives it.
    """

    expected_handles: Callable[[bool], list[LensHandle]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments, under the names of the installed release, to Hugging Face's output.

        Raises:
            HookNotFiredError: a point that was hooked did not fire.
        """
        call = partial(self.original(), *args, **kwargs)
        arguments = by_name(self.module, args, kwargs)
        run = self._run_of(arguments)
        if run is None:
            return call()
        collects = arguments.get("output_hidden_states")
        if collects is None:
            collects = self.module.config.output_hidden_states
        output = in_own_context(self._run, run, call, {} if collects else None)
        keep_finished(run)
        return output

    def _run_of(self, arguments: Mapping[str, Any]) -> RunContext | None:
        tokens: Tensor | None = arguments.get("input_ids")
        given: Tensor | None = tokens if tokens is not None else arguments.get("inputs_embeds")
        if given is None:
            return None  # Hugging Face refuses it
        cache, generation = given_cache(arguments), None if current_run() is not None else current_span().generation
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = arguments.get("attention_mask")
        if generation is None or generation.root is not self.root:
            return RunContext(given, past, tokens, mask, None)
        end = generation.prompt_end_of(cache, past, given.shape[1], tokens is None)
        return RunContext(given, past, tokens, mask, generation, end)

    def _run(self, run: RunContext, call: Callable[[], Any], returned: dict[int, Tensor] | None) -> Any:
        if current_run() is not None:
            set_whole()  # called inside another forward (by a torch hook, say): a run of its own
        set_run(run)
        _RETURNED_INPUTS.set(returned)
        expected = self.expected_handles(run.tokens is not None)
        backbone = self.module
        if backbone.gradient_checkpointing and backbone.training and torch.is_grad_enabled():
            output = _with_hooks_in_recomputation(backbone, expected, call)
        else:
            output = call()
        refuse_unfired(expected, run)
        return _with_returned_inputs(output, returned) if returned else output


def _with_returned_inputs(output: Any, returned: Mapping[int, Tensor]) -> Any:
    """Hugging Face's output with its hidden states those that the blocks were given.

    Args:
        output: an output object, or a tuple where ``return_dict`` is off.
        returned: the residual that a hook returned, by layer.
    """
    if isinstance(output, tuple):
        # Nothing before the hidden states is a tuple: the last residual, and a cache if there is one.
        place = next(place for place, part in enumerate(output) if isinstance(part, tuple))
        return (*output[:place], _replaced(output[place], returned), *output[place + 1 :])
    output.hidden_states = _replaced(output.hidden_states, returned)
    return output


def _replaced(hidden_states: tuple[Tensor, ...], returned: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    return tuple(returned.get(layer, residual) for layer, residual in enumerate(hidden_states))


def refuse_unfired(expected: Sequence[LensHandle], run: RunContext) -> None:
    """See that every function that was to be called in ``run`` was reached.

    Raises:
        HookNotFiredError: see above.
    """
    for handle in expected:
        if handle.point not in run.fired and handle.is_attached():
            raise not_fired(handle)


def not_fired(handle: LensHandle) -> HookNotFiredError:
    """What is wrong when a forward has passed the place of ``handle`` without calling it."""
    return HookNotFiredError(
        f"{handle.name} was hooked ({describe_function(handle.user_hook)}), and this forward ended without firing it: the "
        "module it stands on was not called, or called in another thread (to which a block or run does not reach), or its "
        "forward was replaced while the hook was on. The logits are those of a model that was not hooked there. "
        "bridge.verify() shows which hooks are alive; remove hooks before wrapping a module, and wrap it before hooking."
    )


def _with_hooks_in_recomputation(backbone: nn.Module, expected: Sequence[LensHandle], call: Callable[[], Any]) -> Any:
    """Run a forward under gradient checkpointing, whose blocks are run again during ``backward()``.

    Autograd does that in whichever thread it likes (on a GPU always in one of its own), where no block of hooks is open, so
    each block takes its context with it.
    """
    _TO_RUN_AGAIN.set(tuple(expected))  # in the context of this forward alone
    wrapped = {}
    try:
        for module in backbone.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(
                checkpoint, _Recomputation
            ):  # else another's, or left: it serves
                wrapped[module] = vars(module)["_gradient_checkpointing_func"] = _Recomputation(checkpoint)
        return call()
    finally:
        for module, wrapper in wrapped.items():
            if vars(module).get("_gradient_checkpointing_func") is wrapper:
                vars(module)["_gradient_checkpointing_func"] = wrapper.checkpoint


class _Recomputation:
    """A checkpointing function that runs a block the second time with the hooks of the first.

    Args:
        checkpoint: the model's own; in a forward that is not hooked (an interrupt left this object) nothing else happens.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        handles = _TO_RUN_AGAIN.get()
        if handles is None:
            return self.checkpoint(function, *args, **kwargs)
        closed = frozenset(
            scope for scope in open_scopes() if scope.closed
        )  # of a block that ended before this forward
        return self.checkpoint(partial(self._run, copy_context(), closed, handles, function), *args, **kwargs)

    @staticmethod
    def _run(
        context: Context,
        closed: frozenset[Scope],
        handles: tuple[LensHandle, ...],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ended = any(scope.closed and scope not in closed for scope in context.run(open_scopes))
        if ended or not all(handle.is_attached() for handle in handles):
            raise GradientError(
                "Gradient checkpointing runs the forward again during backward(), and hooks of this run are gone by then: "
                "its gradients would not be those of the hooked model. Use `with bridge.hooks(...):` around forward and "
                "backward, or switch gradient checkpointing off."
            )
        return context.copy().run(function, *args, **kwargs)
