"""`tmerge reproduce`: run a published recipe again, at its commits, and hold the weights' hashes against each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tmerge.calibration import file_identity
from tmerge.calibration.files import local_file
from tmerge.errors import DatasetError, ModelNotFoundError, OutputExistsError, RunNotFoundError, UnsupportedModelError
from tmerge.hub import FoundRun, find_run
from tmerge.hub_client import hub_client
from tmerge.models import fetch, file_digest, hub_errors, model_commit
from tmerge.models.reference import trusts
from tmerge.recipe import Recipe, method_of
from tmerge.report import Adaptation, Items, MergedModel, Part, Report, TrainingTexts
from tmerge.run import Run
from tmerge.stages.merge import merge
from tmerge.stages.step import Listener, Progress

__all__ = ["Digests", "Reproduction", "ScoreThereAndHere", "ThereAndHere", "difference_words", "reproduce"]

# What a run's own folder tmerge/ holds that is no checkpoint: the transport plan, and here the cache.
_PLAN, _CACHE = "tmerge/transport.safetensors", "tmerge/cache/"


class ThereAndHere(Part):
    """A library's version, a form of the method, the device, the dtype: of the run, and of its reproduction.

    None where it is not known.
    """

    there: str | None
    here: str | None

    @property
    def words(self) -> str:
        """Both of them."""
        return f"{self.there or 'not said'} there, {self.here or 'not said'} here"


class Digests(Part):
    """SHA-256 (hex) of a weights file: as the report names it, as it is published, and as it came out here."""

    there: str | None
    published: str | None
    here: str | None

    @property
    def same(self) -> bool:
        """Whether all three are."""
        return self.there == self.published == self.here


class ScoreThereAndHere(Part):
    """Bits per byte of the run, and of its reproduction."""

    there: float
    here: float


class Reproduction(Part):
    """A run, and what came out when its recipe was run again.

    Attributes:
        reference: The run, with its commit.
        same: Whether every weights file is equal, bit by bit: as the report names it, as it is published, and as it
            came out here; and nothing else is published.
        weights: File -> digests.
        others: Weights files that are published and that the report does not name.
        differs: Library, part of the method, device or dtype -> there and here.
        scores: Bits per byte.
        folder: Of what came out here.
    """

    reference: str
    same: bool
    weights: Mapping[str, Digests]
    others: Items[str]
    differs: Mapping[str, ThereAndHere]
    scores: ScoreThereAndHere
    folder: str


def reproduce(
    reference: str,
    out: str | Path,
    *,
    device: str | None = None,
    trust_remote_code: Sequence[str] = (),
    listener: Listener | None = None,
) -> Reproduction:
    """Run a finished run's recipe again.

    Args:
        reference: A pushed run (``user/name``, ``@revision``) or a run's folder.
        out: Where the reproduction goes; one that was stopped there is taken up again. Of a trained run, the merge
            goes into ``merge/`` in there, and the trained model into ``trained/``.
        device: In the place of the recipe's.
        trust_remote_code: References whose repos may run their own code, whatever the recipe says.
        listener: Hears every `Step`.

    Returns:
        Whether the same weights came out, and what differs; ``to_dict()`` is what ``--json`` prints.

    Raises:
        RunNotFoundError: No finished run there.
        OutputExistsError: `out` is the run itself, lies in it, or holds a finished run.
        ModelNotFoundError: A model that the recipe names as a file is not here, or is another one.
        DatasetError: Likewise, a local file of texts.
        UnsupportedModelError: The recipe lets code run that is not trusted here.
        TmergeError: As `merge`.
    """
    original = find_run(reference)
    changes = {"trust_remote_code": tuple(trust_remote_code), **({} if device is None else {"device": device})}
    there, recipe = original.report(), original.recipe().model_copy(update=changes)
    folder = Path(out)
    _refuse_out(original, folder)
    _refuse_untrusted(original, recipe)
    _refuse_other_models(original, there, recipe)
    _refuse_other_data(original, there, recipe)
    published = _published(original, there.weights)
    if not published:
        raise RunNotFoundError(
            f"{original.name} holds no weights that a reproduction could be held against, as a plan alone does not; to "
            "fuse from its transport: tmerge merge --plan"
        )
    others = sorted(set(published) - set(there.weights))
    changed = [name for name, digest in there.weights.items() if published.get(name) != digest]
    if listener is not None and (changed or others):
        said = f"{original.name}: {_published_words(changed, others)}; the recipe runs all the same"
        Progress("reproduce", listener).note(said)
    if listener is not None and (unsaid := original.unsaid()):
        said = ", ".join(f"{key} ({json.dumps(value)} by now)" for key, value in unsaid.items())
        Progress("reproduce", listener).note(
            f"the recipe of {original.name} was written before there was {said}: with today's defaults for what it "
            "does not say, other weights may come out"
        )
    changed_parts = _changed_parts(there, recipe)
    if listener is not None and changed_parts:
        said = "; ".join(f"{part}: {pair.words}" for part, pair in changed_parts.items())
        Progress("reproduce", listener).note(
            f"{original.name} was made by another form of the method than today's, or does not say by which ({said}): "
            "other weights may come out"
        )
    if there.adaptation is not None:
        from tmerge.stages.adapt import adapt_run

        merge(recipe, folder / "merge", listener=listener)
        data = there.adaptation.data
        dataset = _pinned(data) if data.sha256 != there.calibration.sha256 else None
        folder = folder / "trained"
        words = recipe.adaptation.model_dump(mode="json")
        here = adapt_run(Path(out) / "merge", folder, words, dataset=dataset, listener=listener)
    else:
        here = merge(recipe, folder, listener=listener)
    kept = {"there": there.weights, "published": published, "here": here.weights}
    names = sorted({*there.weights, *here.weights})
    weights = {name: Digests(**{place: files.get(name) for place, files in kept.items()}) for name in names}
    facts: list[tuple[str, str | None, str | None]] = [
        ("device", there.device, here.device),
        ("dtype", there.dtype, here.dtype),
        ("computed_in", there.computed_in, here.computed_in),
        ("calibration texts", there.calibration.sha256[:12], here.calibration.sha256[:12]),
    ]
    facts += [(role, model.commit[:19], here_of.commit[:19]) for role, model, here_of in _read_by(there, here)]
    facts += [(name, version, here.versions.get(name)) for name, version in there.versions.items()]
    if there.adaptation is not None and here.adaptation is not None:
        facts += _trained_by(there.adaptation, here.adaptation)
    return Reproduction(
        reference=original.name,
        same=not others and all(digests.same for digests in weights.values()),
        weights=weights,
        others=tuple(others),
        differs=changed_parts
        | {name: ThereAndHere(there=there, here=here) for name, there, here in facts if there != here},
        scores=ScoreThereAndHere(there=there.published_score.value, here=here.published_score.value),
        folder=str(folder),
    )


def difference_words(result: Reproduction) -> str:
    """Which of the weights differ, and why two runs of one recipe may differ, as far as can be told, in a line."""
    which = [f"{name}: {_which(digests)}" for name, digests in result.weights.items() if not digests.same]
    if result.others:
        which.append(_published_words([], result.others))
    numbers = f"{result.scores.there:.6f} bits per byte there, {result.scores.here:.6f} here"
    if all(digests.there == digests.here for digests in result.weights.values()):
        why = f"the run itself came out as its report says ({numbers})"
    elif not result.differs:
        same = "models, texts, libraries, method, device and dtype"
        why = f"{same} are the same; the processor may be another ({numbers})"
    else:
        facts = result.differs.items()
        listed = ", ".join(f"{name} {pair.words}" for name, pair in facts)
        why = f"what differs: {listed} ({numbers})"
    return "; ".join([*which, why])


def _changed_parts(there: Report, recipe: Recipe) -> dict[str, ThereAndHere]:
    """Parts of the method whose form is another by now, or that the run's report does not tell the form of."""
    before, now = there.method or {}, method_of(recipe)
    forms = {part: (before.get(part), now.get(part)) for part in sorted({*before, *now})}
    return {
        part: ThereAndHere(there=_form(earlier), here=_form(by_now))
        for part, (earlier, by_now) in forms.items()
        if earlier != by_now
    }


def _form(number: int | None) -> str | None:
    return None if number is None else f"form {number}"


def _which(digests: Digests) -> str:
    """Which of a file's three digests, not all equal, is another."""
    there, published, here = digests.there, digests.published, digests.here
    if published is None:
        return "it is not among what is published"
    if here is None:
        return "no such file came out here"
    if here == there:
        return "the published file is another than its report names, and than came out here"
    if here == published:
        return "the report names another file than is published, and than came out here"
    if there == published:
        return "the file that came out here is another than the published one, which is as its report says"
    return "the published file, the one that its report names and the one that came out here are three different ones"


def _published_words(changed: Sequence[str], others: Sequence[str]) -> str:
    """What is published that is not as its report says."""
    words = [f"the published {name} is not the file that its report names" for name in changed]
    if others:
        words.append(f"{', '.join(others)} is published and not named in its report")
    return "; ".join(words)


def _published(original: FoundRun, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 (hex) of every weights file that is there: what counts is what others load, not what is said of it.

    Raises:
        TmergeError: As `hub_errors`, where it is a repo.
    """
    if original.snapshot is None:
        folder = original.run.folder
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.safetensors"))}
        return {
            name: file_digest(path) for name, path in paths.items() if name != _PLAN and not name.startswith(_CACHE)
        }
    snapshot = original.snapshot
    assert snapshot.reference.repo is not None
    with hub_errors(snapshot.reference):
        info = hub_client().model_info(snapshot.reference.repo, revision=snapshot.commit, files_metadata=True)
    files = {entry.rfilename: entry.lfs for entry in info.siblings or []}
    digests = {}
    for name in sorted(name for name in files if name.endswith(".safetensors") and name != _PLAN):
        if (stored := files[name]) is not None:
            digests[name] = stored.sha256
        elif name in names:  # kept outside large-file storage, which alone states a digest
            path = fetch(snapshot, name)
            digests.update({} if path is None else {name: file_digest(path)})
        else:
            digests[name] = ""
    return digests


def _refuse_out(original: FoundRun, out: Path) -> None:
    """What is compared would be written over, or the comparison be of a file with itself."""
    if original.snapshot is None and out.resolve().is_relative_to(original.run.folder.resolve()):
        raise OutputExistsError(
            f"{out} is the run that is to be reproduced, or lies in it; choose another --out for the reproduction"
        )
    if any(Run(folder).reported for folder in (out, out / "trained")):
        raise OutputExistsError(f"{out} holds a finished run already; choose another --out for the reproduction")


def _read_by(there: Report, here: Report) -> Iterator[tuple[str, MergedModel, MergedModel]]:
    """What both runs read, by its part in them."""
    for role in ("target", "source", "source_base_model"):
        before, now = getattr(there, role), getattr(here, role)
        if before is not None and now is not None:
            yield role.removesuffix("_model"), before, now
    for before, now in zip(there.sources, here.sources, strict=False):
        yield before.name, before.model, now.model


def _trained_by(there: Adaptation, here: Adaptation) -> list[tuple[str, str | None, str | None]]:
    """What decided a training, of both runs; nothing of what an earlier report does not tell."""
    facts: list[tuple[str, str | None, str | None]] = [
        ("training texts", there.data.sha256[:12], here.data.sha256[:12]),
        ("training device", there.device, here.device),
    ]
    now = here.versions or {}
    facts += [(f"training {name}", version, now.get(name)) for name, version in (there.versions or {}).items()]
    return [fact for fact in facts if fact[1] is not None]


def _refuse_untrusted(original: FoundRun, recipe: Recipe) -> None:
    """Refuse what would run code that nobody here has said may run."""
    if untold := [name for name in original.trusted if not trusts(recipe.trust_remote_code, name)]:
        listed = ", ".join(untold)
        raise UnsupportedModelError(
            f"the recipe of {original.name} lets the own code of {listed} run; read that code, and if you trust it "
            f"say so: {' '.join(f'--trust-remote-code {name}' for name in untold)}"
        )


def _refuse_other_models(original: FoundRun, report: Report, recipe: Recipe) -> None:
    """Local models are known by their contents: another one would be merged for nothing."""
    named = [
        ("target", report.target, recipe.target, None),
        ("source_base" if recipe.sources else "source", report.source, recipe.source, recipe.adapter),
    ]
    if report.source_base_model is not None and recipe.source_base is not None and not recipe.sources:
        named.append(("source_base", report.source_base_model, recipe.source_base, None))
    for each, source in zip(report.sources, recipe.sources, strict=False):
        named.append((each.name, each.model, source.source or recipe.source, source.adapter))
    for role, model, reference, adapter in named:
        commit = model.commit
        base = recipe.base_of(reference)
        if commit.startswith("sha256:") and (here := model_commit(reference, adapter, base)) != commit:
            raise ModelNotFoundError(
                f"{reference} here is not the {role} that {original.name} was made from ({here[7:19]} here, "
                f"{commit[7:19]} there); put that one in its place"
            )


def _refuse_other_data(original: FoundRun, report: Report, recipe: Recipe) -> None:
    """Local files of texts are known by their contents too; other texts would give other weights."""
    read, calibration = report.calibration, recipe.calibration
    files = [(calibration.dataset, read.file_sha256), (calibration.match_on, read.other_sha256)]
    if recipe.fusion.kept_on is not None and report.evaluation.kept is not None:
        files.append((recipe.fusion.kept_on, report.evaluation.kept.file_sha256))
    if report.adaptation is not None:
        data = report.adaptation.data
        files += [(data.dataset, data.file_sha256)] if data.sha256 != read.sha256 else []
    for reference, digest in files:
        if reference is None or digest is None:  # of the Hub or built in, or of a report from before they were hashed
            continue
        path = local_file(reference)
        if path is None or not path.is_file():
            made = f"{reference}, whose texts {original.name} was made from,"
            raise DatasetError(f"{made} is not here; put it in its place (sha256 {digest})")
        if (here := file_identity(path).removeprefix("sha256:")) != digest:
            raise DatasetError(
                f"the contents of {reference} have changed since {original.name} was made from it ({here[:12]} here, "
                f"{digest[:12]} there); put that file in its place"
            )


def _pinned(data: TrainingTexts) -> str:
    return f"{data.dataset}@{data.revision}" if data.revision else data.dataset
