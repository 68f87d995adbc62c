"""Benchmarks through lm-evaluation-harness, on a model in memory.

Every question's own result is kept, so that two models can be held against each other question by question. A task
may be given a local file in place of its Hub dataset; tasks that the harness lacks are defined in ``task_defs/``.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from tmerge.errors import DatasetError, MissingExtraError, RecipeError
from tmerge.evaluation.intervals import Interval, detectable, difference, score
from tmerge.evaluation.likelihood import Scores
from tmerge.evaluation.margins import question_margins
from tmerge.models import LoadedModel
from tmerge.processes import ALONE, Processes
from tmerge.version import DISTRIBUTION

__all__ = ["TASK_GROUPS", "TaskScore", "expand_tasks", "run_tasks", "task_detectable", "task_difference", "task_score"]

TASK_GROUPS: dict[str, tuple[str, ...]] = {
    "malay": ("malaymmlu",),
    "indonesian": ("arc_id", "belebele_ind_Latn", "truthfulqa_id_mc1", "truthfulqa_id_mc2", "xcopa_id"),
    "thai": ("mmlu_prox_lite_th_other", "mgsm_direct_th", "mgsm_native_cot_th", "xcopa_th"),
    "cantonese": ("yue_mmlu",),
    "finance": (
        "global_mmlu_full_en_business_ethics",
        "global_mmlu_full_en_high_school_microeconomics",
        "global_mmlu_full_en_professional_accounting",
    ),
    "medical": ("mmlu_anatomy", "mmlu_medical_genetics", "mmlu_professional_medicine"),
    "math": ("mmlu_elementary_mathematics", "minerva_math"),
    "general": ("arc_easy", "commonsense_qa", "piqa", "social_iqa", "winogrande"),
}
"""What the paper scores in each domain (its Section 5 and Appendix B.2), by the names of lm-evaluation-harness."""

# The first of these that a question was judged by is what counts, as in the harness's own tables.
_METRICS = ("acc", "exact_match", "mc2", "mc1", "acc_norm", "f1")


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task.

    Attributes:
        metric: Of the harness: ``acc``, ``exact_match``, ...
        items: (N,) float64, each question's own value.
        seconds: Wall time of the harness's run that this task was part of.
        margins: (N,) float64 in bits per byte, how far ahead the right answer is (`question_margins`); None of a task
            that has no such thing.
    """

    metric: str
    items: torch.Tensor
    seconds: float
    margins: torch.Tensor | None = None

    @property
    def value(self) -> float:
        """Mean over questions."""
        return float(self.items.mean())

    @property
    def by_margin(self) -> TaskScore | None:
        """The same questions by their margins."""
        return None if self.margins is None else TaskScore("margin", self.margins, self.seconds)


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Groups by their tasks (`TASK_GROUPS`), everything once, in order."""
    return list(dict.fromkeys(task for name in names for task in TASK_GROUPS.get(name, (name,))))


def run_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    data: Mapping[str, Path] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> dict[str, TaskScore]:
    """Score a model on benchmark tasks.

    Args:
        loaded: Model and tokenizer.
        tasks: Names of tasks or of groups.
        data: task -> a local .json or .jsonl file to read in place of its Hub dataset.
        limit: Questions of each task at most, the first ones.
        seed: Of the harness's few-shot sampling.
        batch_size: Requests of one forward pass.
        processes: That answer together, each with a model of its own; all have all the answers.

    Returns:
        task -> its score; MalayMMLU also by category (``malaymmlu: STEM``), and the tasks of a harness group
        (``minerva_math``) each by their own name.

    Raises:
        DatasetError: A local file is missing, or a dataset cannot be read.
        MissingExtraError: lm-eval is not installed.
        RecipeError: No such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError(f'benchmarks need lm-evaluation-harness: pip install "{DISTRIBUTION}[eval]"') from None
    data, wanted = data or {}, expand_tasks(tasks)
    of_tmerge = {
        name: _definition(name, data.get(name)) for name in wanted if name in _defined() and _is_ours(name, data)
    }
    of_harness = [name for name in wanted if name not in of_tmerge]
    for name in data:
        if name not in of_tmerge:
            raise RecipeError(f"task {name!r} cannot read a local file; those that can: {', '.join(_defined())}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The harness's own index takes many seconds to build, and is needed only for its own tasks.
    manager = TaskManager(verbosity="ERROR", include_defaults=bool(of_harness))
    for name in of_harness:
        known = [*manager.all_tasks, *_defined()]
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *TASK_GROUPS], 1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else f"; groups are {', '.join(TASK_GROUPS)}"
            raise RecipeError(f"no task {name!r} in lm-evaluation-harness{hint}")
    # A tokenizer of its own: the harness gives it a padding token, and ours will be saved.
    tokenizer = copy.deepcopy(loaded.tokenizer)
    model = _sharing(HFLM, processes)(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size)
    began = time.perf_counter()
    try:
        # Its progress bars would break the lines of ours.
        with contextlib.redirect_stderr(io.StringIO()):
            result = lm_eval.simple_evaluate(
                model=model,
                tasks=[*of_tmerge.values(), *of_harness],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise DatasetError(
            f"a dataset of {', '.join(wanted)} cannot be read ({str(error).splitlines()[0]}); check the network, or "
            "give a local file with --data task=FILE"
        ) from None
    except jinja2.UndefinedError as error:
        raise DatasetError(
            f"a question of {', '.join(wanted)} lacks a field that its task reads ({error}); give a file of the "
            "benchmark's own columns"
        ) from None
    seconds = time.perf_counter() - began
    # The harness gives what came of it to the first process alone.
    return processes.from_first(lambda: _judged(result["samples"], of_tmerge, seconds))


def _judged(
    samples_of: Mapping[str, list[dict[str, Any]]], of_tmerge: Mapping[str, Any], seconds: float
) -> dict[str, TaskScore]:
    """By task, and by category where there are some: what the harness logged of each question."""
    scores = {}
    for name, samples in samples_of.items():
        metric = next((metric for metric in _METRICS if metric in samples[0]), None)
        if metric is None:
            judged = ", ".join(samples[0].get("metrics", []))
            raise RecipeError(f"task {name!r} judges no single question by a known metric ({judged}); leave it out")
        # Tasks with several filters list every question once for each; the first filter is the harness's own choice.
        first_filter = samples[0].get("filter")
        chosen = [sample for sample in samples if sample.get("filter") == first_filter]
        parts = {name: chosen}
        # As MalayMMLU is reported: its categories beside the whole.
        column = of_tmerge.get(name, {}).get("metadata", {}).get("category_column")
        for category in sorted({str(sample["doc"].get(column)) for sample in chosen}) if column else ():
            parts[f"{name}: {category}"] = [sample for sample in chosen if str(sample["doc"].get(column)) == category]
        for part, judged_samples in parts.items():
            values = [float(sample[metric]) for sample in judged_samples]
            margins = question_margins(judged_samples)
            ahead = None if margins is None else torch.tensor(margins, dtype=torch.float64)
            scores[part] = TaskScore(metric, torch.tensor(values, dtype=torch.float64), seconds, ahead)
    return scores


def _sharing(kind: type[Any], processes: Processes) -> type[Any]:
    """A class of the harness's models whose requests are shared out; all processes ask the same."""

    def shared(asked: str) -> Callable[..., list[Any]]:
        def answer(self: Any, requests: list[Any], *also: Any, **named: Any) -> list[Any]:
            mine = processes.mine(requests)
            return processes.of_all(getattr(kind, asked)(self, mine, *also, **named) if mine else [])

        return answer

    asked = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    return type(f"Shared{kind.__name__}", (kind,), {name: shared(name) for name in asked})


def task_score(scores: TaskScore, counts: torch.Tensor) -> Interval:
    """Mean with its 95 % interval; `counts` (B, N) from `resamples`."""
    return score(_paired(scores), counts)


def task_difference(scores: TaskScore, base: TaskScore, counts: torch.Tensor) -> Interval:
    """Mean minus the base's, paired by question; positive is better than the base."""
    return difference(_paired(scores), _paired(base), counts)


def task_detectable(scores: TaskScore, base: TaskScore) -> float | None:
    """The smallest true difference that so many questions would show (`detectable`)."""
    return detectable(_paired(scores), _paired(base))


def _paired(scores: TaskScore) -> Scores:
    """A question is to a task what a text is to the likelihood: the unit that is resampled, of weight one."""
    return Scores(scores.items, torch.ones_like(scores.items), 0, scores.seconds)


def _defined() -> list[str]:
    folder = resources.files("tmerge.evaluation") / "task_defs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _is_ours(name: str, data: Mapping[str, Path]) -> bool:
    """Our XCOPA is only for local files: the harness has its own for the Hub's."""
    return name in data or not name.startswith("xcopa_")


def _definition(name: str, path: Path | None) -> dict[str, Any]:
    """A task's definition, reading a local file if one is given."""
    text = (resources.files("tmerge.evaluation") / "task_defs" / f"{name}.yaml").read_text("utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    if path is not None:
        if not Path(path).is_file():
            raise DatasetError(f"task {name}: no file {str(path)!r}; name a .json or .jsonl file after --data {name}=")
        config.pop("dataset_name", None)
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return config
