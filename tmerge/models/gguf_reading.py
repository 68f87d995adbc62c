"""A way through ``transformers``' loader of GGUF files that does not take a minute.

``transformers`` turns a GGUF file into a plain model and tokenizer, and its result is kept bit for bit. Its road
there is slow for four reasons that have nothing to do with the result, and `fast_reading` takes them out of the way
while a file is loaded:

- it parses the file's metadata again at every step, one ``numpy.memmap`` slice per vocabulary entry;
- it builds the table of tensor names again for every submodule of the model;
- it unpacks blocks sixteen rows at a time, which for short rows (Gemma's 640-wide embedding has 262,144 of them)
  is mostly the cost of calling numpy, and all of a tensor's pieces lie beside the tensor that they are put into;
- it copies what was unpacked, which nobody else has, once more.

Measured with the tokenizer, in seconds of processor time: SmolLM2 135M 16.3 as it is and 2.7 by the first three,
Gemma 3 270M 49.8 and 9.0. By the fourth, and unpacking into its place, loading Gemma 3 without its tokenizer went from
9.4 to 5.8 on a slower machine. ``tests/models/test_gguf.py`` holds the results equal.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderField

from tmerge.models.gguf import STRING, read_string, read_value

__all__ = ["fast_reading", "one_name_map"]

# Elements that are unpacked at a time: half a megabyte stays in the processor's cache.
_AT_ONCE = 131072

# One load at a time: what `fast_reading` replaces is global to the process.
_LOCK = threading.RLock()


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
            key, offs = read_string(blob, offs)  # type: ignore[arg-type]
            (kind,) = struct.unpack_from("<I", blob, offs)
            types, value, offs = read_value(blob, offs + 4, kind)  # type: ignore[arg-type]
            self._add(start, bytes(key).decode(), types, value)
        self._leave_out_the_vocabulary()
        return offs

    def _add(self, start: int, name: str, types: list[int], value: Any) -> None:
        values = value if isinstance(value, list) else [value]
        parts = [bytes(entry) for entry in values] if types[-1] == STRING else [(entry,) for entry in values]
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


class _Unpacked(np.ndarray):
    """Values that were unpacked into memory that nobody else has: a copy of them is they themselves.

    ``transformers`` copies whatever it is given, as it may lie in the file.
    """

    def __array_function__(self, function: Any, types: Any, given: Any, options: Any) -> Any:
        """As ``numpy`` does it, but for a copy."""
        if function is np.copy and len(given) == 1 and not options and self.flags.c_contiguous:
            return self.view(np.ndarray)
        return super().__array_function__(function, types, given, options)


def _dequantize(data: np.ndarray, qtype: GGMLQuantizationType, original: Any = gguf.dequantize) -> np.ndarray:
    """``gguf.dequantize``, so many blocks at a time as numpy is good at; blocks know nothing of rows."""
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) or not data.flags.c_contiguous:
        return original(data, qtype)
    elements, size = gguf.GGML_QUANT_SIZES[qtype]
    values = np.empty(gguf.quants.quant_shape_from_byte_shape(data.shape, qtype), dtype=np.float32)
    packed, unpacked = data.reshape(-1, size), values.reshape(-1, elements)
    step = max(1, _AT_ONCE // elements)
    # Of damaged blocks numpy would warn; what comes of them is refused as not finite, by the tensor's name.
    with np.errstate(all="ignore"):
        for start in range(0, len(packed), step):
            blocks = packed[start : start + step]
            # As one long row: gguf splits up what has many.
            unpacked[start : start + step] = original(blocks.reshape(1, -1), qtype).reshape(-1, elements)
    return values.view(_Unpacked)


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
