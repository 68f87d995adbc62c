"""What a model multiplies by around a projection, by its config: Granite, Cohere and Falcon-H1 have such factors.

With an input scaled by a and an output scaled by c, what counts of a weight is ``c W a``, so a weight carried between
models of other factors is worth as much as before if it is multiplied by what they are to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["Multipliers", "multipliers_of"]


@dataclass(frozen=True)
class Multipliers:
    """The factors of one model.

    Attributes:
        before: Projection -> what its input is multiplied by; 1 of those that are not named.
        behind: Projection, or ``head`` -> what its output is multiplied by; likewise.
    """

    before: Mapping[str, float] = field(default_factory=dict)
    behind: Mapping[str, float] = field(default_factory=dict)

    def output_ratio(self, name: str, other: Multipliers) -> float:
        """What outputs of another model's are multiplied by, so that this one makes as much of them."""
        return other.behind.get(name, 1.0) / self.behind.get(name, 1.0)

    def weight_ratio(self, name: str, other: Multipliers) -> float:
        """What another model's weight is multiplied by, so that this one makes as much of it."""
        return self.output_ratio(name, other) * other.before.get(name, 1.0) / self.before.get(name, 1.0)


def _granite(config: Any) -> Multipliers:
    residual = float(config.residual_multiplier)
    return Multipliers(behind={"o": residual, "down": residual, "head": 1 / float(config.logits_scaling)})


def _hyperclovax(config: Any) -> Multipliers:
    # Behind a norm the size of what o and down give is of no account, and so is that of the factor.
    residual = 1.0 if config.use_post_norm else float(config.residual_multiplier)
    # As Granite, but that logits are multiplied by what Granite divides them by.
    return Multipliers(behind={"o": residual, "down": residual, "head": float(config.logits_scaling)})


def _cohere(config: Any) -> Multipliers:
    return Multipliers(behind={"head": float(config.logit_scale)})


def _falcon_h1(config: Any) -> Multipliers:
    # What its state-space half is multiplied by is none of the projections'.
    gate, down = map(float, config.mlp_multipliers)
    return Multipliers(
        before=dict.fromkeys(("q", "k", "v"), float(config.attention_in_multiplier)),
        behind={
            "k": float(config.key_multiplier),
            "o": float(config.attention_out_multiplier),
            "gate": gate,
            "down": down,
            "head": float(config.lm_head_multiplier),
        },
    )


# Read off each model's forward pass. Granite's factor of the scores is `HeadLayout.scaling`, and what embeddings are
# multiplied by `embedding_scale`.
_BY_TYPE: dict[str, Callable[[Any], Multipliers]] = {
    "cohere": _cohere,
    "cohere2": _cohere,
    "cohere2_moe": _cohere,
    "falcon_h1": _falcon_h1,
    "granite": _granite,
    "granite_swa": _granite,
    "granitemoe": _granite,
    "granitemoe_swa": _granite,
    "granitemoehybrid": _granite,
    "granitemoeshared": _granite,
    "hyperclovax": _hyperclovax,
}


def multipliers_of(config: PreTrainedConfig) -> Multipliers:
    """The factors that a config names; none of a model type without them."""
    return _BY_TYPE.get(config.model_type, lambda _: Multipliers())(config)
