"""A transformer block: residual in, residual out, and where a run from or to a layer begins and ends.

It repeats none of Hugging Face's arithmetic: it calls the forward that was there, and remembers the residual before its
first norm for the per-head inputs of attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site, StopForward
from pellucid.model_bridge.generalized_components.normalization import NormalizationBridge
from pellucid.model_bridge.generalized_components.split_inputs import PRE_NORM
from pellucid.run_context import current_span, returned_inputs
from pellucid.tables import ranges

Link: TypeAlias = tuple[str, str, str, str]
"""A child of a block (``""`` for the block), its site, the component that fires the same tensor, and its site there."""


class Blocks(list[GeneralizedComponent]):
    """The blocks of a model, shown as one: they have the same hook points."""

    def __repr__(self) -> str:
        first = f"; the first:\n{self[0]!r}" if self else ""
        return f"{len(self)} blocks, {ranges(set(range(len(self))))}{first}"

    def _repr_html_(self) -> str:
        return f"<div>{len(self)} blocks; the first:</div>" + (self[0]._repr_html_() if self else "")


class BlockBridge(GeneralizedComponent):
    """Stands for a block; its points and its branches' have TransformerLens' names.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        submodules: ``ln1``, ``attn``, ``ln2``, ``mlp`` and whatever else it has.
        conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
        links: where its children meet at one tensor; links of children that are not there are left out.
        gives_tuple: whether Hugging Face's block gives ``(residual, ...)``, not the residual alone.

    Attributes:
        layer_index: which block of the model it is, ``None`` outside one.
    """

    hook_attn_in = Site("``attn.hook_attn_in``")
    hook_q_input = Site("``attn.hook_q_input``")
    hook_k_input = Site("``attn.hook_k_input``")
    hook_v_input = Site("``attn.hook_v_input``")
    hook_attn_out = Site("``attn.hook_attn_out``")
    hook_resid_mid = Site("the residual between attention and MLP; feeds both the MLP branch and the stream")
    hook_mlp_in = Site("a copy of ``hook_resid_mid`` that feeds the MLP branch only (opt-in)")
    hook_mlp_out = Site("``mlp.hook_mlp_out``")

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        conversion_rule: BaseTensorConversion | None = None,
        links: Iterable[Link] = (),
        gives_tuple: bool = False,
    ) -> None:
        super().__init__(name, config, submodules, conversion_rule)
        self.gives_tuple = gives_tuple
        self.layer_index: int | None = None
        present: dict[str, GeneralizedComponent] = {"": self, **self.submodules}
        for child, site, source, source_site in links:
            if child in present and source in present:
                present[child].link(site, present[source], source_site)

    @property
    def hook_resid_pre(self) -> HookPoint:
        """The residual that enters the block: ``hook_in``."""
        return self.hook_in

    @property
    def factor(self) -> float:
        """What a branch's output is multiplied with before it is added to the stream."""
        return 1.0

    @property
    def hook_resid_post(self) -> HookPoint:
        """The residual that leaves the block: ``hook_out``."""
        return self.hook_out

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``hidden_states`` ``[batch, pos, d_model]`` and Hugging Face's arguments to Hugging Face's output."""
        span = current_span()
        begins = False
        if self.layer_index is not None and span.start is not None:
            if self.layer_index < span.start:
                return (hidden_states, None) if self.gives_tuple else hidden_states
            begins = self.layer_index == span.start
        original = self.original()
        entering = hidden_states
        if begins and span.residual is not None:  # what Hugging Face made of it before the blocks is not it (GPT-2)
            entering = span.residual.to(hidden_states.device)
        # A residual that the run was given belongs to the caller.
        residual = self.fire("hook_in", entering, copy_before_edit=begins)
        if self.layer_index is not None and self.layer_index == span.stop:
            raise StopForward(residual)
        if residual is not hidden_states:
            returned = returned_inputs()
            if returned is not None and self.layer_index is not None:
                returned[self.layer_index] = hidden_states, residual
        cfg = self.config
        if cfg is not None and (cfg.use_attn_in or cfg.use_split_qkv_input):
            # Attention's per-head inputs are switched on, which are copies of this block's residual.
            ln1 = self.submodules.get("ln1")
            token = PRE_NORM.set(
                (residual, ln1.again if isinstance(ln1, NormalizationBridge) else lambda copies: copies)
            )
            try:
                output = original(residual, *args, **kwargs)
            finally:
                PRE_NORM.reset(token)
        else:
            output = original(residual, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.fire("hook_out", output[0]), *output[1:])
        return self.fire("hook_out", output)
