"""What the sections of a config are made of: their base class, and numbers with units."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.core import units


def _count(value: object) -> units.Duration:
    duration = _interval(value)
    if duration.is_time:
        raise ValueError("must be counted in epochs, samples or steps, not in time")
    return duration


def _interval(value: object) -> units.Duration:
    duration = units.Duration.parse(value)
    if duration.value <= 0:
        raise ValueError("must be more than zero")
    return duration


def _time(value: object) -> units.Duration:
    duration = _interval(value)
    if not duration.is_time:
        raise ValueError("must be a time, such as '2 minutes' (units: seconds, minutes, hours, days)")
    return duration


_DURATION_SCHEMA = WithJsonSchema(
    {"type": "string", "pattern": units.DURATION_PATTERN, "examples": ["90 epochs", "400M samples", "20000 steps"]}
)
Span = Annotated[units.Duration, BeforeValidator(_count), PlainSerializer(str), _DURATION_SCHEMA]  # epochs, samples or steps
Interval = Annotated[units.Duration, BeforeValidator(_interval), PlainSerializer(str), _DURATION_SCHEMA]  # those, or a time
Time = Annotated[units.Duration, BeforeValidator(_time), PlainSerializer(str), _DURATION_SCHEMA]
Bytes = Annotated[
    int,
    BeforeValidator(units.parse_bytes),
    PlainSerializer(lambda n: n),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": units.SIZE_PATTERN, "examples": ["256 MiB"]}]}
    ),
]
Quantity = Annotated[
    int,
    BeforeValidator(units.parse_count),
    PlainSerializer(lambda n: n),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": units.COUNT_PATTERN, "examples": ["14.2M"]}]}
    ),
]


def _have_a_place(templates: list[str]) -> list[str]:
    for n, template in enumerate(templates):
        if template.count("{}") != 1:
            raise ValueError(f"{n}: {template!r} should hold {{}} once, where the name of the class belongs")
    return templates


Templates = Annotated[list[str], Field(min_length=1), AfterValidator(_have_a_place)]  # captions of zero-shot
Fraction = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Flag = Annotated[bool, Field(strict=True)]  # 'yes' and 1 are no booleans


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot be changed, a plain word stands for `{name: word}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    _plain_key: str = "name"

    @model_validator(mode="before")
    @classmethod
    def _from_plain_word(cls, value: Any) -> Any:
        key = cls._key_of_plain_word()
        return {key: value} if isinstance(value, str) and key else value

    @classmethod
    def _key_of_plain_word(cls) -> str | None:
        """The key that a plain word gives, in sections that need no other."""
        key = str(cls.__private_attributes__["_plain_key"].default)
        needed = {f.alias or name: f.is_required() for name, f in cls.model_fields.items()}
        return key if key in needed and not any(needed[k] for k in needed if k != key) else None

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As people write it: with `extends`, which may give what is required elsewhere, or as a plain word."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["properties"]["extends"] = {"type": "string", "description": "a file that this section varies"}
        schema.pop("required", None)
        return {"anyOf": [schema, {"type": "string"}]} if cls._key_of_plain_word() else schema


def check_word(name: str) -> str:
    """`name`, where it may be part of a path. Raises ValueError where it may not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("may hold letters, digits, '.', '_' and '-' only, and begins with a letter or digit")
    return name
