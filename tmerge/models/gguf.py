"""GGUF files: their header, and a way through ``transformers``' GGUF loader that does not take a minute.

``transformers`` turns a GGUF file into a plain model and tokenizer, and its result is kept bit for bit. Its road
there is slow for three reasons that have nothing to do with the result, and `fast_reading` takes them out of the way
while a file is loaded:

- it parses the file's metadata again at every step, one ``numpy.memmap`` slice per vocabulary entry;
- it builds the table of tensor names again for every submodule of the model;
- it unpacks blocks sixteen rows at a time, which for short rows (Gemma's 640-wide embedding has 262,144 of them)
  is mostly the cost of calling numpy.

Measured in seconds of processor time with the tokenizer: SmolLM2 135M 16.3 before and 2.7 so, Gemma 3 270M 49.8 and
9.0, of which 3 are ``tokenizers`` at work on its merges. ``tests/models/test_gguf.py`` holds the results equal.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import mmap
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderField

from tmerge.errors import CheckpointError

__all__ = ["BLOCK", "GgufHeader", "GgufTensor", "fast_reading", "one_name_map", "read_header"]

# Value types of the format's specification: struct letters of the fixed-size ones, then string and array.
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

BLOCK = re.compile(r"blk\.(\d+)\.")
"""How the names of a block's tensors begin, and its number."""

# Elements per row when blocks are unpacked; gguf takes 16 rows at a time, and half a megabyte stays in the cache.
_ROW = 8192

# One load at a time: what `fast_reading` replaces is global to the process.
_LOCK = threading.RLock()


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
        key, position = _string(blob, position)
        (kind,) = struct.unpack_from("<I", blob, position)
        _, value, position = _value(blob, position + 4, kind)
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
    name, position = _string(blob, position)
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


def _string(blob: mmap.mmap, position: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", blob, position)
    end = position + 8 + length
    if end > len(blob):
        raise EOFError
    return blob[position + 8 : end], end


def _value(blob: mmap.mmap, position: int, kind: int) -> tuple[list[int], Any, int]:
    """A metadata value: its types (an array's, then its elements'), the value, and the position after it."""
    if kind == _STRING:
        return [kind], *_string(blob, position)
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
        if inner != _STRING:
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


class _FastReader(gguf.GGUFReader):
    """``gguf.GGUFReader`` whose metadata is parsed in one pass over plain bytes.

    A field's parts are bytes and one-element tuples where the original has one-element arrays: what
    ``transformers`` does with them (index 0, or a list of bytes) reads the same. The vocabulary is left out where
    ``transformers`` reads it by another way; of it, the config needs the length only.
    """

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        # The same mapping without memmap's subclass, whose every slice costs microseconds.
        self._data = mapped.view(np.ndarray)

    def _build_fields(self, offs: int, count: int) -> int:
        blob = memoryview(self._data)  # type: ignore[arg-type]
        for _ in range(int(count)):
            start = offs
            key, offs = _string(blob, offs)  # type: ignore[arg-type]
            (kind,) = struct.unpack_from("<I", blob, offs)
            types, value, offs = _value(blob, offs + 4, kind)  # type: ignore[arg-type]
            self._add(start, bytes(key).decode(), types, value)
        self._leave_out_the_vocabulary()
        return offs

    def _add(self, start: int, name: str, types: list[int], value: Any) -> None:
        values = value if isinstance(value, list) else [value]
        parts = [bytes(entry) for entry in values] if types[-1] == _STRING else [(entry,) for entry in values]
        kinds = [GGUFValueType(entry) for entry in types]
        self._push_field(ReaderField(start, name, parts, list(range(len(parts))), kinds), skip_sum=True)  # type: ignore[arg-type]

    def _leave_out_the_vocabulary(self) -> None:
        from transformers.integrations import GGUF_CONFIG_MAPPING

        if importlib.util.find_spec("transformers.integrations.gguf") is None:
            return  # an older release, which builds the tokenizer from these very fields
        for name in ("scores", "token_type", "merges"):
            self.fields.pop(f"tokenizer.ggml.{name}", None)
        tokens = self.fields.get("tokenizer.ggml.tokens")
        if tokens is None or "general.architecture" not in self.fields:
            return
        architecture = bytes(self.fields["general.architecture"].parts[0]).decode()
        keys: dict[str, Any] = GGUF_CONFIG_MAPPING.get(architecture, {})  # type: ignore[assignment]
        if keys.get("vocab_size") == "vocab_size":
            if f"{architecture}.vocab_size" not in self.fields:
                self._add(0, f"{architecture}.vocab_size", [4], len(tokens.parts))
            del self.fields["tokenizer.ggml.tokens"]


def _dequantize(data: np.ndarray, qtype: GGMLQuantizationType, original: Any = gguf.dequantize) -> np.ndarray:
    """``gguf.dequantize``, its rows regrouped to a size that numpy is good at; blocks know nothing of rows."""
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) or not data.flags.c_contiguous:
        return original(data, qtype)
    elements, size = gguf.GGML_QUANT_SIZES[qtype]
    shape = gguf.quants.quant_shape_from_byte_shape(data.shape, qtype)
    blocks = math.gcd(data.size // size, max(1, _ROW // elements))
    # Of damaged blocks numpy would warn; what comes of them is refused as not finite, by the tensor's name.
    with np.errstate(all="ignore"):
        if blocks * elements <= shape[-1]:
            return original(data, qtype)
        return original(data.reshape(-1, blocks * size), qtype).reshape(shape)


@contextlib.contextmanager
def fast_reading(path: Path, only: Collection[str] | None = None) -> Iterator[str]:
    """While open, ``transformers`` reads this GGUF file through a reader that parses it once.

    Other files and other threads' own reading of GGUF files go through the original reader, and the substitute for
    the unpacking gives the original's bits, so nothing outside changes but speed.

    Args:
        path: The file.
        only: Names of the tensors that it is to seem to hold; all if None.

    Yields:
        The folder to give to ``from_pretrained``, with ``gguf_file=path.name``: one that holds a link to the file and
        nothing else, since ``transformers`` would also take tokenizer settings and adapters that lie beside the file.
    """
    from transformers import modeling_gguf_pytorch_utils as loader

    wanted = os.path.realpath(path)
    with _LOCK:
        yield from _substituted(path, wanted, only, loader)


def _substituted(path: Path, wanted: str, only: Collection[str] | None, loader: Any) -> Iterator[str]:
    """What is global to the process is looked at and replaced by one thread at a time."""
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "dequantize")}
    original_reader, bar = gguf.GGUFReader, loader.tqdm

    def reader(file: str | os.PathLike[str], mode: Any = "r") -> gguf.GGUFReader:
        if mode != "r" or os.path.realpath(file) != wanted:
            return original_reader(file, mode)
        stat = os.stat(wanted)
        whole = _parsed(wanted, stat.st_size, stat.st_mtime_ns)
        if only is None:
            return whole
        part = copy.copy(whole)
        part.tensors = [tensor for tensor in whole.tensors if tensor.name in only]
        return part

    mapped = _mapping()
    with tempfile.TemporaryDirectory(prefix="tmerge-") as alone:
        try:
            Path(alone, path.name).symlink_to(wanted)
            folder = alone
        except OSError:  # a system without links for its users
            folder = str(path.parent)
        gguf.GGUFReader, gguf.dequantize = reader, _dequantize  # type: ignore[assignment, misc]
        loader.tqdm = lambda tensors, **_: tensors
        if mapped is not None:
            own_reader, original_mapped = mapped
            own_reader._mapped = lambda file: original_mapped(file).view(np.ndarray)
        try:
            with one_name_map():
                yield folder
        finally:
            for name, value in originals.items():
                setattr(gguf, name, value)
            loader.tqdm = bar
            if mapped is not None:
                own_reader._mapped = original_mapped


@contextlib.contextmanager
def one_name_map() -> Iterator[None]:
    """While open, ``gguf`` builds its table of tensor names once: it is asked for by every submodule of a model."""
    with _LOCK:
        original = gguf.get_tensor_name_map
        gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(original)  # type: ignore[assignment]
        try:
            yield
        finally:
            gguf.get_tensor_name_map = original


@functools.lru_cache(maxsize=2)
def _parsed(path: str, size: int, changed: int) -> _FastReader:
    """The reader of a file of this size and time of change: the check, the tokenizer and the weights all ask.

    Two, as a run's target and source are asked for by turns.
    """
    return _FastReader(path)


def _mapping() -> tuple[Any, Callable[[str], np.ndarray]] | None:
    """The module of ``transformers``' own reader and how it maps a file; None in a release that has none."""
    try:
        from transformers.integrations.gguf import reader
    except ImportError:
        return None
    map_file = getattr(reader, "_mapped", None)
    return None if map_file is None else (reader, map_file)
