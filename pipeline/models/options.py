"""What every family's options have in common.

A family is a frozen pydantic class of options and an `nn.Module` that is built from one: `VisionTransformer(ViTOptions(..))`. The
module keeps it as `options`, so that a checkpoint can say how to build its model again.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import ConfigError, nearest

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    """Unknown keys are refused, values cannot be changed. Checks across keys raise ValueError("key: what is wrong")."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_switches(cls, values: Any) -> Any:
        """Python counts true as 1, and pydantic takes 1 and 'yes' for true."""
        for key, value in values.items() if isinstance(values, dict) else ():
            kinds = _kinds(cls.model_fields[key].annotation) if key in cls.model_fields else set[Any]()
            if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
                raise ValueError(f"{key}: {value} should be a number")
            if value is not None and not isinstance(value, bool) and bool in kinds:
                raise ValueError(f"{key}: {value!r} should be true or false")
        return values


def check_heads(width: int, heads: int, prefix: str = "") -> None:
    """Raises ValueError where `heads` do not share `width` evenly."""
    if width % heads:
        raise ValueError(f"{prefix}width: {width} is not a multiple of {prefix}heads ({heads})")


def explain(error: Any, kind: type[Options], where: str, hidden: frozenset[str] = frozenset()) -> str:
    """One of pydantic's errors about options of `kind`, in a sentence that begins with its config path; `where` is theirs."""
    section, path = _locate(kind, error["loc"])
    key = ".".join((where, *path))
    match error["type"]:
        case "extra_forbidden":
            allowed = sorted(set(section.model_fields) - hidden)
            name = ["name"] if section is kind else []
            return f"{key}: no such key{nearest(path[-1], allowed)} (allowed: {', '.join([*name, *allowed])})"
        case "missing":
            return f"{key}: is missing"
        case "value_error":
            return f"{key}.{error['ctx']['error']}"
        case "model_type" | "model_attributes_type":
            return f"{key}: {error['input']!r} should be a section"
        case "union_tag_not_found":
            choices = _sections(section.model_fields[path[-1]].annotation)
            allowed = sorted(kind for choice in choices for kind in get_args(choice.model_fields["kind"].annotation))
            return f"{key}.kind: is missing (allowed: {', '.join(allowed)})"
        case "union_tag_invalid":
            return f"{key}.kind: should be one of {error['ctx']['expected_tags']}"
        case "tuple_type":
            return f"{key}: {error['input']!r} should be a list"
        case "too_short" | "too_long":
            least = error["ctx"].get("min_length")
            count = least or error["ctx"]["max_length"]
            return f"{key}: should have at {'least' if least else 'most'} {count} item{'s' if count > 1 else ''}"
        case _:
            message = error["msg"].replace("Input should", "should").split(", unable to parse")[0].replace("a valid number", "a number")
            return f"{key}: {error['input']!r} {message}"


def _locate(kind: type[Options], place: tuple[Any, ...]) -> tuple[type[Options], list[str]]:
    """The section of `kind` that an error is in, and the keys that lead to it: of a choice of sections pydantic names the `kind` too."""
    section, path = kind, list[str]()
    choices: list[type[Options]] = []
    for part in place:
        chosen = [choice for choice in choices if part in get_args(choice.model_fields["kind"].annotation)]
        choices = []
        if chosen:
            section = chosen[0]
            continue
        path.append(str(part))
        if part in section.model_fields:
            found = _sections(section.model_fields[part].annotation)
            section, choices = (found[0], []) if len(found) == 1 else (section, found)
    return section, path


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation such as `bool | None`."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation) if isinstance(part, type) or get_args(part)))


def _sections(annotation: Any) -> list[type[Options]]:
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def parse(kind: type[Options], values: dict[str, Any], where: str, hidden: frozenset[str] = frozenset()) -> Any:
    """`values` as options of `kind`; `hidden` keys are not offered to the person, for the pipeline gives them itself.

    Raises:
        ConfigError: an unknown or missing key, a value out of range, or values that do not fit together.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise ConfigError("; ".join(explain(error, kind, where, hidden) for error in e.errors())) from None
