"""From what a user has (a hub name, a folder, a live model, a wrapped one) to a model, a tokenizer and a configuration.

Nothing is patched and no list of names is consulted: a model is of a family if it has its modules and says its
``model_type``. Weights come from safetensors unless the user says otherwise, code from the hub is not run unless the user
says so, and a local folder is opened without a network.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError, UnsupportedModelError, WeightError, warn
from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.family import Family
from pellucid.model_bridge.running.checkpoint import (
    CONFIG,
    NO_ADAPTER,
    Checkpoint,
    add_adapter,
    check_weight_files,
    find_checkpoint,
    find_gguf,
    has_tokenizer,
    listed,
    named_weights,
    random_weights,
    read_configuration,
    refuse_missing,
)
from pellucid.model_bridge.running.loading_arguments import check_loading
from pellucid.model_bridge.supported_architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_by_names,
    architecture_of,
    architecture_of_model,
    as_installed,
)
from pellucid.model_bridge.supported_architectures.reading import PUBLISHED, attributes_read, keys_read
from pellucid.names import nearest
from pellucid.tables import BriefFields

HUGGING_FACE_ATTENTION = "eager"
"""What a model is made with: the one whose scores and pattern can be looked at in every family."""


@dataclass(frozen=True, repr=False)
class LoadedModel(BriefFields):
    """A model ready to be bridged."""

    model: nn.Module
    tokenizer: Any | None
    missing: tuple[str, ...] = ()
    """Weights that the checkpoint lacks and that are random."""


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
    allow_missing_weights: bool = False,
    tokenizer: Any | None = None,
    gguf_file: str | None = None,
    inspect: Callable[[TransformerBridgeConfig], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint with Hugging Face.

    Args:
        name_or_path: a hub name, or a folder with ``config.json``; or those of a PEFT adapter, which names its model.
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
        allow_missing_weights: leave weights that the checkpoint lacks random, with a warning, instead of refusing it.
        tokenizer: to use instead of the checkpoint's.
        gguf_file: a GGUF file there, with configuration, weights and tokenizer; Hugging Face makes ordinary weights of it.
        inspect: shown the configuration before any weight is read; may raise.

    Raises:
        InputError: contradicting arguments, no such folder, a damaged configuration, or no safetensors file.
        UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
        WeightError: weights that are damaged, missing or of other sizes; an index that names files which must not be
            loaded.
    """
    import transformers

    check_loading(
        dtype=dtype,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        hf_config_overrides=hf_config_overrides,
        load_weights=load_weights,
        use_safetensors=use_safetensors,
        tokenizer=tokenizer,
    )
    checkpoint = (
        find_checkpoint(name_or_path, revision) if gguf_file is None else find_gguf(name_or_path, gguf_file, revision)
    )
    config = read_configuration(checkpoint, trust_remote_code)
    architecture = _architecture_for(config, name_or_path)
    _override(config, hf_config_overrides or {}, architecture.listed)
    cfg = architecture.read(config)
    if inspect is not None:
        inspect(cfg)
    missing: list[str] = []
    if not load_weights:
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=dtype if isinstance(dtype, torch.dtype) else None,
            attn_implementation=HUGGING_FACE_ATTENTION,
            trust_remote_code=trust_remote_code,
        )
    else:
        if gguf_file is None:
            check_weight_files(checkpoint, use_safetensors)
        try:
            with named_weights(checkpoint.name):
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    checkpoint.name,
                    config=config,
                    dtype=dtype if dtype is not None else "auto",
                    device_map=device_map,
                    max_memory=None if max_memory is None else dict(max_memory),
                    offload_folder=offload_folder,
                    attn_implementation=HUGGING_FACE_ATTENTION,
                    use_safetensors=use_safetensors,
                    revision=checkpoint.revision,
                    trust_remote_code=trust_remote_code,
                    local_files_only=checkpoint.is_local,
                    adapter_kwargs={
                        "subfolder": NO_ADAPTER
                    },  # ours to load: PEFT knows kinds that Hugging Face does not
                    ignore_mismatched_sizes=True,  # ours to refuse, with names
                    output_loading_info=True,
                    **_unpacked(checkpoint),
                )
        except OSError as error:
            if use_safetensors and "safetensors" in str(error):
                where = name_or_path if revision is None else f"{name_or_path} (revision {revision})"
                raise InputError(
                    f"{where} has no safetensors weights that could be found. Older repositories ship pickle files "
                    "only, which can run code when they are loaded; if you trust the source, pass use_safetensors=False. "
                    f"Hugging Face said: {str(error).splitlines()[0]}"
                ) from error
            raise
        missing += _check_loaded(model, found, checkpoint.name, allow_missing_weights)
    if device is not None:
        model.to(device)
    if checkpoint.adapter is not None:
        model, lacking = add_adapter(model, checkpoint, use_safetensors, allow_missing_weights)
        missing += lacking
    model.eval()
    if tokenizer is None:
        tokenizer = _tokenizer_of(checkpoint, trust_remote_code, architecture.family.tokenizer)
    return LoadedModel(model, tokenizer, tuple(missing))


def read_config(name_or_path: str, revision: str | None = None) -> TransformerBridgeConfig:
    """The sizes of a checkpoint, or of the one that an adapter was trained on, without its weights.

    Raises:
        InputError: no such folder, or a file in it that is damaged.
        UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
    """
    config = read_configuration(find_checkpoint(name_or_path, revision))
    return _architecture_for(config, name_or_path).read(config)


def read_adapter(name_or_path: str, revision: str | None = None) -> ArchitectureAdapter:
    """Hook points and components of a checkpoint, as its configuration says, without its weights.

    An unlisted model, which keeps the points that turn out to hold once its weights are there, has some of these.

    Raises:
        InputError: no such folder, or a file in it that is damaged.
        UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
    """
    config = read_configuration(find_checkpoint(name_or_path, revision))
    architecture = _architecture_for(config, name_or_path)
    return architecture.adapter(architecture.read(config), architecture.family.of(config))


def _unpacked(checkpoint: Checkpoint) -> dict[str, Any]:
    """Hugging Face's arguments for a GGUF file; releases that could leave its weights packed are told to unpack them."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    if checkpoint.gguf_file is None or kind is None:
        return dict(checkpoint.gguf())
    return {**checkpoint.gguf(), "quantization_config": kind(dequantize=True)}


def _architecture_for(config: Any, name: str) -> Architecture:
    """The architecture of a configuration; of a model of no known family, by the names of its modules, made without weights.

    Raises:
        UnsupportedModelError: no causal language model of Hugging Face's own, or modules that fit no family.
    """
    import transformers

    kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if config.model_type in ARCHITECTURES or kind is None:
        return architecture_of(config.model_type, name)
    with torch.device("meta"):
        bare = transformers.AutoModelForCausalLM.from_config(config)
    return architecture_by_names(bare, name)


def _override(config: Any, overrides: Mapping[str, Any], listed: frozenset[str]) -> None:
    import transformers

    kind: Any = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    known = listed | _attributes_of(type(config)) | (attributes_read(kind.__module__) if kind is not None else set())
    for key, value in overrides.items():
        if key not in known:
            raise InputError(
                f"hf_config_overrides: {type(config).__name__} has no {key!r}, and it would have no effect. Nearest: "
                f"{', '.join(nearest(key, sorted(known)))}."
            )
        try:
            setattr(config, key, value)
        except Exception as error:  # Hugging Face's own classes of error, one for each of its validators
            raise InputError(f"hf_config_overrides: {key}={value!r} is refused by Hugging Face: {error}") from error


def _check_loaded(model: Any, found: Mapping[str, Any], name: str, allow_missing: bool) -> list[str]:
    """What Hugging Face says of the weights that it loaded: names of those that are random, if they may be.

    Raises:
        WeightError: weights of other sizes; lacking ones that may not be random.
        UnsupportedModelError: quantised in a way that the installed transformers does not know.
    """
    if getattr(model.config, "quantization_config", None) is not None and getattr(model, "hf_quantizer", None) is None:
        raise UnsupportedModelError(
            f"{name} is quantised in a way that this release of transformers does not know, and its weights were loaded as "
            f"if it was not: {model.config.quantization_config!r}."
        )
    wrong = sorted(f"{key}: {tuple(there)} there, {tuple(here)} here" for key, there, here in found["mismatched_keys"])
    if wrong:
        raise WeightError(
            f"Weights of {name} have other sizes than its configuration says:\n{listed(wrong)}\nCorrect {CONFIG}, or "
            "hf_config_overrides if you gave it."
        )
    missing = sorted(found["missing_keys"])
    if missing and not allow_missing:
        refuse_missing(name, missing)
    if missing:
        warn(random_weights(name, missing))
    unused = sorted(found["unexpected_keys"])
    if unused:
        warn(
            f"{name} holds {len(unused)} weights that this model has no place for. Hugging Face leaves them out, and so do "
            f"we:\n{listed(unused)}"
        )
    return missing


def _attributes_of(kind: Any) -> frozenset[str]:
    """Attributes that every configuration of a class has, by all of their names."""
    return frozenset((*kind().to_dict(), *kind.attribute_map))


def _tokenizer_of(checkpoint: Checkpoint, trust_remote_code: bool, shared: str) -> Any | None:
    """The adapter's own tokenizer if it has one, else the model's."""
    name, revision = checkpoint.name, checkpoint.revision
    if checkpoint.adapter is not None and has_tokenizer(checkpoint.adapter, checkpoint.adapter_revision):
        name, revision = checkpoint.adapter, checkpoint.adapter_revision
    return load_tokenizer(
        name,
        shared,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=os.path.isdir(name),
        **checkpoint.gguf(),
    )


def load_tokenizer(name_or_path: str, shared: str, **common: Any) -> Any | None:
    """The checkpoint's tokenizer; where it has none that loads, the one that its family shares, said in a warning.

    Args:
        name_or_path: the checkpoint.
        shared: hub name of the tokenizer of all checkpoints of its family, ``""`` where they have several.
        **common: Hugging Face's arguments.

    Returns ``None``, with a warning, when a local folder has no tokenizer: tokens still run.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name_or_path, **common)
    except (
        Exception
    ) as error:  # a damaged file ends in any class of error, the tokenizers library's in a bare Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if common.get("local_files_only"):
            warn(
                f"{name_or_path} has no tokenizer that loads ({reason}); token ids can be run, strings cannot. Pass "
                "tokenizer= to use one."
            )
            return None
        for family in _shared_tokenizers(name_or_path, shared):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(family)
            except (OSError, ValueError, KeyError):
                continue
            warn(
                f"{name_or_path} has no tokenizer that loads ({reason}); using the one of {family}, which the "
                "family's checkpoints share."
            )
            return tokenizer
        raise


def tokenizer_of(name_or_path: str, trust_remote_code: bool) -> Any | None:
    """The tokenizer of the checkpoint that a live model is said to be; ``None``, with a warning, where none loads."""
    local = os.path.isdir(name_or_path)
    try:
        return load_tokenizer(name_or_path, "", trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:  # see load_tokenizer
        warn(
            f"No tokenizer of {name_or_path} loads ({(str(error) or type(error).__name__).splitlines()[0]}); token ids can "
            "be run, strings cannot. Pass tokenizer= to use one."
        )
        return None


def _shared_tokenizers(name: str, shared: str) -> list[str]:
    """Where to look: a mid-training checkpoint's final one first."""
    final = re.sub(r"-intermediate$", "", name)
    return [candidate for candidate in (final, shared) if shared and candidate != name]


def find_decoder(model: nn.Module) -> nn.Module:
    """The causal language model in ``model``: itself, or inside a wrapper (PEFT), found by its modules.

    Raises:
        UnsupportedModelError: there is none.
    """
    for candidate in model.modules():
        if any(_has_ends(candidate, architecture.family) for architecture in ARCHITECTURES.values()):
            return candidate
    looked_for = sorted(
        {
            f"{each.family.outside.head} and {each.family.inside(each.family.outside.embed)}"
            for each in ARCHITECTURES.values()
        }
    )
    families = ", ".join(sorted(ARCHITECTURES))
    raise UnsupportedModelError(
        f"{type(model).__name__} has no causal language model inside that Pellucid knows: no module has one of\n"
        f"{listed(looked_for, len(looked_for))}\nPass a Hugging Face causal language model ({families}), or a wrapper "
        "around one."
    )


def _has_ends(candidate: nn.Module, family: Family) -> bool:
    """Whether a module has a family's head and, in its backbone, the embedding."""
    outside, backbone = family.outside, candidate
    for name in outside.backbone.split("."):
        child = backbone._modules.get(name)
        if child is None:
            return False
        backbone = child
    return outside.head in candidate._modules and outside.embed in backbone._modules


def make_adapter(model: nn.Module) -> ArchitectureAdapter:
    """Read the model's configuration and check its modules.

    Raises:
        UnsupportedModelError: a family that is not known, a configuration we do not handle, missing modules, all listed, or
            a transformers release whose code is not as we know it.
    """
    config: Any = model.config
    architecture = architecture_of_model(model)
    family = as_installed(architecture.family.of(config), model)
    embedding = _submodule(model, family.inside(family.outside.embed))
    device = "cpu" if embedding is None else str(_device_of(embedding))
    adapter = architecture.adapter(architecture.read(config, _dtype_of(model), device), family)
    missing = adapter.missing_modules(model)
    if missing:
        raise UnsupportedModelError(f"The model lacks modules that {family.title} has: {', '.join(missing)}.")
    adapter.check_arguments(model)
    warn_of_unread(model, architecture)
    if adapter.cfg.sums_weight_slices:
        _refuse_adapted_slices(model)
    return adapter


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)


def warn_of_unread(model: nn.Module, architecture: Architecture) -> None:
    """Name the attributes of a configuration that change nothing, whatever their writer meant by them."""
    config: Any = model.config
    known = architecture.listed | _attributes_of(type(config)) | keys_read(type(config).__module__)
    known |= set(getattr(model, "generation_config", config).to_dict())
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models."):
            known |= attributes_read(kind.__module__)
    unread = {
        name: value
        for name, value in config.to_dict().items()
        if name not in known and not (name in PUBLISHED and value in (PUBLISHED[name] or (value,)))
    }
    if unread:
        shown = [f"{name} = {textwrap.shorten(repr(value), 60)}" for name, value in sorted(unread.items())]
        warn(
            f"This configuration has keys that {architecture.family.title}'s code in transformers never reads. They change "
            f"no number, here as in Hugging Face:\n{listed(shown)}"
        )


def _refuse_adapted_slices(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith((".dense", ".dense_4h_to_h")) and type(module) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, but with slow_but_exact and pretraining_tp > 1 Hugging Face never "
                "calls that layer: an adapter on it would have no effect. Set slow_but_exact=False."
            )


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _device_of(embedding: nn.Module) -> torch.device:
    """Where token ids go: the embedding's device, or the one that accelerate runs it on."""
    parameter = next(embedding.parameters())
    if not parameter.is_meta:
        return parameter.device
    hook = vars(embedding).get("_hf_hook")
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def refuse_beside_model(**given: Any) -> None:
    """Refuse arguments of loading beside a live model.

    Raises:
        InputError: one is not ``None``.
    """
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise InputError(
            f"hf_model is used as it is: {', '.join(names)} would have no effect. Convert or move the model before "
            "bridging it."
        )
