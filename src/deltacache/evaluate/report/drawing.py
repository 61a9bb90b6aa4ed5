"""One picture of matplotlib as inline SVG whose colours and fonts are those of the page, light or dark."""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display, no global figures

SERIES = 10
TEXT, SOFT, FAINT = "#0000f0", "#0000f1", "#0000f2"
_VARIABLES = {TEXT: "--text", SOFT: "--soft", FAINT: "--line"}
_VARIABLES |= {f"#0000a{number}": f"--s{number}" for number in range(SERIES)}


def series_colour(number: int) -> str:
    """What stands for ``--s<number>`` while matplotlib draws."""
    return f"#0000a{number % SERIES}"


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart as SVG, with a text for those who do not see it."""

    title: str
    svg: str
    alt: str


def draw_svg(draw: Callable[[Axes], None], *, width: float = 4.6, height: float = 3.0) -> str:
    """An ``<svg>`` element for the middle of a page; ``draw`` fills the axes. Sizes in inches."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "deltacache",
        "font.size": 10,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.titlecolor": TEXT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "axes.edgecolor": SOFT,
        "grid.color": FAINT,
        "axes.unicode_minus": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    """Drop what a file needs and a page does not; names inside stay apart from those of other charts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = (
        re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    key = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'id="([^"]+)"', rf'id="{key}\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{key}", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{key}', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    return re.sub(r"\s*\n\s*", " ", svg)
