"""A family of models as data: what its modules are called, how they meet, and what its configurations say.

One :class:`Family` describes every decoder that shares a layout. The table of hook points, the components, the oracle of
edits and the reading of a configuration are made from it, so that nothing above the adapter asks for a family's name. What
two configurations of one family do differently is two families: :attr:`Family.variant` chooses. A switch that only one
family needs is no field here but a subclass of a component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

FusedLayout = Literal["stacked", "grouped"]
"""Queries, keys and values one after the other, or each key/value head's queries, its key and its value together."""

HeadNorm = Literal["positions first", "heads first", "flat"]
"""What the norm of queries or keys is given: see :class:`Attention`."""


@dataclass(frozen=True)
class NormKind:
    """How the norms of a family compute.

    Attributes:
        kind: ``"layer"`` is torch's ``nn.LayerNorm``; ``"rms"`` divides by the root mean square; ``"centred"`` subtracts the
            mean first, has no bias, and is a class of the family's own.
        gain: what the normalised input is multiplied with; Gemma's weight is the gain less 1.
        rounds_first: whether it is rounded to the model's dtype before it is multiplied with the gain.
    """

    kind: Literal["layer", "rms", "centred"] = "rms"
    gain: Literal["weight", "1 + weight"] = "weight"
    rounds_first: bool = True

    @property
    def centres(self) -> bool:
        """Whether the mean is subtracted."""
        return self.kind != "rms"


LAYER_NORM = NormKind("layer")
RMS_NORM = NormKind("rms")


@dataclass(frozen=True)
class Outside:
    """Paths of the modules outside the blocks: those of the backbone inside it, the head's in the model; ``""``: none.

    ``head_has_bias``: Hugging Face's class makes the head with a bias, so that its loader keeps one. ``head_in_files``: what
    checkpoints call the head where that is not its module's name. ``embed_multiplier``: the backbone's attribute with which
    it multiplies the embedding before the first block.
    """

    backbone: str = "model"
    blocks: str = "layers"
    embed: str = "embed_tokens"
    pos_embed: str = ""
    embed_norm: str = ""
    final_norm: str = "norm"
    head: str = "lm_head"
    head_has_bias: bool = False
    head_in_files: str = ""
    embed_multiplier: str = ""


@dataclass(frozen=True)
class Block:
    """Norms of a block and how its branches meet.

    Attributes:
        ln1: norm before attention, ``""`` where there is none.
        ln2: norm before the MLP.
        ln1_post: norm after attention, before the residual is added.
        ln2_post: norm after the MLP, before the residual is added.
        parallel: attention and MLP read the residual that enters the block, and both are added to it.
        norms_first: both norms of such a block run before attention.
        residual_first: that sum is ``(residual + attention) + mlp``, not ``(attention + mlp) + residual``.
        multiplier: the block's attribute with which it multiplies what a branch gives before it is added, ``""`` for none.
        gives_tuple: Hugging Face's block gives ``(residual, ...)``, not the residual alone.
        adds_residual: attention and MLP add the residual themselves (BLOOM).
    """

    ln1: str = "input_layernorm"
    ln2: str = "post_attention_layernorm"
    ln1_post: str = ""
    ln2_post: str = ""
    parallel: bool = False
    norms_first: bool = False
    residual_first: bool = False
    multiplier: str = ""
    gives_tuple: bool = False
    adds_residual: bool = False

    @property
    def changes_attn(self) -> bool:
        """Whether what is added to the stream is not yet what attention gives."""
        return bool(self.ln1_post or self.multiplier)

    @property
    def changes_mlp(self) -> bool:
        """Whether what is added to the stream is not yet what the MLP gives."""
        return bool(self.ln2_post or self.multiplier)


@dataclass(frozen=True)
class Attention:
    """Attention and its children.

    Attributes:
        name: in the block.
        q: projection to queries; unused where ``qkv`` is given.
        k: projection to keys.
        v: projection to values.
        qkv: one projection to all three, ``""`` where there are three.
        layout: how they lie in it.
        o: output projection.
        q_norm: norm of the queries before they are rotated, ``""`` where there is none.
        k_norm: norm of the keys.
        head_norm: that norm is over one head's features, ``[..., pos, head, d_head]``; over those of one head,
            ``[..., head, pos, d_head]``; or over all heads' together.
        rotary: queries and keys are rotated by position.
        softmax_in: where Hugging Face's softmax is: in the attention function that the forward looks up, in the forward
            itself, or in a method of the attention, by its name.
        pattern_at: the pattern is what the dropout function after the softmax gives, or what a dropout module (by its
            name) gives, or what the softmax gives where there is no dropout.
        wide_scores: the scores are float32 in half precision too.
        heads_first: the method that has the softmax gives ``z`` with heads before positions (GPT-J, CodeGen).
        clip: the attribute of Hugging Face's attention with the size at which queries, keys and values are cut off behind
            their points, ``""`` where there is none; it may hold ``None``.
    """

    name: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str = ""
    layout: FusedLayout = "stacked"
    o: str = "o_proj"
    q_norm: str = ""
    k_norm: str = ""
    head_norm: HeadNorm = "positions first"
    rotary: bool = True
    softmax_in: str = "function"
    pattern_at: str = "dropout"
    wide_scores: bool = False
    heads_first: bool = False
    clip: str = ""

    @property
    def projections(self) -> tuple[str, ...]:
        """Its projections to queries, keys and values."""
        return (self.qkv,) if self.qkv else (self.q, self.k, self.v)

    @property
    def children(self) -> tuple[str, ...]:
        """Its modules that have weights."""
        return tuple(name for name in (*self.projections, self.o, self.q_norm, self.k_norm) if name)


@dataclass(frozen=True)
class MLP:
    """The MLP and its children.

    Attributes:
        name: in the block; ``""``: its projections lie in the block itself (OPT).
        up: projection that is activated, or in a gated MLP the one that is multiplied with the activated gate.
        down: projection back.
        gate: projection that is activated in a gated MLP, ``""`` where there is none.
        gate_up: gate and up as one projection.
        router: what chooses a token's experts, ``""`` where there are none. With experts the names above are unused: what
            an expert computes inside is no tensor ``[batch, pos, ...]``, and has no points.
        experts: the experts, all in one module.
        beside: modules that every token goes through beside its experts.
        adds_residual: Hugging Face's module is given the residual too, and adds it itself (BLOOM, MPT).
    """

    name: str = "mlp"
    up: str = "up_proj"
    down: str = "down_proj"
    gate: str = "gate_proj"
    gate_up: str = ""
    router: str = ""
    experts: str = ""
    beside: tuple[str, ...] = ()
    adds_residual: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether two projections make the neurons."""
        return bool(self.gate or self.gate_up)

    @property
    def children(self) -> tuple[str, ...]:
        """Its modules that have weights."""
        if self.router:
            return (self.router, self.experts, *self.beside)
        into = (self.gate_up,) if self.gate_up else (self.gate, self.up)
        return tuple(name for name in (*into, self.down) if name)

    def inside(self, child: str) -> str:
        """Path in the block of one of its projections."""
        return f"{self.name}.{child}" if self.name else child


@dataclass(frozen=True)
class Settings:
    """Where a configuration says what we have to know.

    Attributes:
        n_layers: attribute that holds the number of blocks.
        n_heads: the number of heads.
        d_model: features of the residual stream.
        n_ctx: the length it was trained on.
        d_mlp: neurons of an MLP, or of one expert; where it holds ``None``, there are ``4 * d_model``.
        num_experts: experts of a layer, ``""`` where there are none.
        experts_per_token: how many of them a token goes through.
        n_key_value_heads: heads of keys and values, ``""`` where there are as many as of queries; or how many, where no
            attribute says it.
        d_head: features of a head, ``""`` where they are ``d_model / n_heads``.
        eps: of the norms.
        activation: of the MLP.
        final_cap: bound of the logits, ``""`` where they have none.
        logit_scale: factor on the logits, ``""`` where they have none.
        logit_divisor: what they are divided by, the same.
    """

    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    d_model: str = "hidden_size"
    n_ctx: str = "max_position_embeddings"
    d_mlp: str = "intermediate_size"
    n_key_value_heads: str | int = "num_key_value_heads"
    d_head: str = "head_dim"
    eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    final_cap: str = ""
    logit_scale: str = ""
    num_experts: str = ""
    experts_per_token: str = ""
    logit_divisor: str = ""


Refused: TypeAlias = Mapping[str, tuple[tuple[Any, ...], str]]
"""Attributes of a configuration: the values that are handled, and what is wrong with any other."""


@dataclass(frozen=True)
class Family:
    """One layout of a decoder.

    Attributes:
        model_type: what its configurations say.
        title: what people call it.
        outside: modules outside the blocks.
        block: norms of a block.
        attention: its attention.
        mlp: its MLP.
        norm: how its norms compute.
        settings: where its configuration says what.
        refused: values of its configuration that are not handled.
        takes_position_ids: whether its forward takes ``position_ids``.
        logits_change: whether Hugging Face caps or scales what the head gives.
        float64: whether a float64 model computes in float64 throughout.
        listed: whether the family is one that is known; else it was read off a model.
        notes: what is peculiar, for the page of families.
        sdpa: whose fused attention its models can run: Hugging Face's own, Pellucid's where Hugging Face has none, or none.
        tokenizer: hub name of the tokenizer that all of its checkpoints share, ``""`` where there is none.
        variant: the family as a model of some configuration has it.
    """

    model_type: str
    title: str
    outside: Outside = Outside()
    block: Block = Block()
    attention: Attention = Attention()
    mlp: MLP = MLP()
    norm: NormKind = RMS_NORM
    settings: Settings = Settings()
    refused: Refused = field(default_factory=dict)
    takes_position_ids: bool = True
    logits_change: bool = False
    float64: bool = True
    listed: bool = True
    notes: str = ""
    sdpa: Literal["hugging face", "pellucid", "none"] = "hugging face"
    tokenizer: str = ""
    variant: Callable[[Family, Any], Family] | None = None

    @property
    def blocks_path(self) -> str:
        """Path of the list of blocks in the model."""
        return f"{self.outside.backbone}.{self.outside.blocks}"

    @property
    def positions(self) -> Literal["rotary", "standard", "alibi"]:
        """How a token's position enters: a rotation of queries and keys, a table of embeddings, or a bias of the scores.

        A family that was read off a model and rotates nothing counts as having a table.
        """
        if self.attention.rotary:
            return "rotary"
        return "standard" if self.outside.pos_embed or not self.listed else "alibi"

    def inside(self, name: str) -> str:
        """Path in the model of a module of the backbone."""
        return f"{self.outside.backbone}.{name}"

    def of(self, config: Any) -> Family:
        """This family as a model of this configuration has it."""
        return self if self.variant is None else self.variant(self, config)
