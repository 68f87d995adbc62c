"""Writing: all of a file or none of it; and one process at work in a run's folder."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.stages.test_merge import pair, recipe_for  # noqa: F401 - a fixture
from tmerge.errors import RunBusyError
from tmerge.run import Run
from tmerge.stages.merge import merge
from tmerge.store import locked, replacing, write_tensors, write_text


def test_what_fails_half_way_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_text(path, "whole")

    def half():
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_files_can_be_read_by_others(tmp_path):
    write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(6).reshape(2, 3).T}, {"key": "1"})
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o644
    assert load_file(tmp_path / "t.safetensors")["a"].equal(torch.arange(6).reshape(2, 3).T)


# The first is named: its process, where, and since when.
_BUSY = rf"another tmerge \(process {os.getpid()} on .+, since \d\d:\d\d:\d\d\) is at work in .*fused; wait"


def test_a_run_that_another_process_works_in_is_refused_and_stays(pair, tmp_path):  # noqa: F811
    recipe, out = recipe_for(pair), tmp_path / "fused"
    run = Run.open(out, recipe)
    before = sorted(out.rglob("*"))
    with locked(run.cache, out):
        with pytest.raises(RunBusyError, match=_BUSY) as caught:
            merge(recipe, out)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert set(before) <= set(out.rglob("*"))
    # One that was killed has let it go.
    held = "import os, sys; from pathlib import Path; from tmerge.store import locked\n"
    held += "with locked(Path(sys.argv[1]), Path()): os.kill(os.getpid(), 9)"
    assert forked.run([run.cache], held).returncode == -9
    assert merge(recipe, out).verdict
