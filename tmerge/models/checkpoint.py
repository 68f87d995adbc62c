"""A checkpoint's files in a folder: which they are, whether they are whole, and what identifies them.

Only safetensors are opened, and of these the headers, so that a truncated file is an error with its name in it before
any memory is taken for its weights.
"""

from __future__ import annotations

import hashlib
import re
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import TensorInfo

from tmerge.documents import parse_json
from tmerge.errors import CheckpointError

__all__ = [
    "INDEX_FILE",
    "LICENCE_FOLDER",
    "SETTINGS_FILES",
    "TOKENIZER_FILES",
    "WEIGHTS_FILE",
    "StoredTensor",
    "card_licence",
    "explain_no_safetensors",
    "file_digest",
    "folder_digest",
    "folder_licence",
    "is_licence_file",
    "is_tokenizer_file",
    "licence_names",
    "read_config",
    "read_headers",
    "read_index",
    "read_safetensors_header",
    "tokenizer_files",
    "weight_files",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Any one of them is a tokenizer; transformers makes an empty one without a word where there is none.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
SETTINGS_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Small JSON files beside config.json, each an object."""

# Files beside these that change what the tokenizer does.
_TOKENIZER_SETTINGS = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name is a tokenizer's, or changes what one does."""
    return name in TOKENIZER_FILES or name in _TOKENIZER_SETTINGS


# As texts are named: nothing that takes room.
_LICENCE = re.compile(
    r"(\w+[-_])?(licen[cs]es?|notice|terms|(acceptable_)?(use|usage)_policy|copying|copyright)([-_]\w+)*"
    r"(\.(txt|md|rst|html?|pdf))?",
    re.IGNORECASE,
)


# In a folder of licences all texts are some: MIT, Apache-2.0.txt. What follows a dot there is a version or a text's.
_TEXT_OF_A_LICENCE = re.compile(r"[\w+-]+(\.\d[\w+-]*)*(\.(txt|md|rst|html?|pdf))?", re.IGNORECASE)
_MOST_LICENCE_BYTES = 1 << 20


def is_licence_file(name: str, size: int = 0) -> bool:
    """Whether a file of this name is a model's licence, or what its licence has passed on: LICENSE.txt, NOTICE.

    Args:
        name: Of a file beside the weights.
        size: In bytes, where it is known; a text of more than a megabyte is none.
    """
    return size <= _MOST_LICENCE_BYTES and _LICENCE.fullmatch(name) is not None


LICENCE_FOLDER = "licenses"
"""Of a merge's: holds, in a folder each, the licence files of the models that went into it beside its target."""


def licence_names(folder: Path, listed: Mapping[str, int] | None) -> list[str]:
    """Names of a model's licence files, sorted, wherever they lie.

    That is beside the weights; in a folder of them, ``LICENSES/MIT.txt`` or ``licenses/LICENSE-model``; or, where it is
    a merge itself, in the folders of `LICENCE_FOLDER`.

    Args:
        folder: Where it is.
        listed: Sizes by name, of a repo; None to look into the folder.
    """
    if listed is None:
        top = list(folder.iterdir())
        flat = (inner for path in top if _is_of_licences(path.name) and path.is_dir() for inner in path.iterdir())
        here = [*top, *flat, *(folder / LICENCE_FOLDER).glob("*/*")]
        listed = {path.relative_to(folder).as_posix(): path.stat().st_size for path in here if path.is_file()}
    return [name for name, size in sorted(listed.items()) if _is_licence(PurePosixPath(name), size)]


def _is_licence(path: PurePosixPath, size: int) -> bool:
    if len(path.parts) == 1:
        return is_licence_file(path.name, size)
    flat = len(path.parts) == 2 and _is_of_licences(path.parts[0])
    of_a_merge = len(path.parts) == 3 and path.parts[0] == LICENCE_FOLDER
    named = _TEXT_OF_A_LICENCE.fullmatch(path.name) is not None
    return (flat or of_a_merge) and named and size <= _MOST_LICENCE_BYTES


def _is_of_licences(folder: str) -> bool:
    return folder.lower() in (LICENCE_FOLDER, "licences")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, entry: TensorInfo) -> StoredTensor:
        """As the Hub's client read it."""
        begin, end = entry.data_offsets
        return cls(entry.dtype, tuple(entry.shape), end - begin)


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` as a dictionary.

    Raises:
        CheckpointError: It is not there, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is missing, so its folder is not a transformers model")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object; download the model again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in a folder, every one checked to be whole.

    Raises:
        CheckpointError: There are none, one is missing, or one is truncated.
    """
    if (folder / WEIGHTS_FILE).is_file():
        files = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        files = [folder / name for name in read_index(folder / INDEX_FILE)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{str(folder)!r} lacks {len(missing)} of {len(files)} shards ({missing[0]}); download the model again"
            )
    else:
        raise explain_no_safetensors(str(folder), [entry.name for entry in folder.iterdir()])
    for file in files:
        read_safetensors_header(file)
    return files


def read_index(path: Path) -> list[str]:
    """Names of the shards that an index lists.

    Raises:
        CheckpointError: It is not an index, or points out of its folder.
    """
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        plain = isinstance(index.get("metadata", {}), dict)
        inside = plain and all(".." not in Path(name).parts and not Path(name).is_absolute() for name in names)
    except (ValueError, KeyError, AttributeError, TypeError):
        inside = False
    if not inside:
        raise CheckpointError(f"{str(path)!r} is not an index of shards beside it; download or save the model again")
    return names


def explain_no_safetensors(where: str, names: Iterable[str]) -> CheckpointError:
    """The error for a folder or repo without safetensors, by what it has instead."""
    names = list(names)
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return CheckpointError(
            f"{where!r} has its weights as pickles only ({pickles[0]}), which may run any code and are not opened; "
            "convert it to safetensors"
        )
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        return CheckpointError(
            f"{where!r} is an adapter, not a model, with a config.json beside it; give it as --adapter, take that "
            "file out, or merge it into its base (peft: merge_and_unload) and give that folder"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{where!r} holds GGUF files; give the path of one: {ggufs[0]}")
    return CheckpointError(f"{where!r} has no {WEIGHTS_FILE} nor {INDEX_FILE}; save the model as safetensors")


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name to entry of every tensor, from the header alone.

    Raises:
        CheckpointError: Not a safetensors file, or one whose end is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"version ":
        raise CheckpointError(f"{str(path)!r} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    try:
        entries = parse_local_safetensors_file_metadata(path).tensors
    except (SafetensorsParsingError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{str(path)!r} is truncated or no safetensors file ({size:,} bytes); download or save it again"
        ) from None
    tensors = {name: StoredTensor.of(entry) for name, entry in entries.items()}
    # The header's length, the header, the tensors.
    whole = 8 + int.from_bytes(start, "little") + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if whole > size:
        raise CheckpointError(f"{str(path)!r} is truncated: {size:,} of {whole:,} bytes; download or save it again")
    return tensors


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """`read_safetensors_header` of several files together.

    Raises:
        CheckpointError: As that.
    """
    return {name: entry for path in files for name, entry in read_safetensors_header(path).items()}


def tokenizer_files(folder: Path) -> list[Path]:
    """Files in the folder that a tokenizer is built from, by name; empty if it has no tokenizer."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    files += sorted(folder.glob("*.tiktoken"))
    if not files:
        return []
    return sorted(files + [folder / name for name in _TOKENIZER_SETTINGS if (folder / name).is_file()])


# A file that was written to so shortly before it was read may be written to again without its times telling.
_SETTLED_NS = 2_000_000_000


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex; computed once for a file that stays as it is."""
    state = _state(path)
    known = _digests.get(state)
    if known is not None:
        return known
    began = time.time_ns()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    hex_digest = digest.hexdigest()
    if state == _state(path) and max(state[-2:]) < began - _SETTLED_NS:
        _digests[state] = hex_digest
    return hex_digest


# What the system says of a file -> its digest. A multi-gigabyte checkpoint is asked for when a push is planned, when it
# is begun and when it is shown, and a local model at every step that names it.
_digests: dict[tuple[int, ...], str] = {}


def _state(path: Path) -> tuple[int, ...]:
    return *file_state(path), path.stat().st_ctime_ns


def file_state(path: Path) -> tuple[int, ...]:
    """What tells a file from one that has taken its place."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{str(path)!r} is no regular file, and is not read; put the file itself there")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def folder_digest(folder: Path, weights: Sequence[Path]) -> str:
    """SHA-256 (hex) of what decides the model's numbers: weights, ``config.json`` and tokenizer.

    Each file enters by its name and its own digest, in the order of names; times, README and tmerge/ do not.
    """
    digest = hashlib.sha256()
    for path in sorted({folder / "config.json", *weights, *tokenizer_files(folder)}):
        digest.update(f"{path.name}\n{file_digest(path)}\n".encode())
    return digest.hexdigest()


def folder_licence(readme: Path) -> str | None:
    """The licence in a model card's front matter, if there is one."""
    if not readme.is_file():
        return None
    lines = readme.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    closing = next((number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if closing is None:
        return None
    try:
        card = yaml.safe_load("\n".join(lines[1:closing]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return card_licence(card) if isinstance(card, dict) else None


def card_licence(card: dict[str, Any]) -> str | None:
    """The licence in a model card's metadata; of one that is not on the Hub's list, its name."""
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name") or licence
    return str(licence) if licence else None
