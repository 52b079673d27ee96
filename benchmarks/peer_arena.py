"""What ARENA's exercises 1.2 and 1.3 take beside TransformerLens: stand-ins, so that their cells run without a network.

The exercises (https://github.com/callummcdougall/ARENA_3.0, the scripts ``solutions.py`` with ``# %%`` between cells) are
other people's text and not here; ``peer_notebooks.py --arena`` takes their paths. They were written for a version of
TransformerLens before 4, so on both sides alike: ``HookedTransformer`` boots a bridge and folds its weights, ``utils`` is
``utilities``, the classes of ``components`` (annotations) are empty, weights to be downloaded are random, the GPU is the
processor, a progress bar is text, a plot draws nothing, ``IOIDataset`` is the one below, and ARENA's checks of an answer
against its own solution are left out but for those that look at a factored matrix.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAMES = [
    "Aaron", "Adam", "Alan", "Alex", "Alice", "Amy", "Anna", "Brian", "Carol", "Daniel", "David", "Emma", "Eric", "Frank",
    "George", "Grace", "Henry", "Jack", "James", "Jane", "John", "Kate", "Kevin", "Laura", "Linda", "Mark", "Mary", "Paul",
    "Peter", "Rachel", "Robert", "Sarah", "Simon", "Susan", "Thomas", "Tom",
]  # fmt: skip
TEMPLATES = (
    "When {} and {} went to the shops, {} gave the bag to",
    "After {} and {} went to the park, {} gave a drink to",
    "While {} and {} were at the school, {} gave a book to",
)
DROPPED = {"HookedTransformer", "HookedTransformerConfig", "utils"}
"""Names that TransformerLens 4 has not; the stand-ins give the first two, ``utilities`` is the third."""


def cells_of(script: Path) -> list[str]:
    """The cells of a script of ARENA's, rewritten for TransformerLens 4 and for a machine without a GPU or a network."""
    return [as_of_today(cell) for cell in re.split(r"(?m)^# %%.*\n", script.read_text("utf-8"))[1:]]


def as_of_today(cell: str) -> str:
    """The cell, with what TransformerLens 4 has not, the GPU, and weights to be loaded taken out."""

    def kept(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split(",")]
        still = ", ".join(name for name in names if name not in DROPPED)
        utilities = "import transformer_lens.utilities as utils\n" if "utils" in names else ""
        return utilities + (f"from transformer_lens import {still}" if still else "pass")

    cell = re.sub(r"(?m)^from transformer_lens import ([\w, ]+)$", kept, cell)
    cell = cell.replace("from tqdm.notebook import", "from tqdm import")
    cell = re.sub(r"""(["'])(?:cuda|mps)\1""", '"cpu"', cell)
    return re.sub(r"(?m)^([ \t]+).*(?:t\.load|load_state_dict)\(.*$", r"\1pass", cell)


class IOIDataset:
    """Prompts in which a second name (IO) is to be said after a first one (S) that comes twice, with ARENA's attributes.

    ``toks``: ids ``[prompt, position]``; ``word_idx``: position of each of IO, S1, S1+1, S2 and end, by prompt; ``groups``:
    the prompts of each template.
    """

    def __init__(
        self,
        prompt_type: str = "mixed",
        N: int = 25,
        tokenizer: Any = None,
        prepend_bos: bool = False,
        seed: int = 0,
        device: str = "cpu",
        prompts: list[tuple[str, str, str, str]] | None = None,
    ) -> None:
        draw = random.Random(seed)
        if prompts is None:
            prompts = [
                (TEMPLATES[n % len(TEMPLATES)], "ABB" if n % 2 else "BAB", *draw.sample(NAMES, 2)) for n in range(N)
            ]
        self.prompts, self.tokenizer, self.seed = prompts, tokenizer, seed
        self._lay_out([order for _, order, *_ in prompts], [{"A": a, "B": b} for *_, a, b in prompts])

    def _lay_out(self, orders: list[str], names: list[dict[str, str]]) -> None:
        import torch

        self.sentences, places = [], []
        for (template, original, *_), order, named in zip(self.prompts, orders, names, strict=True):
            pieces, text, at = template.split("{}"), "", []
            for piece, letter in zip(pieces, order, strict=False):
                text += piece + named[letter]
                at.append(len(self.tokenizer(text)["input_ids"]) - 1)
            self.sentences.append(text + pieces[3])
            indirect, subject = (0, 1) if original == "ABB" else (1, 0)
            places.append({"IO": at[indirect], "S1": at[subject], "S1+1": at[subject] + 1, "S2": at[2]})
        rows = [self.tokenizer(sentence)["input_ids"] for sentence in self.sentences]
        self.max_len = max(map(len, rows))
        self.toks = torch.tensor([row + [0] * (self.max_len - len(row)) for row in rows])
        self.word_idx = {word: torch.tensor([place[word] for place in places]) for word in places[0]}
        self.word_idx["end"] = torch.tensor([len(row) - 1 for row in rows])
        self.io_tokenIDs, self.s_tokenIDs = (
            [self.tokenizer(" " + prompt[letter])["input_ids"][0] for prompt in self.prompts] for letter in (2, 3)
        )
        self.groups = [
            torch.tensor([n for n, prompt in enumerate(self.prompts) if prompt[0] == template])
            for template in TEMPLATES
        ]

    def gen_flipped_prompts(self, rule: str) -> IOIDataset:
        """The same prompts with the names in another order, or others: ``"ABB->XYZ, BAB->XYZ"``."""
        orders = dict(part.strip().split("->") for part in rule.split(","))
        draw = random.Random(self.seed + 1)
        flipped = IOIDataset(tokenizer=self.tokenizer, prompts=self.prompts, seed=self.seed)
        new = [
            {"A": a, "B": b}
            | dict(zip("CDXYZ", draw.sample([name for name in NAMES if name not in (a, b)], 5), strict=True))
            for *_, a, b in self.prompts
        ]
        flipped._lay_out([orders[order] for _, order, *_ in self.prompts], new)
        return flipped

    def __len__(self) -> int:
        return len(self.prompts)


def install(side: str, bridge: Any, cells: dict[str, Any]) -> None:
    """Put the stand-ins where the cells import them, and the two classes of old into the names of the cells."""
    import torch
    import transformers

    class HookedTransformer:
        """Boots a bridge: 12 layers by name, or as many as a config says."""

        def __new__(cls, cfg: Any) -> Any:
            model = transformers.AutoModelForCausalLM.from_pretrained("", n_layer=cfg.n_layers)
            booted = bridge.boot_transformers("", hf_model=model)
            booted.set_use_attn_result(cfg.use_attn_result)
            return booted

        @classmethod
        def from_pretrained(cls, name: str, **processing: Any) -> Any:
            booted = bridge.boot_transformers(name)
            booted.enable_compatibility_mode()
            return booted

    def log_probs(logits: Any, tokens: Any) -> Any:
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    def corner_is_dense(factored: Any, model: Any, layer: int, head: int) -> None:
        dense = model.W_E[:20] @ model.W_V[layer, head] @ model.W_O[layer, head] @ model.W_U[:, :20]
        torch.testing.assert_close(factored.get_corner(20), dense)

    def circuit_has_corner(find: Any, model: Any) -> None:
        assert find(model, 7, 4).get_corner(20).shape == (20, 20)

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Draws nothing, checks nothing."""

    root = "transformer_lens" if side == "peer" else "pellucid"
    checks = {"test_full_OV_circuit": corner_is_dense, "test_find_K_comp_full_circuit": circuit_has_corner}
    modules: dict[str, dict[str, Any]] = {
        "plotly_utils": {"__getattr__": lambda name: nothing},
        "gdown": {"download": nothing},
        "part1_transformer_from_scratch": {},
        "part1_transformer_from_scratch.solutions": {"get_log_probs": log_probs},
        "part2_intro_to_mech_interp": {},
        "part2_intro_to_mech_interp.tests": checks | {"__getattr__": lambda name: nothing},
        "tests": {"__getattr__": lambda name: nothing},
        "ioi_dataset": {"NAMES": NAMES, "IOIDataset": IOIDataset},
        "ioi_circuit_extraction": {"__getattr__": lambda name: cells[name]},
        f"{root}.components": {name: type(name, (), {}) for name in ("Embed", "Unembed", "LayerNorm", "MLP")},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        module.__path__ = []
        sys.modules[name] = module
    cells.update(HookedTransformer=HookedTransformer, HookedTransformerConfig=SimpleNamespace)
