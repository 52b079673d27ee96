"""The whole model: which ``generate`` a forward belongs to, and which positions its unembedding is given.

One component stands for ``generate``, so that hooks know prompts and steps whoever calls it; the other for the forward,
which alone is told ``logits_to_keep``, and whose output has the logits where Hugging Face caps or scales what the head
gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor

from pellucid.generation_run import GenerationRun
from pellucid.hook_points import LensHandle
from pellucid.model_bridge.generalized_components.backbone import refuse_unfired
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site
from pellucid.model_bridge.generalized_components.hf_arguments import by_name, given_cache
from pellucid.model_bridge.generalized_components.hooks_apart import StreamerApart, called_with_hooks_apart
from pellucid.run_context import (
    ModelForward,
    acts,
    in_own_context,
    set_forward,
    set_generation,
    set_run,
    take_finished,
)


class CausalLMBridge(GeneralizedComponent):
    """Stands for the forward of a causal language model (``BloomForCausalLM``) while anything in it is hooked.

    What the forward leaves in context variables (the run that the unembedding is part of) ends with it.

    Attributes:
        head_handles: the functions on the unembedding and on the logits; the bridge gives it.
        backbone_path: of the backbone in the model; the bridge gives it.
    """

    hook_logits = Site("logits, capped or scaled, ``[batch, pos, d_vocab]``")

    head_handles: Callable[[], list[LensHandle]]
    backbone_path: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        head = [handle for handle in self.head_handles() if acts(handle.scope)]
        kept = by_name(self.module, args, kwargs).get("logits_to_keep", 0)
        call = partial(self.original(), *args, **kwargs)
        return in_own_context(self._run, ModelForward(kept), head, call)

    def _run(self, forward: ModelForward, head: Sequence[LensHandle], call: Callable[[], Any]) -> Any:
        set_forward(forward)
        output = called_with_hooks_apart(call, attrgetter(self.backbone_path)(self.module))
        run = forward.run
        if self.is_live("hook_logits"):
            output = self._with_logits(output)
        if run is not None:
            refuse_unfired(head, run)
        return output

    def _with_logits(self, output: Any) -> Any:
        """Hugging Face's output, its logits those that hooks leave."""
        set_run(take_finished())
        if isinstance(output, tuple):
            return (self.fire("hook_logits", output[0]), *output[1:])
        output.logits = self.fire("hook_logits", output.logits)
        return output


class GenerateBridge(GeneralizedComponent):
    """Stands for the ``generate`` of a causal language model while anything in it is hooked."""

    slot: ClassVar[str] = "generate"

    def forward(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        given: Tensor | None = embeds if embeds is not None else ids
        # A mask covers the positions of a cache that is continued, which the ids may leave out.
        covers = mask if mask is not None and mask.dim() == 2 else given
        config = args[0] if args else kwargs.get("generation_config")
        scales = [kwargs.get("guidance_scale")]
        scales += [each.guidance_scale for each in (config, self.module.generation_config) if each is not None]
        run = GenerationRun(
            root=self.module,
            n_prompts=1 if given is None else given.shape[0],  # without a prompt Hugging Face makes one of one token
            prompt_length=1 if covers is None else covers.shape[1],
            continues=given_cache(kwargs) is not None,
            guided=next((scale for scale in scales if scale is not None), 1) != 1,
            prompt_mask=mask if mask is not None and mask.dim() == 2 else None,
        )
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = StreamerApart(kwargs["streamer"])
        return in_own_context(self._run, run, partial(self.original(), inputs, *args, **kwargs))

    def _run(self, run: GenerationRun, call: Callable[[], Any]) -> Any:
        set_generation(run)
        return called_with_hooks_apart(call, self.module)
