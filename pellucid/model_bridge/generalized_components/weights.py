"""What a weight is: a tensor of numbers that the module computes with, or something else that only looks like one.

The one place that knows. A weight can be read and written where it is a plain floating-point parameter (or buffer) of the
module, in memory. Everything else is refused with what was found: pruned and parametrised weights are computed anew in
each forward, so that an edit of the result is lost; quantised ones hold other numbers than those that run; offloaded ones
hold none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pellucid.errors import WeightError

BY_ROW = (
    *(
        "torch.nn.modules." + name
        for name in ("linear", "sparse", "normalization", "dropout", "container", "activation")
    ),
    "torch.nn.utils.parametriz",  # parametrised classes, and what computes their weights
    "transformers.models.",  # of the decoders that are bridged, all do; a choice of experts that is close may round over
    "transformers.activations",
    "transformers.pytorch_utils",  # Conv1D
    "peft.",
)
"""Where classes are defined that compute each row of a batch, and each position, from that row alone."""


CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""Hugging Face's linear map whose weight is ``[in, out]``, GPT-2's."""


def adapted(module: nn.Module) -> nn.Module:
    """The layer that an adapter (PEFT) wraps, or the module itself."""
    base = module._modules.get("base_layer")
    return module if base is None else base


def first_floating(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, as ``module.parameters()`` would find it, which makes four generators."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for child in module._modules.values():
        found = None if child is None else first_floating(child)
        if found is not None:
            return found
    return None


def why_not_plain(module: nn.Module, name: str) -> str | None:
    """What a module's weight is, if it cannot be read and written as a tensor; ``None`` if it can.

    Args:
        module: a layer, not its adapter.
        name: of the weight.
    """
    found: Tensor | None = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    if found is None:
        return _computed(module, name)
    if found.is_meta:
        return (
            "offloaded: its numbers are not in memory, and an edit would be lost. Load the model without offloading to read "
            "or write weights."
        )
    if type(found) not in (nn.Parameter, Tensor):
        return (
            f"held in {type(found).__module__.split('.')[0]}'s {type(found).__name__}; its stored numbers are not the "
            "weights. Load the model unquantised and whole to read or write weights."
        )
    if not found.is_floating_point():
        return (
            f"quantised ({type(found).__name__}, {found.dtype}); its stored numbers are not the weights. Load the model "
            "unquantised to read or write weights."
        )
    return None


def _computed(module: nn.Module, name: str) -> str:
    """What gives a weight that is no parameter of its module."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(step).__name__ for step in cast(Any, module).parametrizations[name])
        return (
            f"parametrised ({kinds}): it is computed anew whenever it is read, and an edit would be lost. Write to "
            f"parametrizations.{name}, or make it permanent: torch.nn.utils.parametrize.remove_parametrizations(module, "
            f"{name!r})."
        )
    if f"{name}_orig" in module._parameters:
        return (
            f"pruned: it is computed from {name}_orig and {name}_mask in each forward, and an edit would be lost. Write to "
            f"those, or make it permanent: torch.nn.utils.prune.remove(module, {name!r})."
        )
    if f"{name}_g" in module._parameters:
        return (
            f"under weight_norm: it is computed from {name}_g and {name}_v in each forward, and an edit would be lost. "
            f"Write to those, or make it permanent: torch.nn.utils.remove_weight_norm(module, {name!r})."
        )
    found = getattr(module, name, None)
    if found is None:
        return "not there"
    what = "gives its weights by a call" if callable(found) and not isinstance(found, Tensor) else "computes it"
    return (
        f"no parameter: {type(module).__module__}.{type(module).__name__} {what}, and an edit would be lost. Load the model "
        "without it to read or write weights."
    )


def readable_parameter(module: nn.Module, name: str, path: str) -> Tensor:
    """A weight of the module itself, refused by name where reading or writing it would not be the numbers that run.

    For a module with an adapter (PEFT) this is the base layer's.

    Raises:
        WeightError: there is no such weight, or it is no plain tensor; with what it is.
    """
    base = adapted(module)
    why = why_not_plain(base, name)
    if why is not None:
        raise WeightError(f"{path} has no {name!r}." if why == "not there" else f"{path}.{name} is {why}")
    return cast(Tensor, base._parameters.get(name) if base._parameters.get(name) is not None else base._buffers[name])


def has_weight(module: nn.Module, name: str) -> bool:
    """Whether a module has a weight of that name, readable or not."""
    return why_not_plain(adapted(module), name) != "not there"


def linear_weight(module: nn.Module, path: str) -> Tensor:
    """The weight of a linear map, ``[in_features, out_features]``: a view, whichever way round the module keeps it.

    Raises:
        WeightError: it cannot be read and written where it is.
    """
    weight = readable_parameter(module, "weight", path)
    kind = type(adapted(module))
    return weight if (kind.__module__, kind.__name__) == CONV1D else weight.T


def linear_bias(module: nn.Module, path: str) -> Tensor:
    """The bias of a linear map, ``[out_features]``; zeros of its own where it has none.

    Raises:
        WeightError: it cannot be read and written where it is.
    """
    if has_weight(module, "bias"):
        return readable_parameter(module, "bias", path)
    weight = linear_weight(module, path)
    return torch.zeros(weight.shape[-1], dtype=weight.dtype, device=weight.device)


def plain_weight(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is just a ``kind``: no adapter, nobody's hook, its weight and bias plain tensors in memory."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False  # whoever put something on it wants it called
    if type(module) is not kind or why_not_plain(module, "weight") is not None:
        return False
    return getattr(module, "bias", None) is None or why_not_plain(module, "bias") is None


def why_not_by_row(model: nn.Module) -> str | None:
    """Which module may compute a row of a batch from other rows, too; ``None`` if none does.

    Only classes that are known to compute by row are believed to: quantised layers may take one scale for the whole batch.
    """
    for path, module in model.named_modules():
        kind = type(module)
        if not f"{kind.__module__}.".startswith(BY_ROW):
            return f"{path or 'the model'} is a {kind.__module__}.{kind.__name__}"
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
                return f"{path}.{name} is a {type(parameter).__name__}"
    return None


def stored_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the numbers of one entry of a state dict, each with a name that says what it is.

    Raises:
        WeightError: they are not in memory, or hidden where they cannot be read.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise WeightError(f"{name} is not in memory (offloaded), so the model's weights cannot be hashed.")
        kind = f"{name} {value.dtype} {tuple(value.shape)}"
        if value.is_quantized:
            yield f"{kind} int_repr", value.int_repr()
            if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                yield f"{kind} scale", torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
            else:
                yield f"{kind} scales", value.q_per_channel_scales()
                yield f"{kind} zero points", value.q_per_channel_zero_points()
        elif type(value) in (nn.Parameter, Tensor):
            yield kind, value.detach()
        elif hasattr(value, "__tensor_flatten__"):  # torch's protocol for a tensor that is made of others
            inner, settings = value.__tensor_flatten__()
            said = re.sub(r" at 0x[0-9a-f]+", "", repr(settings))  # what it computes depends on them, too
            yield f"{kind} {type(value).__name__} {said}", torch.empty(0)
            for part in inner:
                yield from stored_parts(f"{kind} {type(value).__name__}.{part}", getattr(value, part))
        elif _has_storage(
            value
        ):  # bitsandbytes' packed numbers; what else is needed to read them has entries of its own
            yield f"{kind} {type(value).__name__}", value.detach().as_subclass(Tensor)
        else:
            raise _unreadable(name, value)
    elif isinstance(value, tuple | list):  # torch's packed parameters: weight and bias
        for index, part in enumerate(value):
            yield from stored_parts(f"{name}[{index}]", part)
    elif value is None or isinstance(value, torch.dtype | str | int | float | bool):
        yield f"{name} = {value!r}", torch.empty(0)
    else:
        raise _unreadable(name, value)


def _has_storage(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # a subclass that only wraps others has none
        return False


def _unreadable(name: str, value: Any) -> WeightError:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return WeightError(f"{name} is a {kind}, whose numbers cannot be read, so the model's weights cannot be hashed.")
