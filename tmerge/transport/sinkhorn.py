r"""Entropic optimal transport: the potentials of one problem, or of a batch of equal shape.

Given a cost C (n, m) and marginals a (n,), b (m,), find the plan Q >= 0 that minimises

    <C, Q> + eps * sum_ij Q_ij (log(Q_ij / (a_i b_j)) - 1)      with  Q 1 = a,  Q^T 1 = b     (Eq. 8-9)

Its solution is ``Q = exp((f + g - C) / eps)`` with potentials f (n,) and g (m,), unique up to a constant moved
from one to the other. We iterate Sinkhorn's scaling on the kernel

    K = exp((f + g - C) / eps),     v <- v (b / (v K^T u))^w,     u <- u (a / (u K v))^w

and *absorb* u and v into f and g, rebuilding K, whenever they grow past what the dtype holds (Schmitzer 2019,
"Stabilized sparse scaling algorithms", Alg. 2). A start from the c-transforms of C leaves an entry 1 in every
row and column of K, so no sum is ever zero and small eps cannot underflow. The scaling form costs two
matrix-vector products an iteration; the log-sum-exp form, equal in exact arithmetic, would cost two exponentials
of the whole matrix.

With w = 1 that is Sinkhorn's scaling, whose rate of convergence nears 1 as eps falls. With 1 < w < 2 it is overrelaxed
(Thibault, Chizat, Dossal and Papadakis 2021, "Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport"):
near the solution it is successive overrelaxation, whose best factor is w = 2 / (1 + sqrt(1 - r)) for the rate r of
w = 1, and r is told from the rate q that is seen at any w by (q + w - 1)^2 = q w^2 r (Young 1954). So the first sweeps
are plain, and w follows what they show.

K is held in float32 while the tolerance allows: an entry is rounded by 6e-8 of itself, at random, and its sums by
less. They are finished, and u and v are kept, in float64 (but on Apple's GPUs, which have none): so that rounding is
the same from sweep to sweep, and what w does not amplify. The cost and the potentials have one dtype.

Equals ``ot.sinkhorn(a, b, C, eps)`` of POT (``method="sinkhorn_log"`` where eps is small). This file knows nothing
of models: beside torch and the errors it imports the blocks that a cost is worked on by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tmerge.errors import TransportError
from tmerge.transport.cost import row_blocks

__all__ = ["SinkhornResult", "kernel_dtype", "plan_from_potentials", "sinkhorn"]

# exp of this still squares inside the dtype's range, and what K loses to underflow meanwhile stays below rounding.
_LOG_RANGE = {torch.float32: 25.0, torch.float64: 150.0}
# Rows and columns of exp(-C/eps) keep full precision without the c-transforms while C/eps spans less than this.
_SAFE_SPAN = {torch.float32: 30.0, torch.float64: 300.0}
# Sweeps between two looks at a device.
_LOOK = 8
_LOOK_UNSAFE = 4
# Entries summed in one go in float32: down a column (one running sum), and along a row (several side by side).
_BLOCK = 64
_LONG = 512
# A kernel in float32 tells violations from rounding down to here.
_FLOAT32_TOLERANCE = 5e-7
# Sweeps over which their rate is told: the first 2 x 2 are plain, and w is set anew after so many. Its bound.
_RATED = 2
# Steps of so many roundings of the kernel, and larger, tell a rate.
_ROUNDINGS = 10
_MOST = 1.95


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

    @classmethod
    def joined(cls, results: Sequence[SinkhornResult]) -> SinkhornResult:
        """Of all problems of some results in one: a batch of one dimension, on the CPU."""

        def all_of(name: str) -> Tensor:
            values = [getattr(result, name) for result in results]
            # What a problem has one of, and what it has one of for each neuron.
            is_vector = name in ("f", "g")
            return torch.cat([value.reshape(-1, *value.shape[-1:] if is_vector else ()) for value in values]).cpu()

        return cls(*(all_of(field.name) for field in fields(cls)))

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
    if out is None:
        out = torch.empty_like(cost)
    scale = 1 / epsilon
    for rows in row_blocks(cost):
        part = torch.sub(f[..., rows].unsqueeze(-1), cost[..., rows, :]).add_(g.unsqueeze(-2)).mul_(scale)
        written = out[..., rows, :]
        if written.dtype == part.dtype:
            torch.exp(part, out=written)
        else:
            # Rounded when it is exponentiated: a rounded exponent of -20 is 1e-6 of its entry.
            written.copy_(part.exp_())
    return out


def kernel_dtype(cost: torch.dtype, tolerance: float) -> torch.dtype:
    """In which `sinkhorn` holds the kernel of a cost: float32 while that tells such a violation from rounding."""
    return torch.float32 if tolerance >= _FLOAT32_TOLERANCE else cost


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
        cost: (..., n, m), float32 or float64; so are potentials and scalings. Float32 holds plans to 1e-5 relative
            down to eps 0.02 for costs of order one; pass float64 below.
        epsilon: Regularisation, in the cost's units.
        a: (n,) positive row marginals of sum 1; uniform 1/n if None.
        b: (m,) positive column marginals of sum 1; uniform 1/m if None.
        max_iterations: Most sweeps.
        tolerance: Stop when the largest marginal violation *relative to the marginal's entry* is below it. The last
            step is one of the rows, which hold then (to rounding), so the columns are the ones that are looked at.
        kernel: Memory of the cost's shape and device, in `kernel_dtype` or the cost's own, to work in, for whoever
            solves many; new if None.

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
    if kernel is None:
        kernel = torch.empty_like(cost, dtype=kernel_dtype(cost.dtype, tolerance))
    f, g, is_safe = _start(cost, epsilon, kernel.dtype)
    plan_from_potentials(cost, f, g, epsilon, out=kernel)
    batch = cost.shape[:-2]
    exact = cost.dtype if cost.device.type == "mps" else torch.float64
    row_marginal, column_marginal = row_marginal.to(exact), column_marginal.to(exact)
    u = row_marginal.expand(*batch, n)
    v = torch.ones(*batch, m, dtype=exact, device=cost.device)
    done = torch.zeros(batch, dtype=torch.bool, device=cost.device)
    iterations = torch.zeros(batch, dtype=torch.int64, device=cost.device)
    limit = _LOG_RANGE[kernel.dtype]
    looks_every = _looks_every(cost.device, is_safe)
    relaxation = _Relaxation(u, kernel.dtype)
    columns = _times(u, kernel, exact)
    for sweep in range(1, max_iterations + 1):
        # What v should be for u, and u for v: held against what they are, each tells a marginal's violation.
        wanted = column_marginal / columns
        v = relaxation.moved(v, wanted)
        lack = u * _rows(kernel, v, exact) / row_marginal
        violation = lack.sub(1).abs_().amax(-1)
        if relaxation.is_on:
            violation = torch.maximum(violation, (v / wanted).sub_(1).abs_().amax(-1))
        iterations = iterations + (~done).to(torch.int64)
        done = done | (violation < tolerance)
        is_last = sweep == max_iterations
        if is_last or sweep % looks_every == 0:
            all_done, is_out_of_range = _look(done, None if is_safe else (u, v), limit)
            if is_last or (all_done and (looks_every == 1 or not is_out_of_range)):
                break
            if is_out_of_range:
                # What was done by a kernel that may have lost entries is looked at again.
                done = done & (looks_every == 1)
                f, g = _absorbed(f, u, epsilon), _absorbed(g, v, epsilon)
                plan_from_potentials(cost, f, g, epsilon, out=kernel)
                u, v = torch.ones_like(u), torch.ones_like(v)
        relaxation.see(sweep, lack, done)
        u = relaxation.moved(u, u / lack)
        columns = _times(u, kernel, exact)

    # Last a plain step of the rows: they hold, to rounding, whether all converged or not. Where that moved the columns
    # too far, plain sweeps follow.
    while True:
        u = u / lack
        columns = _times(u, kernel, exact)
        error = (v * columns / column_marginal).sub_(1).abs_().amax(-1)
        converged = error < tolerance
        are_finite, have_converged = torch.stack([error.isfinite().all(), converged.all()]).cpu().tolist()
        if not are_finite and kernel.dtype != cost.dtype:
            # What float32 has lost of the kernel was needed: marginals of very different sizes.
            wide = torch.empty_like(cost)
            return sinkhorn(cost, epsilon, a=a, b=b, max_iterations=max_iterations, tolerance=tolerance, kernel=wide)
        if not are_finite:
            raise TransportError(
                f"the transport problem ({n} x {m}, eps {epsilon}) overflowed {cost.dtype}: pass the cost in float64 "
                "or raise transport.epsilon"
            )
        if have_converged or sweep >= max_iterations:
            break
        sweep, iterations = sweep + 1, iterations + (~converged).to(torch.int64)
        v = column_marginal / columns
        lack = u * _rows(kernel, v, exact) / row_marginal
    # <C, Q> = u^T (K * C) v.
    right = v.to(cost.dtype)
    parts = [_product(cost[..., rows, :] * kernel[..., rows, :].to(cost.dtype), right) for rows in row_blocks(cost)]
    transport_cost = (u * torch.cat(parts, -1)).sum(-1).to(cost.dtype)
    f, g = _absorbed(f, u, epsilon), _absorbed(g, v, epsilon)
    return SinkhornResult(f, g, converged, iterations, error.to(cost.dtype), transport_cost)


def _looks_every(device: torch.device, is_safe: bool) -> int:
    """Sweeps between two looks, each of which waits for the device.

    u and v must not leave the range of the kernel's dtype in between. Where the kernel needed no c-transforms they
    never do, as then they span little more than it does. Where it did, the first plain sweep moves them by no more than
    the logarithm of the number of entries, about 8, and none that follows by more than the one before.
    """
    if device.type == "cpu":
        return 1
    return _LOOK if is_safe else _LOOK_UNSAFE


def _absorbed(potential: Tensor, scaling: Tensor, epsilon: float) -> Tensor:
    return (potential + epsilon * scaling.log()).to(potential.dtype)


class _Relaxation:
    """w of each problem of a batch, from how fast its steps shrink."""

    def __init__(self, scaling: Tensor, kernel: torch.dtype) -> None:
        self.is_on = False
        self._rounding = _ROUNDINGS * torch.finfo(kernel).eps
        self._w = torch.ones_like(scaling[..., :1])
        self._size = self._w

    def moved(self, scaling: Tensor, wanted: Tensor) -> Tensor:
        """A scaling a step of w toward what it should be."""
        return scaling * (wanted / scaling).pow_(self._w) if self.is_on else wanted

    def see(self, sweep: int, lack: Tensor, done: Tensor) -> None:
        """Take note of (..., n) by what factor a sweep's rows are too large, and set w anew when it is time.

        Of steps that are nearly rounding no rate is told; and what is done goes on with w = 1, as overrelaxing would
        blow up what is rounding by then.
        """
        if sweep % _RATED:
            return
        size = lack.log().square_().mean(-1, keepdim=True).sqrt_().clamp_min_(torch.finfo(lack.dtype).tiny)
        if sweep % (2 * _RATED) == 0:
            seen, w = (size / self._size).pow_(1 / _RATED), self._w
            plain = (seen + w - 1).square_() / (w.square() * seen)
            best = 2 / (1 + (1 - plain).clamp_min_(1e-9).sqrt_())
            # Where steps grow no rate is told either.
            told = torch.where(seen < 1, best.clamp(1, _MOST), 1 + (w - 1) / 2)
            w = torch.where(size > self._rounding, told, w)
            self._w, self.is_on = torch.where(done.unsqueeze(-1), 1.0, w), True
        self._size = size


def _check(cost: Tensor, epsilon: float) -> None:
    if not epsilon > 0 or not math.isfinite(epsilon):
        raise TransportError(f"epsilon is {epsilon}: the regularisation must be positive; set transport.epsilon")
    if cost.dim() < 2 or cost.numel() == 0:
        raise TransportError(f"a cost of shape {tuple(cost.shape)} has nothing to transport")
    if cost.dtype not in _LOG_RANGE:
        raise TransportError(f"a cost in {cost.dtype} is not solved; pass float32 or float64")


def _marginal(weights: Tensor | None, size: int, cost: Tensor, name: str) -> Tensor:
    if weights is None:
        return torch.full((size,), 1.0 / size, dtype=cost.dtype, device=cost.device)
    weights = weights.to(cost)
    if weights.shape != (size,) or not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-5:
        raise TransportError(f"marginal {name} must be {size} positive numbers of sum 1, got {tuple(weights.shape)}")
    return weights


def _start(cost: Tensor, epsilon: float, kernel: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """Potentials whose kernel has an entry 1 in every row and column, or constants where none are needed; and that.

    With f_i = min_j C_ij and g_j = min_i (C_ij - f_i) >= 0, every entry of K is at most 1, every column has one
    equal to 1 by g, and so has every row: at its own minimum 0 <= g_j = f_i + g_j - C_ij <= 0.
    """
    low, high = torch.stack(torch.aminmax(cost)).tolist()
    if not math.isfinite(high - low):
        raise TransportError("the cost has entries that are not finite; look for NaN in the features")
    if (high - low) / epsilon < _SAFE_SPAN[kernel]:
        return torch.full_like(cost[..., 0], low), torch.zeros_like(cost[..., 0, :]), True
    f = cost.amin(-1)
    least = [(cost[..., rows, :] - f[..., rows].unsqueeze(-1)).amin(-2) for rows in row_blocks(cost)]
    return f, torch.stack(least).amin(0), False


def _rows(kernel: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """K v: (..., n); long float32 sums in pieces, see `_times`."""
    v = v.to(kernel.dtype)
    if kernel.dtype == torch.float32 and kernel.shape[-1] > _LONG:
        starts = range(0, kernel.shape[-1], _LONG)
        pieces = [_product(kernel[..., at : at + _LONG], v[..., at : at + _LONG]) for at in starts]
        return torch.stack(pieces).sum(0, dtype=dtype)
    return _product(kernel, v).to(dtype)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector) if matrix.dim() == 2 else torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)


def _times(u: Tensor, kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """K^T u: (..., m).

    In float32 the sums are taken over blocks of rows. One running sum over 4096 rows is good to 3e-6 only, more
    than the tolerance, so the error would never be seen to fall below it; in blocks it is good to 2e-7.
    """
    u = u.to(kernel.dtype)
    blocks = kernel.shape[-2] // _BLOCK
    if kernel.dtype != torch.float32 or blocks < 2:
        return _product(kernel.mT, u).to(dtype)
    whole = blocks * _BLOCK
    parts = u[..., :whole].unflatten(-1, (blocks, 1, _BLOCK))
    products = torch.matmul(parts, kernel[..., :whole, :].unflatten(-2, (blocks, _BLOCK)))
    columns = products.squeeze(-2).sum(-2, dtype=dtype)
    if whole < kernel.shape[-2]:
        columns += _product(kernel[..., whole:, :].mT, u[..., whole:])
    return columns


def _look(done: Tensor, scalings: tuple[Tensor, Tensor] | None, limit: float) -> tuple[bool, bool]:
    """Whether all problems are done, and whether a scaling vector's log leaves its range: read at once."""
    if scalings is None:
        return bool(done.all()), False
    ends = torch.stack([end for scaling in scalings for end in torch.aminmax(scaling)])
    logs = ends.clamp_min(torch.finfo(ends.dtype).tiny).log_()
    *sizes, all_done = torch.cat([logs, done.all().to(logs.dtype).reshape(1)]).cpu().tolist()
    return bool(all_done), max(map(abs, sizes)) > limit
