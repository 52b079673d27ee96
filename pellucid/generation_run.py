"""One call of Hugging Face's ``generate``: which forwards are steps of it, and at which step it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class GenerationRun:
    """One call of Hugging Face's ``generate``, and where its forwards are in the sequence.

    The forwards of one call are not one a token: a long prompt may come in chunks, assisted decoding reads several tokens
    at once, and guidance (``guidance_scale``) runs a second sequence beside the first. The sequence that is generated is
    the one of the first forward, with the key/value cache that it was given.

    Attributes:
        root: the model whose ``generate`` it is; forwards of another model are no part of it.
        n_prompts: rows that ``generate`` was given.
        prompt_length: positions of the prompt that it was given, those of a continued cache among them.
        continues: whether it was given a cache.
        guided: whether guidance runs a second sequence.
        prompt_mask: ``[prompt, pos]`` that it was given with the prompts, ``None`` without one. A prompt that is read in
            chunks comes with the mask of what was read so far.
    """

    root: nn.Module
    n_prompts: int
    prompt_length: int
    continues: bool
    guided: bool
    prompt_mask: Tensor | None = None
    prompt_end: int | None = None
    step: int = 0
    _cache: Any = None
    _prompt: Tensor | None = None
    _end: int = 0
    _was_own: bool = False

    def prompt_end_of(self, cache: Any | None, past: int, given: Tensor, tokens: Tensor | None) -> int:
        """The column at which the prompt of this forward's sequence ends.

        Args:
            cache: its key/value cache.
            past: positions in it.
            given: ids or embeddings of the new positions, ``[batch, pos, ...]``.
            tokens: ids, or ``None``: embeddings are those of the prompt as a whole, soft positions among it.
        """
        end = past + given.shape[1]
        if self.prompt_end is None:
            own, self._cache = True, cache
            # What a cache holds that ``generate`` was not given was put before the prompt (PEFT's prefixes).
            before = 0 if self.continues else past
            self.prompt_end = end if tokens is None else self.prompt_length + before
            self._prompt = tokens if cache is None else None
        elif self._cache is not None:
            own = cache is self._cache
        else:
            own = cache is None and self._is_continued_by(tokens) and not (self.guided and self._was_own)
        self._was_own = own and end > self._end  # guidance comes after a forward that reads on
        if not own:
            return end - self.step  # guidance is at the step of the forward that it guides
        self._end = end
        self.step = max(0, end - self.prompt_end)
        return self.prompt_end

    def _is_continued_by(self, tokens: Tensor | None) -> bool:
        """Whether a forward without a cache reads on where the first one did; another text is one beside it."""
        prompt = self._prompt
        return prompt is None or (tokens is not None and torch.equal(tokens[:, : prompt.shape[1]].to(prompt), prompt))
