"""The position embedding: a table that is looked up by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter
from pellucid.model_bridge.generalized_components.hf_arguments import forward_parameters
from pellucid.run_context import current_run, current_span


class PosEmbedBridge(GeneralizedComponent):
    """Stands for a table of positions (``wpe``)."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def W_pos(self) -> Tensor:
        """``[n_ctx, d_model]``, the model's own parameter, from the row of position 0 on (OPT's table has two before it)."""
        table, first = readable_parameter(self.module, "weight", self.path), getattr(self.module, "offset", 0)
        return table[first:] if first else table

    def positions_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The positions among the arguments of one call, ``[1 or batch, pos]``: OPT's table is given a mask beside them."""
        positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[0]
        return positions

    def at(self, positions: Tensor) -> Tensor:
        """What the module gives for positions ``[row, pos]``: ``[row, pos, d_model]``."""
        named = {"position_ids": positions} if "position_ids" in forward_parameters(type(self.module)) else {}
        output: Tensor = self.module(positions, **named)
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hugging Face's arguments, positions ``[1 or batch, pos]`` among them, to ``[1 or batch, pos, d_model]``.

        Hugging Face looks positions up once where all rows have the same; a function sees every row's.
        """
        output: Tensor = self.original()(*args, **kwargs)
        if current_span().start is not None or not self.is_live("hook_out"):
            return output  # a run that is given the residual of a block adds no positions to it
        run = current_run()
        if run is not None and output.shape[0] != run.batch:
            output = output.expand(run.batch, -1, -1).contiguous()
        return self.fire("hook_out", output)
