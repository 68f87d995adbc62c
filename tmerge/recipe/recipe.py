"""A recipe: everything that decides a run, as one YAML file.

The recipe is frozen and strict. Two runs of one recipe on one machine give the same weights, so nothing
that changes a weight may live anywhere else. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from tmerge.errors import RecipeError
from tmerge.recipe.adaptation import AdaptationSettings
from tmerge.recipe.calibration import CalibrationSettings
from tmerge.recipe.compare import CompareSettings, PublishedScores
from tmerge.recipe.evaluation import EvaluationSettings
from tmerge.recipe.fusion import FusionSettings, Reconstruction, TaskVector, Weights
from tmerge.recipe.mistakes import one_line
from tmerge.recipe.save import SaveSettings
from tmerge.recipe.section import Section, counted
from tmerge.recipe.sources import JoinedSource, repo_of, source_name
from tmerge.recipe.strict_yaml import StrictDumper
from tmerge.recipe.transport import Apart, Shared, TransportSettings
from tmerge.recipe.unsaid import with_unsaid

__all__ = ["DECIDE_NOTHING", "DECIDE_WRITING", "Recipe"]

DECIDE_NOTHING = frozenset({"memory"})
"""Keys that change no number, and may be changed in the middle of a run."""

DECIDE_WRITING = frozenset({"save"})
"""Keys that change how the result is written and nothing before it: what is finished stays so when they change."""


class Recipe(Section):
    """Everything that decides a run; each key says what it is in its description (`tmerge recipe` shows them all)."""

    target: str = Field(description="the model that is changed: Hub id (with `@revision`), folder or `.gguf` file")
    source: str = Field(description="the model that is read")
    source_base: str | None = Field(
        None,
        description="the source before its fine-tuning, for task vectors and the control source_base",
    )
    adapter: str | None = Field(
        None,
        description="a LoRA, PEFT repo or folder: what it changes of source_base is carried, and that model alone is "
        "read for the matching (with fusion.what: reconstruct, what the two together do is fitted to); source is the "
        "two together, and need not be named",
    )
    sources: tuple[JoinedSource, ...] = Field(
        (),
        description="several models and LoRAs made from source_base, in place of source and adapter: what each learned "
        "is carried by the one matching of source_base, and joined (fusion.join)",
    )
    bases: dict[str, str] = Field(
        {},
        description="an adapter that is named as a model -> Hub id (with `@revision`) of the model it is joined to; by "
        "itself the one that it names. The recipe of a finished run has its commit",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of both models' weights and forward passes; auto is each checkpoint's own, bfloat16 for GGUF",
    )
    device: str = Field(
        "auto",
        description="auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps",
        examples=["auto", "cpu", "cuda", "mps"],
    )
    memory: Literal["auto", "resident", "blocks"] = Field(
        "auto",
        description="whether a model that is only read is all in memory (resident), or read from its files block by "
        "block (blocks); auto takes the first where it fits. It changes no number",
    )
    seed: Annotated[int, counted(0, 4294967295)] = Field(0, description="of the split, the controls and the bootstrap")
    trust_remote_code: tuple[str, ...] = Field(
        (), description="the references, and no others, whose repos may run their own code"
    )
    plan: str | None = Field(
        None, description="a finished run, folder or Hub id, whose transport is fused from; then nothing is calibrated"
    )
    calibration: CalibrationSettings = CalibrationSettings()
    transport: TransportSettings = Apart()
    fusion: FusionSettings = Weights()
    evaluation: EvaluationSettings = EvaluationSettings()
    save: SaveSettings = SaveSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    compare: CompareSettings = CompareSettings()
    published: PublishedScores | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_what_is_chosen(cls, data: Any) -> Any:
        return with_unsaid(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        self._bases_are_of_models()
        self._adapter_has_a_base()
        self._sources_have_a_base()
        if self.save.form == "adapter":
            self._fits_an_adapter()
        learned, fitted = isinstance(self.fusion, TaskVector), self.transport.map != "plan"
        if isinstance(self.fusion, Reconstruction):
            self._is_reconstructible()
        fitted_controls = {"source_base", "texts"} & set(self.evaluation.controls)
        if fitted_controls and not isinstance(self.fusion, Reconstruction):
            raise ValueError(
                f"evaluation.controls has {', '.join(sorted(fitted_controls))}, which fusion.what: reconstruct alone "
                "can be held against; drop it"
            )
        if "source_base" in fitted_controls and self.source_base is None:
            raise ValueError("evaluation.controls has source_base, which needs that model: set source_base")
        if learned and self.source_base is None:
            raise ValueError("fusion.what is task-vector, which needs source_base: the source before its fine-tuning")
        unread = not learned and "source_base" not in fitted_controls and self.adapter is None
        if unread and self.source_base is not None:
            raise ValueError(
                "source_base is only read when fusion.what is task-vector, or for a reconstruction's control of that "
                "name; set fusion.what, or drop source_base"
            )
        if fitted and self.plan is not None:
            raise ValueError(f"transport.map is {self.transport.map}, which a recorded plan does not hold; drop plan")
        if isinstance(self.fusion, Reconstruction):
            return self
        if fitted and (self.fusion.units != "none" or self.fusion.scale == "literal"):
            raise ValueError(
                f"transport.map is {self.transport.map}, a fitted map, which has its units and its scale already; set "
                "fusion.units: none and fusion.scale: barycentric"
            )
        if isinstance(self.fusion, TaskVector) and self.fusion.stream:
            if not isinstance(self.transport, Shared):
                raise ValueError("fusion.stream needs transport.structure: shared; set that, or fusion.stream: false")
            if fitted:
                raise ValueError(f"fusion.stream needs transport.map: plan, not {self.transport.map}; set it to false")
        return self

    def _bases_are_of_models(self) -> None:
        named = [self.target, self.source, self.source_base, *(one.source for one in self.sources)]
        for adapter in self.bases:
            if all(name is None or repo_of(name) != repo_of(adapter) for name in named):
                raise ValueError(
                    f"bases names {adapter}, which is no model of this recipe; write it as the model is named, or drop "
                    "it"
                )

    def base_of(self, reference: str) -> str | None:
        """What `bases` says that a model is joined to; None where it says nothing of it.

        Args:
            reference: Of an adapter that stands for a model. Of one repo, what is said of this revision comes first.
        """
        named = {repo_of(adapter): base for adapter, base in self.bases.items()}
        return self.bases.get(reference, named.get(repo_of(reference)))

    def _adapter_has_a_base(self) -> None:
        if self.adapter is None:
            return
        if isinstance(self.fusion, Weights):
            raise ValueError(
                "fusion.what is weights, and of an adapter its change is carried (task-vector), or what its base does "
                "with it is reconstructed (reconstruct); drop fusion.what, or drop adapter and name it as the source, "
                "which is its base and it together"
            )
        if self.source != self.source_base:
            raise ValueError(
                f"source is {self.source} and source_base {self.source_base}, and an adapter is joined to source_base: "
                "drop source, or adapter"
            )
        if self.compare.sources:
            raise ValueError("compare.sources are merged with the same recipe, and adapter is of one source; drop one")

    def _fits_an_adapter(self) -> None:
        fusion = self.fusion
        if isinstance(fusion, Weights):
            raise ValueError(
                "save.form is adapter, and fusion.what: weights moves all of each weight, which has no low rank; set "
                "fusion.what: task-vector or reconstruct, or save.form: merged"
            )
        if fusion.carries_stream:
            raise ValueError(
                "save.form is adapter, which holds changes of projections alone; set fusion.stream: false, or "
                "save.form: merged"
            )
        if self.sources and isinstance(fusion, TaskVector) and fusion.join != "sum":
            raise ValueError(
                f"save.form is adapter, and fusion.join: {fusion.join} keeps single entries, which have no low rank; "
                "set fusion.join: sum, or save.form: merged"
            )
        if fusion.rank is None and (self.adapter is None or isinstance(fusion, Reconstruction)):
            raise ValueError(
                "save.form is adapter, and what is changed has as high a rank as it comes to; set fusion.rank, such as "
                "16, or save.form: merged"
            )

    def _sources_have_a_base(self) -> None:
        fusion = self.fusion
        if not self.sources:
            plain = TaskVector()
            if isinstance(fusion, TaskVector) and (fusion.join, fusion.density) != (plain.join, plain.density):
                key = "density" if fusion.join == plain.join else "join"
                raise ValueError(
                    f"fusion.{key} is {getattr(fusion, key)}, which joins several sources; name them in sources, or "
                    f"drop fusion.{key}"
                )
            return
        if not isinstance(fusion, TaskVector):
            raise ValueError(
                f"fusion.what is {fusion.what}, and sources are joined as task vectors; drop fusion.what, or name one "
                "source"
            )
        if fusion.join == "sum" and fusion.density != TaskVector().density:
            raise ValueError(
                f"fusion.density is {fusion.density}, and fusion.join: sum keeps every entry; set fusion.join to ties "
                "or dare, or drop fusion.density"
            )
        if self.adapter is not None:
            raise ValueError(f"adapter is {self.adapter} beside sources; name it as one of them: - adapter: ...")
        if self.source != self.source_base:
            raise ValueError(
                f"source is {self.source} beside sources, which are made from source_base ({self.source_base}); drop "
                "source, or name it as one of them: - source: ..."
            )
        if self.compare.sources:
            raise ValueError("compare.sources are merged one at a time, and sources together; drop one of the two")
        references = [source.reference for source in self.sources]
        for number, reference in enumerate(references, start=1):
            if reference in references[: number - 1]:
                first = source_name(references.index(reference) + 1)
                raise ValueError(
                    f"{source_name(number)} is {reference}, as {first} is; name it once, with the weight of both"
                )

    def _is_reconstructible(self) -> None:
        if not isinstance(self.transport, Shared):
            raise ValueError("fusion.what is reconstruct, which needs transport.structure: shared; set that")
        if self.transport.map != "plan":
            raise ValueError(
                f"transport.map is {self.transport.map}, and fusion.what: reconstruct fits weights itself; drop "
                "transport.map"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate a mapping.

        Args:
            data: The recipe's keys, as YAML gives them.
            where: Named in the error: a file or a preset.

        Raises:
            RecipeError: One line that names the key, its value and what is allowed.
        """
        try:
            recipe = cls.model_validate(data)
            # As a shell passes on a file's name in another encoding: no file could be written with it in.
            json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False).encode()
            return recipe
        except ValidationError as error:
            raise RecipeError(one_line(error, where, cls)) from None
        except UnicodeEncodeError as error:
            amiss = error.object[max(0, error.start - 20) : error.end]
            raise RecipeError(f"{where}: {amiss!r} is not UTF-8; write it so") from None

    @property
    def matches_by_weights(self) -> bool:
        """Whether neurons are matched here, and by both models' weights beside their activations."""
        return isinstance(self.transport, Shared) and self.transport.weights and self.plan is None

    def to_yaml(self) -> str:
        """The recipe with every default of what it chose written out; reading it back gives an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=StrictDumper, sort_keys=False, allow_unicode=True)

    def digest(self, *sections: str) -> str:
        """SHA-256 (hex) of the named top-level sections, or of all that decides; stages are recognised by it."""
        data = self.model_dump(mode="json")
        # Where no adapter stands for a model nothing is said of their bases, as before there was anything to say.
        deciding = data.keys() - DECIDE_NOTHING - ({"bases"} if not self.bases else set())
        chosen = {name: data[name] for name in sections or deciding}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
