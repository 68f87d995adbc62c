"""What a training keeps in its work folder while it lasts, which the same training goes on from."""

from __future__ import annotations

from pathlib import Path

__all__ = ["last_checkpoint", "teacher_path"]


def last_checkpoint(work: Path) -> Path | None:
    """The folder of the last of the trainer's checkpoints that was written whole; None where there is none."""
    states = sorted(work.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return states[-1].parent if states else None


def teacher_path(work: Path) -> Path:
    """Of what the source predicts on the texts: there once all of it has been read."""
    return work / "teacher.safetensors"
