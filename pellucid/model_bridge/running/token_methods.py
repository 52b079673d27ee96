"""The bridge's methods between text and tokens, under TransformerLens' names; the rules are in :mod:`tokens`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_list, check_whole
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError, TokenNotFoundError
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens, TokenRules


class TokenMethods:
    """``to_tokens`` and its kin."""

    _rules: TokenRules

    @property
    @abstractmethod
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where token ids are sent."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, the very object that was given; ``None`` if there is none."""
        return self._rules.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._rules.tokenizer = tokenizer

    @overload
    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
        return_mask: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
        *,
        return_mask: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
        return_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Token ids ``[batch, pos]`` of a string or strings, exactly as ``tokenizer(text)`` gives them.

        Args:
            input: text.
            prepend_bos: ``True`` begins with one beginning-of-sequence token, whether the tokenizer puts it or we do;
                ``False`` leaves out the one that the tokenizer puts. By default, as the tokenizer does.
            padding_side: of shorter rows; by default the tokenizer's.
            move_to_device: put them where the model is.
            truncate: cut off what is beyond ``cfg.n_ctx`` tokens of a text. Nothing is unless it is asked for.
            return_mask: give ``(tokens, mask)``, the mask ``[batch, pos]`` int64 with 1 at tokens and 0 at padding. Strings
                of different lengths are padded, and ids alone do not say where: a run takes it as ``attention_mask=``.

        Raises:
            InputError: no tokenizer, empty text.
        """
        tokens, mask = self._rules.encode(input, prepend_bos, padding_side, self.cfg.n_ctx if truncate else None)
        device = self.device if move_to_device else tokens.device
        tokens = tokens.to(device)
        if not return_mask:
            return tokens
        return tokens, torch.ones_like(tokens) if mask is None else mask.to(device)

    def to_string(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]:
        """Text of ``[pos]`` ids, or a list of texts of ``[batch, pos]`` ids."""
        return self._rules.decode(tokens)

    def to_str_tokens(
        self,
        input: TextOrTokens | np.ndarray,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> list[str] | list[list[str]]:
        """Each token's text; a list of lists for several rows. Joined, they are the decoded text.

        A word's token has the space before it, in tokenizers of SentencePiece's kind too. Part of a character, where several
        tokens share one, decodes to U+FFFD.

        Args:
            input: a string, strings, or a tensor or NumPy array of ids; of no ids, no strings.
            prepend_bos: see :meth:`to_tokens`; for strings.
            padding_side: accepted for TransformerLens' callers: each text's own tokens are given, so nothing is padded.
        """
        if isinstance(input, np.ndarray):
            input = torch.from_numpy(input)
        self._check_text_arguments(input, prepend_bos, padding_side)
        if isinstance(input, Tensor):
            if input.dim() == 0:
                raise InputError(
                    "to_str_tokens takes ids [pos] or [batch, pos]; found one id alone. Give [id] as a tensor."
                )
            if input.numel() == 0:
                return []
            rows = [self._rules.pieces(row) for row in input.reshape(-1, input.shape[-1]).tolist()]
            return rows[0] if len(rows) == 1 else rows
        texts = [input] if isinstance(input, str) else check_list("input", input, "strings")
        if any(not isinstance(text, str) for text in texts):
            raise InputError("to_str_tokens takes a string, strings or a tensor of ids; make a list of ids a tensor.")
        ids = [self._rules.encode(text, prepend_bos, padding_side)[0][0] for text in texts]
        pieces = [self._rules.pieces(row.tolist()) for row in ids]
        return pieces[0] if isinstance(input, str) else pieces

    def _check_text_arguments(
        self, input: TextOrTokens, prepend_bos: bool | None, padding_side: PaddingSide | None
    ) -> None:
        check_choice("padding_side", padding_side, ("left", "right", None))
        if prepend_bos and isinstance(input, Tensor):
            raise InputError("prepend_bos is for strings; put the id before the token ids yourself.")

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token.

        Raises:
            InputError: it is not.
        """
        return self._rules.single_token(string)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token.

        Raises:
            InputError: no id of the vocabulary.
        """
        return str(self._rules.decode([int_token]))

    def get_token_position(
        self,
        single_token: str | int,
        input: TextOrTokens,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Where a token stands in a prompt.

        Args:
            single_token: its text or id.
            input: one prompt: a string, or a tensor of ids.
            mode: its ``"first"`` or ``"last"`` place.
            prepend_bos: see :meth:`to_tokens`; for strings.
            padding_side: accepted for TransformerLens' callers: one prompt is not padded.

        Raises:
            InputError: no id or text of a token, several rows were given, or the mode is another.
            TokenNotFoundError: it does not occur.
        """
        check_choice("mode", mode, ("first", "last"))
        self._check_text_arguments(input, prepend_bos, padding_side)
        if isinstance(single_token, str):
            token = self.to_single_token(single_token)
        else:
            token = check_whole("single_token", single_token)
        tokens = input if isinstance(input, Tensor) else self._rules.encode(input, prepend_bos, padding_side)[0]
        row = self._rules.check(tokens)
        if row.shape[0] != 1:
            raise InputError(f"get_token_position looks at one prompt; found {row.shape[0]}.")
        places = (row[0] == token).nonzero()[:, 0].tolist()
        if not places:
            last = self._rules.d_vocab - 1
            why = "" if 0 <= token <= last else f": ids of the vocabulary go from 0 to {last}"
            raise TokenNotFoundError(f"The token {single_token!r} does not occur in the prompt{why}.")
        return int(places[0] if mode == "first" else places[-1])
