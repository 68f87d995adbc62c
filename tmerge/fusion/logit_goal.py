r"""The goal of the last block: the stream with which the target's own head gives the source's logits.

A target that has but a part of the stream's neurons cannot have the source's logits by having the source's stream in
those that it has: what the others would add to a logit is lacking. So the last goal is found behind the head. With F
(V, n) the target's head times its last norm's gain, z the source's logits at a token and c the stream that the
correspondence gives, in units of the source's root mean square,

    y = argmin  sum_v w_v ((F y)_v - z_v - mean)^2 + epsilon m |y - c|^2    of all y whose root mean square is 1
      = (A + (epsilon m + mu) I)^-1 (F^T D z + epsilon m c),      A = F^T D F,    m = mean(diag A)

where D weights each token of the vocabulary by how often it was read, and the weighted mean over the vocabulary, which
no probability depends on, is taken off both sides. The target's norm divides by y's root mean square, so it has to be
1: mu, one number for each token, sees to it. As ``F^T D z`` needs no logits but ``F^T D`` times its head, a goal costs
three products of (n, n') a token. Directions of the stream that no logit depends on stay near c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tmerge.models import LastNorm, Readout
from tmerge.processes import ALONE, Processes

__all__ = ["FinalGoal", "LogitGoal"]

FinalGoal = Literal["logits", "stream"]
"""What the last block is fitted to."""

# epsilon: no logit to speak of is held back, and no direction that none depends on is moved.
_HELD = 1e-3
# Of a read token, what every token of the vocabulary counts beside: those that were not read have logits too.
_UNREAD = 0.01
# Of what holds the weakest direction back without mu, what mu leaves at least, so that nothing is divided by 0.
_LEAST = 1e-6
# Of the interval that mu lies in.
_HALVINGS = 40
# Rows of the heads that are multiplied at once.
_TOKENS = 8192


@dataclass(frozen=True)
class LogitGoal:
    """``A`` by its eigenvectors, and what the goals are made of.

    Attributes:
        target: The target's last norm.
        source: The source's.
        values: (n,) eigenvalues of ``A + epsilon m I``, float64.
        vectors: (n, n) their eigenvectors, as columns.
        held: epsilon m.
        from_source: (n, n') ``F^T D`` times the source's head and gain.
        toward: (n,) ``F^T D`` of what the heads' biases and the norms' shifts differ by.
    """

    target: LastNorm
    source: LastNorm
    values: Tensor
    vectors: Tensor
    held: float
    from_source: Tensor
    toward: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, target: Readout, source: Readout, vocabulary: Tensor, counts: Tensor, processes: Processes = ALONE
    ) -> LogitGoal:
        """Solve what is the same for all tokens.

        Args:
            target: Its last norm and head.
            source: The source's.
            vocabulary: (2, v) ids in the target and in the source of the tokens that both have.
            counts: (V,) how often each of the target's tokens was read.
            processes: That share the vocabulary out among them.
        """
        known = (vocabulary[0] < len(target.head)) & (vocabulary[1] < len(source.head))
        target_ids, source_ids = vocabulary[:, known]
        weights = counts[target_ids].double() + _UNREAD
        weights = weights / weights.sum()
        gram, cross, constant = (
            total.cpu() for total in _sums(target, source, target_ids, source_ids, weights, processes)
        )
        held = _HELD * float(gram.diagonal().mean())
        values, vectors = torch.linalg.eigh(gram)
        return cls(target.norm, source.norm, values.clamp_min(0) + held, vectors, held, cross.float(), constant.float())

    def stream(self, carried: Tensor, hidden: Tensor) -> Tensor:
        """The goals of some tokens.

        Args:
            carried: (r, n) what the correspondence gives.
            hidden: (r, n') the source's stream behind its last block.

        Returns:
            (r, n).
        """
        hidden = hidden.cpu().float()
        size = self.source.size(hidden)
        now = self.target.centred(carried) / size
        right = self.toward + (self.source.centred(hidden) / size) @ self.from_source.T + self.held * now
        spread = right.double() @ self.vectors
        goals = (spread / (self.values + self._multipliers(spread))) @ self.vectors.T
        return goals.float() * size

    def _multipliers(self, spread: Tensor) -> Tensor:
        """(r, 1) mu, of right sides (r, n) in the eigenvectors' basis: by bisection, as the size falls with mu."""
        least, count = float(self.values.min()), spread.shape[1]
        low = torch.full((len(spread), 1), -(1 - _LEAST) * least, dtype=spread.dtype)
        high = torch.maximum(spread.norm(dim=1, keepdim=True) / count**0.5 - least, low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            large = (spread / (self.values + middle)).square().sum(1, keepdim=True) > count
            low, high = torch.where(large, middle, low), torch.where(large, high, middle)
        return (low + high) / 2


def _sums(
    target: Readout, source: Readout, target_ids: Tensor, source_ids: Tensor, weights: Tensor, processes: Processes
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, n) ``F^T D F``, (n, n') ``F^T D`` of the source's and (n,) of the constants, means taken off; float64, there.

    Float32 products of some rows each are summed in float64.
    """
    device = target.head.device
    there = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    # One column of ones before each side: the weighted means come with the products.
    width, source_width = target.head.shape[1], source.head.shape[1]
    sums = torch.zeros(width + 1, width + source_width + 2, dtype=torch.float64, device=there)
    for start in processes.mine(range(0, len(target_ids), _TOKENS)):
        target_tokens, source_tokens = (
            target_ids[start : start + _TOKENS].to(device),
            source_ids[start : start + _TOKENS],
        )
        target_rows = target.scale * target.head[target_tokens].float()
        source_rows = source.scale * source.head[source_tokens.to(source.head.device)].float()
        constant = source_rows @ source.norm.shift.to(source_rows) - (
            target_rows @ target.norm.shift.to(target_rows)
        ).to(source_rows.device)
        if source.head_bias is not None:
            constant = constant + source.scale * source.head_bias[source_tokens.to(source_rows.device)].float()
        if target.head_bias is not None:
            constant = constant - (target.scale * target.head_bias[target_tokens].float()).to(source_rows.device)
        ones = torch.ones(len(target_tokens), 1, device=device)
        left = torch.cat([target.norm.centred(target_rows * target.norm.gain.to(target_rows)), ones], 1)
        right = torch.cat(
            [(source_rows * source.norm.gain.to(source_rows)).to(device), constant.to(device)[:, None]], 1
        )
        by = weights[start : start + _TOKENS].float().to(device)[:, None]
        sums += ((left * by).T @ torch.cat([left, right], 1)).to(there).double()
    processes.summed(sums)
    means = sums[-1]
    centred = sums[:-1] - torch.outer(sums[:-1, width], means)
    return centred[:, :width], centred[:, width + 1 : width + 1 + source_width], centred[:, -1]
