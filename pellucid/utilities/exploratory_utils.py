"""How well a model answers a prompt, printed, under TransformerLens' name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pellucid.arguments import check_count, check_kind, check_text, check_texts
from pellucid.model_bridge.transformer_bridge import TransformerBridge


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Print the rank, logit and probability of an answer, and the most probable tokens beside it.

    Args:
        prompt: text.
        answer: text, of one or more tokens; or several answers, of which the first token is looked at.
        model: a bridge with a tokenizer.
        prepend_space_to_answer: put a space before an answer that begins with none.
        print_details: print tokens and the most probable ones; without, the ranks alone.
        prepend_bos: see ``to_tokens`` of the bridge.
        top_k: how many of the most probable tokens.
    """
    check_text("prompt", prompt)
    check_count("top_k", top_k, 0)
    check_kind("model", model, TransformerBridge, "a bridge")
    answers = check_texts("answer", [answer] if isinstance(answer, str) else answer)
    if prepend_space_to_answer:
        answers = [text if text.startswith(" ") else " " + text for text in answers]
    several = len(answers) > 1
    rows = [model.to_tokens(text, prepend_bos=False) for text in answers]
    wanted = torch.cat([row[:, :1] for row in rows]) if several else rows[0]
    asked = model.to_tokens(prompt, prepend_bos=prepend_bos)
    tokens = torch.cat([asked.expand(len(answers), -1), wanted], dim=1)
    pieces = [model.to_str_tokens(text, prepend_bos=False) for text in answers]
    if print_details:
        _say("Tokenized prompt:", model.to_str_tokens(prompt, prepend_bos=prepend_bos))
        _say("Tokenized answers:", pieces) if several else _say("Tokenized answer:", pieces[0])
    with torch.no_grad():
        logits = model(tokens)
    ranks: list[Any] = []
    for step in range(wanted.shape[1]):
        here = logits[:, asked.shape[1] + step - 1].float()
        probabilities, (best, order) = here.softmax(-1), here.sort(descending=True)
        found = []
        for row, piece in enumerate(pieces):
            token = int(wanted[row, step])
            found.append((piece[step], int((order[row] == token).nonzero()[0, 0])))
            if print_details:
                _say(
                    f"Performance on answer token:\nRank: {found[-1][1]: <8} Logit: {float(here[row, token]):5.2f} "
                    f"Prob: {float(probabilities[row, token]):6.2%} Token: |{piece[step]}|"
                )
        for place in range(min(top_k, here.shape[-1]) if print_details else 0):
            token = int(order[0, place])
            _say(
                f"Top {place}th token. Logit: {float(best[0, place]):5.2f} Prob: {float(probabilities[0, token]):6.2%} "
                f"Token: |{model.to_single_str_token(token)}|"
            )
        ranks.append(found if several else found[0])
    _say("Ranks of the answer tokens:", ranks)


def _say(*words: object) -> None:
    print(*words)  # noqa: T201 (this function prints)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name says to pytest
