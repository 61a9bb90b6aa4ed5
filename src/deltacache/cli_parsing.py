"""Values of flags that are no settings: ``NAME=PATH`` of flags that may be repeated, and horizons."""

from pathlib import Path

import typer

from deltacache.schemas.images import parse_horizons


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
            raise typer.BadParameter(f"{flag} {text}: {name} was given already ({named[name]})")
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


def parsed_horizons(text: str) -> tuple[int, ...]:
    """``1,3`` as numbers."""
    try:
        return parse_horizons(text)
    except ValueError as error:
        raise typer.BadParameter(f"--horizons: {error}") from None
