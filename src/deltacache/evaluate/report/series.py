"""How a method looks in every chart and legend: the same in all panels, all runs and both colour schemes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deltacache.evaluate.report.panels import Line


@dataclass(frozen=True, slots=True)
class Style:
    """Colour ``--s<colour>`` of the page, a marker of matplotlib, and a dash pattern in points."""

    colour: int
    marker: str
    dash: tuple[float, ...] = ()


_STYLES: Mapping[tuple[str, str], Style] = MappingProxyType(
    {
        ("copy_last", "single"): Style(0, "s"),
        ("deltatok", "single"): Style(1, "o"),
        ("deltatok_parallel", "single"): Style(2, "v", (4, 2)),
        ("deltatok_one_step", "single"): Style(2, "<", (1, 1.5)),
        ("deltatok_swapped", "single"): Style(3, "^", (1, 1.5)),
        ("deltaworld", "best"): Style(4, "D"),
        ("deltaworld", "mean"): Style(5, "P", (4, 2)),
        ("deltaworld", "single"): Style(4, "D"),
        ("deltaworld_discriminative", "single"): Style(6, "X"),
        ("present", "single"): Style(7, ">"),
        ("dino_world", "single"): Style(8, "h"),
        ("cosmos_12b", "best"): Style(9, "p"),
        ("cosmos_12b", "mean"): Style(9, "p"),
    }
)
_OTHERS = (Style(8, "h"), Style(9, "p"), Style(3, "^"), Style(6, "X"))
_DASHES = ((), (4, 2), (1, 1.5), (4, 1.5, 1, 1.5))


def style_of(method: str, aggregation: str) -> Style:
    """The look of a method; one that is not known gets one that follows from its name."""
    known = _STYLES.get((method, aggregation))
    return known or _OTHERS[sum((method + aggregation).encode()) % len(_OTHERS)]


def styles_of(lines: Iterable[Line]) -> dict[str, Style]:
    """Looks by label: several models of one kind share the colour and differ in dashes."""
    seen: dict[tuple[str, str, str], int] = {}
    styles: dict[str, Style] = {}
    for line in lines:
        if line.label in styles:
            continue
        style = style_of(line.method, line.aggregation)
        key = (line.method, line.aggregation, line.published)
        number = seen[key] = seen.get(key, -1) + 1
        styles[line.label] = Style(style.colour, style.marker, _DASHES[number % 4] if number else style.dash)
    return styles
