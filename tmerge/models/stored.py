"""What a checkpoint stores, held against what its model has a place for, by names, dtypes and shapes alone.

``transformers`` leaves out what it has no place for, and starts at random what it finds nothing for. Some of that is
harmless (a mask that older releases stored), some is a part beside the language model (a value head), and some changes
what the model computes (the scales of 8-bit weights, a layer that the config does not count). They are told apart here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tmerge.errors import CheckpointError
from tmerge.models.checkpoint import StoredTensor
from tmerge.models.reference import ModelReference

__all__ = [
    "CLASSIFIER",
    "COMPUTED",
    "PREDICTION_LAYERS",
    "SIDE_PARTS",
    "Places",
    "SidePart",
    "Sorting",
    "find_places",
    "is_prediction",
    "side_parts",
    "sort_stored",
    "without_a_place",
]

_PLAIN = {"F64", "F32", "BF16", "F16"}

# Names of which older releases of transformers stored what they now compute.
COMPUTED = {"inv_freq", "original_inv_freq", "masked_bias", "position_ids", "cos_cached", "sin_cached", "version"}
_COMPUTED_ENDS = ("embed_positions._float_tensor", "embed_positions.weights")
_MASK = re.compile(r"(^|\.)(self_|cross)?(attn|attention)\.bias$")

# As the quantisers name what belongs to a packed weight.
_SCALE = re.compile(
    r"(scale(_inv)?s?|zero_points?|qzeros|qweight|g_idx|SCB|CB|absmax|(nested_)?quant_(map|state)\w*|weight_packed|"
    r"weight_shape|weight_format|\w*_(scales?|scale_inv|zero_point|absmax|blocks))$"
)

# Parts beside the language model, by a component of the tensors' names.
_PREDICTION = re.compile(r"(^|_)(mtp|nextn)(_|$)|^(eh_proj|enorm|hnorm|shared_head|medusa\w*|eagle\w*|multi_token\w*)$")
SIDE_PARTS = (
    ("a value head", re.compile(r"^(v_head|value_(head|model|net)|critic(_\w+)?)$")),
    (
        "a reward or classifier head",
        re.compile(
            r"^(score|cls|classifier|classification_head|qa_outputs|(re)?rank\w*_head|(rm|reward|regression)_\w+)$"
        ),
    ),
    (
        "an encoder of images or sound",
        re.compile(r"^(visual|(vision|audio|image)_\w+|embed_(vision|audio)|mm_projector|multi_modal_projector)$"),
    ),
)
PREDICTION_LAYERS = "layers that predict further tokens (MTP)"
CLASSIFIER = SIDE_PARTS[1][0]


@dataclass(frozen=True)
class SidePart:
    """Stored tensors that are none of the language model's, and are left out.

    Attributes:
        kind: In words, with its article.
        names: Of the tensors, sorted.
    """

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} ({_first(self.names)})"


@dataclass(frozen=True)
class Places:
    """How stored names and a model's names go together, as ``transformers`` has it.

    Attributes:
        model: Name of the model's class.
        layers: Blocks that the config counts.
        own: Names of the model's own tensors.
        integers: Those of `own` that are no floats.
        missing: Names of the model's that nothing is stored for.
        unplaced: Stored names that the model has no place for; ``transformers`` may give one as it renamed it.
        expected: Those of `unplaced` that ``transformers`` passes over for this class of model.
        mismatched: Name of the model's -> stored shape and the model's.
        inconsistent: Whether stored tensors that make up one of the model's do not go together.
    """

    model: str
    layers: int
    own: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    unplaced: frozenset[str] = frozenset()
    expected: frozenset[str] = frozenset()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    inconsistent: bool = False


@dataclass(frozen=True)
class Sorting:
    """What is to be said of a checkpoint's tensors.

    Attributes:
        refusals: Why the checkpoint cannot be taken, worst first, each to follow the model's name; empty if it can.
        side: Parts that are left out.
    """

    refusals: tuple[str, ...]
    side: tuple[SidePart, ...]


def side_parts(
    reference: ModelReference,
    model: PreTrainedModel,
    stored: Mapping[str, StoredTensor],
    report: Mapping[str, Any] | None = None,
) -> tuple[SidePart, ...]:
    """What of a checkpoint is left out.

    Args:
        reference: Named in errors.
        model: On the meta device (`meta_model`); or, with `report`, the one that was loaded.
        stored: Name -> entry of every stored tensor.
        report: What ``from_pretrained`` said of loading it; None to find it out from the headers.

    Raises:
        CheckpointError: What is stored is not all of this model, or something that it cannot do without.
    """
    places = find_places(model, stored) if report is None else _read_report(model, stored, report)
    sorting = sort_stored(stored, places)
    if sorting.refusals:
        raise CheckpointError(f"{reference.text!r} {sorting.refusals[0]}")
    return sorting.side


def without_a_place(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], report: Mapping[str, Any]
) -> frozenset[str]:
    """Names of the stored tensors that a loaded model left out, as far as they can be told.

    Args:
        model: As it was loaded.
        stored: Name -> entry of every stored tensor.
        report: What ``from_pretrained`` said of loading it.
    """
    places = _read_report(model, stored, report)
    # What transformers renamed before it left it out is in the report under the other name.
    known = {
        name
        for name, entry in stored.items()
        if (is_prediction(name) or _side_kind(name) or _was_computed(name, entry)) and not _among(name, places.own)
    }
    return places.unplaced | known


def find_places(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Places:
    """Ask ``transformers`` which stored tensor it would put where, renaming and stacking as it does; no weight is read.

    Args:
        model: On the meta device; it is left as it is.
        stored: Name -> entry of every stored tensor.
    """
    empty = {name: torch.empty(entry.shape, device="meta") for name, entry in stored.items()}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # What it logs of missing tensors is said below, in our words.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        # Typed as if it gave the model alone, whatever it is asked for.
        model_and_report: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        return replace(_read_report(model, stored, {}), inconsistent=True)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return _read_report(model, stored, model_and_report[1])


def _read_report(model: PreTrainedModel, stored: Mapping[str, StoredTensor], report: Mapping[str, Any]) -> Places:
    own = model.state_dict()
    unexpected = frozenset(report.get("unexpected_keys", ()))
    passed_over = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    prefix = f"{model.base_model_prefix}."
    # The patterns are searched for, so they are found in names with a place too: gpt2's "attn.bias" in c_attn.bias.
    placed = own.keys() | {name.removeprefix(prefix) for name in own} | {prefix + name for name in own}
    expected = _matching(passed_over, stored) - placed - unexpected
    return Places(
        model=type(model).__name__,
        layers=int(model.config.get_text_config(decoder=True).num_hidden_layers),
        own=frozenset(own),
        integers=frozenset(name for name, tensor in own.items() if not tensor.is_floating_point()),
        missing=frozenset(report.get("missing_keys", ())),
        unplaced=unexpected | expected,
        expected=expected,
        mismatched=tuple(
            sorted(
                (name, tuple(stored_shape), tuple(config_shape))
                for name, stored_shape, config_shape in report.get("mismatched_keys", ())
            )
        ),
    )


def _matching(patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    # Searched for, not matched: as transformers reads them.
    return frozenset(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def sort_stored(stored: Mapping[str, StoredTensor], places: Places) -> Sorting:
    """Tell what is harmless, what is a part beside the model and what changes the model.

    Args:
        stored: Name -> entry of every stored tensor.
        places: Where they belong.
    """
    harmless, beyond, unknown = set(), set(), set()
    side: dict[str, list[str]] = {}
    # Of the model's own names alone: an encoder beside it has a list of blocks too, and counts them by itself.
    blocks = _block_lists(places.own)
    predicting = {_block(name) for name in places.unplaced if is_prediction(name)}
    for name in sorted(places.unplaced):
        stem, number = _block(name)
        outside = number is not None and number >= places.layers and _decoder(stem) in blocks
        if is_prediction(name) or (outside and (stem, number) in predicting):
            side.setdefault(PREDICTION_LAYERS, []).append(name)
        elif kind := _side_kind(name):
            side.setdefault(kind, []).append(name)
        elif outside:
            beyond.add(name)
        elif name in places.expected or _was_computed(name, stored.get(name)):
            harmless.add(name)
        else:
            unknown.add(name)
    # What a class passes over is told by its stored name, and renaming may have given that a place: only what is known
    # to be computed is sure to be left out.
    computed = {name for name in harmless if _was_computed(name, stored.get(name))}
    left_out = computed.union(*side.values())
    refusals = [
        *_packed({name: entry for name, entry in stored.items() if name not in left_out}, places.integers),
        *_scales(unknown),
        *_further_layers(beyond, places.layers),
        *_gaps(places),
        *_strangers(unknown, places.model),
    ]
    return Sorting(tuple(refusals), tuple(SidePart(kind, tuple(names)) for kind, names in side.items()))


def _packed(stored: Mapping[str, StoredTensor], integers: frozenset[str]) -> Iterable[str]:
    odd = {name for name, entry in stored.items() if entry.dtype not in _PLAIN}
    # Under another name than in the file, a side part is not known as left out.
    odd = {name for name in odd if not (is_prediction(name) or _side_kind(name) or _among(name, integers))}
    if packed := sorted(odd):
        dtypes = ", ".join(sorted({stored[name].dtype for name in packed}))
        yield (
            f"stores quantised weights as {dtypes} ({_first(packed)}) without a quantization_config, so they would be "
            "read as plain numbers; use the repo of the unquantised model, or a GGUF file"
        )


def _scales(unknown: Iterable[str]) -> Iterable[str]:
    if scales := sorted(name for name in unknown if _SCALE.search(name.rpartition(".")[2])):
        yield (
            f"stores scales of quantised weights ({_first(scales)}) without a quantization_config, so they would be "
            "left out; use the repo of the unquantised model, or a GGUF file"
        )


def _further_layers(beyond: set[str], layers: int) -> Iterable[str]:
    if beyond:
        count = 1 + max(number for name in beyond if (number := _block(name)[1]) is not None)
        yield (
            f"stores {count} layers ({_first(sorted(beyond))}), but its config.json counts {layers} "
            f"(num_hidden_layers); set it to {count}, or download the model again"
        )


def _gaps(places: Places) -> Iterable[str]:
    if missing := sorted(places.missing):
        # transformers would leave them random and say so in its log only.
        yield (
            f"lacks {len(missing)} of the weights of {places.model} ({missing[0]}); it is not a whole causal LM: use "
            "the full model"
        )
    if places.mismatched:
        name, stored_shape, config_shape = places.mismatched[0]
        yield (
            f"has weights of other shapes than its config.json says ({name}: {stored_shape} stored, {config_shape} by "
            "the config); download the model again"
        )
    if places.inconsistent:
        yield f"lacks weights that {places.model} puts together from several; use the full model"


def _strangers(unknown: set[str], model: str) -> Iterable[str]:
    names = sorted(name for name in unknown if not _SCALE.search(name.rpartition(".")[2]))
    if not names:
        return
    if any(".lora_" in name or "base_layer" in name for name in names):
        remedy = "merge the adapter into the model (peft: merge_and_unload) and save that"
    else:
        remedy = "use a checkpoint that its config.json describes in full, or take them out of the files"
    yield (
        f"stores tensors that {model} has no place for ({_first(names)}), and without them it may be another model; "
        f"{remedy}"
    )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - 1
    return names[0] if not more else f"{names[0]} and {more} more"


def _block(name: str) -> tuple[str, int | None]:
    """Stem and number of the list entry that a tensor lies in: ``model.layers.``, 3."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return (name, None) if match is None else (name[: match.start(1)], int(match.group(1)))


def _block_lists(names: Iterable[str]) -> set[str]:
    """Stems of the lists of blocks among a model's own names, with the base model's prefix and without it."""
    stems = {_decoder(stem) for stem, number in map(_block, names) if number == 0}
    return stems | {stem.partition(".")[2] for stem in stems if stem.count(".") > 1}


def _decoder(stem: str) -> str:
    # A checkpoint of a model with encoders names its decoder one module further down.
    return stem.replace("language_model.", "")


def is_prediction(name: str) -> bool:
    """Whether a tensor is one of the layers that predict further tokens."""
    return any(_PREDICTION.search(part) for part in name.split("."))


def _side_kind(name: str) -> str | None:
    """What a tensor outside the blocks is part of, by the modules it lies in: the model's own, or one beneath it."""
    for part in name.split(".")[:2]:
        for kind, pattern in SIDE_PARTS:
            if pattern.match(part):
                return kind
    return None


def _was_computed(name: str, entry: StoredTensor | None) -> bool:
    if name.rpartition(".")[2] in COMPUTED or name.endswith(_COMPUTED_ENDS):
        return True
    # A causal mask, (..., n, n); a bias that is added has one axis.
    shape = () if entry is None else entry.shape
    return bool(_MASK.search(name)) and len(shape) >= 2 and shape[-1] == shape[-2]


def _among(name: str, own: frozenset[str]) -> bool:
    """Whether a stored name is one of the model's own, with or without its base model's prefix."""
    return name in own or any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in own)
