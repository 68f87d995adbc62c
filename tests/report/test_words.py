"""What the verdict's sentence says of a gain that a control makes as well."""

import pytest

from tests.plotted import control, interval, report  # noqa: F401 - one is a fixture
from tests.reported import typed
from tmerge.report import summary


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


def test_a_loss_needs_no_caution(report):  # noqa: F811
    assert "control" not in summary(verdict_of(report, "hurts", 0.05, {"shrink": 0.05}))
