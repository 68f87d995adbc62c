"""Deploy the app as a Space: its front matter and requirements, and the package itself beside its entry.

What is uploaded is the tmerge that runs this command, released or not, so that the Space shows what was tried here.
The Space's repo can be installed with pip as well: a job that a visitor starts from it runs the Space's own code.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceHardware, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from tmerge.errors import PushError, RunNotFoundError
from tmerge.hub.failures import no_token, pushing
from tmerge.hub_client import hub_client
from tmerge.quantities import bytes_words, count_words
from tmerge.version import DISTRIBUTION, VERSION

__all__ = ["HARDWARE", "DeployedSpace", "SpacePlan", "deploy_space", "plan_space"]

HARDWARE: dict[str, SpaceHardware] = {"cpu": SpaceHardware.CPU_BASIC, "zerogpu": SpaceHardware.ZERO_A10G}
"""What ``--hardware`` may be, and what the Hub calls it."""

# By these files a Space is known to hold this app, and may be brought up to date.
_MARK = "tmerge/hub/space.py"
# A Space that has just been made holds no more than these.
_NEW = {".gitattributes", "README.md"}
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class SpacePlan:
    """What a deployment would do.

    Attributes:
        repo: Of the Space.
        hardware: A key of `HARDWARE`.
        files: Path in the repo -> bytes, sorted.
    """

    repo: str
    hardware: str
    files: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge space --dry-run --json`` prints it."""
        return {
            "repo": self.repo,
            "hardware": self.hardware,
            "files": self.files,
            "total_bytes": self.total_bytes,
        }


@dataclass(frozen=True)
class DeployedSpace:
    """A Space that was deployed.

    Attributes:
        repo: Hub id.
        url: Its page.
        commit: Full hash.
    """

    repo: str
    url: str
    commit: str


def plan_space(repo: str, hardware: str = "cpu") -> SpacePlan:
    """What would be uploaded; asks no network.

    Args:
        repo: ``user/space``, or ``space`` for the user's own.
        hardware: A key of `HARDWARE`.

    Raises:
        PushError: No such repo name or hardware.
    """
    if hardware not in HARDWARE:
        raise PushError(f"there is no Space for {hardware!r}; choose --hardware {' or '.join(HARDWARE)}")
    with pushing(repo):
        validate_repo_id(repo)
    written = _written()
    sizes = {name: path.stat().st_size for name, path in _copied(hardware).items()}
    sizes |= {name: len(text.encode()) for name, text in written.items()}
    return SpacePlan(repo, hardware, dict(sorted(sizes.items())))


def deploy_space(
    planned: SpacePlan,
    *,
    private: bool = False,
    token: str | None = None,
    listener: Callable[[str], None] | None = None,
) -> DeployedSpace:
    """Make the Space, or bring it up to date, in one commit.

    Args:
        planned: Of `plan_space`.
        private: Make it private, where it is made.
        token: In place of the user's own, which ``hf auth login`` has stored.
        listener: Hears in a few words of every step.

    Raises:
        PushError: No token or no right to write, a plan that has no such Spaces, a Space that holds another app, a
            network that is lost.
    """
    say = listener or (lambda what: None)
    if token is None and get_token() is None:
        raise no_token(planned.repo)
    api, repo = hub_client(token=token), planned.repo
    with pushing(repo, token):
        if "/" not in repo:
            repo = f"{api.whoami()['name']}/{repo}"
        moves = _open(api, repo, planned.hardware, private=private, say=say)
        with _staged(planned.hardware) as staged:
            say(f"uploading {count_words(len(planned.files), 'file')}, {bytes_words(planned.total_bytes)}")
            done = api.upload_folder(
                repo_id=repo,
                repo_type="space",
                folder_path=staged,
                # Modules that are no more would still be found there.
                delete_patterns=["tmerge/**", "*.dist-info/**"],
                commit_message=f"tmerge {VERSION}, deployed by `tmerge space`",
            )
        # Not before: an upload that fails leaves the Space as it was.
        if moves:
            say(f"asking for {HARDWARE[planned.hardware].value}")
            api.request_space_hardware(repo, HARDWARE[planned.hardware])
    say("deployed; the Hub builds it now, which takes some minutes")
    return DeployedSpace(repo, f"{constants.ENDPOINT}/spaces/{repo}", done.oid)


def _open(api: HfApi, repo: str, hardware: str, *, private: bool, say: Callable[[str], None]) -> bool:
    """Make the Space where it is missing; refuse to write over what is not this app.

    Returns:
        Whether it is there and runs on other hardware.
    """
    say(f"looking at {repo}")
    wanted = HARDWARE[hardware]
    try:
        info = api.space_info(repo)
    except RepositoryNotFoundError:
        say(f"making the Space {repo} on {wanted.value}")
        try:
            api.create_repo(repo, repo_type="space", space_sdk="gradio", space_hardware=wanted, private=private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 402:
                raise
            raise PushError(
                f"{repo}: the Hub gives such a Space on {wanted.value} to paying accounts only; see "
                f"{constants.ENDPOINT}/pro, or run the app at home with `tmerge app`"
            ) from None
        return False
    names = {entry.rfilename for entry in info.siblings or ()}
    if _MARK not in names and not names <= _NEW:
        raise PushError(f"{repo} is a Space with another app, and is not written over; choose another --repo")
    if private and not info.private:
        raise PushError(
            f"{repo} is there and public, so --private cannot be kept; make it private in its settings, or choose "
            "another --repo"
        )
    runtime = info.runtime
    return runtime is not None and wanted.value not in (runtime.hardware, runtime.requested_hardware)


def _folder(hardware: str) -> Path:
    """The files of one Space: in the installed package, or at the root of a checkout."""
    for spaces_folder in (_PACKAGE / "hub" / "spaces", _PACKAGE.parent / "spaces"):
        if (spaces_folder / hardware / "app.py").is_file():
            return spaces_folder / hardware
    raise RunNotFoundError("this installation of tmerge lacks the Spaces' files; install it again")


def _copied(hardware: str) -> dict[str, Path]:
    """Path in the repo -> file here: the Space's own files, and the package."""
    own = {path.name: path for path in _folder(hardware).iterdir() if path.is_file()}
    package = {
        f"tmerge/{path.relative_to(_PACKAGE).as_posix()}": path
        for path in _walk(_PACKAGE)
        if path.suffix not in (".pyc", ".pyo") and not path.name.startswith(".")
    }
    return own | package


def _walk(folder: Path) -> Iterator[Path]:
    """All files, through links as well, as the Spaces' own folder is one in a checkout."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name != "__pycache__":
                yield from _walk(path)
        else:
            yield path


def _written() -> dict[str, str]:
    """What the Space's repo holds beyond copies: what makes it a project that pip installs."""
    try:
        facts = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise RunNotFoundError(
            f"tmerge runs here without being installed as {DISTRIBUTION}, so what it needs is not known; run "
            "`pip install -e .` first"
        ) from None
    needed = [line for line in importlib.metadata.requires(DISTRIBUTION) or () if "extra ==" not in line]
    project = "\n".join(
        [
            "# Written by `tmerge space`, so that a job can install this very code: pip install git+<this repo>",
            "[build-system]",
            'requires = ["setuptools>=77"]',
            'build-backend = "setuptools.build_meta"',
            "",
            "[project]",
            f'name = "{DISTRIBUTION}"',
            f'version = "{VERSION}"',
            f'requires-python = "{facts["Requires-Python"]}"',
            f"dependencies = {_toml(needed)}",
            "",
            "[project.scripts]",
            'tmerge = "tmerge.cli:main"',
            "",
            "[tool.setuptools.packages.find]",
            'include = ["tmerge*"]',
            "",
            "[tool.setuptools.package-data]",
            'tmerge = ["**/*"]',
            "",
        ]
    )
    return {"pyproject.toml": project}


def _toml(lines: list[str]) -> str:
    quoted = ['"' + line.replace("\\", "\\\\").replace('"', '\\"') + '"' for line in lines]
    return f"[{', '.join(quoted)}]"


@contextmanager
def _staged(hardware: str) -> Iterator[Path]:
    """A folder with all that is uploaded."""
    with tempfile.TemporaryDirectory(prefix="tmerge-space-") as name:
        staged = Path(name)
        for inside, path in _copied(hardware).items():
            staged_file = staged / inside
            staged_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staged_file)
        for inside, text in _written().items():
            (staged / inside).parent.mkdir(parents=True, exist_ok=True)
            (staged / inside).write_text(text, encoding="utf-8")
        yield staged
