"""`tmerge reproduce`: run a published recipe again, at its commits, and hold the weights' hashes against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tmerge.errors import ModelNotFoundError
from tmerge.hub import FoundRun, find_run
from tmerge.models import model_commit
from tmerge.pipeline import merge
from tmerge.recipe import Recipe
from tmerge.session import Listener

__all__ = ["difference_words", "reproduce"]


def reproduce(reference: str, out: str | Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Run a finished run's recipe again.

    Args:
        reference: A pushed run (``user/name``, ``@revision``) or a run's folder.
        out: Where the reproduction goes; one that was stopped there is taken up again. Of a trained run, the merge
            goes into ``merge/`` in there, and the trained model into ``trained/``.
        listener: Hears every `Step`.

    Returns:
        ``reference`` (with its commit), ``same`` (whether every weights file is equal, bit by bit), ``weights`` (file
        -> its SHA-256 ``there`` and ``here``), ``differs`` (library, device or dtype -> there and here), ``scores``
        (bits per byte there and here), ``folder``.

    Raises:
        RunNotFoundError: No finished run there.
        ModelNotFoundError: A model that the recipe names as a file is not here, or is another one.
        TmergeError: As `merge`.
    """
    found = find_run(reference)
    there, recipe = found.report(), found.recipe()
    _refuse_other_models(found, there, recipe)
    folder = Path(out)
    if "adaptation" in there:
        from tmerge.adapted import adapt_run

        merge(recipe, folder / "merge", listener=listener)
        data, calibration = there["adaptation"]["data"], there["calibration"]
        other = data["sha256"] != calibration["sha256"]
        dataset = _pinned(data) if other else None
        folder = folder / "trained"
        words = recipe.adaptation.model_dump(mode="json")
        here = adapt_run(Path(out) / "merge", folder, words, dataset=dataset, listener=listener)
    else:
        here = merge(recipe, folder, listener=listener)
    names = sorted({*there["weights"], *here["weights"]})
    weights = {name: {"there": there["weights"].get(name), "here": here["weights"].get(name)} for name in names}
    facts = [(name, there.get(name), here.get(name)) for name in ("device", "dtype", "computed_in")]
    facts += [(name, version, here["versions"].get(name)) for name, version in there["versions"].items()]
    return {
        "reference": found.name,
        "same": all(pair["there"] == pair["here"] for pair in weights.values()),
        "weights": weights,
        "differs": {name: {"there": mine, "here": theirs} for name, mine, theirs in facts if mine != theirs},
        "scores": {"there": _score(there), "here": _score(here)},
        "folder": str(folder),
    }


def difference_words(result: dict[str, Any]) -> str:
    """Why two runs of one recipe may differ, as far as can be told, in a line."""
    scores = result["scores"]
    numbers = f"{scores['there']:.6f} bits per byte there, {scores['here']:.6f} here"
    if not result["differs"]:
        return f"libraries, device and dtype are the same; the processor may be another ({numbers})"
    listed = ", ".join(f"{name} {pair['there']} there, {pair['here']} here" for name, pair in result["differs"].items())
    return f"what differs: {listed} ({numbers})"


def _refuse_other_models(found: FoundRun, report: dict[str, Any], recipe: Recipe) -> None:
    """Local models are known by their contents: another one would be merged for nothing."""
    for role in ("target", "source"):
        commit, reference = report[role]["commit"], getattr(recipe, role)
        if commit.startswith("sha256:") and (here := model_commit(reference)) != commit:
            raise ModelNotFoundError(
                f"{reference} here is not the {role} that {found.name} was made from ({here[7:19]} here, "
                f"{commit[7:19]} there); put that one in its place"
            )


def _pinned(data: dict[str, Any]) -> str:
    return f"{data['dataset']}@{data['revision']}" if data["revision"] else str(data["dataset"])


def _score(report: dict[str, Any]) -> float:
    evaluation = report["evaluation"]
    return float((evaluation["adapted"]["score"] if "adapted" in evaluation else evaluation["fused"])["value"])
