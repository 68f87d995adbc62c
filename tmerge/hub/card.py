"""The model card of a run: README.md in its folder, with what was measured and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tmerge.recipe import Recipe
from tmerge.report import summary, training_summary
from tmerge.run import write_text

__all__ = ["card_text", "write_card"]


def write_card(folder: Path, report: Mapping[str, Any], recipe: Recipe) -> None:
    """Write README.md into a run's folder."""
    write_text(folder / "README.md", card_text(report, recipe))


def card_text(report: Mapping[str, Any], recipe: Recipe) -> str:
    """The card: YAML front matter and Markdown.

    Args:
        report: A run's report.
        recipe: Its resolved recipe, quoted in the card.
    """
    target, source = report["target"], report["source"]
    front = {
        "base_model": [_repo(model["ref"]) for model in (target, source) if not model["commit"].startswith("sha256:")],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "tmerge", "transport-and-merge"],
    }
    if not front["base_model"]:
        # Local models have no page to point at.
        del front["base_model"], front["base_model_relation"]
    evaluation = report["evaluation"]
    rows = [
        ("target, unchanged", evaluation["base"], None),
        ("**fused**", evaluation["fused"], evaluation["difference"]),
    ]
    rows += [(f"control: {name}", item, item["difference"]) for name, item in evaluation["controls"].items()]
    if "adapted" in evaluation:
        rows.append(("**fused and trained**", evaluation["adapted"]["score"], evaluation["adapted"]["difference"]))
    rows.append(("source", evaluation["source"], None))
    table = ["| model | bits per byte | difference to the target |", "|---|---|---|"]
    table += [f"| {name} | {_interval(item)} | {_interval(change) if change else ''} |" for name, item, change in rows]
    ratios = [
        f"| {name} | {min(item['norm_ratio']):.2g} to {max(item['norm_ratio']):.2g} "
        f"| {item['neurons']} of {item['of']} |"
        for name, item in report["fusion"]["projections"].items()
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {_name(target['ref'])}, merged with {_name(source['ref'])}",
            "",
            summary(report),
            "",
            *(["Then it was trained: " + training_summary(report), ""] if "adaptation" in report else []),
            f"Neurons of `{source['ref']}` ({source['architecture']}, {source['layers']} layers) were carried into "
            f"`{target['ref']}` ({target['architecture']}, {target['layers']} layers) by optimal transport between "
            "the two models' activations ([Transport and Merge](https://arxiv.org/abs/2602.05495)), with "
            f"[tmerge](https://pypi.org/project/tmerge/) {report['tmerge']}. The result has the target's architecture "
            "and tokenizer.",
            "",
            f"## Held-out scores ({evaluation['texts']} texts of {report['calibration']['dataset']})",
            "",
            *table,
            "",
            "Lower is better; in brackets the 95 % interval over texts (paired for differences). The controls change "
            "the same neurons without the correspondence: scaled down, moved at random, or moved through shuffled "
            "plans.",
            "",
            "## What was moved",
            "",
            "| projection | transported over own norm, by layer | neurons |",
            "|---|---|---|",
            *ratios,
            "",
            "## Models and licences",
            "",
            *(
                f"- {role}: `{model['ref']}` at `{model['commit']}`, licence: {model['licence'] or 'not stated'}"
                for role, model in (("target", target), ("source", source))
            ),
            "",
            "The merge carries the duties of both licences, and what biases the source has may have come along.",
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
        ]
    )


def _interval(item: Mapping[str, Any]) -> str:
    return f"{item['value']:.4f} [{item['ci95'][0]:.4f}, {item['ci95'][1]:.4f}]"


def _repo(reference: str) -> str:
    return reference.partition("@")[0]


def _name(reference: str) -> str:
    return _repo(reference).rstrip("/").rpartition("/")[2].removeprefix("demo:")
