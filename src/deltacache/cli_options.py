"""Options and arguments of the commands, by the names that several share."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from pydantic import BaseModel

from deltacache.schemas.arguments import Argument, arguments_of, plain_type
from deltacache.schemas.errors import SettingsError
from deltacache.schemas.secrets import without_secrets


def local_folder(folder: Path | None) -> Path | None:
    """Refuse a url where only a folder of this machine will do; a ``Path`` of it has one slash."""
    if folder is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(folder), re.IGNORECASE):
        raise typer.BadParameter(f"{without_secrets(str(folder))} is a URL: give a folder on this machine")
    return folder


SourceArg = Annotated[
    str,
    typer.Argument(
        help="Folder (searched recursively), glob, or list (text, CSV, JSON, Parquet) of videos, zip archives of "
        "frames and tars of videos; local or on s3://, gs://, https://."
    ),
]
OutArg = Annotated[
    Path, typer.Argument(help="Output folder; an unfinished one is continued.", callback=local_folder)
]
DatasetOutArg = Annotated[
    str, typer.Argument(help="Output folder, local or on s3://, gs://; an unfinished one is continued.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Print what would be computed and stop.")]


# ----------------------------------------------------------------------------------------------------
# ``NAME=PATH`` of flags that may be repeated.
# ----------------------------------------------------------------------------------------------------


def with_name(text: str) -> str:
    return text if "=" in text else f"external={text}"


def named_paths(flag: str, texts: list[str]) -> dict[str, str]:
    """``NAME=PATH`` of a flag that may be repeated."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(
                f"{flag} {text}: give NAME=PATH, such as {_with_guessed_name(flag, text)}"
            )
        if name in named:
            raise typer.BadParameter(f"{flag} {text}: {name} was already given ({named[name]})")
        named[name] = path
    return named


def _with_guessed_name(flag: str, text: str) -> str:
    """``/data/VSPW`` as ``vspw=/data/VSPW``; what one cannot tell is VSPW, or of a generator ``external``."""
    from deltacache.schemas.benchmarks import BENCHMARKS

    name, equals, path = text.partition("=")
    path = path if equals else name
    if equals and name:
        return f"{name}=PATH"
    if flag == "--predictions":
        return f"external={path or 'PATH'}"
    known = ("clips", *BENCHMARKS) if flag == "--data" else BENCHMARKS
    if text in known:
        return f"{text}=PATH"
    guessed = next((each for each in known if each in Path(path).name.lower()), "vspw")
    return f"{guessed}={path or 'PATH'}"


# ----------------------------------------------------------------------------------------------------
# Flags of a command from the schema of its settings: name, type, bounds, default and help text stand there
# alone.
# ----------------------------------------------------------------------------------------------------


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class SettingOption:
    """An option that comes from a schema, as ``--help`` and docs/settings.md show it.

    Attributes:
        option: on the command line.
        default: in words; empty without one.
    """

    argument: Argument
    option: str
    default: str


def flags_of(
    kind: type[BaseModel],
    *,
    defaults: str | Mapping[str, str] = "",
    without: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> Callable[[FunctionT], FunctionT]:
    """Give a command that ends in ``**settings`` a flag for every argument of ``kind``; may be repeated.

    A flag that is not given is ``None``: the schema has the defaults, and the help text shows them. Where two kinds
    have an argument of one name, the flag is that of the lower decorator.

    Args:
        defaults: what the help text shows instead of the schema's defaults: for all flags, or for some by name.
        without: arguments of ``kind`` that the command does not have.
        only: the arguments that it has, if not all.
    """

    def decorate(command: FunctionT) -> FunctionT:
        target = cast("Any", command)
        own = list(inspect.signature(command).parameters.values())
        own = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {each.name for each in own} | {*without}
        added: list[inspect.Parameter] = []
        settings: dict[str, SettingOption] = {}
        for argument in arguments_of(kind).values():
            if argument.name in names or (only and argument.name not in only):
                continue
            if isinstance(defaults, str):
                default = argument.flag.default or defaults or _text(argument)
            else:
                default = defaults.get(argument.name) or argument.flag.default or _text(argument)
            option = argument.flag.option or f"--{argument.name.replace('_', '-')}"
            option = f"{option}/{argument.flag.off}" if argument.flag.off else option
            settings[argument.name] = SettingOption(argument, option, default)
            value = plain_type(argument.annotation)
            required = argument.required and not (isinstance(defaults, str) and defaults)
            declared = typer.Option(
                option,
                help=f"{argument.help} [default: {default}]" if default else argument.help,
                min=argument.least if value in (int, float) else None,
                max=argument.most if value in (int, float) else None,
                show_default=False,
            )
            added.append(
                inspect.Parameter(
                    argument.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if required else None,
                    annotation=Annotated[value if required else value | None, declared],
                )
            )
        given = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        first = [each for each in given if each.default is inspect.Parameter.empty]
        last = [each for each in given if each.default is not inspect.Parameter.empty]
        parameters = [*first, *last, *added]
        target.__signature__ = inspect.Signature(parameters)
        target.__annotations__ = {each.name: each.annotation for each in parameters}
        target.settings = {**getattr(command, "settings", {}), **settings}
        return command

    return decorate


def settings_of(app: typer.Typer) -> dict[str, dict[str, SettingOption]]:
    """Of each command that has settings, its options that come from a schema, by the name of the argument."""
    found: dict[str, dict[str, SettingOption]] = {}
    for each in app.registered_commands:
        function: Any = each.callback
        if settings := getattr(function, "settings", None):
            found[each.name or function.__name__] = settings
    return found


def _text(argument: Argument) -> str:
    """The schema's default as a command line writes it; empty without one."""
    value = argument.default
    if value is None or value is False or value in ((), {}):
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
