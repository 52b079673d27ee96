"""BLOOM's block and backbone: where a run begins and ends, and where hooks learn which positions they see.

Neither repeats Hugging Face's arithmetic: both call the forward that was there. The block adds what a run from or to a
layer needs, and remembers the residual before its first norm for the per-head inputs of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, StopForward
from pellucid.model_bridge.generalized_components.block import BlockBridge
from pellucid.model_bridge.generalized_components.joint_qkv_attention import PRE_NORM
from pellucid.run_context import RunContext, begin_run, current_span, end_run, is_quiet, keep_finished

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
        if is_quiet():
            return self.call_original(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        span = current_span()
        if self.layer_index is not None and span.start is not None and self.layer_index < span.start:
            return hidden_states, None
        engine, points = self.engine, self._points
        original = self.module if engine is None else engine.forward  # as original() does, a call less
        # A residual that the run was given belongs to the caller.
        given = span.start is not None
        residual = points["hook_in"].fire(hidden_states, private=given) if "hook_in" in points else hidden_states
        if self.layer_index is not None and self.layer_index == span.stop:
            raise StopForward(residual)
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
        if "hook_out" not in points:
            return outputs
        return (points["hook_out"].fire(outputs[0]), *outputs[1:])


class BackboneBridge(GeneralizedComponent):
    """Stands for a Hugging Face ``BloomModel`` while anything in it is hooked: it has no points of its own.

    It tells hooks of a forward where in the sequence they are (``hook.run``), and counts the steps of ``generate``.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        engine = self.engine  # as original() does: on the way of every hooked forward, a call less
        original = self.module if engine is None else engine.forward
        given = input_ids if input_ids is not None else inputs_embeds
        run = token = None
        if given is not None and not is_quiet():
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            generation = current_span().generation
            if generation is not None:
                generation.step += 1
            run = RunContext(given, past, input_ids, attention_mask, generation)
            token = begin_run(run)
        try:
            return original(
                input_ids=input_ids,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        finally:
            if token is not None:
                keep_finished(run)
                end_run(token)
