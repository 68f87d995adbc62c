"""The fields of the form: which keys of the recipe it shows, grouped and labelled.

What each takes, its choices, its bounds and its help are the recipe's own schema's. No components here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from tmerge.recipe import Recipe
from tmerge.recipe.schema import kind_words, sections_of, top_level

__all__ = ["FIRST", "GROUPS", "SETTINGS", "STEP", "Setting"]

_SECTIONS = sections_of(Recipe)

STEP = 0.01
"""By which a number's field goes up and down; what is smaller is written as text."""

Kind = Literal["whole", "number", "words", "choice", "several", "switch", "value"]


@dataclass(frozen=True)
class Setting:
    """One field of the form. What it takes is as the recipe's own schema says.

    Attributes:
        key: In the recipe, dotted.
        label: Shown.
        names: Choice -> what is shown for it, where that is not the choice itself: some words are ids of Gradio's own
            messages, and would be shown as those.
    """

    key: str
    label: str
    names: tuple[tuple[str, str], ...] = ()

    @property
    def element(self) -> str:
        """The id that its field has on the page."""
        return f"set-{self.key.replace('.', '-')}"

    @property
    def named_choices(self) -> list[tuple[str, str]]:
        """What is shown for each choice, and the choice."""
        names = dict(self.names)
        return [(names.get(choice, choice), choice) for choice in self.choices]

    @property
    def kind(self) -> Kind:
        """What shows it.

        ``whole`` and ``number`` are numbers, ``choice`` one of `choices`, ``several`` some of them, ``switch`` a
        boolean, ``words`` text or nothing, ``value`` what YAML reads (a number or a word, or a list of them).
        """
        schema, kinds = self._schemas[0], {"boolean": "switch", "integer": "whole", "string": "words"}
        if self.choices:
            return "several" if self.listed else "choice"
        if schema.get("type") == "number" and schema["default"] >= STEP:
            return "number"
        types = {choice.get("type") for choice in schema.get("anyOf", [schema])} - {"null"}
        return cast(Kind, kinds.get(str(types.pop()), "value") if len(types) == 1 else "value")

    @property
    def choices(self) -> tuple[str, ...]:
        """What there is to choose, with whatever else is chosen; of free text, what is proposed."""
        names: list[str] = []
        for schema in self._schemas:
            schema = schema["items"] if self.listed else schema
            names += schema.get("enum", [schema["const"]] if "const" in schema else schema.get("examples", []))
        return tuple(dict.fromkeys(names))

    @property
    def listed(self) -> bool:
        """Whether it takes several values."""
        return self._schemas[0].get("type") == "array"

    @property
    def decides(self) -> bool:
        """Whether other settings' defaults hang on it."""
        section, _, name = self.key.partition(".")
        return self.key == "save.form" or section in _SECTIONS and _SECTIONS[section].chooser == name

    @property
    def description(self) -> str:
        """One line of help: the recipe's own, and which numbers are taken."""
        described = str(self._schemas[0].get("description", ""))
        if self._schemas[0].get("type") in ("integer", "number"):
            described = f"{described}; {kind_words(self._schemas[0])}"
        return (described[:1].upper() + described[1:]).replace("`", "")

    @property
    def _schemas(self) -> list[Mapping[str, Any]]:
        """One for each kind of the section that has it."""
        section, dot, name = self.key.partition(".")
        if not dot:
            return [top_level(Recipe)[section]]
        return [kind.keys[name] for kind in _SECTIONS[section].kinds.values() if name in kind.keys]


FIRST: tuple[Setting, ...] = (
    Setting("source_base", "Source before its fine-tuning"),
    Setting("fusion.what", "What is transported"),
    Setting("fusion.alpha", "Strength (alpha)"),
    Setting("calibration.texts", "Number of texts"),
    Setting("fusion.projections", "Projections"),
)
"""What most merges set, beside the models and the texts: always in sight."""

GROUPS: dict[str, tuple[Setting, ...]] = {
    "Calibration": (
        Setting("calibration.max_tokens", "Longest text, tokens"),
        Setting("calibration.batch_tokens", "Tokens of a batch"),
        Setting("calibration.held_out", "Share held out"),
        Setting("calibration.match_on", "Match neurons on"),
        Setting("calibration.rows", "Features are of"),
        Setting("calibration.token_rows", "Single tokens"),
        Setting("calibration.choosing", "Share to choose on"),
    ),
    "Transport": (
        Setting("transport.structure", "Structure"),
        Setting("transport.matching", "Matching"),
        Setting("transport.weights", "Match by weights too"),
        Setting("transport.signed", "Signed matching"),
        Setting("transport.map", "Map"),
        Setting("transport.ridge", "Ridge penalty"),
        Setting("transport.epsilon", "Epsilon"),
        Setting("transport.max_iterations", "Most iterations"),
        Setting("transport.tolerance", "Tolerance"),
        Setting("transport.eta", "Eta"),
        Setting("transport.layer_max_iterations", "Most iterations, layers"),
        Setting("transport.layer_tolerance", "Tolerance, layers"),
        Setting("transport.layer_cost", "Layer cost"),
        Setting("transport.layer_marginals", "Layer marginals"),
        Setting("transport.layers_kept", "Source layers kept"),
        Setting("transport.entries_kept", "Entries kept"),
        Setting("plan", "Plan of another run"),
    ),
    "Fusion": (
        Setting("fusion.alphas", "Strengths that auto tries"),
        Setting("fusion.top_k", "Neurons per projection and layer"),
        Setting("fusion.scale", "Scale of the maps"),
        Setting("fusion.units", "Units"),
        Setting("fusion.biases", "Biases"),
        Setting("fusion.affine", "Affine maps"),
        Setting("fusion.stream", "Embeddings and norms"),
        Setting("fusion.join", "Joining of several sources"),
        Setting("fusion.density", "Entries that joining keeps"),
        Setting("fusion.ridge", "Ridge penalty of a fit"),
        Setting("fusion.ridges", "Penalties that auto tries"),
        Setting("fusion.rank", "Rank of a change"),
        Setting("fusion.final_goal", "Goal of the last block"),
        Setting("fusion.keep", "Texts to stay the same on"),
        Setting("fusion.keep_texts", "How many of them"),
        Setting("fusion.keep_share", "Their share of a fit"),
    ),
    "Evaluation": (
        Setting("evaluation.texts", "Held-out texts scored"),
        Setting("evaluation.controls", "Controls"),
        Setting("evaluation.bootstrap", "Bootstrap resamples"),
        Setting("evaluation.descent", "Texts of the descent control"),
    ),
    "Machine and saving": (
        Setting("dtype", "Number format"),
        Setting("device", "Device"),
        Setting(
            "memory",
            "Models that are only read",
            (("auto", "in memory where they fit"), ("resident", "in memory"), ("blocks", "block by block")),
        ),
        Setting("seed", "Seed"),
        Setting("save.form", "Written as", (("merged", "a whole model"), ("adapter", "a LoRA of the target"))),
        Setting("save.max_shard_size", "Largest weights file"),
    ),
}
"""All other settings, by the recipe's sections."""

SETTINGS: tuple[Setting, ...] = (*FIRST, *(setting for group in GROUPS.values() for setting in group))
"""All of them, in order."""
