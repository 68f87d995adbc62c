"""What the verdict's sentence says of a gain that a control makes as well."""

import html
from typing import get_args

import pytest

from tests.plotted import control, interval, record, report  # noqa: F401 - two are fixtures
from tests.reported import adaptation, typed
from tmerge.evaluation import Verdict
from tmerge.hub import card_text
from tmerge.plots import report_page
from tmerge.recipe import Recipe
from tmerge.report import (
    Relatedness,
    is_related,
    relatedness_words,
    summary,
    training_summary,
    verdict_tone,
    verdict_words,
)
from tmerge.report.measured import MeasuredPair, carried_words, measured_pairs
from tmerge.templates import static_text
from tmerge.ui.parts.progress import result_cards
from tmerge.ui.server.visitor_run import VisitorRun


def verdict_of(document, verdict, value, controls):
    """A report that says so, its controls' differences given by name."""
    half = 0.01
    evaluation = {
        **document["evaluation"],
        "texts": 50,
        "difference": interval(value, half),
        "controls": {name: control(2.9, change, half, value - change) for name, change in controls.items()},
    }
    for item in evaluation["controls"].values():
        middle = item["fused_minus_control"]["value"]
        item["fused_minus_control"] = interval(middle, 0.005)
    return typed({**document, "verdict": verdict, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("controls", "named"),
    [
        ({"shrink": -0.051, "noise": 0.04}, ["shrink (-0.0510)"]),  # seen on the demo pair with alpha auto
        (
            {"shrink": -0.048, "noise": -0.049},
            ["shrink (-0.0480)", "noise (-0.0490)"],
        ),  # no worse that these texts show
        ({"shrink": -0.02, "noise": 0.04}, []),  # the merge gains clearly more
        ({"shrink": 0.0, "noise": 0.04}, []),
        ({}, []),
    ],
)
def test_a_gain_that_a_control_makes_too_is_said_to_be_none_of_the_merge(controls, named, report):  # noqa: F811
    said = summary(verdict_of(report, "helps", -0.05, controls))
    assert said.startswith("The merge helps: -0.0500")
    assert ("not the source's knowledge" in said) == bool(named)
    assert all(name in said for name in named) and ("noise (+" not in said)


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        (
            {"shrink": -0.051, "noise": 0.04},
            "shrink (-0.0510) gain as much.",
        ),
        ({"shrink": -0.048, "noise": -0.046}, "shrink (-0.0480), noise (-0.0460) gain as much."),
    ],
)
def test_a_gain_that_is_not_the_sources_has_a_verdict_of_its_own(controls, said, report):  # noqa: F811
    summed_up = summary(verdict_of(report, "better, but not by the source", -0.05, controls))
    assert summed_up.startswith("The merge is better than its target, but not by the source: -0.0500 bits per byte")
    assert summed_up.endswith(said)


def test_a_control_that_cannot_be_told_from_the_merge_is_not_said_to_gain(report):  # noqa: F811
    document = verdict_of(report, "better, but not by the source", -0.05, {"noise": -0.02}).to_dict()
    control = document["evaluation"]["controls"]["noise"]
    control["difference"]["ci95"], control["fused_minus_control"]["ci95"] = [-0.06, 0.02], [-0.07, 0.01]
    said = summary(typed(document))
    assert said.endswith(
        "But these texts do not show that it is the source's knowledge that helps: the merge cannot be told from "
        "noise (-0.0200)."
    )


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_every_verdict_is_said_and_shown_the_same_everywhere(verdict, report, record, tmp_path):  # noqa: F811
    told = verdict_of(report, verdict, -0.05, {"shrink": -0.05})
    recipe = Recipe(target="someone/small", source="someone/large")
    run = VisitorRun("id", recipe, tmp_path, "me", state="done", report=told)
    page, app = html.unescape(report_page(told, record)), html.unescape(result_cards(run))
    words, tone = verdict_words(verdict), verdict_tone(verdict)
    for shown in (page, app, card_text(told, recipe), summary(told)):
        assert words in shown
    assert f'class="verdict {tone}"' in page and f'class="verdict {tone}"' in app
    assert (
        f".{tone}" in static_text("tmerge.plots", "page.css")
        and len({verdict_tone(one) for one in get_args(Verdict)}) == 4
    )


def test_a_loss_needs_no_caution(report):  # noqa: F811
    assert "control" not in summary(verdict_of(report, "hurts", 0.05, {"shrink": 0.05}))


def _asked(value, **weights):
    said = None if not weights else {"moved_layers": 0, "clear": False, "chance": 0.16} | weights
    return Relatedness(value=value, permuted=0.0, stream=value, mlp=value, rows=500, weights=said)


@pytest.mark.parametrize(
    ("asked", "related", "words"),
    [
        (
            _asked(0.99),
            True,
            "Relatedness 0.99 (by chance 0.00): these models' neurons correspond, as those of models ",
        ),
        (_asked(0.7), True, "Relatedness 0.70 (by chance 0.00): these models' neurons correspond, as those of models "),
        (_asked(0.16), False, "Relatedness 0.16 (by chance 0.00): two halves of the calibration set do not agree"),
        (
            _asked(0.16, paired=0.163),
            False,
            "Relatedness 0.16 (by chance 0.00), of weights 0.16 (by chance 0.16)",
        ),
        (
            _asked(0.3, paired=0.98, clear=True, moved_layers=12),
            True,
            "Relatedness 0.30 (by chance 0.00), of weights 0.98 (by chance 0.16): these models' weights are "
            "alike, as those of models with a common ancestor are; 12 layers are paired otherwise than by activations",
        ),
    ],
)
def test_relatives_are_told_by_their_activations_or_by_their_weights(asked, related, words):
    assert is_related(asked) == related
    said = relatedness_words(asked)
    assert said.startswith(words)
    # More texts help where the weights do not tell.
    assert ("calibration.match_on" in said) == (asked.value == 0.7) and ("tmerge adapt" in said) != related


def _pair(weights, found, true):
    return MeasuredPair(
        name=f"{weights} {found}",
        activations=0.9,
        ci95=(0.89, 0.91),
        permuted=0.0,
        weights=weights,
        chance=0.15,
        found=found,
        true=true,
    )


def test_a_figure_is_said_in_terms_of_what_like_pairs_carried():
    pairs = [_pair(0.99, -0.5, -0.5), _pair(0.97, -0.48, -0.5), _pair(0.7, -0.2, -0.5), _pair(0.13, None, None)]
    said = "carried 96 to 100 % of what the true correspondence carries"
    assert carried_words(0.98, pairs) == f"the 2 measured pairs of such weights {said}"
    assert carried_words(0.72, pairs).startswith("the one measured pair of such weights carried 40 % of what")
    assert carried_words(0.6, pairs).startswith("no measured pair is like that; the nearest, at 0.70, carried 40 %")
    assert carried_words(0.4, pairs) == "no pair like that was measured: the nearest is at 0.70"
    assert carried_words(0.13, pairs[-1:]) is None and carried_words(0.99, []) is None


def test_the_pairs_that_are_shipped_are_sound_and_said():
    pairs = measured_pairs()
    assert len({pair.name for pair in pairs}) == len(pairs) > 7
    for pair in pairs:
        assert pair.ci95[0] <= pair.activations <= pair.ci95[1] and -1 <= pair.chance <= 1
        # What was carried through the truth helped, and so there is something to be a share of.
        assert pair.true is None or pair.true < 0
    # Strangers among them, who are told to be none of the relatives.
    assert {pair.weights - pair.chance < 0.05 for pair in pairs if pair.true is None} == {True}
    assert f"({'docs/experiments.md'})" in relatedness_words(_asked(0.9, paired=0.99, clear=True))


@pytest.mark.parametrize(
    ("trained", "stream", "words"),
    [
        ({}, (), "what was transported held fixed."),
        ({"residual": "none"}, (), "what was transported trained as well."),
        # Beside a low rank all that is in the model stands still, what was transported too.
        ({"residual": "none", "lora_rank": 4}, (), "what was transported held fixed."),
        ({"alpha": 0.5}, (), "what was transported (at strength 0.5) held fixed."),
        ({"alpha": {"q": 0.5, "v": 0.0}}, (), "what was transported (at strength q 0.5, v 0) held fixed."),
        ({"alpha": 0.0}, (), "with nothing of what was transported (strength 0)."),
        ({"alpha": {"q": 0.0}}, (), "with nothing of what was transported (strength 0)."),
        ({}, ("embed",), "what was transported held fixed, but for embeddings and norms."),
        ({"lora_rank": 4}, ("embed",), "what was transported held fixed."),
    ],
)
def test_what_a_training_did_with_what_was_transported(trained, stream, words, report):  # noqa: F811
    document, worse = dict(report), interval(0.3, 0.1)
    adapted = {"score": worse, "difference": worse, "difference_to_fused": worse}
    document |= {
        "adaptation": adaptation(**{"alpha": document["fusion"]["alpha"], **trained}),
        "evaluation": {**document["evaluation"], "adapted": adapted},
        "fusion": {**document["fusion"], "stream": list(stream)},
    }
    assert words in training_summary(typed(document))
