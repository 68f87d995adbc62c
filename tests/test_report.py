"""What the verdict's sentence says of a gain that a control makes as well."""

import pytest

from tmerge.report import summary


def report(verdict, value, controls):
    half = 0.01
    return {
        "verdict": verdict,
        "evaluation": {
            "texts": 50,
            "difference": {"value": value, "ci95": [value - half, value + half]},
            "controls": {
                name: {
                    "difference": {"value": change, "ci95": [change - half, change + half]},
                    "fused_minus_control": {
                        "value": value - change,
                        "ci95": [value - change - 0.005, value - change + 0.005],
                    },
                }
                for name, change in controls.items()
            },
        },
    }


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
def test_a_gain_that_a_control_makes_too_is_said_to_be_none_of_the_merge(controls, named):
    said = summary(report("helps", -0.05, controls))
    assert said.startswith("The merge helps: -0.0500")
    assert ("not the source's knowledge" in said) == bool(named)
    assert all(name in said for name in named) and ("noise (+" not in said)


def test_a_loss_needs_no_caution():
    assert "control" not in summary(report("hurts", 0.05, {"shrink": 0.05}))
