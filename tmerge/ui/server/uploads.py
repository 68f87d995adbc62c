"""A visitor's file: read by a run under a path of the server, which nothing that the run says or writes shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tmerge.recipe import Recipe
from tmerge.ui.server.limits import UPLOAD_PREFIX
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["hide_upload", "with_upload", "without_paths"]


def with_upload(recipe: Recipe, home: Path, upload: Path | None) -> Recipe:
    """The recipe that is run: its dataset the copy of the uploaded file."""
    if upload is None or not recipe.calibration.dataset.startswith(UPLOAD_PREFIX):
        return recipe
    kept = home / "texts" / Path(recipe.calibration.dataset.removeprefix(UPLOAD_PREFIX)).name
    kept.parent.mkdir()
    shutil.copyfile(upload, kept)
    calibration = recipe.calibration.model_copy(update={"dataset": str(kept)})
    return recipe.model_copy(update={"calibration": calibration})


def hide_upload(run: VisitorRun) -> None:
    """Put the uploaded file's own name in place of the server's path in what the run wrote."""
    read = run.read
    if read is None or read is run.recipe:
        return
    path = read.calibration.dataset
    for name in ("tmerge/recipe.yaml", "tmerge/report.json", "README.md"):
        written = run.folder / name
        if written.is_file():
            text = written.read_text(encoding="utf-8")
            written.write_text(text.replace(path, Path(path).name), encoding="utf-8")


def without_paths(line: str, root: Path) -> str:
    """A line without the server's paths.

    Args:
        line: What a run says. A comparison reads the upload of the merge that it came from, in the folder of another
            run, so it is not its own folder's path alone that it may say.
        root: The folder that all runs' folders are in.
    """
    roots = "|".join(re.escape(str(each)) for each in (root.resolve(), root))
    home = rf"(?:{roots})[\\/]\w+"
    line = re.sub(rf"{home}[\\/]texts[\\/]", "", line)
    line = re.sub(rf"{home}(?:[\\/](?:fused|merge|adapted)\b)?", "the run's folder", line)
    return re.sub(roots, "the app's folder", line)
