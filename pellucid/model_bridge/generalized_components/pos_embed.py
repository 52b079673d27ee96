"""The position embedding: a table that is looked up by position."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter
from pellucid.run_context import current_run, current_span


class PosEmbedBridge(GeneralizedComponent):
    """Stands for a table of positions (``wpe``)."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def W_pos(self) -> Tensor:
        """``[n_ctx, d_model]``, the model's own parameter."""
        return readable_parameter(self.module, "weight", self.path)

    def forward(self, input: Tensor) -> Tensor:
        """Positions ``[1 or batch, pos]`` to ``[1 or batch, pos, d_model]``.

        Hugging Face looks positions up once where all rows have the same; a function sees every row's.
        """
        output: Tensor = self.original()(input)
        if current_span().start is not None or not self.is_live("hook_out"):
            return output  # a run that is given the residual of a block adds no positions to it
        run = current_run()
        if run is not None and output.shape[0] != run.batch:
            output = output.expand(run.batch, -1, -1).contiguous()
        return self.fire("hook_out", output)
