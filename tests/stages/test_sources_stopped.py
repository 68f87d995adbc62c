"""What was carried of each of several sources, when the run is taken up again: it stays only if all of it is there."""

import pytest

from tests.pico import pico_model
from tests.pico_adapter import save_adapter
from tests.stages.test_sources import several
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tmerge.run import Run
from tmerge.stages.merge import advance


@pytest.mark.parametrize("lost", ["transport.safetensors", "cache/sources/1/permuted/index.json"])
def test_what_was_carried_counts_only_with_all_that_goes_with_it(tmp_path, lost):
    target = pico_model("llama")
    base = _deeper(target)
    save_all(tmp_path, target=target, base=base, first=_shaken(base, 0.05, 2))
    save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj", "v_proj"], size=0.05)
    recipe, out = several(tmp_path, "lora", "first"), tmp_path / "fused"
    advance(recipe, out, until="fuse")
    key, steps = Run(out).key("fuse"), []
    Run(out).forget("fuse")
    (out / "tmerge" / lost).unlink()
    advance(recipe, out, until="fuse", listener=steps.append)
    # The first is carried again; it is what writes the record too.
    assert {step.what for step in steps if step.unit == "layers"} == {"transporting weights of source 1"}
    assert (out / "tmerge" / lost).is_file() and Run(out).key("fuse") == key
