"""Linear maps of the model: their inputs and outputs are hook points, by head where they belong to heads."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from pellucid.conversion_utils.fused_qkv import PARTS, Part
from pellucid.errors import WeightError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site, plain_weight
from pellucid.model_bridge.generalized_components.fused_layouts import PartsOfFused
from pellucid.model_bridge.generalized_components.head_results import head_results, with_results
from pellucid.model_bridge.generalized_components.hf_code import in_float64
from pellucid.model_bridge.generalized_components.random_numbers import Draws
from pellucid.model_bridge.generalized_components.split_inputs import (
    INPUT_SITE,
    HeadInputs,
    PartAgain,
    with_head_inputs,
    with_own_input,
)
from pellucid.model_bridge.generalized_components.weight_writes import WeightTarget, WeightTargets
from pellucid.model_bridge.generalized_components.weights import has_weight, linear_bias, linear_weight
from pellucid.run_context import hooks_suppressed

PART_WORDS = {"hook_q": "q", "hook_k": "k", "hook_v": "v", "hook_pre": "gate", "hook_pre_linear": "in"}
"""What a part of a fused projection is called among weights, by the site that shows it."""

HEAD_INPUTS: ContextVar[Mapping[Part, list[HeadInputs]] | None] = ContextVar("pellucid_head_inputs", default=None)
"""What hooks made of the residual's copies, one a head: the attention fires them, its projections compute with them."""


class LinearBridge(GeneralizedComponent):
    """Stands for an ``nn.Linear`` (GPT-2's ``Conv1D``, adapted and quantised ones included).

    Inside attention and MLP its points are linked to theirs: ``attn.o.hook_in`` is ``attn.hook_z``.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        heads_in: heads that a function at ``hook_in`` sees on the last axis, ``None`` for none.
        heads_out: the same at ``hook_out``.
        owns_input: whether nothing else reads the input, so that a function may write to it.
        keeps_output: whether nothing writes to the output afterwards, so that a function may keep it.
    """

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        *,
        heads_in: int | None = None,
        heads_out: int | None = None,
        owns_input: bool = True,
        keeps_output: bool = True,
    ) -> None:
        super().__init__(name, config)
        self.heads_in, self.heads_out = heads_in, heads_out
        self.owns_input, self.keeps_output = owns_input, keeps_output

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        original = self.original()
        given = self.fire_by_head("hook_in", input, self.heads_in, copy_before_edit=not self.owns_input)
        output = self.fire_by_head("hook_out", self._mapped(original, given), self.heads_out)
        return output if self.keeps_output or not self.is_live("hook_out") else output.clone()

    def _mapped(self, original: Any, input: Tensor) -> Tensor:
        """The map itself."""
        output: Tensor = original(input)
        return output

    def fire_by_head(self, site: str, value: Tensor, heads: int | None, copy_before_edit: bool = False) -> Tensor:
        """Fire with the last axis seen as ``[..., heads, d_head]``."""
        if heads is None or not self.is_live(site):
            return self.fire(site, value, copy_before_edit=copy_before_edit)
        seen = value.view(*value.shape[:-1], heads, -1)  # as unflatten, which takes three times as long
        edited = self.fire(site, seen, copy_before_edit=copy_before_edit)
        # With gradients on, what a function saw has to be on the way, or its backward hook is not.
        return value if edited is seen and not value.requires_grad else edited.flatten(-2)

    @property
    def W(self) -> Tensor:
        """``[in_features, out_features]``, a writable view of the model's own parameter."""
        return linear_weight(self.module, self.path)

    @property
    def b(self) -> Tensor:
        """``[out_features]``, the model's own parameter; zeros where the map has no bias."""
        return linear_bias(self.module, self.path)

    def weight_targets(self) -> dict[str, WeightTargets]:
        """``weight`` ``[out_features, in_features]``, also where the module keeps it the other way round, and ``bias``."""
        return super().weight_targets() | {"weight": self._weight_targets}

    def _weight_targets(self) -> list[WeightTarget]:
        return [WeightTarget(self.W.T, tuple(self.W.T.shape))]


class OutputProjectionBridge(LinearBridge):
    """Stands for attention's output projection, which sums what the heads write.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        n_heads: heads.
    """

    hook_result = Site("each head's contribution, without b_O, ``[batch, pos, n_heads, d_model]`` (opt-in)")

    def __init__(self, name: str | None, config: Any | None = None, *, n_heads: int) -> None:
        super().__init__(name, config, heads_in=n_heads)
        self.n_heads = n_heads

    def _mapped(self, original: Any, input: Tensor) -> Tensor:
        """``[..., n_heads * d_head]`` to ``[..., d_model]``."""
        if not self.is_live("hook_result"):
            return super()._mapped(original, input)
        draws = Draws(self.module, input.device)
        native = super()._mapped(original, input)
        z = input.unflatten(-1, (self.n_heads, -1))
        return with_results(self, self.module, original, z, native, draws)

    def results(self, z: Tensor) -> Tensor:
        """Each head's contribution without b_O, ``[batch, pos, n_heads, d_model]``, from ``z``, nothing firing."""
        return hooks_suppressed(head_results, self.module, self.module, z, Draws(self.module, z.device))


class FusedLinearBridge(GeneralizedComponent):
    """Stands for one projection that gives several parts: queries, keys and values, or gate and up.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        layout: where each part is, by the site that shows it.
    """

    hook_q = Site("queries, ``[batch, pos, n_heads, d_head]``")
    hook_k = Site("keys of the new positions, ``[batch, pos, n_key_value_heads, d_head]``")
    hook_v = Site("values of the new positions")
    hook_pre = Site("before the activation, ``[batch, pos, d_mlp]``")
    hook_pre_linear = Site("what the activated gate is multiplied with, ``[batch, pos, d_mlp]``")

    def __init__(self, name: str | None, config: Any | None = None, *, layout: PartsOfFused) -> None:
        super().__init__(name, config)
        self.layout = layout

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        fused = self._fused(input)
        for site, part in self.layout.parts(fused).items():
            if not self.is_live(site):
                continue
            if part.dim() == 5:
                self._fire_groups(site, part)
            else:
                self.fire_into(site, part)
        return fused

    def _fused(self, input: Tensor) -> Tensor:
        """The projection itself."""
        fused: Tensor = self.original()(input)
        return fused

    # -- weights -------------------------------------------------------------------------------------------------------

    def weights_of_parts(self) -> Mapping[str, Tensor]:
        """Each part's weight by its word, ``[in_features, heads, d_head]`` or ``[in_features, features]``: writable views.

        Raises:
            WeightError: heads in groups, which have no view that is one axis of heads.
        """
        return self._by_word(linear_weight(self.module, self.path))

    def biases_of_parts(self) -> Mapping[str, Tensor]:
        """Each part's bias by its word, ``[heads, d_head]`` or ``[features]``; zeros where there is none."""
        return self._by_word(linear_bias(self.module, self.path))

    def _by_word(self, fused: Tensor) -> dict[str, Tensor]:
        parts = {PART_WORDS[site]: part for site, part in self.layout.parts(fused).items()}
        if any(part.dim() > fused.dim() + 1 for part in parts.values()):
            raise WeightError(
                f"{self.path} keeps the queries of each key/value head beside that head's key and value: they have no view "
                "by head. Read the module's own weight, bridge.hf_model.get_submodule"
                f"({self.path!r}).weight."
            )
        return parts

    def weight_targets(self) -> dict[str, WeightTargets]:
        """Of each part, by its word, the weight ``[features, in_features]`` and, where there is one, the bias."""
        words = [PART_WORDS[site] for site in self.layout.names]
        kinds = ["weight", "bias"] if has_weight(self.module, "bias") else ["weight"]
        return {f"{word}.{kind}": partial(self._part_targets, word, kind) for word in words for kind in kinds}

    def _part_targets(self, word: str, kind: str) -> list[WeightTarget]:
        if kind == "bias":
            part = self.biases_of_parts()[word]
            return [WeightTarget(part, (part.numel(),))]
        part = self.weights_of_parts()[word].movedim(0, -1)
        return [WeightTarget(part, (part.shape[:-1].numel(), part.shape[-1]))]

    def _fire_groups(self, site: str, part: Tensor) -> None:
        """Heads in groups, ``[batch, pos, groups, heads, d_head]``: a function sees no groups."""
        looks = self.only_reads(site)
        edited = self.fire(site, part.flatten(2, 3))
        if not looks:
            part.copy_(edited.unflatten(2, part.shape[2:4]))


class HeadsProjectionBridge(LinearBridge):
    """Stands for the projection to queries, keys or values, where each has one of its own.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        part: which of the three.
        heads: how many it has.
    """

    def __init__(self, name: str | None, config: Any | None = None, *, part: Part, heads: int) -> None:
        super().__init__(name, config, heads_out=heads, owns_input=False)
        self.part: Part = part
        self.heads = heads

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        inputs = HEAD_INPUTS.get()
        if inputs is None:
            return super().forward(input)
        original, draws = self.original(), Draws(self.module, input.device)
        again = PartAgain(self.heads, partial(self._project, original, draws), self._plain)
        native = original(input)
        plain = native.unflatten(-1, (self.heads, -1))
        made = with_head_inputs(again, plain, inputs[self.part])
        made = with_own_input(self, "hook_in", again, plain, made, input)
        return self.fire_by_head("hook_out", native if made is plain else made.flatten(-2), self.heads_out)

    def _project(self, original: Any, draws: Draws, input: Tensor) -> Tensor:
        with draws.again():
            return original(input).unflatten(-1, (self.heads, -1))  # type: ignore[no-any-return]

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        layer: Any = self.module
        if not plain_weight(layer, nn.Linear):
            return None
        bias = None if layer.bias is None else layer.bias.unflatten(0, (self.heads, -1))
        return layer.weight.unflatten(0, (self.heads, -1)), bias


class FusedHeadsProjectionBridge(FusedLinearBridge):
    """Stands for one projection to queries, keys and values.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        layout: where each part is, under ``hook_q``, ``hook_k`` and ``hook_v``.
        heads: how many each part has.
    """

    hook_q_in = Site("a copy of the input that feeds the queries only")
    hook_k_in = Site("a copy of the input that feeds the keys only")
    hook_v_in = Site("a copy of the input that feeds the values only")

    def __init__(
        self, name: str | None, config: Any | None = None, *, layout: PartsOfFused, heads: Mapping[Part, int]
    ) -> None:
        super().__init__(name, config, layout=layout)
        self.heads = dict(heads)

    def _fused(self, input: Tensor) -> Tensor:
        """The projection itself, and what edits of copies of its input make of its parts."""
        inputs = HEAD_INPUTS.get()
        if inputs is None and not self.is_live(*INPUT_SITE.values()):
            return super()._fused(input)
        original, draws = self.original(), Draws(self.module, input.device)
        fused: Tensor = original(input)
        # All inputs fire before any part does, and before any part is written.
        plain = {part: self._by_head(fused, part).clone() for part in PARTS}
        made = dict(plain)
        for part in PARTS:
            again = PartAgain(
                self.heads[part], partial(self._project, original, draws, part), partial(self._plain, part)
            )
            if inputs is not None:
                made[part] = with_head_inputs(again, plain[part], inputs[part])
            made[part] = with_own_input(self, INPUT_SITE[part], again, plain[part], made[part], input)
        for part in PARTS:
            if made[part] is not plain[part]:
                view = self.layout.parts(fused)[f"hook_{part}"]
                view.copy_(made[part].view_as(view))
        return fused

    def _by_head(self, fused: Tensor, part: Part) -> Tensor:
        """One part of ``[..., width]`` as ``[..., heads, d_head]``."""
        view = self.layout.parts(fused)[f"hook_{part}"]
        return view.flatten(fused.dim() - 1, -2)  # the groups of queries, where there are some, side by side

    def _project(self, original: Any, draws: Draws, part: Part, input: Tensor) -> Tensor:
        with draws.again():
            return self._by_head(original(input), part)

    def _plain(self, part: Part) -> tuple[Tensor, Tensor | None] | None:
        layer: Any = self.module
        if not plain_weight(layer, nn.Linear):
            return None
        bias = None if layer.bias is None else self._by_head(layer.bias, part)
        return self._by_head(layer.weight.T, part).permute(1, 2, 0), bias


class HeadNormBridge(GeneralizedComponent):
    """Stands for an RMS norm of queries or keys; functions see ``[batch, pos, heads, d_head]``.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        heads: how many, where the norm is over all heads' features together; ``None`` where each has its own.
        heads_first: whether the module is given ``[batch, heads, pos, d_head]``.
    """

    widens = True

    def __init__(
        self, name: str | None, config: Any | None = None, *, heads: int | None = None, heads_first: bool = False
    ) -> None:
        super().__init__(name, config)
        self.heads, self.heads_first = heads, heads_first

    def forward(self, input: Tensor) -> Tensor:
        """The module's input to its output."""
        output: Tensor = in_float64(self.original(), self.module)(input)
        if not self.is_live("hook_out"):
            return output
        seen = output if self.heads is None else output.unflatten(-1, (self.heads, -1))
        seen = seen.transpose(1, 2) if self.heads_first else seen
        edited = self.fire("hook_out", seen)
        if edited is seen and not output.requires_grad:
            return output
        edited = edited.transpose(1, 2) if self.heads_first else edited
        return edited if self.heads is None else edited.flatten(-2)
