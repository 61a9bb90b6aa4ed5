"""Legends of charts as HTML with small swatches, so that nothing overlaps and the text has the page's size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deltacache.evaluate.report.drawing import SERIES
from deltacache.evaluate.report.series import Style

_CORNERS = {"s": (4, 45), "D": (4, 0), "^": (3, -90), "v": (3, 90), "p": (5, -90), "h": (6, 0), ">": (3, 0)}


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A label and how its line looks, as SVG."""

    label: str
    swatch: str


def legend(entries: Iterable[tuple[str, Style, bool]], *, lines: bool = True) -> tuple[LegendEntry, ...]:
    """Of (label, look, published) entries, each label once."""
    found = {label: LegendEntry(label, _swatch(style, hollow, lines)) for label, style, hollow in entries}
    return tuple(found.values())


def _swatch(style: Style, hollow: bool, line: bool) -> str:
    colour = f"var(--s{style.colour % SERIES})"
    dash = (1, 3) if hollow else style.dash
    pattern = f' stroke-dasharray="{" ".join(str(1.5 * each) for each in dash)}"' if dash else ""
    stroke = f'<path d="M1 7H33" stroke="{colour}" stroke-width="2"{pattern}/>' if line else ""
    fill = f'fill="none" stroke="{colour}" stroke-width="1.6"' if hollow else f'fill="{colour}"'
    return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{stroke}{_marker(style.marker, fill)}</svg>'


def _marker(marker: str, fill: str) -> str:
    if marker in _CORNERS:
        corners, turn = _CORNERS[marker]
        angles = [math.radians(turn + 360 * at / corners) for at in range(corners)]
        points = " ".join(
            f"{17 + 5.5 * math.cos(each):.1f},{7 + 5.5 * math.sin(each):.1f}" for each in angles
        )
        return f'<polygon points="{points}" {fill}/>'
    if marker in ("P", "X"):
        turn = ' transform="rotate(45 17 7)"' if marker == "X" else ""
        return f'<path d="M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z" {fill}{turn}/>'
    return f'<circle cx="17" cy="7" r="4" {fill}/>'
