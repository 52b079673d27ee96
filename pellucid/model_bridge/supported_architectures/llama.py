"""Llama and its kin: Llama 1 to 3, SmolLM2, TinyLlama, Vicuna; Mistral; Qwen2 and Qwen3.

Glossary: RMS norms; queries and keys rotated by position (``rotary``); several heads of queries may share one of keys and
values (``n_key_value_heads``); a gated MLP, ``down(silu(gate(x)) * up(x))``. Peculiar: Mistral's sliding window is in the
mask alone; Qwen2 has biases on q, k and v; Qwen3 norms each head's queries and keys before the rotation, and its ``d_head``
is not ``d_model / n_heads``.
"""

from __future__ import annotations

from dataclasses import replace

from pellucid.model_bridge.family import Attention, Family

LLAMA = Family(
    "llama", "Llama", notes="RMS norms, rotary positions, gated MLP; several queries may share a key/value head."
)
MISTRAL = replace(LLAMA, model_type="mistral", title="Mistral", notes="As Llama; the sliding window is in the mask.")
QWEN2 = replace(LLAMA, model_type="qwen2", title="Qwen2", notes="As Llama; q, k and v have biases.")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    title="Qwen3",
    attention=Attention(q_norm="q_norm", k_norm="k_norm"),
    notes="As Llama; each head's queries and keys are normed before the rotation.",
)
