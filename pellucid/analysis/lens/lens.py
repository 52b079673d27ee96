"""A lens: what the model would say if the residual stream of an earlier layer were its last.

Every lens is the same sentence with another *translation* of the residual h into the terms of the last layer:

    lens(h) = head(final_norm(translate(h)))

==============  ==========================  =================================================================================
lens            translate(h)                where from
==============  ==========================  =================================================================================
logit lens      h                           nostalgebraist 2020
tuned lens      h + A h + b                 fitted to the model's own next-token distribution (Belrose et al. 2023)
Jacobian lens   J h                         the mean effect of h on the last residual (Gurnee et al. 2026)
==============  ==========================  =================================================================================

**Layers** are counted as ``start_at_layer`` counts them: layer k is the residual that enters block k, and layer ``n_layers``
the one that leaves the last block, which every lens leaves as it is: there the lens is the model's own output, to the bit.
Published Jacobian lenses count the outputs of blocks; their layer l is layer l + 1 here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

import pellucid
from pellucid.analysis.lens.readout import (
    RowStatistics,
    final_norm,
    frozen_logits,
    logits_of_residual,
    row_chunks,
    statistics_of,
)
from pellucid.arguments import check_choice, check_count, check_kind, check_list, check_mapping, check_wholes
from pellucid.dtypes import widened
from pellucid.errors import InputError, WeightError
from pellucid.experiments.labelled import Attribute
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import read_prompts
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.token_text import token_labels

Norm: TypeAlias = Literal["recomputed", "frozen"]
"""Whose scale the final norm divides by: that of the residual that is read, or that of the last one of its position."""

TokenChoice: TypeAlias = "str | int | Sequence[str | int]"


class Lens(ABC):
    """A lens on one model.

    Args:
        bridge: the model.

    Attributes:
        bridge: the model.
        made_by: what made it, for the results.
    """

    kind: ClassVar[str]

    def __init__(self, bridge: TransformerBridge, made_by: Mapping[str, Attribute] | None = None) -> None:
        self.bridge = check_kind("bridge", bridge, TransformerBridge, "a bridge")
        self.made_by: dict[str, Attribute] = dict(
            check_mapping("made_by", made_by or {}, "words to numbers and strings")
        )
        self._weights_were = str(bridge.weights_state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers {self.layers[0]} to {self.layers[-1]}, d_model {self.bridge.cfg.d_model})"

    # -- what a kind of lens is ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """Layers that it can read, the last one (``n_layers``) among them."""

    @abstractmethod
    def translate(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """The residual of a layer in the terms of the last: ``[..., d_model]`` to the same shape and dtype."""

    @abstractmethod
    def translate_back(self, direction: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """A direction of the last residual ``[..., d_model]`` in the terms of a layer: the transpose of the linear part."""

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the lens to a safetensors file; equal lenses, equal bytes.

        Args:
            path: the file; one of that name is replaced.
            dtype: of the matrices, ``torch.float16`` for half the size; by default as they are.

        Raises:
            InputError: a lens that holds nothing; no path; a number that ``dtype`` cannot hold.
            StorageFullError: no space is left.
        """
        raise InputError(
            "The logit lens holds nothing but the model: there is nothing to save. LogitLens(bridge) is it."
        )

    # -- reading ---------------------------------------------------------------------------------------------------------

    def logits(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_vocab"]:
        """What the lens says of a residual.

        Args:
            residual: ``[..., d_model]``, of the model's dtype, of that layer.
            layer: see :mod:`pellucid.analysis.lens.lens`.

        Returns:
            ``[..., d_vocab]``; of the residual that leaves the last block the logits of the run, to the bit.

        Raises:
            InputError: a layer that the lens does not have, another width or dtype.
            WeightError: the weights were processed since the lens was made.
        """
        self._refuse_changed()
        self._check_layer(layer)
        cfg = self.bridge.cfg
        check_kind("residual", residual, Tensor, f"a tensor [..., {cfg.d_model}]")
        if residual.shape[-1:] != (cfg.d_model,) or residual.dtype != cfg.dtype:
            raise InputError(
                f"residual is [..., {cfg.d_model}] in {cfg.dtype}; found {list(residual.shape)} in {residual.dtype}."
            )
        return logits_of_residual(self.bridge, self._translated(residual, layer))

    def read(
        self,
        prompt: TextOrTokens,
        *,
        layers: Sequence[int] | None = None,
        positions: int | Sequence[int] | None = -1,
        tokens: TokenChoice = (),
        top_k: int = 5,
        norm: Norm = "recomputed",
        prepend_bos: bool | None = None,
    ) -> xr.Dataset:
        """What the model would say after each layer of one prompt.

        One run, and the head on the residuals that are read: at one position all layers together cost less than a forward
        (BLOOM-560M's shape, 64 tokens: 0.15 of one). At all positions the head runs once a layer, and is much of a model
        with a large vocabulary (SmolLM2's shape: 11 forwards).

        Args:
            prompt: a string, or token ids ``[pos]`` or ``[1, pos]``.
            layers: which, by default all that the lens has; negative ones count from the end.
            positions: which, by default the last; ``None`` for all. Negative ones count from the end.
            tokens: tokens to follow through the layers, as strings that are one token (a word has its leading space) or ids.
            top_k: how many of the most probable tokens to keep.
            norm: ``"frozen"`` divides by the scale that the final norm has in the run, so that the logits of two layers
                differ by what the blocks between them wrote; equal to ``"recomputed"`` at the last layer up to rounding.
            prepend_bos: see :meth:`TransformerBridge.to_tokens`.

        Returns:
            by ``layer`` and ``pos``: ``top_id``, ``top_token``, ``top_logit`` and ``top_probability`` (``rank_of_top``);
            ``entropy`` and ``kl``, KL(the run's distribution || this), in nats; for ``tokens`` their ``logit``,
            ``probability`` and ``rank``, the number of tokens with a larger logit.

        Raises:
            InputError: several prompts, no such layer, position or token; a model in training mode.
            WeightError: the weights were processed since the lens was made.
        """
        check_choice("norm", norm, ("recomputed", "frozen"))
        self._refuse_changed()
        self.bridge.runner.refuse_training()
        bridge, chosen = self.bridge, self._chosen_layers(layers)
        check_count("top_k", top_k, 1, bridge.cfg.d_vocab)
        ids = self._token_ids(tokens)
        one = prompt[None] if isinstance(prompt, Tensor) and prompt.dim() == 1 else prompt
        prompts = read_prompts(bridge, one, SweepOptions(prepend_bos=prepend_bos))
        if prompts.n_rows != 1:
            raise InputError(f"read takes one prompt; found {prompts.n_rows}. Read them one after another.")
        columns = _columns(positions, prompts.length)
        residuals, final, scale = self._run(prompts.input()[0], chosen, columns, norm)
        found = self._statistics(residuals, final, scale, torch.tensor(ids, dtype=torch.int64), top_k)
        return self._labelled(found, chosen, columns, ids, prompts.labels[0], prompts.text()[0], norm)

    def _run(
        self, tokens: Tensor, layers: Sequence[int], columns: Sequence[int], norm: Norm
    ) -> tuple[dict[int, Tensor], Tensor, Tensor | None]:
        """By layer ``[pos, d_model]``, the run's logits ``[pos, d_vocab]`` and, if asked for, the final norm's scale."""
        last = self.bridge.cfg.n_layers
        # The last layer is the run's own logits; a frozen norm still reads its residual.
        names = {layer: point_of(layer) for layer in layers if layer < last or norm == "frozen"}
        asked = [*names.values(), *(["ln_final.hook_scale"] if norm == "frozen" else [])]
        with torch.no_grad():
            if asked:
                logits, cache = self.bridge.run_with_cache(tokens, names_filter=asked, pos_slice=list(columns))
            else:
                logits, cache = self.bridge(tokens), {}
        scale = cache["ln_final.hook_scale"][0] if norm == "frozen" else None
        return {layer: cache[name][0] for layer, name in names.items()}, logits[0, list(columns)], scale

    @torch.no_grad()
    def _statistics(
        self, residuals: Mapping[int, Tensor], final: Tensor, scale: Tensor | None, tokens: Tensor, top_k: int
    ) -> RowStatistics:
        """Of each layer in order, each position: rows of several layers go through the head together."""
        log_final, d_vocab = widened(final).log_softmax(-1), final.shape[-1]
        n_pos, tokens = len(final), tokens.to(final.device)
        parts = []
        if residuals:
            translated = torch.cat([self._translated(residual, layer) for layer, residual in residuals.items()])
            where = torch.arange(len(translated), device=final.device) % n_pos
            for rows in row_chunks(len(translated), d_vocab):
                chunk, at = translated[rows], where[rows]
                logits = (
                    logits_of_residual(self.bridge, chunk)
                    if scale is None
                    else frozen_logits(self.bridge, chunk, scale[at])
                )
                parts.append(statistics_of(logits.to(final.device), log_final[at], tokens, top_k))
        if self.bridge.cfg.n_layers not in residuals:
            parts.append(statistics_of(final, log_final, tokens, top_k))
        return RowStatistics.joined(parts)

    def _labelled(
        self,
        found: RowStatistics,
        layers: Sequence[int],
        columns: Sequence[int],
        ids: Sequence[int],
        labels: Sequence[str],
        text: str,
        norm: Norm,
    ) -> xr.Dataset:
        # Rows of the last layer are always there, and last; it may not have been asked for.
        shape = (len(found.kl) // len(columns), len(columns))
        arrays = {
            name: value.cpu().reshape(*shape, *value.shape[1:]).numpy()[: len(layers)]
            for name, value in vars(found).items()
        }
        place, best, followed = ("layer", "pos"), ("layer", "pos", "top"), ("layer", "pos", "token")
        made = {
            "top_id": (best, arrays["top"], {}),
            "top_token": (best, self._texts(arrays["top"]), {}),
            "top_logit": (best, arrays["top_logit"], {"units": "logits"}),
            "top_probability": (best, arrays["top_probability"], {"units": "1"}),
            "entropy": (place, arrays["entropy"], {"units": "nats"}),
            "kl": (place, arrays["kl"], {"units": "nats", "long_name": "KL(the run || the lens)"}),
        }
        if ids:
            made |= {
                "logit": (followed, arrays["logit"], {"units": "logits"}),
                "probability": (followed, arrays["probability"], {"units": "1"}),
                "rank": (followed, arrays["rank"], {"units": "tokens with a larger logit"}),
            }
        coords: dict[str, Any] = {
            "layer": list(layers),
            "pos": list(columns),
            "text": ("pos", [labels[column] for column in columns]),
            "top": list(range(arrays["top"].shape[-1])),
        }
        if ids:
            coords |= {"token": list(ids), "token_text": ("token", self._texts(ids))}
        about: dict[str, Attribute] = {
            "analysis": f"{self.kind} lens",
            "pellucid": pellucid.__version__,
            "model": self.bridge.cfg.model_name,
            "dtype": str(self.bridge.dtype).removeprefix("torch."),
            "attn_implementation": self.bridge.attn_implementation,
            "prompt": text,
            "norm": norm,
            "points": [point_of(layer) for layer in layers],
        }
        return xr.Dataset(made, coords, about | self.made_by)

    def _texts(self, ids: Any) -> Any:
        """Labels of ids, in their shape."""
        given, tokenizer = np.asarray(ids), self.bridge.tokenizer
        known, where = np.unique(given, return_inverse=True)
        names = [str(each) for each in known] if tokenizer is None else token_labels(tokenizer, known.tolist())
        return np.array(names, dtype=object)[where].reshape(given.shape)

    # -- steering --------------------------------------------------------------------------------------------------------

    def steer(self, token: str | int, layer: int) -> Float[Tensor, " d_model"]:
        """The direction of the stream at a layer that the lens reads as a token: adding it raises the token's logit.

        It is the gradient of what the head says of the token (before a cap), times the final norm's scale:
        ``M^T C (g * W_U[:, token])``, with M the linear part of the translation, g the norm's gain, and C taking out the
        mean where the norm does.

        Args:
            token: a string that is one token, or an id.
            layer: see :mod:`pellucid.analysis.lens.lens`; add the direction at :func:`point_of` that layer.

        Returns:
            ``[d_model]``, in float32 at least, on the model's device; not normalised.

        Raises:
            InputError: no such token or layer.
            WeightError: the weights were processed since the lens was made.
        """
        self._refuse_changed()
        self._check_layer(layer)
        (token_id,) = self._token_ids([token])
        head: Any = self.bridge.unembed
        unembedding: Tensor = widened(head.W_U[:, token_id].detach())
        direction = (unembedding * final_norm(self.bridge).gain().to(unembedding.device)).to(unembedding.dtype)
        if self.bridge.adapter.family.norm.centres:
            direction = direction - direction.mean()
        return direction if layer == self.bridge.cfg.n_layers else self.translate_back(direction, layer)

    # -- checks ----------------------------------------------------------------------------------------------------------

    def _translated(self, residual: Tensor, layer: int) -> Tensor:
        return residual if layer == self.bridge.cfg.n_layers else self.translate(residual, layer)

    def _check_layer(self, layer: Any) -> int:
        if layer not in self.layers:
            raise InputError(f"The {self.kind} lens has the layers {_shown(self.layers)}; found layer {layer!r}.")
        return int(layer)

    def _chosen_layers(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return self.layers
        last = self.bridge.cfg.n_layers
        asked = check_wholes("layers", layers, -last - 1)
        chosen = [self._check_layer(layer if layer >= 0 else layer + last + 1) for layer in asked]
        if len(set(chosen)) < len(chosen):
            raise InputError(f"A layer stands twice in layers={list(layers)}.")
        return sorted(chosen)

    def _token_ids(self, tokens: TokenChoice) -> list[int]:
        bridge = self.bridge
        given = [tokens] if isinstance(tokens, str | int) else check_list("tokens", tokens, "tokens", empty=True)
        ids = []
        for token in given:
            if isinstance(token, str):
                ids.append(bridge.to_single_token(token))
            else:
                ids.append(check_count("a token's id", token, 0, bridge.cfg.d_vocab - 1))
        return ids

    def _refuse_changed(self) -> None:
        now = str(self.bridge.weights_state)
        if now != self._weights_were:
            raise WeightError(
                f"The model's weights were processed, or put back, since this {self.kind} lens was made: the terms of the "
                "residual stream are other ones. Put them back, or make the lens again."
            )


class LogitLens(Lens):
    """The logit lens: the residual of every layer read as if it were the last.

    Args:
        bridge: the model.
    """

    kind = "logit"

    def __init__(self, bridge: TransformerBridge) -> None:
        super().__init__(bridge)

    @property
    def layers(self) -> list[int]:
        """All."""
        return list(range(self.bridge.cfg.n_layers + 1))

    def translate(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """The residual as it is."""
        return residual

    def translate_back(self, direction: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """The direction as it is."""
        return direction


def point_of(layer: int) -> str:
    """The hook point of a layer's residual: what enters the first block, or leaves the block before."""
    check_count("layer", layer, 0)
    return "blocks.0.hook_resid_pre" if layer == 0 else f"blocks.{layer - 1}.hook_resid_post"


def _columns(positions: int | Sequence[int] | None, length: int) -> list[int]:
    if positions is None:
        return list(range(length))
    given = [positions] if isinstance(positions, int) and not isinstance(positions, bool) else positions
    asked = check_wholes("positions", given, -length)
    beyond = [column for column in asked if column >= length]
    if beyond:
        raise InputError(f"The prompt has the positions 0 to {length - 1}; found {beyond[0]}.")
    columns = [column % length for column in asked]
    if len(set(columns)) < len(columns):
        raise InputError(f"A position stands twice in positions={given}.")
    return columns


def _shown(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
