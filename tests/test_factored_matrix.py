"""The factored matrix against the product it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.factored_matrix import FactoredMatrix

EPS = torch.finfo(torch.float64).eps
SHAPES = [
    ((5, 3), (3, 7)),
    ((2, 4, 5, 3), (2, 4, 3, 5)),
    ((4, 5, 3), (2, 1, 3, 6)),
    ((3, 5), (5, 4)),
    ((2, 6, 6), (2, 6, 6)),
]


def pair(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[FactoredMatrix, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return FactoredMatrix(a, b), a @ b


def close(found: Tensor, wanted: Tensor, scale: float = 1.0) -> bool:
    size = float(wanted.abs().max().clamp_min(1.0))
    return found.shape == wanted.shape and bool((found - wanted).abs().max() < 1000 * EPS * size * scale)


@pytest.mark.parametrize("shapes", SHAPES)
def test_it_stands_for_the_product(shapes: Any) -> None:
    matrix, product = pair(shapes)
    assert matrix.shape == product.shape
    assert matrix.ndim == product.dim()
    assert matrix.has_leading_dims == (product.dim() > 2)
    assert torch.equal(matrix.AB, product)
    assert close(matrix.T.AB, product.transpose(-2, -1))
    assert close((matrix * 3).AB, 3 * product)
    assert close((torch.tensor(2.0) * matrix.A @ matrix.B), 2 * product)
    assert close((2 * matrix).AB, 2 * product)
    assert close(matrix.unsqueeze(0).AB, product.unsqueeze(0))
    assert close(matrix.get_corner(2), product[tuple(slice(2) for _ in range(product.dim()))])
    assert "Hidden Dim" in repr(matrix)
    assert matrix.pair[0] is matrix.A


@pytest.mark.parametrize("shapes", SHAPES)
def test_decompositions(shapes: Any) -> None:
    matrix, product = pair(shapes)
    u, s, v = matrix.svd()
    rank = min(product.shape[-2:])
    rank = min(rank, matrix.mdim)
    wanted = torch.linalg.svdvals(product)[..., :rank]
    assert close(s, wanted)
    assert close(u * s[..., None, :] @ v.transpose(-2, -1), product)
    assert close(u.transpose(-2, -1) @ u, torch.eye(rank, dtype=torch.float64).expand(*s.shape, rank))
    assert close(v.transpose(-2, -1) @ v, torch.eye(rank, dtype=torch.float64).expand(*s.shape, rank))
    assert matrix.U is u
    assert matrix.S is s
    assert matrix.V is v
    assert matrix.Vh is v  # TransformerLens' name for the same
    assert close(matrix.norm(), torch.linalg.matrix_norm(product))
    even = matrix.make_even()
    assert close(even.AB, product)
    assert close(even.A.norm(dim=-2), even.B.norm(dim=-1))
    assert close(matrix.collapse_r() @ matrix.collapse_r().transpose(-2, -1), product @ product.transpose(-2, -1), 10)
    assert close(matrix.collapse_l().transpose(-2, -1) @ matrix.collapse_l(), product.transpose(-2, -1) @ product, 10)


def test_eigenvalues_are_the_products() -> None:
    matrix, product = pair(((6, 3), (3, 6)))
    values = torch.linalg.eigvals(product)
    largest = values[values.abs().argsort(descending=True)][:3]
    found = matrix.eigenvalues[matrix.eigenvalues.abs().argsort(descending=True)]
    assert (torch.sort(found.real)[0] - torch.sort(largest.real)[0]).abs().max() < 1e-12
    assert (found.sum() - product.trace()).abs() < 1e-12
    with pytest.raises(InputError, match="square"):
        _ = pair(SHAPES[0])[0].eigenvalues


@pytest.mark.parametrize("shapes", SHAPES)
def test_products(shapes: Any) -> None:
    matrix, product = pair(shapes)
    generator = torch.Generator().manual_seed(1)
    for width in (2, 11):
        right = torch.randn(product.shape[-1], width, generator=generator, dtype=torch.float64)
        left = torch.randn(width, product.shape[-2], generator=generator, dtype=torch.float64)
        for found, wanted in ((matrix @ right, product @ right), (left @ matrix, left @ product)):
            assert isinstance(found, FactoredMatrix)
            assert close(found.AB, wanted, 10)
        other = FactoredMatrix(right, right.T)
        assert close((matrix @ other).AB, product @ other.AB, 10)
    assert close(matrix @ right[:, 0], product @ right[:, 0], 10)
    assert close(left[0] @ matrix, left[0] @ product, 10)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (0, 1),
        slice(1, None),
        (slice(None), -1),
        (..., 2, slice(None)),
        (0, 1, 2),
        (0, 1, slice(1, 3), 4),
        (0, 1, -1, -1),
    ],
    ids=str,
)
def test_indexing(index: Any) -> None:
    matrix, product = pair(SHAPES[1])
    items = index if isinstance(index, tuple) else (index,)
    items = items if Ellipsis not in items else (slice(None),) * 2 + items[1:]
    wanted = product[
        tuple(
            slice(item, item + 1 or None) if place >= 2 and isinstance(item, int) else item
            for place, item in enumerate(items)
        )
    ]
    assert close(matrix[index].AB, wanted)


def test_indexing_by_tensors_and_new_axes() -> None:
    matrix, product = pair(SHAPES[1])
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    assert close(matrix[mask].AB, product[mask])
    chosen = torch.tensor([3, 0])
    assert close(matrix[:, chosen].AB, product[:, chosen])
    assert close(matrix[0, 0, [1, 4]].AB, product[0, 0, [1, 4]])
    assert close(matrix[None].AB, product[None])
    one, two = torch.tensor(1), np.int64(2)
    assert close(matrix[one, two, two, -1].AB, product[1, 2, 2:3, -1:])
    for given in (mask.numpy(), mask.tolist(), tuple(map(tuple, mask.tolist()))):
        assert close(matrix[given, ..., 1].AB, product[mask][..., 1:2])
    assert close(matrix[[1, 0], ..., 1].AB, product[[1, 0], ..., 1:2])
    for index in ((..., None), (..., None, slice(1, 3)), (..., None, None), (..., None, slice(None), None)):
        assert close(matrix[index].AB, product[index])
    assert close(matrix[0, 1, :, None, ...].AB, product[0, 1, :, None])
    assert close(matrix[0, 0, None].AB, product[0, 0, None])
    for wrong in ((..., ...), (0, 1, 2, 3, 4), torch.ones(2, 4, 5, dtype=torch.bool)):
        with pytest.raises(InputError):
            matrix[wrong]


class Like:
    """No tensor, and multiplies as one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.ndim, self.shape = tensor, tensor.ndim, tensor.shape

    def unsqueeze(self, dim: int) -> Like:
        return Like(self.tensor.unsqueeze(dim))

    def squeeze(self, dim: int) -> Like:
        return Like(self.tensor.squeeze(dim))

    def broadcast_to(self, shape: Any) -> Like:
        return Like(self.tensor.broadcast_to(shape))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, FactoredMatrix):
            return NotImplemented
        return Like(self.tensor @ (other.tensor if isinstance(other, Like) else other))

    def __rmatmul__(self, other: Any) -> Like:
        return Like(other @ self.tensor)


def test_products_with_what_multiplies_as_a_tensor() -> None:
    matrix, product = pair(SHAPES[0])
    right, left = (torch.randn(size, dtype=torch.float64) for size in ((7, 2), (2, 5)))
    assert close((matrix @ Like(right)).AB.tensor, product @ right)
    assert close((Like(left) @ matrix).AB.tensor, left @ product)
    assert close((matrix @ Like(right[:, 0])).tensor, product @ right[:, 0])


def test_half_precision_is_decomposed_in_float32() -> None:
    a, b = torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(3, 5, dtype=torch.bfloat16)
    matrix = FactoredMatrix(a, b)
    assert matrix.S.dtype == torch.float32
    assert torch.allclose(matrix.S, torch.linalg.svdvals(a.float() @ b.float())[:3], atol=1e-5)
    assert matrix.eigenvalues.dtype == torch.complex64


def test_what_does_not_fit_is_refused() -> None:
    a = torch.randn(5, 3)
    for wrong in (torch.randn(4, 5), torch.randn(3)):
        with pytest.raises(InputError, match="factored matrix is"):
            FactoredMatrix(a, wrong)
    with pytest.raises(InputError, match="broadcast"):
        FactoredMatrix(torch.randn(2, 5, 3), torch.randn(3, 3, 5))
    matrix = FactoredMatrix(a, torch.randn(3, 7))
    with pytest.raises(InputError, match="right factor"):
        matrix @ torch.randn(5, 2)
    with pytest.raises(InputError, match="left factor"):
        torch.randn(2, 7) @ matrix
    with pytest.raises(InputError, match="Use @"):
        matrix * a
    with pytest.raises(InputError, match="leading axis"):
        matrix.unsqueeze(1)
