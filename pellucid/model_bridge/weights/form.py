"""What a model is like, for processing: from its family's data and its modules, and from nothing else.

Which linear maps read which norm, whether norms centre and what has a bias decide which steps keep the function:

* folding a norm needs linear maps that read it; norms of queries and keys, and norms after a branch, have none and stay. The
  bias of a norm needs a bias in each map that reads it;
* centring what is written to the stream needs that all who read the stream subtract its mean;
* centring the unembedding needs logits that are bounded by nothing after it;
* value biases need a bias of the output projection to go to;
* refactoring needs that nothing (a rotation, a norm, several queries for a key) is between ``W_Q`` and ``W_K``.

A step that a model does not allow is named here with its reason. No bias is given to a module that Hugging Face's class
makes without one, but for the unembedding's (:mod:`~pellucid.model_bridge.weights.unembedding_table`): its loader would
drop it without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from pellucid.config import TransformerBridgeConfig
from pellucid.model_bridge.generalized_components import GeneralizedComponent, NormalizationBridge
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.weight_processing import QKV, BlockForm, Step

PRE_NORMS = ("ln1", "ln2")
"""Norms that linear maps may read."""


def norm_of(component: GeneralizedComponent) -> NormalizationBridge:
    """A component that is known to be a norm's."""
    return cast(NormalizationBridge, component)


def shift_of(norm: GeneralizedComponent) -> Tensor | None:
    """A norm's bias ``[d_model]``, if it has one."""
    return cast("Tensor | None", norm.module._parameters.get("bias"))


def is_identity(norm: GeneralizedComponent) -> bool:
    """Whether a norm only normalises: its gain is 1, and there is no bias or it is 0."""
    weight, shift = cast(Tensor, norm.module.weight), shift_of(norm)
    return bool((weight == norm_of(norm).unit_weight).all()) and not (shift is not None and bool(shift.any()))


def form_of(tree: ComponentTree, block: GeneralizedComponent) -> BlockForm:
    """A block as :func:`~pellucid.weight_processing.process_block` has to know it."""
    keys = block.weight_targets()
    into_mlp = tuple(f"mlp.{part}" for part in ("gate", "in") if f"mlp.{part}.weight" in keys)
    readers: dict[str, tuple[str, ...]] = {}
    if "ln1" in block.submodules:
        shared = tree.adapter.family.block.parallel and "ln2" not in block.submodules
        readers["ln1"] = QKV + (into_mlp if shared else ())
    if "ln2" in block.submodules and into_mlp:  # a router and experts read it otherwise, and it keeps its gain
        readers["ln2"] = into_mlp
    last = norm_of(tree.components["ln_final"])
    return BlockForm(
        readers,
        frozenset(key.removesuffix(".bias") for key in keys if key.endswith(".bias")),
        last.centres,
        last.unit_weight,
        tree.cfg.n_heads // tree.cfg.n_key_value_heads,
    )


def illegal_by_config(cfg: TransformerBridgeConfig) -> dict[Step, str]:
    """Steps that a configuration alone does not allow, each with its reason."""
    found: dict[Step, str] = {}
    if cfg.final_rms:
        found["center_writing_weights"] = (
            "the norms divide by the root mean square and subtract no mean, so that the mean of what is written counts"
        )
    if cfg.output_logits_soft_cap > 0:
        found["center_unembed"] = (
            f"the logits are capped at {cfg.output_logits_soft_cap:g} after the unembedding, so that a number added to all "
            "of them does not move them alike"
        )
    if cfg.positional_embedding_type == "rotary":
        found["refactor_factored_attn_matrices"] = "queries and keys are rotated by position between W_Q and W_K"
    elif cfg.n_key_value_heads != cfg.n_heads:
        found["refactor_factored_attn_matrices"] = "several heads of queries share one of keys and values"
    return found


def illegal_steps(tree: ComponentTree) -> dict[Step, str]:
    """Steps that a model does not allow, each with its reason."""
    found = illegal_by_config(tree.cfg)
    form = form_of(tree, tree.blocks[0])
    block = tree.adapter.family.block
    if block.ln1_post or block.ln2_post:
        found.setdefault("center_writing_weights", "what is written to the stream comes from a norm")
    if not block.ln1 or not (block.ln2 or block.parallel):
        found.setdefault("center_writing_weights", "attention or MLP reads the stream without a norm")
    if tree.adapter.family.mlp.router:
        found.setdefault("center_writing_weights", "experts write to the stream, whose weights are not processed")
    if tree.adapter.family.attention.q_norm:
        found.setdefault("refactor_factored_attn_matrices", "queries and keys are normed between W_Q and W_K")
    if form.has_bias("attn.v") and not form.has_bias("attn.o"):
        reason = f"{_module(tree, 'attn.o')} has no bias to take the values', and one given to it is lost on loading"
        found["fold_value_biases"] = reason
        found.setdefault("refactor_factored_attn_matrices", reason)
    if (homeless := _homeless_bias(tree, form)) is not None:
        found["fold_ln"] = homeless
    return found


def _homeless_bias(tree: ComponentTree, form: BlockForm) -> str | None:
    """Which bias of a norm has nowhere to go."""
    for norm, readers in form.readers.items():
        reader = next((name for name in readers if not form.has_bias(name)), None)
        if reader is None or not form.has_bias(norm):
            continue
        for block in tree.blocks:
            shift = shift_of(block.submodules[norm])
            if shift is not None and not shift.is_meta and bool(shift.any()):
                return (
                    f"{block.submodules[norm].path} has a bias and {_module(tree, reader)}, which reads it, has none; one "
                    "given to it is lost on loading"
                )
    return None


def _module(tree: ComponentTree, name: str) -> str:
    """Path of the module that holds a linear map of the first block, a fused one if it is part of one."""
    branch, _, part = name.partition(".")
    children: Mapping[str, GeneralizedComponent] = tree.blocks[0].submodules[branch].submodules
    fused = "qkv" if part in ("q", "k", "v") else "gate_up"
    return children[part if part in children and fused not in children else fused].path


def working_dtype_of(tree: ComponentTree, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of ``dtype`` are processed: the architecture's, or their own if that is wider."""
    return torch.promote_types(dtype, tree.adapter.processes_in)
