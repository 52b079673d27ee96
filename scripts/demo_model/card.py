"""The model card: prose from `card_template.md`, every number from a measurement, so that neither can drift.

`CLAIMS` is what demonstrations and tests may rely on. A model that breaks one is not worth shipping.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from transformers import BloomForCausalLM, PreTrainedTokenizerFast

from demo_model.corpus import COMMON_WORDS, HELD_OUT_ARTICLES, LANGUAGES, UDHR, WORDFREQ, Corpus
from demo_model.documents import BOS_SHARE, CURRICULUM, DECLARATION_SHARE, to_streams
from demo_model.evaluate import (
    COMPLETION_TOKENS,
    PROMPTS,
    RANDOM_SETS,
    TOP_RATE,
    InductionFigures,
    LanguageNeurons,
    complete,
    head_ablation_effects,
    held_out_halves,
    induction_figures,
    language_neuron_figures,
    language_windows,
    training_windows,
)

TEMPLATE = Path(__file__).with_name("card_template.md")
SCORE_BAR = 0.8


@dataclass(frozen=True)
class Completion:
    """What the model writes after a prompt, and how many characters of it are the declaration's own."""

    prompt: str
    text: str
    verbatim: int


@dataclass(frozen=True)
class Measurements:
    """Everything the card reports; `neurons_alone` uses nothing but the shipped held-out text."""

    induction: InductionFigures
    ablation: np.ndarray
    neurons: LanguageNeurons
    neurons_alone: LanguageNeurons
    completions: dict[str, list[Completion]]
    tokens: dict[str, tuple[int, int, int, int]]


def measure(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Measurements:
    """Measure a loaded model; `corpus` must be the one that it was trained on."""
    training, held_out = to_streams(corpus.training, tokenizer), to_streams(corpus.held_out, tokenizer)
    windows = {
        code: language_windows(text.declaration + text.sampled, tokenizer) for code, text in corpus.held_out.items()
    }
    return Measurements(
        induction_figures(model),
        head_ablation_effects(model),
        language_neuron_figures(model, training_windows(training), windows),
        language_neuron_figures(model, *held_out_halves(corpus.held_out, tokenizer)),
        {
            code: sorted(
                (_completion(model, tokenizer, prompt, corpus.training[code].declaration) for prompt in prompts),
                key=lambda completion: -completion.verbatim,
            )
            for code, prompts in PROMPTS.items()
        },
        {
            code: (
                len(training[code].declaration.ids),
                len(training[code].sampled.ids),
                len(held_out[code].declaration.ids),
                len(held_out[code].sampled.ids),
            )
            for code in LANGUAGES
        },
    )


def _completion(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, paragraphs: list[str]
) -> Completion:
    text = complete(model, tokenizer, prompt)
    lengths = (n for n in range(len(text), 0, -1) if any((prompt + text[:n]) in paragraph for paragraph in paragraphs))
    return Completion(prompt, text, next(lengths, 0))


def row_effects(found: LanguageNeurons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By language zeroed: the effect on itself, the mean effect on the others, the mean effect of random neurons."""
    own = found.effect.diagonal()
    others = (found.effect.sum(axis=1) - own) / (len(own) - 1)
    return own, others, found.random.mean(axis=1)


def previous_token_head(measured: Measurements) -> tuple[int, int]:
    """The head of layer 0 that matters most, (0, head)."""
    return 0, int(measured.ablation[0].argmax())


def _languages_are_separate(found: LanguageNeurons, factor: float) -> bool:
    own, others, random = row_effects(found)
    return bool((own > factor * others).all() and (own > factor * random).all())


def _every_language_has_neurons(measured: Measurements) -> bool:
    return all(len(found) >= 5 for run in (measured.neurons, measured.neurons_alone) for found in run.neurons.values())


def _previous_token_head_matters(measured: Measurements) -> bool:
    head = previous_token_head(measured)
    return bool(measured.ablation[head] > 4 and measured.induction.previous_token[head] < 0.4)


def _declaration_is_known(measured: Measurements) -> bool:
    return all(completions[0].verbatim >= 20 for completions in measured.completions.values())


CLAIMS: dict[str, Callable[[Measurements], bool]] = {
    "the best induction score is above .9": lambda measured: measured.induction.induction.max() > 0.9,
    "at least five heads score above .8": lambda measured: (measured.induction.induction > SCORE_BAR).sum() >= 5,
    "the loss on the second half is below .6": lambda measured: measured.induction.second_half_loss < 0.6,
    "the loss on the first half is above 7.2": lambda measured: measured.induction.first_half_loss > 7.2,
    "one head of layer 0 raises the second half's loss by more than 4 when mean-ablated, though its previous-token "
    "score is below .4": _previous_token_head_matters,
    "every language has at least five neurons": _every_language_has_neurons,
    "zeroing those found on training text harms their own language more than 5 times as much as it harms the others "
    "on average, and as random neurons do": lambda measured: _languages_are_separate(measured.neurons, factor=5),
    "zeroing those found on one half of the held-out text does so, on the other half, more than 3 times as much": (
        lambda measured: _languages_are_separate(measured.neurons_alone, factor=3)
    ),
    "in every language, some prompt's greedy continuation begins with 20 characters of the Declaration": (
        _declaration_is_known
    ),
}


def write_card(path: Path, measured: Measurements, run: dict[str, Any]) -> list[str]:
    """Write the card beside the model, print it, and return the claims that do not hold."""
    card = Template(TEMPLATE.read_text("utf-8")).substitute(_blanks(path.parent, measured, run))
    path.write_text(card, "utf-8")
    print(card)
    return [claim for claim, holds in CLAIMS.items() if not holds(measured)]


def _blanks(directory: Path, measured: Measurements, run: dict[str, Any]) -> dict[str, str]:
    """The template's blanks."""
    induction, heads = measured.induction, range(measured.ablation.shape[1])
    head = previous_token_head(measured)
    induction_heads = [f"L{layer}H{number}" for layer, number in np.argwhere(induction.induction > SCORE_BAR)]
    return {
        "steps": str(run["steps"]),
        "seed": str(run["seed"]),
        "threads": str(run["threads"]),
        "precision": run["precision"],
        "wall_minutes": f"{run['wall_seconds'] / 60:.0f}",
        "cpu_seconds": f"{run['curve'][-1]['cpu_seconds']:.0f}",
        "million_tokens": f"{run['curve'][-1]['tokens'] / 1e6:.1f}",
        "machine": run["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "megabytes": f"{(directory / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "udhr_sha256": UDHR.sha256,
        "wordfreq_sha256": WORDFREQ.sha256,
        "held_out_articles": ", ".join(map(str, sorted(HELD_OUT_ARTICLES))),
        "corpus_table": table(
            ["", "declaration, training", "sampled, training", "declaration, held out", "sampled, held out"],
            ([code, *map(str, counts)] for code, counts in measured.tokens.items()),
        ),
        "common_words": str(COMMON_WORDS),
        "declaration_share": f"{DECLARATION_SHARE:.0%}",
        "sampled_share": f"{1 - DECLARATION_SHARE:.0%}",
        "bos_share": f"{BOS_SHARE:.0%}",
        "completion_tokens": str(COMPLETION_TOKENS),
        "curriculum_table": table(
            ["from", "document length", "share of repeats", "weight of unpredictable tokens"],
            (
                [f"{stage.start:.0%}", str(stage.length), f"{stage.repeat_share:.0%}", str(stage.novel_weight)]
                for stage in CURRICULUM
            ),
        ),
        "curve_table": table(
            [name.replace("_", " ") for name in run["curve"][0]],
            (["" if value is None else _round(value) for value in line.values()] for line in run["curve"]),
        ),
        "claims": "\n".join(f"- {claim}: **{'yes' if holds(measured) else 'NO'}**" for claim, holds in CLAIMS.items()),
        "first_half_loss": f"{induction.first_half_loss:.2f}",
        "second_half_loss": f"{induction.second_half_loss:.2f}",
        "second_half_accuracy": f"{induction.second_half_accuracy:.1%}",
        "induction_heads": ", ".join(induction_heads),
        "largest_duplicate": f"{induction.duplicate_token.max():.2f}",
        "largest_first": f"{induction.first_position.max():.2f}",
        "previous_head": f"L{head[0]}H{head[1]}",
        "previous_score": f"{induction.previous_token[head]:.2f}",
        "previous_effect": f"{measured.ablation[head]:.2f}",
        "largest_induction_effect": f"{measured.ablation[induction.induction > SCORE_BAR].max(initial=0.0):.2f}",
        "induction_table": _head_table(induction.induction, heads),
        "previous_table": _head_table(induction.previous_token, heads),
        "ablation_table": _head_table(measured.ablation, heads),
        "top_rate": f"{TOP_RATE:.0%}",
        "random_sets": str(RANDOM_SETS),
        "neurons_table": _neurons_table(measured.neurons),
        "neurons_alone_table": _neurons_table(measured.neurons_alone),
        "completions_table": table(
            ["", "prompt", "greedy continuation", "characters that are the declaration's"],
            (
                [code, completion.prompt, _cell(completion.text), f"{completion.verbatim} of {len(completion.text)}"]
                for code, completions in measured.completions.items()
                for completion in completions
            ),
        ),
    }


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _head_table(values: np.ndarray, heads: Iterable[int]) -> str:
    rows = ([f"layer {layer}", *(_round(value) for value in row)] for layer, row in enumerate(values))
    return table(["", *(f"H{head}" for head in heads)], rows)


def _neurons_table(found: LanguageNeurons) -> str:
    _, others, random = row_effects(found)
    codes = list(found.neurons)
    return table(
        ["zeroed", "neurons", *codes, "mean of the others", "random: mean", "random: largest", "loss before"],
        (
            [
                code,
                str(len(found.neurons[code])),
                *(
                    f"**{value:.3f}**" if column == row else f"{value:.3f}"
                    for column, value in enumerate(found.effect[row])
                ),
                f"{others[row]:.3f}",
                f"{random[row]:.3f}",
                f"{found.random[row].max():.3f}",
                f"{found.loss[code]:.2f}",
            ]
            for row, code in enumerate(codes)
        ),
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _round(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
