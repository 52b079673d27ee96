"""The training: a four-layer BLOOM, Muon for the matrices of its blocks, AdamW for the rest.

Deterministic given the seed, the number of threads, the library versions and the kind of CPU (matrix products round
differently from one kind to another, and training makes the difference grow).
"""

import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import BloomConfig, BloomForCausalLM

from demo_model.documents import LanguageStreams, stage_at, training_batch
from demo_model.evaluate import induction_figures, language_loss
from demo_model.tokenizer import BOS, EOS, PAD, VOCABULARY_SIZE

WARM_UP_STEPS = 50
DECAY_FROM = 0.5
FINAL_RATE = 0.05
LOG_EVERY = 100


@dataclass(frozen=True)
class LogEntry:
    """One line of the loss curve; `train_loss` is the mean since the line before."""

    step: int
    tokens: int
    cpu_seconds: float
    train_loss: float | None
    held_out_loss: float
    first_half_loss: float
    second_half_loss: float
    second_half_accuracy: float
    best_induction: float


def model_config() -> BloomConfig:
    """Large enough for induction and six languages, small enough to ship; `initializer_range` suits the width."""
    return BloomConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        n_layer=4,
        n_head=8,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def train_model(
    training: dict[str, LanguageStreams],
    held_out: dict[str, torch.Tensor],
    steps: int,
    seed: int,
    precision: torch.dtype,
) -> tuple[BloomForCausalLM, list[LogEntry]]:
    """Fit a model from scratch on `training`, measuring it on `held_out` token windows along the way."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, len(training)])
    model = BloomForCausalLM._from_config(model_config(), attn_implementation="eager")
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    started, tokens = time.process_time(), 0
    losses: list[float] = []
    log: list[LogEntry] = []
    for step in range(steps + 1):
        if step % LOG_EVERY == 0 or step == steps:
            log.append(log_entry(model, held_out, step, tokens, time.process_time() - started, losses))
            losses.clear()
        if step == steps:
            break
        ids, weights = (torch.from_numpy(array) for array in training_batch(training, stage_at(step / steps), rng))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = model(ids).logits
        loss = weighted_loss(logits.float(), ids, weights.float())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += ids.numel()
    return model, log


def log_entry(
    model: BloomForCausalLM,
    held_out: dict[str, torch.Tensor],
    step: int,
    tokens: int,
    cpu_seconds: float,
    losses: list[float],
) -> LogEntry:
    """Measure the model as it is, and print the measurement."""
    figures = induction_figures(model)
    entry = LogEntry(
        step,
        tokens,
        cpu_seconds,
        train_loss=float(np.mean(losses)) if losses else None,
        held_out_loss=float(np.mean([language_loss(model, windows) for windows in held_out.values()])),
        first_half_loss=figures.first_half_loss,
        second_half_loss=figures.second_half_loss,
        second_half_accuracy=figures.second_half_accuracy,
        best_induction=float(figures.induction.max()),
    )
    print({name: round(value, 3) for name, value in asdict(entry).items() if value is not None}, flush=True)
    return entry


def make_optimizers(model: BloomForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon takes the weight matrices of the blocks, AdamW the (tied) embedding, the norms and the biases."""
    parameters = dict(model.named_parameters())
    in_block = {name for name, parameter in parameters.items() if ".h." in name and parameter.ndim == 2}
    matrices = [parameter for name, parameter in parameters.items() if name in in_block]
    others = [parameter for name, parameter in parameters.items() if name not in in_block]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """A short warm-up, a plateau, and from half-way a straight line down to a twentieth."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decayed = max(0.0, (step / steps - DECAY_FROM) / (1 - DECAY_FROM))
    return warm_up * (1 - decayed * (1 - FINAL_RATE))


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, each target counted by its weight."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()
