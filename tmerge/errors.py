"""What a user can do wrong, one class a kind, each with its message.

Every error here is *the user's to mend*: its text names the value, the place and the remedy on one line,
and the command line shows that line alone and exits with ``exit_code``. A fault of ours is any other
exception; it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import errno
import os
import re

__all__ = [
    "AdaptationError",
    "Cancelled",
    "CheckpointError",
    "ComparisonError",
    "DatasetError",
    "DeviceError",
    "EndedElsewhereError",
    "GatedModelError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NoSharedStructureError",
    "NotEnoughDiskError",
    "NotEnoughMemoryError",
    "OutputExistsError",
    "PlanError",
    "PortTakenError",
    "ProcessLostError",
    "ProcessesError",
    "PushError",
    "ReadOnlyError",
    "RemoteError",
    "ReproductionError",
    "RecipeError",
    "ReportError",
    "RunBusyError",
    "RunNotFoundError",
    "SavedModelMismatchError",
    "TmergeError",
    "TokenizerError",
    "TooFewTextsError",
    "TransportError",
    "UnsupportedModelError",
    "of_the_system",
]


# What ends a line, moves a terminal's cursor, turns the direction of writing or cannot be encoded: messages repeat what
# users and other people's files wrote.
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TmergeError(Exception):
    """Base of every error that a user can mend; ``str(error)`` is one line with the remedy in it."""

    exit_code = 2

    def __str__(self) -> str:
        return _UNPRINTED.sub(lambda found: ascii(found[0])[1:-1], super().__str__())


class RecipeError(TmergeError):
    """A recipe's key or value is not one that tmerge knows."""


class ModelNotFoundError(TmergeError):
    """A model reference names nothing that can be reached: no such repo, folder or file, or no network."""


class GatedModelError(TmergeError):
    """The repo exists, but this account has no access to it."""


class UnsupportedModelError(TmergeError):
    """The model's architecture or block layout is not a causal decoder that tmerge can read."""


class CheckpointError(TmergeError):
    """A weights file is truncated, of the wrong kind, or one (a pickle) that tmerge does not open."""


class TokenizerError(TmergeError):
    """The model has no tokenizer, or one that cannot serve it."""


class DatasetError(TmergeError):
    """The calibration dataset, its column or its file cannot be read."""


class TooFewTextsError(DatasetError):
    """Fewer usable texts than a transport plan can be estimated from."""


class AdaptationError(TmergeError):
    """A training that cannot start or whose loss is not finite."""


class OutputExistsError(TmergeError):
    """The output folder exists and is not a run of this recipe."""


class ReadOnlyError(TmergeError):
    """The folder cannot be written: a read-only disk, or another user's."""


class RunBusyError(TmergeError):
    """Another process is at work in the run's folder."""


class RunNotFoundError(TmergeError):
    """The folder is not a (finished) run of tmerge."""


class ReportError(RunNotFoundError):
    """A run's report.json that cannot be read: damaged, of another schema, or with something missing or amiss."""


class ComparisonError(TmergeError):
    """A compare.json that cannot be read: damaged, of another schema, or with something missing or amiss."""


class NotEnoughDiskError(TmergeError):
    """The run does not fit on the disk."""


class NotEnoughMemoryError(TmergeError):
    """The run does not fit in memory, or ran out of it."""


class PlanError(TmergeError):
    """A pushed run's transport plan does not fit this merge: other models, texts or projections."""


class PushError(TmergeError):
    """A run cannot be pushed: no token or no right to write, a verdict that needs saying, a name that is taken."""


class RemoteError(TmergeError):
    """A recipe that cannot run as a job, or a job that the Hub refused or that failed."""


class ReproductionError(TmergeError):
    """A reproduction whose weights differ from the published ones. The run was done; its result is a difference."""

    exit_code = 1


class DeviceError(TmergeError):
    """The asked device or dtype is not to be had on this machine."""


class MissingExtraError(TmergeError):
    """An optional package is not installed; the message gives the pip command that brings it."""


class PortTakenError(TmergeError):
    """The app cannot listen on the port it was given."""


class TransportError(TmergeError):
    """A transport problem that has no answer: not-finite costs, marginals that do not match, eps <= 0."""


class FusionError(TmergeError):
    """What should be written into the target cannot be worked out."""


class NoSharedStructureError(TransportError):
    """No residual stream that two models could be matched on: it is not of one width, or no pair of layers reads it."""


class SavedModelMismatchError(TmergeError):
    """The checkpoint on disk does not compute what the model in memory computed. A fault, not bad input."""

    exit_code = 1


def of_the_system(error: BaseException) -> TmergeError | None:
    """What another's error says of this machine that its user can mend; None where it is none of that.

    Args:
        error: As it was raised; safetensors says what the system did in words alone.
    """
    if not isinstance(error, OSError):
        full = os.strerror(errno.ENOSPC) in str(error)
        return NotEnoughDiskError(_DISK_FULL) if full else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughDiskError(_DISK_FULL)
    name = "a file" if error.filename is None else repr(str(error.filename))
    shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    said = error.strerror or type(error).__name__
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ReadOnlyError(f"{shown}: {said}; see to it that you may read and write there, or choose another place")
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
        return OutputExistsError(f"{shown}: {said}; give another path")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return NotEnoughMemoryError(f"{shown}: {said}; raise the limit (ulimit -n), or stop other programs")
    if error.errno == errno.EIO:
        return CheckpointError(f"{shown}: {said}; the disk cannot be read: copy the file from elsewhere")
    return None


_DISK_FULL = "the disk is full; make room, and the same command continues"
_LONGEST_NAME = 120


class ProcessesError(TmergeError):
    """Several processes were begun for what one does, or are not alike enough to do one thing together."""


class ProcessLostError(TmergeError):
    """One of the processes that work on a run together has ended before the run had."""

    exit_code = 1


class EndedElsewhereError(TmergeError):
    """Another of the processes that work on a run together met an error, which is named with its rank."""

    exit_code = 1


class Cancelled(TmergeError):
    """The user stopped the run; finished stages are kept and the same command continues."""

    exit_code = 130
