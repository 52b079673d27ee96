"""The programs that the benchmarks of sweeps compare: Pellucid, TransformerLens, a loop with plain torch hooks, nnsight.

All patch the same cells of an index (layer, position, head) with the same clean activations and score with the same
function of logits. Each takes a list of cells, or ``None`` for all of them, and gives one number a cell.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, TypeAlias

import pandas as pd
import torch
from bench_bridge import has_lens, has_nnsight, open_lens, run_bare
from common import Shape, random_tokens, twin
from torch import Tensor, nn
from transformers import BloomForCausalLM

from pellucid import TransformerBridge, patching
from pellucid.sweep import Edit, EditSet, FromRun, LogitDifference, MetricLike, Sweep, SweepPlan, Zero

Cells: TypeAlias = Sequence[tuple[int, ...]]
Change: TypeAlias = Callable[[Tensor], None]

ANSWER, FOIL = 11, 17
DECLARED = LogitDifference(ANSWER, FOIL)


def difference(logits: Tensor) -> Tensor:
    """A plain function that reads two logits."""
    return logits[0, -1, ANSWER] - logits[0, -1, FOIL]


def log_probability(logits: Tensor) -> Tensor:
    """A plain function that reads the whole last position."""
    return logits[0, -1].log_softmax(-1)[ANSWER]


# -- where ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """What is patched, and how each program reaches it.

    Attributes:
        name: of the sweep, as a TransformerLens user says it.
        function: of ``transformer_lens.patching`` and ``pellucid.patching``; empty for ablation.
        hook: hook point of a layer.
        axes: of the index.
        module: below a block of Hugging Face's, where the plain hook is.
        on: ``"input"`` or ``"output"`` of that module.
    """

    name: str
    function: str
    hook: str
    axes: tuple[str, ...]
    module: str
    on: str


RESID_PRE = Site("resid_pre", "get_act_patch_resid_pre", "hook_resid_pre", ("layer", "pos"), "", "input")
ATTN_OUT = Site(
    "attn_out", "get_act_patch_attn_out", "hook_attn_out", ("layer", "pos"), "self_attention.dense", "output"
)
HEAD_Z = Site(
    "head z by position",
    "get_act_patch_attn_head_out_by_pos",
    "attn.hook_z",
    ("layer", "pos", "head"),
    "self_attention.dense",
    "input",
)
PATTERN = Site(
    "head pattern",
    "get_act_patch_attn_head_pattern_all_pos",
    "attn.hook_pattern",
    ("layer", "head_index"),
    "self_attention.attention_dropout",
    "output",
)
ABLATION = Site("zero ablation of heads", "", "attn.hook_z", ("layer", "head_index"), "self_attention.dense", "input")


# -- one model under every program -----------------------------------------------------------------------------------------


class Study:
    """Two prompts that differ at every position from 0 on, and every program that patches one with the other.

    Args:
        model: the parameters, which all programs share.
        shape: its sizes.
        length: tokens of the prompts.
    """

    def __init__(self, model: BloomForCausalLM, shape: Shape, length: int) -> None:
        self.shape, self.length = shape, length
        self._reference = model
        self.model = twin(model)
        self.bridge = TransformerBridge(self.model)
        self.set_length(length)

    def set_length(self, length: int) -> None:
        """Other prompts on the same models."""
        self.length = length
        self.corrupted = random_tokens(self.shape, 1, length)
        self.clean = random_tokens(self.shape, 1, length, seed=2)
        assert bool((self.clean != self.corrupted).all()), "prompts that share tokens: cells without work"
        self._caches: dict[str, Mapping[str, Tensor]] = {}
        self._lens_caches: dict[str, Any] = {}

    @cached_property
    def lens(self) -> Any:
        made = open_lens(twin(self._reference))
        made.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        return made

    @cached_property
    def sight(self) -> Any:
        import nnsight  # type: ignore[import-not-found, unused-ignore]

        return nnsight.NNsight(twin(self._reference))

    def cells(self, site: Site) -> list[tuple[int, ...]]:
        """Every cell of a site's index."""
        sizes = {"layer": self.shape.n_layers, "pos": self.length, "head": self.shape.n_heads}
        sizes["head_index"] = sizes["head"]
        return list(product(*(range(sizes[axis]) for axis in site.axes)))

    def clean_cache(self, site: Site) -> Mapping[str, Tensor]:
        """The clean run's activations, Pellucid's; made once."""
        if site.hook not in self._caches:
            names = [f"blocks.{layer}.{site.hook}" for layer in range(self.shape.n_layers)]
            self._caches[site.hook] = self.bridge.run_with_cache(self.clean, names_filter=names)[1]
        return self._caches[site.hook]

    def lens_cache(self, site: Site) -> Any:
        """The clean run's activations, TransformerLens'; made once."""
        if site.hook not in self._lens_caches:

            def wanted(name: str) -> bool:
                return name.endswith(site.hook)

            self._lens_caches[site.hook] = self.lens.run_with_cache(self.clean, names_filter=wanted)[1]
        return self._lens_caches[site.hook]

    # -- Pellucid ----------------------------------------------------------------------------------------------------------

    def ours(
        self,
        site: Site,
        metric: MetricLike,
        cells: Cells | None,
        logit_positions: Sequence[int] | None = None,
    ) -> Tensor:
        """``[cell]`` by ``pellucid.patching``, or by a sweep where that has no function for it."""
        if not site.function:
            sweep = Sweep(self.bridge, self.corrupted, metric, logit_positions=logit_positions)
            return next(iter(sweep.run(self.edits(site, cells), progress=False).values.values())).flatten()
        index = {} if cells is None else {"index_axis_names": None, "index_df": frame(site, cells)}
        function: Any = vars(patching)[site.function]
        result: Tensor = function(
            self.bridge,
            self.corrupted,
            self.clean_cache(site),
            metric,
            logit_positions=logit_positions,
            verbose=False,
            **index,
        )
        return result.flatten()

    def edits(self, site: Site, cells: Cells | None) -> list[EditSet]:
        """The cells as edits of a sweep."""
        value = FromRun(self.clean_cache(site)) if site.function else Zero()
        made: list[EditSet] = []
        for cell in self.cells(site) if cells is None else cells:
            where = dict(zip(site.axes, cell, strict=True))
            head = where.get("head", where.get("head_index"))
            hook = f"blocks.{where['layer']}.{site.hook}"
            made.append(Edit(hook, value, positions=where.get("pos"), heads=head))
        return made

    def plan(self, site: Site, metric: MetricLike, cells: Cells | None = None) -> SweepPlan:
        """What the engine is going to compute."""
        return Sweep(self.bridge, self.corrupted, metric).plan(self.edits(site, cells))

    # -- the others --------------------------------------------------------------------------------------------------------

    def lens_loop(self, site: Site, metric: Callable[[Tensor], Tensor], cells: Cells) -> Tensor:
        """``[cell]`` by ``transformer_lens.patching``."""
        import transformer_lens.patching  # type: ignore[import-not-found, unused-ignore]

        function = vars(transformer_lens.patching)[site.function]
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            result: Tensor = function(
                self.lens,
                self.corrupted,
                self.lens_cache(site),
                metric,
                index_axis_names=None,
                index_df=frame(site, cells),
            )
        return result

    def hook_loop(self, site: Site, metric: Callable[[Tensor], Tensor], cells: Cells) -> Tensor:
        """``[cell]``: one forward of bare Hugging Face for each cell, with a torch hook."""
        scores = []
        for cell in cells:
            with hooked(self.model.transformer.h[cell[0]], site, self.change(site, cell)):
                scores.append(metric(run_bare(self.model, self.corrupted)))
        return torch.stack(scores)

    def change(self, site: Site, cell: tuple[int, ...]) -> Change:
        """What a cell does to Hugging Face's tensor, in place; heads are flat there."""
        where = dict(zip(site.axes, cell, strict=True))
        head = where.get("head", where.get("head_index"))
        width = self.shape.d_model // self.shape.n_heads
        part = slice(None) if head is None else slice(head * width, (head + 1) * width)
        at = where.get("pos", slice(None))
        if not site.function:

            def ablate(tensor: Tensor) -> None:
                tensor[:, :, part] = 0.0

            return ablate
        clean = self.clean_cache(site)[f"blocks.{cell[0]}.{site.hook}"]
        if site is PATTERN:

            def patch_pattern(tensor: Tensor) -> None:
                tensor[:, head] = clean[:, head]

            return patch_pattern
        new = clean.reshape(1, self.length, -1)[:, at, part]

        def patch(tensor: Tensor) -> None:
            tensor[:, at, part] = new

        return patch

    def nnsight_loop(self, site: Site, metric: Callable[[Tensor], Tensor], cells: Cells) -> Tensor:
        """``[cell]`` by a trace of nnsight for each cell; ``resid_pre`` only."""
        assert site is RESID_PRE, "no nnsight program for this site"
        clean = self.clean_cache(site)
        scores = []
        for layer, position in cells:
            new = clean[f"blocks.{layer}.{site.hook}"][:, position]
            logits = nnsight_patched(self.sight, self.corrupted, layer, position, new)
            scores.append(metric(logits))
        return torch.stack(scores)


def nnsight_patched(sight: Any, tokens: Tensor, layer: int, position: int, new: Tensor) -> Tensor:
    """Logits of one run with one position of a block's input replaced."""
    with sight.trace(tokens):
        sight.transformer.h[layer].input[:, position] = new
        logits = sight.lm_head.output.save()
    return logits  # type: ignore[no-any-return]  # noqa: RET504


@contextlib.contextmanager
def hooked(block: nn.Module, site: Site, change: Change) -> Iterator[None]:
    """A plain torch hook that makes ``change``, removed at the end."""
    module = block.get_submodule(site.module)

    def on_input(module: nn.Module, args: Any) -> Any:
        tensor = args[0].clone()
        change(tensor)
        return (tensor, *args[1:])

    def on_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        tensor = output.clone()
        change(tensor)
        return tensor

    register: Any = module.register_forward_pre_hook if site.on == "input" else module.register_forward_hook
    handle = register(on_input if site.on == "input" else on_output)
    try:
        yield
    finally:
        handle.remove()


def frame(site: Site, cells: Cells) -> pd.DataFrame:
    return pd.DataFrame([list(cell) for cell in cells], columns=list(site.axes))


def first_layers(model: BloomForCausalLM, n_layers: int) -> BloomForCausalLM:
    """A model of the first layers, with the same parameters."""
    cut = twin(model)
    cut.transformer.h = cut.transformer.h[:n_layers]
    cut.config.n_layer = n_layers
    return cut


__all__ = [
    "ABLATION",
    "ATTN_OUT",
    "DECLARED",
    "HEAD_Z",
    "PATTERN",
    "RESID_PRE",
    "Cells",
    "Site",
    "Study",
    "difference",
    "first_layers",
    "has_lens",
    "has_nnsight",
    "log_probability",
]
