"""What a visitor of the app may ask for: on a public Space within limits, and nowhere code or paths of the server."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from tmerge.calibration import SAMPLES_PREFIX
from tmerge.errors import (
    ModelNotFoundError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    RecipeError,
    RemoteError,
    TmergeError,
)
from tmerge.models import ModelReference
from tmerge.preflight.check import Check
from tmerge.quantities import bytes_words, number_words
from tmerge.recipe import Apart, CompareSettings, Recipe, source_name
from tmerge.version import DISTRIBUTION, VERSION, installs_tmerge

__all__ = [
    "PACKAGE_VARIABLE",
    "UPLOAD_PREFIX",
    "AppSettings",
    "BusyError",
    "TooManyRunsError",
    "describe_limits",
    "operations_words",
    "refuse_dataset_path",
    "refuse_large",
    "settings_here",
    "vetted",
]

PACKAGE_VARIABLE = "TMERGE_PACKAGE"
"""A Space's variable: what jobs install tmerge from, in place of the Space's own repo (which they cannot read if it is
private): an address, or a release such as ``tmerge-llm==0.1.0``."""

UPLOAD_PREFIX = "upload:"
"""A recipe of the browser names an uploaded file by this and its name; the server's path of it is never shown."""

_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@[\w./-]{1,100})?")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?")

# Smaller ones would be thousands of files, on the Space's disk and in each push.
_LEAST_SHARD_BYTES = 10**6


def _of_apart(key: str) -> Callable[[Recipe], float]:
    """A number of the recipe that a shared structure does not have."""
    return lambda recipe: getattr(recipe.transport, key) if isinstance(recipe.transport, Apart) else 0


# Most that a public Space takes of the numbers that decide how much work a run is.
_MOST_SOURCES = 4
_MOST: tuple[tuple[str, Callable[[Recipe], float], float], ...] = (
    ("adaptation.batch_size", lambda recipe: recipe.adaptation.batch_size, 16),
    ("adaptation.accumulation", lambda recipe: recipe.adaptation.accumulation, 8),
    ("adaptation.max_tokens", lambda recipe: recipe.adaptation.max_tokens, 1024),
    ("calibration.max_tokens", lambda recipe: recipe.calibration.max_tokens, 1024),
    ("calibration.batch_tokens", lambda recipe: recipe.calibration.batch_tokens, 16384),
    ("calibration.token_rows", lambda recipe: recipe.calibration.token_rows, 8000),
    ("transport.max_iterations", lambda recipe: recipe.transport.max_iterations, 2000),
    ("transport.layer_max_iterations", _of_apart("layer_max_iterations"), 20000),
    ("transport.entries_kept", lambda recipe: recipe.transport.entries_kept, 512),
    ("transport.layers_kept", _of_apart("layers_kept"), 16),
    ("evaluation.texts", lambda recipe: recipe.evaluation.texts, 1000),
    ("evaluation.bootstrap", lambda recipe: recipe.evaluation.bootstrap, 10000),
    ("evaluation.descent", lambda recipe: recipe.evaluation.descent, 200),
    ("fusion.keep_texts", lambda recipe: getattr(recipe.fusion, "keep_texts", 0), 1000),
    ("the number of fusion.alphas", lambda recipe: len(recipe.fusion.alphas), 10),
)


class TooManyRunsError(TmergeError):
    """The visitor, or the app as a whole, has as many runs as it may have."""


class BusyError(TmergeError):
    """The app does one heavy thing at a time, and something else is being done."""


@dataclass(frozen=True)
class AppSettings:
    """What the app allows, ``math.inf`` being no limit; `settings_here` knows where it runs.

    Attributes:
        public: Whether strangers use it: then the limits below hold.
        max_parameters: Most parameters of either model.
        max_download_bytes: Most bytes of weights that are fetched for one run.
        max_texts: Most calibration texts, held-out ones included.
        max_upload_bytes: Largest calibration file that is taken.
        max_operations: Most floating-point operations of a run, as `check` counts them: the same for a recipe at every
            moment, as seconds are not.
        runs_per_visitor: Most runs of one visitor that wait or run at once.
        total_runs: Most runs of all visitors that wait or run at once.
        runs_kept_seconds: A run that has ended is removed from the disk this long after it was last looked at.
        runs_kept_share: Runs that have ended are removed sooner, the oldest first, while they take more than this share
            of what the disk would have free without them: half of it leaves as much for the run that is at work.
        zero_gpu: Whether the models read on ZeroGPU (`tmerge.ui.server.zero`).
        max_gpu_seconds: Most seconds of a GPU that are asked for in one run.
        job_package: What a job on a visitor's account installs tmerge from; None offers no jobs.
        local_root: Models and datasets may be named by a path below this folder; None refuses all paths.
    """

    public: bool = False
    max_parameters: float = math.inf
    max_download_bytes: float = math.inf
    max_texts: float = math.inf
    max_upload_bytes: int = 50 * 2**20
    max_operations: float = math.inf
    runs_per_visitor: float = math.inf
    total_runs: float = math.inf
    runs_kept_seconds: float = 6 * 3600
    runs_kept_share: float = 0.5
    zero_gpu: bool = False
    max_gpu_seconds: float = math.inf
    job_package: str | None = None
    local_root: Path | None = None

    @property
    def elsewhere(self) -> AppSettings:
        """What holds of a run elsewhere, such as a job: no limit of this app, and still no path or code."""
        return AppSettings(local_root=self.local_root)


def settings_here() -> AppSettings:
    """Limits on a Space (``SPACE_ID`` is set there), none but the uploads' size elsewhere.

    Raises:
        RemoteError: What jobs are to install tmerge from is another project's package, or none.
    """
    space = os.environ.get("SPACE_ID")
    if not space:
        return AppSettings(max_upload_bytes=500 * 2**20, runs_kept_seconds=24 * 3600)
    return AppSettings(
        public=True,
        max_parameters=2_000_000_000,
        max_download_bytes=10 * 10**9,
        max_texts=2000,
        # About an hour of the two processors that a free Space has.
        max_operations=3e14,
        runs_per_visitor=1,
        total_runs=8,
        runs_kept_seconds=2 * 3600,
        zero_gpu=os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true"),
        # A free account had 210 s a day when this was written, and a visitor who is not signed in 120 s.
        max_gpu_seconds=200,
        # The Space's own repo, which `tmerge space` makes installable: the job then runs the code that is seen here.
        job_package=_job_package() or f"git+{constants.ENDPOINT}/spaces/{space}",
    )


def _job_package() -> str | None:
    """What the Space's owner has set for it, if anything."""
    package = os.environ.get(PACKAGE_VARIABLE, "").strip()
    if package and not installs_tmerge(package):
        raise RemoteError(
            f"the variable {PACKAGE_VARIABLE} is {package!r}, and jobs would install that beside a visitor's token; "
            f"set it to git+https://... of this project, {DISTRIBUTION}=={VERSION}, or its wheel's https:// address"
        )
    return package or None


def vetted(recipe: Recipe, settings: AppSettings) -> Recipe:
    """The recipe as it may run here, without the section that only ``tmerge compare`` reads.

    Raises:
        TmergeError: It names code to run, a path of the server, or more than a visitor may ask for.
    """
    if recipe.trust_remote_code:
        raise RecipeError(
            "trust_remote_code runs a repo's own code and cannot be set from the browser; run `tmerge merge` on "
            "your own machine for that"
        )
    for key in ("target", "source", "source_base", "adapter", "plan"):
        reference = getattr(recipe, key)
        if reference is not None:
            _refuse_path(key, reference, settings, demo=key != "plan")
    # Each is asked for on the Hub before it is known what the run takes.
    if settings.public and len(recipe.sources) > _MOST_SOURCES:
        raise RecipeError(_too_much("the number of sources", len(recipe.sources), _MOST_SOURCES))
    for number, source in enumerate(recipe.sources, start=1):
        _refuse_path(source_name(number), source.reference, settings, demo=True)
    refuse_dataset_path(recipe.calibration.dataset, settings)
    for key, texts in (("calibration.match_on", recipe.calibration.match_on), ("fusion.keep", recipe.fusion.kept_on)):
        if texts is not None:
            refuse_dataset_path(texts, settings, key)
    if not _DEVICE.fullmatch(recipe.device):
        raise RecipeError(f"device is {recipe.device!r}; choose auto, cpu, cuda or mps")
    if settings.zero_gpu and recipe.device != "auto":
        raise RecipeError(f"device is {recipe.device!r}; this app runs on ZeroGPU, which takes auto alone")
    if settings.public and recipe.save.shard_bytes < _LEAST_SHARD_BYTES:
        raise RecipeError(
            f"save.max_shard_size is {recipe.save.max_shard_size!r}, where this app takes "
            f"{_LEAST_SHARD_BYTES // 10**6}MB at least; raise it, or run `tmerge merge` on your own machine"
        )
    if recipe.calibration.texts > settings.max_texts:
        raise RecipeError(_too_much("calibration.texts", recipe.calibration.texts, settings.max_texts))
    if settings.public:
        for name, read, most in _MOST:
            if read(recipe) > most:
                raise RecipeError(_too_much(name, read(recipe), most))
    return recipe.model_copy(update={"compare": CompareSettings()})


def refuse_large(found: Check, settings: AppSettings) -> None:
    """Refuse models that are too large for this app, from what `check` found and before anything is fetched.

    Raises:
        TmergeError: With the size and what is allowed.
    """
    own = "duplicate the Space, or run `tmerge merge` on your own machine"
    several = [(relative.name, relative.facts) for relative in found.sources]
    models = [("target", found.target), ("source", found.source), *several]
    for role, facts in models:
        if facts.parameters > settings.max_parameters:
            raise NotEnoughMemoryError(
                f"the {role} {facts.reference.text!r} has {number_words(facts.parameters)} parameters, where this "
                f"app takes {number_words(settings.max_parameters)}; choose a smaller model, {own}"
            )
    # What several adapters are joined to is fetched once.
    on_hub = {facts.reference.text: facts.weight_bytes for _, facts in models if facts.reference.kind == "hub"}
    fetched = sum(on_hub.values())
    if fetched > settings.max_download_bytes:
        raise NotEnoughDiskError(
            f"the {len(on_hub)} models are {bytes_words(fetched)} to fetch, where this app takes "
            f"{bytes_words(settings.max_download_bytes)}; choose smaller models, {own}"
        )
    operations = found.estimate.operations
    if operations > settings.max_operations:
        raise RecipeError(
            f"this run takes {operations_words(operations)}, where this app takes "
            f"{operations_words(settings.max_operations)}; lower calibration.texts, choose smaller models, {own}"
        )


def operations_words(count: float) -> str:
    """A number of floating-point operations."""
    return f"{count / 1e12:,.3g} trillion operations"


def _too_much(name: str, value: float, most: float) -> str:
    return f"{name} is {value:g}, where this app takes {most:g}; lower it, or run `tmerge merge` on your own machine"


def _refuse_path(key: str, reference: str, settings: AppSettings, *, demo: bool) -> None:
    if _is_below(reference, settings.local_root):
        return
    refusal = (
        f"{key} {reference!r} is a path, and the browser reads none; name a Hub id such as HuggingFaceTB/SmolLM2-135M"
    )
    try:
        model = ModelReference.parse(reference)
    except TmergeError:
        # Its own words tell whether a path exists, which is nobody's business.
        if "/" in reference.strip("/") and reference[:1] not in "./~\\":
            raise ModelNotFoundError(
                f"{key} {reference!r} is not a Hub id; write user/name or user/name@revision"
            ) from None
        raise ModelNotFoundError(refusal) from None
    if model.path is not None or (model.demo is not None and not demo):
        raise ModelNotFoundError(refusal)


def refuse_dataset_path(dataset: str, settings: AppSettings, key: str = "calibration.dataset") -> None:
    """Refuse a dataset that would be read from the server's disk.

    Raises:
        RecipeError: It is neither a Hub id, samples nor an upload.
    """
    name = dataset.strip()
    if name.startswith((SAMPLES_PREFIX, UPLOAD_PREFIX)) or _is_below(name, settings.local_root):
        return
    from tmerge.calibration.files import FILE_SUFFIXES

    path = Path(name)
    if not _HUB_DATASET.fullmatch(name) or path.suffix.lower() in FILE_SUFFIXES or path.exists():
        raise RecipeError(
            f"{key} {name!r} is not a Hub dataset; write user/name or samples:english, or upload the file"
        )


def _is_below(reference: str, root: Path | None) -> bool:
    if root is None or not reference.startswith(str(root)):
        return False
    return Path(reference).resolve().is_relative_to(root.resolve())


def describe_limits(settings: AppSettings) -> list[tuple[str, str]]:
    """The limits in words, for the page that shows them."""
    gpu_seconds = settings.max_gpu_seconds if settings.zero_gpu else math.inf
    limits: list[tuple[str, float, Callable[[float], str]]] = [
        ("parameters of either model", settings.max_parameters, number_words),
        ("weights fetched", settings.max_download_bytes, bytes_words),
        ("calibration texts", settings.max_texts, "{:,}".format),
        ("work", settings.max_operations, operations_words),
        ("time that a GPU is asked for", gpu_seconds, "{:.0f} s".format),
        ("runs at once", settings.runs_per_visitor, str),
    ]
    return [(name, words(most)) for name, most, words in limits if most < math.inf]
