"""Pairs of prompts as they are typed: a table of them, or one pair; the embedded model has its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pellucid.cli.options import ModelChoice
from pellucid.cli.prompt import as_typed
from pellucid.cli.tokens import expected, read_token
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.token_text import token_label

WANTED = (
    "Give one pair, --clean and --corrupted, prompts of as many tokens, with --answer and, to compare with, --foil, the "
    "next token of each; or --pairs FILE.csv, a table with the columns clean, corrupted, answer, foil."
)


@dataclass(frozen=True)
class TypedPairs:
    """What was typed for ``--pairs``, ``--clean``, ``--corrupted``, ``--answer`` and ``--foil``."""

    table: Path | None
    clean: str | None
    corrupted: str | None
    answer: str | None
    foil: str | None

    def refuse(self, choice: ModelChoice) -> None:
        """Refuse, before a model is opened, a table and one pair together, and prompts that are missing or empty.

        Raises:
            InputError: so it is.
        """
        prompts = {"--clean": self.clean, "--corrupted": self.corrupted}
        given = [
            option
            for option, value in {**prompts, "--answer": self.answer, "--foil": self.foil}.items()
            if value is not None
        ]
        if self.table is not None:
            if given:
                raise InputError(
                    f"{given[0]} is of one pair, and --pairs is a table of them: --pairs has prompts and answers of its "
                    "own. Give one or the other."
                )
            return
        if not given and choice.is_demo:
            return
        for option, text in prompts.items():
            if text is None:
                raise InputError(f"{option} is missing. {WANTED}")
            if not text:
                raise InputError(f"{option} is empty: there is nothing to run.")

    def read(self, bridge: TransformerBridge) -> PromptPairs:
        """The pairs; nothing typed stands for the embedded model's.

        Raises:
            InputError: a table that cannot be read; an answer that is missing, is not one token, or is the foil.
        """
        if self.table is not None:
            return PromptPairs.from_csv(self.table)
        if self.clean is None or self.corrupted is None:
            pair = PATCHING_PAIR
            return PromptPairs([pair.clean], [pair.corrupted], [pair.answer], [pair.foil], name="demo")
        prompts = [
            as_typed(text, f"{option} is not UTF-8: set a UTF-8 locale.")
            for option, text in (("--clean", self.clean), ("--corrupted", self.corrupted))
        ]
        clean = _next_logits(bridge, prompts[0])
        if self.answer is None:
            said = expected(bridge.tokenizer, clean)
            raise InputError(f"--answer is missing: the token that is right after the clean prompt. {said}")
        answer = read_token(bridge.tokenizer, self.answer, "--answer", clean)
        foil = None
        if self.foil is not None:
            foil = read_token(bridge.tokenizer, self.foil, "--foil", _next_logits(bridge, prompts[1]))
        if answer == foil:
            raise InputError(f"--answer and --foil are the same token, {token_label(bridge.tokenizer, answer)}.")
        foils = None if foil is None else [foil]
        return PromptPairs(prompts[:1], prompts[1:], [answer], foils, name="one pair")


@torch.no_grad()
def _next_logits(bridge: TransformerBridge, prompt: str) -> Tensor:
    """``[d_vocab]`` after a prompt: the tokens that a message names."""
    logits: Tensor = bridge(prompt)[0, -1]
    return logits
