"""GGUF files: what their header says."""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import GGMLQuantizationType

from tmerge.errors import CheckpointError

__all__ = ["BLOCK", "STRING", "GgufHeader", "GgufTensor", "read_header", "read_string", "read_value"]


# Value types of the format's specification: struct letters of the fixed-size ones, then string and array.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, _ARRAY = 8, 9

BLOCK = re.compile(r"blk\.(\d+)\.")
"""How the names of a block's tensors begin, and its number."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its name, its shape in torch's order, how it is packed, and its packed size."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself, without its weights.

    Attributes:
        path: The file.
        architecture: ``general.architecture``: llama.cpp's name, not that of ``transformers``.
        metadata: Every key; an array only as its length.
        tensors: In the file's order.
    """

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are packed in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def licence(self) -> str | None:
        """``general.license``, if the file has one."""
        value = self.metadata.get("general.license")
        return value if isinstance(value, str) and value else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file carries a vocabulary."""
        return bool(self.metadata.get("tokenizer.ggml.tokens"))


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header and check that the file is all there.

    Raises:
        CheckpointError: Not a GGUF file, of a version or byte order that is not read, truncated, one part of a
            split model, or packed in a way that the installed ``gguf`` does not know.
    """
    stat = path.stat()
    return _header_of(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _header_of(path: Path, size: int, changed: int) -> GgufHeader:
    """`read_header`, once for a file of this size and time of change: a run asks for it again at every step."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{str(path)!r} is not a GGUF file, whatever its name: it does not start with GGUF")
        try:
            blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    with blob:
        try:
            return _header(path, blob)
        except (struct.error, UnicodeDecodeError, EOFError, OverflowError):
            raise CheckpointError(
                f"{str(path)!r} is truncated or damaged ({size:,} bytes); download it again"
            ) from None


def _header(path: Path, blob: mmap.mmap) -> GgufHeader:
    version, tensor_count, key_count = struct.unpack_from("<IQQ", blob, 4)
    if version not in (2, 3):
        raise CheckpointError(
            f"{str(path)!r} is a GGUF file of version {version & 0xFFFF or version >> 16}, or a big-endian one; "
            "only little-endian versions 2 and 3 are read: convert it again with a newer llama.cpp"
        )
    metadata: dict[str, Any] = {}
    position = 24
    for _ in range(key_count):
        key, position = read_string(blob, position)
        (kind,) = struct.unpack_from("<I", blob, position)
        _, value, position = read_value(blob, position + 4, kind)
        metadata[key.decode()] = (
            len(value) if isinstance(value, list) else value.decode() if isinstance(value, bytes) else value
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{str(path)!r} does not name its architecture (general.architecture); convert it again")
    if (parts := metadata.get("split.count", 0)) and parts > 1:
        raise CheckpointError(
            f"{str(path)!r} is one of {parts} parts of a model; join them first: llama-gguf-split --merge FIRST OUT"
        )
    tensors, end = [], 0
    for _ in range(tensor_count):
        tensor, start, position = _tensor(path, blob, position)
        tensors.append(tensor)
        end = max(end, start + tensor.nbytes)
    alignment = metadata.get("general.alignment", 32)
    if -(-position // alignment) * alignment + end > len(blob):
        raise EOFError
    return GgufHeader(path, architecture, metadata, tuple(tensors))


def _tensor(path: Path, blob: mmap.mmap, position: int) -> tuple[GgufTensor, int, int]:
    """A tensor of the table, where its bytes start within the data, and the position after its entry."""
    name, position = read_string(blob, position)
    (dimensions,) = struct.unpack_from("<I", blob, position)
    if dimensions > 8:
        raise EOFError
    *shape, code, start = struct.unpack_from(f"<{dimensions}QIQ", blob, position + 4)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise CheckpointError(
            f"{str(path)!r}: tensor {name.decode()!r} is packed as type {code}, which the installed gguf package does "
            "not know; use a Q4_K_M, Q8_0, F16 or BF16 file of the model, or a newer gguf"
        ) from None
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    tensor = GgufTensor(name.decode(), tuple(reversed(shape)), kind.name, math.prod(shape) // elements * size)
    return tensor, start, position + 4 + 8 * dimensions + 12


def read_string(blob: mmap.mmap | memoryview, position: int) -> tuple[bytes, int]:
    """A text's bytes, and the position after it; EOFError where the file ends before."""
    (length,) = struct.unpack_from("<Q", blob, position)
    end = position + 8 + length
    if end > len(blob):
        raise EOFError
    return bytes(blob[position + 8 : end]), end


def read_value(blob: mmap.mmap | memoryview, position: int, kind: int) -> tuple[list[int], Any, int]:
    """A metadata value: its types (an array's, then its elements'), the value, and the position after it."""
    if kind == STRING:
        return [kind], *read_string(blob, position)
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", blob, position)
        position += 12
        if inner in _LETTERS:
            width = struct.calcsize(_LETTERS[inner])
            if position + count * width > len(blob):
                raise EOFError
            return (
                [kind, inner],
                list(struct.unpack_from(f"<{count}{_LETTERS[inner]}", blob, position)),
                (position + count * width),
            )
        if inner != STRING:
            raise EOFError
        values = []
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = length_of(blob, position)
            values.append(blob[position + 8 : position + 8 + length])
            position += 8 + length
        if position > len(blob):
            raise EOFError
        return [kind, inner], values, position
    if kind not in _LETTERS:
        raise EOFError
    return [kind], *struct.unpack_from(f"<{_LETTERS[kind]}", blob, position), position + struct.calcsize(_LETTERS[kind])
