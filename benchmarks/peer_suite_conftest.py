"""Fixtures for TransformerLens' own tests on either side: ``peer_suite.py`` puts this in the place of its conftest files.

Whatever model is asked for by name is a tiny random BLOOM of the same numbers of layers and heads, with the tokenizer of
Pellucid's embedded model. How a model is made is lent on our side (``boot_native``, ``build_bridge_from_module``): the tests
are of what is done with it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

OURS = os.environ["PEER_SIDE"] == "ours"
SECONDS = 30
SIZES = {"distilgpt2": (6, 12), "gpt2": (12, 12), "openai-community/gpt2": (12, 12)}
"""Layers and heads by name; 4 and 4 of any other."""
TOKENIZER = Path(importlib.util.find_spec("pellucid").origin).parent / "demo" / "model"  # type: ignore[union-attr,arg-type]
OUTCOMES: dict[str, str] = {}
LENT = ("sources", "sources._bridge_builder", "sources.transformers", "sources.native")


class Renamed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """``pellucid.X`` for ``transformer_lens.X``, and a module of its own for how models are made."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """A spec for every module below the root."""
        if name != "transformer_lens" and not name.startswith("transformer_lens."):
            return None
        if self._lent(name):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        if importlib.util.find_spec("pellucid" + name.removeprefix("transformer_lens")) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    @staticmethod
    def _lent(name: str) -> bool:
        return name.removeprefix("transformer_lens.model_bridge.") in LENT

    def create_module(self, spec: Any) -> ModuleType:
        """The module of ours, the very same."""
        if self._lent(spec.name):
            made = ModuleType(spec.name)
            made.build_bridge_from_module = build  # type: ignore[attr-defined]
            return made
        return importlib.import_module("pellucid" + spec.name.removeprefix("transformer_lens"))

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


if OURS:
    sys.meta_path.insert(0, Renamed())


def tiny(layers: int = 4, heads: int = 4, d_model: int | None = None, vocab: int | None = None, **more: Any) -> Any:
    """The same weights for the same sizes, gains and biases random."""
    settings = {"seq_length": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3} | more
    config = BloomConfig(
        n_layer=layers, n_head=heads, hidden_size=d_model or 8 * heads, vocab_size=vocab or 2048, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BloomForCausalLM._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def named(name: Any) -> Any:
    """A model that a test asks for by name."""
    return tiny(*SIZES.get(str(name), (4, 4)))


REAL_TOKENIZER = AutoTokenizer.from_pretrained


def tokenizer_of(name: Any, *args: Any, **kwargs: Any) -> Any:
    """The embedded model's, for every name."""
    found = str(name) if os.path.isdir(str(name)) else str(TOKENIZER)
    return REAL_TOKENIZER(found, *args, **kwargs)


def build(model: Any, architecture: str = "", hf_config: Any = None, tokenizer: Any = None, **more: Any) -> Any:
    """A bridge of ours around a live model."""
    from pellucid import TransformerBridge

    return TransformerBridge(model, tokenizer)


def from_config(cls: Any, config: Any = None, **more: Any) -> Any:
    """A BLOOM of a configuration's sizes, for ``boot_native`` on our side."""
    return cls(tiny(config.n_layers, config.n_heads, config.d_model, config.d_vocab))


def lend() -> None:
    """Replace what fetches from the hub, on either side."""
    AutoTokenizer.from_pretrained = tokenizer_of
    for cls in (AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        cls.from_pretrained = classmethod(lambda c, name, *args, **kwargs: named(name))
    from transformer_lens.model_bridge import TransformerBridge

    real = TransformerBridge.boot_transformers

    def boot(cls: Any, model_name: Any = "", *args: Any, hf_model: Any = None, **kwargs: Any) -> Any:
        model = named(model_name) if hf_model is None else hf_model
        tokenizer = kwargs.get("tokenizer") or tokenizer_of(TOKENIZER)
        if OURS:
            return cls(model.to(kwargs["dtype"]) if kwargs.get("dtype") else model, tokenizer)
        kept = {key: value for key, value in kwargs.items() if key in ("dtype", "device")} | {"device": "cpu"}
        return real("bloom", hf_model=model, tokenizer=tokenizer, **kept)

    TransformerBridge.boot_transformers = classmethod(boot)
    if OURS:
        TransformerBridge.boot_native = classmethod(from_config)


lend()


# -- outcomes ----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    """A test has its seconds."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the outcome: of the call, or what came before or after it and failed."""
    if report.when == "call" or report.outcome != "passed":
        said = "" if report.outcome != "failed" else str(report.longrepr).strip().splitlines()[-1][:160]
        OUTCOMES[report.nodeid] = report.outcome if not said else f"failed ({said})"


def pytest_sessionfinish() -> None:
    """Write them."""
    Path(os.environ["PEER_REPORT"]).write_text(json.dumps(OUTCOMES, indent=1), "utf-8")


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


def booted(name: str, compat: bool | None) -> Any:
    """A bridge of a named model; ``compat`` says whether its weights are processed too, ``None`` for neither."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(name)
    if compat is not None:
        bridge.enable_compatibility_mode(no_processing=not compat)
    return bridge


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Any:
    return tokenizer_of("gpt2")


@pytest.fixture(scope="session")
def gpt2_bridge() -> Any:
    return booted("gpt2", None)


@pytest.fixture(scope="session")
def gpt2_bridge_compat() -> Any:
    return booted("gpt2", True)


@pytest.fixture(scope="session")
def gpt2_bridge_compat_no_processing() -> Any:
    return booted("gpt2", False)


@pytest.fixture(scope="session")
def distilgpt2_bridge() -> Any:
    return booted("distilgpt2", None)


@pytest.fixture(scope="session")
def distilgpt2_bridge_compat() -> Any:
    return booted("distilgpt2", True)


@pytest.fixture(scope="session")
def distilgpt2_bridge_compat_no_processing() -> Any:
    return booted("distilgpt2", False)


@pytest.fixture
def sample_tokens(request: Any, bridge: Any) -> Any:
    length = getattr(request.module, "SAMPLE_TOKENS_LEN", 8)
    return torch.randint(0, bridge.cfg.d_vocab - 10, (1, length))


@pytest.fixture
def temp_dir() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
