"""What the demo model shows, in figures.

Everything is measured with plain PyTorch hooks on the Hugging Face model, so that the figures do not depend on the
library whose demonstrations and tests rest on them.

Sequences for the heads are random tokens said twice, [r_0 .. r_(L-1)] x 2, without `<s>`. Languages are measured on
windows of token ids, cut from documents laid end to end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import BloomForCausalLM, PreTrainedTokenizerFast

from demo_model.corpus import LanguageText
from demo_model.documents import LanguageStreams, random_tokens, to_stream

REPEATED_TOKENS = 40
REPEATED_ROWS = 16
WINDOW = 128

FILTER_RATE = 0.95
TOP_RATE = 0.05
"""Published defaults of LAPE, but for `top_rate`: 1 % of only 2048 neurons would leave languages without any."""

RANDOM_SETS = 10
TRAINING_WINDOWS = 160

PROMPTS = {
    "en": ("Everyone has the right to", "All human beings are", "No one shall be", "Everyone is entitled to"),
    "fr": ("Toute personne a droit", "Tous les êtres humains", "Nul ne", "Tous sont égaux"),
    "es": ("Toda persona tiene derecho", "Todos los seres humanos", "Nadie", "Todos son iguales"),
    "id": ("Setiap orang berhak", "Semua orang", "Tidak seorang pun", "Setiap orang mempunyai hak"),
    "vi": ("Mọi người đều có quyền", "Tất cả mọi người", "Không ai", "Mọi người, nếu"),
    "zh": ("人人有权", "人人生而", "任何人", "人人有资格"),
}
COMPLETION_TOKENS = 32

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class InductionFigures:
    """Scores [layer, head] and losses on random tokens said twice.

    induction       mean attention from position i of the second half to i - L + 1, exactly the token that came next
    previous_token  mean attention from each position but the first to the one before
    duplicate_token mean attention from position i of the second half to i - L, the same token
    first_position  mean attention from each position but the first to position 0
    """

    induction: np.ndarray
    previous_token: np.ndarray
    duplicate_token: np.ndarray
    first_position: np.ndarray
    first_half_loss: float
    second_half_loss: float
    second_half_accuracy: float


@dataclass(frozen=True)
class LanguageNeurons:
    """Neurons by language, each as (layer, neuron), and what zeroing them does.

    effect      [language zeroed, language read]: rise of the mean negative log-probability of a token
    random      [language, set]: the same for the row's own language when as many random neurons are zeroed
    """

    neurons: dict[str, list[tuple[int, int]]]
    loss: dict[str, float]
    effect: np.ndarray
    random: np.ndarray


def repeated_sequences(length: int = REPEATED_TOKENS, rows: int = REPEATED_ROWS) -> torch.Tensor:
    """The fixed test sequences, ids [row, 2 * length]."""
    once = random_tokens(rows * length, np.random.default_rng(0)).reshape(rows, length)
    return torch.from_numpy(np.tile(once, 2))


@torch.no_grad()
def induction_figures(model: BloomForCausalLM, length: int = REPEATED_TOKENS) -> InductionFigures:
    """Scores of every head, and how well the second half is predicted."""
    ids = repeated_sequences(length)
    output = model(ids, output_attentions=True)
    patterns = torch.stack(output.attentions).mean(dim=1)
    first, second = half_losses(output.logits, ids)
    return InductionFigures(
        induction=patterns.diagonal(1 - length, -2, -1)[..., 1:].mean(-1).numpy(),
        previous_token=patterns.diagonal(-1, -2, -1).mean(-1).numpy(),
        duplicate_token=patterns.diagonal(-length, -2, -1).mean(-1).numpy(),
        first_position=patterns[..., 1:, 0].mean(-1).numpy(),
        first_half_loss=first,
        second_half_loss=second,
        second_half_accuracy=float((output.logits.argmax(-1)[:, length - 1 : -1] == ids[:, length:]).float().mean()),
    )


def half_losses(logits: torch.Tensor, ids: torch.Tensor) -> tuple[float, float]:
    """Mean loss over the targets of either half. The second half's first token is among them, though unpredictable."""
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    length = ids.shape[1] // 2
    return float(losses[:, : length - 1].mean()), float(losses[:, length - 1 :].mean())


@contextmanager
def edited_inputs(edits: dict[nn.Module, Edit]) -> Iterator[None]:
    """Within the context, each module receives its edited first input."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0].clone()), *args[1:]))
        for module, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def head_ablation_effects(model: BloomForCausalLM) -> np.ndarray:
    """Rise of the second half's loss when one head's output is replaced by its mean, [layer, head].

    The output is what the head hands to `dense` (`hook_z`), the mean that over all rows and positions.
    """
    ids = repeated_sequences()
    baseline = half_losses(model(ids).logits, ids)[1]
    heads, width = model.config.n_head, model.config.hidden_size // model.config.n_head
    effects = np.zeros((model.config.n_layer, heads))
    for layer, block in enumerate(model.transformer.h):
        for head in range(heads):
            with edited_inputs({block.self_attention.dense: _averaging(slice(head * width, (head + 1) * width))}):
                effects[layer, head] = half_losses(model(ids).logits, ids)[1] - baseline
    return effects


def _averaging(part: slice) -> Edit:
    def average(merged: torch.Tensor) -> torch.Tensor:
        merged[..., part] = merged[..., part].mean(dim=(0, 1))
        return merged

    return average


def language_windows(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Documents end to end, each closed by `</s>`, cut into ids [window, position]; a short rest is dropped."""
    ids = to_stream(documents, tokenizer).ids
    return torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


@torch.no_grad()
def language_loss(model: BloomForCausalLM, windows: torch.Tensor) -> float:
    """Mean negative log-probability of a token."""
    logits = model(windows).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@torch.no_grad()
def activation_probabilities(model: BloomForCausalLM, windows: dict[str, torch.Tensor]) -> torch.Tensor:
    """How often each MLP neuron is above zero after GELU, in every language: [layer, neuron, language]."""
    columns = []
    for ids in windows.values():
        rates: list[torch.Tensor] = []

        def record(_: nn.Module, args: tuple[torch.Tensor, ...], rates: list[torch.Tensor] = rates) -> None:
            rates.append((args[0] > 0).double().mean(dim=(0, 1)))

        handles = [block.mlp.dense_4h_to_h.register_forward_pre_hook(record) for block in model.transformer.h]
        model(ids)
        for handle in handles:
            handle.remove()
        columns.append(torch.stack(rates))
    return torch.stack(columns, dim=-1)


def language_specific_neurons(probabilities: torch.Tensor, languages: list[str]) -> dict[str, list[tuple[int, int]]]:
    """LAPE (Tang et al. 2024): neurons whose activity, spread over the languages, has the least entropy.

    A neuron must exceed a high quantile of all probabilities in some language, and belongs to each language where it
    does.
    """
    share = probabilities / probabilities.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).nan_to_num().sum(-1)
    bar = probabilities.flatten().kthvalue(round(FILTER_RATE * probabilities.numel())).values
    entropy[(probabilities <= bar).all(-1)] = torch.inf
    chosen = entropy.flatten().argsort()[: round(TOP_RATE * entropy.numel())]
    pairs = [divmod(int(index), entropy.shape[1]) for index in chosen]
    return {
        language: sorted(pair for pair in pairs if probabilities[pair][column] > bar)
        for column, language in enumerate(languages)
    }


def loss_without(model: BloomForCausalLM, neurons: list[tuple[int, int]], windows: torch.Tensor) -> float:
    """Mean negative log-probability of a token with some neurons at zero everywhere."""
    edits = {
        block.mlp.dense_4h_to_h: _zeroing([neuron for where, neuron in neurons if where == layer])
        for layer, block in enumerate(model.transformer.h)
    }
    with edited_inputs(edits):
        return language_loss(model, windows)


def _zeroing(neurons: list[int]) -> Edit:
    index = torch.tensor(neurons, dtype=torch.long)
    return lambda hidden: hidden.index_fill(-1, index, 0.0)


def language_neuron_figures(
    model: BloomForCausalLM, found_on: dict[str, torch.Tensor], read_on: dict[str, torch.Tensor]
) -> LanguageNeurons:
    """Find neurons on one set of windows, and zero them language by language on another."""
    languages = list(found_on)
    neurons = language_specific_neurons(activation_probabilities(model, found_on), languages)
    loss = {language: language_loss(model, read_on[language]) for language in languages}
    effect = np.array(
        [
            [loss_without(model, neurons[row], read_on[column]) - loss[column] for column in languages]
            for row in languages
        ]
    )
    rng = np.random.default_rng(0)
    width, count = 4 * model.config.hidden_size, 4 * model.config.hidden_size * model.config.n_layer
    random = np.zeros((len(languages), RANDOM_SETS))
    for row, language in enumerate(languages):
        for number in range(RANDOM_SETS):
            drawn = rng.choice(count, size=len(neurons[language]), replace=False)
            sample = [divmod(int(index), width) for index in drawn]
            random[row, number] = loss_without(model, sample, read_on[language]) - loss[language]
    return LanguageNeurons(neurons, loss, effect, random)


def training_windows(streams: dict[str, LanguageStreams]) -> dict[str, torch.Tensor]:
    """Windows of training text, mixed as in training."""
    rng = np.random.default_rng(0)
    return {
        code: torch.from_numpy(np.stack([stream.window(WINDOW, rng) for _ in range(TRAINING_WINDOWS)]))
        for code, stream in streams.items()
    }


def held_out_halves(
    held_out: dict[str, LanguageText], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Windows of every second held-out document, and of the others: for studies that have no other text."""
    documents = {code: text.declaration + text.sampled for code, text in held_out.items()}
    return (
        {code: language_windows(texts[0::2], tokenizer) for code, texts in documents.items()},
        {code: language_windows(texts[1::2], tokenizer) for code, texts in documents.items()},
    )


@torch.no_grad()
def complete(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The greedy continuation of a prompt, which ends where the model ends its paragraph."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=COMPLETION_TOKENS, do_sample=False)[0]
    return str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
