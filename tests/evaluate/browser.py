"""A real browser for pages on disk: Chromium without a window."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
)
_TIMEOUT_S = 120
_NARROWEST = 500  # pixels of a window

# Runs in the page once it is loaded; what it finds is left in an element that the test reads.
_PROBE = """
<script>
"use strict";
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
</script>
"""
_CHECK = r"""
<script>
"use strict";
const numbers = (text) => text.match(/[\d.]+/g).map(Number);
const luminance = (rgb) => {
  const linear = (each) => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = rgb.map((each) => linear(each / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const backgroundOf = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const parts = numbers(getComputedStyle(at).backgroundColor);
    if (parts.length === 3 || parts[3] === 1) return parts.slice(0, 3);
  }
  return [255, 255, 255];
};
const spreadOf = (image) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const [low, high] = [[255, 255, 255, 255], [0, 0, 0, 0]];
  for (let at = 0; at < data.length; at++) {
    low[at % 4] = Math.min(low[at % 4], data[at]);
    high[at % 4] = Math.max(high[at % 4], data[at]);
  }
  return Math.max(...high.map((each, channel) => each - low[channel]));
};
const textsOf = () => [...document.querySelectorAll("body *")].filter((element) =>
  !element.closest("svg, script, style")
  && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
const contrastOf = (element) =>
  contrast(numbers(getComputedStyle(element).color).slice(0, 3), backgroundOf(element));
const boxOf = (element) => {
  const box = element.getBoundingClientRect();
  return [box.x, box.y, box.width, box.height].map(Math.round);
};
const look = () => ({
  images: [...document.images].map((image) =>
    ({ alt: image.alt, width: image.naturalWidth, spread: image.naturalWidth ? spreadOf(image) : 0 })),
  charts: [...document.querySelectorAll(".chart [role=img]")].map((chart) =>
    ({ alt: chart.getAttribute("aria-label"), box: boxOf(chart) })),
  width: document.documentElement.scrollWidth,
  window: window.innerWidth,
  height: document.documentElement.scrollHeight,
  low_contrast: textsOf().filter((element) => contrastOf(element) < 4.5)
    .map((element) => element.textContent.trim().slice(0, 40)),
  background: numbers(getComputedStyle(document.body).backgroundColor).slice(0, 3),
  loaded: performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:")),
  headings: [...document.querySelectorAll("h1, h2, h3, h4")].map((heading) => Number(heading.tagName[1])),
  unnamed: [...document.querySelectorAll("button, input, a, summary")]
    .filter((each) => !(each.textContent.trim() || each.getAttribute("aria-label"))).length,
  tables_without_caption: [...document.querySelectorAll(".scroll table")].filter((table) => !table.caption).length,
  acted: (() => { ACT })(),
});
window.addEventListener("load", () => {  // at once: pictures inside the page are there by now
  let found = {};
  try {
    found = look();
  } catch (error) {
    errors.push(String(error));
  }
  const left = document.createElement("pre");
  left.id = "found";
  left.textContent = JSON.stringify({ ...found, errors });
  (window.frameElement ? parent.document : document).body.append(left);
});
</script>
"""


@dataclass(frozen=True)
class Browser:
    """Chromium, or one of its kin. ``home``: its profile and the pages made for it."""

    program: str
    home: Path
    _checked: dict[tuple[Path, int, bool, str], dict[str, Any]] = field(default_factory=dict, compare=False)

    def check(
        self, page: Path, *, width: int = 1280, dark: bool = False, act: str = "return null;"
    ) -> dict[str, Any]:
        """Open a page, once for each look, and return what is found; ``act`` is the body of a function to run there."""
        asked = page, width, dark, act
        if asked not in self._checked:
            self._checked[asked] = self._check(*asked)
        return self._checked[asked]

    def _check(self, page: Path, width: int, dark: bool, act: str) -> dict[str, Any]:
        copy = self.home / f"probed-{page.parent.name}-{page.name}"
        text = page.read_text().replace("<head>", "<head>" + _PROBE, 1)
        text = text.replace("</body>", _CHECK.replace("ACT", act) + "</body>")
        copy.write_text(text if width >= _NARROWEST else _framed(text, width))
        run = self._run("--dump-dom", f"--window-size={width},1000", *_scheme(dark), copy.as_uri())
        found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
        assert found, run.stderr[-2000:]
        values = json.loads(html.unescape(found[1]))
        values["console"] = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
        return values

    def source(self, page: Path, *flags: str) -> str:
        """The page's elements once it is loaded."""
        return self._run("--dump-dom", *flags, page.as_uri()).stdout

    def picture(self, page: Path, target: Path, *, width: int, height: int, dark: bool = False) -> Path:
        """A screenshot of the page's top."""
        size = f"--window-size={width},{height}"
        self._run(f"--screenshot={target}", size, *_scheme(dark), page.as_uri())
        return target

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            self.program,
            *_FLAGS,
            f"--user-data-dir={self.home / 'profile'}",
            "--enable-logging=stderr",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)


def _framed(page: str, width: int) -> str:
    """A page that holds ``page`` in a window of its own: Chromium's are not as narrow as a phone's."""
    return (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>'
        f'<iframe style="border: 0" width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe></body>'
    )


def _scheme(dark: bool) -> tuple[str, ...]:
    return (f"--blink-settings=preferredColorScheme={0 if dark else 1}",)


def find_browser(home: Path) -> Browser:
    """Chromium where it is installed; without it skip, saying why, except where CI has installed it."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        reason = f"none of {', '.join(_NAMES)} is installed: apt-get install chromium"
        if os.environ.get("DELTACACHE_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return Browser(program, home)
