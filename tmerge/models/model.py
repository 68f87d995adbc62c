"""A model by its reference: what is known of it before its weights are read, and the weights while they are needed.

Each of these is found once and kept: the config and licence, the layout on the meta device, what identifies the files,
the tokenizer. The weights are loaded when first asked for and let go with `Model.release`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from tmerge.models.configs import meta_model
from tmerge.models.facts import ModelFacts, read_facts
from tmerge.models.loading import LoadedModel, load_model, load_tokenizer, model_commit
from tmerge.models.projections import Architecture, describe

__all__ = ["Model"]


class Model:
    """A handle, cheap to make.

    Args:
        reference: Hub id (``@revision``), folder, ``.gguf`` file or ``demo:NAME``.
        dtype: As `load_model`.
        device: As `pick_device`.
        trust_remote_code: Whether this repo's own Python code may run.
        commit: What identifies its contents, where that is known already; nobody is asked for it then.
    """

    def __init__(
        self,
        reference: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        commit: str | None = None,
    ) -> None:
        self.reference, self.dtype, self.device = reference, dtype, device
        self.trust_remote_code = trust_remote_code
        self._commit = commit
        self._loaded: LoadedModel | None = None
        self._views: Architecture | None = None

    @cached_property
    def facts(self) -> ModelFacts:
        """What its repo, folder or file says of it; a local model's commit is the digest of its contents.

        Raises:
            TmergeError: As `read_facts`.
        """
        facts = read_facts(self.reference, trust_remote_code=self.trust_remote_code)
        return facts if facts.commit is not None else replace(facts, commit=model_commit(self.reference))

    @cached_property
    def layout(self) -> Architecture:
        """Its projections, on the meta device: shapes without weights."""
        return describe(meta_model(self.facts.config, self.trust_remote_code))

    @property
    def commit(self) -> str:
        """What identifies it: a Hub commit, or ``sha256:<hex>`` over local files."""
        if self._commit is None:
            assert self.facts.commit is not None  # `facts` sees to it
            self._commit = self.facts.commit
        return self._commit

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, without its weights.

        Raises:
            TmergeError: As `load_tokenizer`.
        """
        if self._loaded is not None:
            return self._loaded.tokenizer
        return load_tokenizer(
            self.reference, trust_remote_code=self.trust_remote_code, revision_override=self._revision
        )

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in memory."""
        return self._loaded is not None

    def load(self) -> LoadedModel:
        """The model in memory, loaded once and kept until it is released.

        Raises:
            TmergeError: As `load_model`.
        """
        if self._loaded is None:
            self._loaded = load_model(
                self.reference,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                revision_override=self._revision,
                widen=True,
                # Where it has been read for the texts already; else it is read with the weights.
                tokenizer=self.__dict__.get("tokenizer"),
            )
        return self._loaded

    @property
    def views(self) -> Architecture:
        """The projections of the loaded model: views of its weights, rounded to the stored dtype where written."""
        if self._views is None:
            loaded = self.load()
            self._views = describe(loaded.model, rounded_to=loaded.dtype)
        return self._views

    def release(self) -> LoadedModel | None:
        """Let the weights go; what else is known of the model stays.

        Returns:
            The loaded model, for a caller that goes on to change it; None if it was not loaded.
        """
        loaded, self._loaded, self._views = self._loaded, None, None
        return loaded

    @property
    def _revision(self) -> str | None:
        """The Hub commit to load, so that a repo that moves meanwhile is not mixed up; None for local models."""
        commit = self.commit
        return None if commit.startswith("sha256:") else commit
