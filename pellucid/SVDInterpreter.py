"""Singular vectors of heads' OV circuits and of MLP weights, read in the vocabulary: TransformerLens' ``SVDInterpreter``.

Millidge and Black (2022). The sign of a singular vector is arbitrary, and those of equal singular values are any basis.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_kind
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.factored_matrix import FactoredMatrix
from pellucid.model_bridge.transformer_bridge import TransformerBridge


class SVDInterpreter:
    """The singular vectors of one model.

    Args:
        model: a bridge. The weights are read once, now.
    """

    def __init__(self, model: Any) -> None:
        check_kind("model", model, TransformerBridge, "a bridge")
        self.model, self.cfg = model, model.cfg
        self.params: dict[str, Tensor] = dict(model.tl_parameters())
        self._stream = model.stream

    def __repr__(self) -> str:
        return f"SVDInterpreter({self.cfg.n_layers} layers, {self.cfg.n_heads} heads)"

    @torch.no_grad()
    def get_singular_vectors(
        self,
        vector_type: Literal["OV", "w_in", "w_out"],
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Tensor:
        """``[d_vocab, 1, num_vectors]``: what the first singular vectors on the stream's side write to each token's logit.

        Args:
            vector_type: of which matrix: a head's ``"OV"`` (what it writes), ``"w_in"`` (what neurons read, with the norm's
                gain where it is not folded) or ``"w_out"`` (what they write).
            layer_index: the block.
            num_vectors: how many.
            head_index: the head, for ``"OV"``.

        Raises:
            InputError: an argument out of range; a head that is missing, or given beside an MLP's weights.
        """
        check_choice("vector_type", vector_type, ("OV", "w_in", "w_out"))
        block = f"blocks.{check_count('layer_index', layer_index, 0, self.cfg.n_layers - 1)}"
        check_count("num_vectors", num_vectors, at_most=self.cfg.d_head if vector_type == "OV" else self.cfg.d_model)
        if vector_type != "OV" and head_index is not None:
            raise InputError(
                f"head_index={head_index} would have no effect: {vector_type!r} is of an MLP, not of a head."
            )
        if vector_type == "OV":
            if head_index is None:
                raise InputError("head_index is needed for 'OV': the circuit is a head's.")
            head = check_count("head_index", head_index, 0, self.cfg.n_heads - 1)
            values = self.params[f"{block}.attn.W_V"]
            value = values[head // (self.cfg.n_heads // len(values))]  # several heads may share one of values
            directions = FactoredMatrix(value, self.params[f"{block}.attn.W_O"][head]).V.T
        else:
            matrix = self.params[f"{block}.mlp.{'W_in' if vector_type == 'w_in' else 'W_out'}"]
            if vector_type == "w_in":
                matrix = matrix.T
                # Of a block with one norm, the MLP reads that one; none comes before an MLP whose norm follows it.
                reader = self._stream.norm(f"{block}.ln2")
                if reader is None and self.cfg.parallel_attn_mlp:
                    reader = self._stream.norm(f"{block}.ln1")
                if reader is not None and reader.gain is not None:
                    matrix = matrix * reader.gain.to(matrix)
            directions = torch.linalg.svd(widened(matrix), full_matrices=False).Vh
        unembedding = self.params["unembed.W_U"].to(directions.dtype)
        return (unembedding.T @ directions[:num_vectors].T).unsqueeze(1)
