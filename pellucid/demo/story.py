"""What can be shown on the embedded model, computed now: each step is a function of a bridge, printing nothing.

1. It has learnt something: the sentences of one document, in six languages.
2. Some heads copy. On random tokens said twice nothing but the first time predicts the second, and the patterns show
   which heads look at the token that followed last time (induction heads).
3. Scores are not effects. Each head is taken away in turn, and what the loss then does is not what the scores suggest:
   one modest head is indispensable, and any one of the induction heads can be spared.
4. Patching it back. With its whole layer taken away, that one head alone brings the loss back.
5. The bridge holds on this very model.

*Taken away* is mean-ablated: ``hook_z`` of the head is set to its mean over rows and positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import pellucid
from pellucid.demo.predictions import Prediction, next_tokens
from pellucid.demo.prompts import PROMPTS
from pellucid.hook_points import HookFunction, HookPoint
from pellucid.model_bridge.hooking.hooks import HookRequest
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.model_bridge.verification.check_report import CheckReport
from pellucid.progress import progress_bar
from pellucid.token_text import tokens_to_text

LENGTH = 40
ROWS = 16
"""Sixteen rows of forty random tokens, each said twice."""

FIRST_ORDINARY_TOKEN = 4
"""``<unk> <s> </s> <pad>`` come before."""

INDUCTION_BAR = 0.5
"""A head that gives more than half of its attention to one exact token is called an induction head."""

Grid = list[list[float]]
"""One number a head, by layer."""


@dataclass(frozen=True)
class Completion:
    """What the model writes after a prompt, taking the most probable token each time, and what it first thought of.

    ``finished`` if it ended the paragraph itself.
    """

    language: str
    prompt: str
    text: str
    finished: bool
    next_tokens: list[Prediction]


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats over the targets of either half of the random tokens said twice."""

    first_half: float
    second_half: float


@dataclass(frozen=True)
class Head:
    """One head: what its pattern looks like, and what the second half loses without it."""

    name: str
    layer: int
    head: int
    induction: float
    previous_token: float
    effect: float


@dataclass(frozen=True)
class MostImportantHead:
    """The head that matters most, and how little its score says so."""

    head: Head
    rank_by_previous_token: int
    higher_scored: list[Head]
    """Heads with a higher previous-token score, best first, and what little happens without them."""


@dataclass(frozen=True)
class Restored:
    """Loss on the second half: with everything, without a layer's heads, and with one of them put back."""

    layer: int
    head: str
    clean: float
    without_layer: float
    with_head_put_back: float

    @property
    def share(self) -> float:
        """How much of the damage the one head undoes."""
        return (self.without_layer - self.with_head_put_back) / (self.without_layer - self.clean)


@dataclass(frozen=True)
class Checked:
    """The self-check in short."""

    checks: int
    held: int
    failed: list[str]


@dataclass(frozen=True)
class Story:
    """Everything the demo shows; ``dataclasses.asdict`` gives it as plain JSON values."""

    pellucid: str
    dtype: str
    seed: int
    n_layers: int
    n_heads: int
    parameters: int
    completions: list[Completion]
    losses: Losses
    induction_heads: list[Head]
    effect_of_all_induction_heads: float
    most_important: MostImportantHead
    restored: Restored
    check: Checked
    induction: Grid
    previous_token: Grid
    effect: Grid
    loss_by_target: list[float]
    tokens: list[list[int]]

    def tensors(self) -> dict[str, Tensor]:
        """The arrays: scores and effects ``[layer, head]``, mean loss ``[pos - 1]``, tokens ``[batch, pos]``."""
        return {
            "induction": torch.tensor(self.induction),
            "previous_token": torch.tensor(self.previous_token),
            "effect": torch.tensor(self.effect),
            "loss_by_target": torch.tensor(self.loss_by_target),
            "tokens": torch.tensor(self.tokens),
        }


@torch.no_grad()
def run_demo(bridge: TransformerBridge, seed: int = 0, progress: bool | None = None) -> Story:
    """The whole demo.

    Args:
        bridge: the embedded model.
        seed: of the random tokens.
        progress: show bars on standard error; by default where a person is watching.
    """
    cfg = bridge.cfg
    completions = complete(bridge, PROMPTS, progress=progress)
    tokens = repeated_tokens(cfg.d_vocab, seed)
    losses = losses_by_target(bridge, tokens)
    induction, previous = head_scores(bridge, tokens)
    effect = ablation_effects(bridge, tokens, progress=progress)
    heads = name_heads(induction, previous, effect)
    induction_heads = find_induction_heads(heads)
    most_important = find_most_important(heads)
    return Story(
        pellucid=pellucid.__version__,
        dtype=str(cfg.dtype).removeprefix("torch."),
        seed=seed,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        parameters=sum(parameter.numel() for parameter in bridge.parameters()),
        completions=completions,
        losses=halves(losses),
        induction_heads=induction_heads,
        effect_of_all_induction_heads=joint_effect(bridge, tokens, induction_heads),
        most_important=most_important,
        restored=restore_head(bridge, tokens, most_important.head),
        check=in_short(bridge.verify(progress=progress)),
        induction=induction.tolist(),
        previous_token=previous.tolist(),
        effect=effect.tolist(),
        loss_by_target=losses.mean(0).tolist(),
        tokens=tokens.tolist(),
    )


# -- 1. completions ----------------------------------------------------------------------------------------------------


def complete(
    bridge: TransformerBridge,
    prompts: Mapping[str, str],
    max_new_tokens: int = 24,
    top_k: int = 5,
    progress: bool | None = None,
) -> list[Completion]:
    """Continue each prompt greedily.

    Args:
        bridge: a model with a tokenizer.
        prompts: by language.
        max_new_tokens: at most; the model stops by itself where it ends a paragraph.
        top_k: how many candidates for the first new token to keep.
        progress: show a bar.
    """
    completions = []
    for language, prompt in progress_bar(prompts.items(), desc="demo: completing", unit="prompt", show=progress):
        tokens = bridge.to_tokens(prompt)
        expected = next_tokens(bridge.tokenizer, bridge(tokens)[0, -1], top_k)
        written = bridge.generate(
            tokens, max_new_tokens=max_new_tokens, do_sample=False, verbose=False, return_type="tokens"
        )
        new = written[0, tokens.shape[1] :].tolist()
        finished = new[-1] == bridge.tokenizer.eos_token_id
        completions.append(Completion(language, prompt, tokens_to_text(bridge.tokenizer, new), finished, expected))
    return completions


# -- 2. scores from patterns -------------------------------------------------------------------------------------------


def repeated_tokens(d_vocab: int, seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Random tokens said twice, ``[rows, 2 * length]``; no special ones among them."""
    once = np.random.default_rng(seed).integers(FIRST_ORDINARY_TOKEN, d_vocab, size=(rows, length))
    return torch.from_numpy(np.tile(once, 2))


def losses_by_target(bridge: TransformerBridge, tokens: Tensor, edits: Sequence[HookRequest] = ()) -> Tensor:
    """Loss ``[batch, pos - 1]`` of each token but the first; every edit must change its tensor."""
    losses: Tensor = bridge.run_with_hooks(
        tokens, fwd_hooks=edits, return_type="loss", loss_per_token=True, assert_effect=True
    )
    return losses


def halves(losses: Tensor) -> Losses:
    """Means over the targets of either half. The second half's first token is among them, though nothing predicts it."""
    length = (losses.shape[1] + 1) // 2
    return Losses(float(losses[:, : length - 1].mean()), float(losses[:, length - 1 :].mean()))


def head_scores(bridge: TransformerBridge, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Induction and previous-token scores, each ``[layer, head]``, from the patterns on tokens said twice.

    Induction: mean attention from position i of the second half to i - L + 1, the token that followed last time.
    Previous token: mean attention from every position but the first to the one before.
    """
    length = tokens.shape[1] // 2
    _, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern", return_type=None)
    patterns = torch.stack([cache["pattern", layer].float().mean(0) for layer in range(bridge.cfg.n_layers)])
    stripe = patterns.diagonal(1 - length, -2, -1)[..., 1:]
    return stripe.mean(-1), patterns.diagonal(-1, -2, -1).mean(-1)


# -- 3. effects from ablations -----------------------------------------------------------------------------------------


def ablation_effects(bridge: TransformerBridge, tokens: Tensor, progress: bool | None = None) -> Tensor:
    """By how many nats the second half's loss rises without each head, ``[layer, head]``."""
    clean = halves(losses_by_target(bridge, tokens)).second_half
    effects = torch.zeros(bridge.cfg.n_layers, bridge.cfg.n_heads)
    places = [(layer, head) for layer in range(bridge.cfg.n_layers) for head in range(bridge.cfg.n_heads)]
    for layer, head in progress_bar(places, desc="demo: ablating", unit="head", show=progress):
        losses = losses_by_target(bridge, tokens, [(hook_z(layer), ablate_to_mean([head]))])
        effects[layer, head] = halves(losses).second_half - clean
    return effects


def hook_z(layer: int) -> str:
    """Where each head's output is, before the heads are mixed."""
    return f"blocks.{layer}.attn.hook_z"


def ablate_to_mean(heads: Iterable[int]) -> HookFunction:
    """A hook on ``hook_z`` that sets heads to their mean over rows and positions."""
    chosen = list(heads)

    def edit(z: Tensor, hook: HookPoint) -> None:
        for head in chosen:
            z[:, :, head] = z[:, :, head].mean(dim=(0, 1))

    return edit


def joint_effect(bridge: TransformerBridge, tokens: Tensor, heads: Sequence[Head]) -> float:
    """By how many nats the second half's loss rises without several heads at once."""
    edits = [(hook_z(head.layer), ablate_to_mean([head.head])) for head in heads]
    clean = halves(losses_by_target(bridge, tokens)).second_half
    return halves(losses_by_target(bridge, tokens, edits)).second_half - clean


def name_heads(induction: Tensor, previous_token: Tensor, effect: Tensor) -> list[Head]:
    """Every head with its three numbers."""
    return [
        Head(
            f"L{layer}H{head}", layer, head, *(float(grid[layer, head]) for grid in (induction, previous_token, effect))
        )
        for layer in range(induction.shape[0])
        for head in range(induction.shape[1])
    ]


def find_induction_heads(heads: Sequence[Head]) -> list[Head]:
    """Heads with more than half of their attention on the token that followed last time, best first."""
    return sorted((head for head in heads if head.induction > INDUCTION_BAR), key=lambda head: -head.induction)


def find_most_important(heads: Sequence[Head]) -> MostImportantHead:
    """The head without which most is lost, and those that score higher as previous-token heads."""
    first = max(heads, key=lambda head: head.effect)
    higher = sorted(
        (head for head in heads if head.previous_token > first.previous_token), key=lambda head: -head.previous_token
    )
    return MostImportantHead(first, 1 + len(higher), higher)


# -- 4. patching -------------------------------------------------------------------------------------------------------


def restore_head(bridge: TransformerBridge, tokens: Tensor, head: Head) -> Restored:
    """Take a whole layer's heads away, then put the clean ``hook_z`` of one of them back."""
    name = hook_z(head.layer)
    clean_losses, cache = bridge.run_with_cache(tokens, names_filter=name, return_type="loss", loss_per_token=True)
    clean_z = cache[name]

    def restore(z: Tensor, hook: HookPoint) -> None:
        z[:, :, head.head] = clean_z[:, :, head.head]

    without_all = (name, ablate_to_mean(range(bridge.cfg.n_heads)))
    return Restored(
        layer=head.layer,
        head=head.name,
        clean=halves(clean_losses).second_half,
        without_layer=halves(losses_by_target(bridge, tokens, [without_all])).second_half,
        with_head_put_back=halves(losses_by_target(bridge, tokens, [without_all, (name, restore)])).second_half,
    )


# -- 5. the check ------------------------------------------------------------------------------------------------------


def in_short(report: CheckReport) -> Checked:
    """How many checks hold, and the names of those that do not."""
    return Checked(
        len(report.results), len(report.results) - len(report.failed), [result.name for result in report.failed]
    )
