"""What measured pairs carried, by how alike their weights are: what a figure of relatedness means.

``measured_pairs.json`` beside this file is written by ``tests/bench/calibration.py`` from pairs whose true
correspondence is known; docs/experiments.md has the pairs, and how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

from pydantic import TypeAdapter

from tmerge.report.parts import Items, Part

__all__ = ["MeasuredPair", "carried_words", "measured_pairs"]

# A pair is like another whose weights are alike to within this.
_LIKE = 0.05
# And what one further away carried says nothing of it.
_NEAR = 0.15


class MeasuredPair(Part):
    """A target, and the model that it was cut out of, after both were trained on.

    Attributes:
        name: Of docs/experiments.md.
        activations: Relatedness by activations.
        ci95: Of that.
        permuted: The same by chance.
        weights: How alike the weights of paired layers are.
        chance: The same by chance.
        found: Gain on the source's texts of what was carried through the correspondence that was found, at alpha 1,
            all projections: bits per byte less the target's. None of strangers, as the next.
        true: The same through the true one, which strangers have not.
    """

    name: str
    activations: float
    ci95: Items[float]
    permuted: float
    weights: float
    chance: float
    found: float | None
    true: float | None

    @property
    def share(self) -> float | None:
        """Of what the true correspondence carries."""
        return None if self.found is None or self.true is None else self.found / self.true


@cache
def measured_pairs() -> tuple[MeasuredPair, ...]:
    """All of them."""
    text = resources.files("tmerge.report").joinpath("measured_pairs.json").read_bytes()
    return TypeAdapter(tuple[MeasuredPair, ...]).validate_json(text)


def carried_words(weights: float, pairs: Sequence[MeasuredPair] | None = None) -> str | None:
    """What pairs carried whose weights are as alike as these, in a sentence.

    Args:
        weights: How alike those of paired layers are.
        pairs: That were measured; those that are shipped if None.

    Returns:
        None where no pair was measured.
    """
    known = [
        (pair.weights, pair.share) for pair in (measured_pairs() if pairs is None else pairs) if pair.share is not None
    ]
    if not known:
        return None
    like = [(alike, share) for alike, share in known if abs(alike - weights) <= _LIKE]
    if not like:
        alike, share = min(known, key=lambda pair: abs(pair[0] - weights))
        if not abs(alike - weights) <= _NEAR:
            return f"no pair like that was measured: the nearest is at {alike:.2f}"
        carried = f"carried {_percent(share)} of what the true correspondence carries"
        return f"no measured pair is like that; the nearest, at {alike:.2f}, {carried}"
    least, most = (_percent(of(share for _, share in like)) for of in (min, max))
    carried = most if least == most else f"{least.removesuffix(' %')} to {most}"
    counted = "the one measured pair" if len(like) == 1 else f"the {len(like)} measured pairs"
    return f"{counted} of such weights carried {carried} of what the true correspondence carries"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
