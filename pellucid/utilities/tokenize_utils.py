"""Data sets as rows of tokens, masks and beginning-of-sequence tokens of ids, under TransformerLens' names.

The bridge itself needs none of it: its own rules are in :mod:`pellucid.model_bridge.running.tokens`, and a corpus of rows,
with its documents' borders known, is a :class:`pellucid.Corpus`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_list, check_text
from pellucid.errors import InputError
from pellucid.padding import after_last_real, before_first_real
from pellucid.utilities.checks import check_dataset, check_ids, check_tokenizer
from pellucid.utilities.hf_utils import keep_single_column


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = 10,
    set_format: bool = True,
) -> Any:
    """Documents of a data set (of the library ``datasets``), one after the other, cut into rows of ``max_length`` tokens.

    Between two documents of a batch stands one end-of-sequence token. What is left at the end of a batch is dropped; a
    batch too short for one row is padded.

    Args:
        dataset: with a column of texts.
        tokenizer: Hugging Face's, with an end-of-sequence token.
        streaming: the data set is iterable: no processes, no format.
        max_length: tokens of a row, a beginning-of-sequence token among them.
        column_name: the column.
        add_bos_token: begin each row with the beginning-of-sequence token.
        num_proc: processes that tokenise; ``None`` for this one.
        set_format: give torch tensors.

    Raises:
        InputError: no data set, or one that is read as it comes without ``streaming``, or no such column; the tokenizer has
            no end-of-sequence token, or no beginning-of-sequence token and one is asked for.
    """
    check_count("max_length", max_length, 2 if add_bos_token else 1)
    check_text("column_name", column_name)
    if num_proc is not None:
        check_count("num_proc", num_proc)
    check_tokenizer(tokenizer, "eos_token_id", "bos_token_id", "pad_token_id")
    check_dataset(dataset, column_name)
    if not streaming and not hasattr(dataset, "num_rows"):
        raise InputError("dataset is read as it comes, and takes no processes and no format: give streaming=True.")
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None or (add_bos_token and begin is None):
        word = "end-of-sequence" if end is None else "beginning-of-sequence"
        raise InputError(f"The tokenizer has no {word} token: set it, or give add_bos_token=False for the beginning.")
    length = max_length - 1 if add_bos_token else max_length
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def in_rows(examples: Any) -> dict[str, Any]:
        tokens: list[int] = []
        texts = examples[column_name]
        for index, row in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []):
            tokens += [end, *row] if index else row
        if not tokens:
            return {"tokens": np.array([], dtype=np.int64)}
        if len(tokens) < length:
            tokens += [pad] * (length - len(tokens))
        rows = np.array(tokens[: len(tokens) // length * length], dtype=np.int64).reshape(-1, length)
        if add_bos_token:
            rows = np.concatenate([np.full((len(rows), 1), begin), rows], axis=1)
        return {"tokens": rows}

    options = {} if streaming else {"num_proc": num_proc}
    made = keep_single_column(dataset, column_name).map(in_rows, batched=True, remove_columns=[column_name], **options)
    if set_format and not streaming:
        made.set_format(type="torch", columns=["tokens"])
    return made


def get_tokenizer_with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts a beginning-of-sequence token: the same one if it has none, or puts it already.

    The bridge needs no such tokenizer: ``to_tokens(prepend_bos=True)`` puts the token whatever the tokenizer does.

    Raises:
        InputError: no tokenizer of Hugging Face's.
    """
    check_tokenizer(tokenizer, "init_kwargs", "bos_token", "name_or_path", "padding_side")
    arguments = copy.deepcopy(tokenizer.init_kwargs)
    name, puts = arguments.pop("name_or_path", tokenizer.name_or_path), arguments.pop("add_bos_token", None)
    puts = getattr(tokenizer, "add_bos_token", False) if puts is None else puts
    if tokenizer.bos_token is None or puts:
        return tokenizer
    made = type(tokenizer).from_pretrained(name, add_bos_token=True, **arguments)
    made.padding_side = tokenizer.padding_side
    return made


def get_input_with_manually_prepended_bos(bos_token: str | None, input: str | list[str]) -> str | list[str]:
    """Text, or texts, with the beginning-of-sequence token's text before; unchanged if there is none.

    Raises:
        InputError: no text.
    """
    if not isinstance(input, str):
        for text in check_list("input", input, "texts, or one", empty=True):
            if not isinstance(text, str):
                raise InputError(f"an entry of input is a string; found {text!r} ({type(text).__name__}).")
    if bos_token is None:
        return input
    check_text("bos_token", bos_token)
    return bos_token + input if isinstance(input, str) else [bos_token + text for text in input]


def get_tokens_with_bos_removed(tokenizer: Any, tokens: Tensor, padding_side: str | None = None) -> Tensor:
    """``[..., pos]`` ids without each row's beginning-of-sequence token, ``[..., pos - 1]``.

    Raises:
        InputError: a row does not start with one; no tensor of ids, no such side.
    """
    check_tokenizer(tokenizer, "bos_token_id", "pad_token_id", "padding_side")
    check_ids("tokens", tokens, "ids [..., pos]")
    side = _side(tokenizer, padding_side)
    if tokenizer.bos_token_id is None:
        return tokens
    if tokens.dim() == 0 or tokens.shape[-1] == 0:
        raise InputError(f"tokens is ids [..., pos], of one position at least; found shape {list(tokens.shape)}.")
    pad, begin = tokenizer.pad_token_id, tokenizer.bos_token_id
    place = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    if side == "left":
        real = torch.ones_like(tokens, dtype=torch.bool) if pad is None else tokens != pad
        place = before_first_real(real).sum(-1) - (1 if begin == pad else 0)
    first = tokens.gather(-1, place.clamp(0, tokens.shape[-1] - 1)[..., None])[..., 0]
    begins = [begin, *([tokenizer.cls_token_id] if isinstance(getattr(tokenizer, "cls_token_id", None), int) else [])]
    is_there = torch.isin(first, torch.tensor(begins, device=tokens.device)) & (place >= 0) & (place < tokens.shape[-1])
    if not bool(is_there.all()):
        raise InputError(
            f"Cannot remove BOS: {int((~is_there).sum())} {side}-padded row(s) of tokens do not start with the BOS token "
            f"(id {begin}){' after their padding' if side == 'left' else ''}."
        )
    if side == "right":
        return tokens[..., 1:]
    keep = torch.arange(tokens.shape[-1], device=tokens.device) != place[..., None]
    return tokens[keep].reshape(*tokens.shape[:-1], tokens.shape[-1] - 1)


def get_attention_mask(tokenizer: Any, tokens: Tensor, prepend_bos: bool, padding_side: str | None = None) -> Tensor:
    """A mask ``[batch, pos]`` guessed from ids: 0 at the padding tokens at one end of a row, 1 elsewhere.

    A guess: an end-of-sequence token that is the padding token too is taken for padding. ``bridge.to_tokens(texts,
    return_mask=True)`` knows.

    Args:
        tokenizer: with a padding token; ``None`` gives ones.
        tokens: ``[batch, pos]``.
        prepend_bos: each row begins with the beginning-of-sequence token, which is real though it be the padding token.
        padding_side: where padding is; by default the tokenizer's.

    Raises:
        InputError: a side that is none; no tensor of ids; no tokenizer.
    """
    check_ids("tokens", tokens, "ids [batch, pos]")
    if padding_side is not None:  # said also where there is no padding token
        check_choice("padding_side", padding_side, ("left", "right"))
    mask = torch.ones_like(tokens)
    if tokenizer is None:
        return mask
    check_tokenizer(tokenizer, "pad_token_id", "bos_token_id", "padding_side")
    if tokenizer.pad_token_id is None:
        return mask
    real = tokens != tokenizer.pad_token_id
    if _side(tokenizer, padding_side) == "right":
        return mask.masked_fill(after_last_real(real), 0)
    leading = before_first_real(real)
    mask = mask.masked_fill(leading, 0)
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        mask.scatter_(-1, (leading.sum(-1, keepdim=True) - 1).clamp(min=0), 1)
    return mask


def _side(tokenizer: Any, padding_side: str | None) -> str:
    side = tokenizer.padding_side if padding_side is None else padding_side
    check_choice("padding_side", side, ("left", "right"))
    return str(side)
