"""Reports in a real browser: nothing errors, every picture has content, phones and dark pages are readable."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from benchmark_runs import mini_settings
from browser import Browser, running_browser
from drawn_features import FRAMES, DrawnWorld
from foresight_runs import save_models, whole_settings
from PIL import Image

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.report.page import ReportInput, write_page, write_report
from deltacache.schemas.progress import SilentReporter

LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def benchmarks(
    golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two evaluations of the miniature benchmarks, with other noise."""
    folder = tmp_path_factory.mktemp("runs")
    outs = (folder / "first", folder / "second")
    for seed, out in enumerate(outs):
        settings = mini_settings(golden, mini_benchmarks, out, seed=seed, horizons=(1, 2, 3), examples=1)
        evaluate_benchmarks(settings, SilentReporter())
    return outs


@pytest.fixture(scope="module")
def whole(mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of whole frames, wider than high."""
    folder, cityscapes = tmp_path_factory.mktemp("whole"), mini_benchmarks / "cityscapes"
    settings = whole_settings(save_models(folder, cityscapes), cityscapes, folder / "out")
    evaluate_foresight(settings, SilentReporter())
    return settings.out


@pytest.fixture(scope="module")
def pages(
    benchmarks: tuple[Path, Path],
    evaluated: DrawnWorld,
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A report of benchmarks, one of clips with frames, one of two runs, and one of whole frames."""

    def frames(clip_id: str) -> np.ndarray:
        rng = np.random.default_rng(sum(clip_id.encode()))
        return rng.integers(0, 256, (FRAMES, 24, 24, 3), dtype=np.uint8)

    clips = write_report(ReportInput(evaluated.root / "out", frames))
    both = tmp_path_factory.mktemp("pages") / "both.html"
    return {
        "benchmarks": write_report(benchmarks[0]),
        "clips": clips,
        "both": write_page(list(benchmarks), both),
        "whole": write_report(whole),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), LOOKS)
@pytest.mark.parametrize("name", ["benchmarks", "clips", "both", "whole"])
def test_a_page_is_readable(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    found = browser.check(pages[name], width=width, dark=dark)
    assert found["errors"] == found["console"] == found["loaded"] == []
    assert found["window"] == width
    assert found["width"] <= width  # no sideways scroll of the page
    assert found["low_contrast"] == []
    assert found["unnamed"] == found["tables_without_caption"] == 0
    assert (sum(found["background"]) < 3 * 64) == dark
    levels = found["headings"]
    assert levels[0] == 1
    assert all(later - before <= 1 for before, later in pairwise(levels))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["benchmarks", "clips", "both", "whole"])
def test_every_picture_has_content(browser: Browser, pages: dict[str, Path], name: str) -> None:
    found = browser.check(pages[name])
    assert len(found["images"]) > 20
    for image in found["images"]:
        assert image["width"] > 0, image
        assert image["spread"] > 0, image
        assert image["alt"]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["benchmarks", "clips", "both", "whole"])
def test_every_chart_has_content(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool, tmp_path: Path
) -> None:
    found = browser.check(pages[name], dark=dark)
    assert len(found["charts"]) >= (4 if name == "whole" else 6)  # one future has no calibration
    shot = browser.picture(pages[name], tmp_path / "page.png", width=1280, height=found["height"], dark=dark)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for chart in found["charts"]:
        x, y, width, height = chart["box"]
        assert min(width, height) > 100, chart
        box = pixels[y : y + height, x : x + width]
        assert (np.abs(box - box[0, 0]).sum(-1) > 150).mean() > 0.005, chart  # ink
        hue = box.max(-1) - box.min(-1)
        assert (hue > 60).any(), chart  # and some of it is coloured


@pytest.mark.slow
def test_the_slider_moves_and_the_strips_come_back(browser: Browser, pages: dict[str, Path]) -> None:
    act = """
      const example = document.querySelector(".example"), said = () => example.querySelector("output").textContent;
      const slider = example.querySelector("input"), strip = example.querySelector(".predicted img");
      const place = () => Math.round(strip.getBoundingClientRect().x);
      const states = [[example.classList.contains("one"), said(), place()]];
      slider.dispatchEvent(new Event("input"));
      const last = place();
      slider.value = 0;
      slider.dispatchEvent(new Event("input"));
      states.push([example.classList.contains("before"), said(), place() > last]);
      example.querySelector("[data-mode]").click();
      states.push([example.classList.contains("one"), strip.getBoundingClientRect().width > 300, 0]);
      return states;
    """
    first, moved, strips = browser.check(pages["clips"], act=act)["acted"]
    assert first[:2] == [False, "+0.60 s, future"]  # all moments are shown
    assert moved[0]
    assert moved[1].endswith(", seen")
    assert moved[2]
    assert strips[:2] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sheets"), [("clips", 4), ("benchmarks", 13), ("both", 18), ("whole", 4)])
def test_a_printed_page_is_short_and_nothing_is_cut(
    browser: Browser, pages: dict[str, Path], name: str, sheets: int
) -> None:
    found = browser.printed(pages[name], without="#examples")
    assert found["cut"] == []
    assert 0 < found["sheets"] <= sheets


@pytest.mark.slow
def test_published_numbers_have_a_column_of_their_own(browser: Browser, pages: dict[str, Path]) -> None:
    act = """
      const texts = (row) => [...row.cells].flatMap((cell) => Array(cell.colSpan).fill(cell.textContent.trim()));
      return [...document.querySelectorAll("table:has(tr.published)")].map((table) =>
        [...table.tBodies[0].rows].map((row) => [row.classList.contains("published"), texts(row)]));
    """
    for name, runs in (("benchmarks", 1), ("both", 2)):
        tables = browser.check(pages[name], act=act)["acted"]
        assert tables
        for rows in tables:
            assert len({len(cells) for _, cells in rows}) == 1
            for published, (_, *cells) in rows:
                groups = [cells[at : at + runs + 1] for at in range(0, len(cells), runs + 1)]
                for *own, others in groups:
                    assert not any(own) if published else others == ""


@pytest.mark.slow
def test_without_scripts_all_moments_are_shown(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = pages["clips"].read_text()
    start, end = text.index("<script>"), text.index("</script>")
    still = tmp_path / "still.html"
    still.write_text(text[:start] + text[end + len("</script>") :])
    act = """document.querySelectorAll("details").forEach((each) => { each.open = true; });
      return [...document.querySelectorAll(".strip")].map((strip) => strip.getBoundingClientRect().width > 300
      && strip.querySelector("img").getBoundingClientRect().width <= strip.getBoundingClientRect().width);"""
    found = browser.check(still, act=act)
    assert found["acted"]
    assert all(found["acted"])
    assert 'class="controls" hidden' in browser.source(still)


@pytest.mark.slow
def test_several_runs_have_the_same_scale_and_both_names(browser: Browser, pages: dict[str, Path]) -> None:
    act = """
      const charts = [...document.querySelectorAll("#data-1 .pair .charts")][0].querySelectorAll("svg");
      return [[...charts].map((svg) => [...svg.querySelectorAll("text")].map((each) => each.textContent).join(" ")),
        [...document.querySelectorAll("#data-1 thead")][0].textContent];
    """
    (first, second), heading = browser.check(pages["both"], act=act)["acted"]
    assert first == second
    assert "first" in heading
    assert "second" in heading


@pytest.mark.slow
def test_wide_pictures_are_as_wide_as_their_frames_are(browser: Browser, pages: dict[str, Path]) -> None:
    act = """document.querySelectorAll("[data-mode]").forEach((button) => button.click());
      return [...document.querySelectorAll(".example .window")].map((each) => each.getBoundingClientRect())
      .map((box) => [box.width, box.width / box.height]);"""
    found = browser.check(pages["whole"], act=act)["acted"]
    assert len(found) == 2 * (1 + 4 + 4 + 5 + 5)
    for width, aspect in found:
        assert width > 180
        assert 1.6 < aspect < 2.4
