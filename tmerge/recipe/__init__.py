"""The recipe: what is asked for. Sections, the choices among their kinds, and how a recipe is read."""

from tmerge.recipe.adaptation import AdaptationSettings
from tmerge.recipe.calibration import CalibrationSettings
from tmerge.recipe.compare import CompareSettings, PublishedScores
from tmerge.recipe.evaluation import FITTED_CONTROLS, EvaluationSettings
from tmerge.recipe.fusion import CarriedSettings, FusionSettings, Reconstruction, TaskVector, Weights
from tmerge.recipe.loading import RECIPE_VARIABLE, load_recipe, parse_setting, preset_names
from tmerge.recipe.method import (
    CARRYING,
    CARRYING_BESIDE,
    MATCHING_BY_WEIGHTS,
    READING_AT_ENDS,
    RECONSTRUCTING,
    method_of,
    scales_carried,
)
from tmerge.recipe.page import recipe_page
from tmerge.recipe.recipe import DECIDE_NOTHING, DECIDE_WRITING, Recipe
from tmerge.recipe.references import compared_references, model_references, text_references
from tmerge.recipe.save import SaveSettings
from tmerge.recipe.section import ProjectionName
from tmerge.recipe.sources import JoinedSource, source_name
from tmerge.recipe.strict_yaml import load_yaml
from tmerge.recipe.transport import Apart, Shared, TransportSettings
from tmerge.recipe.unsaid import unsaid

__all__ = [
    "compared_references",
    "model_references",
    "text_references",
    "FITTED_CONTROLS",
    "CARRYING",
    "CARRYING_BESIDE",
    "MATCHING_BY_WEIGHTS",
    "READING_AT_ENDS",
    "RECONSTRUCTING",
    "RECIPE_VARIABLE",
    "AdaptationSettings",
    "Apart",
    "CalibrationSettings",
    "CarriedSettings",
    "CompareSettings",
    "EvaluationSettings",
    "FusionSettings",
    "JoinedSource",
    "ProjectionName",
    "PublishedScores",
    "DECIDE_NOTHING",
    "DECIDE_WRITING",
    "Recipe",
    "Reconstruction",
    "SaveSettings",
    "Shared",
    "TaskVector",
    "TransportSettings",
    "Weights",
    "scales_carried",
    "load_recipe",
    "load_yaml",
    "method_of",
    "parse_setting",
    "preset_names",
    "recipe_page",
    "source_name",
    "unsaid",
]
