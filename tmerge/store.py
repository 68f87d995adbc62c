"""How anything is written: under a temporary name, flushed to the disk, renamed; and who may write in a run's folder.

A reader sees all of a file or none of it, and a note that a stage is finished never outlives the files that it vouches
for, whatever the machine does.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tmerge.documents import json_text, parse_json, restored
from tmerge.errors import ReadOnlyError, RunBusyError

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = [
    "LOCK_FILES",
    "Pieces",
    "locked",
    "read_json",
    "replacing",
    "scratch",
    "write_json",
    "write_tensors",
    "write_tensors_in_turn",
    "write_text",
]

_LOCK, _HOLDER = "lock", "held-by"
LOCK_FILES = frozenset({_LOCK, _HOLDER})
"""Names of the files that a folder is locked by, and that say who holds it."""


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary name to write a file under, which takes the file's place when the block ends.

    Args:
        path: The file, in a folder that is there.
        shared: Whether several processes or threads may write it at once; each then has a name of its own.

    Yields:
        The name. The block leaves a file there; if it raises, that file is removed and `path` stays as it was.
    """
    own = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # Some libraries make files for their owner alone; a run's folder is to be shared like any other.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder that is empty when the block begins, whatever an earlier run left there, and gone when it ends."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a file of text; see `replacing`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a strict JSON document (`json_text`)."""
    write_text(path, json_text(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object as `write_json` was given it; None where there is no file, or something else in it."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return restored(data) if isinstance(data, dict) else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        tensors: Name -> tensor, of any layout and on any device; mapped ones never are in memory as a whole.
        metadata: Of its header.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors_in_turn(path, layout, lambda name: tensors[name].detach().cpu(), metadata or {})


def write_tensors_in_turn(
    path: Path,
    layout: Mapping[str, tuple[dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that are not all in memory at once.

    Args:
        path: The file.
        layout: Name -> dtype and shape.
        tensor: Gives each of them by its name, on the CPU; asked once.
        metadata: Of the file's header.
    """
    import torch

    # Wider values first: so each begins at a multiple of its own size.
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        kind, shape = layout[name]
        begin, end = end, end + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": _SAFETENSORS[str(kind)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Where values begin decides how they are multiplied: mapped, at a multiple of what processors read at once.
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values = tensor(name)
            assert (values.dtype, tuple(values.shape)) == layout[name]
            file.write(values.contiguous().flatten().view(torch.uint8).numpy().data)


class Pieces:
    """Tensors that come in pieces, to be joined along their first axis.

    Args:
        folder: Where the pieces are gathered, so that memory does not grow with their number: one that is there and
            holds nothing of these names. In memory if None.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, list[Tensor]] = {}
        self._written: dict[str, tuple[dtype, tuple[int, ...], int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """One more piece of a tensor: of the same dtype, and of the same shape but for the first axis."""
        if self._folder is None:
            self._held.setdefault(name, []).append(tensor)
            return
        import torch

        tail, rows = tuple(tensor.shape[1:]), self._written[name][2] if name in self._written else 0
        self._written[name] = tensor.dtype, tail, rows + tensor.shape[0]
        with (self._folder / f"{name}.pieces").open("ab") as file:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def joined(self) -> dict[str, Tensor]:
        """All of them; those of a folder are mapped."""
        import torch

        joined = {name: torch.cat(pieces) for name, pieces in self._held.items()}
        for name, (kind, tail, rows) in self._written.items():
            size, path = rows * math.prod(tail), f"{self._folder}/{name}.pieces"
            flat = torch.from_file(path, size=size, dtype=kind) if size else torch.empty(0, dtype=kind)
            joined[name] = flat.reshape(rows, *tail)
        return joined


_ALIGNMENT = 64

# As the format names the dtypes that weights and buffers are held in.
_SAFETENSORS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@contextmanager
def locked(folder: Path, what: Path) -> Iterator[None]:
    """While open, no other process or thread is at work in a run; one that is killed lets it go.

    Args:
        folder: Of the lock: the run's cache.
        what: Named in the error: the run's folder.

    Raises:
        RunBusyError: Another one is at work; it is named.
        ReadOnlyError: Nothing can be written there.
    """
    lock, holder = FileLock(folder / _LOCK, timeout=0, is_singleton=False), folder / _HOLDER
    try:
        lock.acquire()
    except Timeout:
        raise RunBusyError(
            f"another tmerge{_named(holder)} is at work in {what}; wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in _NOT_TO_BE_WRITTEN:
            raise
        raise ReadOnlyError(
            f"{what} cannot be written ({error.strerror}); choose another --out, or see to it that it can"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


_NOT_TO_BE_WRITTEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def _named(holder: Path) -> str:
    """In brackets, who holds the lock; nothing where it has not said so yet."""
    try:
        said = holder.read_text(encoding="utf-8")
    except OSError:
        return ""
    return f" ({said})" if said else ""
