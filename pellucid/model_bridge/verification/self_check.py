"""The bridge held against Hugging Face on a user's own model: parity, padding, cache, patterns, and every hook alive.

Each check is a line of a table with what was measured and the bound it has to keep. Exact checks have bound 0. Bounds of
the others follow from the dtype: two routes to the same logits that round differently at each of ``L`` layers may differ
by a few units in the last place of the largest logit per layer, so the bound is ``64 * L * eps * max|logit|``.

All that is checked with the eager attention. A fused one of Hugging Face's, where the model runs it, gives its own bits
while no pattern is looked at, and eager's where all patterns are. Pellucid's own is held against the exact path: a score is
known within ``d = eps * max|score| + e * (d_head + 2) * max|q| * max|k| / sqrt(d_head)``, ``e`` being ``eps`` of float32
or better, so a probability within a factor ``exp(2 d)``; ``z`` of one layer, given the same residual, may differ by
``2 * (expm1(2 d) + eps + (2 * pos + 32) * e) * max|v|``. For the logits, at which ``L`` layers have been passed and ALiBi
has added up to ``pos`` to a score, the bound is ``(64 + 2 * pos) * L * eps * max|logit|``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.errors import InputError
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.generalized_components.hf_arguments import forward_parameters
from pellucid.model_bridge.generalized_components.weights import stored_parts, why_not_by_row
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.reference_edits import REBUILT, reference_edit
from pellucid.model_bridge.running.checkpoint import RANDOM_WEIGHTS
from pellucid.model_bridge.running.run_positions import puts_prompts_before
from pellucid.model_bridge.verification.check_report import MOVES, CheckReport, CheckResult
from pellucid.model_bridge.verification.check_tools import (
    CheckedBridge,
    FastAttentionOn,
    random_edit,
    written_in_place,
)
from pellucid.names import PATTERN_SITES, HookSpec
from pellucid.padding import position_ids
from pellucid.progress import progress_bar

Check = Iterator[CheckResult]


def run_checks(
    bridge: CheckedBridge,
    tree: ComponentTree,
    tokens: Tensor | None = None,
    layers: Sequence[int] | None = None,
    progress: bool | None = None,
) -> CheckReport:
    """Run every check on ``bridge``; opt-in points are switched on for theirs and back afterwards.

    Args:
        bridge: the bridge, without hooks on it.
        tree: its components.
        tokens: ``[batch, pos]`` to run, by default two rows of twelve random ids.
        layers: layers whose hooks are tried, by default the first, a middle one and the last.
        progress: whether to show a bar.

    Raises:
        InputError: hooks are attached, a layer does not exist, or rows have a single token.
    """
    if any(True for _ in tree.handles()):
        raise InputError("verify() compares with the unhooked model: remove your hooks first (reset_hooks).")
    if tokens is not None and tokens.shape[1] < 2:
        raise InputError("verify() needs rows of two tokens or more: a single one attends to nothing but itself.")
    cfg = tree.cfg
    if isinstance(layers, int):
        raise InputError(f"layers is several layers; found {layers!r}. Of one, give a list: layers=[{layers}].")
    chosen = sorted({0, cfg.n_layers // 2, cfg.n_layers - 1}) if layers is None else sorted(set(layers))
    if any(not 0 <= layer < cfg.n_layers for layer in chosen):
        raise InputError(f"layers are 0 to {cfg.n_layers - 1}; asked for {chosen}.")
    report = CheckReport(cfg.model_name or type(tree.root).__name__, str(cfg.dtype).removeprefix("torch."))
    training = [module for module in tree.root.modules() if module.training]
    tree.root.eval()
    flags = dict(cfg.flags)
    attention = bridge.runner.attn_implementation
    try:
        bridge.runner.attn_implementation = "eager"
        with torch.no_grad():
            checker = Checker(bridge, tree, tokens, chosen)
            steps = checker.steps() + checker.of_attention(attention)
            for step in progress_bar(steps, total=len(steps), desc="check", unit="check", show=progress):
                report.results += list(step())
    finally:
        for module in training:
            module.training = True
        bridge.runner.attn_implementation = attention
        for flag, value in flags.items():
            setattr(cfg, flag, value)
    return report


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


class Checker:
    """The checks of one bridge, each a generator of results.

    Args:
        bridge: the bridge, in evaluation mode, without hooks on it.
        tree: its components.
        tokens: ``[batch, pos]``; ``None`` for two rows of twelve random ids.
        layers: layers whose hooks are tried.
    """

    def __init__(self, bridge: CheckedBridge, tree: ComponentTree, tokens: Tensor | None, layers: list[int]) -> None:
        self.bridge, self.tree, self.layers = bridge, tree, layers
        self.cfg = tree.cfg
        generator = torch.Generator().manual_seed(0)
        if tokens is None:
            tokens = torch.randint(0, self.cfg.d_vocab, (2, 12), generator=generator)
        self.tokens = tokens.to(self.cfg.device or "cpu")
        self.run = bridge.positions_of(bridge.check_input(self.tokens))
        self.base, computing = self._computed()
        # Under autocast (accelerate's, too) float32 weights compute in half precision, and round as it does.
        self.eps = max(torch.finfo(dtype).eps for dtype in (self.cfg.dtype, computing))
        eps = self.eps
        if self.tree.is_float64():
            eps = torch.finfo(torch.float32).eps  # Hugging Face's softmax is float32 even there
        self.bound = float(64 * self.cfg.n_layers * eps * self.base.abs().max())
        self.exact = self.bound if self.tree.is_float64() else 0.0
        self._unhooked: dict[str | None, Tensor] = {}

    def _computed(self) -> tuple[Tensor, torch.dtype]:
        """Hugging Face's logits, and the dtype in which its linear layers give what they compute."""
        seen: list[torch.dtype] = []
        attention = self.tree.adapter.family.attention
        linear = self.tree.components["blocks.0.attn"].module.get_submodule(attention.qkv or attention.q)
        handle = linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        try:
            base = self.native(self.tokens)
            return base, seen[0]
        finally:
            handle.remove()

    def native(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hugging Face's logits; with a mask, at the positions that its ``generate`` numbers."""
        given = self.masked(attention_mask, tokens.shape[1])
        return self.bridge.hf_model(input_ids=tokens, use_cache=False, **given).logits  # type: ignore[no-any-return]

    def masked(self, mask: Tensor | None, length: int) -> dict[str, Tensor]:
        """A mask as Hugging Face's forward takes it: with the ids of the last ``length`` positions where it takes some."""
        if mask is None:
            return {}
        if not self.tree.adapter.family.takes_position_ids or puts_prompts_before(self.bridge.hf_model):
            return {"attention_mask": mask}
        return {"attention_mask": mask, "position_ids": position_ids(mask)[:, -length:]}

    def native_cached(
        self, model: nn.Module, tokens: Tensor, cache: Any, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Hugging Face's logits of tokens that come after those in ``cache``, which is extended."""
        past = {self.tree.adapter.cache_name: cache}
        output = model(input_ids=tokens, use_cache=True, **self.masked(attention_mask, tokens.shape[1]), **past)
        return output.logits  # type: ignore[no-any-return]

    def steps(self) -> list[Callable[[], Check]]:
        """The checks, cheapest first."""
        steps: list[Callable[[], Check]] = [
            self.weights,
            self.parity,
            self.stream,
            self.patterns,
            lambda: self.padding("left"),
            lambda: self.padding("right"),
            self.cache,
            self.positions,
        ]
        for spec in self.tree.index.values():
            if spec.layer is None or spec.layer in self.layers:
                steps.append(lambda spec=spec: self.liveness(spec))  # type: ignore[misc]
        return steps

    def line(self, name: str, difference: Tensor | float, bound: float, detail: str = "") -> CheckResult:
        """A result: ``difference``, or the largest of it, against ``bound``."""
        measured = float(difference.abs().max()) if isinstance(difference, Tensor) else float(difference)
        return CheckResult(name, measured <= bound, measured, bound, detail)

    def of_hook(self, spec: HookSpec, aspect: str, difference: Tensor, bound: float) -> CheckResult:
        """The same, of one aspect of a hook point."""
        return replace(self.line(f"{spec.name}: {aspect}", difference, bound), hook=spec.name, aspect=aspect)

    def weights(self) -> Check:
        """Weights are finite, and those of the checkpoint."""
        bad = [
            name
            for name, parameter in self.tree.root.named_parameters()
            if not parameter.is_meta and not all(map(_finite, (part for _, part in stored_parts(name, parameter))))
        ]
        yield self.line("weights are finite", float(len(bad)), 0, ", ".join(bad[:5]))
        random = self.tree.notes.get(RANDOM_WEIGHTS, ())
        yield self.line("weights come from the checkpoint", float(len(random)), 0, ", ".join(random[:5]))

    def parity(self) -> Check:
        """Logits, residuals and patterns are Hugging Face's, nothing hooked and every point cached."""
        yield self.line("logits, nothing hooked", self.bridge(self.tokens).double() - self.base.double(), self.exact)
        logits, cache = self.bridge.run_with_cache(self.tokens)
        yield self.line("logits, every point cached", logits.double() - self.base.double(), self.exact)
        outputs = self.bridge.hf_model(
            input_ids=self.tokens, use_cache=False, output_hidden_states=True, output_attentions=True
        )
        for layer in range(self.cfg.n_layers):
            shown = {
                f"blocks.{layer}.hook_resid_pre": outputs.hidden_states[layer],
                f"blocks.{layer}.attn.hook_pattern": outputs.attentions[layer],
            }
            for name in self.there(*shown):
                yield self.line(name, cache[name].double() - shown[name].double(), self.exact)

    def there(self, *names: str) -> list[str]:
        """Those names that are points of this model: an unlisted one may lack some."""
        return [name for name in names if name in self.tree.index]

    def stream(self) -> Check:
        """What branches add is the difference of two residuals."""
        _, cache = self.bridge.run_with_cache(self.tokens)
        post_norm = self.cfg.apply_residual_connection_post_layernorm
        for layer in range(self.cfg.n_layers):
            at = f"blocks.{layer}."
            if self.cfg.parallel_attn_mlp:
                terms = [f"{at}hook_{site}" for site in ("mlp_out", "attn_out", "resid_pre")]
                if self.tree.adapter.family.block.residual_first:
                    terms.reverse()
                if len(self.there(*terms)) == len(terms):
                    made = cache[terms[0]] + cache[terms[1]] + cache[terms[2]]
                    difference = made - cache["resid_post", layer]
                    yield self.line(f"layer {layer}: mlp_out + attn_out + resid = resid_post", difference, 0)
                continue
            if self.there(f"{at}hook_attn_out"):
                pre = cache[f"{at}ln1.hook_out"] if post_norm else cache["resid_pre", layer]
                difference = pre + cache["attn_out", layer] - cache["resid_mid", layer]
                yield self.line(f"layer {layer}: resid + attn_out = resid_mid", difference, 0)
            if self.there(f"{at}hook_mlp_out"):
                mid = cache[f"{at}mlp.hook_in"] if post_norm else cache["resid_mid", layer]
                difference = mid + cache["mlp_out", layer] - cache["resid_post", layer]
                yield self.line(f"layer {layer}: resid + mlp_out = resid_post", difference, 0)

    def patterns(self) -> Check:
        """Rows of patterns sum to 1, and nothing attends to the future or to padding."""
        if not self.there("blocks.0.attn.hook_pattern"):
            return
        mask = torch.ones_like(self.tokens)
        if mask.shape[1] > 2:
            mask[0, :2] = 0
        _, cache = self.bridge.run_with_cache(self.tokens, names_filter="*.hook_pattern", attention_mask=mask)
        run = self.run
        keys = nn.functional.pad(mask, (run.past + run.virtual, 0), value=1).bool()
        real = keys[:, run.past :]
        future = torch.ones(run.length, keys.shape[1], dtype=torch.bool, device=mask.device).triu(run.past + 1)
        for layer in self.layers:
            pattern = cache["pattern", layer].double()
            rows = (pattern.sum(-1) - 1) * real[:, None, :]
            yield self.line(f"layer {layer}: pattern rows sum to 1", rows, self.eps * keys.shape[1])
            unseen = (future[None] | ~keys[:, None, :]) & real[:, :, None]
            yield self.line(f"layer {layer}: nothing attends to the future or padding", pattern * unseen[:, None], 0)

    def padding(self, side: str) -> Check:
        """Padded rows have Hugging Face's logits, and those of rows without padding."""
        extra = self.tokens[:, :3]
        pads = extra.shape[1]
        order = (extra, self.tokens) if side == "left" else (self.tokens, extra)
        tokens = torch.cat(order, dim=1)
        ones, zeros = torch.ones_like(self.tokens), torch.zeros_like(extra)
        mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros), dim=1)
        logits = self.bridge(tokens, attention_mask=mask)
        if not self.tree.is_float64():
            native = self.native(tokens, attention_mask=mask)
            yield self.line(f"padding {side}: logits", logits.double() - native.double(), 0)
        if self.tree.adapter.family.mlp.router:
            return  # another batch rounds otherwise, and a close choice of experts may fall otherwise, in Hugging Face too
        first = self.run.virtual + (pads if side == "left" else 0)
        real = logits.narrow(1, first, self.run.given).double()
        why = why_not_by_row(self.bridge.hf_model) or ""
        yield self.line(
            f"padding {side}: rows as without it", real - self.run.of_input(self.base).double(), self.bound, why
        )

    def cache(self) -> Check:
        """A run in two chunks with a key/value cache."""
        from transformers import DynamicCache

        if self.run.virtual or self.run.cache_is_wrappers:
            return  # the model's wrapper cannot continue a cache, and the bridge refuses to
        cut = max(1, self.tokens.shape[1] // 2)
        ours, theirs = DynamicCache(), DynamicCache()
        for chunk in (self.tokens[:, :cut], self.tokens[:, cut:]):
            logits = self.bridge(chunk, past_key_values=ours)
            native = self.native_cached(self.bridge.hf_model, chunk, theirs)
        yield self.line("key/value cache: logits", logits.double() - native.double(), self.exact)
        if self.tree.adapter.family.mlp.router:
            return  # see padding()
        why = why_not_by_row(self.bridge.hf_model) or ""
        yield self.line(
            "key/value cache: as without it", logits.double() - self.base[:, cut:].double(), self.bound, why
        )

    def positions(self) -> Check:
        """What ``hook.run`` says in each step with a key/value cache, against what Hugging Face computes there."""
        if self.tree.adapter.family.takes_position_ids:
            yield self.numbered_positions()
            return
        yield from self.positions_by_alibi()

    def numbered_positions(self) -> CheckResult:
        """Against the ``position_ids`` that Hugging Face's own ``generate`` gives its backbone, step by step."""
        mask = torch.ones_like(self.tokens)
        mask[0, 0] = 0
        told: list[tuple[Tensor, Tensor]] = []
        numbered: list[Tensor] = []
        root: Any = self.tree.root

        def note(tensor: Tensor, hook: HookPoint) -> None:
            told.append((hook.run.positions, hook.run.real))

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            numbered.append(kwargs["position_ids"])

        handle = self.tree.backbone.module.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with self.bridge.hooks([("blocks.0.hook_resid_pre", note)]):
                root.generate(self.tokens, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        finally:
            handle.remove()
        wrong = abs(len(told) - 3) + sum(
            int((positions != ids)[real].sum()) for (positions, real), ids in zip(told, numbered, strict=True)
        )
        name = "key/value cache: positions that hooks are told"
        return self.line(name, float(wrong), 0, "hook.run is wrong in a step")

    def positions_by_alibi(self) -> Check:
        """Against the ALiBi that Hugging Face gives its blocks."""
        from transformers import DynamicCache

        first = cast("nn.ModuleList", self.tree.root.get_submodule(self.tree.adapter.blocks_path))[0]
        if "alibi" not in forward_parameters(type(first)):
            return  # one table for all rows, whose columns say nothing of padding (MPT)
        mask = torch.ones_like(self.tokens)
        cut = max(1, self.tokens.shape[1] // 2)
        if cut > 1:
            mask[0, 0] = 0
        cache, wrong, seen = DynamicCache(), 0, 0
        said: list[tuple[int, Tensor, Tensor]] = []
        native: list[Tensor] = []

        def note(tensor: Tensor, hook: HookPoint) -> None:
            said.append((hook.run.past_length, hook.run.positions, hook.run.real))

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            native.append(kwargs["alibi"].detach())

        handle = first.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with self.bridge.hooks([("hook_embed", note)]):
                for start, stop in [(0, cut), *((at, at + 1) for at in range(cut, self.tokens.shape[1]))]:
                    self.native_cached(self.tree.root, self.tokens[:, start:stop], cache, mask[:, :stop])
                    past, positions, real = said[-1]
                    # Head 0 adds slope * position to its scores.
                    alibi = native[-1].view(mask.shape[0], self.cfg.n_heads, -1)[:, 0, start:stop]
                    computed = (alibi.double() / self.alibi_slope).round().long()
                    wrong += int(past != start) + int((positions != computed)[real].sum())
                    wrong += int((real != mask[:, start:stop].bool()).sum())
                    seen += 1
        finally:
            handle.remove()
        wrong += abs(len(said) - seen)
        yield self.line(
            "key/value cache: positions that hooks are told", float(wrong), 0, "hook.run is wrong in a step"
        )

    @property
    def alibi_slope(self) -> float:
        """What the first head adds for each position: ``2 ** (-8 / n)``, ``n`` the largest power of two up to its heads."""
        return float(2 ** (-8 / 2 ** math.floor(math.log2(self.cfg.n_heads))))

    def of_attention(self, name: str) -> list[Callable[[], Check]]:
        """Checks of the attention that the bridge had before it was set to eager."""
        if name == "eager":
            return []
        if self.tree.adapter.family.sdpa == "pellucid":
            return [self.fast_attention]
        return [lambda: self.their_attention(name)]

    def their_attention(self, name: str) -> Check:
        """Hugging Face's own fused attention: its bits while no pattern is looked at, eager's where all of them are."""
        rest = [spec.name for spec in self.tree.index.values() if spec.flag is None and spec.site not in PATTERN_SITES]
        patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.cfg.n_layers)]
        with FastAttentionOn(self.bridge, name):
            native = self.native(self.tokens).double()
            yield self.line(f"{name}: nothing hooked", self.bridge(self.tokens).double() - native, self.exact)
            logits, _ = self.bridge.run_with_cache(self.tokens, names_filter=rest)
            yield self.line(f"{name}: all but scores and patterns cached", logits.double() - native, self.exact)
            logits, _ = self.bridge.run_with_cache(self.tokens, names_filter=patterns)
        eager = "every pattern cached is Hugging Face's eager"
        yield self.line(f"{name}: {eager}", logits.double() - self.base.double(), self.exact)

    def fast_attention(self) -> Check:
        """The fused kernel against the exact path, without and with padding on the left."""
        length = self.tokens.shape[1]
        mask = torch.ones_like(self.tokens)
        mask[0, : length // 2] = 0
        bound = (64 + 2 * length) * self.cfg.n_layers * self.eps * float(self.base.abs().max())
        for what, given in (("logits", None), ("logits, padded left", mask)):
            exact = self.bridge(self.tokens, attention_mask=given)
            with FastAttentionOn(self.bridge):
                fast = self.bridge(self.tokens, attention_mask=given)
            yield self.line(f"sdpa against the exact path: {what}", fast.double() - exact.double(), bound)
        for layer in self.layers:
            yield self.fast_layer(layer)

    def fast_layer(self, layer: int) -> CheckResult:
        """``z`` of one layer by either route, from the same residual."""
        names = [
            f"blocks.{layer}.{site}" for site in ("hook_resid_pre", *(f"attn.hook_{x}" for x in ("q", "k", "v", "z")))
        ]
        scores = f"blocks.{layer}.attn.hook_attn_scores"
        _, cache = self.bridge.run_with_cache(self.tokens, names_filter=[*names, scores])
        resid, q, k, v, z = (cache[name].double() for name in names)
        with FastAttentionOn(self.bridge):
            _, fast = self.bridge.run_with_cache(
                cache[names[0]],
                names_filter=names[-1],
                start_at_layer=layer,
                stop_at_layer=layer + 1,
            )
        eps = self.eps
        wide = torch.finfo(torch.promote_types(self.cfg.dtype, torch.float32)).eps
        unmasked = cache[scores].double().abs()
        unmasked = unmasked[unmasked < 1e4]
        products = q.norm(dim=-1).max() * k.norm(dim=-1).max() / self.cfg.attn_scale
        score = eps * unmasked.max() + wide * (self.cfg.d_head + 2) * products
        off = torch.expm1(2 * score) + eps + (2 * resid.shape[1] + 32) * wide
        bound = float(2 * off * v.abs().max())
        return self.line(f"layer {layer}: sdpa against the exact path: z", fast[names[-1]].double() - z, bound)

    def liveness(self, spec: HookSpec) -> Check:
        """Looking changes nothing; an edit, returned or in place, is the reference's edit and moves the logits."""
        with self.bridge.points_on([] if spec.flag is None else [spec.flag]):
            if spec.flag not in self._unhooked:  # one run for all points that are there with it, before their looks
                self._unhooked[spec.flag] = self.bridge(self.tokens)
            looked = self.edited(spec, lambda tensor, hook: None)
            yield self.of_hook(spec, "looking", looked.double() - self._unhooked[spec.flag].double(), 0)
            edit = random_edit(spec, self.cfg.d_vocab)
            returned = self.edited(spec, lambda tensor, hook: edit(tensor))
            in_place = self.edited(spec, written_in_place(edit))
        yield self.of_hook(spec, "returned = in place", returned.double() - in_place.double(), 0)
        with reference_edit(self.tree.root, spec, edit, self.tree.adapter):
            reference = self.native(self.tokens)
        bound = max(self.exact, self.bound if spec.site in REBUILT else 0.0)
        yield self.of_hook(spec, "as by Hugging Face", returned.double() - reference.double(), bound)
        moved = float((returned.double() - self.base.double()).abs().max())
        aspect = MOVES
        yield CheckResult(f"{spec.name}: {aspect}", moved > 0, moved, 0.0, "an edit had no effect", spec.name, aspect)

    def edited(self, spec: HookSpec, function: Callable[[Tensor, HookPoint], Tensor | None]) -> Tensor:
        """Logits of a run with one function."""
        return self.bridge.run_with_hooks(self.tokens, fwd_hooks=[(spec.name, function)])  # type: ignore[no-any-return]
