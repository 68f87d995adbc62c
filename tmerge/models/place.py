"""Where a model's files are, found once: a checkpoint's folder, a repo's snapshot, or a GGUF file.

What is read of them on the way is kept: the config, the headers, what identifies them. Weights are fetched when they
are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tmerge.errors import CheckpointError
from tmerge.models.adapter import Adapter, joined_commit
from tmerge.models.adapter_changes import AdapterChanges
from tmerge.models.adapter_config import ADAPTER_CONFIG
from tmerge.models.checkpoint import (
    SETTINGS_FILES,
    StoredTensor,
    file_digest,
    folder_digest,
    is_licence_file,
    is_tokenizer_file,
    licence_names,
    read_config,
    read_headers,
    weight_files,
)
from tmerge.models.configs import (
    check_config,
    load_config,
    meta_model,
    set_to_compute,
    stored_dtype,
    tidy_gguf_config,
)
from tmerge.models.demo import demo_model, demo_path
from tmerge.models.door import check_generation, check_settings
from tmerge.models.gguf import GgufHeader, read_header
from tmerge.models.gguf_completed import complete
from tmerge.models.gguf_held import hold_gguf
from tmerge.models.gguf_reading import fast_reading
from tmerge.models.reference import ModelReference
from tmerge.models.remote import Snapshot, fetch, fetch_weights, open_repo, stated_licence
from tmerge.models.ties import stored_apart, untie

__all__ = ["GgufPlace", "Place"]


@dataclass(frozen=True)
class Place:
    """A checkpoint of safetensors: a local folder, or a snapshot in the Hub's cache.

    Attributes:
        reference: What the user asked for.
        folder: Holds ``config.json``.
        snapshot: Of a repo; None for a folder.
        stored_config: The raw ``config.json``.
        trust_remote_code: Whether this repo's own Python code may run.
        adapter: What is joined to it when it is read.
    """

    reference: ModelReference
    folder: Path
    snapshot: Snapshot | None
    stored_config: dict[str, Any]
    trust_remote_code: bool = False
    adapter: Adapter | None = None

    @classmethod
    def find(cls, reference: ModelReference, revision: str | None, trust_remote_code: bool = False) -> Place | Adapter:
        """Find a Hub repo's or a folder's files, of a repo only its config; or the adapter that is there instead."""
        if reference.kind == "hub":
            snapshot = open_repo(reference, revision)
            if not (snapshot.folder / "config.json").is_file():
                return Adapter.within(reference, snapshot)
            config = read_config(snapshot.folder / "config.json")
            # Fetched, so that without a network the cache tells the same.
            if fetch(snapshot, ADAPTER_CONFIG) is not None:
                raise _beside_an_adapter(reference)
            return cls(reference, snapshot.folder, snapshot, config, trust_remote_code)
        assert reference.path is not None
        path = reference.path / "config.json"
        if (reference.path / ADAPTER_CONFIG).is_file():
            if path.is_file():
                raise _beside_an_adapter(reference)
            return Adapter.within(reference, reference.path)
        if not path.is_file() and (ggufs := sorted(reference.path.glob("*.gguf"))):
            raise CheckpointError(
                f"{reference.text!r} has no config.json but GGUF files; give the path of one: {ggufs[0].name}"
            )
        return cls(reference, reference.path, None, read_config(path), trust_remote_code)

    @property
    def pretrained(self) -> str:
        """What ``transformers`` is given: the repo id, for which it has special cases, or the folder."""
        return self.reference.repo or str(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """What ``transformers`` is told beside it: of a repo, the commit."""
        return {} if self.snapshot is None else self.snapshot.options

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config object; to be copied by who changes it.

        Raises:
            UnsupportedModelError: As `check_config` and `load_config`.
        """
        check_config(self.reference, self.stored_config, self.trust_remote_code)
        return load_config(self.reference, self.pretrained, self.options, self.trust_remote_code)

    @cached_property
    def apart(self) -> tuple[str, str] | None:
        """Two tensors of its files that its config has as one; see `stored_apart`. The files are fetched if need be."""
        if not getattr(self.config.get_text_config(decoder=True), "tie_word_embeddings", False):
            return None
        where = f"{self.reference.text!r}: "
        return stored_apart(meta_model(self.config, self.trust_remote_code, where), self.weights)

    @cached_property
    def settled_config(self) -> PreTrainedConfig:
        """The config as the files have it, which are fetched if need be; to be copied by who changes it.

        Raises:
            UnsupportedModelError: As `config`.
        """
        config = set_to_compute(copy.deepcopy(self.config))
        if self.apart is not None:
            untie(config)
        return config

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The model without weights; to be left as it is. Of a repo, as its config alone has it.

        Raises:
            UnsupportedModelError: As `config`, and `meta_model`.
        """
        return meta_model(
            self.config if self.snapshot is not None else self.settled_config,
            self.trust_remote_code,
            f"{self.reference.text!r}: ",
        )

    def beside(self, named: Sequence[str] = ()) -> dict[str, Path]:
        """Name -> path of each file that goes with the weights (tokenizer, settings, licence); fetched if need be.

        Args:
            named: Further files of the tokenizer's kind.

        Raises:
            TmergeError: As `fetch`.
        """
        snapshot = self.snapshot
        if snapshot is None or snapshot.files is None:
            here = [*self.folder.iterdir(), *(self.folder / _TEMPLATES).glob("*")]
            sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in here if path.is_file()}
        else:
            sizes = snapshot.files
        return self._fetched(
            name for name, size in sorted(sizes.items()) if _goes_with_the_weights(name, size) or name in named
        )

    @cached_property
    def licence_files(self) -> dict[str, Path]:
        """Name -> path of its licence and notices, fetched if need be; raises as `fetch`."""
        return self._fetched(licence_names(self.folder, None if self.snapshot is None else self.snapshot.files))

    def _fetched(self, names: Iterable[str]) -> dict[str, Path]:
        snapshot = self.snapshot
        if snapshot is None:
            return {name: self.folder / name for name in names}
        return {name: path for name in names if (path := fetch(snapshot, name)) is not None}

    def check_settings(self) -> None:
        """Refuse small JSON files beside the config that are none; a repo's are fetched, and all else that is kept.

        Raises:
            TmergeError: As `check_settings`, and `beside`.
        """
        self.beside()
        check_settings(self.reference, self.folder)
        check_generation(self.reference, self.folder)

    @cached_property
    def weights(self) -> list[Path]:
        """Its safetensors files, fetched if need be."""
        return weight_files(self.folder) if self.snapshot is None else fetch_weights(self.snapshot)

    @cached_property
    def headers(self) -> dict[str, StoredTensor]:
        """What these files hold."""
        return read_headers(self.weights)

    @property
    def dtype(self) -> torch.dtype:
        """In which its weights are stored."""
        return stored_dtype(self.stored_config, self.headers)

    @cached_property
    def licence(self) -> str | None:
        """The licence that its card states."""
        return stated_licence(self.folder, self.snapshot)

    @cached_property
    def base_commit(self) -> str:
        """What identifies its own files: of a folder, a hash of them."""
        return self._digest() if self.snapshot is None else self.snapshot.commit

    @cached_property
    def commit(self) -> str:
        """As `LoadedModel.commit`."""
        return _commit_of(self)

    @property
    def revisions(self) -> dict[str, str]:
        """Hub repo that it is read from, as it is named -> the commit; its adapter's too."""
        return _revisions_of(self.snapshot, self.adapter)

    @cached_property
    def changes(self) -> AdapterChanges | None:
        """What its adapter makes of it; None without one.

        Raises:
            CheckpointError: The adapter is of another model.
        """
        return _changes_of(self)

    def refuse_changed(self) -> None:
        """Refuse a folder whose files are others by now; those that look the same are not hashed again.

        Raises:
            CheckpointError: They are.
        """
        try:
            changed = self.snapshot is None and self._digest() != self.base_commit
        except OSError:
            changed = True
        if changed:
            raise CheckpointError(
                f"{self.reference.text!r} changed while it was being used; start again when it is written"
            )

    def _digest(self) -> str:
        return f"sha256:{folder_digest(self.folder, self.weights)}"


def _commit_of(place: Place | GgufPlace) -> str:
    adapter = place.adapter
    return place.base_commit if adapter is None else joined_commit(place.base_commit, adapter.commit)


def _revisions_of(snapshot: Snapshot | None, adapter: Adapter | None) -> dict[str, str]:
    found = [snapshot, None if adapter is None else adapter.snapshot]
    return {each.reference.text: each.commit for each in found if each is not None}


def _changes_of(place: Place | GgufPlace) -> AdapterChanges | None:
    adapter = place.adapter
    return None if adapter is None else AdapterChanges(adapter, place.empty, repr(place.reference.text))


def _beside_an_adapter(reference: ModelReference) -> CheckpointError:
    return CheckpointError(
        f"{reference.text!r} holds an adapter ({ADAPTER_CONFIG}) beside a model (config.json), and which of the two is "
        "meant is not said; take one of them out, or merge the adapter into the model (peft: merge_and_unload) and "
        "save that"
    )


# Of a model with several chat templates.
_TEMPLATES = "additional_chat_templates"


def _goes_with_the_weights(name: str, size: int) -> bool:
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == _TEMPLATES and file.endswith(".jinja")
    kept = is_tokenizer_file(file) or is_licence_file(file, size)
    return kept or file.endswith(".tiktoken") or file in SETTINGS_FILES


@dataclass(frozen=True)
class GgufPlace:
    """A GGUF file; a demo model's is put together and checked first.

    Attributes:
        reference: What the user asked for.
        path: Of the file.
        adapter: What is joined to it when it is read.
    """

    reference: ModelReference
    path: Path
    adapter: Adapter | None = None

    @classmethod
    def find(cls, reference: ModelReference) -> GgufPlace:
        """Find the file of a ``gguf`` reference."""
        demo = reference.demo
        return cls(reference, demo_path(demo) if demo is not None else Path(reference.path or "").resolve())

    @property
    def header(self) -> GgufHeader:
        """What it says about itself."""
        return read_header(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config object, as the file's metadata give it; to be copied by who changes it.

        Raises:
            UnsupportedModelError: As `load_config`.
        """
        read_header(self.path)  # which says better what is wrong with a file
        with fast_reading(self.path) as folder:
            config = load_config(self.reference, folder, {"gguf_file": self.path.name})
        complete(self.reference, self.header, config)
        return config

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What of the file is not read and may matter.

        Raises:
            CheckpointError: Something is not read without which it is another model.
        """
        return hold_gguf(self.reference, self.header, self.empty)

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The model without weights, of a tidied config; to be left as it is.

        Raises:
            UnsupportedModelError: As `config`, and `meta_model`.
        """
        config = copy.deepcopy(self.config)
        tidy_gguf_config(config)
        return meta_model(config, where=f"{self.reference.text!r}: ")

    @property
    def dtype(self) -> torch.dtype:
        """In which its weights are taken: packed, they have none of their own."""
        return torch.bfloat16

    @cached_property
    def licence(self) -> str | None:
        """As the file states it; a demo model's is known."""
        demo = self.reference.demo
        return demo_model(demo).licence if demo is not None else self.header.licence

    @cached_property
    def commit(self) -> str:
        """As `LoadedModel.commit`."""
        return _commit_of(self)

    @property
    def revisions(self) -> dict[str, str]:
        """As `Place.revisions`: of a file, its adapter's alone."""
        return _revisions_of(None, self.adapter)

    @cached_property
    def changes(self) -> AdapterChanges | None:
        """As `Place.changes`."""
        return _changes_of(self)

    @cached_property
    def base_commit(self) -> str:
        """A hash of the file; a demo model's has just been checked against the pinned one."""
        demo = self.reference.demo
        return f"sha256:{demo_model(demo).sha256 if demo is not None else file_digest(self.path)}"
