"""Try a built wheel as a stranger would: in an empty environment, far from the checkout. Called by `make dist`.

    python tests/dist/try_wheel.py dist/tmerge_llm-0.1.0-py3-none-any.whl

Two pico models are made with the Python that runs this; everything else runs in an environment that holds the wheel and
what it depends on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# All that the package reads of its own beside its code.
DATA = """
from importlib import resources
from tmerge.calibration import sample_languages, sample_texts
from tmerge.evaluation.tasks import _defined, _definition
from tmerge.recipe import load_recipe, preset_names
from tmerge.hub.card import write_card
assert (resources.files("tmerge.hub") / "card.md").is_file() and (resources.files("tmerge") / "py.typed").is_file()
pages = {part: sorted(path.name for path in (resources.files("tmerge") / part / "templates").iterdir()) for part in PAGES}
assert pages == PAGES, pages
presets = preset_names()
assert presets == PRESETS and all(load_recipe(name) for name in presets), presets
assert sample_languages() == ["cantonese", "english", "indonesian", "malay", "thai"]
assert all(len(sample_texts(name)) > 50 for name in sample_languages())
assert _defined() and all(_definition(name, None) for name in _defined())
"""


def pinned(package: str) -> str:
    """The line of requirements.txt that pins it."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def main(wheel: Path) -> None:
    """Install it, and run what `make dist` promises."""
    from tests.pico import save_pico
    from tmerge.version import DISTRIBUTION, VERSION

    with tempfile.TemporaryDirectory(prefix="tmerge-wheel-") as name:
        folder = Path(name)
        save_pico("llama", folder / "target")
        save_pico("gpt2", folder / "source", seed=1)
        venv.create(folder / "env", with_pip=True)
        scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        # Nothing of the checkout, or of the environment that runs this.
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        env["HF_HUB_OFFLINE"] = "1"

        def run(*words: str | Path) -> str:
            command = [str(scripts / words[0]), *map(str, words[1:])]
            ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
            return ended.stdout

        # As the Makefile has it: from an index that offers builds for CPUs, this pin is one.
        run("python", "-m", "pip", "install", "--quiet", pinned("torch"))
        run("python", "-m", "pip", "install", "--quiet", wheel.resolve())
        where = run("python", "-c", "import tmerge; print(tmerge.__file__)")
        assert Path(where.strip()).is_relative_to(folder / "env"), where
        assert run("tmerge", "--version") == f"tmerge {VERSION}\n"
        found = json.loads(run("tmerge", "check", "--target", folder / "target", "--source", folder / "source", "--json"))
        assert found["target"]["architecture"] == "llama" and found["source"]["architecture"] == "gpt2"
        assert list(found["projections"]["matched"]) == ["q", "k", "v", "o"]
        # As many as the checkout has: a wheel that lacks one is found out.
        presets = sorted(path.stem for path in (ROOT / "tmerge/recipe/presets").glob("*.yaml"))
        pages = {
            part: sorted(path.name for path in (ROOT / "tmerge" / part / "templates").iterdir())
            for part in ("plots", "ui")
        }
        run("python", "-c", f"PRESETS, PAGES = {presets!r}, {pages!r}\n{DATA}")
        for hardware in ("cpu", "zerogpu"):
            space = json.loads(run("tmerge", "space", "--repo", "user/x", "--hardware", hardware, "--dry-run", "--json"))
            assert {"app.py", "README.md", "requirements.txt", "tmerge/hub/spaces/cpu/app.py"} <= set(space["files"])
        sys.stdout.write(f"{DISTRIBUTION} {VERSION}: {wheel.name} works in an empty environment\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
