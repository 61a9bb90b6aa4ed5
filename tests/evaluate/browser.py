"""A real browser for pages on disk: one Chromium without a window, which opens one page after the other."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

_WITH_PIPES = """
import os, sys
read, write = (os.dup(os.dup(int(each))) for each in sys.argv[1:3])  # neither is 3, nor the second 4
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Becomes a program that reads descriptor 3 and writes 4."""

# Runs in the page once it is loaded. In a function, so that the page sees none of its names.
_LOOK = r"""
(() => {
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
return {
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
};
})()
"""


@dataclass
class Browser:
    """Chromium, or one of its kin, through its devtools protocol. ``write``, ``read``: descriptors of its pipes."""

    write: int
    read: int
    _calls: int = 0
    _rest: bytes = b""
    _events: list[dict[str, Any]] = field(default_factory=list)
    _checked: dict[tuple[Path, int, bool, str], dict[str, Any]] = field(default_factory=dict)

    def check(
        self, page: Path, *, width: int = 1280, dark: bool = False, act: str = "return null;"
    ) -> dict[str, Any]:
        """Open a page, once for each look, and return what is found; ``act`` is the body of a function to run there."""
        asked = page, width, dark, act
        if asked not in self._checked:
            with self._opened(page, width, 1000, dark) as session:
                found = self._evaluate(session, _LOOK.replace("ACT", act))
                self._checked[asked] = {**found, **self._complaints(session)}
        return self._checked[asked]

    def source(self, page: Path) -> str:
        """The page's elements once it is loaded."""
        with self._opened(page, 1280, 1000, dark=False) as session:
            return self._evaluate(session, "document.documentElement.outerHTML")

    def picture(self, page: Path, target: Path, *, width: int, height: int, dark: bool = False) -> Path:
        """A screenshot of the page's top."""
        with self._opened(page, width, height, dark) as session:
            shot = self.call("Page.captureScreenshot", session, format="png")
            target.write_bytes(base64.b64decode(shot["data"]))
        return target

    def printed(self, page: Path, without: str) -> dict[str, Any]:
        """A page on A4 without one of its elements: number of sheets, and widths that do not fit on them."""
        with self._opened(page, 1280, 1000, dark=False) as session:
            self._evaluate(session, f"document.querySelector({without!r})?.remove()")
            paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
            pdf = base64.b64decode(self.call("Page.printToPDF", session, **paper)["data"])
            self.call("Emulation.setEmulatedMedia", session, media="print")
            size = {"width": 702, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 within 12 mm
            self.call("Emulation.setDeviceMetricsOverride", session, **size)
            cut = """[...document.querySelectorAll("table, svg, img, p, details")]
              .filter((each) => each.getBoundingClientRect().right > 703)
              .map((each) => `${each.getBoundingClientRect().right} ${each.outerHTML.slice(0, 160)}`)"""
            return {"sheets": len(re.findall(rb"/Type\s*/Page\b", pdf)), "cut": self._evaluate(session, cut)}

    @contextmanager
    def _opened(self, page: Path, width: int, height: int, dark: bool) -> Iterator[str]:
        """The session of a tab in which the page is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._events.clear()
        self.call("Page.navigate", session, url=page.as_uri())
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._said(session, "Page.loadEventFired"):
            self._events.append(self._message(deadline))
        yield session
        self.call("Target.closeTarget", targetId=target)

    def _complaints(self, session: str) -> dict[str, list[str]]:
        """Errors that nobody caught, and what was written to the console."""
        errors = [each["exceptionDetails"] for each in self._said(session, "Runtime.exceptionThrown")]
        console = [json.dumps(each["args"]) for each in self._said(session, "Runtime.consoleAPICalled")]
        console += [each["entry"]["text"] for each in self._said(session, "Log.entryAdded")]
        said = [each.get("exception", {}).get("description", each["text"]) for each in errors]
        return {"errors": said, "console": console}

    def _said(self, session: str, method: str) -> list[dict[str, Any]]:
        return [
            each["params"]
            for each in self._events
            if each.get("sessionId") == session and each["method"] == method
        ]

    def _evaluate(self, session: str, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """What Chromium answers; events that come before are kept."""
        self._calls += 1
        command = {"id": self._calls, "method": method, "params": parameters}
        command |= {} if session is None else {"sessionId": session}
        data = memoryview(json.dumps(command).encode() + b"\0")
        while data:
            data = data[os.write(self.write, data) :]
        deadline = time.monotonic() + _TIMEOUT_S
        while (message := self._message(deadline)).get("id") != self._calls:
            self._events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "Chromium does not answer"
            part = os.read(self.read, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def running_browser(home: Path) -> Iterator[Browser]:
    """Chromium where it is installed; without it skip, saying why, except where CI has installed it.

    Args:
        home: its profile.
    """
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        reason = f"none of {', '.join(_NAMES)} is installed: apt-get install chromium"
        if os.environ.get("DELTACACHE_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    # It reads commands from descriptor 3 and answers on 4; messages end with a zero byte.
    commands, answers = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-S", "-c", _WITH_PIPES, str(commands[0]), str(answers[1]), program, *_FLAGS),
            *("--remote-debugging-pipe", f"--user-data-dir={home / 'profile'}", "about:blank"),
        ],
        pass_fds=(commands[0], answers[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        browser = Browser(commands[1], answers[0])
        yield browser
        browser.call("Browser.close")
        process.wait(_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
        os.close(commands[1])
        os.close(answers[0])
