"""Which blocks of an encoder are taken, as configs and command lines write it."""

from typing import Annotated, Any

from pydantic import BeforeValidator


def parse_numbers(value: Any, what: str, advice: str) -> Any:
    """``"2,5,8,11"`` as numbers; anything else as it is.

    Raises:
        ValueError: text that is no list of numbers; the message begins with ``what`` and ends with ``advice``.
    """
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"{what} {value!r} are no {advice}") from None


def parse_layers(value: Any) -> Any:
    """Blocks from text, see ``parse_numbers``."""
    return parse_numbers(value, "layers", "block numbers: give them from 0 up with commas, such as 2,5,8,11")


Layers = Annotated[tuple[int, ...] | None, BeforeValidator(parse_layers)]
"""Blocks counted from 0 whose outputs are joined, in increasing order; ``None``: the last hidden state alone."""
