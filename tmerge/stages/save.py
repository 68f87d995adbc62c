"""Writing the fused model, or an adapter that makes it of the target: beside the cache, compared, moved into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tmerge.calibration import TextSet
from tmerge.fusion import Alpha, TransportedNeurons, changed_together, fuse, module_change, unchanged_modules
from tmerge.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    LICENCE_FOLDER,
    LoadedModel,
    Model,
    ModuleChange,
    file_digest,
    least_release,
    licence_files,
    save_adapter,
    save_checkpoint,
    verify_adapter,
    verify_checkpoint,
    write_licence_files,
)
from tmerge.recipe import Recipe
from tmerge.report import SavedAdapter
from tmerge.run import Run
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import SaveNote
from tmerge.stages.scoring import held_out, load
from tmerge.stages.step import Progress

__all__ = ["Save", "publish"]

# Compared before and after writing.
_COMPARED_TEXTS = 4
# What a checkpoint that is written over may leave behind, and would be read with the new one's files.
_OF_A_CHECKPOINT = (
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("additional_chat_templates/*.jinja", f"{LICENCE_FOLDER}/*", f"{LICENCE_FOLDER}/*/*", ADAPTER_WEIGHTS),
)
# Without one of these a folder is neither a checkpoint nor an adapter.
_CONFIGS = (CONFIG, ADAPTER_CONFIG)


@dataclass(frozen=True)
class Save:
    """The stage ``save``.

    Attributes:
        recipe: Of the run.
        run: Its folder.
        target: Is fused for good, written and let go.
        texts: On some of which the written model is compared.
        neurons: What was transported.
        alpha: As the recipe says, or as chosen.
        fused: The key of the stage that carried them; of several sources also how they are joined.
        others: Path in the folder -> licence file of a model that goes into the target.
    """

    recipe: Recipe
    run: Run
    target: Model
    texts: TextSet
    neurons: Neurons
    alpha: Alpha
    fused: str
    others: Mapping[str, Path] = field(default_factory=dict)

    name = "save"
    note = SaveNote
    together = False

    def inputs(self) -> dict[str, Any]:
        """What decides the checkpoint."""
        return {"fuse": self.fused, "alpha": self.alpha, "save": self.recipe.digest("save")}

    def has_files(self, note: SaveNote) -> bool:
        """Whether the checkpoint is still what was written, and with all licence files that are there now."""
        # They decide nothing of the weights, so that no key has them: an earlier tmerge passed some over. One that
        # was written and is not found any more, with the Hub away, stays.
        if not (self.others.keys() <= set(note.source_licence_files) and self._own.keys() <= set(note.licence_files)):
            return False
        paths = {self.run.folder / name: digest for name, digest in note.weights.items()}
        config = CONFIG if note.adapter is None else ADAPTER_CONFIG
        kept = [self.run.folder / name for name in (config, *note.licence_files, *note.source_licence_files)]
        if not all(path.is_file() for path in (*kept, *paths)):
            return False
        return all(file_digest(path) == digest for path, digest in paths.items())

    @property
    def _own(self) -> dict[str, Path]:
        """Path in the folder -> licence file of the target."""
        return licence_files(self.target.place)

    def do(self, key: str, progress: Progress) -> SaveNote:
        """Fuse, write, compare, move."""
        loaded = load(self.target, progress)
        stored, computed = (str(dtype).removeprefix("torch.") for dtype in (loaded.dtype, loaded.model.dtype))
        licence = {"licence_files": tuple(self._own), "source_licence_files": tuple(self.others)}
        if self.recipe.save.form == "adapter":
            projections = self.recipe.fusion.projections
            adapter, weights = publish_adapter(
                self.target, self.run, self.neurons.transported, self.alpha, projections, progress, self.others
            )
            self.target.release()
            return SaveNote(dtype=stored, computed_in=computed, weights=weights, adapter=adapter, **licence)
        fuse(self.target.views.views, self.neurons.transported, self.alpha)
        weights = publish(loaded, self.run, self.recipe, held_out(self.recipe, self.texts), progress, self.others)
        release = least_release(loaded)
        self.target.release()
        return SaveNote(dtype=stored, computed_in=computed, weights=weights, least_release=release, **licence)


def publish(
    loaded: LoadedModel,
    run: Run,
    recipe: Recipe,
    texts: Sequence[str],
    progress: Progress,
    others: Mapping[str, Path],
) -> dict[str, str]:
    """Write a model beside a run's cache, compare it with the one in memory, then move it into the run's folder.

    Args:
        loaded: The model.
        run: Of the folder.
        recipe: How large a file may be.
        texts: On the first of which the two are compared.
        progress: Hears of it.
        others: As `Save.others`.

    Returns:
        File name -> SHA-256 (hex) of every weights file.

    Raises:
        CheckpointError: What was written is not what is in memory.
    """
    progress.step("writing the checkpoint", 0, 2, "steps")
    fresh = _fresh(run)
    save_checkpoint(loaded, fresh, max_shard_size=recipe.save.max_shard_size)
    write_licence_files(others, fresh)
    progress.step("comparing the saved checkpoint with the model in memory", 1, 2, "steps")
    verify_checkpoint(fresh, loaded, list(texts[:_COMPARED_TEXTS]))
    weights = _moved(fresh, run.folder)
    progress.step("comparing the saved checkpoint with the model in memory", 2, 2, "steps")
    return weights


def publish_adapter(
    target: Model,
    run: Run,
    transported: Sequence[TransportedNeurons],
    alpha: Alpha,
    projections: Sequence[str],
    progress: Progress,
    others: Mapping[str, Path],
) -> tuple[SavedAdapter, dict[str, str]]:
    """Write what fusing changes of a target as a LoRA, hold the two together against the fused model, and move it.

    Args:
        target: In memory, as it is stored; it is fused afterwards.
        run: Of the folder.
        transported: Differences of the target's projections.
        alpha: As the recipe says, or as chosen.
        projections: That were to be changed; an adapter has some modules, whether they are or not.
        progress: Hears of it.
        others: As `Save.others`.

    Returns:
        How large it is, and file name -> SHA-256 (hex).

    Raises:
        FusionError: What was transported is nothing that an adapter can hold.
        SavedModelMismatchError: The target with what was written is not the fused model.
    """
    loaded, layers, fresh = target.load(), target.views.layers, _fresh(run)

    def in_turn(what: str) -> Iterator[list[TransportedNeurons]]:
        done = 0
        for items in changed_together(layers, transported):
            yield items
            done += len(items)
            progress.step(what, done, len(transported), "projections")

    changes: Iterable[ModuleChange]
    changes = (module_change(layers, items, alpha) for items in in_turn("factoring the changes"))
    if not len(transported):
        changes = unchanged_modules(layers, projections)
    size = save_adapter(fresh, changes, loaded.model, loaded.reference, target.commit)
    write_licence_files({**others, **licence_files(loaded.place)}, fresh)
    fused = (
        (layers[items[0].layer][items[0].projection].parameters, partial(fuse, layers, items, alpha))
        for items in in_turn("comparing the adapter with the model in memory")
    )
    verify_adapter(fresh, loaded, fused)
    return SavedAdapter(**asdict(size)), _moved(fresh, run.folder)


def _fresh(run: Run) -> Path:
    """An empty folder beside the cache's files."""
    fresh = run.cache / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    return fresh


def _moved(fresh: Path, folder: Path) -> dict[str, str]:
    """Put a checkpoint's files in the place of those that were there before; begun again, it ends the same.

    Returns:
        File name -> SHA-256 (hex) of every weights file.
    """
    weights = {path.name: file_digest(path) for path in sorted(fresh.glob("*.safetensors"))}
    # The config goes first and comes last: a folder without it is not mistaken for a whole checkpoint.
    for config in _CONFIGS:
        (folder / config).unlink(missing_ok=True)
    files = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for pattern in _OF_A_CHECKPOINT:
        for path in folder.glob(pattern):
            if path.is_file() and path.relative_to(folder) not in files:
                path.unlink()
    for name in sorted(files, key=lambda path: (str(path) in _CONFIGS, path)):
        (fresh / name).chmod(0o644)  # safetensors makes files for their owner alone
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, folder / name)
    shutil.rmtree(fresh)
    return weights
