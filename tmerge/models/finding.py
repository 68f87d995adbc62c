"""From a reference to where the model's files are, and to the adapter's that is joined to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tmerge.errors import CheckpointError, GatedModelError, ModelNotFoundError
from tmerge.models.adapter import Adapter
from tmerge.models.place import GgufPlace, Place
from tmerge.models.reference import ModelReference

__all__ = ["find_place"]


def find_place(
    reference: str | ModelReference,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    base: str | None = None,
    revisions: Mapping[str, str] | None = None,
) -> Place | GgufPlace:
    """Find a model's files; of an adapter where a model is meant, its base's, and the adapter to be joined to it.

    Args:
        reference: Hub id (``@revision``), folder, ``.gguf`` file or ``demo:NAME``; or an adapter's repo or folder.
        revision: Commit to take instead of what the reference says.
        trust_remote_code: Whether this repo's own Python code may run.
        adapter: An adapter's repo or folder, to be joined to the model.
        base: Hub id of the model that an adapter which stands for one is joined to; by itself the one that it names.
        revisions: Hub repo, as it is named -> the commit to take of it; of others what the Hub says now.

    Raises:
        TmergeError: Nothing by that name, no way to it, or no checkpoint there.
    """
    where = reference if isinstance(reference, ModelReference) else ModelReference.parse(reference)
    known = revisions or {}
    revision = revision or known.get(where.text)
    found = GgufPlace.find(where) if where.kind == "gguf" else Place.find(where, revision, trust_remote_code)
    if base is not None and not isinstance(found, Adapter):
        raise CheckpointError(f"{where.text!r} is a model and no adapter, and bases joins it to {base!r}; drop that")
    if adapter is not None:
        if isinstance(found, Adapter):
            raise _on_an_adapter(adapter, where)
        return replace(found, adapter=Adapter.find(adapter, known.get(adapter.strip())))
    if not isinstance(found, Adapter):
        return found
    of = found.base if base is None else ModelReference.parse_repo(base)
    try:
        below = GgufPlace.find(of) if of.kind == "gguf" else Place.find(of, known.get(of.text))
    except (ModelNotFoundError, GatedModelError) as error:
        raise type(error)(f"{where.text!r} is an adapter, and of its base {error}") from None
    if isinstance(below, Adapter):
        raise _on_an_adapter(where.text, of)
    return replace(below, adapter=found)


def _on_an_adapter(adapter: str, base: ModelReference) -> CheckpointError:
    return CheckpointError(
        f"{adapter!r} would be joined to {base.text!r}, which is an adapter itself; merge that one into its base "
        "(peft: merge_and_unload), save it, and name its folder as the base"
    )
