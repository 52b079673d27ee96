"""The identity of a job: all that the bits of a forward depend on, as JSON that names what differs.

A job that was interrupted goes on with equal bits, or is refused by the name of what has changed. So there is one
description, which every reader of a corpus and every sweep asks (harvest, collect, shards, perplexity):

* ``model``: a hash of the weights, the dtype, the configuration, and each module's class, code and settings;
* ``run``: attention, autocast, threads, processor, the build of torch and its switches that choose code;
* ``hooks``: what users' functions on the bridge compute (see :mod:`pellucid.model_bridge.corpus.function_hash`);
* ``versions``: of Pellucid, transformers and Python.

Gradients on or off change no bit of a forward and are not part of it. A user's torch hooks are refused: they may write, and
nothing can be known of them. A description of an older version lacks what was not known then, and differs by that.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from pellucid.errors import InputError
from pellucid.hook_values import describe_function
from pellucid.model_bridge.corpus.function_hash import code_hash, function_hash
from pellucid.model_bridge.generalized_components.weights import stored_parts
from pellucid.model_bridge.hooking.stand_in import StandIn, is_hooked
from pellucid.model_bridge.running.runner import RunnableModel
from pellucid.model_bridge.supported_architectures import may_change_numbers
from pellucid.model_bridge.weights.hashing import tensor_hash, weights_hash
from pellucid.storage.json_text import Json, differences
from pellucid.version import __version__

NO_SETTING = frozenset(vars(nn.Module())) - {"training"} | {"name_or_path", "warnings_issued", "forward"}
"""Attributes of modules that are no settings: torch's own, and where a model came from."""

PRIVATE_SETTINGS = frozenset({"_active_adapter", "_disable_adapters"})
"""PEFT's. Other names with an underscore are book-keeping: whether a weight came from a file, say."""

CHOOSES_CODE = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
"""Variables of the environment by which libraries below torch choose their code."""


def job_identity(model: RunnableModel, *, threads: int | None = None) -> dict[str, Json]:
    """All that the bits of a forward depend on now, weights hashed: what a stored state belongs to.

    Args:
        model: the bridge.
        threads: of the CPU that the work will be done with, by default as many as are set.

    Raises:
        InputError: torch hooks on the model; a function on the bridge that holds what cannot be compared.
        WeightError: weights that cannot be read where they are.
    """
    refuse_torch_hooks(model)
    found = conditions(model, threads=threads)
    weights: dict[str, Json] = {"weights_sha256": weights_hash(model.hf_model)}
    return {**found, "model": weights | found["model"], "hooks": hooks_on(model)}


def conditions(model: RunnableModel, *, threads: int | None = None) -> dict[str, dict[str, Json]]:
    """The same without weights and hooks: what can be asked often (milliseconds)."""
    return {
        "model": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "configuration": _configuration(model),
            "modules": _modules(model.hf_model),
            "buffers_sha256": _other_buffers(model.hf_model),
        },
        "run": _run(model, threads),
        "versions": {
            "pellucid": __version__,
            "transformers": version("transformers"),
            "python": ".".join(platform.python_version_tuple()[:2]),
        },
    }


def marks(model: RunnableModel) -> tuple[object, ...]:
    """:func:`conditions` and the places and versions of all weights: equal within a process while nothing was changed.

    A function on the model may compute something else each time: marks of a hooked model equal no others. torch counts
    writes to a tensor, but not those through ``.data``.
    """
    if model.live_hooks() or _torch_hooks(model):
        return (object(),)
    return json.dumps(conditions(model), sort_keys=True), weight_marks(model)


def weight_marks(model: RunnableModel) -> tuple[object, ...]:
    """The places and versions of all weights: equal within a process while nobody wrote to one (see :func:`marks`)."""
    return tuple(
        (
            name,
            tensor.data_ptr() if type(tensor) in (nn.Parameter, Tensor) else id(tensor),  # a wrapper has no data
            0 if tensor.is_inference() else tensor._version,
        )
        for name, value in model.hf_model.state_dict(keep_vars=True).items()
        for _, tensor in stored_parts(name, value)
    )


class Watched:
    """A model during a pass over a corpus: it stays what it was when the pass began.

    Args:
        model: the bridge.
        what: the pass, for an error.
        threads: of the CPU that the work is done with, by default as many as are set.
    """

    def __init__(self, model: RunnableModel, what: str, *, threads: int | None = None) -> None:
        self._model, self._what, self._threads = model, what, threads
        self._began = self._now()

    def _now(self) -> tuple[dict[str, dict[str, Json]], tuple[object, ...], list[object]]:
        model = self._model
        handles: list[object] = [handle for handle in model.live_hooks() if not handle.reads_only]
        return conditions(model, threads=self._threads), weight_marks(model), [*handles, *_torch_hooks(model)]

    def refuse_change(self) -> None:
        """See that it has not changed.

        Raises:
            InputError: what has, by name.
        """
        (before, weights, hooks), now = self._began, self._now()
        changed = differences(before, now[0])
        changed += ["other weights"] * (weights != now[1]) + ["other hooks"] * (hooks != now[2])
        if changed:
            raise InputError(
                f"The model has changed since {self._what} began, and its numbers are no longer of one model. It began with "
                f"{'; '.join(changed)}."
            )


# -- hooks -------------------------------------------------------------------------------------------------------------


def refuse_torch_hooks(model: RunnableModel) -> None:
    """Refuse torch hooks: what they do is not part of a job.

    Raises:
        InputError: there is one, with the module it is on.
    """
    names = _torch_hooks(model)
    if names:
        raise InputError(
            f"A function is hooked on {names[0]} with torch: what it does is not part of a job, so a resumed one could give "
            "other numbers. Remove it first; functions hooked with bridge.hooks are part of a collection."
        )


def _torch_hooks(model: RunnableModel) -> list[str]:
    names = [name or type(module).__name__ for name, module in model.hf_model.named_modules() if is_hooked(module)]
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        names.append("every module (torch.nn.modules.module.register_module_forward_hook)")
    return names


def hooks_on(model: RunnableModel) -> list[Json]:
    """What each user's function that acts on the bridge now computes, in the order in which it was hooked.

    Raises:
        InputError: one that holds what cannot be compared.
    """
    words = {id(model): "bridge", id(model.runner.tree): "bridge"}
    words.update({id(module): name or "model" for name, module in model.hf_model.named_modules()})
    words.update({id(weight): name for name, weight in model.hf_model.state_dict(keep_vars=True).items()})
    found: list[Json] = []
    # By point: the order among points is theirs of firing, whichever was hooked first.
    for handle in sorted(model.live_hooks(), key=lambda each: str(each.point.name)):
        if handle.reads_only:
            continue
        try:
            sha256 = function_hash(handle.user_hook, words)
        except InputError as error:
            raise InputError(
                f"The hook {describe_function(handle.user_hook)} on {handle.name} cannot be part of a job: {error}"
            ) from None
        name = describe_function(handle.user_hook).partition(" ")[0]
        at = str(handle.point.name)
        called: dict[str, Json] = {"aliases": list(handle.aliases)} if handle.aliases else {}
        found.append({"name": f"{at}: {name}", "direction": handle.direction, "sha256": sha256, **called})
    return found


# -- the model ---------------------------------------------------------------------------------------------------------


def _configuration(model: RunnableModel) -> dict[str, Json]:
    """Hugging Face's configuration, as far as it may change a number."""
    config: Any = model.runner.tree.root.config
    kind, said = config.model_type, config.to_dict()
    found = {name: _plain(value) for name, value in sorted(said.items()) if may_change_numbers(kind, name)}
    return found | {"attn_implementation": _plain(config._attn_implementation)}


def _modules(model: nn.Module) -> dict[str, Json]:
    """Class, code and settings of every module, those of all layers together: ``transformer.h.*.mlp``.

    Two models of equal weights compute different numbers by these: the eps of a norm, a module put in training mode, an
    adapter's scale, a forward of the user's own.
    """
    layers: dict[str, list[dict[str, Json]]] = {}
    for name, module in model.named_modules():
        layers.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "(model)", []).append(_settings(name, module))
    found: dict[str, Json] = {}
    for place, settings in layers.items():
        names = sorted({name for each in settings for name in each})
        found[place] = {name: _together([each.get(name) for each in settings]) for name in names}
    return found


def _together(values: list[Json]) -> Json:
    return values[0] if all(value == values[0] for value in values) else values


def _settings(place: str, module: nn.Module) -> dict[str, Json]:
    kind = type(module)
    found: dict[str, Json] = {"class": f"{kind.__module__}.{kind.__qualname__}", "code": _class_code(kind)}
    for name, value in vars(module).items():
        is_private = name.startswith("_") or name in NO_SETTING  # asked first: most names are
        if (not is_private or name in PRIVATE_SETTINGS) and not isinstance(value, StandIn):
            found[name] = _plain(value)
    for name in ("forward", "_old_forward"):
        own = _own_forward(vars(module).get(name))
        if own is not None:
            try:
                found[name] = function_hash(own, {id(module): "itself"})
            except InputError as error:
                raise InputError(f"The {name} of {place or 'the model'} cannot be part of a job: {error}") from None
    return found


@functools.lru_cache(maxsize=512)
def _code_of(forward: Any) -> str | None:
    return code_hash(forward)


def _class_code(kind: type[nn.Module]) -> str | None:
    return _code_of(kind.forward)


def _own_forward(forward: Any) -> Any:
    """A forward of the user's own on one module; ``None`` for its class's, and for what stands in for it while hooked."""
    return _own_forward(forward.previous) if isinstance(forward, StandIn) else forward


def _plain(value: Any) -> Json:
    """A setting as JSON; of what is none, the class."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # nan and infinities too
    if isinstance(value, Tensor) and not value.is_meta:
        return tensor_hash(value.detach())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(entry)) for entry in value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return type(value).__qualname__


def _other_buffers(model: nn.Module) -> Json:
    """Buffers that are not saved with the weights."""
    saved = model.state_dict(keep_vars=True)
    return {
        name: tensor_hash(tensor) for name, tensor in model.named_buffers() if name not in saved and not tensor.is_meta
    }


# -- the run -----------------------------------------------------------------------------------------------------------


def _run(model: RunnableModel, threads: int | None) -> dict[str, Json]:
    device, kernels = model.device, torch.backends.cuda
    is_cuda = device.type == "cuda"
    return {
        "attention": model.attn_implementation,
        "autocast": _autocast(device.type),
        "threads": torch.get_num_threads() if threads is None else threads,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "processor": None if is_cuda else processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_build": f"{torch.__version__} {torch.version.git_version}",
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        # No call says whether numbers below float32's smallest normal one are taken for 0: multiplying one does.
        "flush_denormal": bool(torch.tensor([2.0**-130]).mul(0.5).eq(0).item()),
        "onednn": bool(torch.backends.mkldnn.enabled),
        "kernels": [
            name
            for name, enabled in (
                ("flash", kernels.flash_sdp_enabled()),
                ("mem_efficient", kernels.mem_efficient_sdp_enabled()),
                ("math", kernels.math_sdp_enabled()),
                ("tf32", kernels.matmul.allow_tf32),
            )
            if enabled
        ],
        "environment": {name: os.environ[name] for name in CHOOSES_CODE if name in os.environ},
    }


def _autocast(device_type: str) -> Json:
    """The dtype that autocast computes in, ``None`` where it is off."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """The processor's architecture and name: libraries below torch choose code by both."""
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([platform.machine(), *(names[:1] or [platform.processor()])]).strip()
