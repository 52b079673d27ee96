"""A model's weights in the form that circuit analysis wants, computing the same log-probabilities.

Every function takes tensors and gives new ones; nothing is written and no model is known. Weights are laid out as in
``nn.Linear``, ``[out, in]``: what *reads* the residual stream is ``[out, d_model]``, what *writes* it ``[d_model, in]``.

What a block is like, :class:`BlockForm` says: which maps read which norm, how its norms compute, what has a bias. Unless
it is given, a block is BLOOM's.

What each step rests on, in BLOOM: every reader of the residual stream stands behind a layer norm, which subtracts the
mean over d_model, so a reader's response to a constant vector and a writer's constant part do nothing; the rows of an
attention pattern sum to one; a softmax does not see a constant added to all logits; ALiBi is added to the scores and does
not touch queries and keys. Two configurations break these: ``apply_residual_connection_post_layernorm`` makes a norm's
output the residual itself (no folding), and ``slow_but_exact`` with ``pretraining_tp > 1`` drops the output biases.

Results come in the *working dtype*: float64 for float64, else float32. Chain the steps and round once, at the end.
Sources: Elhage et al. 2021 (*A Mathematical Framework for Transformer Circuits*) for folding, centring and the QK and OV
factorisations, with TransformerLens' conventions; the exact centring of an embedding behind a norm is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.errors import WeightError
from pellucid.factored_matrix import FactoredMatrix

Step = Literal[
    "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"
]
STEPS: tuple[Step, ...] = get_args(Step)
"""The five steps, by TransformerLens' names."""

BLOCK_STEPS: frozenset[Step] = frozenset(STEPS) - {"center_unembed"}
"""The steps that change a block."""

QKV = ("attn.q", "attn.k", "attn.v")


@dataclass(frozen=True)
class BlockForm:
    """What processing has to know of a block.

    Attributes:
        readers: the norms that linear maps read, and those maps.
        biased: norms and linear maps that have a bias; ``None``: all of them.
        centres: whether its norms subtract the mean.
        unit: the weight with which a norm only normalises: 1, or 0 where the gain is 1 + weight.
        queries_per_key: heads of queries that share one of keys and values.
    """

    readers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"ln1": QKV, "ln2": ("mlp.in",)})
    biased: frozenset[str] | None = None
    centres: bool = True
    unit: float = 1.0
    queries_per_key: int = 1

    def has_bias(self, name: str) -> bool:
        """Whether a norm or linear map has a bias."""
        return self.biased is None or name in self.biased

    def keys(self, step: Step) -> tuple[str, ...]:
        """What a step needs of the block, by the block component's own keys."""
        if step == "fold_value_biases":  # a bias that has to take them must be there
            return ("attn.v.bias", "attn.o.weight", "attn.o.bias") if self.has_bias("attn.v") else ()
        names = {
            "fold_ln": [name for norm, readers in self.readers.items() for name in (norm, *readers)],
            "center_writing_weights": ["attn.o", "mlp.out"],
            "refactor_factored_attn_matrices": [*QKV, "attn.o"],
        }[step]
        kinds = {name: ("weight", "bias") if self.has_bias(name) else ("weight",) for name in names}
        return tuple(f"{name}.{kind}" for name in names for kind in kinds[name])


BLOCK_KEYS: Mapping[Step, tuple[str, ...]] = {step: BlockForm().keys(step) for step in STEPS if step in BLOCK_STEPS}
"""What each step needs of a block of BLOOM's, by the block component's own keys."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights of ``dtype`` are processed in: float32 at least.

    Raises:
        WeightError: not a floating-point dtype.
    """
    if not dtype.is_floating_point:
        raise WeightError(
            f"Weights of dtype {dtype} are not plain numbers and cannot be processed; load them unquantised."
        )
    return torch.promote_types(dtype, torch.float32)


def fold_layer_norm(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Move a layer norm's gain and bias into the linear map that reads it.

    ``W (g * n + s) + b = (W g) n + (b + W s)`` with ``n`` the normalised input. ``n`` has mean zero over d_model, so each
    row of ``W g`` is then freed of its mean as well, which does nothing to the output.

    Legal for ``ln1`` into queries, keys and values, ``ln2`` into ``mlp.in``, ``ln_f`` into an untied unembedding. Not
    legal for the embedding norm (its output is the residual, nothing linear reads it alone) nor where
    ``apply_residual_connection_post_layernorm`` adds the norm's output to the stream.

    Args:
        weight: ``[out, d_model]``.
        bias: ``[out]``, or ``None`` for zeros.
        gain: ``[d_model]``, the norm's weight.
        shift: ``[d_model]``, the norm's bias.

    Returns:
        Weight ``[out, d_model]`` and bias ``[out]`` in the working dtype. Invariant: with gain 1 and bias 0 in the norm
        the output is the same; rows sum to zero. Linear in ``(weight, bias)``, so rows may be folded in chunks.

    Raises:
        WeightError: shapes that do not fit.
    """
    _expect("weight", weight, (None, gain.shape[0]))
    _expect("shift", shift, tuple(gain.shape))
    if bias is not None:
        _expect("bias", bias, (weight.shape[0],))
    work = working_dtype(weight.dtype)
    wide, wide_shift = weight.to(work), shift.to(work)
    new_bias = wide @ wide_shift if bias is None else torch.addmv(bias.to(work), wide, wide_shift)
    folded = wide * gain.to(work)
    return folded.sub_(folded.mean(1, keepdim=True)), new_bias


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """Move the gain of a norm that has no bias and subtracts no mean into the linear map that reads it: ``W g``.

    Args:
        weight: ``[out, d_model]``.
        gain: ``[d_model]``, what the normalised input is multiplied with (in Gemma 1 + weight).

    Returns:
        Weight ``[out, d_model]`` in the working dtype. Invariant: with gain 1 in the norm the output is the same.

    Raises:
        WeightError: shapes that do not fit.
    """
    _expect("weight", weight, (None, gain.shape[0]))
    work = working_dtype(weight.dtype)
    return weight.to(work) * gain.to(work)


def center_writing_weights(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Free what is written to the residual stream of its mean over d_model.

    ``W - mean_m(W)``, ``b - mean_m(b)``. Legal because every reader is a layer norm, which subtracts that mean; with
    ``apply_residual_connection_post_layernorm`` too, but there the norms' own biases put a mean back into the stream.

    Args:
        weight: ``[d_model, in]``.
        bias: ``[d_model]`` or ``None``.

    Returns:
        Both in the working dtype. Invariant: columns of the weight, and the bias, sum to zero.

    Raises:
        WeightError: shapes that do not fit.
    """
    _expect("weight", weight, (None, None))
    work = working_dtype(weight.dtype)
    wide = weight.to(work)
    centred = wide - wide.mean(0, keepdim=True)
    if bias is None:
        return centred, None
    _expect("bias", bias, (weight.shape[0],))
    wide_bias = bias.to(work)
    return centred, wide_bias - wide_bias.mean()


def center_unembed(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Free the unembedding of its mean over the vocabulary.

    ``W - mean_v(W)``, ``b - mean_v(b)``: all logits of a position move by one number, which a softmax does not see. Legal
    on an unembedding that owns its table; on one tied to ``word_embeddings`` it would change the embedding.

    Args:
        weight: ``[d_vocab, d_model]``, as ``lm_head.weight``.
        bias: ``[d_vocab]`` or ``None``.

    Returns:
        Both in the working dtype. Invariant: columns of the weight, and the bias, sum to zero over the vocabulary.

    Raises:
        WeightError: shapes that do not fit.
    """
    # The same arithmetic as for a writer: the mean is over the output features, here the vocabulary.
    return center_writing_weights(weight, bias)


def fold_value_biases(value_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Move the value biases into the attention's output bias.

    ``b_O + W_O b_V``, ``b_V = 0``: each row of the pattern sums to one, so ``b_V`` adds the same vector everywhere. Legal
    in BLOOM, fully masked rows included (Hugging Face gives them a uniform row); not while attention dropout is active,
    nor where ``slow_but_exact`` with ``pretraining_tp > 1`` drops ``b_O``.

    Args:
        value_bias: ``[n_heads * d_head]``.
        weight: ``[d_model, n_heads * d_head]``, the output projection's.
        bias: ``[d_model]``, its bias.

    Returns:
        Value bias and output bias in the working dtype. Invariant: the value bias is zero.

    Raises:
        WeightError: shapes that do not fit.
    """
    _expect("value_bias", value_bias, (weight.shape[-1],))
    _expect("bias", bias, (weight.shape[0],))
    work = working_dtype(weight.dtype)
    return (
        torch.zeros_like(value_bias, dtype=work),
        torch.addmv(bias.to(work), weight.to(work), value_bias.to(work)),
    )


def refactor_factored_attn_matrices(weights: Mapping[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Each head's QK and OV circuits in the basis of their singular vectors.

    With biases as one more input that is always 1, ``[W_Q; b_Q] [W_K; b_K]^T = U S V^T`` and queries become ``U sqrt(S)``,
    keys ``V sqrt(S)``. ``W_V W_O = U S V^T`` gives ``W_V = U S``, ``W_O = V^T``, the value biases having gone into ``b_O``
    first. Legal in BLOOM because ALiBi is added to the scores (a rotation of queries and keys, RoPE, would forbid it); needs
    no other step first. A key/value cache made before holds keys and values in the old basis and is of no use after.

    Args:
        weights: ``q.weight`` ``[n_heads * d_head, d_model]``, ``q.bias`` ``[n_heads * d_head]``, the same for ``k`` and
            ``v``, ``o.weight`` ``[d_model, n_heads * d_head]``, ``o.bias`` ``[d_model]``.
        n_heads: heads.

    Returns:
        The same keys in the working dtype. Invariant: the scores and each head's contribution plus ``b_O`` are the same;
        per head, columns of the extended W_Q and W_K are orthogonal with equal norms, columns of W_V are orthogonal, rows
        of W_O are orthonormal, singular values fall, b_V is zero.

    Raises:
        WeightError: a missing key or a wrong shape.
    """
    missing = [
        key for key in (f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")) if key not in weights
    ]
    if missing:
        raise WeightError(f"Refactoring needs the weights of one attention; not given: {', '.join(missing)}.")
    width, d_model = weights["q.weight"].shape
    for part in "qkv":
        _expect(f"{part}.weight", weights[f"{part}.weight"], (width, d_model))
        _expect(f"{part}.bias", weights[f"{part}.bias"], (width,))
    _expect("o.weight", weights["o.weight"], (d_model, width))
    if width % n_heads:
        raise WeightError(f"{width} features cannot be shared by {n_heads} heads.")
    work = working_dtype(weights["q.weight"].dtype)
    zeros, o_bias = fold_value_biases(weights["v.bias"], weights["o.weight"], weights["o.bias"])
    # The decompositions run in float64 whatever the dtype: small matrices, and nothing is lost before the one rounding.
    heads = {
        part: weights[f"{part}.weight"].double().unflatten(0, (n_heads, -1)).transpose(1, 2) for part in "qkv"
    }  # [n_heads, d_model, d_head]
    out = weights["o.weight"].double().unflatten(1, (n_heads, -1)).permute(1, 2, 0)  # [n_heads, d_head, d_model]
    extended = [torch.cat([heads[part], weights[f"{part}.bias"].double().view(n_heads, 1, -1)], dim=1) for part in "qk"]
    queries, keys_t = FactoredMatrix(extended[0], extended[1].transpose(1, 2)).make_even().pair
    keys = keys_t.transpose(1, 2)
    circuit = FactoredMatrix(heads["v"], out)
    values, right = circuit.collapse_r(), circuit.V
    result = {"v.bias": zeros, "o.bias": o_bias}
    for part, extended_new in (("q", queries), ("k", keys)):
        result[f"{part}.weight"] = extended_new[:, :-1].transpose(1, 2).reshape(width, d_model).to(work)
        result[f"{part}.bias"] = extended_new[:, -1].reshape(width).to(work)
    result["v.weight"] = values.transpose(1, 2).reshape(width, d_model).to(work)
    result["o.weight"] = right.permute(1, 0, 2).reshape(d_model, width).to(work)
    return result


# -- the embedding -----------------------------------------------------------------------------------------------------


def effective_embedding(table: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Rows ``[..., d_model]`` of the embedding as the residual stream sees them: the embedding norm applied."""
    work = working_dtype(table.dtype)
    return F.layer_norm(table.to(work), (table.shape[-1],), gain.to(work), shift.to(work), eps)


def center_embedding(table: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centre what the embedding writes to the residual stream, exactly, in the storage of an embedding behind a norm.

    Subtracting row means from the table itself does nothing, since the norm subtracts them anyway, and the norm's gain and
    bias put a mean back. With ``e`` a row as the stream sees it, ``r = e - mean(e)`` and ``rho = mean(r^2) / c^2`` for a
    number ``c`` with ``c^2 = 2 max_v mean(r^2)``, the row ``(r / c) sqrt(eps / (1 - rho))`` has mean zero and variance
    ``rho eps / (1 - rho)``; variance and eps together are ``eps / (1 - rho)``, the norm divides by the root of just that,
    and with gain ``c`` and bias 0 it gives ``r``. Legal because every reader of the stream is a layer norm; the table must
    not be tied to the unembedding.

    Args:
        table: ``[d_vocab, d_model]``.
        gain: ``[d_model]``, the embedding norm's weight.
        shift: ``[d_model]``, its bias.
        eps: its eps.

    Returns:
        New table, gain (``c`` throughout) and bias (zeros), in the working dtype. Invariant: the norm of the new table is
        the centred embedding. The table itself is small, of size sqrt(eps), and no longer means anything by itself.

    Raises:
        WeightError: ``eps`` is not positive, or shapes do not fit.
    """
    _expect("table", table, (None, gain.shape[0]))
    _expect("shift", shift, tuple(gain.shape))
    if not eps > 0:
        raise WeightError(f"Centring the embedding rests on the norm's eps, which must be positive; found {eps}.")
    rows = centred_rows(table, gain, shift, eps)
    scale = embedding_gain(mean_square(rows).max(), gain.dtype)
    return (
        rows_for_gain(rows, scale, eps),
        torch.full_like(gain, scale, dtype=rows.dtype),
        torch.zeros_like(shift, dtype=rows.dtype),
    )


def centred_rows(table: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``r``: the effective embedding less the mean of each row; rows may be given in chunks."""
    rows = effective_embedding(table, gain, shift, eps)
    return rows.sub_(rows.mean(-1, keepdim=True))


def embedding_gain(largest_power: Tensor | float, dtype: torch.dtype) -> float:
    """``c`` for the largest ``mean(r^2)``, a number that ``dtype`` holds exactly (1 for an embedding of zeros)."""
    scale = float((2 * torch.as_tensor(largest_power, dtype=torch.float64)).sqrt().to(dtype))
    return scale if scale > 0 else 1.0


def rows_for_gain(rows: Tensor, scale: float, eps: float) -> Tensor:
    """Rows of the new table for centred rows ``r`` and gain ``c``; may be given in chunks."""
    rho = mean_square(rows)[..., None] / scale**2
    return rows * ((eps / (1 - rho)).sqrt_() / scale)


def mean_square(rows: Tensor) -> Tensor:
    """Mean of the squares of each row, ``[...]`` of ``[..., d_model]``."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.square() / rows.shape[-1]


# -- a block -----------------------------------------------------------------------------------------------------------


def process_block(
    weights: Mapping[str, Tensor], steps: Iterable[Step], n_heads: int, form: BlockForm | None = None
) -> dict[str, Tensor]:
    """All asked steps on one block, in the order in which they keep each other's invariants.

    Folding first, then centring, then value biases, then the refactoring. Steps that were applied before may be named
    again: each leaves its own result as it is, up to rounding.

    Args:
        weights: the block's tensors by the block component's keys, those that :meth:`BlockForm.keys` names for the steps.
        steps: which to apply; ``center_unembed`` does not concern a block.
        n_heads: heads of queries.
        form: what the block is like, by default as BLOOM's.

    Returns:
        The changed tensors by the same keys, in the working dtype.

    Raises:
        WeightError: a missing key, a wrong shape, or a bias to be folded into a map that has none.
    """
    form = BlockForm() if form is None else form
    asked = frozenset(steps) & BLOCK_STEPS
    needed = {key for step in asked for key in form.keys(step)}
    missing = sorted(needed - set(weights))
    if missing:
        raise WeightError(f"{', '.join(sorted(asked))} needs {', '.join(missing)} of the block.")
    new: dict[str, Tensor] = {}

    def current(key: str) -> Tensor:
        return new.get(key, weights[key])

    def bias_of(name: str) -> Tensor | None:
        return current(f"{name}.bias") if form.has_bias(name) else None

    def put(name: str, weight: Tensor, bias: Tensor | None) -> None:
        new[f"{name}.weight"] = weight
        if form.has_bias(name) and bias is not None:
            new[f"{name}.bias"] = bias

    def center(name: str) -> None:
        put(name, *center_writing_weights(current(f"{name}.weight"), bias_of(name)))

    if "fold_ln" in asked:
        for norm, readers in form.readers.items():
            shift = bias_of(norm)
            for reader in readers:
                put(reader, *_folded(form, reader, weights, bias_of(reader), norm, shift))
            put(
                norm,
                torch.full_like(weights[f"{norm}.weight"], form.unit),
                None if shift is None else torch.zeros_like(shift),
            )
    if "center_writing_weights" in asked:
        center("attn.o")
        center("mlp.out")
    if "fold_value_biases" in asked and form.has_bias("attn.v"):
        values = current("attn.v.bias")
        shared = values.unflatten(0, (-1, values.shape[0] * form.queries_per_key // n_heads))
        by_query = shared.repeat_interleave(form.queries_per_key, 0).flatten()
        _, new["attn.o.bias"] = fold_value_biases(by_query, current("attn.o.weight"), current("attn.o.bias"))
        new["attn.v.bias"] = torch.zeros_like(values, dtype=working_dtype(values.dtype))
    if "refactor_factored_attn_matrices" in asked:
        refactored = refactor_factored_attn_matrices(_whole_attention(form, current), n_heads)
        for part in "qkvo":
            put(f"attn.{part}", refactored[f"{part}.weight"], refactored[f"{part}.bias"])
    if "center_writing_weights" in asked:
        if "refactor_factored_attn_matrices" in asked:
            center("attn.o")  # a singular vector that belongs to no singular value need not be centred
        if form.has_bias("attn.o"):
            new["attn.o.bias"] = new["attn.o.bias"] - new["attn.o.bias"].mean()  # the sum with b_V has rounded
    return new


def _folded(
    form: BlockForm, reader: str, weights: Mapping[str, Tensor], bias: Tensor | None, norm: str, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A reader's weight and bias with the gain and bias of its norm in them."""
    weight, gain = weights[f"{reader}.weight"], weights[f"{norm}.weight"]
    if form.unit == 0:
        gain = 1 + gain.to(working_dtype(gain.dtype))
    if not form.centres:
        return fold_gain(weight, gain), bias
    new, new_bias = fold_layer_norm(weight, bias, gain, torch.zeros_like(gain) if shift is None else shift)
    if bias is None and bool(new_bias.any()):
        raise WeightError(f"{norm} has a bias that folding would give to {reader}, which has none.")
    return new, new_bias


def _whole_attention(form: BlockForm, current: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """What the refactoring takes, zeros for the biases that are not there."""
    if form.has_bias("attn.v") and not form.has_bias("attn.o"):
        raise WeightError("Refactoring moves the value biases into attn.o, which has no bias.")
    if form.queries_per_key > 1:
        raise WeightError("Refactoring needs a head of keys and values for each head of queries.")
    given = {f"{part}.weight": current(f"attn.{part}.weight") for part in "qkvo"}
    for part in "qkvo":
        weight = given[f"{part}.weight"]
        given[f"{part}.bias"] = (
            current(f"attn.{part}.bias") if form.has_bias(f"attn.{part}") else weight.new_zeros(weight.shape[0])
        )
    return given


def _expect(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise WeightError(f"{name} must have shape [{wanted}]; found {list(found)}.")
