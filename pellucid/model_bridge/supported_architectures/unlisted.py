"""A decoder of no family that is known, whose modules have the names that known ones have: *unlisted*.

Its family is read off the model. Names say which module is which, and every module with weights has to be one that is known;
what names do not say (whether branches are parallel, how its norms compute, how the parts of a fused projection lie, whether
its logits are the head's output) is seen in one forward of the bare model. Which points hold is for checks to find
(:mod:`~pellucid.model_bridge.verification.unlisted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.family import LAYER_NORM, Attention, Family, HeadNorm, NormKind, Outside, Settings
from pellucid.model_bridge.generalized_components.hf_arguments import forward_parameters
from pellucid.model_bridge.supported_architectures.reading import read_settings
from pellucid.model_bridge.supported_architectures.unlisted_layouts import (
    check_gate_first,
    proved_attention,
    watching_attention,
)

T = TypeVar("T")

_NORMS = (
    NormKind(rounds_first=True),
    NormKind(rounds_first=False),
    NormKind(gain="1 + weight", rounds_first=False),
    NormKind("centred", rounds_first=False),
)


def unlisted_family(model: nn.Module, known: Iterable[Family]) -> Family:
    """The family of a model that is none of those known.

    Args:
        model: the bare causal language model.
        known: families whose names its modules may have.

    Raises:
        UnsupportedModelError: its modules fit none, with what was looked for.
    """
    return _seen(model, named_family(model, known))


def named_family(model: nn.Module, known: Iterable[Family]) -> Family:
    """As far as names and sizes say it; the model may have no weights yet (on the device ``meta``).

    Raises:
        UnsupportedModelError: its modules fit none, with what was looked for.
    """
    families = list(known)
    outside = _fitting(model, "the model", {each.outside: _outside(each.outside) for each in families})
    blocks: Any = model.get_submodule(f"{outside.backbone}.{outside.blocks}")
    first = blocks[0]
    options = {
        (each.block, each.attention.name, each.mlp.name): [
            *(each.block.ln1, each.block.ln2, each.block.ln1_post, each.block.ln2_post),
            *(each.attention.name, each.mlp.name),
        ]
        for each in families
    }
    block, attention_name, mlp_name = _fitting(first, "a block", options)
    attentions = {each.attention for each in families if each.attention.name == attention_name}
    attention = _fitting(
        first.get_submodule(attention_name),
        f"{attention_name} of a block",
        {made: list(made.children) for made in map(_plain, attentions)},
    )
    mlp = _fitting(
        first.get_submodule(mlp_name),
        f"{mlp_name} of a block",
        {each.mlp: list(each.mlp.children) for each in families if each.mlp.name == mlp_name},
    )
    config: Any = model.config
    family = Family(
        str(config.model_type),
        f"{config.model_type} (unlisted)",
        outside,
        replace(block, parallel=False, residual_first=False),
        attention,
        mlp,
        takes_position_ids="position_ids" in forward_parameters(type(model)),
        float64=False,
        listed=False,
        notes="Read off the model: no family of this name is known.",
    )
    return _with_settings(model, family, {each.settings for each in families})


def _plain(attention: Attention) -> Attention:
    return replace(attention, softmax_in="function", pattern_at="dropout", wide_scores=False)


def _outside(outside: Outside) -> list[str]:
    inside = (outside.blocks, outside.embed, outside.pos_embed, outside.embed_norm, outside.final_norm)
    return [outside.head, *(f"{outside.backbone}.{name}" for name in inside if name)]


def _fitting(module: nn.Module, where: str, options: dict[T, list[str]]) -> T:
    """The option all of whose modules are there, and no other module with weights."""
    for option, names in options.items():
        wanted = {name for name in names if name}
        if {name for name, _ in module.named_modules() if name in wanted} != wanted:
            continue
        if not [name for name, _ in module.named_parameters() if not name.startswith(tuple(f"{w}." for w in wanted))]:
            return option
    present = sorted({name.rpartition(".")[0] or name for name, _ in module.named_parameters() if name.count(".") < 3})
    tried = sorted({", ".join(name for name in names if name) for names in options.values()})
    raise UnsupportedModelError(
        f"This model is of no family that Pellucid knows, and the modules of {where} are not those of one. There: "
        f"{', '.join(present[:12])}. Looked for one of:\n" + "\n".join(f"  {line}" for line in tried)
    )


def _seen(model: nn.Module, family: Family) -> Family:
    """What one forward of the bare model shows of its norms, its branches and its logits."""
    names, outside = family.block, family.outside
    block = model.get_submodule(f"{outside.backbone}.{outside.blocks}.0")
    head = model.get_submodule(outside.head)
    branch = names.ln2 or names.ln1
    attention = block.get_submodule(family.attention.name)
    watched: dict[str, nn.Module] = {
        "block": block,
        "head": head,
        "final": model.get_submodule(family.inside(outside.final_norm)),
    }
    watched["attention"] = attention.get_submodule(family.attention.o)
    mlp = block.get_submodule(family.mlp.name)
    watched["mlp"] = mlp if family.mlp.router else mlp.get_submodule(family.mlp.down)
    if branch:
        watched["branch"] = block.get_submodule(branch)
    fused, both = family.attention.qkv, family.mlp.gate_up
    if fused:
        watched["qkv"] = attention.get_submodule(fused)
    if both:
        watched["gate_up"] = mlp.get_submodule(both)
    if family.attention.q_norm:
        watched["q_norm"] = attention.get_submodule(family.attention.q_norm)
    config: Any = model.config
    device = next(model.get_submodule(family.inside(outside.embed)).parameters()).device
    tokens = torch.arange(1, 8, device=device)[None] % int(config.vocab_size)  # seven positions: no number of heads
    with _watching(watched) as seen, watching_attention(attention) as attended, torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    parallel = bool(names.ln2) and torch.equal(seen["branch"][0], seen["block"][0])
    parallel = parallel or not (names.ln2 or names.ln1_post or names.ln2_post)
    attention_data = replace(family.attention, rotary="position_embeddings" in forward_parameters(type(attention)))
    if "q_norm" in seen:
        given = seen["q_norm"][0]
        order: HeadNorm = (
            "flat" if given.dim() == 3 else "positions first" if given.shape[1] == tokens.shape[1] else "heads first"
        )
        attention_data = replace(attention_data, head_norm=order)
    if fused:
        known = replace(family, attention=attention_data)
        attention_data = proved_attention(known, read_settings(family, config), seen["qkv"][1], attended)
    if both:
        check_gate_first(family, mlp, seen["gate_up"][1], seen["mlp"][0])
    residual, left = seen["block"]
    gives_tuple = isinstance(left, tuple)
    summed = residual + seen["attention"][1] + seen["mlp"][1]
    block_data = replace(
        names,
        parallel=parallel,
        residual_first=parallel and torch.equal(summed, left[0] if gives_tuple else left),
        gives_tuple=gives_tuple,
    )
    return replace(
        family,
        block=block_data,
        attention=attention_data,
        norm=_norm_kind(watched["final"], *seen["final"]),
        logits_change=not torch.equal(logits, seen["head"][1]),
    )


@contextmanager
def _watching(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """By name, what each module was given and what it gave."""
    seen: dict[str, tuple[Tensor, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            made = output[0] if isinstance(output, tuple) and name != "block" else output
            seen[name] = (given.detach().clone(), made.clone() if isinstance(made, Tensor) else made)

        return hook

    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _norm_kind(module: nn.Module, x: Tensor, output: Tensor) -> NormKind:
    """The way of computing that gives what a norm gave, to rounding.

    Raises:
        UnsupportedModelError: none does.
    """
    if isinstance(module, nn.LayerNorm):
        return LAYER_NORM
    eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if eps is not None and weight is not None and "bias" not in module._parameters:
        errors = []
        for kind in _NORMS:
            wide = x.double()
            wide = wide - wide.mean(-1, keepdim=True) if kind.centres else wide
            normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            gain = weight.double() + (1 if kind.gain == "1 + weight" else 0)
            normalized = normalized.to(x.dtype).double() if kind.rounds_first else normalized
            errors.append(float((normalized * gain - output.double()).abs().max()))
        # One rounding of the normalised input and one of the product, and float32's inside.
        bound = 4 * torch.finfo(x.dtype).eps * float(output.double().abs().max())
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] <= bound:
            return _NORMS[best]
    raise UnsupportedModelError(
        f"This model is of no family that Pellucid knows, and its norms ({type(module).__name__}) compute in no way that it "
        "knows: a layer norm, or a root mean square with a gain of weight or 1 + weight."
    )


def _with_settings(model: nn.Module, family: Family, options: Iterable[Settings]) -> Family:
    """The family with the names of its configuration's sizes, which have to be the modules' own."""
    config: Any = model.config
    problems: list[str] = []
    for settings in sorted(options, key=str):
        made = replace(family, settings=settings)
        try:
            cfg = read_settings(made, config)
        except UnsupportedModelError as error:
            problems.append(str(error).splitlines()[-2].strip())
            continue
        wrong = _other_sizes(model, made, cfg)
        if not wrong:
            return made
        problems.append(wrong)
    raise UnsupportedModelError(
        "This model is of no family that Pellucid knows, and its configuration gives its sizes under no names that are "
        "known:\n" + "\n".join(f"  {line}" for line in sorted(set(problems)))
    )


def _other_sizes(model: nn.Module, family: Family, cfg: TransformerBridgeConfig) -> str:
    """What is wrong with the sizes that a configuration gives, ``""`` if nothing is."""
    blocks: Any = model.get_submodule(family.blocks_path)
    attention = blocks[0].get_submodule(family.attention.name)
    mlp = blocks[0].get_submodule(family.mlp.name)
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    wanted: dict[str, tuple[int | None, int]] = {
        "n_layers": (len(blocks), cfg.n_layers),
    }
    widths = (q + 2 * kv,) if family.attention.qkv else (q, kv, kv)
    for name, width in zip(family.attention.projections, widths, strict=True):
        wanted[name] = (_rows(attention, name), width)
    if family.mlp.router:
        stacked = [each.numel() for each in mlp.get_submodule(family.mlp.experts).parameters() if each.dim() == 3]
        wanted[family.mlp.router] = (_rows(mlp, family.mlp.router), cfg.num_experts)
        wanted[family.mlp.experts] = (min(stacked, default=0), cfg.num_experts * cfg.d_model * cfg.sizes()["d_mlp"])
    elif family.mlp.gate_up:
        wanted[family.mlp.gate_up] = (_rows(mlp, family.mlp.gate_up), 2 * cfg.sizes()["d_mlp"])
    else:
        wanted[family.mlp.up] = (_rows(mlp, family.mlp.up), cfg.sizes()["d_mlp"])
    return "; ".join(f"{name}: {found} there, {said} said" for name, (found, said) in wanted.items() if found != said)


def _rows(parent: nn.Module, name: str) -> int | None:
    layer = parent.get_submodule(name)
    weight = layer._parameters.get("weight")
    known = (vars(layer).get("out_features"), vars(layer).get("nf"))  # Conv1D's is [in, out]
    return next((width for width in known if width is not None), None if weight is None else weight.shape[0])
