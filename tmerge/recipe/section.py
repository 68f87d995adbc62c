"""What all sections of a recipe have in common: frozen, strict, and no word that is read as a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationInfo, field_validator

__all__ = ["ProjectionName", "Section", "chosen_by", "counted"]

ProjectionName = Literal["q", "k", "v", "o", "gate", "up", "down"]


def counted(least: int, most: int = 10_000_000) -> Any:
    """The bounds of a count: beyond what any machine has time or room for it is a slip."""
    return Field(ge=least, le=most)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts or get_origin(annotation) is Literal:
        yield annotation
    for part in parts if get_origin(annotation) is not Literal else ():
        yield from _kinds(part)


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_boolean, value)) if isinstance(value, (list, tuple)) else isinstance(value, bool)


class Section(BaseModel):
    """Frozen and strict: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1, and YAML reads yes and on as true: ``alpha: yes`` would be 1.0."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        has_own = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
        if bool not in kinds and not has_own and _holds_boolean(value):
            raise ValueError("true and false, which YAML reads yes, no, on and off as too, are no value here")
        return value


def chosen_by(key: str) -> Discriminator:
    """That a section is of several kinds, each with a tag: which it is, a key of it says.

    A function, and not the key's name: pydantic allows no validator before that of a key that it reads itself.
    """

    def tag(section: Any) -> str | None:
        if isinstance(section, Mapping):
            return str(section[key]) if key in section else None
        return getattr(section, key, None)

    return Discriminator(tag)
