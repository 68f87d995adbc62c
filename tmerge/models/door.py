"""What a checkpoint's JSON files may say, asked before ``transformers`` sees them.

Its own checks come late and some not at all: a config of ten million layers is built until it is stopped, a padding
token beyond the vocabulary fails an assertion. Whatever is said here names the file, the key, the value and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from transformers import GenerationConfig

from tmerge.documents import parse_json
from tmerge.errors import CheckpointError, TmergeError, TokenizerError, UnsupportedModelError
from tmerge.models.checkpoint import SETTINGS_FILES
from tmerge.models.reference import ModelReference, one_line
from tmerge.validation import value_due

__all__ = ["LARGEST_SIZE", "MOST_LAYERS", "check_generation", "check_settings", "check_stored_config"]

# No published model has a tenth of either; a vocabulary beyond the second would not fit in any memory.
MOST_LAYERS, LARGEST_SIZE = 1000, 1 << 24


def _counted(most: int, least: int = 1) -> Callable[[Any], Any]:
    """A count, or one for each layer; what else it is, transformers says."""

    def check(value: Any) -> Any:
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and not isinstance(count, bool) and not least <= count <= most:
                shown = _shown(count, most) | {"least": least}
                raise PydanticCustomError("count", "{count}, and it is a count from {least} to {most}", shown)
        return value

    return check


def _shown(count: int, most: int) -> dict[str, Any]:
    return {"count": f"{count:,}" if abs(count) < 10**15 else "a number of over 15 digits", "most": f"{most:,}"}


_Layers = Annotated[Any, AfterValidator(_counted(MOST_LAYERS))]
# A text is scored in windows of so many tokens, which overlap.
_Length = Annotated[Any, AfterValidator(_counted(1 << 32, 8))]
_Size = Annotated[Any, AfterValidator(_counted(LARGEST_SIZE))]


class _Config(BaseModel):
    """A ``config.json``, as far as something goes wrong with it; all else is transformers' own to say."""

    model_config = ConfigDict(extra="allow", strict=True)

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    num_hidden_layers: _Layers = None
    num_layers: _Layers = None
    n_layer: _Layers = None
    n_layers: _Layers = None
    hidden_size: _Size = None
    n_embd: _Size = None
    d_model: _Size = None
    intermediate_size: _Size = None
    ffn_dim: _Size = None
    n_inner: _Size = None
    num_attention_heads: _Size = None
    num_key_value_heads: _Size = None
    n_head: _Size = None
    n_heads: _Size = None
    head_dim: _Size = None
    vocab_size: _Size = None
    max_position_embeddings: _Length = None
    n_positions: _Length = None
    text_config: dict[str, Any] | None = None


def check_stored_config(reference: ModelReference, config: Mapping[str, Any]) -> None:
    """Refuse a raw ``config.json`` whose values no model can have.

    Raises:
        UnsupportedModelError: One line, with key and value.
    """
    inner = config.get("text_config")
    try:
        _Config.model_validate(dict(config))
        if isinstance(inner, dict):
            _Config.model_validate(inner)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "count":
            said = f"{key} {first['msg']}"
        else:
            said = f"{key} {_value(first['input'])}, and {_expected(first)}"
        raise UnsupportedModelError(
            f"{reference.text!r}: its config.json has {said}; download the model again, or mend the file"
        ) from None


def _expected(error: ErrorDetails) -> str:
    """What was, as the end of a sentence."""
    due, message = value_due(error), error["msg"]
    return f"{message[:1].lower()}{message[1:]}" if due is None else f"{due} is expected"


def _value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


class _TokenizerConfig(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    tokenizer_class: str | None = None
    model_max_length: float | int | None = None
    auto_map: dict[str, Any] | None = None
    extra_special_tokens: list[Any] | dict[str, Any] | None = None
    added_tokens_decoder: dict[str, Any] | None = None


class _AddedTokens(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, int] = Field(init=False)


_OF_A_TOKENIZER: Mapping[str, type[BaseModel] | None] = {
    "tokenizer_config.json": _TokenizerConfig,
    "added_tokens.json": _AddedTokens,
    "special_tokens_map.json": None,
}


def check_settings(reference: ModelReference, folder: Path) -> None:
    """Refuse a checkpoint's small JSON files where they are no objects, or not of their kind; those that are there.

    Raises:
        TokenizerError: A tokenizer's is amiss.
        CheckpointError: Another is.
    """
    for name in SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        kind: type[TmergeError] = TokenizerError if name in _OF_A_TOKENIZER else CheckpointError
        try:
            settings = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise kind(f"{reference.text!r}: its {name} is no JSON ({error}); download it again") from None
        if not isinstance(settings, dict):
            raise kind(
                f"{reference.text!r}: its {name} holds {_value(settings)} where an object is expected; download it "
                "again, or take the file out"
            )
        if (schema := _OF_A_TOKENIZER.get(name)) is not None:
            try:
                schema.model_validate(settings)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                raise kind(
                    f"{reference.text!r}: its {name} has {'.'.join(map(str, first['loc'][:1]))} "
                    f"{_value(first['input'])}, and {_expected(first)}; download it again, or mend the file"
                ) from None


def check_generation(reference: ModelReference, folder: Path) -> None:
    """Refuse a ``generation_config.json`` that ``transformers`` cannot make one of, where there is one.

    Raises:
        CheckpointError: With what it says of it.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        GenerationConfig.from_dict(parse_json(path.read_text(encoding="utf-8")))
    except Exception as error:  # noqa: BLE001 - its checks fail in their own ways at values of the wrong kind
        raise CheckpointError(
            f"{reference.text!r}: transformers cannot use its {path.name}: {one_line(error)}; mend it, or take it out"
        ) from None
