"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): for each layer an affine map to the last one's terms.

``translate(h) = h + A h + b``, A and b beginning at zero, where it is the logit lens; fitted so that what the head
then says is near what the model says in the end: the mean over tokens of KL(model || lens), each layer by itself.
Defaults are the paper's code's: SGD with Nesterov momentum 0.9, learning rate 1 - 0.9, weight decay 0.001 (towards the
logit lens), gradients clipped to norm 1, the learning rate falling linearly to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from pellucid.analysis.lens.files import Check, LensFile, identity_of, read_lens, write_lens
from pellucid.analysis.lens.fitting import Fit, FitState, about_fit, run_fit
from pellucid.analysis.lens.lens import Lens, point_of
from pellucid.analysis.lens.readout import divergence, logits_of_residual, row_chunks
from pellucid.arguments import check_choice, check_count, check_kind, check_mapping, check_number
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.labelled import Attribute
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json

OptimizerName: TypeAlias = Literal["sgd", "adam"]
MOMENTUM, CLIP = 0.9, 1.0
LEARNING_RATES: Mapping[str, float] = {"sgd": 1 - MOMENTUM, "adam": 1e-3}


class TunedLens(Lens):
    """A tuned lens.

    Args:
        bridge: the model.
        matrices: A by layer, ``[d_model, d_model]``, from layer 0 to ``n_layers - 1``.
        biases: b by layer, ``[d_model]``.
        made_by: what made it.

    Raises:
        InputError: layers or shapes that the model does not have.
    """

    kind = "tuned"

    def __init__(
        self,
        bridge: TransformerBridge,
        matrices: Mapping[int, Float[Tensor, "d_model d_model"]],
        biases: Mapping[int, Float[Tensor, " d_model"]],
        made_by: Mapping[str, Attribute] | None = None,
    ) -> None:
        super().__init__(bridge, made_by)
        self.matrices = checked_matrices(bridge, "matrices", matrices, 0, 2)
        self.biases = checked_matrices(bridge, "biases", biases, 0, 1)
        if set(self.matrices) != set(self.biases):
            raise InputError(f"matrices and biases are of the same layers; found {set(matrices)} and {set(biases)}.")

    @classmethod
    def zero(cls, bridge: TransformerBridge) -> TunedLens:
        """The lens that a fit begins with: the logit lens, to the bit."""
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        d, dtype = bridge.cfg.d_model, torch.promote_types(bridge.cfg.dtype, torch.float32)
        layers = range(bridge.cfg.n_layers)
        return cls(
            bridge,
            {layer: torch.zeros(d, d, dtype=dtype) for layer in layers},
            {layer: torch.zeros(d, dtype=dtype) for layer in layers},
        )

    @classmethod
    def fit(
        cls,
        bridge: TransformerBridge,
        corpus: Corpus,
        *,
        batch_size: int = 8,
        epochs: int = 1,
        optimizer: OptimizerName = "sgd",
        learning_rate: float | None = None,
        weight_decay: float = 1e-3,
        labels: str | Sequence[str] | None = None,
        start_row: int = 0,
        stop_row: int | None = None,
        checkpoint: str | Path | None = None,
        every: float = 60.0,
        progress: bool | None = None,
    ) -> TunedLens:
        """Fit a tuned lens to the text of a corpus; hooks that are on the bridge act.

        Args:
            bridge: the model, in evaluation mode; its weights do not change and get no gradients.
            corpus: text like that on which the lens will be read. The paper's lenses saw 65 million tokens.
            batch_size: rows of a step.
            epochs: how often the corpus is gone through.
            optimizer: ``"sgd"``, see :mod:`pellucid.analysis.lens.tuned`, or ``"adam"`` (amsgrad).
            learning_rate: at the beginning; by default 0.1 for SGD and 0.001 for Adam.
            weight_decay: towards the logit lens.
            labels: of these labels only.
            start_row: first row of each label.
            stop_row: the row after the last.
            checkpoint: a folder to keep the state in. The same call on it goes on where the last one stopped, with equal
                bits; Ctrl-C ends the batch, writes the state and then interrupts.
            every: seconds between states.
            progress: show a bar; ``None`` shows it on a terminal only.

        Raises:
            InputError: a number out of range, a model in training mode or one that changes meanwhile.
            CorpusError: a corpus that cannot be read.
            OtherJobError: the folder holds the state of another job.
        """
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        check_choice("optimizer", optimizer, ("sgd", "adam"))
        check_number("weight_decay", weight_decay, at_least=0)
        check_count("batch_size", batch_size)
        rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        check_number("learning_rate", rate, above=0)
        fit = Fit(corpus, labels, batch_size, start_row, stop_row, epochs, checkpoint, every, progress)
        plan = fit.plan()
        steps = epochs * sum(-(-rows // batch_size) for rows in fit.rows(plan).values())
        training = _Training(bridge, steps, optimizer, rate, weight_decay)
        settings: dict[str, Json] = {
            "lens": cls.kind,
            "optimizer": optimizer,
            "learning_rate": rate,
            "weight_decay": weight_decay,
        }
        empty = FitState(training.tensors(), dict.fromkeys(plan.labels, 0), 0, {"steps": 0})
        state = run_fit(bridge, fit, settings, empty, training.step, training.taps)
        training.load(state)
        made_by = about_fit(fit, state) | {
            "fitted_with": f"{optimizer}, learning rate {rate:g}, {state.counts['steps']} steps"
        }
        return cls(bridge, training.matrices, training.biases, made_by)

    @property
    def layers(self) -> list[int]:
        """Those that were fitted, and the last."""
        return [*sorted(self.matrices), self.bridge.cfg.n_layers]

    def translate(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """``h + A h + b``."""
        return translated(residual, self.matrices[layer], self.biases[layer])

    def translate_back(self, direction: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """``d + A^T d``."""
        matrix = self.matrices[layer]
        wide = direction.to(matrix)
        return wide + wide @ matrix

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """See :meth:`Lens.save`."""
        tensors = {f"A.{layer}": matrix for layer, matrix in self.matrices.items()}
        tensors |= {f"b.{layer}": bias for layer, bias in self.biases.items()}
        write_lens(path, LensFile(self.kind, tensors, self.made_by, identity_of(self.bridge)), dtype)

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge, *, check: Check = "weights") -> TunedLens:
        """What :meth:`save` wrote.

        Args:
            path: the file.
            bridge: the model that it was fitted on.
            check: what of the model has to be as it was, see :data:`~pellucid.analysis.lens.files.Check`.

        Raises:
            InputError: not such a file, a damaged one, another kind of lens, or a lens of another model.
        """
        return cls.from_file(read_lens(path, bridge, check, cls.kind), bridge)

    @classmethod
    def from_file(cls, file: LensFile, bridge: TransformerBridge) -> TunedLens:
        """The lens of a file that was read."""
        parts: dict[str, dict[int, Tensor]] = {"A": {}, "b": {}}
        for name, tensor in file.tensors.items():
            part, _, layer = name.partition(".")
            parts[part][int(layer)] = tensor
        return cls(bridge, parts["A"], parts["b"], file.made_by)


def translated(
    residual: Float[Tensor, "*rows d_model"], matrix: Float[Tensor, "d_model d_model"], bias: Float[Tensor, " d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """``h + A h + b`` in the map's dtype, as the residual's."""
    wide = residual.to(matrix.dtype)
    return (wide + wide @ matrix.T + bias).to(residual.dtype)


def checked_matrices(
    bridge: TransformerBridge, argument: str, given: Mapping[int, Float[Tensor, "d_model ..."]], first: int, axes: int
) -> dict[int, Float[Tensor, "d_model ..."]]:
    """Tensors by layer, on the model's device in float32 at least (float64 for a float64 model).

    Raises:
        InputError: none, another layer than ``first`` to ``n_layers - 1``, or another shape than ``axes`` times d_model.
    """
    cfg, shape = bridge.cfg, (bridge.cfg.d_model,) * axes
    made: dict[int, Tensor] = {}
    for layer in sorted(check_mapping(argument, given, "layers to tensors")):
        check_count(f"a layer of {argument}", layer, first, cfg.n_layers - 1)
        tensor = check_kind(f"{argument}[{layer}]", given[layer], Tensor, f"a tensor {list(shape)}")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise InputError(
                f"{argument}[{layer}] is a tensor {list(shape)}; found {list(tensor.shape)} in {tensor.dtype}."
            )
        made[layer] = tensor.detach().to(bridge.device, torch.promote_types(cfg.dtype, torch.float32))
    if not made:
        raise InputError(f"{argument} has no layer.")
    return made


class _Training:
    """The parameters of a fit and what changes them.

    Args:
        bridge: the model.
        steps: how many there will be.
        optimizer: its name.
        rate: learning rate at the beginning.
        decay: weight decay.
    """

    def __init__(
        self, bridge: TransformerBridge, steps: int, optimizer: OptimizerName, rate: float, decay: float
    ) -> None:
        zero = TunedLens.zero(bridge)
        self.bridge, self.steps, self.rate = bridge, steps, rate
        self.matrices = {layer: matrix.requires_grad_() for layer, matrix in zero.matrices.items()}
        self.biases = {layer: bias.requires_grad_() for layer, bias in zero.biases.items()}
        self.parameters = [*self.matrices.values(), *self.biases.values()]
        self.optimizer: Optimizer = (
            SGD(self.parameters, lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=decay)
            if optimizer == "sgd"
            else Adam(self.parameters, lr=rate, amsgrad=True, weight_decay=decay)
        )
        self.residuals: dict[int, Tensor] = {}
        self.taps = {point_of(layer): partial(self._keep, layer) for layer in self.matrices}

    def _keep(self, layer: int, values: Tensor, batch: PassBatch[CorpusBatch]) -> None:
        self.residuals[layer] = values.clone()  # what follows may write to it

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and what the optimizer remembers, by name."""
        found = {f"parameter.{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        for number, kept in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
        return found

    def load(self, state: FitState) -> None:
        """Go on from a state."""
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.tensors.items():
            kind, number, *rest = name.split(".")
            if kind == "optimizer":
                kept.setdefault(int(number), {})[rest[0]] = tensor
            else:
                self.parameters[int(number)].data.copy_(tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})

    def step(self, batch: PassBatch[CorpusBatch], state: FitState) -> None:
        """One batch: the run, the divergence of each layer, one step of all."""
        if state.counts["steps"] and not self.optimizer.state_dict()["state"]:
            self.load(state)
        final = batch.positions.of_input(batch.run())
        real = batch.rows.attention_mask.to(final.device)
        log_final = widened(final[real]).log_softmax(-1)
        with torch.enable_grad():
            parts = [self._gradients(layer, self.residuals.pop(layer)[real], log_final) for layer in self.matrices]
        gradients = [matrix for matrix, _ in parts] + [bias for _, bias in parts]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (1 - state.counts["steps"] / self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.counts["steps"] += 1
        state.tensors = self.tensors()

    def _gradients(self, layer: int, residual: Tensor, log_final: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean divergence of a layer, a chunk of tokens at a time."""
        parameters = self.matrices[layer], self.biases[layer]
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for rows in row_chunks(len(residual), log_final.shape[-1]):
            logits = logits_of_residual(self.bridge, translated(residual[rows], *parameters))
            loss = divergence(log_final[rows], widened(logits).log_softmax(-1)).sum() / len(residual)
            found: Any = torch.autograd.grad(loss, parameters)
            for sum_, part in zip(total, found, strict=True):
                sum_ += part
        return total[0], total[1]
