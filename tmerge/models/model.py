"""A model by its reference: what is known of it before its weights are read, and the weights while they are needed.

Each of these is found once and kept: where the files are and what identifies them, the config and licence, the layout
on the meta device, the tokenizer. The model is loaded when first asked for and let go with `Model.release`;
`Model.weights` reads single tensors from its files without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tmerge.errors import UnsupportedModelError
from tmerge.models.device import fits, held_dtype, pick_device, pick_dtype
from tmerge.models.facts import ModelFacts, read_facts
from tmerge.models.finding import find_place
from tmerge.models.joined import JoinedWeights
from tmerge.models.loading import LoadedModel, load_model, load_tokenizer, open_by_blocks
from tmerge.models.place import GgufPlace, Place
from tmerge.models.projections import Architecture, describe
from tmerge.models.views import Projection
from tmerge.models.weights import MappedWeights, mapped_weights

__all__ = ["Model", "pinned", "shared_vocabulary"]

# Of the smaller vocabulary: two that have this much in common are one.
_NEARLY_ALL = 0.9


class Model:
    """A handle, cheap to make.

    Args:
        reference: Hub id (``@revision``), folder, ``.gguf`` file or ``demo:NAME``.
        dtype: As `load_model`.
        device: As `pick_device`.
        memory: Whether `open` has all of it in memory (``resident``), reads it by blocks (``blocks``), or what fits.
        trust_remote_code: Whether this repo's own Python code may run.
        commit: What identifies its contents, where that is known already; nobody is asked for it then.
        adapter: A LoRA's repo or folder, joined to the model when it is read.
        base: Of an adapter that stands for a model, what it is joined to, where that is not the one it names.
        revisions: Hub repo, as it is named -> its commit, where that has been found out; what this one finds out is
            added, so that handles which share it have one commit of a repo.
    """

    def __init__(
        self,
        reference: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        memory: str = "auto",
        trust_remote_code: bool = False,
        commit: str | None = None,
        adapter: str | None = None,
        base: str | None = None,
        revisions: dict[str, str] | None = None,
    ) -> None:
        self.reference, self.dtype, self.device, self.memory = reference, dtype, device, memory
        self.trust_remote_code = trust_remote_code
        self.adapter, self.base = adapter, base
        self._commit, self._revisions = commit, {} if revisions is None else revisions
        self._loaded: LoadedModel | None = None
        self._views: Architecture | None = None
        self._was_loaded = False

    @cached_property
    def place(self) -> Place | GgufPlace:
        """Where its files are; of a Hub repo at the commit, where that is known, so that one that moves is not mixed.

        Raises:
            TmergeError: As `find_place`.
        """
        known = self._commit
        revision = None if known is None or known.startswith("sha256:") else known
        joined = self.adapter, self.base
        place = find_place(self.reference, revision, self.trust_remote_code, *joined, revisions=self._revisions)
        self._revisions.update(place.revisions)
        return place

    @cached_property
    def facts(self) -> ModelFacts:
        """What its repo, folder or file says of it; a local model's commit is the digest of its contents.

        Raises:
            TmergeError: As `read_facts`.
        """
        facts = read_facts(self.reference, trust_remote_code=self.trust_remote_code, place=self.place)
        return facts if facts.commit is not None else replace(facts, commit=self.place.commit)

    @cached_property
    def layout(self) -> Architecture:
        """Its projections, on the meta device: shapes without weights."""
        return describe(self.place.empty)

    @property
    def commit(self) -> str:
        """What identifies it: a Hub commit, or ``sha256:<hex>`` over local files."""
        if self._commit is None:
            assert self.facts.commit is not None  # `facts` sees to it
            self._commit = self.facts.commit
        return self._commit

    @property
    def pinned(self) -> str:
        """The reference at the commit that is read, of a Hub repo; what is local stays as it was written.

        Of an adapter that stands for a model it is the adapter's; of a model beside an adapter, its own.
        """
        joined = self.facts.adapter
        commit = self.commit
        if joined is not None:
            commit = joined.commit if self.adapter is None else joined.base_commit
        return pinned(self.reference, commit)

    @property
    def pinned_base(self) -> str | None:
        """Of an adapter that stands for a model, the Hub repo that it is joined to, at the commit that is read.

        None of any other model, and where that base is local.
        """
        joined = self.facts.adapter
        if joined is None or self.adapter is not None or self.place.reference.kind != "hub":
            return None
        return pinned(self.place.reference.text, joined.base_commit)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, without its weights.

        Raises:
            TmergeError: As `load_tokenizer`.
        """
        if self._loaded is not None:
            return self._loaded.tokenizer
        return load_tokenizer(self.reference, trust_remote_code=self.trust_remote_code, place=self.place)

    @property
    def vocabulary_rows(self) -> int:
        """Tokens that its config counts."""
        return int(self.facts.config.get_text_config().vocab_size)

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Its weights by the names of the model's parameters, as they are when it is loaded, read when asked for.

        Only those that ``transformers`` takes from the files as they are: none of a GGUF file's.

        Raises:
            TmergeError: Its files cannot be found, or are not those that were found before.
        """
        if isinstance(self.place, GgufPlace):
            return MappedWeights({})
        self.place.refuse_changed()
        mapped = mapped_weights(self.place.empty, self.place, self.dtype)
        return mapped if self.place.changes is None else JoinedWeights(mapped, self.place.changes)

    @property
    def is_loaded(self) -> bool:
        """Whether all its weights are in memory."""
        return self._loaded is not None and self._loaded.block_weights is None

    @property
    def is_open(self) -> bool:
        """Whether it can be read as it is: all in memory, or by blocks."""
        return self._loaded is not None

    @property
    def held_bytes(self) -> int:
        """What all its weights take in memory."""
        dtype = held_dtype(self.dtype, pick_dtype(self.dtype, self.place.dtype), pick_device(self.device))
        return self.facts.parameters * dtype.itemsize

    def open(self, free: int | None = None) -> LoadedModel:
        """The model to be read, kept until it is released: in memory, or by blocks where it does not fit or is said to.

        Args:
            free: Bytes that it may be fitted into, as several processes have agreed; None asks the device.

        Raises:
            TmergeError: As `load_model`.
            UnsupportedModelError: It is to be read by blocks, and cannot be.
        """
        if self._loaded is not None:
            return self._loaded
        if self.memory == "resident":
            return self.load()
        if self.memory == "auto" and fits(self.held_bytes, pick_device(self.device), free=free):
            return self.load()
        self._begin()
        self._loaded = open_by_blocks(
            self.reference,
            dtype=self.dtype,
            device=self.device,
            widen=True,
            tokenizer=self.__dict__.get("tokenizer"),
            place=self.place,
        )
        if self._loaded is None and self.memory == "blocks":
            raise UnsupportedModelError(
                f"{self.reference}: a {self.facts.model_type} model cannot be read block by block with this "
                "transformers; set memory: resident, on a machine that it fits in"
            )
        return self._loaded or self.load()

    def _begin(self) -> None:
        if self._was_loaded:
            self.__dict__.pop("place", None)  # local files may have changed since they were loaded before
        self._was_loaded = True

    def load(self) -> LoadedModel:
        """The model in memory, loaded once and kept until it is released.

        Raises:
            TmergeError: As `load_model`.
        """
        if not self.is_loaded:
            self.release()
            self._begin()
            self._loaded = load_model(
                self.reference,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                widen=True,
                # Where it has been read for the texts already; else it is read with the weights.
                tokenizer=self.__dict__.get("tokenizer"),
                place=self.place,
            )
        assert self._loaded is not None
        return self._loaded

    @property
    def views(self) -> Architecture:
        """The projections of the loaded model: views of its weights, rounded to the stored dtype where written.

        Of a model that is read by blocks, those of the block at hand have values.
        """
        if self._views is None:
            loaded = self._loaded or self.load()
            self._views = describe(loaded.model, rounded_to=loaded.dtype)
        return self._views

    @property
    def unfused(self) -> list[dict[str, Projection]]:
        """Of each of the views, by layer, those whose weights can be read from the files as they were loaded.

        Raises:
            TmergeError: As `weights`.
        """
        stored = self.weights
        return [
            {name: view for name, view in layer.items() if set(view.parameters) <= stored.keys()}
            for layer in self.layout.reading(stored).views
        ]

    def release(self) -> LoadedModel | None:
        """Let the weights go; what else is known of the model stays.

        Returns:
            The loaded model, for a caller that goes on to change it; None if it was not loaded.
        """
        loaded, self._loaded, self._views = self._loaded, None, None
        if loaded is not None and loaded.block_weights is not None:
            loaded.block_weights.close()
        return loaded


def pinned(reference: str, commit: str) -> str:
    """A Hub repo's reference at a commit; what is local stays as it was written."""
    return reference if commit.startswith("sha256:") else f"{reference.partition('@')[0]}@{commit}"


def shared_vocabulary(target: Model, source: Model) -> Tensor | None:
    """Tokens that are in both models' tokenizers and have a row in both models' embeddings.

    Returns:
        (2, V) int64, each token's id in the target and in the source, ascending in the target's: a vocabulary that
        was trimmed, extended or put in another order is still one. None where they are not nearly all of the
        smaller vocabulary: then the two have words in common as any two have.
    """
    target_ids, source_ids = target.tokenizer.get_vocab(), source.tokenizer.get_vocab()
    common = sorted((index, source_ids[token]) for token, index in target_ids.items() if token in source_ids)
    rows = target.vocabulary_rows, source.vocabulary_rows
    kept = [pair for pair in common if pair[0] < rows[0] and pair[1] < rows[1]]
    if not kept or len(kept) < _NEARLY_ALL * min(len(target_ids), len(source_ids)):
        return None
    return torch.tensor(kept).T.contiguous()
