"""Direct path patching: one head's clean output, seen by one later head's queries, keys or values alone.

Wang et al. (2022, arXiv 2211.00593). The sender's write to the residual stream is linear in its ``z``, so the edge from
head A to head B is patched by adding the difference of A's clean and corrupted writes to B's own copy of the residual that
enters its block, before the norm (``hook_q_input`` and its like). Everybody else goes on seeing A's corrupted output, and
nothing in between is recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_choice, check_count
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.options import SweepOptions
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag
from pellucid.patching.cells import CorruptedRun, clean_activation, metrics_of, reduced
from pellucid.progress import progress_bar
from pellucid.run_context import hooks_suppressed
from pellucid.sweep import Add, Edit, MetricLike, Sweep

SPLIT_INPUTS: tuple[Flag, ...] = ("use_split_qkv_input",)
"""The heads' own inputs, which are switched on for the call."""


def get_act_patch_direct_path(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    corrupted_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike,
    src_layer: int,
    src_head: int,
    component: Literal["q", "k", "v"] = "q",
    verbose: bool = True,
    *,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
) -> Float[Tensor, "layer head"]:
    """Patch the path from one head into each later head's queries, keys or values.

    Args:
        model: the bridge, in eval mode. ``use_split_qkv_input`` is switched on for the call.
        corrupted_tokens: ``[batch, pos]`` token ids of the corrupted run.
        clean_cache: the clean run's activations; ``blocks.{src_layer}.attn.hook_z`` of them is used.
        corrupted_cache: the corrupted run's, likewise.
        patching_metric: a function of logits ``[batch, pos, d_vocab]`` that gives one number, or one of our metrics, which
            is averaged over rows.
        src_layer: the sender's layer.
        src_head: the sender's head.
        component: what of the receivers sees it: ``"q"``, ``"k"`` or ``"v"``.
        verbose: show a progress bar on a terminal.
        attention_mask: ``[batch, pos]``, 1 at real tokens; inferred for strings.
        logit_positions: the positions that a function may read; by default it is found out.
        memory_limit: bytes that the sweep may take beside the model; by default half of what is available.

    Returns:
        ``[layer, head]`` by receiver. Up to the sender's own layer there is no path, and 0 stands there, not a measurement.

    Raises:
        InputError: the model is in training mode; no such layer, head or component; the metric gives no single number.
        CacheKeyError: a run did not keep ``hook_z``.
        UnsupportedModelError: no path is direct: a norm's output is this model's residual stream, or norms what heads write;
            or receivers have no keys and values of their own.
    """
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics_of(patching_metric, "scalar"), options, verbose)
    _check(model, component)
    for word, given, size in (("src_layer", src_layer, model.cfg.n_layers), ("src_head", src_head, model.cfg.n_heads)):
        check_count(word, given, 0, size - 1)
    with model.points_on(SPLIT_INPUTS):
        writes = _write_differences(model, src_layer, clean_cache, corrupted_cache)
        return _from_sender(run, run.sweep(), writes[:, :, src_head], src_layer, component, run.progress)


def get_act_patch_direct_path_all_sources(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    corrupted_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike,
    component: Literal["q", "k", "v"] = "q",
    verbose: bool = True,
    *,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
) -> Float[Tensor, "layer head layer head"]:
    """Patch the path from every head into every later head's queries, keys or values.

    Args:
        model: the bridge, in eval mode. ``use_split_qkv_input`` is switched on for the call.
        corrupted_tokens: ``[batch, pos]`` token ids of the corrupted run.
        clean_cache: the clean run's activations; ``hook_z`` of every layer is used.
        corrupted_cache: the corrupted run's, likewise.
        patching_metric: see :func:`get_act_patch_direct_path`, which has the other arguments too.
        component: what of the receivers sees it: ``"q"``, ``"k"`` or ``"v"``.
        verbose: show a progress bar on a terminal.
        attention_mask: ``[batch, pos]``.
        logit_positions: the positions that a function may read.
        memory_limit: in bytes.

    Returns:
        ``[sender's layer, sender's head, receiver's layer, receiver's head]``, 0 where the receiver is not later.

    Raises:
        as :func:`get_act_patch_direct_path`.
    """
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics_of(patching_metric, "scalar"), options, verbose)
    _check(model, component)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    found = torch.zeros(n_layers, n_heads, n_layers, n_heads, dtype=run.dtype, device=model.device)
    bar = progress_bar(total=n_layers * n_heads, desc="direct paths", unit="sender", show=run.progress)
    with model.points_on(SPLIT_INPUTS), bar:
        sweep = run.sweep()
        for layer in range(n_layers):
            writes = _write_differences(model, layer, clean_cache, corrupted_cache)
            for head in range(n_heads):
                found[layer, head] = _from_sender(run, sweep, writes[:, :, head], layer, component, False)
                bar.update(1)
    return found


def _check(model: TransformerBridge, component: str) -> None:
    check_choice("component", component, ("q", "k", "v"))
    if model.cfg.apply_residual_connection_post_layernorm:
        raise UnsupportedModelError(
            "apply_residual_connection_post_layernorm=True: every block's norms stand in the residual stream itself, so no "
            "path from one head to another is direct. Use get_act_patch_attn_head_out_all_pos for whole effects."
        )
    family, cfg = model.adapter.family, model.cfg
    if family.block.ln1_post:
        raise UnsupportedModelError(
            f"{family.title} norms what all heads of a layer give together before it is added to the residual stream: no "
            "head writes a part of its own. Use get_act_patch_attn_head_out_all_pos for whole effects."
        )
    if f"blocks.0.hook_{component}_input" not in model.hook_index:
        raise UnsupportedModelError(
            f"{family.title} has no hook_{component}_input, the copy of the residual through which one head is reached. "
            "Use get_act_patch_attn_head_out_all_pos for whole effects."
        )
    if component != "q" and cfg.n_key_value_heads != cfg.n_heads:
        raise UnsupportedModelError(
            f"component={component!r}: this {family.title} has {cfg.n_heads} heads and {cfg.n_key_value_heads} of keys and "
            'values, so no head has keys and values of its own. component="q" can be had, and path_patching has receivers '
            "by head of keys and values."
        )


def _write_differences(
    model: TransformerBridge, layer: int, clean_cache: Mapping[str, Tensor], corrupted_cache: Mapping[str, Tensor]
) -> Tensor:
    """``[batch, pos, n_heads, d_model]``: each head's clean write to the residual stream, less its corrupted one."""
    name = f"blocks.{layer}.attn.hook_z"
    clean, corrupted = clean_activation(clean_cache, name), clean_activation(corrupted_cache, name, "corrupted")
    if clean.shape != corrupted.shape:
        raise InputError(
            f"{name} has shape {tuple(clean.shape)} in the clean run and {tuple(corrupted.shape)} in the corrupted one. "
            "The prompts need as many rows and tokens."
        )
    block: Any = model.blocks[layer]
    with torch.no_grad():
        differences: Tensor = hooks_suppressed(block.attn.results, clean - corrupted) * block.factor
    return differences


def _from_sender(
    run: CorruptedRun, sweep: Sweep, write: Tensor, src_layer: int, component: str, progress: bool | None
) -> Tensor:
    """``[layer, head]`` by receiver."""
    n_layers, n_heads = run.model.cfg.n_layers, run.model.cfg.n_heads
    found = torch.zeros(n_layers, n_heads, dtype=run.dtype, device=run.model.device)
    added = Add(write[:, :, None])
    edits = [
        Edit(f"blocks.{layer}.hook_{component}_input", added, heads=head)
        for layer in range(src_layer + 1, n_layers)
        for head in range(n_heads)
    ]
    if edits:
        (name, metric), *_ = run.metrics.items()
        scores = sweep.run(edits, progress=progress).values[name]
        found[src_layer + 1 :] = reduced(scores, metric, "scalar", run.dtype).view(-1, n_heads).to(found)
    return found
