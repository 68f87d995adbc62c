r"""Entropic optimal transport: the potentials of one problem, or of a batch of equal shape.

Given a cost C (n, m) and marginals a (n,), b (m,), find the plan Q >= 0 that minimises

    <C, Q> + eps * sum_ij Q_ij (log(Q_ij / (a_i b_j)) - 1)      with  Q 1 = a,  Q^T 1 = b     (Eq. 8-9)

Its solution is ``Q = exp((f + g - C) / eps)`` with potentials f (n,) and g (m,), unique up to a constant moved
from one to the other. We iterate Sinkhorn's scaling on the kernel

    K = exp((f + g - C) / eps),     v <- b / (K^T u),     u <- a / (K v)

and *absorb* u and v into f and g, rebuilding K, whenever they grow past what the dtype holds (Schmitzer 2019,
"Stabilized sparse scaling algorithms", Alg. 2). A start from the c-transforms of C leaves an entry 1 in every
row and column of K, so no sum is ever zero and small eps cannot underflow. The scaling form costs two
matrix-vector products an iteration; the log-sum-exp form, equal in exact arithmetic, would cost two exponentials
of the whole matrix.

Equals ``ot.sinkhorn(a, b, C, eps)`` of POT (``method="sinkhorn_log"`` where eps is small). This file knows nothing
of models: it imports torch and the errors only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tmerge.errors import TransportError

__all__ = ["SinkhornResult", "plan_from_potentials", "sinkhorn"]

# exp of this still squares inside the dtype's range, and what K loses to underflow meanwhile stays below rounding.
_LOG_RANGE = {torch.float32: 25.0, torch.float64: 150.0}
# Rows and columns of exp(-C/eps) keep full precision without the c-transforms while C/eps spans less than this.
_SAFE_SPAN = {torch.float32: 30.0, torch.float64: 300.0}
# Sweeps between two looks at a device.
_LOOK = 8
# Entries summed in one go in float32: down a column (one running sum), and along a row (several side by side).
_BLOCK = 64
_LONG = 2048


@dataclass(frozen=True)
class SinkhornResult:
    """Potentials and how far they can be trusted. Batched fields have the batch shape (...) of the cost.

    Attributes:
        f: (..., n) potentials of the rows, in the cost's units and dtype.
        g: (..., m) potentials of the columns.
        converged: (...) bool, whether the marginal error fell below the tolerance.
        iterations: (...) int, row-and-column sweeps done.
        marginal_error: (...) the largest ``|marginal of Q - wanted| / wanted`` over rows and columns.
        transport_cost: (...) ``<C, Q>``, Eq. 10.
    """

    f: Tensor
    g: Tensor
    converged: Tensor
    iterations: Tensor
    marginal_error: Tensor
    transport_cost: Tensor

    @property
    def remedy(self) -> str:
        """What to change when not everything converged; empty when all did."""
        if bool(self.converged.all()):
            return ""
        worst = float(self.marginal_error.max())
        return f"worst marginal error {worst:.1e}: raise transport.max_iterations or transport.epsilon"


def plan_from_potentials(cost: Tensor, f: Tensor, g: Tensor, epsilon: float, *, out: Tensor | None = None) -> Tensor:
    """Q = exp((f + g - C) / eps), or any block of it when given blocks of f, g and C.

    Args:
        cost: (..., n, m).
        f: (..., n).
        g: (..., m).
        epsilon: The regularisation that f and g were solved for.
        out: Where the entries are written; new memory if None.

    Returns:
        (..., n, m) entries of the plan; they sum to 1 over the whole problem.
    """
    return torch.add(f.unsqueeze(-1), g.unsqueeze(-2), out=out).sub_(cost).div_(epsilon).exp_()


def sinkhorn(
    cost: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    kernel: Tensor | None = None,
) -> SinkhornResult:
    """Solve one entropic transport problem, or a batch of them.

    Args:
        cost: (..., n, m), float32 or float64; the arithmetic is done in its dtype. Float32 holds plans to 1e-5
            relative down to eps 0.02 for costs of order one; pass float64 below.
        epsilon: Regularisation, in the cost's units.
        a: (n,) positive row marginals of sum 1; uniform 1/n if None.
        b: (m,) positive column marginals of sum 1; uniform 1/m if None.
        max_iterations: Most sweeps.
        tolerance: Stop when the largest marginal violation *relative to the marginal's entry* is below it.
            After a sweep the rows hold exactly (to rounding), so the columns are the ones looked at.
        kernel: Memory of the cost's shape, dtype and device to work in, for whoever solves many; new if None.

    Returns:
        A result whose ``converged`` says whether the tolerance was met; a problem that did not converge still
        gives the best potentials found.

    Raises:
        TransportError: eps not positive, an empty or not-finite cost, or marginals that do not fit it.
    """
    _check(cost, epsilon)
    n, m = cost.shape[-2:]
    row_marginal = _marginal(a, n, cost, "a")
    column_marginal = _marginal(b, m, cost, "b")
    f, g, is_safe = _start(cost, epsilon)
    kernel = plan_from_potentials(cost, f, g, epsilon, out=kernel)
    batch = cost.shape[:-2]
    u = row_marginal.expand(*batch, n)
    v = torch.ones(*batch, m, dtype=cost.dtype, device=cost.device)
    # The rows are not met yet, so the first error is unknown: infinite, not zero.
    error = torch.full(batch, math.inf, dtype=cost.dtype, device=cost.device)
    done = torch.zeros(batch, dtype=torch.bool, device=cost.device)
    iterations = torch.zeros(batch, dtype=torch.int64, device=cost.device)
    limit = _LOG_RANGE[cost.dtype]
    # To look is to wait for the device. Between two looks u and v must not leave their range: they cannot where the
    # kernel needed no c-transforms, as then they span no more than it does.
    looks_every = _LOOK if cost.device.type != "cpu" and is_safe else 1

    columns = _times(u, kernel)
    for sweep in range(1, max_iterations + 1):
        v = column_marginal / columns
        u = row_marginal / _rows(kernel, v)
        # K^T u serves twice: it measures this sweep's column violation and starts the next sweep.
        columns = _times(u, kernel)
        iterations = iterations + (~done).to(torch.int64)
        error = ((v * columns).sub_(column_marginal).abs_() / column_marginal).amax(-1)
        done = done | (error < tolerance)
        if sweep % looks_every:
            continue
        all_done, is_out_of_range = _look(done, u, v, limit)
        if all_done:
            break
        if is_out_of_range:
            f, g = f + epsilon * u.log(), g + epsilon * v.log()
            kernel = plan_from_potentials(cost, f, g, epsilon, out=kernel)
            u, v = torch.ones_like(u), torch.ones_like(v)
            columns = _times(u, kernel)

    if not bool(torch.isfinite(error).all()):
        raise TransportError(
            f"the transport problem ({n} x {m}, eps {epsilon}) overflowed {cost.dtype}: pass the cost in float64 "
            "or raise transport.epsilon"
        )
    # <C, Q> = u^T (K * C) v, with the kernel's memory reused for the product.
    transport_cost = (u * _rows(kernel.mul_(cost), v)).sum(-1)
    f, g = f + epsilon * u.log(), g + epsilon * v.log()
    return SinkhornResult(f, g, error < tolerance, iterations, error, transport_cost)


def _check(cost: Tensor, epsilon: float) -> None:
    if not epsilon > 0 or not math.isfinite(epsilon):
        raise TransportError(f"epsilon is {epsilon}: the regularisation must be positive; set transport.epsilon")
    if cost.dim() < 2 or cost.numel() == 0:
        raise TransportError(f"a cost of shape {tuple(cost.shape)} has nothing to transport")
    if cost.dtype not in _LOG_RANGE:
        raise TransportError(f"a cost in {cost.dtype} is not solved; pass float32 or float64")
    if not bool(torch.isfinite(cost.sum())) and not bool(torch.isfinite(cost).all()):
        raise TransportError("the cost has entries that are not finite; look for NaN in the features")


def _marginal(weights: Tensor | None, size: int, cost: Tensor, name: str) -> Tensor:
    if weights is None:
        return torch.full((size,), 1.0 / size, dtype=cost.dtype, device=cost.device)
    weights = weights.to(cost)
    if weights.shape != (size,) or not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-5:
        raise TransportError(f"marginal {name} must be {size} positive numbers of sum 1, got {tuple(weights.shape)}")
    return weights


def _start(cost: Tensor, epsilon: float) -> tuple[Tensor, Tensor, bool]:
    """Potentials whose kernel has an entry 1 in every row and column, or constants where none are needed; and that.

    With f_i = min_j C_ij and g_j = min_i (C_ij - f_i) >= 0, every entry of K is at most 1, every column has one
    equal to 1 by g, and so has every row: at its own minimum 0 <= g_j = f_i + g_j - C_ij <= 0.
    """
    low, high = torch.aminmax(cost)
    if float(high - low) / epsilon < _SAFE_SPAN[cost.dtype]:
        f = low.expand(cost.shape[:-1]).clone()
        return f, torch.zeros_like(cost[..., 0, :]), True
    f = cost.amin(-1)
    return f, (cost - f.unsqueeze(-1)).amin(-2), False


def _rows(kernel: Tensor, v: Tensor) -> Tensor:
    """K v: (..., n); long float32 sums in pieces, see `_times`."""
    if kernel.dtype == torch.float32 and kernel.shape[-1] > 2 * _LONG:
        starts = range(0, kernel.shape[-1], _LONG)
        return torch.stack([_rows(kernel[..., at : at + _LONG], v[..., at : at + _LONG]) for at in starts]).sum(0)
    return torch.mv(kernel, v) if kernel.dim() == 2 else torch.matmul(kernel, v.unsqueeze(-1)).squeeze(-1)


def _times(u: Tensor, kernel: Tensor) -> Tensor:
    """K^T u: (..., m).

    In float32 the sums are taken over blocks of rows. One running sum over 4096 rows is good to 3e-6 only, more
    than the tolerance, so the error would never be seen to fall below it; in blocks it is good to 2e-7.
    """
    blocks = kernel.shape[-2] // _BLOCK
    if kernel.dtype != torch.float32 or blocks < 2:
        return torch.mv(kernel.T, u) if kernel.dim() == 2 else torch.matmul(u.unsqueeze(-2), kernel).squeeze(-2)
    whole = blocks * _BLOCK
    parts = u[..., :whole].unflatten(-1, (blocks, 1, _BLOCK))
    columns = torch.matmul(parts, kernel[..., :whole, :].unflatten(-2, (blocks, _BLOCK))).sum(-3).squeeze(-2)
    if whole < kernel.shape[-2]:
        columns += torch.matmul(u[..., whole:].unsqueeze(-2), kernel[..., whole:, :]).squeeze(-2)
    return columns


def _look(done: Tensor, u: Tensor, v: Tensor, limit: float) -> tuple[bool, bool]:
    """Whether all problems are done, and whether a scaling vector's log leaves its range: read at once."""
    ends = torch.stack([end for scaling in (u, v) for end in torch.aminmax(scaling)])
    logs = ends.clamp_min(torch.finfo(ends.dtype).tiny).log_()
    *sizes, all_done = torch.cat([logs, done.all().to(logs.dtype).reshape(1)]).cpu().tolist()
    return bool(all_done), max(map(abs, sizes)) > limit
