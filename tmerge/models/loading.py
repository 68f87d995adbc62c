"""From a reference to a model in memory with its tokenizer: a Hub repo, a folder, a GGUF file or a demo model.

Whatever it came from, the result is a plain ``transformers`` causal LM that can be saved as one. Weights are read
from safetensors or GGUF, never from pickles, and a repo's own code runs only where the user named that repo.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tmerge.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from tmerge.models.adapter_changes import AdapterChanges
from tmerge.models.announced import announce_what_is_there
from tmerge.models.block_weights import BlockWeights
from tmerge.models.configs import tidy_gguf_config
from tmerge.models.device import check_memory, held_dtype, memory_errors, pick_device, pick_dtype
from tmerge.models.finding import find_place
from tmerge.models.finite import check_finite, gguf_tensors, safetensors_tensors
from tmerge.models.gguf import GgufHeader, read_header
from tmerge.models.gguf_reading import fast_reading
from tmerge.models.joined import join_model, join_parts
from tmerge.models.place import GgufPlace, Place
from tmerge.models.quiet import quiet
from tmerge.models.reference import ModelReference, one_line
from tmerge.models.remote import hub_errors
from tmerge.models.stored import side_parts, without_a_place
from tmerge.models.stored_parts import empty_model, gguf_parts, safetensors_parts
from tmerge.models.tokenizers import check_tokenizer, read_tokenizer

__all__ = [
    "LoadedModel",
    "load_model",
    "load_tokenizer",
    "model_commit",
    "open_by_blocks",
    "read_weights",
    "runs_own_code",
]


@dataclass
class LoadedModel:
    """A causal LM in memory, in eval mode, with what identifies it.

    Attributes:
        reference: What the user asked for.
        commit: The Hub commit (40 hex digits) that was loaded; for a folder or file ``sha256:<hex>`` of its contents.
        model: Ready to run and to save; tied embeddings are tied.
        tokenizer: As it will be saved. It may lack a pad token: batch with `pad_id`, and leave the tokenizer alone.
        licence: As the repo, card or file states it.
        device: Where the model is.
        dtype: In which its weights are stored, and saved again. In memory they are float32 where `load_model` widened
            them: the same values, as long as what is written to them is rounded to this dtype (`describe` sees to it).
        block_weights: What brings each block's weights when its turn comes, of a model that is read by blocks
            (`open_by_blocks`; run it with `tmerge.models.blocks`). None of one that is all in memory.
        place: The files that it came from.
    """

    reference: ModelReference
    commit: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    licence: str | None
    device: torch.device
    dtype: torch.dtype
    block_weights: BlockWeights | None = None
    place: Place | GgufPlace | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model without its head: what calibration runs, as it needs no logits."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def computed_dtype(self) -> torch.dtype:
        """In which its weights are held while it computes."""
        if self.block_weights is not None:
            return self.block_weights.dtype or self.dtype
        return self.model.dtype

    @property
    def pad_id(self) -> int:
        """A token id to fill batches with, at positions that the attention mask leaves out.

        The tokenizer's own pad token, else its end of text, else 0. Which one it is changes no number, as padded
        positions are masked and never pooled; pad on the right, so that real tokens keep their positions.
        """
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.embedding_rows:
                return int(token)
        return 0

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding; every token id of a text is below it."""
        return int(cast(torch.Tensor, self.model.get_input_embeddings().weight).shape[0])


def load_model(
    reference: str | ModelReference,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    widen: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    place: Place | GgufPlace | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        reference: Hub id (``@revision``), folder, ``.gguf`` file or ``demo:NAME``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the one the checkpoint is stored in (float32 when
            it does not say); for a GGUF file, whose weights have none of their own, bfloat16.
        device: As `pick_device`.
        trust_remote_code: Whether this repo's own Python code may run.
        widen: With `dtype` ``auto``, hold the weights in float32 where the device multiplies their dtype slowly. The
            values are the same, and `LoadedModel.dtype` stays the stored one.
        tokenizer: The model's, where it has been read before; it is read otherwise.
        place: Its files, where they have been found before; they are looked for otherwise.

    Raises:
        ModelNotFoundError: Nothing by that name, or no way to it.
        GatedModelError: No access to the repo.
        UnsupportedModelError: Not a causal LM that this ``transformers`` knows, or stored quantised.
        CheckpointError: Weights missing, truncated, not finite, quantised, without a place in the model, or pickles
            only.
        TokenizerError: No tokenizer, or one with more tokens than the embedding has rows.
        DeviceError: No such device or dtype here, or weights beyond the dtype's range.
        NotEnoughMemoryError: It does not fit.
        NotEnoughDiskError: The download does not fit.
        MissingExtraError: A package that this model needs is not installed.
    """
    there = pick_device(device)
    place = place or find_place(reference, trust_remote_code=trust_remote_code)
    if isinstance(place, GgufPlace):
        return _widened(_load_gguf(place, dtype, there, tokenizer), dtype if widen else None)
    where, config, headers = place.reference, copy.deepcopy(place.settled_config), place.headers
    side_parts(where, place.empty, headers)
    place.check_settings()
    number_format = pick_dtype(dtype, place.dtype)
    values = sum(tensor.nbytes // _width(tensor.dtype) for tensor in headers.values())
    check_memory(where.text, values * number_format.itemsize, there)
    if tokenizer is None:
        with hub_errors(where):
            tokenizer = read_tokenizer(where, place.folder, place.pretrained, place.options, trust_remote_code)
    options = place.options | ({} if there.type == "cpu" else {"device_map": {"": there}})
    with _loading(where, there), hub_errors(where):
        model, report = read_weights(
            place.pretrained,
            config=config,
            dtype=number_format,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    # Asked again of what was really done: the headers alone may have told of it in another way.
    announce_what_is_there(model, side_parts(where, model, headers, report))
    left_out = partial(without_a_place, model, headers, report)
    check_finite(where, model.named_parameters(), lambda: safetensors_tensors(place.weights, left_out()))
    if place.adapter is not None:
        join_model(model, AdapterChanges(place.adapter, model, repr(where.text)))
    loaded = _finish(place, model, tokenizer, there)
    return _widened(loaded, dtype if widen else None)


def open_by_blocks(
    reference: str | ModelReference,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    widen: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    place: Place | GgufPlace | None = None,
) -> LoadedModel | None:
    """A model and its tokenizer, the weights of which are read block by block while it is run.

    Args:
        reference: As `load_model`, and so are all others.
        dtype: Likewise.
        device: Likewise.
        widen: Likewise.
        tokenizer: Likewise.
        place: Likewise.

    Returns:
        None where it can only be read whole: it runs code of its own, or this ``transformers`` reads no parts.

    Raises:
        TmergeError: As `load_model`; of weights that are damaged, when their block is read.
    """
    there = pick_device(device)
    place = place or find_place(reference)
    where = place.reference
    if isinstance(place, Place) and place.trust_remote_code:
        return None
    # Which say what is wrong with a config, or with a file that would be another model.
    assert place.empty is not None and (isinstance(place, Place) or place.remarks is not None)
    number_format = pick_dtype(dtype, place.dtype)
    config = place.config if isinstance(place, GgufPlace) else place.settled_config
    model = empty_model(config, number_format)
    if model is None:
        return None
    stored: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    if isinstance(place, GgufPlace):
        parts, stored = gguf_parts(model, place, number_format), partial(gguf_tensors, place.path)
        _forget_packing(model)
    else:
        announce_what_is_there(model, side_parts(where, place.empty, place.headers))
        parts = safetensors_parts(model, place, number_format)
        without = place.headers.keys() - (set() if parts is None else parts.parameters.keys())
        stored = partial(safetensors_tensors, place.weights, without)
    if parts is None:
        return None
    if place.adapter is not None:
        parts = join_parts(parts, AdapterChanges(place.adapter, model, repr(where.text)))
    tokenizer = tokenizer or load_tokenizer(where, place=place)
    held = held_dtype(dtype, number_format, there) if widen else number_format
    with _loading(where, there):
        weights = BlockWeights(
            where,
            model,
            parts,
            device=there,
            dtype=None if held == number_format else held,
            reading=partial(_loading, where, there),
            check=lambda parameters: check_finite(where, parameters, stored),
        )
    loaded = _finish(place, model, tokenizer, there)
    loaded.dtype, loaded.block_weights = number_format, weights
    return loaded


def load_tokenizer(
    reference: str | ModelReference, *, trust_remote_code: bool = False, place: Place | GgufPlace | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone.

    Args:
        reference: As `load_model`.
        trust_remote_code: Whether this repo's own Python code may run.
        place: Its files, where they have been found before.

    Raises:
        TmergeError: As `load_model`, for what concerns the tokenizer.
    """
    place = place or find_place(reference, trust_remote_code=trust_remote_code)
    if isinstance(place, GgufPlace):
        read_header(place.path)
        with fast_reading(place.path) as folder:
            return read_tokenizer(place.reference, place.path, folder, {"gguf_file": place.path.name})
    place.check_settings()
    with hub_errors(place.reference):
        return read_tokenizer(place.reference, place.folder, place.pretrained, place.options, trust_remote_code)


def model_commit(reference: str | ModelReference, adapter: str | None = None, base: str | None = None) -> str:
    """What `LoadedModel.commit` would be, without loading: one request for a Hub repo, a hash of local files.

    Args:
        reference: As `load_model`.
        adapter: That is joined to it.
        base: As `find_place`.

    Raises:
        TmergeError: As `load_model`, for what concerns finding the files.
    """
    return find_place(reference, adapter=adapter, base=base).commit


def _load_gguf(
    place: GgufPlace,
    dtype: str | torch.dtype,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None,
) -> LoadedModel:
    reference, path, header = place.reference, place.path, place.header
    assert place.remarks is not None  # which refuses what would be another model
    config = copy.deepcopy(place.config)
    number_format = pick_dtype(dtype, place.dtype)
    check_memory(reference.text, _unpacking_bytes(header, number_format), torch.device("cpu"))
    if device.type != "cpu":
        check_memory(reference.text, sum(tensor.values for tensor in header.tensors) * number_format.itemsize, device)
    # Without it, current releases of transformers keep the weights packed; earlier ones know only to unpack them.
    packing = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    with fast_reading(path) as folder:
        if tokenizer is None:
            tokenizer = read_tokenizer(reference, path, folder, {"gguf_file": path.name})
        with _loading(reference, device):
            model, report = read_weights(folder, gguf_file=path.name, config=config, dtype=number_format, **options)
            model.to(device)  # type: ignore[arg-type]
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{reference.text!r} lacks {len(missing)} of the weights of {type(model).__name__} ({missing[0]}); "
            "use another GGUF file of the model, or its safetensors"
        )
    check_finite(reference, model.named_parameters(), lambda: gguf_tensors(path))
    if place.adapter is not None:
        join_model(model, AdapterChanges(place.adapter, model, repr(reference.text)))
    _forget_packing(model)
    return _finish(place, model, tokenizer, device)


def _forget_packing(model: PreTrainedModel) -> None:
    """The weights are plain now. What remains of the packing would make ``transformers`` refuse to save them."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tidy_gguf_config(model.config)


def _unpacking_bytes(header: GgufHeader, dtype: torch.dtype) -> int:
    """Most bytes that unpacking holds at once, on the host.

    All values, and once more the largest tensor, in float32; and the model in a shorter dtype beside them.
    """
    values = [tensor.values for tensor in header.tensors]
    shorter = 0 if dtype == torch.float32 else dtype.itemsize * sum(values)
    return 4 * (sum(values) + max(values, default=0)) + shorter


def _widened(loaded: LoadedModel, asked: str | torch.dtype | None) -> LoadedModel:
    if asked is not None and held_dtype(asked, loaded.dtype, loaded.device) != loaded.dtype:
        with memory_errors(loaded.reference.text, loaded.device):
            loaded.model.float()
    return loaded


def _finish(
    place: Place | GgufPlace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> LoadedModel:
    reference = place.reference
    model.eval().requires_grad_(False)
    model.config.architectures = [type(model).__name__]
    # By default the folder that the files were read from: a path of this machine.
    model.config._name_or_path = model.name_or_path = reference.repo or reference.name
    # A class of transformers' own was used, so what is saved should not point to code in another repo.
    if not runs_own_code(model) and hasattr(model.config, "auto_map"):
        del model.config.auto_map
    if not runs_own_code(tokenizer):
        tokenizer.init_kwargs.pop("auto_map", None)
    loaded = LoadedModel(reference, place.commit, model, tokenizer, place.licence, device, model.dtype, place=place)
    check_tokenizer(reference, tokenizer, loaded.embedding_rows)
    return loaded


def read_weights(pretrained: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``AutoModelForCausalLM.from_pretrained``, and its report: ``missing_keys``, ``unexpected_keys`` and others."""
    # Typed as if it gave the model alone, whatever it is asked for.
    found: Any = AutoModelForCausalLM.from_pretrained(pretrained, output_loading_info=True, **options)
    return found


def runs_own_code(thing: PreTrainedModel | PreTrainedTokenizerBase) -> bool:
    """Whether the object's class came out of a model repo, not out of ``transformers``."""
    return type(thing).__module__.partition(".")[0] == "transformers_modules"


@contextlib.contextmanager
def _loading(reference: ModelReference, device: torch.device) -> Iterator[None]:
    """Say what goes wrong inside ``from_pretrained`` in our words."""
    try:
        with quiet(), memory_errors(reference.text, device):
            yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{reference.text!r}: its safetensors cannot be read ({error}); download it again"
        ) from None
    except ImportError as error:
        raise MissingExtraError(
            f"{reference.text!r} needs a package that is not installed: {one_line(error)}"
        ) from None
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{reference.text!r} cannot be unpacked: {one_line(error)}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            f"{reference.text!r}: its weights have other shapes than its config.json says; download the model again"
        ) from None


def _width(stored: str) -> int:
    """Bytes per value of a safetensors dtype such as BF16 or F8_E4M3."""
    digits = "".join(letter for letter in stored.partition("_")[0] if letter.isdigit())
    return max(1, int(digits or 8) // 8)
