"""Sizes of images, one number for squares, height and width for rectangles; and horizons, as text or numbers."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from deltacache.schemas.layers import parse_numbers

Size = int | tuple[int, int]
"""Side of a square, or height and width, in pixels. A square is always one number: equal sizes are equal."""


def parse_size(value: Any) -> Size:
    """``512``, ``"512"``, ``"448x896"`` (height x width), or a pair of numbers.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    if not 1 <= len(parts) <= 2 or any(isinstance(part, bool | float) for part in parts):
        raise ValueError(_message(value))
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(_message(value)) from None
    if min(numbers) < 1:
        raise ValueError(_message(value))
    height, width = numbers[0], numbers[-1]
    return height if height == width else (height, width)


def _message(value: Any) -> str:
    return f"image size {value!r} is none: give the side of a square such as 512, or height x width such as 448x896"


ImageSize = Annotated[Size, BeforeValidator(parse_size)]
"""A field of a config."""


def parse_horizons(value: Any) -> Any:
    """Steps from text, see ``parse_numbers``."""
    return parse_numbers(value, "horizons", "numbers of steps: give them with commas, such as 1,3")


Horizons = Annotated[tuple[int, ...], BeforeValidator(parse_horizons)]
"""Steps after the context at which futures are scored."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size | list[int]) -> str:
    """``512`` or ``448x896``, as on the command line."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))
