"""The Jacobian lens (Gurnee et al., Transformer Circuits 2026): what a residual does to the last one, on average.

With h the residual of a layer and h' the one that leaves the last block, V the positions of a prompt that count
(without the first 16, whose residuals are unlike others, and the last), the lens of a layer is

    J = mean over prompts of  1/|V|  sum over t in V  sum over t' in V, t' >= t  of  d h'[t'] / d h[t]
    lens(h) = head(final_norm(J h))

A prompt is run once, in as many copies as cotangents go backwards together; a backward pass plants in each copy a one
for one feature of h' at all positions of V, and what arrives at h[t] is that row of the sum over t'. So a prompt costs
a forward and ``d_model / cotangents`` backward passes. With ``rows_per_prompt`` each prompt gives some rows only, the
next prompt the next rows: unbiased as well, and the same number of backward passes then reads more prompts
(:meth:`JacobianLens.agreement` of two halves says how sure each layer is).

Published lenses are of raw weights: processing changes the terms of the stream, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from pellucid.analysis.lens.files import Check, LensFile, identity_of, read_lens, write_lens
from pellucid.analysis.lens.fitting import Fit, FitState, about_fit, run_fit
from pellucid.analysis.lens.lens import Lens, point_of
from pellucid.analysis.lens.tuned import checked_matrices
from pellucid.arguments import check_count, check_kind, check_wholes
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.dtypes import widened
from pellucid.errors import CorpusError, InputError, WeightError
from pellucid.experiments.labelled import Attribute
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json

SKIPPED = 16
"""Positions at the beginning of a prompt that do not count."""


class JacobianLens(Lens):
    """A Jacobian lens.

    Args:
        bridge: the model, its weights raw.
        matrices: J by layer, ``[d_model, d_model]`` (last residual, residual of the layer), of layers 1 to ``n_layers - 1``;
            also of 0, the embedding, which published lenses leave out.
        rows: of how many prompts each row is a mean, ``[d_model]`` int64.
        made_by: what made it.

    Raises:
        InputError: layers or shapes that the model does not have.
        WeightError: processed weights.
    """

    kind = "Jacobian"

    def __init__(
        self,
        bridge: TransformerBridge,
        matrices: Mapping[int, Float[Tensor, "d_model d_model"]],
        rows: Int[Tensor, " d_model"] | None = None,
        made_by: Mapping[str, Attribute] | None = None,
    ) -> None:
        super().__init__(bridge, made_by)
        refuse_processed(bridge)
        self.matrices = checked_matrices(bridge, "matrices", matrices, 0, 2)
        self.rows = torch.zeros(bridge.cfg.d_model, dtype=torch.int64) if rows is None else rows
        check_kind("rows", self.rows, Tensor, "a tensor [d_model]")
        if self.rows.shape != (bridge.cfg.d_model,):
            raise InputError(f"rows is [{bridge.cfg.d_model}], a count for each row; found {list(self.rows.shape)}.")

    @classmethod
    def fit(
        cls,
        bridge: TransformerBridge,
        corpus: Corpus,
        *,
        layers: Sequence[int] | None = None,
        cotangents: int = 8,
        rows_per_prompt: int | None = None,
        skip_first: int = SKIPPED,
        labels: str | Sequence[str] | None = None,
        start_row: int = 0,
        stop_row: int | None = None,
        checkpoint: str | Path | None = None,
        every: float = 60.0,
        progress: bool | None = None,
    ) -> JacobianLens:
        """Fit a Jacobian lens to the rows of a corpus, each a prompt; hooks that are on the bridge act.

        Published lenses are of 1,000 prompts of 128 tokens; 100 are said to be usable.

        Args:
            bridge: the model, in evaluation mode and raw; its weights do not change and get no gradients.
            corpus: text; ``Corpus(..., context=128)``.
            layers: which, by default 1 to ``n_layers - 1``.
            cotangents: rows that a backward pass finds together, in so many copies of the prompt: more are quicker and take
                more memory.
            rows_per_prompt: how many of the ``d_model`` rows a prompt gives; by default all.
            skip_first: positions at the beginning that do not count.
            labels: of these labels only.
            start_row: first row of each label.
            stop_row: the row after the last.
            checkpoint: see :meth:`TunedLens.fit`, as for the arguments below.
            every: seconds between states.
            progress: show a bar; ``None`` shows it on a terminal only.

        Raises:
            InputError: a number out of range, a model in training mode or one that changes meanwhile.
            WeightError: processed weights.
            CorpusError: a corpus that cannot be read, or whose rows are all too short.
            OtherJobError: the folder holds the state of another job.
        """
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        refuse_processed(bridge)
        cfg, dtype = bridge.cfg, torch.promote_types(bridge.cfg.dtype, torch.float32)
        check_count("cotangents", cotangents, 1, cfg.d_model)
        count = (
            cfg.d_model if rows_per_prompt is None else check_count("rows_per_prompt", rows_per_prompt, 1, cfg.d_model)
        )
        check_count("skip_first", skip_first, 0)
        chosen = list(range(1, cfg.n_layers)) if layers is None else sorted(set(check_wholes("layers", layers)))
        if not chosen or chosen[-1] >= cfg.n_layers:
            raise InputError(
                f"layers are of 0 to {cfg.n_layers - 1}; found {layers if chosen else 'none: the model has one block'}."
            )
        fit = Fit(corpus, labels, 1, start_row, stop_row, 1, checkpoint, every, progress)
        rows = {"rows": torch.zeros(cfg.d_model, dtype=torch.int64)}
        sums = {f"J.{layer}": torch.zeros(cfg.d_model, cfg.d_model, dtype=dtype) for layer in chosen}
        settings: dict[str, Json] = {
            "lens": cls.kind,
            "layers": chosen,
            "cotangents": cotangents,
            "rows": count,
            "skip_first": skip_first,
        }
        empty = FitState(rows | sums, dict.fromkeys(fit.plan().labels, 0), 0, {"prompts": 0, "too_short": 0})

        def step(batch: PassBatch[CorpusBatch], state: FitState) -> None:
            length = batch.rows.tokens.shape[1]
            valid = list(range(skip_first, length - 1))
            if not valid:
                state.counts["too_short"] += 1
                return
            prompt = state.counts["prompts"]
            wanted = [(prompt * count + place) % cfg.d_model for place in range(count)]
            found = rows_of_prompt(bridge, batch.rows.tokens, chosen, valid, wanted, cotangents)
            for layer, matrix in zip(chosen, found, strict=True):
                state.tensors[f"J.{layer}"][wanted] += matrix.to("cpu", dtype)
            state.tensors["rows"][wanted] += 1
            state.counts["prompts"] += 1

        state = run_fit(bridge, fit, settings, empty, step, {})
        seen = state.tensors["rows"]
        if not bool(seen.all()):
            raise CorpusError(
                f"Of {int((seen == 0).sum())} of {cfg.d_model} rows there is no prompt: {state.counts['prompts']} rows of "
                f"the corpus were read and {state.counts['too_short']} have no position between the first {skip_first} and "
                "the last. Give more or longer text, or a smaller skip_first."
            )
        matrices = {layer: state.tensors[f"J.{layer}"] / seen[:, None] for layer in chosen}
        made_by = about_fit(fit, state) | {"fitted_prompts": state.counts["prompts"], "skip_first": skip_first}
        return cls(bridge, matrices, seen, made_by)

    @property
    def layers(self) -> list[int]:
        """Those that were fitted, and the last."""
        return [*sorted(self.matrices), self.bridge.cfg.n_layers]

    def translate(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """``J h``."""
        matrix = self.matrices[layer]
        return (residual.to(matrix.dtype) @ matrix.T).to(residual.dtype)

    def translate_back(self, direction: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """``J^T d``."""
        matrix = self.matrices[layer]
        return direction.to(matrix) @ matrix

    def merge(self, other: JacobianLens) -> JacobianLens:
        """The lens of both fits' prompts, such as two halves of a corpus.

        Raises:
            InputError: other layers, or a lens that does not say how many prompts it is of.
        """
        check_kind("other", other, JacobianLens, "a Jacobian lens")
        if self.layers != other.layers or self.bridge.cfg.d_model != other.bridge.cfg.d_model:
            raise InputError(f"Lenses of the same layers merge; found {self.layers} and {other.layers}.")
        if not bool(self.rows.all()) or not bool(other.rows.all()):
            raise InputError(
                "A lens that does not say how many prompts it is of cannot be merged: its share is not known."
            )
        rows = self.rows + other.rows
        matrices = {
            layer: (
                mine.double() * self.rows[:, None].to(mine.device)
                + other.matrices[layer].double() * other.rows[:, None].to(mine.device)
            )
            / rows[:, None].to(mine.device)
            for layer, mine in self.matrices.items()
        }
        both = {name: value for name, value in self.made_by.items() if other.made_by.get(name) == value}
        for name in ("fitted_prompts", "fitted_rows", "fitted_tokens"):
            if name in self.made_by and name in other.made_by:
                both[name] = int(str(self.made_by[name])) + int(str(other.made_by[name]))
        return JacobianLens(self.bridge, matrices, rows, both)

    def agreement(self, other: JacobianLens) -> xr.DataArray:
        """``[layer]``: how alike two fits are, such as those of two halves of a corpus: the cosine between their matrices.

        With noise of equal size in each of two halves, that of their mean with the true matrix is about
        ``sqrt(2 a / (1 + a))``.

        Raises:
            InputError: other layers.
        """
        check_kind("other", other, JacobianLens, "a Jacobian lens")
        if self.layers != other.layers:
            raise InputError(f"Lenses of the same layers are compared; found {self.layers} and {other.layers}.")
        values = [
            float(
                torch.nn.functional.cosine_similarity(
                    mine.flatten().double(), other.matrices[layer].flatten().double(), 0
                )
            )
            for layer, mine in self.matrices.items()
        ]
        return xr.DataArray(values, {"layer": list(self.matrices)}, ("layer",), "agreement", {"units": "1"})

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """See :meth:`Lens.save`."""
        tensors = {f"J.{layer}": matrix for layer, matrix in self.matrices.items()}
        made_by = self.made_by | {"rows": self.rows.tolist()}
        write_lens(path, LensFile(self.kind, tensors, made_by, identity_of(self.bridge)), dtype)

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge, *, check: Check = "weights") -> JacobianLens:
        """What :meth:`save` wrote; see :meth:`TunedLens.load <pellucid.analysis.lens.tuned.TunedLens.load>`.

        Args:
            path: the file.
            bridge: the model that it was fitted on.
            check: what of the model has to be as it was.

        Raises:
            InputError: not such a file, a damaged one, another kind of lens, or a lens of another model.
            WeightError: processed weights.
        """
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        refuse_processed(bridge)  # by name, before its hash is another
        return cls.from_file(read_lens(path, bridge, check, cls.kind), bridge)

    @classmethod
    def from_file(cls, file: LensFile, bridge: TransformerBridge) -> JacobianLens:
        """The lens of a file that was read."""
        made_by = dict(file.made_by)
        rows: Any = made_by.pop("rows")
        matrices = {int(name.partition(".")[2]): tensor for name, tensor in file.tensors.items()}
        return cls(bridge, matrices, torch.tensor(rows, dtype=torch.int64), made_by)


def refuse_processed(bridge: TransformerBridge) -> None:
    """Refuse a model whose weights were processed.

    Raises:
        WeightError: with the steps.
    """
    state = bridge.weights_state
    if state.is_processed:
        done = sorted({step for steps in state.done.values() for step in steps})
        raise WeightError(
            f"A Jacobian lens is of raw weights, and these were processed ({', '.join(done)}), which changes the terms of "
            "the residual stream: call bridge.unprocess_weights(), or open the model without process_weights."
        )


def rows_of_prompt(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    layers: Sequence[int],
    valid: Sequence[int],
    rows: Sequence[int],
    cotangents: int,
) -> list[Float[Tensor, "row d_model"]]:
    """Some rows of a prompt's J, by layer: ``[row, d_model]``, one run.

    Args:
        bridge: the model.
        tokens: ``[1, pos]`` ids.
        layers: whose residuals.
        valid: positions that count.
        rows: features of the last residual.
        cotangents: rows a backward pass.
    """
    copies = min(cotangents, len(rows))
    sources: dict[int, Tensor] = {}

    def leaf(residual: Tensor, hook: Any) -> Tensor:
        """The first residual begins the graph: nothing before it is differentiated."""
        sources[layers[0]] = residual.detach().clone().requires_grad_()
        return sources[layers[0]]

    def keep(residual: Tensor, hook: Any) -> None:
        sources[hook.layer() + 1] = residual

    hooks: list[Any] = [(point_of(layers[0]), leaf), *((point_of(layer), keep) for layer in layers[1:])]
    with torch.enable_grad():
        final = bridge.run_with_hooks(
            tokens.repeat(copies, 1),
            fwd_hooks=hooks,
            stop_at_layer=bridge.cfg.n_layers,
            attention_mask=torch.ones_like(tokens).repeat(copies, 1),
        )
        return jacobian_rows(final, [sources[layer] for layer in layers], valid, rows)


def jacobian_rows(
    final: Float[Tensor, "copy pos d_model"],
    sources: Sequence[Float[Tensor, "copy pos d_model"]],
    valid: Sequence[int],
    rows: Sequence[int],
) -> list[Float[Tensor, "row d_model"]]:
    """For each source ``[row, d_model]``: the mean over valid positions of it of the sum over those of ``final``.

    Args:
        final: ``[copy, pos, d_model]``, equal copies of one row, a function of the sources.
        sources: each ``[copy, pos, d_model]``, a copy of ``final`` depending on its own copy only.
        valid: positions that count.
        rows: features of ``final``, as many at a time as there are copies.
    """
    copies, places = final.shape[0], torch.tensor(valid, device=final.device)
    found: list[list[Tensor]] = [[] for _ in sources]
    for start in range(0, len(rows), copies):
        some = rows[start : start + copies]
        planted = torch.zeros_like(final)
        for copy, row in enumerate(some):
            planted[copy, places, row] = 1
        gradients: Any = torch.autograd.grad(final, sources, planted, retain_graph=start + copies < len(rows))
        for parts, gradient in zip(found, gradients, strict=True):
            parts.append(widened(gradient[: len(some), places.to(gradient.device)]).mean(1))
    return [torch.cat(parts) for parts in found]
