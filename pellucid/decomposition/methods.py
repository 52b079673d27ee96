"""TransformerLens' words for decompositions, as methods of a cache; the arithmetic is in the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pellucid.decomposition import logits, parts, readout, residual
from pellucid.decomposition.readout import LensResult, Quantity
from pellucid.decomposition.stream import CachedRun, end_of, model_of
from pellucid.errors import InputError, warn
from pellucid.slices import Slice, SliceInput

Labelled = tuple[Float[Tensor, "row ..."], list[str]]


class DecompositionMethods:
    """The residual stream of a cached run in parts.

    A stack is ``[row, batch, pos, d_model]``: without ``batch`` where the cache has none, and without ``pos`` where
    ``pos_slice`` is one position. A slice is an integer, ``(start, stop[, step])``, a list, array or mask, or a
    :class:`~pellucid.slices.Slice`. ``layer`` is the layer whose input is meant: what is below it counts; ``-1``, ``None``
    and the number of layers are the end. Weights are the model's as they are now.

    All of them raise :class:`~pellucid.errors.InputError` where the cache knows no model, and
    :class:`~pellucid.errors.CacheKeyError`, with its name, for what the run did not keep.
    """

    def _run(self) -> CachedRun:
        """The cache."""
        raise NotImplementedError

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Float[Tensor, "row ... d_model"] | Labelled:
        """The residual stream as it is at each layer: rows ``0_pre``, (``0_mid``,) ``1_pre``, ..., ``final_post``.

        Args:
            layer: the last row is what enters this layer.
            incl_mid: the residuals between attention and MLP, too.
            apply_ln: through the norm that reads the last row. For a layer below the end that is divided by the run's scale
                and multiplied with the gain, see :meth:`apply_ln_to_stack`; at the end it is the final norm itself, its
                statistics taken anew from each row and its bias added: ``stack @ W_U + b_U`` is the logit lens.
            pos_slice: positions.
            mlp_input: with the residual that enters the layer's MLP.
            return_labels: give ``(stack, labels)``.

        Raises:
            InputError: ``incl_mid`` or ``mlp_input`` in parallel blocks; ``apply_ln`` where no norm reads the layer's input.
        """
        return _as_asked(
            residual.accumulated(self._run(), layer, incl_mid, apply_ln, pos_slice, mlp_input), return_labels
        )

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Float[Tensor, "row ... d_model"] | Labelled:
        """What each layer added to the stream: rows ``embed``, (``pos_embed``,) ``0_attn_out``, ``0_mlp_out``, ...

        All rows together are the residual that enters ``layer``.

        Args:
            layer: see the class.
            mlp_input: up to the layer's MLP: with its attention.
            mode: ``"attn"`` or ``"mlp"`` for their rows alone.
            apply_ln: as the norm that reads them sees them, :meth:`apply_ln_to_stack`.
            pos_slice: positions.
            incl_embeds: the embeddings, too.
            return_labels: give ``(stack, labels)``.

        Raises:
            InputError: a stream that is no sum (``apply_residual_connection_post_layernorm``); see
                :meth:`accumulated_resid`.
        """
        found = residual.decomposed(self._run(), layer, mlp_input, mode, apply_ln, pos_slice, incl_embeds)
        return _as_asked(found, return_labels)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Float[Tensor, "row ... d_model"] | Labelled:
        """What each head added to the stream: rows ``L0H0``, ``L0H1``, ..., layer after layer.

        Made from ``hook_z`` (or ``hook_result``, where that was kept) and not kept. Where a norm follows attention (Gemma 2,
        OLMo 2) a head's part goes through it with the run's scale, so that heads and biases add up to ``hook_attn_out``.

        Args:
            layer: heads below it.
            return_labels: give ``(stack, labels)``.
            incl_remainder: one more row, ``remainder``: the residual that enters ``layer``, less the heads.
            pos_slice: positions.
            apply_ln: as the norm that reads them sees them, :meth:`apply_ln_to_stack`.

        Raises:
            InputError: a stream that is no sum; no norm to apply.
        """
        return _as_asked(residual.heads(self._run(), layer, incl_remainder, pos_slice, apply_ln), return_labels)

    def compute_head_results(self) -> None:
        """Keep ``blocks.{i}.attn.hook_result`` of every layer, made from ``hook_z``: ``[batch, pos, n_heads, d_model]``.

        Those that were kept by the run stay; if all were, that is warned of. They are what the output projection makes of
        each head, without b_O and before a norm that may follow.
        """
        run = self._run()
        names = [f"blocks.{layer}.attn.hook_result" for layer in range(model_of(run).cfg.n_layers)]
        if all(name in run for name in names):
            warn("compute_head_results: the head results are in the cache already.")
            return
        self._keep({name: parts.head_results(run, layer) for layer, name in enumerate(names)})

    def _keep(self, entries: dict[str, Tensor]) -> None:
        """Add to the cache."""
        raise NotImplementedError

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice | SliceInput = None,
        pos_slice: Slice | SliceInput = None,
        project_output_onto: Float[Tensor, " d_model *n"] | None = None,
    ) -> Float[Tensor, "..."]:
        """``[batch, pos, neuron, d_model]``: what each neuron of a layer added to the stream; not kept.

        Args:
            layer: whose neurons; negative counts from the end.
            neuron_slice: some of them; one drops the axis.
            pos_slice: positions.
            project_output_onto: directions ``[d_model]`` or ``[d_model, n]``: the products with them, ``[..., neuron]`` or
                ``[..., neuron, n]``, without the parts themselves being made.

        Raises:
            InputError: no layer; neurons that cannot be seen (experts).
        """
        run, pos, neurons = self._run(), Slice.of(pos_slice), Slice.of(neuron_slice)
        place = parts.neuron_layer(run, layer)
        onto = residual.onto_of(run, project_output_onto, end_of(model_of(run), None), False, pos, False)
        kept = parts.one_neuron_keeps_its_axis(neurons)
        found = residual.squeezed(parts.neurons_written(run, place, kept, pos, onto), project_output_onto)
        if neurons.mode != "int":
            return found
        return found.squeeze(-1 if project_output_onto is not None and project_output_onto.dim() == 1 else -2)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Slice | SliceInput = None,
        neuron_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, " d_model *n"] | None = None,
        mlp_input: bool = False,
    ) -> Float[Tensor, "row ..."] | Labelled:
        """What each neuron added to the stream: rows ``L0N0``, ``L0N1``, ..., layer after layer.

        Args:
            layer: neurons below it.
            pos_slice: positions.
            neuron_slice: some of each layer's.
            return_labels: give ``(stack, labels)``.
            incl_remainder: one more row, ``remainder``: the residual that enters ``layer``, less the neurons.
            apply_ln: as the norm that reads them sees them, :meth:`apply_ln_to_stack`.
            project_output_onto: directions ``[d_model]`` or ``[d_model, n]``: the stack is then ``[row, batch, pos]`` or
                ``[row, batch, pos, n]``, and no neuron's ``d_model`` numbers are made.
            mlp_input: what is read is the input of the layer's MLP.

        Raises:
            InputError: a stream that is no sum; no norm to apply; neurons that cannot be seen (experts).
        """
        found = residual.neurons(
            self._run(), layer, pos_slice, neuron_slice, incl_remainder, apply_ln, project_output_onto, mlp_input
        )
        return _as_asked(found, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, " d_model *n"] | None = None,
    ) -> Float[Tensor, "row ..."] | Labelled:
        """The residual that enters ``layer`` in all its parts: heads, neurons, embeddings, and ``bias``.

        Rows: ``L0H0`` ..., then ``L0N0`` ... (or ``0_mlp_out`` ...), ``embed``, (``pos_embed``,) and as one last row
        ``bias`` all that output projections add whatever heads and neurons do; there is no such row in a model without
        biases. All rows together are the residual.

        Args:
            layer: see the class.
            mlp_input: up to the layer's MLP: with its attention's heads.
            expand_neurons: each neuron; else the MLPs' outputs, their biases in them.
            apply_ln: as the norm that reads them sees them, :meth:`apply_ln_to_stack`.
            pos_slice: positions.
            return_labels: give ``(stack, labels)``.
            project_output_onto: see :meth:`stack_neuron_results`.

        Raises:
            InputError: a stream that is no sum; no norm to apply; neurons that cannot be seen (experts).
        """
        found = residual.in_full(
            self._run(), layer, mlp_input, expand_neurons, apply_ln, pos_slice, project_output_onto
        )
        return _as_asked(found, return_labels)

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "row ... d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "row ... d_model"]:
        """A stack of parts as the norm before a layer sees them: divided by the scale of the whole stream in the run.

        The mean is subtracted where the norm does that, and the norm's gain multiplied with (Gemma's is 1 + weight), whether
        the weights are processed or not. Its bias is added to no part: it is no part's own.

        Args:
            residual_stack: ``[row, batch, pos, d_model]``, positions and rows taken already.
            layer: whose first norm; by default the final norm.
            mlp_input: the norm before its MLP.
            pos_slice: the positions of the stack.
            batch_slice: rows to take of the stack and of the scale.
            has_batch_dim: whether the stack has an axis of rows.
            recompute_ln: of the final norm: apply it anew to each part, bias included, as a lens does.

        Raises:
            InputError: no norm there, or a stack of other sizes.
        """
        return residual.as_read(
            self._run(), residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "row ... d_model"],
        tokens: str | int | Int[Tensor, "..."],
        incorrect_tokens: str | int | Int[Tensor, "..."] | None = None,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "row ..."]:
        """Direct logit attribution: what each part adds to a token's logit, or to a difference of two.

        The product of :meth:`apply_ln_to_stack` with the tokens' columns of ``W_U``. The logit is the unembedding's output,
        before the model caps or scales it (``hook_unembed``). Attributions of all parts and :meth:`logit_bias` add up to it.

        Args:
            residual_stack: ``[row, batch, pos, d_model]``, positions taken already.
            tokens: a string, an id, ``[batch]``, ``[batch, pos]``, or ``[pos]`` where that is not the number of rows.
            incorrect_tokens: of the same shape: the difference to their logits.
            pos_slice: the positions of the stack.
            batch_slice: rows to take of the stack; the tokens are those of the rows taken.
            has_batch_dim: whether the stack has an axis of rows.

        Returns:
            ``[row, batch, pos]``.

        Raises:
            InputError: tokens or a stack of other sizes.
        """
        return logits.attributed(
            self._run(), residual_stack, tokens, incorrect_tokens, pos_slice, batch_slice, has_batch_dim
        )

    def logit_bias(
        self, tokens: str | int | Int[Tensor, "..."], incorrect_tokens: str | int | Int[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """What is in a token's logit whatever the stream is: the final norm's bias times its column of ``W_U``, and ``b_U``.

        Args:
            tokens: see :meth:`logit_attrs`.
            incorrect_tokens: the difference to these.

        Returns:
            Of the shape of ``tokens``: what :meth:`logit_attrs` of all parts leaves of the logit.
        """
        return logits.constant_of(model_of(self._run()), tokens, incorrect_tokens)

    def logit_lens(
        self,
        *,
        layers: Sequence[int] | None = None,
        incl_mid: bool = False,
        positions: Slice | SliceInput = -1,
        batch_slice: Slice | SliceInput = None,
        lens: Callable[[Float[Tensor, "... d_model"], int], Float[Tensor, "... d_model"]] | None = None,
        apply_ln: bool = True,
        vocab: Sequence[int] | Int[Tensor, " token"] | None = None,
        targets: str | int | Sequence[str | int] | Int[Tensor, "..."] | None = None,
        return_type: Quantity = "logits",
        top_k: int | None = None,
        chunk_size: int | None = None,
        enable_grad: bool = False,
    ) -> LensResult:
        """What the model would say after each layer: each residual through the final norm and the unembedding.

        Norm, unembedding, cap and scale are the model's own, so that ``final_post`` with ``positions=None`` is what the run
        returned, to the bit.

        Args:
            layers: places among :meth:`accumulated_resid`'s rows.
            incl_mid: the residuals between attention and MLP, too.
            positions: by default the last; ``None`` for all.
            batch_slice: rows.
            lens: a function of a residual ``[batch, pos, d_model]`` and its place, applied before the norm.
            apply_ln: ``False``: without the final norm.
            vocab: ids of the tokens to keep.
            targets: tokens to keep with their ranks; a tensor ``[batch, pos]`` has one for each cell.
            return_type: ``"logits"``, ``"log_probs"`` or ``"probs"``.
            top_k: keep so many tokens, the most probable first.
            chunk_size: cells to unembed at a time; by default a row of the stack.
            enable_grad: keep the graph.

        Raises:
            InputError: more than one of ``vocab``, ``targets`` and ``top_k``; values that are none.
        """
        return readout.lens(
            self._run(),
            layers,
            incl_mid,
            positions,
            batch_slice,
            lens,
            apply_ln,
            vocab,
            targets,
            return_type,
            top_k,
            chunk_size,
            enable_grad,
        )

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Shaped[Tensor, "layer ..."]:
        """One activation of every layer below ``layer``, ``[layer, ...]``.

        Args:
            activation_name: its short name, such as ``"z"`` or ``"scale"``.
            layer: see the class.
            sublayer_type: ``"attn"``, ``"ln1"``, ..., where the name does not say it.
        """
        run: Any = self._run()
        end = end_of(model_of(run), layer)
        if end == 0:
            raise InputError("layer=0 has no layer below it: there is nothing to stack.")
        return torch.stack([run[activation_name, below, sublayer_type] for below in range(end)])


def _as_asked(found: Labelled, return_labels: bool) -> Tensor | Labelled:
    return found if return_labels else found[0]
