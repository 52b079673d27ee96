"""From what a user has (a hub name, a folder, a live model, a wrapped one) to a model, a tokenizer and a configuration.

Nothing is patched and no list of names is consulted: a model is BLOOM if it has BLOOM's modules and says ``bloom``.
Weights come from safetensors unless the user says otherwise, code from the hub is not run unless the user says so, and
a local folder is opened without a network.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pellucid.config import TransformerBridgeConfig, config_from_huggingface
from pellucid.errors import InputError, PellucidWarning, UnsupportedModelError, WeightError
from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.supported_architectures.bloom import BloomArchitectureAdapter

FAMILY_TOKENIZER = "bigscience/bloom"
"""Every BLOOM and BLOOMZ checkpoint has this tokenizer; its mid-training repositories ship none that loads."""

HUGGING_FACE_ATTENTION = "eager"
"""The only one that Hugging Face has for BLOOM; the fast one is the bridge's own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be bridged."""

    model: nn.Module
    tokenizer: Any | None


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    hf_config_overrides: Mapping[str, Any] | None = None,
    load_weights: bool = True,
    trust_remote_code: bool = False,
    use_safetensors: bool | None = True,
    tokenizer: Any | None = None,
    inspect: Callable[[TransformerBridgeConfig], None] | None = None,
) -> LoadedModel:
    """Load a BLOOM checkpoint with Hugging Face.

    Args:
        name_or_path: a hub name, or a folder with ``config.json``.
        dtype: the weights'; by default the checkpoint's own.
        device: where to put the model, if it is not dispatched by ``device_map``.
        revision: branch, tag or commit; mid-training checkpoints are tags such as ``global_step10000``.
        device_map: accelerate's placement, with ``max_memory`` and ``offload_folder``.
        max_memory: limit for each device.
        offload_folder: where accelerate may put weights on disk.
        hf_config_overrides: configuration attributes to set before loading.
        load_weights: ``False`` builds the architecture with fresh weights.
        trust_remote_code: run code from the repository.
        use_safetensors: ``False`` allows pickle files, which can run code when loaded; ``None`` takes what is there.
        tokenizer: to use instead of the checkpoint's.
        inspect: shown the configuration before any weight is read; may raise.

    Raises:
        InputError: contradicting arguments, or no safetensors file.
        UnsupportedModelError: not a BLOOM.
    """
    import transformers

    if device is not None and device_map is not None:
        raise InputError("device and device_map both say where the model goes; give one.")
    local = os.path.isdir(name_or_path)
    if not local and (
        os.path.isabs(name_or_path) or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    ):
        raise InputError(f"There is no folder {name_or_path!r}; a hub name has the form 'owner/name'.")
    common = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local}
    config = transformers.AutoConfig.from_pretrained(name_or_path, **common)
    if config.model_type != "bloom":
        raise UnsupportedModelError(
            f"Pellucid opens BLOOM models; {name_or_path} says model_type={config.model_type!r}."
        )
    for key, value in (hf_config_overrides or {}).items():
        setattr(config, key, value)
    cfg = _refuse_unhandled(config)
    if inspect is not None:
        inspect(cfg)
    if not load_weights:
        model = transformers.BloomForCausalLM._from_config(
            config, dtype=dtype if isinstance(dtype, torch.dtype) else None, attn_implementation=HUGGING_FACE_ATTENTION
        )
    else:
        try:
            model = transformers.BloomForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                dtype=dtype if dtype is not None else "auto",
                device_map=device_map,
                max_memory=None if max_memory is None else dict(max_memory),
                offload_folder=offload_folder,
                attn_implementation=HUGGING_FACE_ATTENTION,
                use_safetensors=use_safetensors,
                **common,
            )
        except OSError as error:
            if use_safetensors and "safetensors" in str(error):
                where = name_or_path if revision is None else f"{name_or_path} (revision {revision})"
                raise InputError(
                    f"{where} has no safetensors weights that could be found. Older BLOOM repositories ship pickle files "
                    "only, which can run code when they are loaded; if you trust the source, pass use_safetensors=False. "
                    f"Hugging Face said: {str(error).splitlines()[0]}"
                ) from error
            raise
        except SafetensorError as error:
            raise WeightError(
                f"The weights of {name_or_path} are damaged or cut off ({error}): fetch or save them again."
            ) from error
    if device is not None:
        model.to(device)
    model.eval()
    found = tokenizer if tokenizer is not None else load_tokenizer(name_or_path, **common)
    return LoadedModel(model, found)


def load_tokenizer(name_or_path: str, **common: Any) -> Any | None:
    """The checkpoint's tokenizer; for mid-training checkpoints without one, the family's, said in a warning.

    Returns ``None``, with a warning, when a local folder has no tokenizer: tokens still run.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name_or_path, **common)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if common.get("local_files_only"):
            warnings.warn(
                f"{name_or_path} has no tokenizer that loads ({reason}); token ids can be run, strings cannot. Pass "
                "tokenizer= to use one.",
                PellucidWarning,
                stacklevel=3,
            )
            return None
        for family in _family_tokenizers(name_or_path):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(family)
            except (OSError, ValueError, KeyError):
                continue
            warnings.warn(
                f"{name_or_path} has no tokenizer that loads ({reason}); using the one of {family}, which BLOOM "
                "checkpoints share.",
                PellucidWarning,
                stacklevel=3,
            )
            return tokenizer
        raise


def _family_tokenizers(name: str) -> list[str]:
    final = re.sub(r"-intermediate$", "", name)
    return [candidate for candidate in (final, FAMILY_TOKENIZER) if candidate != name]


def find_bloom(model: nn.Module) -> nn.Module:
    """The ``BloomForCausalLM`` in ``model``: itself, or inside a wrapper (PEFT), found by its modules.

    Raises:
        UnsupportedModelError: there is none.
    """
    for candidate in model.modules():
        children = candidate._modules
        if "lm_head" in children and "word_embeddings" in getattr(children.get("transformer"), "_modules", {}):
            return candidate
    raise UnsupportedModelError(
        f"{type(model).__name__} has no BLOOM causal language model inside: no module with children 'lm_head' and "
        "'transformer.word_embeddings'. Pass a BloomForCausalLM, or a wrapper around one."
    )


def make_adapter(bloom: nn.Module) -> ArchitectureAdapter:
    """Read the model's configuration and check its modules.

    Raises:
        UnsupportedModelError: a configuration we do not handle, missing modules, all listed, or a transformers release
            whose forwards take other arguments.
    """
    embedding = bloom.get_submodule("transformer.word_embeddings")
    cfg = _refuse_unhandled(bloom.config, _dtype_of(bloom), str(_device_of(embedding)))
    adapter = BloomArchitectureAdapter(cfg)
    missing = adapter.missing_modules(bloom)
    if missing:
        raise UnsupportedModelError(f"The model lacks modules that BLOOM has: {', '.join(missing)}.")
    adapter.check_arguments(bloom)
    if cfg.sums_weight_slices:
        _refuse_adapted_slices(bloom)
    return adapter


def _refuse_unhandled(config: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TransformerBridgeConfig:
    from transformers import BloomConfig

    return config_from_huggingface(config, frozenset(BloomConfig().to_dict()), dtype, device)


def _refuse_adapted_slices(bloom: nn.Module) -> None:
    for name, module in bloom.named_modules():
        if name.endswith((".dense", ".dense_4h_to_h")) and type(module) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, but with slow_but_exact and pretraining_tp > 1 Hugging Face never "
                "calls that layer: an adapter on it would have no effect. Set slow_but_exact=False."
            )


def _dtype_of(bloom: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in bloom.parameters() if parameter.is_floating_point())


def _device_of(embedding: nn.Module) -> torch.device:
    """Where token ids go: the embedding's device, or the one that accelerate runs it on."""
    parameter = next(embedding.parameters())
    if not parameter.is_meta:
        return parameter.device
    hook = vars(embedding).get("_hf_hook")
    return torch.device(getattr(hook, "execution_device", None) or "cpu")
