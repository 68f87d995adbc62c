"""What ``transformers`` leaves out of a GGUF file's config, and the file says or its kind of model has.

Each of these is what the model's own repo has in its config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedConfig

from tmerge.errors import CheckpointError
from tmerge.models.gguf import GgufHeader
from tmerge.models.reference import ModelReference

__all__ = ["ROTARY_FACTORS", "complete", "rotary_scaling", "rotary_tables"]

ROTARY_FACTORS = "rope_freqs.weight"
"""llama.cpp's name of the tensor by whose values the rotary frequencies are divided."""

# As all of Llama 3.1, 3.2 and 3.3 are stretched, but for the factor: no GGUF file says it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Models that scale queries by the width of the stream over the heads, where their smaller sisters do by a head's own.
_SCALED_BY_STREAM = {"gemma2": 46, "gemma3": 62}
# A dimension that is divided by so much does not rotate.
_NEVER = 1e29


def complete(reference: ModelReference, header: GgufHeader, config: PreTrainedConfig) -> None:
    """Put into a config what its file says beside what ``transformers`` takes.

    Args:
        reference: Named in errors.
        header: Of the file.
        config: As ``transformers`` makes it; it is changed.

    Raises:
        CheckpointError: The file's rotary positions are of no kind that is known.
    """
    prefix = f"{header.architecture}."
    said = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    window = said.get("attention.sliding_window")
    if isinstance(window, int) and window > 0 and getattr(config, "sliding_window", 0) is None:
        setattr(config, "sliding_window", window)  # noqa: B010 - some configs have it, and no base class
    table = _table(config)
    kind, factor = rotary_scaling(said)
    if kind == "linear" and table is not None and table.get("rope_type", "default") == "default":
        table |= {"rope_type": "linear", "factor": float(factor)}
    if said.get("block_count") == _SCALED_BY_STREAM.get(header.architecture):
        setattr(config, "query_pre_attn_scalar", config.hidden_size // config.num_attention_heads)  # noqa: B010
    _stretch(reference, header, config)


def rotary_scaling(said: Mapping[str, Any]) -> tuple[str, float]:
    """How metadata have rotary positions scaled, as llama.cpp reads them: none, linear or another; and how much."""
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 0.0))
    kind = str(said.get("rope.scaling.type", "linear" if factor else "none")) or "none"
    scaled = isinstance(factor, float | int) and factor not in (0, 1)
    return (kind, float(factor)) if scaled or kind not in ("none", "linear") else ("none", 1.0)


def rotary_tables(config: Any) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its rotary positions; one under "" where all layers have the same."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {name: value for name, value in rotary.items() if isinstance(value, dict)}
    return kinds or ({"": rotary} if rotary else {})


def _table(config: Any) -> dict[str, Any] | None:
    """Those of layers with full attention, which alone are scaled."""
    tables = rotary_tables(config)
    return tables.get("full_attention", tables.get(""))


def _stretch(reference: ModelReference, header: GgufHeader, config: PreTrainedConfig) -> None:
    """Take the stretched rotary positions of Llama 3.1 and later, which a file holds as a tensor of factors.

    They are held against what the models' own settings give.
    """
    if all(tensor.name != ROTARY_FACTORS for tensor in header.tensors):
        return
    factors, table = _factors(reference, header), _table(config)
    if np.allclose(factors, 1.0):
        return
    if table is not None and "rope_theta" in table:
        still = factors >= _NEVER
        # The first dimensions rotate as ever and the rest not at all: a share of them, as the config may have it.
        share = float(table.get("partial_rotary_factor", 1.0))
        if np.allclose(factors[~still], 1.0) and math.isclose((~still).mean(), share, abs_tol=1 / len(factors)):
            return
        stretch = round(float(factors.max()), 4)
        if np.allclose(factors, _llama3_factors(table["rope_theta"], 2 * len(factors), stretch), rtol=1e-4):
            table |= {"rope_type": "llama3", "factor": stretch} | _LLAMA3
            return
    raise CheckpointError(
        f"{reference.text!r} holds rotary factors ({ROTARY_FACTORS}, up to {factors.max():.4g}) that transformers does "
        "not read, so it would be another model; use its safetensors"
    )


def _factors(reference: ModelReference, header: GgufHeader) -> np.ndarray:
    try:
        tensor = next(tensor for tensor in gguf.GGUFReader(header.path).tensors if tensor.name == ROTARY_FACTORS)
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float64).ravel()
    except (ValueError, NotImplementedError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{reference.text!r}: its rotary factors ({ROTARY_FACTORS}) cannot be read ({error}); download it again"
        ) from None


def _llama3_factors(theta: float, width: int, stretch: float) -> np.ndarray:
    """By what each rotary frequency is divided: 1 for short wavelengths, `stretch` for long, smooth in between."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / stretch + smooth))
