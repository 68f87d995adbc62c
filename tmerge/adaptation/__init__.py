"""Training on top of a merge: the frozen residual, next tokens, and distillation across tokenizers."""

from __future__ import annotations

from tmerge.adaptation.goals import FeatureGoals, feature_goals, refuse_token_rows
from tmerge.adaptation.kept import last_checkpoint, teacher_path
from tmerge.adaptation.residual import attach_residual, fold_residual
from tmerge.adaptation.training import AdaptationReport, adapt, text_order, training_libraries

__all__ = [
    "AdaptationReport",
    "FeatureGoals",
    "adapt",
    "attach_residual",
    "feature_goals",
    "fold_residual",
    "last_checkpoint",
    "refuse_token_rows",
    "teacher_path",
    "text_order",
    "training_libraries",
]
