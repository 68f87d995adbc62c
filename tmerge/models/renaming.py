"""Which of a model's tensors a stored one becomes, as ``transformers`` renames them when it loads a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from transformers import PreTrainedModel

from tmerge.models.checkpoint import StoredTensor

__all__ = ["GOES_ANOTHER_WAY", "renamed"]

log = logging.getLogger(__name__)

GOES_ANOTHER_WAY = (ImportError, TypeError, AttributeError)
"""What a release of ``transformers`` that goes another way answers to its functions being called as they are here."""


def renamed(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, tuple[str, bool]] | None:
    """Stored tensor -> the name that ``transformers`` gives it, and whether it then makes something else of it.

    Args:
        model: On the meta device.
        stored: By name.

    Returns:
        None where this cannot be asked.
    """
    if type(model).__module__.partition(".")[0] == "transformers_modules":
        return None  # code of its own may load itself in ways of its own
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, WeightConverter)]
        # Subclasses may look at more than one name to rename another.
        known = all(type(item).__name__ in ("WeightRenaming", "PrefixChange") for item in renamings)
        if not known or len(renamings) + len(converters) < len(transforms):
            return None
        meta = model.state_dict()
        found = {name: rename_source_key(name, renamings, converters, model.base_model_prefix, meta) for name in stored}
    except GOES_ANOTHER_WAY as error:
        log.debug("names cannot be told: %s", error)
        return None
    return {name: (given, converter is not None) for name, (given, converter) in found.items()}
