"""A training's folder: what can be gone on with stays and is in the way of others, and nothing else is either."""

import pytest

from tmerge.adaptation import teacher_path
from tmerge.errors import (
    AdaptationError,
    Cancelled,
    NotEnoughMemoryError,
    OutputExistsError,
    ProcessLostError,
    RunBusyError,
)
from tmerge.run import Run
from tmerge.stages.training_folder import TrainingFolder
from tmerge.store import locked

DATA = {"dataset": "data.txt", "sha256": "1", "file_sha256": "2", "revision": None}


def checkpoint(folder):
    (folder.work / "checkpoint-1").mkdir(parents=True)
    (folder.work / "checkpoint-1/trainer_state.json").write_text("{}")


def teacher(folder):
    folder.work.mkdir(parents=True)
    teacher_path(folder.work).touch()


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("made", "error", "stays"),
    [
        (nothing, Cancelled("stopped"), False),
        (nothing, KeyboardInterrupt(), False),
        (nothing, AdaptationError("diverged"), False),
        (checkpoint, AdaptationError("failed"), True),
        (checkpoint, KeyboardInterrupt(), True),
        (teacher, KeyboardInterrupt(), True),
        (teacher, Cancelled("stopped"), True),
        # "The same command goes on", says that.
        (teacher, ProcessLostError("process 1 of 2 has ended"), True),
        (nothing, ProcessLostError("process 1 of 2 has ended"), False),
        # Other settings are needed, with which it is another training.
        (teacher, NotEnoughMemoryError("full"), False),
    ],
)
def test_what_is_left_of_a_training(tmp_path, made, error, stays):
    out = tmp_path / "new" / "out"
    folder = TrainingFolder(Run(out))
    folder.open("a", DATA)
    with pytest.raises(type(error)), folder.at_work():
        made(folder)
        raise error
    assert out.exists() == stays and (tmp_path / "new").exists() == stays
    again = TrainingFolder(Run(out))
    if stays:
        with pytest.raises(OutputExistsError, match="is not this training, begun before; choose another --out"):
            again.open("b", DATA)
        again.open("a", DATA)
        assert (folder.work / "checkpoint-1").exists() or folder.has_teacher
    else:
        again.open("b", DATA)


@pytest.mark.parametrize("made", [nothing, checkpoint, teacher])
def test_what_was_killed_before_anything_was_kept_is_in_nobodys_way(tmp_path, made):
    out = tmp_path / "out"
    folder = TrainingFolder(Run(out))
    folder.open("a", DATA)
    made(folder)
    (folder.work / "other").mkdir(parents=True)
    if made is nothing:
        TrainingFolder(Run(out)).open("b", DATA)
        assert not folder.work.exists()
        made = checkpoint
        made(folder)
    with pytest.raises(OutputExistsError):
        TrainingFolder(Run(out)).open("c", DATA)


def test_one_that_another_process_has_just_begun_is_not_taken(tmp_path):
    out = tmp_path / "out"
    TrainingFolder(Run(out)).open("a", DATA)
    with locked(Run(out).cache, out), pytest.raises(RunBusyError):
        TrainingFolder(Run(out)).open("b", DATA)
    assert Run.note(out / "tmerge/cache/adapt.json", "a") is not None


def test_a_finished_one_and_other_folders_are_left_alone(tmp_path):
    out = tmp_path / "out"
    TrainingFolder(Run(out)).open("a", DATA)
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="exists and is not this training"):
        TrainingFolder(Run(out)).open("b", DATA)
    with pytest.raises(OutputExistsError, match="was begun before data.txt changed"):
        TrainingFolder(Run(out)).open("b", {**DATA, "sha256": "3", "file_sha256": "4"})
    # More of the same texts are not others.
    with pytest.raises(OutputExistsError, match="exists and is not this training"):
        TrainingFolder(Run(out)).open("b", {**DATA, "sha256": "3"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("of a user")
    with pytest.raises(OutputExistsError, match="exists and is not this training"):
        TrainingFolder(Run(tmp_path / "mine")).open("a", DATA)
