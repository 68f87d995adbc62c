"""A comparison's rows as Markdown tables, to be read, pasted and put in a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["added_words", "comparison_table"]


def comparison_table(result: Mapping[str, Any]) -> str:
    """The rows as a Markdown table; differences are to the base, with their paired 95 % intervals."""
    lines = [
        f"Bits per byte on {result['texts']} held-out texts, lower is better.",
        "",
        "| row | bits per byte | difference to base | 95 % interval | tokens | steps | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        counts = f"{row['tokens'] or ''} | {row['steps'] or ''} | {row['seconds']:.1f}"
        lines.append(f"| {_cell(row['name'])} | {row['value']:.4f}{_spread(row)} | {_change(row)} | {counts} |")
    if result["added"]:
        lines += ["", *(f"- {_cell(added_words(item))}" for item in result["added"])]
    for task in result["rows"][0].get("tasks", {}):
        first = result["rows"][0]["tasks"][task]
        lines += ["", f"{_cell(task)}: {first['metric']} on {first['questions']} questions, higher is better.", ""]
        lines += [f"| row | {first['metric']} | difference to base | 95 % interval |", "|---|---|---|---|"]
        for row in result["rows"]:
            lines.append(
                f"| {_cell(row['name'])} | {row['tasks'][task]['value']:.4f} | {_change(row['tasks'][task])} |"
            )
    if result["published"]:
        published = result["published"]
        lines += ["", f"As published ({_cell(published['table'])}), {_cell(published['metric'])}:", ""]
        lines += ["| benchmark | base | fused without adaptation | fused with adaptation |", "|---|---|---|---|"]
        for name, values in published["scores"].items():
            lines.append(f"| {_cell(name)} | {' | '.join(f'{value:g}' for value in values)} |")
        sizes = published["by_source"]
        if sizes:
            lines += ["", "As published, fused with adaptation, by the size of the source:", ""]
            lines += [f"| benchmark | {' | '.join(map(_cell, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
            for name in next(iter(sizes.values())):
                lines.append(f"| {_cell(name)} | {' | '.join(f'{scores[name]:g}' for scores in sizes.values())} |")
    return "\n".join(lines) + "\n"


def added_words(item: Mapping[str, Any]) -> str:
    """Whether a merge adds anything to a training, in a sentence."""
    low, high = item["ci95"]
    if high < 0:
        verdict = f"the merge adds to {item['to']}"
    elif low > 0:
        verdict = f"{item['to']} does better without the merge"
    else:
        verdict = f"as far as these texts show, the merge adds nothing to {item['to']}"
    seeds = [seed["value"] for seed in item["seeds"]]
    spread = f", {min(seeds):+.4f} to {max(seeds):+.4f} over {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f"{item['row']} against {item['to']}: {item['value']:+.4f} [{low:+.4f}, {high:+.4f}]{spread}: {verdict}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _change(item: Mapping[str, Any]) -> str:
    change = item.get("difference")
    return f"{change['value']:+.4f} | [{change['ci95'][0]:+.4f}, {change['ci95'][1]:+.4f}]" if change else " | "


def _spread(row: Mapping[str, Any]) -> str:
    """Lowest and highest seed, where there are several."""
    values = [seed["value"] for seed in row.get("seeds", [])]
    return f" ({min(values):.4f} to {max(values):.4f} over {len(values)} seeds)" if len(values) > 1 else ""
