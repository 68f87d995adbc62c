r"""What linear sublayers should be changed by, in closed form: ridge regression of what they lack on what they read.

For inputs X (R, in), a weight W (out, in) and the outputs Y (R, out) that it should give,

    dW = argmin |X (W + dW)^T - Y|^2 + lambda m |dW|^2,      m = mean(diag(X^T X)),

solved from the normal equations ``(G + lambda m I) dW^T = X^T Y - G W^T`` with ``G = X^T X``, which are summed over
batches: nothing that grows with R is held. Sublayers that read the same X share G and its factor. Rows may be weighted.
A bias is one more input that is always 1, and is not held back by lambda. Of several lambdas each sublayer takes
the one whose change does best on rows that were kept from it, which are summed likewise.

At most rank r: of all dW of that rank, the least of the same objective is the full solution projected onto the leading
r right singular vectors of ``[X; sqrt(lambda m) I] dW^T`` (reduced-rank regression; Mukherjee and Zhu 2011, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmerge.errors import FusionError
from tmerge.processes import ALONE, Processes

__all__ = ["Fit", "Linear", "Regression"]


@dataclass(frozen=True)
class Linear:
    """What a sublayer gives now: ``X weight^T + bias``.

    Attributes:
        weight: (out, in) W.
        bias: (out,); None where it has none, and none is fitted.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """A solved change.

    Attributes:
        weight: (out, in) dW, float32.
        bias: (out,) of the bias; None where there is none.
        before: ``|E|^2 / |Y|^2`` of the lack E = Y - X W^T, weighted; None where Y is zero.
        after: The same once the weight is changed.
        ridge: The lambda that was taken.
    """

    weight: Tensor
    bias: Tensor | None
    before: float | None
    after: float | None
    ridge: float


class Regression:
    """The sums of the normal equations of sublayers that read the same.

    Args:
        inputs: in.
        outputs: out of each sublayer.
        has_bias: Whether any has a bias.
        device: Where the sums are kept.
    """

    def __init__(
        self, inputs: int, outputs: Sequence[int], *, has_bias: bool, device: torch.device | None = None
    ) -> None:
        self._inputs, self._has_bias = inputs, has_bias
        size = inputs + has_bias
        self._gram = torch.zeros(size, size, device=device)
        self._crosses = [torch.zeros(size, count, device=device) for count in outputs]
        # There too, as to read them a device would have to be waited for at each batch.
        self._squares = torch.zeros(len(outputs), dtype=_widest(self._gram.device), device=device)
        self.rows = 0

    def add(self, inputs: Tensor, wanted: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add some rows.

        Args:
            inputs: (r, in) of X.
            wanted: (r, out) of Y, for each sublayer.
            weights: (r,) that rows of X, Y and the bias's input are multiplied by; 1 if None.
        """
        inputs = inputs.float()
        if self._has_bias:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        column = None if weights is None else weights.float().unsqueeze(1)
        if column is not None:
            inputs = inputs * column
        self._gram.addmm_(inputs.T, inputs)
        for index, goal in enumerate(wanted):
            goal = goal.float() if column is None else goal.float() * column
            self._crosses[index].addmm_(inputs.T, goal)
            self._squares[index] += goal.square().sum()
        self.rows += len(inputs)

    def add_others(self, processes: Processes) -> None:
        """Add the rows that the other processes have added to theirs; all have the same sums then."""
        counts = torch.tensor([*self._squares.tolist(), self.rows], dtype=torch.float64)
        processes.summed(self._gram, *self._crosses, counts)
        self._squares, self.rows = counts[:-1].to(self._squares.dtype).to(self._squares.device), int(counts[-1])

    def solve(
        self,
        given: Sequence[Linear],
        ridges: Sequence[float],
        rank: int | None = None,
        *,
        kept_away: Regression | None = None,
        processes: Processes = ALONE,
    ) -> list[Fit]:
        """The change of each sublayer; the sums are of no use afterwards.

        Args:
            given: What each gives now.
            ridges: Each a lambda, in units of the inputs' mean square.
            rank: Most of each dW; full if None.
            kept_away: Sums over other rows, on which each sublayer's lambda is chosen; without any it is the largest.
            processes: That have the same sums, and share the lambdas out among them.

        Raises:
            FusionError: The equations have no single solution with any of them, or something is not finite.
        """
        chosen = kept_away if kept_away is not None and kept_away.rows else None
        tried = list(enumerate(ridges if chosen is not None else [max(ridges)]))
        fits = _best_of_all(self._tried(given, processes.mine(tried), rank, chosen), processes)
        if len(fits) < len(given):
            size_words = f"{self._inputs} inputs and {self.rows} rows"
            raise FusionError(
                f"the reconstruction's equations of {size_words} have no single solution: raise fusion.ridge "
                "(fusion.ridges, where it is auto), or give more texts"
            )
        return fits

    def _tried(
        self, given: Sequence[Linear], ridges: Sequence[tuple[int, float]], rank: int | None, chosen: Regression | None
    ) -> list[_Tried | None]:
        """The best fit of each sublayer with some lambdas, which are numbered; None where none has a solution."""
        best: list[_Tried | None] = [None] * len(given)
        if not ridges:
            return best
        is_wide = _widest(self._gram.device) == torch.float64
        device = self._gram.device if is_wide else torch.device("cpu")
        gram = self._gram.to(device).double()
        del self._gram
        crosses = [cross.to(device).double() for cross in self._crosses]
        lacking = [_Lack.of(gram, layer, cross) for layer, cross in zip(given, crosses, strict=True)]
        squares = self._squares.tolist()
        for number, ridge in ridges:
            equations: dict[bool, _Equations | None] = {}
            for index, layer in enumerate(given):
                biased = layer.bias is not None
                size = self._inputs + biased
                if biased not in equations:
                    equations[biased] = _Equations.of(gram[:size, :size], self._inputs, ridge)
                solvable = equations[biased]
                if solvable is None:
                    continue  # another lambda may do
                fit = solvable.fit(layer, lacking[index], squares[index], rank)
                left = 0.0 if chosen is None else chosen._left(index, layer, fit)
                best_so_far = best[index]
                if best_so_far is None or left < best_so_far.left:
                    best[index] = _Tried(left, number, fit)
        return best

    def _left(self, index: int, layer: Linear, fit: Fit) -> float:
        """``|Y - X (W + dW)^T|^2`` of these rows, less ``|Y|^2``, which is the same for every fit."""
        device = self._gram.device
        now = (layer.weight.to(device).float() + fit.weight.to(device)).T
        if layer.bias is not None and fit.bias is not None:
            now = torch.cat([now, (layer.bias.to(device).float() + fit.bias.to(device))[None]])
        gram, cross = self._gram[: len(now), : len(now)], self._crosses[index][: len(now)]
        left = float((now * (gram @ now - 2 * cross)).sum())
        if not math.isfinite(left):
            raise _not_finite()
        return left


@dataclass(frozen=True)
class _Tried:
    """What one lambda, by its number, gives: the fit, and what it leaves on the rows that are kept from it."""

    left: float
    number: int
    fit: Fit


def _best_of_all(best: Sequence[_Tried | None], processes: Processes) -> list[Fit]:
    """Of each sublayer the best of what the processes found, in all of them the same; none where none found any."""
    offers = processes.gathered([None if found is None else (found.left, found.number) for found in best])
    takers = []
    for index in range(len(best)):
        found = [(offer, rank) for rank, of_one in enumerate(offers) if (offer := of_one[index]) is not None]
        takers += [min(found)[1]] if found else []
    if len(takers) < len(best):
        return []
    mine = [
        replace(found.fit, weight=found.fit.weight.cpu(), bias=None if found.fit.bias is None else found.fit.bias.cpu())
        if found is not None and taker == processes.rank
        else None
        for found, taker in zip(best, takers, strict=True)
    ]
    fits = processes.gathered(mine)
    return [fit for index, taker in enumerate(takers) if (fit := fits[taker][index]) is not None]


@dataclass(frozen=True)
class _Lack:
    """What a sublayer lacks, whatever lambda is: ``X^T (Y - X W^T)``, and ``|Y - X W^T|^2 - |Y|^2``."""

    cross: Tensor
    square: float

    @classmethod
    def of(cls, gram: Tensor, layer: Linear, cross: Tensor) -> _Lack:
        """Of the sums ``cross = X^T Y`` (in, out)."""
        # The device first: one without float64 cannot widen what it hands over either.
        now = layer.weight.to(cross.device).to(cross.dtype).T
        if layer.bias is not None:
            now = torch.cat([now, layer.bias.to(cross.device).to(cross.dtype)[None]])
        cross = cross[: len(now)]
        if not bool(torch.isfinite(cross).all()):
            raise _not_finite()
        lack = cross - gram[: len(now), : len(now)] @ now
        return cls(lack, -float((now * (cross + lack)).sum()))


@dataclass(frozen=True)
class _Equations:
    """``G``, ``G + lambda m I`` and its Cholesky factor; G has one more row and column where a bias is fitted."""

    gram: Tensor
    regular: Tensor
    factor: Tensor
    inputs: int
    ridge: float
    held: float

    @classmethod
    def of(cls, gram: Tensor, inputs: int, ridge: float) -> _Equations | None:
        """None where they have no single solution."""
        if not bool(torch.isfinite(gram).all()):
            raise _not_finite()
        diagonal = gram.diagonal()[:inputs]
        held = ridge * float(diagonal.mean())
        # Where nothing is read no weight changes anything; a bias is the mean of what lacks.
        held = held if bool((diagonal > 0).any()) else 1.0
        regular = gram.clone()
        regular.diagonal()[:inputs] += held
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
            return None
        return cls(gram, regular, factor, inputs, ridge, held)

    def fit(self, layer: Linear, lack: _Lack, square: float, rank: int | None) -> Fit:
        """What takes from a lack as much as can be taken; ``square = |Y|^2``."""
        change = torch.cholesky_solve(lack.cross, self.factor)
        if rank is not None and rank < min(self.inputs, change.shape[1]):
            change = self._of_rank(change, rank)
            made = self.gram @ change
        else:
            # As the equations say, without a product: G dW^T is what lacks, less lambda m dW^T.
            made = lack.cross.clone()
            made[: self.inputs] -= self.held * change[: self.inputs]
        # |Y - X W^T|^2, and what the change takes from it.
        before = square + lack.square
        after = before - float((change * (2 * lack.cross - made)).sum())
        lacks, left = (None if not square else max(0.0, value) / square for value in (before, after))
        bias = None if layer.bias is None else change[self.inputs].float()
        return Fit(change[: self.inputs].T.float().contiguous(), bias, lacks, left, self.ridge)

    def _of_rank(self, change: Tensor, rank: int) -> Tensor:
        weight, inner = change[: self.inputs], self.regular
        if self.has_bias:
            # The inputs' Gram matrix about their mean: the bias, which stays whole, takes the mean's part.
            row, corner = self.regular[-1, :-1], self.regular[-1, -1]
            inner = self.regular[:-1, :-1] - torch.outer(row, row) / corner
        leading = _leading(inner, weight, rank)
        reduced = change.clone()
        reduced[: self.inputs] = weight @ leading @ leading.T
        if self.has_bias:
            # The best bias beside the reduced weight.
            reduced[-1] = change[-1] + (row @ (weight - reduced[: self.inputs])) / corner
        return reduced

    @property
    def has_bias(self) -> bool:
        return len(self.gram) > self.inputs


def _leading(inner: Tensor, weight: Tensor, rank: int) -> Tensor:
    """(out, r) leading right singular vectors of ``S^(1/2) C``, S (in, in) positive definite and C (in, out)."""
    if weight.shape[1] <= weight.shape[0]:
        return torch.linalg.eigh(weight.T @ inner @ weight)[1][:, -rank:]
    # The smaller eigenproblem, of ``L^T C C^T L`` with S = L L^T.
    half = torch.linalg.cholesky(inner).T @ weight
    values, vectors = torch.linalg.eigh(half @ half.T)
    return half.T @ (vectors[:, -rank:] * values[-rank:].clamp_min(torch.finfo(values.dtype).tiny).rsqrt())


def _widest(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _not_finite() -> FusionError:
    return FusionError(
        "the reconstruction's activations are not finite; set dtype: float32, and look for damaged weights"
    )
