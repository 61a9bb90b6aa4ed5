"""Flags of a command from the schema of its settings: name, type, bounds, default and help text stand there alone."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, cast

import typer
from pydantic import BaseModel

from deltacache.schemas.arguments import Argument, arguments_of, plain_type
from deltacache.schemas.errors import SettingsError

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def flags_of(
    kind: type[BaseModel], *, defaults: str | Mapping[str, str] = "", without: tuple[str, ...] = ()
) -> Callable[[FunctionT], FunctionT]:
    """Give a command that ends in ``**settings`` a flag for every argument of ``kind``.

    A flag that is not given is ``None``: the schema has the defaults, and the help text shows them.

    Args:
        defaults: what the help text shows instead of the schema's defaults: for all flags, or for some by name.
        without: arguments of ``kind`` that the command does not have.
    """

    def decorate(command: FunctionT) -> FunctionT:
        own = list(inspect.signature(command).parameters.values())
        own = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {each.name for each in own} | {*without}
        added = [_parameter(each, defaults) for each in arguments_of(kind).values() if each.name not in names]
        given = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        required = [each for each in given if each.default is inspect.Parameter.empty]
        optional = [each for each in given if each.default is not inspect.Parameter.empty]
        parameters = [*required, *added, *optional]
        target = cast("Any", command)
        target.__signature__ = inspect.Signature(parameters)
        target.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameter(argument: Argument, defaults: str | Mapping[str, str]) -> inspect.Parameter:
    """An option of typer, ``None`` unless it is given."""
    value = plain_type(argument.annotation)
    dashed = f"--{argument.name.replace('_', '-')}"
    if isinstance(defaults, str):
        shown = argument.flag.default or defaults or _text(argument)
    else:
        shown = defaults.get(argument.name) or argument.flag.default or _text(argument)
    option = typer.Option(
        f"{dashed}/{argument.flag.off}" if argument.flag.off else dashed,
        help=f"{argument.help} [default: {shown}]" if shown else argument.help,
        min=argument.least if value in (int, float) else None,
        max=argument.most if value in (int, float) else None,
        show_default=False,
    )
    return inspect.Parameter(
        argument.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, option],
    )


def _text(argument: Argument) -> str:
    """The schema's default as a command line writes it; empty without one."""
    value = argument.default
    if value is None or value is False or value == ():
        return ""
    if argument.flag.off and isinstance(value, bool):
        return argument.name.replace("_", "-")
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Settings that are refused are wrong usage: exit code 2."""
    try:
        yield
    except SettingsError as error:
        flag = re.sub(r"^[a-z_]+(?=: )", lambda name: f"--{name[0].replace('_', '-')}", str(error))
        raise typer.BadParameter(flag) from error
