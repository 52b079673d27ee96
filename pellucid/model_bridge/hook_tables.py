"""From a family to its hook points, in firing order, with every name that TransformerLens has for them.

A line names the component on which people find the point (``attn``, ``mlp``, ``ln1``). Which component fires it follows from
how the components are linked: queries, say, are the output of a projection of their own or a part of a fused one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pellucid.model_bridge.family import Family
from pellucid.names import HookSpec

_RESIDUAL = ("batch", "pos", "d_model")
_QUERIES = ("batch", "pos", "n_heads", "d_head")
_KEYS = ("batch", "pos", "n_key_value_heads", "d_head")
_PER_HEAD_RESIDUAL = ("batch", "pos", "n_heads", "d_model")
_SCORES = ("batch", "n_heads", "pos", "key_pos")
_NEURONS = ("batch", "pos", "d_mlp")
_EXPERTS = ("batch", "pos", "n_experts")
_LOGITS = ("batch", "pos", "d_vocab")
_ONE = ("batch", "pos", "1")

_B = "blocks.{i}"
_ATTN = "blocks.{i}.attn"
_MLP = "blocks.{i}.mlp"

_PARTS = (("q", "queries"), ("k", "keys"), ("v", "values"))


@dataclass(frozen=True)
class HookTable:
    """Hook points of a model, each group in firing order, ``{i}`` for the layer.

    Attributes:
        before: fired before the blocks.
        block: in a block.
        after: fired after the blocks.
        first_aliases: further names of points of the first block.
    """

    before: tuple[HookSpec, ...]
    block: tuple[HookSpec, ...]
    after: tuple[HookSpec, ...]
    first_aliases: Mapping[str, str]


def hook_table(family: Family, shares_heads: bool) -> HookTable:
    """Every hook point of a family.

    Args:
        family: the family, as a model has it.
        shares_heads: whether several heads of queries share one of keys and values.
    """
    table = _Writer(family, shares_heads)
    # What an embedding is multiplied with, in no module, is first seen where the product enters the blocks.
    first = {"hook_embed": f"{_B}.hook_resid_pre"} if family.outside.embed_multiplier else {}
    found = HookTable(tuple(table.before()), tuple(table.block()), tuple(table.after()), first)
    if shares_heads:
        return found
    # With as many heads of keys as of queries the axis has the word that everybody knows.
    return replace(found, block=tuple(replace(spec, axes=_one_word(spec.axes)) for spec in found.block))


def _one_word(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("n_heads" if axis == "n_key_value_heads" else axis for axis in axes)


class _Writer:
    """Writes the lines of one family."""

    def __init__(self, family: Family, shares_heads: bool) -> None:
        self.family, self.shares_heads = family, shares_heads

    def norm(self, component: str) -> Iterator[HookSpec]:
        """The inside of a norm."""
        centred, biased = self.family.norm.centres, self.family.norm.kind == "layer"
        yield HookSpec(
            f"{component}.hook_scale",
            component,
            "hook_scale",
            _ONE,
            "sqrt(variance + eps)" if centred else "sqrt(mean square + eps)",
            kind="wide",
        )
        yield HookSpec(
            f"{component}.hook_normalized",
            component,
            "hook_normalized",
            _RESIDUAL,
            f"{'(x - mean)' if centred else 'x'} / scale, before {'gain and bias' if biased else 'the gain'}",
            kind="wide",
        )

    @property
    def _affine(self) -> str:
        return "gain and bias applied" if self.family.norm.kind == "layer" else "gain applied"

    # -- outside the blocks --------------------------------------------------------------------------------------------

    def before(self) -> Iterator[HookSpec]:
        """Token ids to what enters the first block."""
        outside = self.family.outside
        yield HookSpec(
            "embed.hook_in",
            "embed",
            "hook_in",
            ("batch", "pos"),
            "token ids; an edit replaces tokens",
            kind="int",
        )
        if outside.embed_norm:
            yield HookSpec(
                "embed.hook_out",
                "embed_ln",
                "hook_in",
                _RESIDUAL,
                f"output of {outside.embed}, before the embedding norm",
                aliases=("embed_ln.hook_in",),
            )
            yield from self.norm("embed_ln")
            yield HookSpec(
                "hook_embed",
                "embed_ln",
                "hook_out",
                _RESIDUAL,
                f"output of {outside.embed_norm}: what enters the residual stream",
                aliases=("embed_ln.hook_out",),
            )
        elif outside.embed_multiplier:
            yield HookSpec(
                "embed.hook_out",
                "embed",
                "hook_out",
                _RESIDUAL,
                f"output of {outside.embed}, before it is multiplied; what enters the stream is hook_embed",
            )
        else:
            yield HookSpec(
                "hook_embed",
                "embed",
                "hook_out",
                _RESIDUAL,
                f"output of {outside.embed}: what the token adds to the residual stream",
                aliases=("embed.hook_out",),
            )
        if outside.pos_embed:
            yield HookSpec(
                "hook_pos_embed",
                "pos_embed",
                "hook_out",
                _RESIDUAL,
                f"output of {outside.pos_embed}: what the position adds to the residual stream",
                aliases=("pos_embed.hook_out",),
            )

    def after(self) -> Iterator[HookSpec]:
        """What leaves the last block to the logits."""
        changes = self.family.logits_change
        yield from self.norm("ln_final")
        yield HookSpec(
            "ln_final.hook_out",
            "ln_final",
            "hook_out",
            _RESIDUAL,
            f"output of {self.family.outside.final_norm}, {self._affine}",
            aliases=("unembed.hook_in",),
        )
        yield HookSpec(
            "hook_unembed",
            "unembed",
            "hook_out",
            _LOGITS,
            "output of the unembedding, before it is capped or scaled" if changes else "logits",
            aliases=("unembed.hook_out",) if changes else ("unembed.hook_out", "hook_logits"),
        )
        if changes:
            yield HookSpec("hook_logits", "model", "hook_logits", _LOGITS, "logits, capped or scaled as users get them")

    # -- a block -------------------------------------------------------------------------------------------------------

    def block(self) -> Iterator[HookSpec]:
        """What enters the block to what leaves it."""
        block = self.family.block
        first = (f"{_B}.ln1.hook_in",) if block.ln1 else (f"{_ATTN}.hook_in",)
        yield HookSpec(
            f"{_B}.hook_resid_pre",
            _B,
            "hook_in",
            _RESIDUAL,
            "what enters the block; feeds both the attention branch and the stream",
            aliases=(f"{_B}.hook_in", *first),
        )
        if block.ln1:
            shared = block.parallel and not block.ln2
            yield from self.norm(f"{_B}.ln1")
            yield HookSpec(
                f"{_B}.ln1.hook_out",
                f"{_B}.ln1",
                "hook_out",
                _RESIDUAL,
                f"output of the first norm, {self._affine}" + ("; feeds attention and MLP" if shared else ""),
                aliases=(f"{_ATTN}.hook_in", *self.shared_with_mlp()) if shared else (f"{_ATTN}.hook_in",),
            )
        if block.norms_first:
            yield from self.between()
        yield from self.attention()
        if not block.norms_first:
            yield from self.between()
        yield from self.mlp()
        yield HookSpec(
            f"{_B}.hook_resid_post",
            _B,
            "hook_out",
            _RESIDUAL,
            "what leaves the block",
            aliases=(f"{_B}.hook_out", f"{_MLP}.hook_out") if block.adds_residual else (f"{_B}.hook_out",),
        )

    def shared_with_mlp(self) -> tuple[str, ...]:
        """Names as the MLP's input of what a norm gives attention and MLP."""
        return (f"{_MLP}.hook_in", *(() if self.family.mlp.router else (f"{_MLP}.in.hook_in",)))

    def attention(self) -> Iterator[HookSpec]:
        """From the first norm to what attention adds."""
        family, attention = self.family, self.family.attention
        yield from self.per_head_inputs()
        yield from self.projections()
        if attention.rotary:
            for part, word in (_PARTS[1], _PARTS[0]):  # keys enter the cache before queries meet them
                yield HookSpec(
                    f"{_ATTN}.hook_rot_{part}",
                    _ATTN,
                    f"hook_rot_{part}",
                    _QUERIES if part == "q" else _KEYS,
                    f"{word} after the rotation",
                )
        yield HookSpec(
            f"{_ATTN}.hook_attn_scores",
            _ATTN,
            "hook_attn_scores",
            _SCORES,
            "ALiBi added, scaled, masked, before the softmax"
            if family.block.adds_residual
            else "scaled and masked: what the softmax is given",
            kind="wide" if attention.wide_scores else "model",
        )
        yield HookSpec(
            f"{_ATTN}.hook_pattern", _ATTN, "hook_pattern", _SCORES, "after the softmax, in the model's dtype"
        )
        yield HookSpec(
            f"{_ATTN}.hook_z", _ATTN, "hook_z", _QUERIES, "pattern times values", aliases=(f"{_ATTN}.o.hook_in",)
        )
        yield HookSpec(
            f"{_ATTN}.hook_result",
            _ATTN,
            "hook_result",
            _PER_HEAD_RESIDUAL,
            "each head's contribution, without b_O",
            flag="use_attn_result",
        )
        yield from self.branch(
            f"{_B}.hook_attn_out",
            _ATTN,
            "hook_attn_out",
            f"{_B}.ln1_post" if family.block.ln1_post else "",
            f"attention's additive contribution: output of {attention.o.rpartition('.')[2]}, before the residual is added",
            f"{_ATTN}.o.hook_out",
        )

    def projections(self) -> Iterator[HookSpec]:
        """Queries, keys and values: a fused projection gives them together, three give them one after the other."""
        attention = self.family.attention
        inputs = [self.projection_input(part, word) for part, word in _PARTS]
        outputs = [self.projection_output(part, word) for part, word in _PARTS]
        normed = [self.head_norm(part, word) for part, word in _PARTS[:2]] if attention.q_norm else []
        if attention.qkv:
            yield from (*inputs, *outputs, *normed)
            return
        # A norm of heads that lie before the positions comes after all three; any other at once.
        later = normed if attention.head_norm == "heads first" else []
        for place, (entering, made) in enumerate(zip(inputs, outputs, strict=True)):
            yield from (entering, made)
            if not later:
                yield from normed[place : place + 1]
        yield from later

    def projection_input(self, part: str, word: str) -> HookSpec:
        """What feeds one of the three alone."""
        what = "output of the first norm" if self.family.block.ln1 else "what enters attention"
        doc = f"{what}, a copy that feeds the {word} only"
        return HookSpec(f"{_ATTN}.{part}.hook_in", _ATTN, f"hook_{part}_in", _RESIDUAL, doc)

    def projection_output(self, part: str, word: str) -> HookSpec:
        """One of the three."""
        axes, alias = _QUERIES if part == "q" else _KEYS, f"{_ATTN}.{part}.hook_out"
        doc = f"{word} of the new positions"
        return HookSpec(f"{_ATTN}.hook_{part}", _ATTN, f"hook_{part}", axes, doc, aliases=(alias,))

    def head_norm(self, part: str, word: str) -> HookSpec:
        """Queries or keys after their norm."""
        axes, alias = _QUERIES if part == "q" else _KEYS, f"{_ATTN}.{part}_norm.hook_out"
        site = f"hook_{part}_normed"
        return HookSpec(f"{_ATTN}.{site}", _ATTN, site, axes, f"{word} after their norm", aliases=(alias,))

    def per_head_inputs(self) -> Iterator[HookSpec]:
        """Copies of the residual before the first norm, one a head.

        Where several heads of queries share one of keys, no copy would feed one head alone: there are split inputs only.
        """
        before = "the residual before ln1" if self.family.block.ln1 else "the residual"
        if not self.shares_heads:
            yield HookSpec(
                f"{_B}.hook_attn_in",
                _ATTN,
                "hook_attn_in",
                _PER_HEAD_RESIDUAL,
                f"{before}, one copy a head, for queries, keys and values",
                aliases=(f"{_ATTN}.hook_attn_in",),
                flag="use_attn_in",
            )
        for part, word in _PARTS:
            yield HookSpec(
                f"{_B}.hook_{part}_input",
                _ATTN,
                f"hook_{part}_input",
                _PER_HEAD_RESIDUAL if part == "q" else ("batch", "pos", "n_key_value_heads", "d_model"),
                f"{before}, one copy a head, for the {word}",
                aliases=(f"{_ATTN}.hook_{part}_input",),
                flag="use_split_qkv_input",
            )

    def branch(self, name: str, component: str, site: str, post_norm: str, doc: str, alias: str) -> Iterator[HookSpec]:
        """What a branch gives and what it adds to the stream, which a norm or a multiplier after it makes two tensors.

        ``alias`` is the name that it has as a projection's output, ``""`` where it is none's.
        """
        own, names = f"{component}.hook_out", (alias,) if alias else ()
        if self.family.block.multiplier:
            yield HookSpec(
                own, component, site, _RESIDUAL, "output of the branch, before it is multiplied", aliases=names
            )
            yield HookSpec(
                name,
                _B,
                site,
                _RESIDUAL,
                "additive contribution: the branch's output multiplied, before the residual is added",
            )
        elif self.family.block.adds_residual:
            yield HookSpec(name, component, site, _RESIDUAL, doc, aliases=names)
        elif not post_norm:
            yield HookSpec(name, component, site, _RESIDUAL, doc, aliases=(*names, own))
        else:
            yield HookSpec(own, component, site, _RESIDUAL, "output of the branch, before its norm", aliases=names)
            yield from self.norm(post_norm)
            yield HookSpec(
                name,
                post_norm,
                "hook_out",
                _RESIDUAL,
                f"additive contribution: output of the branch's norm, {self._affine}, before the residual is added",
                aliases=(f"{post_norm}.hook_out",),
            )

    def between(self) -> Iterator[HookSpec]:
        """From what attention added to what enters the MLP."""
        block = self.family.block
        if not block.parallel:
            if block.adds_residual:
                where, doc = (_ATTN, "hook_out"), "attention module's output, residual added"
                names: tuple[str, ...] = (f"{_ATTN}.hook_out", f"{_ATTN}.hook_hidden_states", f"{_B}.ln2.hook_in")
            elif block.ln2:
                where, doc, names = (f"{_B}.ln2", "hook_in"), "attention's contribution added", (f"{_B}.ln2.hook_in",)
            else:
                where, doc = (_MLP, "hook_in"), "attention's contribution added"
                names = (f"{_MLP}.hook_in", *(() if self.family.mlp.is_gated else (f"{_MLP}.in.hook_in",)))
            yield HookSpec(
                f"{_B}.hook_resid_mid",
                *where,
                _RESIDUAL,
                f"{doc}; feeds both the MLP branch and the stream",
                aliases=names,
            )
        if not block.ln2:
            return
        if block.parallel:
            yield HookSpec(
                f"{_B}.ln2.hook_in",
                f"{_B}.ln2",
                "hook_in",
                _RESIDUAL,
                "the residual that enters the block, a copy that feeds the MLP branch only",
            )
        yield HookSpec(
            f"{_B}.hook_mlp_in",
            f"{_B}.ln2",
            "hook_branch_in",
            _RESIDUAL,
            "the residual before ln2, a copy that feeds the MLP branch only",
            flag="use_hook_mlp_in",
        )
        yield from self.norm(f"{_B}.ln2")
        fed = (f"{_B}.ln2.hook_out",) if self.family.mlp.is_gated else (f"{_MLP}.in.hook_in", f"{_B}.ln2.hook_out")
        yield HookSpec(
            f"{_MLP}.hook_in",
            f"{_B}.ln2",
            "hook_out",
            _RESIDUAL,
            "what enters the MLP: output of the second norm",
            aliases=fed,
        )

    def mlp(self) -> Iterator[HookSpec]:
        """From what enters the MLP to what it adds."""
        mlp, name = self.family.mlp, "GELU" if self.family.block.adds_residual else "the activation"
        if mlp.router:
            yield from self.experts()
            return
        pre = HookSpec(
            f"{_MLP}.hook_pre",
            _MLP,
            "hook_pre",
            _NEURONS,
            f"before {name}",
            aliases=(f"{_MLP}.gate.hook_out" if mlp.is_gated else f"{_MLP}.in.hook_out",),
        )
        yield pre
        if mlp.is_gated:
            yield HookSpec(
                f"{_MLP}.hook_pre_linear",
                _MLP,
                "hook_pre_linear",
                _NEURONS,
                "what the activated gate is multiplied with",
                aliases=(f"{_MLP}.in.hook_out",),
            )
        yield HookSpec(
            f"{_MLP}.hook_post",
            _MLP,
            "hook_post",
            _NEURONS,
            "activated gate times up: the neurons" if mlp.is_gated else f"after {name}: the neurons",
            aliases=(f"{_MLP}.out.hook_in",),
        )
        yield from self.branch(
            f"{_B}.hook_mlp_out",
            _MLP,
            "hook_mlp_out",
            f"{_B}.ln2_post" if self.family.block.ln2_post else "",
            f"MLP's additive contribution: output of {mlp.down.rpartition('.')[2]}, before the residual is added",
            f"{_MLP}.out.hook_out",
        )

    def experts(self) -> Iterator[HookSpec]:
        """What chooses the experts, and what they and the modules beside them add."""
        yield HookSpec(
            f"{_MLP}.hook_router_logits",
            _MLP,
            "hook_router_logits",
            _EXPERTS,
            "router logits; an edit changes which experts a token goes through, and their weights",
            aliases=(f"{_MLP}.gate.hook_out",),
        )
        yield from self.branch(
            f"{_B}.hook_mlp_out",
            _MLP,
            "hook_mlp_out",
            f"{_B}.ln2_post" if self.family.block.ln2_post else "",
            "MLP's additive contribution: weighted sum of the chosen experts, before the residual is added",
            "",
        )
