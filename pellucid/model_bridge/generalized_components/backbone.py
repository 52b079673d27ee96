"""The backbone: where hooks of a forward learn which positions they see, and where it is seen that every one was called.

It repeats none of Hugging Face's arithmetic: it calls the forward that was there. A hooked forward is one: every point that
was to fire has fired when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import HookNotFiredError
from pellucid.hook_points import LensHandle
from pellucid.hook_values import describe_function
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.model_bridge.generalized_components.checkpointing import with_hooks_in_recomputation
from pellucid.model_bridge.generalized_components.hf_arguments import by_name, given_cache
from pellucid.run_context import (
    ReturnedInputs,
    RunContext,
    current_run,
    current_span,
    in_own_context,
    keep_finished,
    set_returned_inputs,
    set_run,
    set_whole,
)


class BackboneBridge(GeneralizedComponent):
    """Stands for a Hugging Face backbone (``BloomModel``, ``LlamaModel``) while anything in it is hooked: it has no points
    of its own.

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
        end = generation.prompt_end_of(cache, past, given, tokens)
        return RunContext(given, past, tokens, mask, generation, end)

    def _run(self, run: RunContext, call: Callable[[], Any], returned: ReturnedInputs | None) -> Any:
        if current_run() is not None:
            set_whole()  # called inside another forward (by a torch hook, say): a run of its own
        set_run(run)
        set_returned_inputs(returned)
        expected = self.expected_handles(run.tokens is not None)
        backbone = self.module
        if backbone.gradient_checkpointing and backbone.training and torch.is_grad_enabled():
            output = with_hooks_in_recomputation(backbone, expected, call)
        else:
            output = call()
        refuse_unfired(expected, run)
        return _with_returned_inputs(output, returned) if returned else output


def _with_returned_inputs(output: Any, returned: ReturnedInputs) -> Any:
    """Hugging Face's output with its hidden states those that the blocks were given.

    Args:
        output: an output object, or a tuple where ``return_dict`` is off.
        returned: what blocks were given, and what hooks returned in its place.
    """
    if isinstance(output, tuple):
        # Nothing before the hidden states is a tuple: the last residual, and a cache if there is one.
        place = next(place for place, part in enumerate(output) if isinstance(part, tuple))
        return (*output[:place], _replaced(output[place], returned), *output[place + 1 :])
    output.hidden_states = _replaced(output.hidden_states, returned)
    return output


def _replaced(hidden_states: tuple[Tensor | None, ...], returned: ReturnedInputs) -> tuple[Tensor | None, ...]:
    """Hidden states in which each tensor that a block was given is the one that it used.

    They are found by the tensor itself: where a hook calls a block by hand, Hugging Face collects that too, and the others
    move up. A block on another device was given a copy, which is found by its place; places that were not asked for
    (``output_hidden_states=[2]``) stay empty.
    """
    found = list(hidden_states)
    places = {id(tensor): place for place, tensor in enumerate(hidden_states)}
    for layer, (given, residual) in returned.items():
        place = places.get(id(given), layer)
        if found[place] is not None:
            found[place] = residual
    return tuple(found)


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
