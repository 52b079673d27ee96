"""SmolLM3: Llama, some of whose layers know no positions.

Glossary: see Llama. Peculiar: every fourth layer (``no_rope_layers``) does not rotate its queries and keys; there
``hook_rot_q`` and ``hook_rot_k`` hold what goes into attention and the cache all the same, which is ``hook_q`` and
``hook_k`` to the bit.
"""

from __future__ import annotations

from dataclasses import replace

from pellucid.model_bridge.supported_architectures.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    title="SmolLM3",
    notes="As Llama; some layers do not rotate queries and keys, and their hook_rot_q and hook_rot_k are hook_q and hook_k.",
)
