"""Every preset is a valid recipe with the settings and the published scores of the paper."""

import pytest

from tmerge.evaluation.tasks import TASK_GROUPS, expand_tasks
from tmerge.recipe import Recipe, load_recipe, preset_names

DOMAINS = ("malay", "indonesian", "thai", "cantonese", "finance", "medical", "math")


def test_the_papers_domains_are_there():
    assert set(preset_names()) == {"demo", "relatives", *DOMAINS}


@pytest.mark.parametrize("name", DOMAINS)
def test_a_preset_is_whole(name):
    recipe = load_recipe(name)
    assert Recipe.from_mapping(recipe.model_dump(mode="json")) == recipe
    assert recipe.transport.eta == 0.1 and recipe.fusion.top_k == 128
    assert recipe.transport.epsilon == (0.03 if name == "math" else 0.1)
    # As many texts as the paper has, beside the held-out ones.
    kept = recipe.calibration.texts * (1 - recipe.calibration.held_out)
    assert kept == pytest.approx(8000 if name == "thai" else 2000)
    budget = recipe.adaptation.steps * recipe.adaptation.batch_size * recipe.adaptation.accumulation
    assert budget == pytest.approx(kept)  # one epoch
    assert set(expand_tasks(recipe.compare.tasks)) == set(TASK_GROUPS[name])
    assert (recipe.published is None) == (name == "math")


def test_published_means_are_the_papers_own():
    """The averages that the paper prints below its tables, computed from the rows that we copied."""
    means = {"indonesian": (38.43, 39.18, 39.30), "medical": (46.30, 46.23, 47.87), "thai": (0.41, 0.45, 0.50)}
    means |= {"finance": (0.32, 0.34, 0.35)}
    for name, expected in means.items():
        rows = list(load_recipe(name).published.scores.values())
        found = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert found == pytest.approx(expected, abs=0.0051), name
