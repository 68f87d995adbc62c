"""What a model's name in a recipe means: a Hub id, a folder, a GGUF file or a demo model.

Parsing asks the file system and nothing else: no network, nothing assembled, nothing hashed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tmerge.errors import CheckpointError, ModelNotFoundError

__all__ = ["DEMO_PREFIX", "ModelReference", "one_line", "trusts"]

DEMO_PREFIX = "demo:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_QUOTED = 300
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class ModelReference:
    """A model, by the name that the user gave it.

    Attributes:
        text: The name as it was given.
        kind: Where it lives. A demo model is a ``gguf`` one whose file comes out of its package.
        repo: Hub id, for ``hub``.
        revision: Branch, tag or commit, for ``hub``, if one was given.
        path: Folder or file. None for ``hub``, and for a demo model, whose package `demo_path` asks.
    """

    text: str
    kind: Literal["hub", "folder", "gguf"]
    repo: str | None = None
    revision: str | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read a reference.

        A folder or file that exists wins over a Hub id of the same spelling.

        Args:
            text: ``user/name``, ``user/name@revision``, a folder, a ``.gguf`` file, or ``demo:NAME``.

        Raises:
            ModelNotFoundError: It looks like a path, and nothing is there; or it is no reference at all.
            CheckpointError: It is a file of another kind than GGUF.
        """
        text = str(text).strip()
        if not text:
            raise ModelNotFoundError("the model reference is empty: give a Hub id, a folder or a .gguf file")
        if text.startswith(DEMO_PREFIX):
            return cls(text, "gguf")
        try:
            text.encode()
            path = Path(text).expanduser()
            if path.is_dir():
                return cls(text, "folder", path=path)
            if path.is_file():
                return cls._file(text, path)
        except (OSError, RuntimeError, UnicodeEncodeError) as error:  # over 255 letters; ~ of nobody; no text
            raise ModelNotFoundError(
                f"{text[:80]!r} is no model: {getattr(error, 'strerror', None) or error}; give a Hub id (user/name), a "
                "folder or a .gguf file"
            ) from None
        if text[0] in "./~\\" or "\\" in text or text.endswith((".gguf", "/")) or path.is_absolute():
            raise ModelNotFoundError(f"{text!r}: no such file or folder; check the path, or give a Hub id (user/name)")
        return cls.parse_repo(text)

    @classmethod
    def parse_repo(cls, text: str) -> ModelReference:
        """Read a reference as a Hub id, whatever is here under its name.

        Raises:
            ModelNotFoundError: It is none.
        """
        text = text.strip()
        repo, at, revision = text.partition("@")
        if not _HUB_ID.fullmatch(repo) or (at and not revision.strip()):
            raise ModelNotFoundError(
                f"{text!r} is neither a folder or .gguf file here nor a Hub id; write user/name or user/name@revision"
            )
        return cls(text, "hub", repo=repo, revision=revision.strip() or None)

    @classmethod
    def _file(cls, text: str, path: Path) -> ModelReference:
        suffix = path.suffix.lower()
        if suffix == ".gguf":
            return cls(text, "gguf", path=path)
        if suffix in _PICKLES:
            raise CheckpointError(
                f"{text!r} is a pickle, which may run any code and is not opened; convert it to safetensors, "
                "and give the folder that holds it"
            )
        if suffix in {".safetensors", ".json"}:
            raise CheckpointError(
                f"{text!r} is one file of a checkpoint; give its folder instead: {str(path.parent)!r}"
            )
        raise CheckpointError(f"{text!r} is not a model file that tmerge reads; give a folder or a .gguf file")

    @property
    def demo(self) -> str | None:
        """Name of the demo model, if it is one."""
        return self.text[len(DEMO_PREFIX) :] if self.text.startswith(DEMO_PREFIX) else None

    @property
    def name(self) -> str:
        """A short name for tables and file names, without the user, the revision or the folders above it."""
        if self.demo is not None:
            return self.demo
        if self.repo is not None:
            return self.repo.rsplit("/", 1)[-1]
        assert self.path is not None
        return self.path.stem if self.kind == "gguf" else self.path.resolve().name

    def __str__(self) -> str:
        return self.text


def trusts(trusted: Iterable[str], reference: str) -> bool:
    """Whether a reference is among those whose repos may run their own code.

    Of a Hub id the revision makes no difference: a recipe that is resolved to commits trusts what it did before. What
    is local is trusted by the very spelling alone.

    Args:
        trusted: The recipe's ``trust_remote_code``.
        reference: One of its models.
    """
    trusted = tuple(trusted)
    repo = _hub_repo(reference)
    return reference in trusted or (repo is not None and any(_hub_repo(name) == repo for name in trusted))


def _hub_repo(text: str) -> str | None:
    try:
        return ModelReference.parse(text).repo
    except (CheckpointError, ModelNotFoundError):
        return None


def one_line(error: BaseException) -> str:
    """Another library's error on one line, to be quoted within one of ours.

    A lone key (KeyError) and an error without words are named by their class too; of more than 300 letters the first
    are quoted.
    """
    said = " ".join(str(error).split())
    if not said or isinstance(error, LookupError):
        said = f"{type(error).__name__}: {said}".rstrip(": ")
    return said if len(said) <= _QUOTED else f"{said[:_QUOTED]}…"
