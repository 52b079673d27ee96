"""What may be done to a model's weights: refused by name, with its reason, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import WeightError
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.generalized_components.base import readable_parameter
from pellucid.model_bridge.generalized_components.weight_writes import all_finite
from pellucid.model_bridge.generalized_components.weights import CONV1D
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.form import PRE_NORMS, norm_of
from pellucid.model_bridge.weights.record import is_tied, record_of
from pellucid.weight_processing import STEPS, Step

DEFAULTS: Mapping[Step, bool] = {step: step != "refactor_factored_attn_matrices" for step in STEPS}
"""What ``process_weights()`` does without arguments, as TransformerLens, where the model allows it."""

Asked: TypeAlias = Mapping[str, bool | None]
"""Steps by name: ``True`` and ``False`` are said, ``None`` or nothing leaves a step to :data:`DEFAULTS`."""


def steps_of(asked: Asked, illegal: Mapping[Step, str]) -> frozenset[Step]:
    """The steps that a call means, those left out that it did not name and the model does not allow.

    Args:
        asked: the call's arguments.
        illegal: steps that the model does not allow, each with its reason.

    Raises:
        WeightError: such a step was asked for by name.
    """
    said = {step: asked.get(step) for step in STEPS}
    wrong = [step for step in STEPS if said[step] and step in illegal]
    if wrong:
        raise WeightError(
            "\n".join(f"{step} would change what this model computes: {illegal[step]}." for step in wrong)
            + f"\nPass {', '.join(f'{step}=False' for step in wrong)}."
        )
    return frozenset(
        step for step in STEPS if said[step] or (said[step] is None and DEFAULTS[step] and step not in illegal)
    )


@dataclass(frozen=True)
class Request:
    """What a call asks for."""

    steps: frozenset[Step]
    keep_tied: bool = False
    keep_originals: bool = False


def refuse_by_config(cfg: TransformerBridgeConfig, steps: frozenset[Step]) -> None:
    """Refuse what the configuration alone forbids; asked before any weight is loaded.

    Raises:
        WeightError: with what to change.
    """
    if not steps:
        return
    if cfg.sums_weight_slices:
        raise WeightError(
            f"slow_but_exact=True with pretraining_tp={cfg.pretraining_tp}: Hugging Face drops the biases of dense and "
            "dense_4h_to_h there, so that nothing can be folded into them and log-probabilities would move. Load the model "
            "with hf_config_overrides={'slow_but_exact': False} to process its weights."
        )
    if cfg.apply_residual_connection_post_layernorm and "fold_ln" in steps:
        raise WeightError(
            "apply_residual_connection_post_layernorm=True: the output of ln1 and ln2 is the residual stream itself, so "
            "fold_ln would change it and with it the model. Pass fold_ln=False."
        )
    if "center_writing_weights" in steps and not cfg.eps > 0:
        raise WeightError(
            f"layer_norm_epsilon={cfg.eps}: centring the embedding rests on a positive eps. Pass "
            "center_writing_weights=False."
        )


def refuse_illegal(tree: ComponentTree, request: Request) -> None:
    """Refuse, before anything is written, whatever can be refused.

    Raises:
        WeightError: what forbids the call, by name, and what to do instead.
    """
    refuse_by_config(tree.cfg, request.steps)
    if not request.steps:
        return
    record = record_of(tree)
    if record.damaged is not None:
        way = "load the model again" if record.originals is None else "call unprocess_weights() first"
        raise WeightError(f"{record.damaged} was left half-written by a failed call: {way}.")
    if request.keep_tied and is_tied(tree):
        moved = [step for step in ("center_writing_weights", "center_unembed") if step in request.steps]
        if moved:
            raise WeightError(
                f"keep_tied=True keeps one table for embedding and unembedding, and {' and '.join(moved)} would change one "
                f"of the two. Pass {', '.join(f'{step}=False' for step in moved)}, or keep_tied=False."
            )
    if request.keep_originals and record.originals is None and any(record.done.values()):
        raise WeightError(
            "keep_originals=True has to be given before the first step: the original weights are gone. Load the model "
            "again."
        )
    refuse_adapters(tree.root)
    seen: dict[int, str] = {}
    for path, parameter in plain_parameters(tree):
        _refuse_unusable(path, parameter)
        other = seen.setdefault(parameter.data_ptr(), path)
        if other != path and {path, other} != {f"{tree.components[name].path}.weight" for name in ("embed", "unembed")}:
            raise WeightError(f"{path} and {other} are one storage: processing one would change the other. Untie them.")
    for block in tree.blocks:
        for targets in block.weight_targets().values():
            targets()  # a fused projection whose parts have no view says so


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters on it.

    Raises:
        WeightError: with the call that merges them.
    """
    mounted = next((path for path, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if mounted is not None or getattr(model, "peft_config", None):
        raise WeightError(
            f"An adapter is mounted{'' if mounted is None else f' on {mounted}'}: folding would change the weights under "
            "it. Merge it (model = bridge.hf_model.merge_and_unload()) or take it off, then make a bridge of the result."
        )


def plain_parameters(tree: ComponentTree) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that processing may read or write, by Hugging Face's name.

    Raises:
        WeightError: one that is quantised, offloaded, computed from others, or in a module of another kind.
    """
    for component, kind in _modules(tree):
        module = component.module
        # A bias that is None is none; one that is pruned or parametrised is refused below.
        lacks_bias = kind in (nn.Embedding, nn.RMSNorm) or module._parameters.get("bias", module) is None
        names = ["weight"] if lacks_bias else ["weight", "bias"]
        for name in names:
            parameter = readable_parameter(module, name, component.path)
            if not _is_known(type(module), kind) or module._parameters.get(name) is not parameter:
                raise WeightError(
                    f"{component.path} is a {type(module).__name__} with its own way to its {name}; processing knows plain "
                    f"{kind.__name__} modules. Load the model without it."
                )
            yield f"{component.path}.{name}", parameter


def _is_known(found: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class computes as ``kind`` does: torch's own, or Hugging Face's (scaled embeddings, RMS norms)."""
    if kind is nn.Linear:
        return found is kind or (found.__module__, found.__name__) == CONV1D
    return found is kind or (kind is not nn.LayerNorm and found.__module__.startswith("transformers.models."))


def _modules(tree: ComponentTree) -> Iterator[tuple[GeneralizedComponent, type[nn.Module]]]:
    yield tree.components["embed"], nn.Embedding
    if "pos_embed" in tree.components:
        yield tree.components["pos_embed"], nn.Embedding
    if "embed_ln" in tree.components:
        yield tree.components["embed_ln"], nn.LayerNorm
    # A norm that is not torch's is a class of Hugging Face's own, whether it subtracts the mean (Cohere) or not.
    norm = nn.RMSNorm if norm_of(tree.components["ln_final"]).widens else nn.LayerNorm
    for block in tree.blocks:
        for name, component in block.submodules.items():
            if name in PRE_NORMS:
                yield component, norm
            elif name in ("attn", "mlp"):
                children = component.submodules
                parts = ("qkv", "o") if "qkv" in children else ("gate_up", "gate", "in", "q", "k", "v", "o", "out")
                for part in parts:
                    if part in children:
                        yield children[part], nn.Linear
    yield tree.components["ln_final"], norm
    yield tree.components["unembed"], nn.Linear


def _refuse_unusable(path: str, parameter: Tensor) -> None:
    if parameter.is_inference():
        raise WeightError(f"{path} was made in inference mode and cannot be written. Load the model outside of it.")
    if not all_finite(parameter):
        raise WeightError(f"{path} holds values that are not finite; processing would spread them.")
