"""Small random BLOOMs for tests.

A fresh checkpoint has norm gains 1 and biases 0, which hides most faults, so every parameter is moved at random. With small
tied weights greedy decoding only copies its input, so generation tests take untied ones.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

from pellucid import TransformerBridge

VOCAB = 97


class Mould:
    """A model that copies are made of: as ``copy.deepcopy`` makes them, in a fifth of its time.

    Thousands of tests take a model or two. What ``deepcopy`` walks through in Python (some 2,500 objects a model), pickle
    writes once and reads in C; tensors are kept beside it and cloned, one that stands in two places once.
    """

    def __init__(self, model: nn.Module) -> None:
        file = io.BytesIO()
        pickler = _WithoutTensors(file)
        pickler.dump(model)
        self.written, self.tensors = file.getvalue(), pickler.tensors

    def copy(self) -> Any:
        return _WithTensors(self.written, self.tensors).load()


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        places = [place for place, tensor in enumerate(self.tensors) if tensor is found]
        if not places:
            self.tensors.append(found)
        return places[0] if places else len(self.tensors) - 1


class _WithTensors(pickle.Unpickler):
    def __init__(self, written: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(written))
        self.tensors, self.copies = tensors, dict[int, Tensor]()

    def persistent_load(self, place: int) -> Tensor:
        if place not in self.copies:
            self.copies[place] = copy.deepcopy(self.tensors[place])
        return self.copies[place]


@cache
def _built(dtype: torch.dtype, scale: float, settings: tuple[tuple[str, Any], ...]) -> Mould:
    config = {"hidden_size": 48, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB} | dict(settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return Mould(model.to(dtype))


def make_bloom(dtype: torch.dtype = torch.float32, scale: float = 0.1, **settings: Any) -> Any:
    """A BLOOM with random gains and biases; the same arguments give the same weights."""
    return _built(dtype, scale, tuple(sorted(settings.items()))).copy()


def make_generator(**settings: Any) -> Any:
    """A BLOOM whose greedy decoding wanders: untied, so that it does not copy its input (35 tokens in 6 rows of 25)."""
    return make_bloom(tie_word_embeddings=False, **settings)


def make_pair(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[TransformerBridge, Any]:
    """A bridge, and an untouched Hugging Face copy of its model."""
    return TransformerBridge(make_bloom(dtype, **settings)), make_bloom(dtype, **settings)


def random_tokens(batch: int = 2, length: int = 9, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """``[batch, length]`` ids."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def is_pristine(model: nn.Module) -> bool:
    """Whether nothing stands in for any module's forward."""
    ours = ("forward", "_old_forward", "generate")
    return not any(slot in vars(module) for module in model.modules() for slot in ours)
