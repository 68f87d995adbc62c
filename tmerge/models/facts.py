"""What can be known of a model without its weights: for ``tmerge check``, which runs in seconds for any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tmerge.errors import ModelNotFoundError
from tmerge.models.checkpoint import StoredTensor
from tmerge.models.configs import check_config, said_dtype, stored_dtype
from tmerge.models.finding import find_place
from tmerge.models.place import GgufPlace, Place
from tmerge.models.reference import ModelReference
from tmerge.models.remote import download_bytes, remote_headers, weight_bytes
from tmerge.models.stored import SidePart, side_parts

__all__ = ["AdapterFacts", "ModelFacts", "read_facts"]


@dataclass(frozen=True)
class ModelFacts:
    """A model from its config and headers alone.

    Attributes:
        reference: What the user asked for.
        commit: Full hash of the Hub commit; None for local files, whose identity (`model_commit`) takes reading them.
        config: As ``transformers`` makes it.
        model_type: Of the decoder.
        parameters: Number of trained values, tied ones counted once.
        weight_bytes: Size of the weights as they are stored.
        dtype: In which ``dtype: auto`` would load it.
        licence: As the repo, card or file states it.
        layers: Number of decoder blocks.
        hidden_size: Width of the residual stream.
        gated: Whether access to the repo has to be asked for.
        private: Whether the repo is private.
        stored: Dtype as safetensors name it -> number of values in the repo's files; None where neither the Hub
            nor its cache has them, and for what is no repo.
        download_bytes: What loading it would still fetch from the Hub; 0 for what is here.
        side: Parts of the checkpoint beside the language model, which are left out.
        remarks: Where config and files do not agree, and what is done then; to follow the model's role.
        adapter: What is joined to it; then config, sizes and licence are its base's.
    """

    reference: ModelReference
    commit: str | None
    config: PreTrainedConfig
    model_type: str
    parameters: int
    weight_bytes: int
    dtype: torch.dtype
    licence: str | None
    layers: int
    hidden_size: int
    gated: bool = False
    private: bool = False
    stored: dict[str, int] | None = None
    download_bytes: int | None = 0
    side: tuple[SidePart, ...] = ()
    remarks: tuple[str, ...] = ()
    adapter: AdapterFacts | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter, and what it is joined to.

    Attributes:
        reference: As it was named.
        commit: Of its repo; of a folder ``sha256:`` and the digest of its files.
        licence: As its repo or card states it.
        rank: The highest of its changes.
        parameters: Names of the base's parameters that it changes.
        base_commit: What identifies its base.
    """

    reference: ModelReference
    commit: str
    licence: str | None
    rank: int
    parameters: tuple[str, ...]
    base_commit: str


def read_facts(
    reference: str | ModelReference, *, trust_remote_code: bool = False, place: Place | GgufPlace | None = None
) -> ModelFacts:
    """Read a model's facts: of a Hub repo its config and its safetensors' headers, of local files their headers.

    Args:
        reference: As `load_model`.
        trust_remote_code: Whether this repo's own Python code may run.
        place: Its files, where they have been found before.

    Raises:
        TmergeError: As `load_model`, for what can be seen without the weights: not found, gated, no causal LM,
            pickles only, truncated, quantised, not all of the model or more than it has a place for.
    """
    place = place or find_place(reference, trust_remote_code=trust_remote_code)
    facts = _gguf_facts(place) if isinstance(place, GgufPlace) else _checkpoint_facts(place)
    changes = place.changes
    if changes is None:
        return facts
    adapter = changes.adapter
    more = AdapterFacts(
        adapter.reference, adapter.commit, adapter.licence, changes.rank, tuple(changes.parameters), place.base_commit
    )
    return replace(facts, commit=place.commit, adapter=more)


def _checkpoint_facts(place: Place) -> ModelFacts:
    trust_remote_code = place.trust_remote_code
    check_config(place.reference, place.stored_config, trust_remote_code)  # said before any header is asked for
    snapshot = place.snapshot
    headers: dict[str, StoredTensor] | None
    if snapshot is None:
        headers = place.headers
        place.check_settings()
        size: int | None = sum(path.stat().st_size for path in place.weights)
    else:
        size, headers = weight_bytes(snapshot), remote_headers(snapshot)
        if headers is None:
            headers = _cached_headers(place)
    model = place.empty
    # Without the Hub and with no weights in its cache there is nothing to look into.
    side = () if headers is None else side_parts(place.reference, model, headers)
    dtype = stored_dtype(place.stored_config, headers or {})
    facts = _facts(place.reference, place.config, model, dtype, size, place.licence)
    facts = replace(facts, side=side, remarks=tuple(_remarks(place, headers)))
    if snapshot is None:
        return facts
    counts: Counter[str] = Counter()
    for tensor in (headers or {}).values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    return replace(
        facts,
        commit=snapshot.commit,
        gated=snapshot.gated,
        private=snapshot.private,
        stored=None if headers is None else dict(counts.most_common()),
        download_bytes=download_bytes(snapshot),
    )


def _remarks(place: Place, headers: dict[str, StoredTensor] | None) -> Iterator[str]:
    said, stored = said_dtype(place.stored_config), stored_dtype(place.stored_config, headers or {})
    if said not in (None, stored):
        config, files = (str(dtype).removeprefix("torch.") for dtype in (said, stored))
        yield f"files are {files} and its config says {config}: {files} is what is read, and what is written"
    # A repo's are looked into when they are fetched.
    if place.snapshot is None and place.apart is not None:
        yield "files hold {} with other values than {}, and its config says that they are one: they stay two".format(
            *place.apart
        )


def _cached_headers(place: Place) -> dict[str, StoredTensor] | None:
    """What the weights in the Hub's cache hold, or None where they are not all there."""
    try:
        return place.headers
    except ModelNotFoundError:
        return None


def _gguf_facts(place: GgufPlace) -> ModelFacts:
    model, size = place.empty, place.header.weight_bytes
    facts = _facts(place.reference, model.config, model, torch.bfloat16, size, place.licence)
    return replace(facts, remarks=place.remarks)


def _facts(
    reference: ModelReference,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    dtype: torch.dtype,
    stored: int | None,
    licence: str | None,
) -> ModelFacts:
    decoder = config.get_text_config(decoder=True)
    # Parameters() passes over a tied tensor the second time.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelFacts(
        reference=reference,
        commit=None,
        config=config,
        model_type=decoder.model_type,
        parameters=parameters,
        # Where the Hub could not be asked, what they take in memory.
        weight_bytes=stored or parameters * dtype.itemsize,
        dtype=dtype,
        licence=licence,
        layers=int(decoder.num_hidden_layers),
        hidden_size=int(decoder.hidden_size),
    )
