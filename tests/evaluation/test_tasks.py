"""Benchmarks: the harness on local files gives what a plain computation gives."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.evaluation.test_choose import loaded
from tests.meeting import Together
from tests.pico import pico_model
from tmerge.errors import DatasetError, RecipeError
from tmerge.evaluation import resamples
from tmerge.evaluation.margins import question_margins
from tmerge.evaluation.tasks import TASK_GROUPS, _sharing, expand_tasks, run_tasks, task_difference, task_score
from tmerge.processes import ALONE

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
SHARED = Path(__file__).parents[3] / "shared" / "data"
XCOPA = [
    ("Hujan turun deras.", "Jalan menjadi basah.", "Matahari bersinar terang.", "effect", 0),
    ("Dia tertawa keras.", "Dia mendengar lelucon.", "Dia kehilangan dompet.", "cause", 0),
    ("Lampu padam.", "Kami menyalakan lilin.", "Kami membaca koran.", "effect", 0),
    ("Kucing itu lari.", "Ia melihat ikan.", "Ia melihat anjing.", "cause", 1),
]
YUE = [
    {"question": "一年有幾多個月", "A": "十", "B": "十一", "C": "十二", "D": "十三", "answer": "C"},
    {"question": "水嘅化學式係", "A": "CO2", "B": "H2O", "C": "O2", "D": "NaCl", "answer": "B"},
]
MALAY = [
    {"subject": "Sejarah", "prompt": "Siapakah?\nA. Ali\nB. Abu\nC. Ahmad", "options": ["A. Ali", "B. Abu", "C. Ahmad"],
     "key": "B", "category": "Humanities"},
    {"subject": "Sains", "prompt": "Apakah?\nA. api\nB. air", "options": ["A. api", "B. air"],
     "key": "A", "category": "STEM"},
]  # fmt: skip
CONNECTORS = {"id": {"cause": "karena", "effect": "maka"}, "th": {"cause": "เพราะ", "effect": "ดังนั้น"}}


def likelihood(one, context, continuation):
    """log p(continuation | context), tokens split where the text is: the harness's convention."""
    tokenizer = one.tokenizer
    whole = tokenizer(context + continuation)["input_ids"]
    given = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        chances = torch.log_softmax(one.model(torch.tensor([whole])).logits[0].double(), -1)
    return sum(float(chances[place - 1, whole[place]]) for place in range(given, len(whole)))


def by_hand(one, questions):
    right = []
    for context, choices, answer in questions:
        scores = [likelihood(one, context, " " + choice) for choice in choices]
        right.append(float(max(range(len(scores)), key=scores.__getitem__) == answer))
    return right


def margins_by_hand(one, questions):
    margins = []
    for context, choices, answer in questions:
        scores = [likelihood(one, context, " " + choice) / math.log(2) / len(choice.encode()) for choice in choices]
        right = scores.pop(answer)
        margins.append(right - max(scores))
    return margins


def xcopa_questions(rows, language):
    for row in rows:
        context = f"{row['premise'].strip()[:-1]} {CONNECTORS[language][row['question']]}"
        yield context, [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")], row["label"]


def test_xcopa_from_a_file_is_what_a_loop_finds(tmp_path):
    names = ("premise", "choice1", "choice2", "question", "label")
    rows = [dict(zip(names, row, strict=True)) for row in XCOPA]
    path = tmp_path / "xcopa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one = loaded(pico_model("llama"))
    found = run_tasks(one, ["xcopa_id"], data={"xcopa_id": path})["xcopa_id"]
    assert found.metric == "acc" and found.items.tolist() == by_hand(one, xcopa_questions(rows, "id"))
    assert found.margins.tolist() == pytest.approx(margins_by_hand(one, xcopa_questions(rows, "id")), abs=1e-4)
    assert run_tasks(one, ["xcopa_id"], data={"xcopa_id": path}, limit=2)["xcopa_id"].items.tolist() == (
        found.items[:2].tolist()
    )


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_requests_and_all_have_the_answers(count):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [("Hujan turun maka", " jalan basah"), ("Dia", " tertawa"), ("Kucing itu lari karena", " ia melihat ikan")]
    requests = [Instance("loglikelihood", {}, words, 0) for words in asked]
    models, reads = [loaded(pico_model("llama")) for _ in range(count)], []

    class Counting(HFLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            reads.append(len(requests))
            return super().loglikelihood(requests, disable_tqdm)

    def answered(processes):
        one = models[processes.rank]
        model = _sharing(Counting, processes)(pretrained=one.model, tokenizer=one.tokenizer, batch_size=1)
        return model.loglikelihood(requests, disable_tqdm=True)

    alone, together = answered(ALONE), Together(count).run(answered)
    assert together == [alone] * count
    assert sorted(reads) == sorted([3, *([2, 1] if count == 2 else [1, 1, 1])])


def test_our_own_definitions_from_files(tmp_path):
    yue, malay = tmp_path / "yue.json", tmp_path / "malay.json"
    yue.write_text(json.dumps(YUE), encoding="utf-8")
    malay.write_text(json.dumps(MALAY), encoding="utf-8")
    one = loaded(pico_model("qwen2"))
    found = run_tasks(one, ["cantonese", "malay"], data={"yue_mmlu": yue, "malaymmlu": malay})
    yue_questions = [
        (
            f"以下係一條單項選擇題，請直接畀出正確答案嘅選項。\n\n題目：{row['question']}\nA. {row['A']}\n"
            f"B. {row['B']}\nC. {row['C']}\nD. {row['D']}\n答案：",
            list("ABCD"),
            "ABCD".index(row["answer"]),
        )
        for row in YUE
    ]
    malay_questions = [
        (
            f"Berikut adalah soalan aneka pilihan tentang {row['subject']}. Sila berikan jawapan sahaja.\n\n"
            f"{row['prompt']}\nJawapan:",
            list("ABCDE")[: len(row["options"])],
            "ABCDE".index(row["key"]),
        )
        for row in MALAY
    ]
    assert found["yue_mmlu"].items.tolist() == by_hand(one, yue_questions)
    assert found["malaymmlu"].items.tolist() == by_hand(one, malay_questions)
    assert found["yue_mmlu"].margins.tolist() == pytest.approx(margins_by_hand(one, yue_questions), abs=1e-4)
    assert found["malaymmlu: STEM"].margins.tolist() == found["malaymmlu"].margins[1:].tolist()
    assert found["malaymmlu: Humanities"].items.tolist() == found["malaymmlu"].items[:1].tolist()
    assert found["malaymmlu: STEM"].items.tolist() == found["malaymmlu"].items[1:].tolist()


# The benchmarks' questions are their authors', and not shipped with the project.
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("language", ["id", "th"])
def test_the_real_questions(language):
    path = SHARED / f"xcopa_{language}_val.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()][:20]
    one = loaded(pico_model("llama"))
    name = f"xcopa_{language}"
    found = run_tasks(one, [name], data={name: path}, limit=20)[name]
    assert found.items.tolist() == by_hand(one, xcopa_questions(rows, language))


def test_pairs_of_scores():
    from tmerge.evaluation.tasks import TaskScore

    base = TaskScore("acc", torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64), 0.0)
    better = TaskScore("acc", torch.ones(8, dtype=torch.float64), 0.0)
    counts = resamples(8, 500, 0)
    assert task_score(base, counts).value == 3 / 8
    change = task_difference(better, base, counts)
    assert change.value == 5 / 8 and change.low > 0
    assert task_difference(base, base, counts).high == 0


def sample(target, likelihoods, acc, answers=("A", "BB", "CCCC")):
    """As the harness logs a question."""
    choices = [(likelihood, False) for likelihood in likelihoods]
    return {
        "target": target,
        "acc": acc,
        "filtered_resps": choices,
        "arguments": [("question", f" {word}") for word in answers[: len(choices)]],
    }


def test_a_margin_is_of_the_best_right_answer_over_the_best_wrong_one():
    found = question_margins(
        [
            sample(0, (-1.0, -3.0, -2.0), 1.0),
            sample("BB", (-1.0, -3.0, -2.0), 0.0),
            sample([1, 2], (-1.0, -3.0, -0.5), 1.0),
            sample(1, (-1.0, -1.0, -2.0), 0.0),  # level: the harness takes the first
        ]
    )
    by_the_byte = [-1.0 + 0.5, -1.5 + 0.5, -0.125 + 1.0, -0.5 + 0.5]
    assert found == pytest.approx([margin / math.log(2) for margin in by_the_byte])


@pytest.mark.parametrize(
    "other",
    [
        sample(0, (-1.0, -3.0), 0.0),  # judged otherwise than by likelihood
        sample("D", (-1.0, -3.0, -2.0), 1.0),  # no such answer
        {"target": 0, "acc": 1.0, "filtered_resps": ["words"]},  # written, not chosen
        {"target": 0, "exact_match": 1.0, "filtered_resps": [(-1.0, False), (-2.0, False)]},
        sample([0, 1], (-1.0, -2.0), 1.0),  # nothing is wrong
        sample(0, (-1.0, -math.inf), 1.0),
    ],
)
def test_a_task_of_another_kind_has_no_margins(other):
    assert question_margins([sample(0, (-1.0, -3.0), 1.0), other]) is None


def test_groups_and_mistakes(tmp_path):
    assert expand_tasks(["general", "piqa", "malay"]) == [*TASK_GROUPS["general"], "malaymmlu"]
    one = loaded(pico_model("llama"))
    with pytest.raises(DatasetError, match="no file"):
        run_tasks(one, ["xcopa_id"], data={"xcopa_id": tmp_path / "none.jsonl"})
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"sentence": "a"}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="columns"):
        run_tasks(one, ["xcopa_id"], data={"xcopa_id": wrong})
    with pytest.raises(RecipeError, match="local file"):
        run_tasks(one, ["piqa"], data={"piqa": tmp_path / "none.jsonl"})


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest():
    with pytest.raises(RecipeError, match="arc_easy"):
        run_tasks(loaded(pico_model("llama")), ["arc_eazy"])
