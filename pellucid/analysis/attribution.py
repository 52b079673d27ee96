"""Direct logit attribution: what each part of the model adds to the logit of an answer, and the experiment that checks it.

The residual stream that the final norm reads is a sum of what embeddings, heads and neurons wrote to it. With the norm's
scale frozen, the logit is linear in it, so each part has its share, the *attribution*; what is left, the norm's bias and the
unembedding's, is ``constant``. A part's effect through later layers is not in it: that is what patching measures.

The experiment: the part is taken away from the stream that enters the final norm and from nowhere else, the norm's scale
kept, and the logit is read again, in a run of the model. What the part wrote is measured there too: a head's values are
zeroed, and the branch's output is compared with what it was. It agrees with the attribution up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int, Shaped
from torch import Tensor

from pellucid.activation_cache import ActivationCache
from pellucid.arguments import check_choice, check_count, check_list
from pellucid.decomposition.logits import directions_of
from pellucid.decomposition.parts import (
    Onto,
    branch_outputs,
    embeddings,
    refuse_no_neurons,
    shown,
    sources_written,
    stack_heads,
    stack_neurons,
)
from pellucid.decomposition.residual import onto_of
from pellucid.decomposition.stream import refuse_no_sum
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.options import Rows, SweepOptions
from pellucid.experiments.places import Prompts, about_run, read_prompts
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import last_real
from pellucid.slices import Slice
from pellucid.token_text import token_label

By: TypeAlias = Literal["component", "head", "neuron", "source"]
BY = ("component", "head", "neuron", "source")
Positions: TypeAlias = Literal["last", "all"]
Answers: TypeAlias = str | int | Sequence[str | int] | Int[Tensor, "..."]
"""A token by its text or id, for all rows or for each."""

KEPT: Mapping[str, tuple[str, ...]] = {
    "component": ("hook_embed", "hook_pos_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"),
    "head": ("blocks.*.attn.hook_z", "blocks.*.ln1_post.hook_scale"),
    "neuron": ("blocks.*.mlp.hook_post", "blocks.*.ln2_post.hook_scale"),
    "source": ("blocks.*.attn.hook_pattern", "blocks.*.attn.hook_v", "blocks.*.ln1_post.hook_scale"),
}
"""What a run keeps for each kind of part, where the family has it."""


def logit_attribution(
    bridge: TransformerBridge,
    prompt: TextOrTokens,
    answer: Answers,
    foil: Answers | None = None,
    *,
    by: By = "component",
    positions: Positions = "last",
    rows: Rows = "mean",
    top_k: int = 20,
    check: int = 0,
    prepend_bos: bool | None = None,
    attention_mask: Shaped[Tensor, "row pos"] | None = None,
) -> xr.DataArray:
    """What each part of the model adds to an answer's logit, or to its difference from a foil's.

    The logit is the unembedding's output, before the model caps or scales it. All components and ``constant`` add up to it;
    heads, neurons and sources with ``remainder``, the share of all other parts.

    Args:
        bridge: the model, in eval mode.
        prompt: text, texts, or ids ``[row, pos]``.
        answer: the token, by its text or id; or one for each row.
        foil: the same for the token that the logit is compared with; without one the logit itself is attributed.
        by: ``"component"`` (embeddings, each layer's attention and MLP), ``"head"``, ``"neuron"``, or ``"source"``: heads,
            and the positions that they read from.
        positions: of the logit: each row's ``"last"`` token, or ``"all"`` for an axis ``pos``.
        rows: the ``"mean"`` over the prompts, or ``"each"`` for an axis ``row``.
        top_k: with ``by="neuron"``, how many neurons to give: those whose attributions are largest in size.
        check: measure so many parts, those of the largest attributions, by taking them away: see the module. A run each.
        prepend_bos: texts with the beginning-of-sequence token first or without; by default as the tokenizer does.
        attention_mask: ``[row, pos]`` of ids, 1 at real tokens.

    Returns:
        Axes ``component``, or ``layer``, ``head``, or ``neuron`` (``L1N5``, with coordinates ``layer`` and ``index``), or
        ``layer``, ``head``, ``source``; then ``row`` and ``pos`` if asked for. Coordinates ``logit``, ``constant`` and
        ``remainder`` have what attributions add up to. ``attrs`` say what it was made from, and with ``check``: ``checked``
        (the parts), ``attributed`` and ``measured`` (means), ``disagreement`` (the largest between the two, anywhere).

    Raises:
        InputError: an answer that is no token; a stream that is no sum; a family without neurons that can be seen.
    """
    check_choice("by", by, BY)
    check_choice("positions", positions, ("last", "all"))
    check_choice("rows", rows, ("mean", "each"))
    check_count("top_k", top_k)
    check_count("check", check, 0)
    bridge.runner.refuse_training()
    refuse_no_sum(bridge, "logit_attribution")
    if by == "neuron":
        refuse_no_neurons(bridge)
    prompts = read_prompts(bridge, prompt, SweepOptions(prepend_bos=prepend_bos, attention_mask=attention_mask))
    if prompts.virtual:
        raise InputError("The model's wrapper puts virtual positions before the tokens: attribute without it.")
    answers = _ids(bridge, answer, "answer", prompts.n_rows)
    foils = None if foil is None else _ids(bridge, foil, "foil", prompts.n_rows)
    if foils is not None and bool((answers == foils).any()):
        raise InputError("answer and foil are the same token: their difference is 0 whatever the model does.")
    asked = _Asked(bridge, prompts, answers, foils, by, positions)
    with torch.no_grad():
        found = _Found.of(asked)
        result = found.labelled(rows, top_k)
        return _checked(asked, found, result, check) if check else result


@dataclass(frozen=True)
class _Asked:
    """A question: which logit, of which prompts, in which parts."""

    bridge: TransformerBridge
    prompts: Prompts
    answers: Tensor
    foils: Tensor | None
    by: By
    positions: Positions

    def run(self) -> ActivationCache:
        """The run, with what the parts are made of."""
        index, flags = self.bridge.hook_index, self.bridge.cfg.flags
        names = ["ln_final.hook_scale", "hook_unembed"]
        for glob in KEPT[self.by]:
            # A post-norm's scale, or an embedding of positions, is not in every family.
            if glob.replace("*", "0") in index:
                names += [spec.name for spec, _ in index.select(glob, flags)]
        tokens, mask = self.prompts.input()
        cache: ActivationCache = self.bridge.run_with_cache(tokens, attention_mask=mask, names_filter=names)[1]
        return cache

    def places(self) -> list[Slice]:
        """For each row, the positions whose logit is attributed: one without an axis, or all."""
        last = last_real(self.prompts.real).tolist()
        return [Slice(place if self.positions == "last" else None) for place in last]

    def logits(self, head: Tensor, row: int, place: Slice) -> Tensor:
        """The attributed number of a row, ``[]`` or ``[pos]``, of the unembedding's output ``[row, pos, token]``."""
        at = widened(place.apply(head[row], 0))
        own = at[..., self.answers[row]]
        return own if self.foils is None else own - at[..., self.foils[row]]


def _ids(bridge: TransformerBridge, given: Answers, name: str, n_rows: int) -> Tensor:
    """``[row]``: token ids.

    Raises:
        InputError: no tokens, or not one for each row.
    """
    several = [given] * n_rows if isinstance(given, str | int) else check_list(name, given, "tokens")
    if isinstance(given, Tensor):
        several = given.reshape(-1).tolist()
    if len(several) != n_rows:
        raise InputError(f"{name} has {len(several)} tokens for {n_rows} rows: give one for all, or one for each.")
    most = bridge.cfg.d_vocab - 1
    return torch.tensor(
        [
            bridge.to_single_token(token) if isinstance(token, str) else check_count(name, token, 0, most)
            for token in several
        ]
    )


# -- attributions ------------------------------------------------------------------------------------------------------


def _components(run: ActivationCache, place: Slice, onto: Onto) -> tuple[Tensor, list[str]]:
    entered, labels = embeddings(run, place)
    outputs, more = branch_outputs(run, run.index.n_layers, False, place)
    return torch.stack([shown(row, onto) for row in [*entered, *outputs]]), [*labels, *more]


def _heads(run: ActivationCache, place: Slice, onto: Onto) -> tuple[Tensor, list[str]]:
    stack, labels = stack_heads(run, run.index.n_layers, place, onto)
    assert stack is not None
    return stack, labels


def _neurons(run: ActivationCache, place: Slice, onto: Onto) -> tuple[Tensor, list[str]]:
    stack, labels = stack_neurons(run, run.index.n_layers, Slice(None), place, onto)
    assert stack is not None
    return stack, labels


def _sources(run: ActivationCache, place: Slice, onto: Onto) -> tuple[Tensor, list[str]]:
    by_layer = []
    for layer in range(run.index.n_layers):
        moved = sources_written(run, layer, place, onto)  # [(pos), head, source, 1]
        by_layer.append(moved.flatten(-3, -2).movedim(-2, 0))
    heads, sources = moved.shape[-3:-1]
    labels = [f"L{i}H{h}<-{s}" for i in range(len(by_layer)) for h in range(heads) for s in range(sources)]
    return torch.cat(by_layer), labels


_PARTS: Mapping[str, Callable[[ActivationCache, Slice, Onto], tuple[Tensor, list[str]]]] = {
    "component": _components,
    "head": _heads,
    "neuron": _neurons,
    "source": _sources,
}
"""Parts ``[part, (pos), 1]`` of a run of one row, and their labels."""


@dataclass(frozen=True)
class _Found:
    """Attributions of all parts.

    Attributes:
        asked: the question.
        run: what was kept.
        values: ``[row, part]`` or ``[row, part, pos]``.
        labels: of the parts.
        logit: ``[row]`` or ``[row, pos]``.
        constant: ``[row]``.
    """

    asked: _Asked
    run: ActivationCache
    values: Tensor
    labels: list[str]
    logit: Tensor
    constant: Tensor

    @classmethod
    def of(cls, asked: _Asked) -> _Found:
        """Run the prompts, and attribute each row's logit."""
        bridge, run = asked.bridge, asked.run()
        values, logits, labels = [], [], list[str]()
        for row, place in enumerate(asked.places()):
            foil = None if asked.foils is None else asked.foils[row]
            one = run.apply_slice_to_batch_dim(row)
            direction = directions_of(bridge, asked.answers[row], foil).reshape(-1)
            onto = onto_of(one, widened(direction), bridge.cfg.n_layers, False, place, True)
            assert onto is not None
            parts, labels = _PARTS[asked.by](one, place, onto)
            values.append(widened(parts[..., 0]))
            logits.append(asked.logits(run["hook_unembed"], row, place))
        constant = widened(run.logit_bias(asked.answers, asked.foils)).reshape(-1)
        stacked = torch.stack(values)
        if asked.positions == "all":
            padding = ~asked.prompts.real.to(stacked.device)
            stacked = stacked.masked_fill(padding[:, None], torch.nan)
            logits = [logit.masked_fill(pad, torch.nan) for logit, pad in zip(logits, padding, strict=True)]
        return cls(asked, run, stacked, labels, torch.stack(logits), constant.to(stacked.device))

    def labelled(self, rows: Rows, top_k: int) -> xr.DataArray:
        """The result."""
        asked, bridge = self.asked, self.asked.bridge
        values, constant = self.values, self.constant
        if values.dim() == 3:
            constant = constant[:, None].expand(-1, values.shape[2])
        sums = {"logit": self.logit, "constant": constant, "remainder": self.logit - constant - values.sum(1)}
        if rows == "mean":
            values, sums = (
                values.nanmean(0, keepdim=True),
                {key: of.nanmean(0, keepdim=True) for key, of in sums.items()},
            )
        dims, coords, sizes, chosen = self._axes(values, top_k)
        more = (["row"] if rows == "each" else []) + (["pos"] if asked.positions == "all" else [])
        shaped = (
            values[:, chosen]
            .movedim(0, 1)
            .reshape(*sizes, *(values.shape[:1] if rows == "each" else ()), *values.shape[2:])
        )
        if asked.positions == "all":
            coords |= {"pos": ("pos", list(range(asked.prompts.length))), "token": ("pos", asked.prompts.columns())}
        for name, numbers in sums.items():
            coords[name] = (more, (numbers if rows == "each" else numbers[0]).cpu().numpy())
        tokenizer = bridge.tokenizer
        named = {"answer": asked.answers} | ({} if asked.foils is None else {"foil": asked.foils})
        about = about_run(
            bridge,
            "direct logit attribution",
            by=asked.by,
            positions=asked.positions,
            prompts=asked.prompts.text(),
            units="logits",
            **{
                name: [token_label(tokenizer, i) if tokenizer else str(i) for i in ids.tolist()]
                for name, ids in named.items()
            },
        )
        name = "logit" if asked.foils is None else "logit difference"
        return xr.DataArray(shaped.cpu().numpy(), coords, [*dims, *more], f"{name} attribution", about)

    def _axes(self, values: Tensor, top_k: int) -> tuple[list[str], dict[str, Any], tuple[int, ...], Sequence[int]]:
        """Names, coordinates and sizes of the axes of parts, and the parts that are shown."""
        cfg, everything = self.asked.bridge.cfg, range(len(self.labels))
        layers, heads = list(range(cfg.n_layers)), list(range(cfg.n_heads))
        if self.asked.by == "component":
            return ["component"], {"component": self.labels}, (len(self.labels),), everything
        if self.asked.by == "head":
            return ["layer", "head"], {"layer": layers, "head": heads}, (len(layers), len(heads)), everything
        if self.asked.by == "source":
            length = self.asked.prompts.length
            coords: dict[str, Any] = {"layer": layers, "head": heads, "source": list(range(length))}
            coords["source_token"] = ("source", self.asked.prompts.columns())
            return ["layer", "head", "source"], coords, (len(layers), len(heads), length), everything
        chosen = self.largest(top_k, values)
        width = cfg.sizes()["d_mlp"]
        coords = {
            "neuron": [self.labels[part] for part in chosen],
            "layer": ("neuron", [part // width for part in chosen]),
            "index": ("neuron", [part % width for part in chosen]),
        }
        return ["neuron"], coords, (len(chosen),), chosen

    def largest(self, count: int, values: Tensor | None = None) -> list[int]:
        """The parts whose attributions are largest in size, over rows and positions, those first."""
        sizes = (self.values if values is None else values).abs().nanmean(0)
        sizes = sizes.nanmean(-1) if sizes.dim() > 1 else sizes
        found: list[int] = sizes.topk(min(count, len(self.labels))).indices.tolist()
        return found


# -- the experiment ----------------------------------------------------------------------------------------------------


def _checked(asked: _Asked, found: _Found, result: xr.DataArray, count: int) -> xr.DataArray:
    """The result with the parts of the largest attributions measured."""
    parts = found.largest(count)
    measured = torch.stack([_measured(asked, found, part) for part in parts], 1)
    attributed = found.values[:, parts]
    apart = (measured - attributed).abs()
    return result.assign_attrs(
        checked=[found.labels[part] for part in parts],
        attributed=_means(attributed),
        measured=_means(measured),
        disagreement=float(np.nanmax(apart.cpu().numpy())),
    )


def _means(values: Tensor) -> list[float]:
    """Over rows and positions, of ``[row, part, (pos)]``."""
    by_part = values.movedim(1, 0).flatten(1)
    means: list[float] = by_part.nanmean(-1).tolist()
    return means


def _measured(asked: _Asked, found: _Found, part: int) -> Tensor:
    """``[row]`` or ``[row, pos]``: by how much the logits fall when a part is taken from what the final norm reads."""
    bridge, last = asked.bridge, asked.bridge.cfg.n_layers - 1
    written: dict[str, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = _taken_away(asked, found, part, written)

    def without(tensor: Tensor, hook: Any) -> Tensor:
        return tensor - written["part"]

    def kept_scale(tensor: Tensor, hook: Any) -> Tensor:
        return found.run["ln_final.hook_scale"]

    def read(tensor: Tensor, hook: Any) -> None:
        written["logits"] = tensor

    hooks += [(f"blocks.{last}.hook_resid_post", without), ("ln_final.hook_scale", kept_scale), ("hook_unembed", read)]
    tokens, mask = asked.prompts.input()
    bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask, return_type=None)
    after = [asked.logits(written["logits"], row, place) for row, place in enumerate(asked.places())]
    return found.logit - torch.stack(after)


def _taken_away(
    asked: _Asked, found: _Found, part: int, written: dict[str, Tensor]
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """Functions that measure what a part writes, put it into ``written["part"]``, and leave the stream as it was."""

    def keep(tensor: Tensor, hook: Any) -> None:
        written["part"] = tensor.clone()

    if asked.by == "component":
        name = found.labels[part]
        of_layer, _, rest = name.partition("_")
        return [(f"blocks.{of_layer}.hook_{rest}" if of_layer.isdigit() else f"hook_{name}", keep)]
    cfg, length = asked.bridge.cfg, asked.prompts.length
    at: tuple[Any, ...]
    if asked.by == "neuron":
        layer, own = divmod(part, cfg.sizes()["d_mlp"])
        site, at, branch, norm = "mlp.hook_post", (..., own), "mlp", "ln2_post"
    elif asked.by == "head":
        layer, own = divmod(part, cfg.n_heads)
        site, at, branch, norm = "attn.hook_z", (..., own, slice(None)), "attn", "ln1_post"
    else:
        layer, own = divmod(part, cfg.n_heads * length)
        at = (slice(None), own // length, slice(None), own % length)
        site, branch, norm = "attn.hook_pattern", "attn", "ln1_post"

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        edited = tensor.clone()
        edited[at] = 0
        return edited

    output, scale = f"blocks.{layer}.hook_{branch}_out", f"blocks.{layer}.{norm}.hook_scale"
    tokens, mask = asked.prompts.input()
    names = [output, *([scale] if scale in asked.bridge.hook_index else [])]
    before: ActivationCache = asked.bridge.run_with_cache(tokens, attention_mask=mask, names_filter=names)[1]

    def compare(tensor: Tensor, hook: Any) -> Tensor:
        written["part"] = before[output] - tensor
        return before[output]

    def as_before(tensor: Tensor, hook: Any) -> Tensor:
        return before[scale]

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = [(f"blocks.{layer}.{site}", zero)]
    return [*hooks, *([(scale, as_before)] if len(names) > 1 else []), (output, compare)]
