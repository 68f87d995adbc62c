"""Which stored tensor belongs to which part of a model, and how ``transformers`` puts one part of a file into it.

What it does for a whole model in ``from_pretrained`` is asked of its own functions for some of the tensors. Where this
release has no such functions, or a model loads itself by code of its own, there are no parts, and it is read whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tmerge.errors import CheckpointError
from tmerge.models.block_weights import StoredParts
from tmerge.models.checkpoint import file_state, read_safetensors_header
from tmerge.models.discovery import find_block_list
from tmerge.models.gguf import BLOCK
from tmerge.models.gguf_reading import fast_reading
from tmerge.models.place import GgufPlace, Place
from tmerge.models.quiet import quiet
from tmerge.models.renaming import GOES_ANOTHER_WAY, renamed

__all__ = ["empty_model", "gguf_parts", "safetensors_parts"]

log = logging.getLogger(__name__)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The modules of a causal LM without parameters, its unstored buffers as ``from_pretrained`` makes them.

    Args:
        config: Of the model; it is left as it is.
        dtype: That parameters are to be read in.

    Returns:
        None where this ``transformers`` has no way to make buffers alone.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or they would be drawn at random
        model._move_missing_keys_from_meta_to_device(cast(Any, set()), None, None, None)
        with torch.no_grad():
            model.initialize_weights()
    except GOES_ANOTHER_WAY as error:
        log.debug("no empty model: %s", error)
        return None
    return model


def safetensors_parts(model: PreTrainedModel, place: Place, dtype: torch.dtype) -> StoredParts | None:
    """Those of a checkpoint of safetensors.

    Args:
        model: From `empty_model`.
        place: Of the checkpoint.
        dtype: That parameters are read in.

    Returns:
        None where they cannot be told.
    """
    found = renamed(model, place.headers)
    load = _loader(model, dtype, None)
    if found is None or load is None:
        return None
    files = {name: path for path in place.weights for name in read_safetensors_header(path)}
    states = {path: file_state(path) for path in place.weights}

    @contextmanager
    def opened(names: Collection[str]) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            paths = dict.fromkeys(files[name] for name in names)
            for path in paths:
                refuse_changed(path, states[path])
            # Opened each time: a file that stays open would keep every page that was read of it.
            readers = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
            yield {name: readers[files[name]].get_slice(name) for name in names}
            for path in paths:
                refuse_changed(path, states[path])

    own = model.state_dict().keys()
    return StoredParts({stored: name for stored, (name, _) in found.items() if name in own}, opened, load)


def gguf_parts(model: PreTrainedModel, place: GgufPlace, dtype: torch.dtype) -> StoredParts | None:
    """Those of a GGUF file; as `safetensors_parts`."""
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        quantizer = _gguf_quantizer(model, place, dtype)
    except GOES_ANOTHER_WAY as error:
        log.debug("no parts of a GGUF file: %s", error)
        return None
    load = _loader(model, dtype, quantizer)
    if load is None:
        return None
    list_name, blocks = find_block_list(model)
    state = file_state(place.path)
    ends = {"token_embd": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}

    def parameter(name: str) -> str:
        if block := BLOCK.match(name):
            return f"{list_name}.{block[1]}.{name[block.end() :]}"
        end = ends.get(name.partition(".")[0])
        return name if end is None else f"{names[id(end)]}.weight"

    @contextmanager
    def opened(wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        refuse_changed(place.path, state)
        with fast_reading(place.path, only=wanted):
            if quantizer is not None and quantizer.supported:
                tensors = quantizer.get_state_dict(str(place.path), model)
                yield {name: tensors[name] for name in wanted}
            else:
                found = load_gguf_checkpoint(
                    str(place.path), return_tensors=True, model_to_load=model, torch_dtype=dtype
                )
                yield found["tensors"]
        refuse_changed(place.path, state)

    # Blocks beyond the model's predict further tokens, and have no place in it.
    beyond = {
        tensor.name
        for tensor in place.header.tensors
        if (block := BLOCK.match(tensor.name)) and int(block[1]) >= len(blocks)
    }
    names_of = {tensor.name: parameter(tensor.name) for tensor in place.header.tensors if tensor.name not in beyond}
    return StoredParts(names_of, opened, load)


def refuse_changed(path: Path, state: tuple[int, ...]) -> None:
    """Refuse a file that is another than it was.

    Raises:
        CheckpointError: It is, or it is gone.
    """
    try:
        changed = file_state(path) != state
    except OSError:
        changed = True
    if changed:
        raise CheckpointError(f"{str(path)!r} changed while it was read; start again when it is written")


def _loader(
    model: PreTrainedModel, dtype: torch.dtype, quantizer: Any
) -> Callable[[PreTrainedModel, Mapping[str, Any]], None] | None:
    """What puts some tensors into a model as ``from_pretrained`` puts all."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=cast(Any, get_model_conversion_mapping(model, None, quantizer)),
        )
    except GOES_ANOTHER_WAY as error:
        log.debug("no loading in parts: %s", error)
        return None

    def load(model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
        with quiet():
            report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
        if report.mismatched_keys:
            name, stored, wanted = sorted(report.mismatched_keys, key=str)[0]
            raise CheckpointError(
                f"{name} is stored as {tuple(stored)}, and the model wants {tuple(wanted)}; download the model again"
            )
        if spoilt := [*report.conversion_errors.values(), *report.error_msgs]:
            raise CheckpointError(f"weights cannot be put together: {spoilt[0]}; download the model again")

    return load


def _gguf_quantizer(model: PreTrainedModel, place: GgufPlace, dtype: torch.dtype) -> Any:
    """What unpacks; None in a release that unpacks while it reads."""
    try:
        from transformers import GgufConfig
        from transformers.quantizers.auto import AutoHfQuantizer
    except ImportError:
        return None
    with fast_reading(place.path):
        quantizer = AutoHfQuantizer.from_config(GgufConfig(dequantize=True), pre_quantized=False)
        quantizer.read_header(str(place.path))
        quantizer.update_dtype(dtype)
        quantizer.preprocess_model(
            model=model, dtype=dtype, device_map=None, checkpoint_files=[str(place.path)], use_kernels=False
        )
    return quantizer
