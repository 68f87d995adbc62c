"""Where a checkpoint's files are: found once, fetched when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmerge.errors import CheckpointError
from tmerge.models.checkpoint import folder_digest, folder_licence, read_config, weight_files
from tmerge.models.reference import ModelReference
from tmerge.models.remote import Snapshot, fetch, fetch_weights, open_repo

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's files are: a local folder, or a snapshot in the Hub's cache.

    Attributes:
        reference: What the user asked for.
        folder: Holds ``config.json``.
        snapshot: Of a repo; None for a folder.
        config: The raw ``config.json``.
    """

    reference: ModelReference
    folder: Path
    snapshot: Snapshot | None
    config: dict[str, Any]

    @classmethod
    def find(cls, reference: ModelReference, revision: str | None) -> Place:
        """Find a Hub repo's or a folder's files; of a repo only ``config.json`` is fetched."""
        if reference.kind == "hub":
            snapshot = open_repo(reference, revision)
            return cls(reference, snapshot.folder, snapshot, read_config(snapshot.folder / "config.json"))
        assert reference.path is not None
        config = reference.path / "config.json"
        if not config.is_file() and (ggufs := sorted(reference.path.glob("*.gguf"))):
            raise CheckpointError(
                f"{reference.text!r} has no config.json but GGUF files; give the path of one: {ggufs[0].name}"
            )
        return cls(reference, reference.path, None, read_config(config))

    @property
    def pretrained(self) -> str:
        """What ``transformers`` is given: the repo id, for which it has special cases, or the folder."""
        return self.reference.repo or str(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """What ``transformers`` is told beside it: of a repo, the commit."""
        return {} if self.snapshot is None else self.snapshot.options

    def weights(self) -> list[Path]:
        """Its safetensors files, fetched if need be."""
        return weight_files(self.folder) if self.snapshot is None else fetch_weights(self.snapshot)

    def licence(self) -> str | None:
        """The licence that its card states."""
        if self.snapshot is None:
            return folder_licence(self.folder / "README.md")
        # The card is fetched although the Hub has told the licence: without a network it is all that tells it again.
        readme = fetch(self.snapshot, "README.md")
        return self.snapshot.licence or (None if readme is None else folder_licence(readme))

    def commit(self, weights: list[Path]) -> str:
        """As `LoadedModel.commit`."""
        return f"sha256:{folder_digest(self.folder, weights)}" if self.snapshot is None else self.snapshot.commit
