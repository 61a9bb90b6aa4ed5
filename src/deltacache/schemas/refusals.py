"""What a config refuses, in words: the value, the rule, and the names that there are."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from deltacache.schemas.secrets import without_secrets

_LONGEST = 80
"""Characters of a value that are shown."""


def problems_of(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """All problems in one line. ``kind`` is what was validated: its fields are named where one is unknown."""
    return "; ".join(dict.fromkeys(_problem(each, kind) for each in error.errors(include_url=False)))


def closest_first(name: str, known: Sequence[str]) -> list[str]:
    """``known`` by how much they look like ``name``."""
    return sorted(known, key=lambda each: -SequenceMatcher(None, name, each).ratio())


def _problem(each: Any, kind: type[BaseModel] | None) -> str:
    place = ".".join(_readable(part) for part in each["loc"])
    if each["type"] == "missing":
        return f"{place} is missing: give it"
    message = each["msg"].removeprefix("Value error, ")
    if each["type"] == "extra_forbidden":
        message = _unknown(each["loc"], kind)
    shown = without_secrets(repr(each["input"]))
    got = f" (got {shown})" if place and len(shown) <= _LONGEST else ""
    return f"{place}: {message}{got}" if place else message


def _readable(part: int | str) -> str:
    """Without what pydantic writes around the name of one of several kinds."""
    text = str(part)
    return text.removesuffix("]").rpartition(", ")[2] if text.startswith("function-") else text


def _unknown(place: Sequence[int | str], kind: type[BaseModel] | None) -> str:
    owner = kind if kind is None else _model_at(kind, place[:-1])
    if owner is None:
        return "is not known: leave it out"
    names = closest_first(str(place[-1]), list(owner.model_fields))
    return f"is not known: give {', '.join(names)}, or leave it out"


def _model_at(kind: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    """The kind of what lies at ``place``."""
    at: Any = kind
    for part in place:
        at = _within(at, part)
    return next(_models(at), None)


def _within(kind: Any, part: int | str) -> Any:
    """Of a model its field, of several kinds the one that is named so, of a mapping or a tuple what it holds."""
    named = [model for model in _models(kind) if model.__name__ == _readable(part)]
    if named:
        return named[0]
    for model in _models(kind):
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    return _held(kind)


def _held(kind: Any) -> Any:
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping | Sequence):
        return get_args(kind)[-1] if get_origin(kind) is not tuple else get_args(kind)[0]
    return next((found for each in get_args(kind) if (found := _held(each)) is not None), None)


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type says a value may be, its containers left out."""
    origin = get_origin(kind)
    if isinstance(kind, type) and origin is None:
        if issubclass(kind, BaseModel):
            yield kind
    elif not (isinstance(origin, type) and issubclass(origin, Mapping | Sequence)):
        for each in get_args(kind):
            yield from _models(each)
