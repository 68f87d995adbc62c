"""What can be said of a merge from the two configs alone, before any weight is read.

Matched projections, sizes and licences come from the models' configs, laid out on the meta device; what the run is
expected to take is in `tmerge.preflight.estimate`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants

from tmerge.errors import NotEnoughDiskError, NotEnoughMemoryError, UnsupportedModelError
from tmerge.models import (
    AdapterFacts,
    Architecture,
    ModelFacts,
    OutputLicence,
    available_memory,
    feature_key,
    match,
    output_licence,
    pick_device,
)
from tmerge.models.agreed import sharers
from tmerge.preflight.counts import TOKENS_PER_TEXT
from tmerge.preflight.document import (
    CheckDocument,
    CheckedAdapter,
    CheckedModel,
    Expected,
    ForEach,
    Matched,
    RemoteFlavors,
    Sizes,
)
from tmerge.preflight.estimate import Estimate, estimate_run
from tmerge.preflight.holding import held_bytes
from tmerge.preflight.learned import Learned
from tmerge.preflight.memory import computed_dtype, widths_of
from tmerge.preflight.models import Models
from tmerge.preflight.normed import without_norms
from tmerge.preflight.relatives import Relative, Relatives
from tmerge.preflight.saved_adapter import refuse_no_adapter
from tmerge.quantities import bytes_words
from tmerge.recipe import Recipe, TaskVector

__all__ = ["TOKENS_PER_TEXT", "Check", "Estimate", "check", "refuse_unfit"]


@dataclass(frozen=True)
class Check:
    """The result of `check`.

    Attributes:
        target: Facts of the target.
        source: Facts of the source.
        target_layout: Its projections, on the meta device.
        source_layout: Likewise.
        projections: Those that both have and the recipe wants.
        skipped: projection -> why not.
        licence: What the two models' licences make of the merge's.
        notes: What a user should know before starting.
        estimate: Expected cost here.
        base: Facts of the source before its fine-tuning, for a task vector.
        base_layout: Its projections.
        left_out: What the adapter that is carried changes, and a merge leaves behind.
        sources: Several that are carried; then `source` is their base.
        flavors: Where on the Hub's hardware it fits, if that was asked (`tmerge.preflight.flavors`).
    """

    target: ModelFacts
    source: ModelFacts
    target_layout: Architecture
    source_layout: Architecture
    projections: list[str]
    skipped: dict[str, str]
    licence: OutputLicence
    notes: list[str]
    estimate: Estimate
    base: ModelFacts | None = None
    base_layout: Architecture | None = None
    left_out: tuple[str, ...] = ()
    sources: tuple[Relative, ...] = ()
    flavors: RemoteFlavors | None = None

    def document(self) -> CheckDocument:
        """What is printed and shown of it."""
        target, source, estimate = self.target_layout, self.source_layout, self.estimate
        base = None if self.base is None else _model(self.base, self.base_layout or source)
        matched = {name: Sizes(target=_shape(target, name), source=_shape(source, name)) for name in self.projections}
        return CheckDocument(
            target=_model(self.target, target),
            source=_model(self.source, source, self.left_out),
            source_base=base,
            sources=[_model(relative.facts, source, relative.left_out) for relative in self.sources],
            projections=Matched(matched=matched, skipped=self.skipped),
            left_alone=ForEach(target=target.left_alone, source=source.left_alone),
            licence=self.licence,
            notes=self.notes,
            estimate=Expected(
                seconds=round(estimate.seconds, 3),
                range_seconds=(round(estimate.range_seconds[0], 3), round(estimate.range_seconds[1], 3)),
                stages={name: round(seconds, 3) for name, seconds in estimate.stages.items()},
                time=estimate.time_words,
                operations=estimate.operations,
                memory_bytes=estimate.memory_bytes,
                disk_bytes=estimate.disk_bytes,
                download_bytes=estimate.download_bytes,
                assumes=estimate.assumes,
                measured=list(estimate.measured),
            ),
            flavors=self.flavors,
        )

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge check --json`` prints it."""
        return self.document().to_dict()


def check(recipe: Recipe, models: Models | None = None) -> Check:
    """Hold a recipe's two models against each other.

    Args:
        recipe: Names them.
        models: Their handles, where they serve for more than this.

    Raises:
        ModelNotFoundError, GatedModelError: A reference cannot be read.
        UnsupportedModelError: A model is not a causal decoder, or the two share no projection the recipe wants.
    """
    models = models or Models.of(recipe)
    target, target_layout = models.target.facts, models.target.layout
    source, source_layout = models.source.facts, models.source.layout
    projections, skipped = match(target_layout, source_layout, recipe.fusion.projections)
    for role, layout in (("target", target_layout), ("source", source_layout)):
        for name in _uneven(layout, projections):
            projections.remove(name)
            skipped[name] = f"the {role}'s layers have it in different sizes, which one plan per feature cannot hold"
    sizeless, notes = without_norms(recipe, target_layout, source_layout, projections)
    projections, skipped = [name for name in projections if name not in sizeless], skipped | sizeless
    if not projections:
        raise UnsupportedModelError(
            f"{recipe.target} and {recipe.source} share none of the projections "
            f"{', '.join(recipe.fusion.projections)} ({'; '.join(skipped.values())}); choose others in "
            "fusion.projections"
        )
    left_out: tuple[str, ...] = ()
    if recipe.adapter is not None and source.adapter is not None and isinstance(recipe.fusion, TaskVector):
        layouts, stream = (target_layout, source_layout), recipe.fusion.carries_stream
        learned = Learned.of(source.adapter.parameters, layouts, projections, stream=stream)
        projections, left_out = learned.projections, learned.left_out
        skipped |= dict.fromkeys(learned.untouched, f"the adapter {recipe.adapter} leaves it as it is")
        if not projections:
            why = f", as {'; '.join(dict.fromkeys(sizeless.values()))}" if sizeless else ""
            raise UnsupportedModelError(
                f"the adapter {recipe.adapter} changes none of the projections {', '.join(recipe.fusion.projections)} "
                f"that can be carried{why}; it changes {_some(left_out)}: choose others in fusion.projections"
            )
        if left_out:
            notes.append(f"what the adapter changes and the merge leaves behind: {', '.join(left_out)}")
    relatives: tuple[Relative, ...] = ()
    if recipe.sources:
        found = Relatives.of(recipe, models, projections)
        relatives, projections = found.sources, found.projections
        skipped |= dict.fromkeys(found.untouched, "no adapter among the sources changes it")
        notes += found.notes
    refuse_no_adapter(recipe, models, projections)
    if recipe.save.form == "adapter" and target.reference.kind == "gguf":
        notes.append(
            "the target is a GGUF file, so the adapter is of its weights as transformers unpacks them: PEFT loads it "
            "on AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME)"
        )
    # Several sources may have been made from the target itself.
    if target.commit == source.commit and not recipe.sources:
        notes.append("target and source are the same model: nothing new can be transported")
    listed = [("target", target), ("source", source)]
    base, base_layout = None, None
    if models.source_base is not None:
        base, base_layout = models.source_base.facts, models.source_base.layout
        if _shapes(base_layout, projections) != _shapes(source_layout, projections):
            raise UnsupportedModelError(
                f"source_base {recipe.source_base} is not of the source's shape; "
                "name the model that the source was fine-tuned from"
            )
        if recipe.sources:
            listed[1] = ("source_base", base)
        else:
            listed.append(("source_base", base))
        if base.commit == source.commit and not recipe.sources:
            notes.append("source and source_base are the same model: the task vector is zero")
    # Of an adapter the model is the base, which is told of already.
    whole = [
        (relative.name, relative.facts)
        for relative, named in zip(relatives, recipe.sources, strict=True)
        if named.adapter is None
    ]
    for role, facts in (*listed, *whole):
        if facts.gated:
            notes.append(f"the {role}'s repo is gated: its terms must have been accepted by your account")
        notes += [f"the {role}'s files hold {part}, which a merge leaves out" for part in facts.side]
        notes += [f"the {role}'s {remark}" for remark in facts.remarks]
    licence = output_licence(
        target.licence,
        source.licence,
        target_repo=target.reference.repo,
        source_repo=source.reference.repo,
        target_family=target.model_type,
        source_base=None if base is None else (base.licence, base.reference.repo),
        adapters={
            f"{role}'s adapter": (facts.adapter.licence, facts.adapter.reference.repo)
            for role, facts in (*listed, *((relative.name, relative.facts) for relative in relatives))
            if facts.adapter is not None
        },
        sources={role: (facts.licence, facts.reference.repo) for role, facts in whole} if recipe.sources else None,
    )
    notes += [*licence.refusals, *licence.unknown]
    layouts = (target_layout, source_layout)
    estimate = estimate_run(recipe, (target, source, base), layouts, projections, [each.facts for each in relatives])
    checked = target, source, *layouts, projections, skipped, licence, notes, estimate
    return Check(*checked, base, base_layout, left_out, relatives)


def refuse_unfit(result: Check, recipe: Recipe, out: Path) -> None:
    """Refuse a run that cannot fit, saying what to change.

    Raises:
        NotEnoughMemoryError, NotEnoughDiskError: With the needed and the free bytes.
    """
    device = pick_device(recipe.device)
    needed, several = _needed_here(result, recipe, device)
    free = available_memory(device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"this merge needs about {bytes_words(needed)} on {device}{several}, where {bytes_words(free)} are free; "
            f"{'set memory: auto, ' if recipe.memory == 'resident' else ''}set dtype: bfloat16, choose a smaller "
            "source, or lower calibration.batch_tokens"
        )
    folder = _existing(out)
    free = shutil.disk_usage(folder).free
    # What an earlier call of this run left in its cache needs no more room.
    disk = max(0, result.estimate.disk_bytes - _written_bytes(out / "tmerge" / "cache"))
    if disk > free:
        raise NotEnoughDiskError(
            f"this merge needs about {bytes_words(disk)} of disk in {out}, where "
            f"{bytes_words(free)} are free; lower calibration.texts, fuse fewer projections, or choose another --out"
        )
    cache = _existing(Path(constants.HF_HUB_CACHE))
    needed, free = result.estimate.download_bytes, shutil.disk_usage(cache).free
    if cache.stat().st_dev == folder.stat().st_dev:
        needed += disk
    if needed > free:
        raise NotEnoughDiskError(
            f"the models to download take {bytes_words(result.estimate.download_bytes)}, and {bytes_words(free)} are "
            "free on the disk of the Hub's cache; make room, or set HF_HOME to another disk"
        )


def _needed_here(result: Check, recipe: Recipe, device: torch.device) -> tuple[int, str]:
    """Bytes that all processes of this machine will take on a device, and, of several, how many in words."""
    alone = result.estimate.memory_bytes - psutil.Process().memory_info().rss
    if (count := sharers(device)) == 1:
        return alone, ""
    shared = 0
    if device.type == "cpu" and result.target.reference.kind != "gguf":
        # What is held as it is stored lies in its file's pages, which are there once for all.
        dtype = computed_dtype(result.target, recipe, device)
        shared = held_bytes(result.target, recipe, dtype) if result.target.dtype == dtype else 0
    return count * alone - (count - 1) * min(shared, alone), f" in {count} processes"


def _written_bytes(folder: Path) -> int:
    """Of all files in a folder, as far as they take room on the disk: features are sized before they are written."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(min(file.st_size, file.st_blocks * 512) for file in files)


def _some(names: tuple[str, ...]) -> str:
    """The first three of them, and how many there are beside them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _model(facts: ModelFacts, layout: Architecture, left_out: tuple[str, ...] = ()) -> CheckedModel:
    return CheckedModel(
        ref=facts.reference.text,
        commit=facts.commit,
        architecture=facts.model_type,
        parameters=facts.parameters,
        layers=layout.num_layers,
        hidden_size=layout.hidden_size,
        licence=facts.licence,
        weight_bytes=facts.weight_bytes,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        gated=facts.gated,
        private=facts.private,
        stored=facts.stored,
        download_bytes=facts.download_bytes,
        tied_embeddings=bool(getattr(facts.config, "tie_word_embeddings", False)),
        adapter=None if facts.adapter is None else _adapter(facts.adapter, left_out),
    )


def _adapter(facts: AdapterFacts, left_out: tuple[str, ...]) -> CheckedAdapter:
    return CheckedAdapter(
        ref=facts.reference.text,
        commit=facts.commit,
        licence=facts.licence,
        rank=facts.rank,
        parameters=len(facts.parameters),
        base_commit=facts.base_commit,
        left_out=list(left_out),
    )


def _shape(layout: Architecture, name: str) -> tuple[int, int]:
    view = layout.projections([name])[0]
    return view.out_features, view.in_features


def _shapes(layout: Architecture, projections: list[str]) -> list[list[int]]:
    return [[view.layer, view.out_features, view.in_features] for view in layout.projections(projections)]


def _uneven(layout: Architecture, projections: list[str]) -> list[str]:
    """Projections whose inputs or outputs are not of one size in all layers, as with gemma4's two head sizes."""
    widths = widths_of(layout, projections)
    return [
        name for name in projections if any(len(set(widths[feature_key(name, side)])) > 1 for side in ("pre", "post"))
    ]
