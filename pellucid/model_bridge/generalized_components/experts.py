"""A mixture of experts: a router chooses for each token the experts that it goes through, and weighs what they give.

Hugging Face computes all of it. Points are what enters the whole, the router's logits, and what the whole adds. The inside
of an expert is no point: it sees the tokens that chose it, in an order of its own, and no axis of it is a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import UnsupportedModelError, WeightError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site
from pellucid.model_bridge.generalized_components.hf_code import Standing, rebound
from pellucid.model_bridge.generalized_components.mlp_weights import MLPWeights, Part
from pellucid.model_bridge.generalized_components.weight_writes import WeightTargets
from pellucid.run_context import current_run

PROJECTION = "linear"
"""The one function with which a router of Hugging Face's makes its logits; softmax and choice follow."""


class RouterBridge(GeneralizedComponent):
    """Stands for a router, whose forward runs as Hugging Face wrote it: it goes on from the logits that a function leaves.

    What it gives are logits, weights and choice together, and of these only the last two are used: an edit of its output
    would do nothing. So the logits are taken inside, where they are made.
    """

    hook_out = Site("router logits, ``[batch, pos, n_experts]``")

    def __init__(self, name: str | None, config: Any | None = None) -> None:
        super().__init__(name, config)
        self._bound: tuple[Any, Any, Callable[..., Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bound": None}  # what is bound to this component's point is none of a copy's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        original = self.original()
        if not self.is_live("hook_out"):
            return original(*args, **kwargs)
        return self._with_our_projection(original)(*args, **kwargs)

    def _with_our_projection(self, original: Callable[..., Any]) -> Callable[..., Any]:
        module: nn.Module = self.module
        plain = getattr(original, "__func__", None)
        known = self._bound
        if known is not None and known[0] is module and known[1] is plain:
            return known[2]
        if plain is not type(module).forward or getattr(original, "__self__", None) is not module:
            raise UnsupportedModelError(
                f"{self.path} has a forward that is not its class' own ({original!r}): its logits cannot be reached. Take "
                "the wrapper off, or hook points outside it."
            )
        functional = Standing(F, {PROJECTION: self._projected})
        names = {"F": functional, "nn": Standing(nn, {"functional": functional})}
        made = partial(rebound(plain, names), module)
        self._bound = (module, plain, made)
        return made

    def _projected(self, *args: Any, **kwargs: Any) -> Tensor:
        """``F.linear`` of ``[batch * pos, d_model]``, shown by row and position."""
        logits = F.linear(*args, **kwargs)
        run = current_run()
        seen = logits if logits.dim() == 3 else logits.unflatten(0, (1 if run is None else run.batch, -1))
        edited = self.fire("hook_out", seen)
        # With gradients on, what a function saw has to be on the way, or its backward hook is not.
        if edited is seen and not logits.requires_grad:
            return logits
        return edited if logits.dim() == 3 else edited.flatten(0, 1)


class ExpertsBridge(MLPWeights):
    """Stands for the module that holds router and experts.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        submodules: ``router``.
        input_is_stream: whether it is given the residual stream itself, so that an edit of it is written into the stream.
    """

    runs_original = True

    hook_router_logits = Site("router logits, ``[batch, pos, n_experts]``")

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        input_is_stream: bool = False,
    ) -> None:
        super().__init__(name, config, submodules)
        self.input_is_stream = input_is_stream
        self.link("hook_router_logits", self._child("router"), "hook_out")
        self.link("hook_out", self, "hook_mlp_out")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        original = self.original()
        if self.input_is_stream:
            self.fire_into("hook_in", hidden_states)
        else:
            hidden_states = self.fire("hook_in", hidden_states)
        output = original(hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.fire("hook_mlp_out", output[0]), *output[1:])
        return self.fire("hook_mlp_out", output)

    def weight_targets(self) -> dict[str, WeightTargets]:
        """None: what a step of processing would write to is in every expert."""
        return {}

    def _weight(self, part: Part) -> Tensor:
        self._refuse(f"W_{part}")

    def _bias(self, part: Part) -> Tensor:
        self._refuse(f"b_{part}")

    def _refuse(self, what: str) -> NoReturn:
        raise WeightError(
            f"{self.path} is a mixture of experts, and has no {what} of its own: each expert has weights, all in one "
            f"tensor. Read them from Hugging Face's module, bridge.hf_model.get_submodule({self.path!r})."
        )
