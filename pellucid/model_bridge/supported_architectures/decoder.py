"""From a family to what the bridge needs of it: components, hook points, and what its modules have to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from pellucid.config import TransformerBridgeConfig
from pellucid.conversion_utils.fused_qkv import Part
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.family import Family, FusedLayout
from pellucid.model_bridge.generalized_components import (
    BlockBridge,
    CentredNormalizationBridge,
    EmbeddingBridge,
    ExpertsBridge,
    FusedHeadsProjectionBridge,
    FusedLinearBridge,
    GeneralizedComponent,
    HeadNormBridge,
    HeadsProjectionBridge,
    HuggingFaceAttentionBridge,
    HuggingFaceMLPBridge,
    LinearBridge,
    MultipliedBlockBridge,
    NormalizationBridge,
    OutputProjectionBridge,
    PatternDropoutBridge,
    PosEmbedBridge,
    RMSNormalizationBridge,
    RouterBridge,
    UnembeddingBridge,
)
from pellucid.model_bridge.generalized_components.block import Link
from pellucid.model_bridge.generalized_components.experts import PROJECTION
from pellucid.model_bridge.generalized_components.fused_layouts import Grouped, PartsOfFused, Stacked
from pellucid.model_bridge.generalized_components.hf_arguments import cache_name, check_parameters
from pellucid.model_bridge.generalized_components.hf_attention import EAGER, REGISTRY
from pellucid.model_bridge.generalized_components.hf_code import names_of, words_of
from pellucid.model_bridge.generalized_components.normalization import InputIs, Role
from pellucid.model_bridge.generalized_components.split_inputs import PER_HEAD_SITES
from pellucid.model_bridge.hook_tables import hook_table

MODEL_ARGUMENTS = ("input_ids", "attention_mask", "inputs_embeds", "use_cache", "logits_to_keep")
BACKBONE_ARGUMENTS = ("input_ids", "attention_mask", "inputs_embeds", "use_cache")
"""Arguments that Pellucid gives to every model and its backbone; the cache is named apart."""

PARTS = ("hook_q", "hook_k", "hook_v")

_NEURON_SITES = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
_IN_EXPERTS = (
    "The MLP is a mixture of experts, whose neurons are inside the experts: each sees only the tokens that chose it, and "
    "has no point. There are what enters it, mlp.hook_in, its mlp.hook_router_logits and what it adds, hook_mlp_out"
)


def as_installed(family: Family, model: nn.Module) -> Family:
    """The family as the installed release writes it.

    Releases rewrite a family with a softmax in a method of its own (GPT-J in transformers 5.24) to look up an attention
    function, as most do: then its dropout is a function too, and blocks give the residual alone.
    """
    attention = family.attention
    if attention.softmax_in in ("function", "forward"):
        return family
    first = dict(model.named_modules()).get(f"{family.blocks_path}.0.{attention.name}")
    if first is None or attention.softmax_in in vars(type(first)):
        return family
    rewritten = replace(attention, softmax_in="function", pattern_at="dropout", heads_first=False)
    return replace(family, attention=rewritten, block=replace(family.block, gives_tuple=False))


def qkv_layout(layout: FusedLayout, cfg: TransformerBridgeConfig) -> PartsOfFused:
    """Where queries, keys and values are in a fused projection, under the names of :data:`PARTS`."""
    if layout == "grouped":
        return Grouped(PARTS, cfg.n_key_value_heads, cfg.d_head)
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    return Stacked(PARTS, (q, kv, kv), cfg.d_head)


class DecoderAdapter(ArchitectureAdapter):
    """The components and hook points of a :class:`~pellucid.model_bridge.family.Family`.

    Args:
        cfg: the bridge's configuration.
        family: the family, as the model has it.
    """

    last_block_aliases = MappingProxyType({"ln_final.hook_in": "blocks.{i}.hook_resid_post"})

    def __init__(self, cfg: TransformerBridgeConfig, family: Family) -> None:
        super().__init__(cfg)
        self.family = family
        table = hook_table(family, cfg.n_key_value_heads != cfg.n_heads)
        self.hooks_before, self.hooks_in_block, self.hooks_after = table.before, table.block, table.after
        self.unreachable = dict.fromkeys(_NEURON_SITES, _IN_EXPERTS) if family.mlp.router else {}
        self.first_block_aliases = table.first_aliases
        self.backbone_path, self.blocks_path = family.outside.backbone, family.blocks_path

    # -- components ----------------------------------------------------------------------------------------------------

    def make_outer(self) -> dict[str, GeneralizedComponent]:
        """Embeddings, their norm, the last norm, the unembedding."""
        outside, inside = self.family.outside, self.family.inside
        outer: dict[str, GeneralizedComponent] = {"embed": EmbeddingBridge(inside(outside.embed), self.cfg)}
        if outside.pos_embed:
            outer["pos_embed"] = PosEmbedBridge(inside(outside.pos_embed), self.cfg)
        if outside.embed_norm:
            outer["embed_ln"] = self._norm(inside(outside.embed_norm), role="embedding")
        outer["ln_final"] = self._norm(inside(outside.final_norm), role="final")
        outer["unembed"] = UnembeddingBridge(outside.head, self.cfg)
        return outer

    def make_block(self, layer: int | None) -> GeneralizedComponent:
        """Norms, attention, MLP."""
        block = self._block(self.blocks_path if layer is None else f"{self.blocks_path}.{layer}")
        block.layer_index = layer
        return block

    def _block(self, name: str) -> BlockBridge:
        block = self.family.block
        parts: dict[str, GeneralizedComponent] = {}
        if block.ln1:
            parts["ln1"] = self._norm(block.ln1)
        parts["attn"] = self._attention()
        if block.ln1_post:
            parts["ln1_post"] = self._norm(block.ln1_post)
        if block.ln2:
            parts["ln2"] = self._norm(block.ln2, input_is="copy" if block.parallel else "stream")
        parts["mlp"] = self._mlp()
        if not self.family.mlp.name:  # a block that holds the projections itself lays rows and positions into one axis
            for flat in (parts["ln2"], *parts["mlp"].submodules.values()):
                flat.rows_are_flat = True
        if block.ln2_post:
            parts["ln2_post"] = self._norm(block.ln2_post)
        if block.multiplier:
            return MultipliedBlockBridge(name, self.cfg, parts, self._links(), block.gives_tuple, block.multiplier)
        return BlockBridge(name, self.cfg, parts, links=self._links(), gives_tuple=block.gives_tuple)

    def _links(self) -> list[Link]:
        """Where two components of a block meet at one tensor."""
        block = self.family.block
        entering_mlp = ("ln2", "hook_out") if block.ln2 else ("ln1", "hook_out") if block.parallel else None
        links: list[Link] = [
            ("", "hook_mlp_in", "ln2", "hook_branch_in"),
            *(("", site, "attn", site) for site in PER_HEAD_SITES),
            ("ln1", "hook_in", "", "hook_in"),
            ("attn", "hook_in", *(("ln1", "hook_out") if block.ln1 else ("", "hook_in"))),
            ("ln1_post", "hook_in", "attn", "hook_attn_out"),
            ("ln2_post", "hook_in", "mlp", "hook_mlp_out"),
        ]
        if not block.multiplier:  # else the block itself makes what is added
            links += [
                ("", "hook_attn_out", *(("ln1_post", "hook_out") if block.ln1_post else ("attn", "hook_attn_out"))),
                ("", "hook_mlp_out", *(("ln2_post", "hook_out") if block.ln2_post else ("mlp", "hook_mlp_out"))),
            ]
        if entering_mlp is not None:
            links.append(("mlp", "hook_in", *entering_mlp))
        if not block.parallel:
            links.append(("", "hook_resid_mid", *(("ln2", "hook_in") if block.ln2 else ("mlp", "hook_in"))))
        return links

    def _norm(self, name: str, role: Role = "block", input_is: InputIs = "own") -> NormalizationBridge:
        norm = self.family.norm
        if norm.kind == "layer":
            return NormalizationBridge(name, self.cfg, role=role, input_is=input_is)
        kind = CentredNormalizationBridge if norm.centres else RMSNormalizationBridge
        return kind(
            name,
            self.cfg,
            role=role,
            input_is=input_is,
            adds_one=norm.gain == "1 + weight",
            rounds_first=norm.rounds_first,
        )

    def _attention(self) -> GeneralizedComponent:
        attention, cfg = self.family.attention, self.cfg
        parts: dict[str, GeneralizedComponent] = {}
        counts: dict[Part, int] = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
        if attention.qkv:
            parts["qkv"] = FusedHeadsProjectionBridge(
                attention.qkv, cfg, layout=qkv_layout(attention.layout, cfg), heads=counts
            )
        else:
            names: dict[Part, str] = {"q": attention.q, "k": attention.k, "v": attention.v}
            for part, count in counts.items():
                parts[part] = HeadsProjectionBridge(names[part], cfg, part=part, heads=count)
        if attention.q_norm:
            norms: dict[Part, str] = {"q": attention.q_norm, "k": attention.k_norm}
            for part, name in norms.items():
                heads = counts[part] if attention.head_norm == "flat" else None
                parts[f"{part}_norm"] = HeadNormBridge(
                    name, cfg, heads=heads, heads_first=attention.head_norm == "heads first"
                )
        if attention.pattern_at not in ("dropout", "softmax"):
            parts[attention.pattern_at] = PatternDropoutBridge(attention.pattern_at, cfg)
        parts["o"] = OutputProjectionBridge(attention.o, cfg, n_heads=cfg.n_heads)
        return HuggingFaceAttentionBridge(
            attention.name, cfg, parts, attention.softmax_in, attention.pattern_at, attention.heads_first
        )

    def _mlp(self) -> GeneralizedComponent:
        mlp, cfg, block = self.family.mlp, self.cfg, self.family.block
        parts: dict[str, GeneralizedComponent] = {}
        reads_stream = not block.parallel and not block.ln2
        if mlp.router:
            return ExpertsBridge(mlp.name, cfg, {"router": RouterBridge(mlp.router, cfg)}, input_is_stream=reads_stream)
        width = cfg.sizes()["d_mlp"]
        if mlp.gate_up:
            layout = Stacked(("hook_pre", "hook_pre_linear"), (width, width))
            parts["gate_up"] = FusedLinearBridge(mlp.gate_up, cfg, layout=layout)
        else:
            if mlp.gate:
                parts["gate"] = LinearBridge(mlp.gate, cfg)
            parts["in"] = LinearBridge(mlp.up, cfg)
        # A block that adds branches to each other first may add attention's into the MLP's own tensor (Falcon).
        parts["out"] = LinearBridge(mlp.down, cfg, keeps_output=not (block.parallel and not block.residual_first))
        return HuggingFaceMLPBridge(mlp.name, cfg, parts, input_is_stream=reads_stream)

    def link_outer(self, outer: Mapping[str, GeneralizedComponent], blocks: list[GeneralizedComponent]) -> None:
        """The last norm's output is the unembedding's input; an embedding's is that of its norm."""
        if "embed_ln" in outer:
            outer["embed"].link("hook_out", outer["embed_ln"], "hook_in")
        outer["unembed"].link("hook_in", outer["ln_final"], "hook_out")
        outer["ln_final"].link("hook_in", blocks[-1], "hook_out")

    # -- what the model has to be --------------------------------------------------------------------------------------

    def missing_modules(self, model: nn.Module) -> list[str]:
        """Which of the family's modules ``model`` has not: a mixture of experts in some layers only lacks routers there."""
        present = {name for name, _ in model.named_modules(remove_duplicate=False)}
        outer = [self._paths("", component) for component in self.make_outer().values()]
        blocks = [self._paths("", self.make_block(layer)) for layer in range(self.cfg.n_layers)]
        return [path for paths in outer + blocks for path in paths if path not in present]

    def _paths(self, inside: str, component: GeneralizedComponent) -> list[str]:
        path = f"{inside}{component.name}".removesuffix(".")
        return [path] + [found for child in component.submodules.values() for found in self._paths(f"{path}.", child)]

    def check_arguments(self, model: nn.Module) -> None:
        """See :meth:`ArchitectureAdapter.check_arguments`."""
        backbone = model.get_submodule(self.backbone_path)
        check_parameters(type(model), MODEL_ARGUMENTS)
        check_parameters(type(backbone), BACKBONE_ARGUMENTS)
        cache_name(type(backbone))
        self.cache_name = cache_name(type(model))
        if self.family.mlp.router:
            self._check_router(model)
        self._check_attention(model.get_submodule(f"{self.blocks_path}.0.{self.family.attention.name}"))

    def _check_attention(self, attention: nn.Module) -> None:
        """See that the code of Hugging Face's attention has what our points stand on: one softmax, one dropout, these
        names.
        """
        family, kind = self.family, type(attention)
        forward: Any = kind.forward
        there, where = names_of(forward), family.attention.softmax_in
        held = forward if where == "forward" else there.get(EAGER) if where == "function" else vars(kind).get(where)
        words = () if held is None else words_of(held)
        wanted = ["softmax"] + (["dropout"] if family.attention.pattern_at == "dropout" else [])
        lacking = [word for word in wanted if word not in words]
        if where == "function":
            lacking += [name for name in (EAGER, REGISTRY) if name not in there]
        if lacking:
            raise UnsupportedModelError(
                f"{kind.__module__}.{kind.__name__} of the installed transformers has no {', '.join(lacking)} where "
                f"{family.title}'s attention has it: its scores and pattern could not be reached. Install a release of "
                "docs/compatibility.md."
            )

    def _check_router(self, model: nn.Module) -> None:
        """See that each block has experts, and that Hugging Face's router makes its logits by one linear map."""
        mlp = self.family.mlp
        for layer in range(self.cfg.n_layers):
            found = model.get_submodule(f"{self.blocks_path}.{layer}.{mlp.name}.{mlp.router}")
            kind, names = type(found), words_of(type(found).forward)
            if PROJECTION not in names:
                raise UnsupportedModelError(
                    f"{kind.__module__}.{kind.__name__} of the installed transformers makes its logits without "
                    f"F.{PROJECTION}, where they could be reached. Install a release of docs/compatibility.md."
                )

    def split_qkv_matrix(self, original_attention_component: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """See :meth:`ArchitectureAdapter.split_qkv_matrix`.

        Raises:
            UnsupportedModelError: the family's projection is fused in a layout that has no linear parts of its own.
        """
        attention = self.family.attention
        if attention.qkv:
            raise UnsupportedModelError(f"{self.family.title}'s {attention.qkv} is not split into linear maps.")
        q, k, v = (original_attention_component.get_submodule(n) for n in (attention.q, attention.k, attention.v))
        return q, k, v  # type: ignore[return-value]
