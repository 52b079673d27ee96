"""The embedded model: a small trained BLOOM, and what can be shown on it. Offline and in seconds. Beside it, SmolLM2.

``pellucid/demo/model`` is an ordinary Hugging Face folder; its ``README.md`` says what it was trained on and what may be
relied on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pellucid.demo.smollm2 import load_smollm2 as load_smollm2
from pellucid.model_bridge.transformer_bridge import TransformerBridge

MODEL_FOLDER = Path(__file__).parent / "model"
"""Configuration, float16 weights and tokenizer."""

LENSES_FOLDER = Path(__file__).parent / "lenses"
"""A tuned and a Jacobian lens of it, fitted by ``scripts/fit_demo_lenses.py``."""


def load_demo_bridge(dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> TransformerBridge:
    """The embedded model, bridged; in float32 unless told otherwise, as its figures were measured."""
    return TransformerBridge.boot_transformers(MODEL_FOLDER, dtype=dtype, device=device)
