"""A matrix of low rank, kept as the two factors whose product it is.

A head's OV circuit ``W_V @ W_O`` is ``[d_model, d_model]`` of rank ``d_head``: the product is large and hides its rank,
the factors are small and show it. Everything here (singular values, eigenvalues, norms, products, parts) is computed
from the factors, and the product is formed only by :attr:`FactoredMatrix.AB`.

The interface is TransformerLens'. Shapes: ``A`` is ``[..., ldim, mdim]``, ``B`` is ``[..., mdim, rdim]``, and they stand
for ``A @ B`` ``[..., ldim, rdim]``; leading axes (layers, heads) broadcast.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_kind
from pellucid.dtypes import widened
from pellucid.errors import IndexingError, InputError, ShapeError


class FactoredMatrix:
    """``A @ B`` without forming it.

    Args:
        A: ``[..., ldim, mdim]``, floating point: a tensor, or whatever multiplies as one (``ndim``, ``shape``, ``@``), of
            which products alone can be had.
        B: ``[..., mdim, rdim]``, likewise.

    Raises:
        InputError: fewer than two axes, inner sizes that differ, or leading axes that do not broadcast.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        given: tuple[tuple[str, Any, str], ...] = (("A", A, "left, middle"), ("B", B, "middle, right"))
        for name, factor, axes in given:
            if not (hasattr(factor, "ndim") and hasattr(factor, "broadcast_to")):
                check_kind(name, factor, Tensor, f"a tensor [..., {axes}]")
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise ShapeError(
                f"A factored matrix is [..., ldim, mdim] times [..., mdim, rdim]; found {tuple(A.shape)} and "
                f"{tuple(B.shape)}."
            )
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise ShapeError(
                f"The leading axes mismatch: those of {tuple(A.shape)} and {tuple(B.shape)} do not broadcast."
            ) from error
        self.A = A.broadcast_to((*leading, *A.shape[-2:]))
        self.B = B.broadcast_to((*leading, *B.shape[-2:]))
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.has_leading_dims = len(leading) > 0

    # -- products ------------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: FactoredMatrix) -> FactoredMatrix: ...
    @overload
    def __matmul__(self, other: Tensor) -> FactoredMatrix | Tensor: ...
    def __matmul__(self, other: FactoredMatrix | Tensor) -> FactoredMatrix | Tensor:
        """Times a matrix (factored again, through the smaller inner size) or a vector ``[rdim]`` (a tensor)."""
        if isinstance(other, FactoredMatrix):
            return self._times(other.A)._times(other.B)
        if other.ndim < 2:
            self._check_inner("right", other.shape[-1], self.rdim, other.shape)
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        return self._times(other)

    def _times(self, other: Tensor) -> FactoredMatrix:
        self._check_inner("right", other.shape[-2], self.rdim, other.shape)
        if self.rdim > self.mdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> FactoredMatrix | Tensor:
        """A matrix (factored again) or a vector ``[ldim]`` (a tensor) times this."""
        self._check_inner("left", other.shape[-1], self.ldim, other.shape)
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        if self.ldim > self.mdim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: float | Tensor) -> FactoredMatrix:
        """Times a number.

        Raises:
            ShapeError: a tensor of more than one element; ``@`` multiplies matrices.
        """
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ShapeError(f"* takes a number; found a tensor {tuple(scalar.shape)}. Use @ for a matrix product.")
        return FactoredMatrix(self.A * scalar, self.B)

    def __rmul__(self, scalar: float | Tensor) -> FactoredMatrix:
        """A number times this."""
        return self * scalar

    @property
    def AB(self) -> Tensor:
        """The product ``[..., ldim, rdim]``."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:
        """The product in the other order, ``[..., mdim, mdim]``.

        Raises:
            ShapeError: the matrix is not square, so that the other order is not the same map seen from inside.
        """
        if self.ldim != self.rdim:
            raise ShapeError(f"BA needs a square matrix; found {tuple(self.shape)}.")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """Transposed, leading axes as they are."""
        return FactoredMatrix(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``."""
        return self.A, self.B

    # -- decompositions ------------------------------------------------------------------------------------------------

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        # Orthogonal parts first (QR of each factor); what is left is [mdim, mdim] and cheap. LAPACK has no 16-bit kernels.
        q_left, r_left = torch.linalg.qr(widened(self.A))
        q_right, r_right = torch.linalg.qr(widened(self.B).transpose(-2, -1))
        u, s, vh = torch.linalg.svd(r_left @ r_right.transpose(-2, -1), full_matrices=False)
        return q_left @ u, s, q_right @ vh.transpose(-2, -1)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition, computed once.

        Returns:
            ``(U, S, V)`` with ``U`` ``[..., ldim, r]``, ``S`` ``[..., r]`` falling, ``V`` ``[..., rdim, r]``, ``r`` the
            smallest of the three sizes, such that ``U @ diag(S) @ V^T`` is the matrix. In float32 at least.
        """
        return self._svd

    @property
    def U(self) -> Tensor:
        """Left singular vectors ``[..., ldim, r]``."""
        return self.svd()[0]

    @property
    def S(self) -> Tensor:
        """Singular values ``[..., r]``, falling."""
        return self.svd()[1]

    @property
    def V(self) -> Tensor:
        """Right singular vectors ``[..., rdim, r]``."""
        return self.svd()[2]

    @property
    def Vh(self) -> Tensor:
        """The same as :attr:`V`, with a ``DeprecationWarning``, as in TransformerLens: it is not transposed."""
        warnings.warn("FactoredMatrix.Vh is V, not transposed: write V.", DeprecationWarning, stacklevel=2)
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues ``[..., mdim]``, complex. Those of ``BA``; further ones of ``AB`` are zero. From float32 at least."""
        # The factors are widened, not their product: float16 may not hold it, and rounding it moves the eigenvalues.
        values: Tensor = torch.linalg.eigvals(FactoredMatrix(widened(self.A), widened(self.B)).BA)
        return values

    def norm(self) -> Tensor:
        """Frobenius norm ``[...]``, the root of the summed squares of the singular values."""
        return self.S.square().sum(-1).sqrt()

    def make_even(self) -> FactoredMatrix:
        """The same matrix with both factors orthogonal up to sqrt(S): ``U sqrt(S)`` times ``sqrt(S) V^T``."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.V.transpose(-2, -1))

    def collapse_l(self) -> Tensor:
        """``S V^T`` ``[..., r, rdim]``: the matrix without its orthogonal left part ``U``; rows keep their lengths."""
        return self.S[..., :, None] * self.V.transpose(-2, -1)

    def collapse_r(self) -> Tensor:
        """``U S`` ``[..., ldim, r]``: the matrix without its orthogonal right part."""
        return self.U * self.S[..., None, :]

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Axes of the product."""
        return len(self.shape)

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """A new leading axis of size 1 at ``k``.

        Raises:
            InputError: ``k`` is not a place among the leading axes.
        """
        leading = self.ndim - 2
        place = k if k >= 0 else k + self.ndim + 1
        if not 0 <= place <= leading:
            raise InputError(f"unsqueeze adds a leading axis, 0 to {leading}; found {k}.")
        return FactoredMatrix(self.A.unsqueeze(place), self.B.unsqueeze(place))

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Part of it, still factored: as the product is indexed, without forming it.

        An integer for a row or a column keeps that axis with size 1, so that the result is still a matrix. Masks and lists,
        tensors and arrays of integers, and new axes, work as torch's; a mask may not reach from leading axes into rows.

        Raises:
            IndexingError: more indices than axes, more than one ellipsis, a row or column that is not there, or a mask of
                leading axes and rows together.
        """
        items = self._without_ellipsis([_plain(item) for item in (index if isinstance(index, tuple) else (index,))])
        leading: list[Any] = []
        matrix: list[Any] = []
        new_axes: list[int] = []
        consumed = 0
        for item in items:
            width = _axes_of(item)
            inside = consumed >= self.ndim - 2
            if not inside and consumed + width > self.ndim - 2:
                raise IndexingError(
                    f"{item!r} reaches into the rows and columns of a factored matrix {tuple(self.shape)}."
                )
            if inside and item is None:
                new_axes.append(consumed - (self.ndim - 2))
            else:
                (matrix if inside else leading).append(item)
            consumed += width
        if consumed > self.ndim:
            raise IndexingError(f"{index!r} is too long an index for a factored matrix {tuple(self.shape)}.")
        sizes = self.shape[-2:]
        rows, columns = (
            *(_kept(item, size) for item, size in zip(matrix, sizes, strict=False)),
            slice(None),
            slice(None),
        )[:2]
        chosen = tuple(leading)
        found = FactoredMatrix(self.A[chosen][..., rows, :], self.B[chosen][..., :, columns])
        for place in new_axes:
            found = found._with_axis(place)
        return found

    def _with_axis(self, place: int) -> FactoredMatrix:
        """A new axis before the rows (0), between rows and columns (1) or after the columns (2)."""
        if place == 0:
            return FactoredMatrix(self.A.unsqueeze(-3), self.B.unsqueeze(-3))
        if place == 1:  # the rows become a leading axis
            return FactoredMatrix(self.A.unsqueeze(-2), self.B.unsqueeze(-3))
        return FactoredMatrix(self.B.transpose(-2, -1).unsqueeze(-3), self.A.unsqueeze(-1))

    def get_corner(self, k: int = 3) -> Tensor:
        """The first ``k`` entries along every axis, for looking at."""
        corner = self.A[..., :k, :] @ self.B[..., :, :k]
        return corner[tuple(slice(k) for _ in range(self.ndim))]

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({tuple(self.shape)}), Hidden Dim({self.mdim})"

    def _without_ellipsis(self, items: list[Any]) -> list[Any]:
        places = [place for place, item in enumerate(items) if item is Ellipsis]
        if len(places) > 1:
            raise IndexingError("An index can hold one ellipsis.")
        if not places:
            return items
        place = places[0]
        rest = self.ndim - sum(_axes_of(item) for item in items if item is not Ellipsis)
        return items[:place] + [slice(None)] * max(rest, 0) + items[place + 1 :]

    def _check_inner(self, side: str, found: int, wanted: int, shape: torch.Size) -> None:
        if found != wanted:
            raise ShapeError(
                f"The {side} factor {tuple(shape)} does not fit a factored matrix {tuple(self.shape)}: inner sizes are "
                f"{found} and {wanted}."
            )


def _plain(item: Any) -> Any:
    """An index as an integer, a slice, ``None``, an ellipsis or a tensor; NumPy's numbers and 0-d tensors are integers."""
    if isinstance(item, list | tuple):
        item = torch.as_tensor(item)
    if isinstance(item, np.ndarray | np.generic):
        item = torch.as_tensor(item)
    if isinstance(item, Tensor) and item.dim() == 0 and item.dtype != torch.bool and not item.is_floating_point():
        return int(item)
    return item


def _axes_of(item: Any) -> int:
    """How many axes an index takes up: none for a new axis, several for a mask (torch takes bytes for one)."""
    if item is None:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _kept(item: Any, size: int) -> Any:
    """An integer as a slice of length 1, of an axis that is so long."""
    if isinstance(item, int) and not isinstance(item, bool):
        if not -size <= item < size:
            raise IndexingError(
                f"index {item} is out of bounds for rows or columns of a factored matrix: there are {size}."
            )
        return slice(item, item + 1 if item != -1 else None)
    return item


def composition_scores(left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True) -> Tensor:
    """``|left @ right| / (|left| |right|)``, Frobenius norms; nothing of the outer sizes is formed.

    Args:
        left: ``[*left, ldim, inner]``.
        right: ``[*right, inner, rdim]``.
        broadcast_dims: every left with every right; ``False`` takes leading axes as they meet.

    Returns:
        ``[*left, *right]``, or the leading axes as they meet.

    Raises:
        InputError: inner sizes that differ, leading axes that do not broadcast.
    """
    check_kind("left", left, FactoredMatrix, "a FactoredMatrix")
    check_kind("right", right, FactoredMatrix, "a FactoredMatrix")
    if left.rdim != right.ldim:
        raise InputError(
            f"Composition scores need left.rdim and right.ldim to be equal: shapes are {tuple(left.shape)} and "
            f"{tuple(right.shape)}."
        )
    mine, other = left.collapse_l(), right.collapse_r()  # norms stay as they are: orthogonal parts are gone
    norms_left, norms_right = mine.norm(dim=(-2, -1)), other.norm(dim=(-2, -1))
    if not broadcast_dims:
        try:
            scores: Tensor = (mine @ other).norm(dim=(-2, -1)) / norms_left / norms_right
            return scores
        except RuntimeError:
            raise InputError(
                f"The leading axes of {tuple(left.shape)} and {tuple(right.shape)} do not broadcast."
            ) from None
    # One left at a time: all products at once would be [*left, *right, rank, rank].
    products = [(each @ other).norm(dim=(-2, -1)) for each in mine.reshape(-1, *mine.shape[-2:])]
    leading = left.shape[:-2]
    together = torch.stack(products).reshape((*leading, *right.shape[:-2]))
    every: Tensor = together / norms_left.reshape((*leading, *[1] * (right.ndim - 2))) / norms_right
    return every
