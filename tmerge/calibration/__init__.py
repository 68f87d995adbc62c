"""Calibration: which texts are read, and the features that both models have on them."""

from __future__ import annotations

from tmerge.calibration.batches import batch_limit, encode, length_batches, padded, token_limit
from tmerge.calibration.capture import CaptureReport, bare_forward, capture
from tmerge.calibration.features import FeatureStore, FeatureWriter
from tmerge.calibration.identity import DatasetRecord, dataset_identity, file_identity, pinned
from tmerge.calibration.positions import Span, common_ends, complete_ends, token_positions
from tmerge.calibration.room import Room, padded_tokens, run_batches
from tmerge.calibration.samples import SAMPLES_PREFIX, sample_language_code, sample_languages, sample_texts
from tmerge.calibration.texts import TextSet, is_held_out, normalise, of_another, other_texts, read_texts, text_digest

__all__ = [
    "SAMPLES_PREFIX",
    "CaptureReport",
    "DatasetRecord",
    "FeatureStore",
    "FeatureWriter",
    "Room",
    "Span",
    "TextSet",
    "bare_forward",
    "batch_limit",
    "capture",
    "common_ends",
    "complete_ends",
    "dataset_identity",
    "encode",
    "file_identity",
    "is_held_out",
    "length_batches",
    "normalise",
    "of_another",
    "other_texts",
    "padded",
    "padded_tokens",
    "pinned",
    "read_texts",
    "run_batches",
    "sample_language_code",
    "sample_languages",
    "sample_texts",
    "token_limit",
    "token_positions",
    "text_digest",
]
