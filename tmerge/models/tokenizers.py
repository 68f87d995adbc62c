"""A model's tokenizer: read, checked to be one, and kept apart from what batching does to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tmerge.documents import parse_json
from tmerge.errors import MissingExtraError, TokenizerError, UnsupportedModelError
from tmerge.models.checkpoint import tokenizer_files
from tmerge.models.gguf import read_header
from tmerge.models.reference import ModelReference, one_line

__all__ = ["check_tokenizer", "read_tokenizer", "refuse_without_rows", "restore_limits", "unusable_ids"]

# What tokenizers and transformers raise of files that are amiss; of a class of their own only where it is a plain one.
_OF_ITS_FILES = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
# Written by transformers into tokenizer_config.json about how this process read the files.
_READING_NOTES = ("is_local", "local_files_only", "name_or_path")


def read_tokenizer(
    reference: ModelReference,
    place: Path,
    pretrained: str,
    options: dict[str, Any],
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    Args:
        reference: Named in errors.
        place: Folder of its files (for a Hub repo the snapshot in the cache), or the GGUF file.
        pretrained: What ``transformers`` is to be given.
        options: ``revision`` and ``local_files_only`` of a repo, ``gguf_file`` of a GGUF file.
        trust_remote_code: Whether the repo's own code may run.

    Raises:
        TokenizerError: There is none, or its files cannot be read.
        UnsupportedModelError: It runs the repo's own code, which was not allowed.
        MissingExtraError: It needs a package that is not installed.
    """
    if reference.kind == "gguf":
        if not read_header(place).has_tokenizer:
            raise TokenizerError(f"{reference.text!r} has no tokenizer in it; use another GGUF file of the model")
    elif reference.kind == "folder":
        _check_files(reference, place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=trust_remote_code, **options)
    except ImportError as error:
        raise MissingExtraError(f"{reference.text!r}: its tokenizer needs a package: {one_line(error)}") from None
    except HfHubHTTPError:
        raise  # said by the caller's hub_errors
    except Exception as error:
        # tokenizers raises bare Exception for a damaged file, so the class is all there is to go by.
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{reference.text!r}: its tokenizer runs Python code from its own repo; read that code, and if you "
                f"trust it, set trust_remote_code: [{reference.text}] in the recipe"
            ) from None
        if type(error) is not Exception and not isinstance(error, _OF_ITS_FILES):
            raise
        if reference.kind == "hub":
            _check_files(reference, place)
        raise TokenizerError(f"{reference.text!r}: its tokenizer cannot be read: {one_line(error)}") from error
    if reference.kind == "hub":
        _check_files(reference, place)
    for note in _READING_NOTES:
        tokenizer.init_kwargs.pop(note, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer._stored_limits = (backend.truncation, backend.padding) if backend is not None else (None, None)
    return tokenizer


def _check_files(reference: ModelReference, folder: Path) -> None:
    if tokenizer_files(folder):
        return
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in parse_json(settings.read_text(encoding="utf-8")):
        return  # the repo's own code knows its own files
    raise TokenizerError(
        f"{reference.text!r} has no tokenizer files (tokenizer.json or the like); copy those of the model that it was "
        "made from"
    )


def unusable_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[set[int], set[int]]:
    """Ids for which an embedding of so many rows has none: of the vocabulary, and of tokens added to it."""
    added = set(tokenizer.added_tokens_decoder)
    beyond = {index for index in tokenizer.get_vocab().values() if index >= rows}
    return beyond - added, beyond & added


def check_tokenizer(reference: ModelReference, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that the tokenizer serves the model.

    Tokens added beyond the embedding are let pass: Gemma 3's text models carry an image token that they have no row
    for, and no text yields it. A vocabulary beyond the embedding means that the tokenizer is another model's.

    Raises:
        TokenizerError: It yields nothing, or its vocabulary is larger than the embedding.
    """
    beyond, _ = unusable_ids(tokenizer, rows)
    if beyond:
        raise TokenizerError(
            f"{reference.text!r}: its tokenizer has ids up to {max(beyond)}, its embedding {rows} rows; the tokenizer "
            "is another model's: replace its files"
        )
    if not tokenizer("tmerge", add_special_tokens=False)["input_ids"]:
        raise TokenizerError(f"{reference.text!r}: its tokenizer turns a word into nothing; replace its files")
    around = [*tokenizer("tmerge")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id]
    if (last := max(index for index in around if index is not None)) >= rows:
        raise TokenizerError(
            f"{reference.text!r}: its tokenizer puts token {last:,} ({tokenizer.convert_ids_to_tokens(last)!r}) around "
            f"texts, and its embedding has {rows:,} rows; use the model's own tokenizer files"
        )


def refuse_without_rows(name: str, tokenizer: PreTrainedTokenizerBase, rows: int, texts: Sequence[str]) -> None:
    """Refuse texts that give a token for which the embedding has no row.

    Args:
        name: Of the model, for errors.
        tokenizer: The model's, whose vocabulary is not larger than the embedding (`check_tokenizer`).
        rows: Of the embedding.
        texts: To be read.

    Raises:
        TokenizerError: One of them holds such a token.
    """
    added = tokenizer.added_tokens_decoder.items()
    without = {token.content: index for index, token in added if index >= rows}
    for number, text in enumerate(texts if without else (), 1):
        for token, index in without.items():
            if token not in text:
                continue
            by_template = token in str(tokenizer.chat_template or "")
            remedy = "name a column of plain text" if by_template else "take it out of the texts"
            raise TokenizerError(
                f"{name!r}: text {number} ({text[:40]!r}…) holds {token!r}, token {index:,} of its tokenizer, and its "
                f"embedding has {rows:,} rows: it was never trained on that token"
                f"{', which its chat template writes' if by_template else ''}; {remedy}, or use a model that was"
            )


def restore_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Undo what batching leaves in a tokenizer and what would be saved with it: truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    truncation, padding = getattr(tokenizer, "_stored_limits", (None, None))
    backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
    backend.no_padding() if padding is None else backend.enable_padding(**padding)
