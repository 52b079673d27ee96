"""Every hook point a second time, with nothing but Hugging Face's modules and torch's own hooks.

This is the oracle that the self-check and the tests hold the bridge against. It shares no code with the components: an
edit is made by a forward hook on the module whose input or output the tensor is, or, for what Hugging Face computes
inside one function, by standing between the model and the torch function it calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.overrides import TorchFunctionMode

from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.reference_edits.bloom import install_bloom
from pellucid.model_bridge.reference_edits.decoder import DecoderEdits
from pellucid.model_bridge.reference_edits.tools import Edit
from pellucid.names import HookSpec

REBUILT = frozenset(
    "hook_scale hook_normalized hook_result hook_attn_in hook_q_input hook_k_input hook_v_input".split()
)
"""Sites that Hugging Face does not compute: an edit there agrees up to rounding, not to the bit."""


@contextmanager
def reference_edit(model: nn.Module, spec: HookSpec, edit: Edit, adapter: ArchitectureAdapter) -> Iterator[None]:
    """Make one edit on a bare Hugging Face model for the length of a block.

    Args:
        model: the model, unhooked by us.
        spec: the hook point whose tensor is edited.
        edit: the edit.
        adapter: what says which family the model is of, and its sizes.

    Raises:
        NoReferenceError: nobody has written what an edit there is.
    """
    if adapter.family.block.adds_residual:
        handles = install_bloom(model, spec, edit)
    else:
        handles = DecoderEdits(model, adapter.family, adapter.cfg).install(spec, edit)
    with ExitStack() as stack:
        for handle in handles:
            if isinstance(handle, TorchFunctionMode):
                stack.enter_context(handle)
            else:
                stack.callback(handle.remove)
        yield
