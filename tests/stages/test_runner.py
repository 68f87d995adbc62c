"""A stage of several processes: by the same inputs in all of them, or not at all."""

from tests.meeting import Together
from tmerge.errors import ProcessesError
from tmerge.run import Run
from tmerge.stages.notes import Note
from tmerge.stages.runner import Runner
from tmerge.stages.step import Progress


class Stage:
    name, note, together = "texts", Note, True

    def __init__(self, inputs):
        self._inputs = inputs

    def inputs(self):
        return self._inputs

    def do(self, key, progress):
        return Note()


def ended(inputs, tmp_path):
    """What becomes of a stage that each process has other inputs for."""
    (tmp_path / "run/tmerge/cache").mkdir(parents=True, exist_ok=True)

    def work(processes):
        try:
            run = Run(tmp_path / "run")
            return Runner(run, lambda step: None, "cpu", processes)(Stage(inputs[processes.rank])).key
        except ProcessesError as error:
            return str(error)

    return Together(len(inputs)).run(work)


def test_what_decides_a_stage_is_the_same_in_all(tmp_path):
    keys = ended([{"commit": "a", "of": {"x": 1}}] * 3, tmp_path)
    assert len(set(keys)) == 1
    said = ended([{"commit": "a", "of": {"x": x}} for x in (1, 1, 2)], tmp_path)
    assert len(set(said)) == 1
    assert said[0].startswith("process 2 of 3 would do texts by something else than the first (of.x: 1 there, 2 here)")


class OfTheFirst(Stage):
    together = False

    def __init__(self, rank, heard):
        super().__init__({"x": 1})
        self.rank, self.heard = rank, heard

    def do(self, key, progress):
        self.heard.append((self.rank, "do"))
        return Note()

    def ahead(self):
        self.heard.append((self.rank, "ahead"))


def test_while_the_first_works_alone_the_others_get_ahead(tmp_path):
    (tmp_path / "run/tmerge/cache").mkdir(parents=True)
    heard = []

    def work(processes):
        return Runner(Run(tmp_path / "run"), lambda step: None, "cpu", processes)(OfTheFirst(processes.rank, heard)).key

    assert len(set(Together(3).run(work))) == 1
    assert sorted(heard) == [(0, "do"), (1, "ahead"), (2, "ahead")]
    # Of a stage that was finished before there is nothing to wait for.
    Together(3).run(work)
    assert len(heard) == 3


def test_what_is_said_again_in_a_stage_is_said_once():
    heard = []
    for stage in ("target", "source"):
        progress = Progress(stage, lambda step: heard.append(step.what))
        for words in ("no room", "no room", "another"):
            progress.note(words)
        progress.alone.note("no room")
    assert heard == ["no room", "another"] * 2
