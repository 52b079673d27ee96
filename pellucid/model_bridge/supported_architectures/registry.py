"""Every family by the ``model_type`` of its configurations, with what reads its configuration and makes its components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from pellucid.config import BOOK_KEEPING, HANDLED, LISTED, TransformerBridgeConfig, config_from_huggingface
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.family import Family
from pellucid.model_bridge.supported_architectures.bloom import BLOOM, BloomArchitectureAdapter
from pellucid.model_bridge.supported_architectures.cohere import COHERE
from pellucid.model_bridge.supported_architectures.decoder import DecoderAdapter
from pellucid.model_bridge.supported_architectures.falcon import FALCON
from pellucid.model_bridge.supported_architectures.gemma import GEMMA, GEMMA2, GEMMA3
from pellucid.model_bridge.supported_architectures.gpt2 import GPT2
from pellucid.model_bridge.supported_architectures.gpt_neox import GPT_NEOX
from pellucid.model_bridge.supported_architectures.gptj import GPTJ
from pellucid.model_bridge.supported_architectures.granite import GRANITE
from pellucid.model_bridge.supported_architectures.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from pellucid.model_bridge.supported_architectures.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from pellucid.model_bridge.supported_architectures.mpt import MPT
from pellucid.model_bridge.supported_architectures.olmo2 import OLMO2
from pellucid.model_bridge.supported_architectures.opt import OPT
from pellucid.model_bridge.supported_architectures.phi import PHI
from pellucid.model_bridge.supported_architectures.phi3 import PHI3
from pellucid.model_bridge.supported_architectures.reading import listed_of, read_settings
from pellucid.model_bridge.supported_architectures.smollm3 import SMOLLM3
from pellucid.model_bridge.supported_architectures.stablelm import STABLELM
from pellucid.model_bridge.supported_architectures.unlisted import named_family, unlisted_family

ReadSettings: TypeAlias = Callable[..., TransformerBridgeConfig]
"""``(config, dtype, device)`` to our configuration."""


@dataclass(frozen=True)
class Architecture:
    """A family, and what is made of it.

    Attributes:
        family: the family.
        adapter: makes its components.
        read: reads its configuration.
        listed: attributes of a configuration that it knows, whatever code of Hugging Face's reads.
        handled: attributes that may change a number, ``None`` for all but Hugging Face's book-keeping.
    """

    family: Family
    adapter: type[DecoderAdapter]
    read: ReadSettings
    listed: frozenset[str]
    handled: frozenset[str] | None = None

    def may_change_numbers(self, attribute: str) -> bool:
        """Whether an attribute of a configuration is part of what decides the numbers of a run."""
        return attribute not in BOOK_KEEPING if self.handled is None else attribute in self.handled


def _as_data(family: Family) -> Architecture:
    return Architecture(family, DecoderAdapter, partial(read_settings, family), listed_of(family))


ARCHITECTURES: Mapping[str, Architecture] = {
    BLOOM.model_type: Architecture(BLOOM, BloomArchitectureAdapter, config_from_huggingface, LISTED, HANDLED),
    **{
        family.model_type: _as_data(family)
        for family in (
            *(LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3),
            *(MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE),
            *(COHERE, FALCON, GPTJ, GRANITE, MPT, OPT, PHI, SMOLLM3, STABLELM),
        )
    },
}
"""By ``model_type``."""


def architecture_of(model_type: object, what: str) -> Architecture:
    """The architecture of a configuration.

    Args:
        model_type: what it says.
        what: what to call it in an error.

    Raises:
        UnsupportedModelError: no family that is known.
    """
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModelError(_unknown(model_type, what))
    return found


def _unknown(model_type: object, what: str) -> str:
    return (
        f"{what} says model_type={model_type!r}, a family that Pellucid does not know. It opens: "
        f"{', '.join(sorted(ARCHITECTURES))}; and, as unlisted, a model of Hugging Face's whose modules have the names of "
        "one of these, once its weights are there to try its points on (TransformerBridge.boot_transformers)."
    )


def architecture_by_names(model: nn.Module, what: str) -> Architecture:
    """What a model of no known family would be opened as, by the names and sizes of its modules; it needs no weights.

    Raises:
        UnsupportedModelError: its modules fit none, with what was looked for.
    """
    config: Any = model.config
    try:
        return _as_data(named_family(model, _with_plain_blocks()))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{_unknown(config.model_type, what)}\n{error}") from None


def _with_plain_blocks() -> list[Family]:
    families = [each.family for each in ARCHITECTURES.values()]
    return [family for family in families if family.mlp.name and not family.block.adds_residual]


def may_change_numbers(model_type: object, attribute: str) -> bool:
    """Whether an attribute of a configuration of some ``model_type`` is part of what decides the numbers of a run."""
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    return attribute not in BOOK_KEEPING if found is None else found.may_change_numbers(attribute)


def architecture_of_model(model: nn.Module) -> Architecture:
    """The architecture of a model that is there: by its configuration's ``model_type``, else read off its modules.

    Raises:
        UnsupportedModelError: no family that is known, and modules that fit none.
    """
    config: Any = model.config
    model_type = config.model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    return _as_data(unlisted_family(model, _with_plain_blocks()))
