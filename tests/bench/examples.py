"""Record a finished run for the app to show: its report and transport without its weights, and what its models say.

    python -m tests.bench.examples --run FOLDER --out tmerge/ui/examples/relatives --title WORDS --made SENTENCES

Run it where the recipe's references can be read. Of the transport, what only another merge would read (potentials,
features' deviations and magnitudes, and all but one layer's means) is left out.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import tempfile
from pathlib import Path

from tmerge.answers import Question
from tmerge.run import Run
from tmerge.transport import TransportRecord
from tmerge.ui.parts.prompts import offered_prompts
from tmerge.ui.server.examples import Answer, Example, Talk
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.speaking import Speaker

_NOT_SHOWN = ("f.", "g.")
_NOT_SHOWN_ENDS = (".deviation", ".magnitude")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind in (("run", Path), ("out", Path), ("title", str), ("made", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--plain", action="store_true", help="prompts are put without a chat template")
    given = parser.parse_args()
    run = Run(given.run)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "report.json"):
        shutil.copyfile(run.work / name, given.out / name)
    record = TransportRecord.load(run.transport_path)
    record.tensors = {
        name: tensor
        for name, tensor in record.tensors.items()
        if not name.startswith(_NOT_SHOWN) and not name.endswith(_NOT_SHOWN_ENDS)
    }
    for name in record.tensors:
        if name.startswith("statistics."):  # a page asks only how many neurons there are
            record.tensors[name] = record.tensors[name][:1].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        record.save(Path(folder) / "t")
        packed = lzma.compress((Path(folder) / "t").read_bytes(), preset=9)
    (given.out / "transport.safetensors.xz").write_bytes(packed)
    store = RunStore(AppSettings())
    speaker, talks = Speaker(store), list[Talk]()
    for prompt in offered_prompts(run.report().calibration.dataset):
        *_, said = speaker.ask("recorder", run.recipe(), run.folder, Question(prompt, not given.plain, 48, 0.0, 0))
        assert all(answer.state == "done" for answer in said.values()), said
        answers = {role: Answer(text=answer.text, note=answer.note) for role, answer in said.items()}
        talks.append(Talk(prompt=prompt, said=answers))
    store.close()
    example = Example(title=given.title, made=given.made, talks=tuple(talks))
    (given.out / "example.json").write_text(example.model_dump_json(indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
