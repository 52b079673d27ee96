"""A block that multiplies what each branch gives before it adds it to the stream: Granite's.

The products exist in no module, only in the block's own frame. Hugging Face's forward runs on a stand-in of the block whose
multiplier is ours: a tensor times it is the same product, shown to the hook point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.model_bridge.generalized_components.block import BlockBridge, Link
from pellucid.model_bridge.generalized_components.hf_code import Standing, rebound


class Factor:
    """A number that shows what a tensor times it is.

    Args:
        number: the number.
        show: one function a product, in the order in which products are made; each gives what goes on.
    """

    def __init__(self, number: float, show: Iterable[Callable[[Tensor], Tensor]]) -> None:
        self._number, self._show = number, iter(show)

    def __rmul__(self, value: Tensor) -> Tensor:
        product: Tensor = value * self._number
        return next(self._show)(product)


class MultipliedBlockBridge(BlockBridge):
    """Stands for a block that multiplies what attention gives, then what the MLP gives, and adds the products.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        submodules: see :class:`BlockBridge`.
        links: the same.
        gives_tuple: the same.
        multiplier: the attribute of Hugging Face's block that is the number.
    """

    def __init__(
        self,
        name: str | None,
        config: Any | None,
        submodules: Mapping[str, GeneralizedComponent],
        links: Iterable[Link],
        gives_tuple: bool,
        multiplier: str,
    ) -> None:
        super().__init__(name, config, submodules, links=links, gives_tuple=gives_tuple)
        self.multiplier = multiplier

    @property
    def factor(self) -> float:
        """See :attr:`BlockBridge.factor`."""
        number: float = vars(self.module)[self.multiplier]
        return number

    def original(self) -> Callable[..., Any]:
        """See :meth:`GeneralizedComponent.original`; on a stand-in while a product is looked at.

        Raises:
            UnsupportedModelError: the block has a forward of somebody else's, whose products cannot be reached.
        """
        original = super().original()
        sites = ("hook_attn_out", "hook_mlp_out")
        if not self.is_live(*sites):
            return original
        module, plain = self.module, getattr(original, "__func__", None)
        if plain is None or plain is not type(module).forward or getattr(original, "__self__", None) is not module:
            raise UnsupportedModelError(
                f"{self.path} has a forward that is not its class' own ({original!r}): what it adds to the stream cannot be "
                "reached. Take the wrapper off, or hook attn.hook_out and mlp.hook_out."
            )

        def on(block: Any) -> Standing:  # once a forward: a checkpointed block runs twice
            return Standing(block, {self.multiplier: Factor(self.factor, [partial(self.fire, site) for site in sites])})

        return partial(rebound(plain, {}, on), module)
