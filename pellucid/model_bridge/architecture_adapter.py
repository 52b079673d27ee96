"""The contract between an architecture and the bridge: which component stands for which module, which hooks they fire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from pellucid.config import TransformerBridgeConfig
from pellucid.model_bridge.family import Family
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.names import HookIndex, HookSpec


class ArchitectureAdapter(ABC):
    """What the bridge needs to know about an architecture.

    Args:
        cfg: the bridge's configuration.
    """

    family: Family
    """The family, as the model has it."""
    hooks_before: tuple[HookSpec, ...]
    """Hook points fired before the blocks, in firing order."""
    hooks_in_block: tuple[HookSpec, ...]
    """Hook points of block ``{i}``, in firing order."""
    hooks_after: tuple[HookSpec, ...]
    """Hook points fired after the blocks."""
    last_block_aliases: Mapping[str, str]
    """Further names of points of the last block, which a component after the blocks shares."""
    unreachable: Mapping[str, str] = MappingProxyType({})
    """Names within a block that other models' points have, and why this one's inside is not reached."""
    first_block_aliases: Mapping[str, str]
    """The same of the first block."""
    backbone_path: str
    """Path of the module that runs the blocks."""
    blocks_path: str
    """Path of the list of blocks."""
    processes_in: ClassVar[torch.dtype] = torch.float64
    """The dtype in which weights are processed before they are rounded once to their own."""
    cache_name: str
    """What the installed release calls the key/value cache that the model's forward takes."""

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        self.cfg = cfg

    def hook_index(self) -> HookIndex:
        """Every hook point by name."""
        return HookIndex(
            self.hooks_before,
            self.hooks_in_block,
            self.hooks_after,
            self.cfg.n_layers,
            self.last_block_aliases,
            self.unreachable,
            self.first_block_aliases,
        )

    def leave_out(self, names: Collection[str]) -> None:
        """Take points out of the table, by their names with ``{i}`` for the layer."""

        def kept(specs: tuple[HookSpec, ...]) -> tuple[HookSpec, ...]:
            return tuple(spec for spec in specs if spec.name not in names)

        self.hooks_before, self.hooks_in_block = kept(self.hooks_before), kept(self.hooks_in_block)
        self.hooks_after = kept(self.hooks_after)

    @property
    def component_mapping(self) -> dict[str, GeneralizedComponent]:
        """Canonical name to component, ``"blocks"`` standing for the list; made anew at each call."""
        return {**self.make_outer(), "blocks": self.make_block(None)}

    @abstractmethod
    def make_outer(self) -> dict[str, GeneralizedComponent]:
        """Components outside the blocks, each named by its module's path in the model."""

    @abstractmethod
    def make_block(self, layer: int | None) -> GeneralizedComponent:
        """The component of block ``layer``, children included, each named inside its parent."""

    @abstractmethod
    def split_qkv_matrix(self, original_attention_component: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Queries, keys and values of an attention as linear transformations."""

    @abstractmethod
    def check_arguments(self, model: nn.Module) -> None:
        """See that the installed transformers takes the arguments that we name, and find what it calls the cache.

        Raises:
            UnsupportedModelError: an argument has another name, or one that we do not know was added.
        """

    @abstractmethod
    def missing_modules(self, model: nn.Module) -> list[str]:
        """Paths that a model of this architecture has and ``model`` has not."""

    @abstractmethod
    def link_outer(self, outer: Mapping[str, GeneralizedComponent], blocks: list[GeneralizedComponent]) -> None:
        """Link the sites where components outside the blocks meet at one tensor."""
