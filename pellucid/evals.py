"""Quick checks of how well a model does, under TransformerLens' names: a loss, induction, indirect objects.

They need no network. For a benchmark use a library of benchmarks (lm-evaluation-harness) on ``bridge.hf_model``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pellucid.activation_cache import check_storage
from pellucid.arguments import check_count, check_kind, check_mapping, check_texts, check_whole
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge

SANE = (
    "Many important transition points in the history of science have been moments when science 'zoomed in.' At these "
    "points, we develop a visualization or tool that allows us to see the world in a new level of detail, and a new field "
    "of science develops to study the world through this lens."
)
"""From "Zoom In: An Introduction to Circuits" (Olah et al. 2020)."""

SAMPLES = 1000
"""Sentences of a data set, unless told otherwise."""


@torch.no_grad()
def sanity_check(model: Any) -> Tensor:
    """The loss, in nats, on a paragraph of English: below 5 for a language model, above 7 for a broken one.

    Args:
        model: a bridge.

    Returns:
        ``[]``, a scalar.

    Raises:
        InputError: ``model`` is something else.
    """
    check_kind("model", model, TransformerBridge, "a bridge")
    loss: Tensor = model(SANE, return_type="loss")
    return loss


@torch.no_grad()
def evaluate_on_dataset(
    model: Any,
    data_loader: Iterable[Mapping[str, Tensor]],
    truncate: int = 100,
    device: torch.device | str | None = None,
) -> float:
    """The mean loss of batches, in nats.

    Args:
        model: a bridge.
        data_loader: gives ``{"tokens": [batch, pos]}``.
        truncate: how many batches at most.
        device: where to put tokens; by default where the model is.
    """
    check_kind("model", model, TransformerBridge, "a bridge")
    check_count("truncate", truncate)
    check_storage(device, None)
    if not isinstance(data_loader, Iterable):
        raise InputError(f'data_loader gives {{"tokens": [batch, pos]}}; found {type(data_loader).__name__}.')
    losses = []
    for batch in islice(data_loader, truncate):
        if not isinstance(batch, Mapping) or not isinstance(batch.get("tokens"), Tensor):
            raise InputError(f'data_loader gives {{"tokens": [batch, pos]}}; found {type(batch).__name__} in it.')
        losses.append(float(model(batch["tokens"].to(device or model.device), return_type="loss")))
    if not losses:
        raise InputError("data_loader gives no batch.")
    return sum(losses) / len(losses)


@torch.no_grad()
def induction_loss(
    model: Any,
    tokenizer: Any | None = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The loss, in nats, on the second half of random tokens that come twice: near 0 with induction heads.

    Args:
        model: a bridge.
        tokenizer: for the beginning-of-sequence token; by default the model's.
        batch_size: rows.
        subseq_len: tokens of one half.
        prepend_bos: put the beginning-of-sequence token in the place of the first one; ``None`` where there is one.
        device: where to put tokens; by default where the model is.
    """
    check_kind("model", model, TransformerBridge, "a bridge")
    check_count("batch_size", batch_size)
    check_storage(device, None)
    half = torch.randint(0, model.cfg.d_vocab, (batch_size, check_count("subseq_len", subseq_len, 2)))
    tokens = half.repeat(1, 2)
    begin = getattr(model.tokenizer if tokenizer is None else tokenizer, "bos_token_id", None)
    if prepend_bos and begin is None:
        raise InputError("prepend_bos=True, but there is no beginning-of-sequence token.")
    if begin is not None and prepend_bos is not False:
        tokens[:, 0] = begin
    tokens = tokens.to(device or model.device)
    losses: Tensor = model(tokens, return_type="loss", loss_per_token=True, attention_mask=torch.ones_like(tokens))
    return losses[:, subseq_len + 1 :].mean()


class IOIDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences with an indirect object (Wang et al. 2022): ids of a prompt, of its indirect object and of its subject.

    Args:
        tokenizer: Hugging Face's.
        templates: with ``[A]``, ``[B]`` and the keys of ``nouns`` in brackets.
        names: to draw two from.
        nouns: by key.
        num_samples: how many, at least 2 if ``symmetric``, which makes pairs.
        symmetric: each with the names exchanged, too.
        prepend_bos: begin with the beginning-of-sequence token.
        seed: of the draws.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = SAMPLES,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
    ) -> None:
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        if prepend_bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise InputError("prepend_bos=True, but the tokenizer has no beginning-of-sequence token.")
        self.templates = self.get_default_templates() if templates is None else check_texts("templates", templates)
        if any("[A]" not in template or "[B]" not in template for template in self.templates):
            raise InputError("An entry of templates has [A] and [B] in it, where the two names go.")
        self.names = self.get_default_names() if names is None else check_texts("names", names)
        if len(set(self.names)) < 2:
            raise InputError(f"names is two names at least, of which a sentence has two; found {self.names}.")
        given = self.get_default_nouns() if nouns is None else check_mapping("nouns", nouns, "keys to lists of words")
        self.nouns = {key: check_texts(f"nouns[{key!r}]", words) for key, words in given.items()}
        self._random = random.Random(None if seed is None else check_whole("seed", seed))
        count = check_count("num_samples", num_samples, 2 if symmetric else 1)
        self.samples: list[dict[str, str]] = []
        for _ in range(count // 2 if symmetric else count):
            self.samples += self.get_sample(symmetric)

    def __repr__(self) -> str:
        return f"IOIDataset({len(self)} sentences of {len(self.templates)} templates)"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        sample = self.samples[idx]
        ids = {key: self.tokenizer.encode(text, add_special_tokens=False) for key, text in sample.items()}
        begin = [self.tokenizer.bos_token_id] if self.prepend_bos else []
        return {
            "prompt": torch.tensor(begin + ids["text"]),
            "IO": torch.tensor(ids["IO"]),
            "S": torch.tensor(ids["S"]),
        }

    def get_sample(self, symmetric: bool = False) -> list[dict[str, str]]:
        """One sentence, or the two with the names exchanged: ``text``, and the names with a space before."""
        template = self._random.choice(self.templates)
        for key, words in self.nouns.items():
            template = template.replace(f"[{key}]", self._random.choice(list(words)))
        one, other = self._random.sample(self.names, 2)
        pairs = [(one, other), (other, one)] if symmetric else [(one, other)]
        return [{"text": template.replace("[A]", a).replace("[B]", b), "IO": f" {a}", "S": f" {b}"} for a, b in pairs]

    @staticmethod
    def get_default_names() -> list[str]:
        """The names that are drawn from."""
        return ["John", "Mary"]

    @staticmethod
    def get_default_templates() -> list[str]:
        """The sentences."""
        return [
            "[A] and [B] went to the [LOCATION] to buy [OBJECT]. [B] handed the [OBJECT] to [A]",
            "Then, [B] and [A] went to the [LOCATION]. [B] gave the [OBJECT] to [A]",
        ]

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """The nouns by key."""
        return {"LOCATION": ["store", "market"], "OBJECT": ["milk", "eggs", "bread"]}


@torch.no_grad()
def ioi_eval(
    model: Any,
    dataset: Any | None = None,
    batch_size: int = 8,
    num_samples: int = SAMPLES,
    tokenizer: Any | None = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """``"Logit Difference"`` of indirect object and subject, and ``"Accuracy"``: the share in which it is above 0.

    Args:
        model: a bridge.
        dataset: an :class:`IOIDataset`, or whatever gives its items; by default one of ``num_samples``.
        batch_size: rows of a forward.
        num_samples: see :class:`IOIDataset`.
        tokenizer: by default the model's.
        symmetric: see :class:`IOIDataset`.

    Raises:
        InputError: two names with the same tokens; arguments of a data set beside one; an empty one.
    """
    if not callable(model):  # anything that gives logits of tokens will do, as in TransformerLens
        raise InputError(f"model is a bridge; found {type(model).__name__}.")
    check_count("batch_size", batch_size)
    if dataset is not None and (symmetric or tokenizer is not None or num_samples != SAMPLES):
        raise InputError(
            "num_samples, tokenizer and symmetric make a data set: beside dataset= they would have no effect."
        )
    if dataset is not None and not len(dataset):
        raise InputError("dataset has no sentences.")
    chosen = model.tokenizer if tokenizer is None else tokenizer
    samples = IOIDataset(chosen, num_samples=num_samples, symmetric=symmetric) if dataset is None else dataset
    found: list[float] = []
    for start in range(0, len(samples), batch_size):
        batch = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
        prompts = torch.nn.utils.rnn.pad_sequence([each["prompt"] for each in batch], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each["prompt"]) for each in batch], batch_first=True)
        logits = model(prompts, attention_mask=mask)
        for row, each in enumerate(batch):
            shared = min(len(each["IO"]), len(each["S"]))
            differ = (each["IO"][:shared] != each["S"][:shared]).nonzero()[:, 0].tolist()
            if not differ:
                raise InputError("An indirect object and its subject begin with the same tokens: take other names.")
            place = len(each["prompt"]) - len(each["IO"]) + differ[0] - 1
            wanted, other = int(each["IO"][differ[0]]), int(each["S"][differ[0]])
            found.append(float(logits[row, place, wanted] - logits[row, place, other]))
    return {
        "Logit Difference": sum(found) / len(found),
        "Accuracy": sum(difference > 0 for difference in found) / len(found),
    }
