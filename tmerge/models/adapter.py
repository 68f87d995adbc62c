"""A LoRA adapter by its reference: a PEFT repo or a folder, its files, what identifies them, and its licence."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tmerge.errors import CheckpointError, ModelNotFoundError
from tmerge.models.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from tmerge.models.checkpoint import StoredTensor, file_digest, licence_names, read_safetensors_header
from tmerge.models.reference import ModelReference
from tmerge.models.remote import Snapshot, fetch, open_repo, stated_licence

__all__ = ["Adapter", "joined_commit"]


@dataclass(frozen=True)
class Adapter:
    """An adapter; nothing of its weights is in memory.

    Attributes:
        reference: What the user asked for.
        folder: Holds its files, as far as they are fetched.
        snapshot: Of a repo; None for a folder.
        config: What its ``adapter_config.json`` says.
    """

    reference: ModelReference
    folder: Path
    snapshot: Snapshot | None
    config: AdapterConfig

    @classmethod
    def find(cls, reference: str | ModelReference, revision: str | None = None) -> Adapter:
        """Find an adapter.

        Args:
            reference: ``user/name``, ``user/name@revision`` or a folder.
            revision: Commit to take instead of what the reference says.

        Raises:
            ModelNotFoundError, GatedModelError: Nothing by that name, or no way to it.
            CheckpointError: It is no LoRA adapter, or has its weights as pickles only.
        """
        where = reference if isinstance(reference, ModelReference) else ModelReference.parse(reference)
        if where.kind == "gguf":
            raise CheckpointError(f"{where.text!r} is a GGUF file, and an adapter is a PEFT repo or folder; name that")
        if where.kind == "hub":
            return cls.within(where, open_repo(where, revision, ADAPTER_CONFIG))
        assert where.path is not None
        return cls.within(where, where.path)

    @classmethod
    def within(cls, reference: ModelReference, there: Snapshot | Path) -> Adapter:
        """The adapter in a folder, or in a repo that has been opened; raises as `find`."""
        snapshot, folder = (there, there.folder) if isinstance(there, Snapshot) else (None, there)
        path = folder / ADAPTER_CONFIG if snapshot is None else fetch(snapshot, ADAPTER_CONFIG)
        config = AdapterConfig.read(path or folder / ADAPTER_CONFIG, reference.text)
        adapter = cls(reference, folder, snapshot, config)
        names = [entry.name for entry in folder.iterdir()] if snapshot is None else snapshot.files
        if names is not None and ADAPTER_WEIGHTS not in names:
            raise _no_weights(reference.text, list(names))
        return adapter

    @cached_property
    def weights(self) -> Path:
        """Its safetensors file, fetched if need be.

        Raises:
            ModelNotFoundError: It cannot be fetched now.
        """
        if self.snapshot is None:
            return self.folder / ADAPTER_WEIGHTS
        path = fetch(self.snapshot, ADAPTER_WEIGHTS)
        if path is None:
            raise ModelNotFoundError(
                f"{self.reference.text!r}: its {ADAPTER_WEIGHTS} is not in the local cache, and the Hub cannot be "
                f"reached; check the network, or download it first: hf download {self.reference.repo}"
            )
        return path

    @cached_property
    def licence_files(self) -> dict[str, Path]:
        """Name -> path of its licence and notices, fetched if need be; raises as `tmerge.models.remote.fetch`."""
        going = licence_names(self.folder, None if self.snapshot is None else self.snapshot.files)
        if self.snapshot is None:
            return {name: self.folder / name for name in going}
        return {name: path for name in going if (path := fetch(self.snapshot, name)) is not None}

    def fetch(self) -> None:
        """Have its files here; raises as `weights`."""
        self.weights  # noqa: B018 - fetched when it is asked for
        self.licence_files  # noqa: B018 - likewise

    @cached_property
    def headers(self) -> dict[str, StoredTensor]:
        """What that file holds."""
        return read_safetensors_header(self.weights)

    @property
    def commit(self) -> str:
        """What identifies it: a Hub commit, or ``sha256:<hex>`` over its two files."""
        if self.snapshot is not None:
            return self.snapshot.commit
        digest = hashlib.sha256()
        for path in (self.folder / ADAPTER_CONFIG, self.weights):
            digest.update(f"{path.name}\n{file_digest(path)}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def licence(self) -> str | None:
        """The licence that its card states."""
        return stated_licence(self.folder, self.snapshot)

    @property
    def base(self) -> ModelReference:
        """The model that it says it was trained on, to be joined with.

        Raises:
            CheckpointError: It names none, or one that cannot be found from here.
        """
        named, revision = (self.config.base_model_name_or_path or "").strip(), self.config.revision
        remedy = (
            "give the base as --source-base and this as --adapter, or merge it into its base (peft: merge_and_unload) "
            "and give that folder"
        )
        if not named:
            raise CheckpointError(
                f"{self.reference.text!r} is an adapter, and its {ADAPTER_CONFIG} names no base "
                f"(base_model_name_or_path); {remedy}"
            )
        try:
            # As it is on the machine of whoever trained it: of a repo of others, no path on this one is meant.
            parsed = ModelReference.parse_repo(named) if self.snapshot is not None else ModelReference.parse(named)
        except (ModelNotFoundError, CheckpointError):
            raise CheckpointError(
                f"{self.reference.text!r} is an adapter of {named!r}, which is no model that can be found from here; "
                f"{remedy}"
            ) from None
        if revision and parsed.kind == "hub" and parsed.revision is None:
            return ModelReference.parse_repo(f"{parsed.repo}@{revision}")
        return parsed


def joined_commit(base: str, adapter: str) -> str:
    """What identifies a model and the adapter that is joined to it: ``sha256:<hex>`` over what identifies each."""
    return f"sha256:{hashlib.sha256(f'{base}{chr(10)}{adapter}{chr(10)}'.encode()).hexdigest()}"


def _no_weights(where: str, names: list[str]) -> CheckpointError:
    if pickles := [name for name in names if name.startswith("adapter_model") and name.endswith((".bin", ".pt"))]:
        return CheckpointError(
            f"{where!r} has its weights as pickles only ({pickles[0]}), which may run any code and are not opened; "
            "save the adapter again as safetensors (peft: save_pretrained)"
        )
    return CheckpointError(
        f"{where!r} is an adapter without {ADAPTER_WEIGHTS}; download it again, or merge the adapter into its base "
        "(peft: merge_and_unload) where it is whole"
    )
