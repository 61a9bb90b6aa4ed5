"""Settings as arguments: flags of a command and keywords of a function, both read off one schema.

A field that carries a ``Flag`` is an argument. Its name, type, default, bounds and help text stand in the schema alone;
fields of nested settings are arguments like any other:

    views: Annotated[int, Flag()] = Field(default=1, ge=1, description="Clips per video.")

is ``--views`` of a command, ``views=`` of a function and ``views:`` in YAML.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from deltacache.schemas.errors import SettingsError, closest_first, problems_of

SettingsT = TypeVar("SettingsT", bound=BaseModel)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Flag:
    """Marks a field of settings as an argument.

    Two fields of one name are a pair of values: ``--spacing 0.04 0.33``.

    Attributes:
        name: if another than that of the field.
        option: of a command line, if another than the dashed name: ``--format`` of ``clip_format``.
        off: of a yes-or-no flag that is on by default, the flag that turns it off.
        choices: of a field that takes more values than a user should give.
        takes: type of the argument, where a user gives it in another form than the field has.
        default: what stands in for a default that is not a value: "the preset's", "one per GPU".
    """

    name: str | None = None
    option: str | None = None
    off: str | None = None
    choices: tuple[str, ...] = ()
    takes: Any = None
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument, as ``arguments_of`` reads it off a schema.

    Attributes:
        paths: of the field in the settings; of two fields where it is a pair.
        annotation: of its value, as a function takes it.
        default: the field's own; ``None`` where it has none.
        least, most: bounds that are included, if any.
        required: whether the field has no default.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    annotation: Any
    default: Any
    help: str
    flag: Flag
    least: float | None = None
    most: float | None = None
    required: bool = False


def arguments_of(kind: type[BaseModel]) -> dict[str, Argument]:
    """All arguments of settings of this kind, by name, in the order of the schema."""
    return _arguments(kind, ())


def _arguments(kind: type[BaseModel], prefix: tuple[str, ...]) -> dict[str, Argument]:
    found: dict[str, Argument] = {}
    for field_name, field in kind.model_fields.items():
        path = (*prefix, field_name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _arguments(field.annotation, path)
            continue
        flag = next((each for each in field.metadata if isinstance(each, Flag)), None)
        if flag is None:
            continue
        argument = _argument(flag.name or field_name, path, field, flag)
        first = found.get(argument.name)
        if first is not None:  # the second value of a pair
            pair = tuple[first.annotation, argument.annotation]
            both = (first.default, argument.default)
            argument = Argument(
                first.name, (*first.paths, path), pair, both, first.help, first.flag, first.least, first.most
            )
        found[argument.name] = argument
    return found


def _argument(name: str, path: tuple[str, ...], field: FieldInfo, flag: Flag) -> Argument:
    bounds = {type(each): each for each in field.metadata if isinstance(each, annotated_types.BaseMetadata)}
    least = cast("Any", bounds[annotated_types.Ge]).ge if annotated_types.Ge in bounds else None
    most = cast("Any", bounds[annotated_types.Le]).le if annotated_types.Le in bounds else None
    annotation = Literal[flag.choices] if flag.choices else flag.takes or field.annotation  # type: ignore[valid-type]
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    return Argument(name, (path,), annotation, default, field.description or "", flag, least, most, required)


def fields_of(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``kind`` by name, nested like it, from arguments and fields; ``None`` is "not given" and left out.

    Raises:
        SettingsError: an unknown name.
    """
    content: dict[str, Any] = {}
    arguments = arguments_of(kind)
    for name, value in values.items():
        argument = arguments.get(name)
        if argument is None and name not in kind.model_fields:
            names = closest_first(name, list(dict.fromkeys((*arguments, *kind.model_fields))))
            raise SettingsError(
                f"Unknown setting {name!r}. Did you mean {names[0]}? All settings: {', '.join(sorted(names))}."
            )
        if value is None:
            continue
        paths = ((name,),) if argument is None else argument.paths
        for path, part in zip(paths, (value,) if len(paths) == 1 else value, strict=True):
            place = content
            for each in path[:-1]:
                place = place.setdefault(each, {})
            place[path[-1]] = part
    return content


def taken(kind: type[SettingsT], values: Mapping[str, Any]) -> tuple[SettingsT, dict[str, Any]]:
    """Settings of ``kind`` from those arguments that are its own, and the other arguments."""
    own = arguments_of(kind)
    given = build(kind, {name: value for name, value in values.items() if name in own})
    return given, {name: value for name, value in values.items() if name not in own}


def build(kind: type[SettingsT], values: Mapping[str, Any], base: SettingsT | None = None) -> SettingsT:
    """Settings from arguments and from fields of ``kind`` by name; ``None`` is "not given".

    Args:
        base: settings that are changed by what is given; else the schema's defaults.

    Raises:
        SettingsError: an unknown name, a value out of bounds, or values that do not go together.
    """
    content = fields_of(kind, values)
    if base is not None:
        content = merged(base.model_dump(), content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        text = problems_of(error, kind)
        for argument in arguments_of(kind).values():  # a user knows the argument, not where it is kept
            for path in argument.paths:
                text = text.replace(f"{'.'.join(path)}: ", f"{argument.name}: ")
        raise SettingsError(text) from error


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, mapping by mapping."""
    both = dict(base)
    for name, value in changes.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def changed_by(settings: SettingsT, assignments: Iterable[str]) -> SettingsT:
    """Settings with any of their fields changed, by dotted path: ``training.learning_rate=3e-4``.

    Raises:
        SettingsError: no assignment, no such field, or a value that it refuses.
    """
    changes: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise SettingsError(f"{text!r} sets nothing: give KEY=VALUE, such as training.learning_rate=3e-4")
        change: Any = parsed_value(value)
        for part in reversed(key.split(".")):
            change = {part: change}
        changes = merged(changes, change)
    if not changes:
        return settings
    try:
        return type(settings).model_validate(merged(settings.model_dump(), changes))
    except ValidationError as error:
        raise SettingsError(problems_of(error, type(settings))) from error


def parsed_value(text: str) -> Any:
    """A value as YAML reads it: numbers (``3e-4`` too), truth values, null and lists; anything else is text."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def takes(
    kind: type[BaseModel], *, optional: bool = False, without: tuple[str, ...] = ()
) -> Callable[[FunctionT], FunctionT]:
    """Give a function that ends in ``**settings`` a signature with the arguments of ``kind``, for ``help()``.

    Args:
        optional: all default to ``None``: they change a preset.
    """

    def decorate(function: FunctionT) -> FunctionT:
        own = inspect.signature(function)
        kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {each.name for each in kept}
        added = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=each.annotation,
                default=None if optional else each.default,
            )
            for each in arguments_of(kind).values()
            if each.name not in names and each.name not in without
        ]
        cast("Any", function).__signature__ = own.replace(parameters=[*kept, *added])
        return function

    return decorate


def is_optional(annotation: Any) -> bool:
    """Whether ``None`` is among the values."""
    return type(None) in get_args(annotation)


def plain_type(annotation: Any) -> Any:
    """What a command line reads: the type itself where it is a simple one, else text that the field parses."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    members = [each for each in get_args(annotation) if each is not type(None)]
    if is_optional(annotation) and len(members) == 1:
        return plain_type(members[0])
    origin = get_origin(annotation)
    if origin is dict or (
        origin is tuple and plain_type(members[0]) in (str, Path)
    ):  # NAME=PATH; given several times
        return list[str]
    numbers = origin is tuple and all(each in (int, float) for each in members)
    simple = annotation in (int, float, bool, str, Path)
    return annotation if simple or numbers or origin is Literal else str
