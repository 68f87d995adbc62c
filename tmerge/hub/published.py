"""What of a run's folder goes to a repo, and how it is laid out for it."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tmerge.models import ADAPTER_CONFIG
from tmerge.models.checkpoint import LICENCE_FOLDER, is_licence_file, read_config
from tmerge.run import Run

__all__ = ["CARD", "STALE", "left_behind", "published_files", "staged"]

CARD = "README.md"
"""The card's name in a repo."""
# Of tmerge/, what a repo is given; cache/ never goes.
_PUBLISHED = ("recipe.yaml", "report.json", "report.html", "transport.safetensors", "figures")
# What a checkpoint is made of, as transformers writes it; what else lies beside it is not the run's.
_CHECKPOINT = (
    "config.json",
    ADAPTER_CONFIG,
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "emoji.json",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "byte_maps.json",
    "*.jinja",
)
# Folders of a checkpoint: one that transformers writes, and what its sources' licences ask for.
_CHECKPOINT_FOLDERS = ("additional_chat_templates", LICENCE_FOLDER)
STALE = (
    *_CHECKPOINT,
    *(f"{name}/*" for name in _CHECKPOINT_FOLDERS),
    *(f"tmerge/{name}*" for name in ("figures/", "report.html")),
)
"""What an earlier push may have left in a repo, and would be loaded instead of, or beside, what is pushed now."""


def published_files(run: Run, *, plan_only: bool = False) -> dict[str, Path]:
    """Path in the repo -> file, of all that goes: the checkpoint at the top, and of tmerge/ what is to be seen.

    Args:
        run: The run.
        plan_only: Leave out the checkpoint.
    """
    paths = [] if plan_only else _checkpoint(run)
    for name in _PUBLISHED:
        path = run.work / name
        paths += [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return {path.relative_to(run.folder).as_posix(): path for path in paths if path.suffix != ".part"}


def _checkpoint(run: Run) -> list[Path]:
    patterns: tuple[str, ...] = _CHECKPOINT
    config = run.folder / "config.json"
    if config.is_file() and "auto_map" in read_config(config):
        patterns += ("*.py",)  # the model's own code, which transformers saves beside it
    paths = [
        path
        for path in run.folder.iterdir()
        if path.is_file()
        and (is_licence_file(path.name) or any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns))
    ]
    for name in _CHECKPOINT_FOLDERS:
        paths += [inner for inner in (run.folder / name).rglob("*") if inner.is_file()]
    return paths


def left_behind(run: Run, files: Mapping[str, int]) -> list[str]:
    """What lies in the folder and is not pushed, in a line; hidden files and tmerge's own cache go without saying."""
    names = [path.name for path in run.folder.iterdir() if not path.name.startswith(".") and path.name != "tmerge"]
    left = sorted(name for name in names if name not in files and name not in _CHECKPOINT_FOLDERS)
    return [f"not the run's, and not pushed: {', '.join(left)}"] if left else []


@contextmanager
def staged(run: Run, files: Mapping[str, Path], card: str) -> Iterator[Path]:
    """A folder of links to a run's files, with the card for one repo: what `upload_folder` is given."""
    with tempfile.TemporaryDirectory(prefix="tmerge-push-") as name:
        folder = Path(name)
        for inside, path in files.items():
            staged_file = folder / inside
            staged_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.symlink(path.resolve(), staged_file)
            except OSError:  # where links are not allowed
                shutil.copyfile(path, staged_file)
        (folder / CARD).unlink(missing_ok=True)
        (folder / CARD).write_text(card, encoding="utf-8")
        yield folder
