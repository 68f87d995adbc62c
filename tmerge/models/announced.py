"""What a config announces of a checkpoint and the model does not have: layers that predict further tokens, classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from tmerge.models.stored import CLASSIFIER, SidePart, is_prediction

__all__ = ["announce_what_is_there", "is_announcement"]

# How a config counts prediction layers: num_nextn_predict_layers, mtp_num_hidden_layers, num_mtp_modules. What else it
# says of them (mtp_use_dedicated_embeddings, mtp_loss_weight) says nothing where there are none.
_ANNOUNCED = re.compile(r"^(?=\w*(layers|depths?|modules)$)(\w*_)?(mtp|nextn)(_\w*)?$")


def is_announcement(key: str, value: Any) -> bool:
    """Whether a config counts prediction layers under this key."""
    # A flag is an int too, but counts nothing.
    return bool(_ANNOUNCED.search(key)) and isinstance(value, int) and not isinstance(value, bool)


def announce_what_is_there(model: PreTrainedModel, side: Iterable[SidePart] = ()) -> None:
    """Take out of a model's config what its checkpoint announced and the model does not have.

    Args:
        model: Its config is changed.
        side: What was left out.
    """
    config = model.config
    decoder = config.get_text_config(decoder=True)
    if not any(is_prediction(name) for name in model.state_dict()):
        for part in {id(config): config, id(decoder): decoder}.values():
            for key, value in list(vars(part).items()):
                if is_announcement(key, value):
                    setattr(part, key, 0)
    if any(part.kind == CLASSIFIER for part in side):
        config.id2label = config.label2id = config.problem_type = None
