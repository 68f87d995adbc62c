"""Training on top of a merge: the frozen residual, next tokens, and distillation across tokenizers."""

from __future__ import annotations

from tmerge.adaptation.residual import attach_residual, fold_residual
from tmerge.adaptation.training import AdaptationReport, adapt, text_order

__all__ = ["AdaptationReport", "adapt", "attach_residual", "fold_residual", "text_order"]
