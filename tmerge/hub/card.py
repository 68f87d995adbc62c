"""The model card of a run: README.md in its folder, with what was measured and nothing else.

Its text is the template card.md beside this file; its metadata is what the Hub's own client reads: base models,
licence, and the scores as a model-index.
"""

from __future__ import annotations

import html
import re
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from tmerge.calibration import SAMPLES_PREFIX, sample_language_code
from tmerge.models import ModelReference, OutputLicence, output_licence
from tmerge.recipe import Recipe
from tmerge.report import (
    Calibration,
    MergedModel,
    Report,
    SeveralSource,
    TrainingTexts,
    how_words,
    interval_words,
    moved_words,
    ratio_heading,
    ratio_words,
    score_rows,
    summary,
    training_summary,
)
from tmerge.run import Run
from tmerge.store import write_text

__all__ = [
    "FIGURES",
    "card_data",
    "card_text",
    "code_text",
    "inline_text",
    "merge_licence",
    "model_name",
    "public_name",
    "relation",
    "shown_model",
    "write_card",
]

FIGURES = "tmerge/figures"
"""Where a run's folder has the card's pictures."""

_TAGS = ["merge", "tmerge", "transport-and-merge"]
_HUB_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write_card(run: Run, report: Report, recipe: Recipe) -> None:
    """Write a run's README.md, and the pictures that it shows.

    Args:
        run: Its transport has been written.
        report: Its report.
        recipe: Its resolved recipe, quoted in the card.
    """
    # Drawing loads matplotlib, which nothing else here needs.
    from tmerge.plots.stills import write_stills
    from tmerge.transport import TransportRecord

    write_stills(run.folder / FIGURES, report, TransportRecord.load(run.transport_path))
    write_text(run.folder / "README.md", card_text(report, recipe))


def card_text(report: Report, recipe: Recipe, *, repo: str | None = None, figures: str = FIGURES) -> str:
    """The card: YAML front matter and Markdown.

    Args:
        report: A run's report.
        recipe: Its resolved recipe.
        repo: The Hub id that it is pushed to; None writes of the folder that the card lies in.
        figures: Folder of the pictures, as the card's links name it; empty leaves them out.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters |= {"md": inline_text, "code": code_text, "ratios": ratio_words}
    template = environment.from_string((resources.files("tmerge.hub") / "card.md").read_text(encoding="utf-8"))
    yaml_text = recipe.to_yaml().rstrip()
    models = [("target", shown_model(report.target))]
    models += [(each.name, shown_model(each.model)) for each in report.sources] or [
        ("source", shown_model(report.source))
    ]
    trained_on = None if report.adaptation is None else report.adaptation.data
    return template.render(
        card_data=card_data(report, recipe, repo).to_yaml(line_break="\n"),
        title=f"{model_name(report.target.ref)} merged with {_merged_name(report)}",
        verdict=report.published_verdict,
        summary=summary(report),
        trained=training_summary(report),
        trained_on_words=_dataset_words(report),
        trained_where=_trained_where(report),
        target=models[0][1],
        source=shown_model(report.source),
        carried=" and ".join(map(_learned_label, report.sources)),
        sources=[(each, _learned_label(each)) for each in report.sources],
        models=models,
        tmerge=report.tmerge,
        evaluation=report.evaluation,
        rows=score_rows(report),
        dataset=report.calibration.dataset,
        dataset_commit=_data_commit(report.calibration),
        base=_base(report),
        training_set=trained_on.dataset if trained_on else "",
        training_commit=_data_commit(trained_on) if trained_on else "",
        calibration=report.calibration,
        transport=report.transport,
        fusion=report.fusion,
        how=how_words(report.fusion),
        ratio=ratio_heading(report.fusion),
        moved=moved_words(
            report.fusion, None, None if report.adapter is None else public_name(report.adapter), report.sources
        ),
        plan=public_name(report.plan) if report.plan else "",
        figures=figures,
        repo=repo or ".",
        saved=report.saved_adapter,
        loaded_on=_loaded_on(report.target),
        local=", ".join(_local_names(report)),
        seed=report.seed,
        dtype=report.dtype,
        device=report.device,
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        licence=merge_licence(report),
        notes=report.notes,
        recipe=yaml_text,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", yaml_text)), default=0)),
    )


def card_data(report: Report, recipe: Recipe, repo: str | None = None) -> ModelCardData:
    """The card's metadata."""
    licence, bases = merge_licence(report), [_repo(model) for model in (report.target, *report.merged)]
    bases += [
        _hub_id(model.adapter.ref, model.adapter.commit)
        for model in (report.target, *report.merged)
        if model.adapter is not None
    ]
    bases = list(dict.fromkeys(bases))
    # A model without a page on the Hub cannot be pointed at; one base alone would not be what was merged.
    more: dict[str, Any] = {"base_model": bases, "base_model_relation": relation(report)} if all(bases) else {}
    if report.saved_adapter is not None:
        # What it is loaded on, and nothing else.
        more = {"base_model": bases[0], "base_model_relation": relation(report)} if bases[0] else {}
    if licence.id == "other":
        more |= {"license_name": licence.name, "license_link": licence.link}
    return ModelCardData(
        **more,
        license=licence.id,
        language=_languages(recipe) or None,
        datasets=list(dict.fromkeys(data.dataset for data in _read(report) if data.revision)) or None,
        library_name="transformers" if report.saved_adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=_TAGS if report.saved_adapter is None else [*_TAGS, "lora"],
        model_name=(repo or model_name(report.target.ref) + "-fused").rpartition("/")[2],
        eval_results=_results(report),
    )


def relation(report: Report) -> str:
    """What a run's folder is to the models that its card names as its bases, in the Hub's words."""
    return "merge" if report.saved_adapter is None else "adapter"


def merge_licence(report: Report) -> OutputLicence:
    """What the models' licences make of the merge's."""
    target, source, base = report.target, report.source, report.source_base_model
    joined = {"target": target.adapter, "source": source.adapter, "source_base": base.adapter if base else None}
    joined |= {each.name: each.model.adapter for each in report.sources}
    # Of an adapter the model is the base of all, of which is told already.
    whole = {each.name: each.model for each in report.sources if each.model.base_commit != source.commit}
    return output_licence(
        target.licence,
        source.licence,
        target_repo=_repo(target),
        source_repo=_repo(source),
        target_family=target.architecture,
        source_base=(base.licence, _repo(base)) if base else None,
        adapters={
            f"{role}'s adapter": (adapter.licence, _hub_id(adapter.ref, adapter.commit))
            for role, adapter in joined.items()
            if adapter is not None
        },
        sources={name: (model.licence, _repo(model)) for name, model in whole.items()} if report.sources else None,
    )


def _base(report: Report) -> dict[str, Any] | None:
    """What the source was before its fine-tuning, for the tables: as far as the report knows it."""
    if report.source_base_model is not None:
        return shown_model(report.source_base_model)
    if (reference := report.source_base) is None:
        return None
    repo, _, commit = reference.partition("@")
    # A report without its facts has the reference alone, resolved to a commit where it is a repo's.
    on_hub = re.fullmatch("[0-9a-f]{40}", commit) is not None and _HUB_DATASET.fullmatch(repo) is not None
    label = f"[`{repo}`](https://huggingface.co/{repo})" if on_hub else f"`{code_text(model_name(reference))}`"
    return {"label": label, "commit": commit if on_hub else None, "licence": None}


def _read(report: Report) -> list[Calibration | TrainingTexts]:
    """The texts of the merge, and of a training after it."""
    trained_on = [] if report.adaptation is None else [report.adaptation.data]
    return [report.calibration, *trained_on]


def _data_commit(data: Calibration | TrainingTexts) -> str:
    return f"`{data.revision}`" if data.revision else f"sha256 `{data.sha256}`"


def _dataset_words(report: Report) -> str:
    """How ``tmerge adapt`` is told of the texts that were trained on, where they are not the merge's."""
    if report.adaptation is None or (data := report.adaptation.data).sha256 == report.calibration.sha256:
        return ""
    return f" --dataset {code_text(data.dataset)}" + (f"@{data.revision}" if data.revision else "")


def _trained_where(report: Report) -> str:
    """On which device and with which libraries, where these are not the merge's; empty where nothing of it is told."""
    adaptation = report.adaptation
    if adaptation is None:
        return ""
    where = [] if adaptation.device in (None, report.device) else [f"on {adaptation.device}"]
    other = dict(adaptation.versions or {}).items() - dict(report.versions).items()
    return ", ".join([*where, *([f"with {', '.join(' '.join(pair) for pair in sorted(other))}"] if other else [])])


def _results(report: Report) -> list[EvalResult]:
    """Score and paired difference of what the repo holds, with the intervals in words: a model-index has no field."""
    calibration, score, change = report.calibration, report.published_score, report.published_difference
    shared: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Language modelling on held-out texts",
        "dataset_type": calibration.dataset if calibration.revision else "local",
        "dataset_name": f"{calibration.dataset}, {report.evaluation.texts} held-out texts",
        "dataset_config": calibration.config,
        "dataset_split": calibration.split,
        "dataset_revision": calibration.revision,
    }
    return [
        EvalResult(
            **shared,
            metric_type="bits_per_byte",
            metric_value=round(score.value, 6),
            metric_name=f"bits per byte (95 % interval {interval_words(score)})",
        ),
        EvalResult(
            **shared,
            metric_type="bits_per_byte_difference",
            metric_value=round(change.value, 6),
            metric_name="difference to the target in bits per byte "
            f"(paired 95 % interval {interval_words(change, signed=True)})",
        ),
    ]


def shown_model(model: MergedModel) -> dict[str, Any]:
    """A model's facts as the templates of cards read them: with a ``label`` that links to its page."""
    label, adapter = _label(model.ref, model.base_commit), model.adapter
    facts = {**model.to_dict(), "commit": model.base_commit, "licence": model.licence or "no licence stated"}
    if adapter is None:
        return facts | {"label": label, "base": label, "adapter": None}
    own = {"label": _label(adapter.ref, adapter.commit), "commit": adapter.commit, "licence": adapter.licence}
    return facts | {"label": f"{label} with the adapter {own['label']}", "base": label, "adapter": own}


def _learned_label(source: SeveralSource) -> str:
    """Of one of several sources: the adapter, where it is one."""
    adapter = source.model.adapter
    if adapter is not None:
        return _label(adapter.ref, adapter.commit)
    return _label(source.model.ref, source.model.base_commit)


def _label(reference: str, commit: str) -> str:
    """A link to its page, or the name alone of what has none."""
    repo = _hub_id(reference, commit)
    return f"[`{repo}`](https://huggingface.co/{repo})" if repo else f"`{code_text(model_name(reference))}`"


def _loaded_on(model: MergedModel) -> str:
    """What ``from_pretrained`` is given for it, as Python writes it; of a GGUF file, whose folder is the reader's."""
    if model.ref.endswith(".gguf") or model.ref.startswith("demo:"):
        return f'FOLDER, gguf_file="{code_text(model_name(model.ref))}.gguf"'
    repo = _hub_id(model.ref, model.base_commit)
    if repo is None:
        return f'"{code_text(model_name(model.ref))}"'
    # What it was made for: the branch may have moved, and need not be the default one.
    return f'"{repo}", revision="{model.base_commit}"'


def _repo(model: MergedModel) -> str | None:
    """Its Hub id, if that is where it came from."""
    return _hub_id(model.ref, model.base_commit)


def _hub_id(reference: str, commit: str) -> str | None:
    return None if commit.startswith("sha256:") else reference.partition("@")[0]


def model_name(reference: str) -> str:
    """Without user, revision and folders: of a local model, no path of the machine it was on."""
    try:
        return ModelReference.parse(reference).name
    except Exception:  # noqa: BLE001 - a folder that is gone; its last part is its name
        return reference.partition("@")[0].rstrip("/").rpartition("/")[2].removeprefix("demo:")


def _merged_name(report: Report) -> str:
    """Of the source, or of several."""
    return " and ".join(model_name(each.reference) for each in report.sources) or model_name(report.source.ref)


def public_name(reference: str) -> str:
    """A Hub id, or the name alone of what is local."""
    return reference if _HUB_DATASET.fullmatch(reference.partition("@")[0]) else model_name(reference)


def _local_names(report: Report) -> list[str]:
    """What the recipe needs that is neither on the Hub nor in a package."""
    models = list(filter(None, (report.target, report.source, report.source_base_model, *report.merged)))
    names = [model_name(model.ref) for model in models if not _repo(model) and not model.ref.startswith("demo:")]
    adapters = [model.adapter for model in models if model.adapter is not None]
    names += [model_name(adapter.ref) for adapter in adapters if not _hub_id(adapter.ref, adapter.commit)]
    for data in _read(report):
        if not data.revision and not data.dataset.startswith(SAMPLES_PREFIX):
            names.append(data.dataset)
    return list(dict.fromkeys(names))


def _languages(recipe: Recipe) -> list[str]:
    """As the recipe says; of the sample texts, their own."""
    if recipe.save.language:
        return list(recipe.save.language)
    dataset = recipe.calibration.dataset
    return [sample_language_code(dataset.removeprefix(SAMPLES_PREFIX))] if dataset.startswith(SAMPLES_PREFIX) else []


def inline_text(text: Any) -> str:
    """Words of others as plain inline Markdown: no HTML, no table cells, no links, one line."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([|\[\]`*_])", r"\\\1", plain)


def code_text(text: Any) -> str:
    """Within a code span."""
    return " ".join(str(text).replace("`", "'").replace("|", "¦").split())
