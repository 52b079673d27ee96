"""BLOOM's block: attention and MLP add the residual themselves, so that its parts meet at other tensors than elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.model_bridge.generalized_components.block import BlockBridge, Link

LINKS: tuple[Link, ...] = (
    ("", "hook_attn_in", "attn", "hook_attn_in"),
    ("", "hook_q_input", "attn", "hook_q_input"),
    ("", "hook_k_input", "attn", "hook_k_input"),
    ("", "hook_v_input", "attn", "hook_v_input"),
    ("", "hook_attn_out", "attn", "hook_attn_out"),
    ("", "hook_resid_mid", "attn", "hook_out"),
    ("", "hook_mlp_in", "ln2", "hook_branch_in"),
    ("", "hook_mlp_out", "mlp", "hook_mlp_out"),
    ("ln1", "hook_in", "", "hook_in"),
    ("attn", "hook_in", "ln1", "hook_out"),
    ("ln2", "hook_in", "attn", "hook_out"),
    ("mlp", "hook_in", "ln2", "hook_out"),
    ("mlp", "hook_out", "", "hook_out"),
)
"""Where two components of a block meet at one tensor; see :data:`Link`."""


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
        super().__init__(name, config, submodules, conversion_rule, links=LINKS, gives_tuple=True)
