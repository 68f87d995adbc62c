r"""What a linear sublayer should be changed by, in closed form: ridge regression of what it lacks on what it reads.

For inputs X (R, in), a weight W (out, in) and the outputs Y (R, out) that it should give,

    dW = argmin |X (W + dW)^T - Y|^2 + lambda m |dW|^2,      m = mean(diag(X^T X)),

solved from the normal equations ``(X^T X + lambda m I) dW^T = X^T (Y - X W^T)``, which are summed over batches: nothing
that grows with R is held. Rows may be weighted. A bias is one more input that is always 1, and is not held back by
lambda.

At most rank r: of all dW of that rank, the least of the same objective is the full solution projected onto the leading
r right singular vectors of ``[X; sqrt(lambda m) I] dW^T`` (reduced-rank regression; Mukherjee and Zhu 2011, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmerge.errors import FusionError

__all__ = ["Fit", "Regression"]


@dataclass(frozen=True)
class Fit:
    """A solved change.

    Attributes:
        weight: (out, in) dW, float32.
        bias: (out,) of the bias; None where there is none.
        before: ``|E|^2 / |Y|^2`` of the lack E = Y - X W^T, weighted; None where Y is zero.
        after: The same once the weight is changed.
    """

    weight: Tensor
    bias: Tensor | None
    before: float | None
    after: float | None


class Regression:
    """The sums of one sublayer's normal equations.

    Args:
        inputs: in.
        outputs: out.
        has_bias: Whether a bias is fitted too.
        device: Where the sums are kept.
    """

    def __init__(self, inputs: int, outputs: int, *, has_bias: bool, device: torch.device | None = None) -> None:
        self._inputs, self._has_bias = inputs, has_bias
        size = inputs + has_bias
        self._gram = torch.zeros(size, size, device=device)
        self._cross = torch.zeros(size, outputs, device=device)
        self._lack = self._wanted = 0.0
        self.rows = 0

    def add(self, inputs: Tensor, lack: Tensor, wanted: Tensor, weights: Tensor | None = None) -> None:
        """Add some rows.

        Args:
            inputs: (r, in) of X.
            lack: (r, out) of Y - X W^T - b.
            wanted: (r, out) of Y, for the errors alone.
            weights: (r,) that rows of X, Y and the bias's input are multiplied by; 1 if None.
        """
        inputs, lack, wanted = inputs.float(), lack.float(), wanted.float()
        if self._has_bias:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        if weights is not None:
            column = weights.float().unsqueeze(1)
            inputs, lack, wanted = inputs * column, lack * column, wanted * column
        self._gram.addmm_(inputs.T, inputs)
        self._cross.addmm_(inputs.T, lack)
        self._lack += float(lack.square().sum())
        self._wanted += float(wanted.square().sum())
        self.rows += len(inputs)

    def solve(self, ridge: float, rank: int | None = None) -> Fit:
        """The change.

        Args:
            ridge: lambda, in units of the inputs' mean square.
            rank: Most of dW; full if None.

        Raises:
            FusionError: The equations have no single solution.
        """
        device = torch.device("cpu") if self._gram.device.type == "mps" else self._gram.device  # it has no float64
        gram, cross = self._gram.to(device).double(), self._cross.to(device).double()
        if not bool(torch.isfinite(gram).all()) or not bool(torch.isfinite(cross).all()):
            raise FusionError(
                "the reconstruction's activations are not finite; set dtype: float32, and look for damaged weights"
            )
        diagonal = gram.diagonal()
        if not bool((diagonal[: self._inputs] > 0).any()):
            # Nothing is read, so that no weight changes anything; a bias is the mean of what lacks.
            gram.diagonal()[: self._inputs] += 1.0
        held = ridge * float(diagonal[: self._inputs].mean())
        regular = gram.clone()
        regular.diagonal()[: self._inputs] += held
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
            raise FusionError(
                f"the reconstruction's equations of {self._inputs} inputs and {self.rows} rows have no single "
                "solution: raise fusion.ridge, or give more texts"
            )
        change = torch.cholesky_solve(cross, factor)
        if rank is not None and rank < min(self._inputs, cross.shape[1]):
            change = self._of_rank(change, regular, rank)
        left = self._lack - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())
        before, after = (None if not self._wanted else max(0.0, value) / self._wanted for value in (self._lack, left))
        weight = change[: self._inputs].T.float().contiguous()
        return Fit(weight, change[self._inputs].float() if self._has_bias else None, before, after)

    def _of_rank(self, change: Tensor, regular: Tensor, rank: int) -> Tensor:
        # What a bias gives is of rank 1 by itself; it stays whole, as only the weight's rank is asked for.
        fitted = change.T @ regular @ change if not self._has_bias else self._without_bias(change, regular)
        _, vectors = torch.linalg.eigh(fitted)
        leading = vectors[:, -rank:]
        reduced = change.clone()
        reduced[: self._inputs] = change[: self._inputs] @ leading @ leading.T
        if self._has_bias:
            # The best bias beside the reduced weight.
            row, corner = regular[-1, :-1], regular[-1, -1]
            lost = change[:-1] - reduced[:-1]
            reduced[-1] = change[-1] + (row @ lost) / corner
        return reduced

    def _without_bias(self, change: Tensor, regular: Tensor) -> Tensor:
        """``dW S dW^T`` with S the inputs' Gram matrix about their mean: a bias takes the mean's part."""
        row, corner = regular[-1, :-1], regular[-1, -1]
        centred = regular[:-1, :-1] - torch.outer(row, row) / corner
        return change[:-1].T @ centred @ change[:-1]
