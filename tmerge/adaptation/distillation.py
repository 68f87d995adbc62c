"""Distillation between models of different tokenizers.

Both models read the same text. Where a token of the one and a token of the other end at the same character, both
predict what follows the same string; and while the target writes, piece by piece, what is one token to the source,
that prediction of the source's goes on telling what comes next (`tmerge.adaptation.pieces`). With q the source's
distribution over the target's tokens at such a position, m <= 1 the share of the source's belief that it tells, and p
the target's own,

    loss = cross-entropy + weight * sum over positions of m KL(q || p) / number of tokens

``distill_loss: first-piece`` is the same without the positions within the source's tokens. ``uld`` is the universal
logit distillation of trl's GOLD (arXiv 2402.12030): where both end a token, the L1 distance of both distributions
sorted by size, which needs no carrying and knows no words. What each gives is measured in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tmerge.adaptation.teacher import Teacher
from tmerge.recipe import AdaptationSettings

__all__ = ["distillation_loss"]


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    texts: Sequence[int],
    settings: AdaptationSettings,
    items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy plus what the teacher says.

    Args:
        logits: (B, S, V) of the target.
        labels: (B, S), -100 where nothing is asked.
        teacher: Its predictions.
        texts: Which text each row is.
        settings: Weight and kind of the second term.
        items: Tokens of all passes of this step, for accumulation; the batch's own when None.
    """
    asked = labels[:, 1:]
    # Listed on the CPU: a device would have to be waited for at each step further down.
    mask = asked.cpu() != -100
    rows, columns = mask.nonzero(as_tuple=True)
    at = rows.to(logits.device), columns.to(logits.device)
    # Indexed once: under autograd each further selection would allocate a gradient as large as all logits.
    chosen = logits[at].float()
    count = len(rows) if items is None else torch.as_tensor(items, device=logits.device)
    loss = functional.cross_entropy(chosen, asked[at], reduction="sum")
    where = torch.full(mask.shape, -1, dtype=torch.int64)
    where[rows, columns] = torch.arange(len(rows))
    picked, known = [], []
    for row, text in enumerate(texts):
        first, last = int(teacher.starts[text]), int(teacher.starts[text + 1])
        positions = teacher.positions[first:last]
        inside = positions < mask.shape[1]
        slot = where[row, positions[inside]]
        picked.append(slot[slot >= 0])
        known.append(torch.arange(first, last)[inside][slot >= 0])
    index, entries = torch.cat(picked), torch.cat(known)
    if len(index):
        ids, chances = (part.to(logits.device) for part in teacher.at(entries))
        student = chosen[index.to(logits.device)]
        loss = loss + settings.distill_weight * _divergence(student, ids, chances, settings.distill_loss)
    return loss / count


def _divergence(student: Tensor, ids: Tensor, chances: Tensor, kind: str) -> Tensor:
    """Summed over rows: m KL(q || p), or the sorted L1 distance. Chances are m q."""
    if kind == "uld":
        own = functional.softmax(student, -1).topk(min(ids.shape[1], student.shape[1]), -1).values
        return (own - chances[:, : own.shape[1]]).abs().sum()
    logs = functional.log_softmax(student, -1).gather(1, ids.clamp(min=0))
    held = chances.sum(1)
    return (torch.xlogy(chances, chances) - chances * logs).sum() - torch.xlogy(held, held).sum()
