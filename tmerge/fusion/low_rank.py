r"""Products of two thin factors: what a matrix has in its leading directions, and the factors of one that has no more.

Of all matrices of rank r the nearest to M is ``U_r U_r^T M`` with the r leading left singular vectors (Eckart and Young
1936). They are found by subspace iteration from random vectors (Halko, Martinsson and Tropp 2011, Alg. 4.4), which for
a matrix of rank r is done after one step, and whose products cost 4 n m r a step where a decomposition of M would cost
n m min(n, m).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors", "of_rank"]

# Directions beside those asked for, and steps: until what is found of the matrix grows by less than so much of it.
_BESIDE, _STEPS, _GROWS = 8, 30, 1e-6
# What is left of a matrix whose factors are all found: as its entries are rounded in float32.
_NOTHING = 1e-6
_BEGIN = 8


def of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank.

    Args:
        matrix: (n, m), float32.
        rank: r; a matrix that has no more dimensions than that comes back as it is.

    Returns:
        (n, m), float32; in the Frobenius norm within a hundredth of a percent as near as any of rank r.
    """
    if rank >= min(matrix.shape):
        return matrix
    left, right = _leading(matrix.double(), rank)
    return (left @ right).to(matrix.dtype)


def factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The two thin factors of a matrix of low rank.

    Args:
        matrix: (n, m), float32.

    Returns:
        (n, r) and (r, m), float32, with orthonormal rows in the second, of the least r whose product is the matrix to
        float32's rounding; r is 0 where all of it is zero, and min(n, m) of a matrix of full rank.
    """
    # Products of float32 would leave more than its rounding.
    exact, dtype = matrix.double(), matrix.dtype
    norm, most = float(torch.linalg.vector_norm(exact)), min(matrix.shape)
    rank = min(_BEGIN, most)
    if norm == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    while True:
        left, right = _leading(exact, rank)
        # With all dimensions it is the matrix itself.
        if rank == most or float(torch.linalg.vector_norm(exact - left @ right)) <= _NOTHING * norm:
            break
        rank = min(2 * rank, most)
    # By falling size: as many are needed as leave no more than rounding.
    sizes = torch.linalg.vector_norm(left, dim=0)
    left_out = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    needed = int((left_out > _NOTHING * norm).sum())
    return left[:, :needed].to(dtype).contiguous(), right[:needed].to(dtype).contiguous()


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(n, r) and (r, m): the part of a matrix in its r leading directions, these by falling size in the second."""
    size = min(rank + _BESIDE, *matrix.shape)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], size, generator=draw).to(matrix)
    found = -1.0
    for _ in range(_STEPS):
        outputs = torch.linalg.qr(matrix @ basis).Q
        inputs = matrix.T @ outputs  # (m, size)
        before, found = found, float(torch.linalg.vector_norm(inputs))
        if found - before <= _GROWS * found:
            break
        basis = torch.linalg.qr(inputs).Q
    turned, sizes, rows = torch.linalg.svd(inputs.T, full_matrices=False)
    return outputs @ (turned[:, :rank] * sizes[:rank]), rows[:rank]
