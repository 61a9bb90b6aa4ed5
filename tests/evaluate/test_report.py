"""The page stands alone, its pictures show something, and they show the right thing."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_features import FRAMES, SCENES, DrawnWorld
from PIL import Image

from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.examples import load_examples
from deltacache.evaluate.output import find_curves, keep_curves
from deltacache.evaluate.report.page import ReportInput, clips_to_show, write_report
from deltacache.evaluate.report.panels import panels
from deltacache.evaluate.report.runs import open_runs
from deltacache.evaluate.report.strips import change_picture, fit_projection, gap_of
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import SilentReporter

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Collects pictures and text of a page or one of its sections, and checks that tags are closed in order."""

    def __init__(self, path: Path, section: str = "") -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.charts: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self._open: list[str] = []
        text = path.read_text()
        start = text.index(f'<section id="{section}">') if section else 0
        self.feed(text[start : text.index("</section>", start) + len("</section>")] if section else text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if dict(attrs).get("role") == "img":
            self.charts.append(dict(attrs)["aria-label"] or "")
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def strip_of(image: dict[str, str | None]) -> np.ndarray:
    """(h, w, 4) uint8 of a strip."""
    content = base64.b64decode((image["src"] or "").split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def cells_of(image: dict[str, str | None], width: int) -> np.ndarray:
    """(n, h, width, 4) uint8: the pictures of a strip, without the gaps."""
    strip = strip_of(image)
    cell = width + gap_of(width)
    assert strip.shape[1] % cell == 0
    return np.stack([strip[:, at : at + width] for at in range(0, strip.shape[1], cell)])


def frames_of(clip_id: str) -> np.ndarray:
    """Frames (T, 24, 24, 3) that differ between clips and over time."""
    rng = np.random.default_rng(sum(clip_id.encode()))
    return rng.integers(0, 256, (FRAMES, 24, 24, 3), dtype=np.uint8)


@pytest.fixture
def out(evaluated: DrawnWorld, tmp_path: Path) -> Path:
    """A copy of an evaluation, with training curves."""
    folder = Path(shutil.copytree(evaluated.root / "out", tmp_path / "out"))
    steps = list(range(10, 1010, 10))
    curve = {"step": steps, "loss": [1 / step for step in steps], "mse": [2 / step for step in steps]}
    for name in ("tokenizer", *(world.fingerprint for world in load_examples(folder / "examples")[0].worlds)):
        pq.write_table(pa.table(curve), folder / "curves" / f"{name}.parquet")
    return folder


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(out: Path) -> None:
    page = Page(write_report(out))
    assert page.sources
    assert all(source.startswith(("data:image/webp", "#")) for source in page.sources)
    text = (out / "report.html").read_text()
    assert not re.search(r"https?://|@import|<link|<script [^>]*src", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert len(text) < 15_000_000


@pytest.mark.slow
def test_links_lead_to_sections_and_no_name_is_used_twice(out: Path) -> None:
    text = write_report(out).read_text()
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used
    assert used <= set(names)


@pytest.mark.slow
def test_every_picture_has_an_alt_text_and_content(out: Path) -> None:
    page = Page(write_report(ReportInput(out, frames_of)))
    assert all(image["alt"] for image in page.images)
    constant = [image["alt"] for image in page.images if np.ptp(strip_of(image)[..., :3]) == 0]
    assert not constant
    # feature loss, two horizons by number of samples, two rank histograms, spread, and two of training
    assert len(page.charts) == 1 + 2 + 3 + 2
    assert all(page.charts)


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_the_table(out: Path) -> None:
    text = Page(write_report(out)).text
    for row in pq.read_table(out / "metrics.parquet").to_pylist():
        if "/" not in row["metric"]:
            assert any(f"{row['value']:.{digits}f}" in text for digits in (2, 3, 4, 5, 6)), row
    for words in ("noise, best of 6", "DeltaWorld, learned query", "DeltaTok, swapped token", "scene0"):
        assert words in text
    assert f"of {SCENES} scenes" in text
    assert "In single features the samples are too alike" in text
    assert "Spread over error: 1 step ahead" in text
    assert "<strong>" in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_page_opens_with_a_sentence_and_futures_behind_their_past(out: Path) -> None:
    text = write_report(out).read_text()
    opening = text[text.index("<h1>") : text.index("<nav")]
    assert re.search(r'<p class="headline">\s*The best of 6 futures of noise ', opening)
    count = opening.count("<img ")
    example = load_examples(out / "examples")[0]
    strips = {image["alt"] or "": image for image in Page(out / "report.html").images[:count]}
    features = {alt: image for alt, image in strips.items() if alt.startswith("Features")}
    assert sum("true future" in alt for alt in features) == 2
    assert sum("noise: future" in alt for alt in features) == 3
    pasts = [cells_of(image, example.grid[1])[: example.context] for image in features.values()]
    assert pasts[0][..., 3].all()
    assert all(np.array_equal(past, pasts[0]) for past in pasts)


@pytest.mark.slow
def test_what_was_evaluated_is_said(out: Path, evaluated: DrawnWorld) -> None:
    text = Page(write_report(out)).text
    for row in pq.read_table(out / "metrics.parquet").to_pylist():
        assert all(row[name] in text for name in ("backbone", "tokenizer", "world") if row[name])
    assert str(evaluated.features) in text
    assert f"clips: {2 * SCENES} sequences" in text


@pytest.mark.slow
def test_examples_show_every_future_and_sample(out: Path) -> None:
    pixels = {clip_id: frames_of(clip_id) for clip_id in clips_to_show(out)}
    page = Page(write_report(ReportInput(out, pixels)), "examples")
    alts = [image["alt"] or "" for image in page.images]
    examples = load_examples(out / "examples")
    assert len(examples) == 2
    assert sum(bool(re.match(r"Features, noise: future \d", alt)) for alt in alts) == 2 * 6
    assert sum(alt.startswith("Features, learned: its one future") for alt in alts) == 2
    assert sum(alt.startswith("Features, average of 6") for alt in alts) == 2
    frames = [image for image in page.images if (image["alt"] or "").startswith("Frames")]
    expected = [frames_of(clip_id) for example in examples for clip_id in example.clip_ids]
    assert len(frames) == len(expected) == 2 * 2
    for image, own in zip(frames, expected, strict=True):
        for cell, frame in zip(cells_of(image, 24), own, strict=True):
            errors = [np.abs(cell[..., :3].astype(int) - other).mean() for clip in expected for other in clip]
            assert np.abs(cell[..., :3].astype(int) - frame).mean() == min(errors)


@pytest.mark.slow
def test_further_futures_are_folded_and_rows_are_defined(out: Path) -> None:
    text = write_report(out).read_text()
    unfolded = re.sub(
        r'<details class="futures">.*?</details>', "", text[text.index('id="examples"') :], flags=re.DOTALL
    )
    assert len(re.findall(r'alt="Features, noise: future', unfolded)) == 2 * 3
    assert text.count("<summary>3 more futures</summary>") == 2 * 2
    defined = re.findall(r"<dt>(.*?)</dt><dd>.", text)
    (run,) = open_runs([out])
    for line in panels({"": run.metrics}, {"": run.names})[0].lines:
        assert any(line.label.startswith(name) for name in defined), line.label


@pytest.mark.slow
def test_true_futures_are_shown_under_their_names(out: Path) -> None:
    page, examples = Page(write_report(out), "examples"), load_examples(out / "examples")
    projection = fit_projection([array for each in examples for array in (each.patch_tokens, each.futures)])
    for at, name in enumerate(("left", "right")):
        shown = [
            image
            for image in page.images
            if (image["alt"] or "").startswith(f"Features, true future: {name}")
        ]
        for image, example in zip(shown, examples, strict=True):
            tokens = np.concatenate([example.patch_tokens[: example.context], example.futures[at]])
            expected = [projection.picture(each, example.grid) for each in tokens]
            assert np.array_equal(cells_of(image, example.grid[1])[..., :3], expected)
    for example in examples:
        assert example.outcomes == ("left", "right")
        assert np.array_equal(example.futures[0], example.patch_tokens[example.context :])
        assert example.seconds[0] == 0


@pytest.mark.slow
def test_strips_of_futures_are_empty_where_frames_were_seen(out: Path) -> None:
    page, examples = Page(write_report(out), "examples"), load_examples(out / "examples")
    (image, *_) = [image for image in page.images if re.match(r"Features, noise: future", image["alt"] or "")]
    cells = cells_of(image, examples[0].grid[1])
    context = examples[0].context
    assert not cells[:context].any()
    assert (cells[context:, ..., 3] == 255).all()


@pytest.mark.slow
def test_pixels_are_kept_for_the_next_report(out: Path) -> None:
    first = write_report(ReportInput(out, frames_of)).read_bytes()
    assert b"Frames, true future" in first
    assert write_report(out).read_bytes() == first


def test_text_from_outside_is_escaped(drawn: DrawnWorld) -> None:
    settings = drawn.settings(dataset="<script>alert(1)</script>", worlds=(), futures=None)
    evaluate_clips(settings, SilentReporter())
    assert "<script>alert" not in write_report(settings.out).read_text()


def test_without_models_there_is_still_a_page(drawn: DrawnWorld) -> None:
    settings = drawn.settings(tokenizer=None, worlds=(), futures=None, examples=1)
    evaluate_clips(settings, SilentReporter())
    text = Page(write_report(settings.out)).text
    assert "Copy of the last frame" in text
    assert not any(words in text for words in ("Training", "Calibration", "Number of samples"))


@pytest.mark.slow
def test_a_page_that_would_be_too_large_shows_less(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(write_report(out).read_bytes())
    strips = len(Page(out / "report.html").images)
    monkeypatch.setattr("deltacache.evaluate.report.page.MOST_BYTES", whole - 1)
    smaller = Page(write_report(out))
    assert len((out / "report.html").read_bytes()) < whole
    assert 0 < len(smaller.images) < strips
    monkeypatch.setattr("deltacache.evaluate.report.page.MOST_BYTES", 10_000)
    with pytest.raises(DatasetError, match=r"would be .* even with few pictures; the limit is"):
        write_report(out)


def test_a_folder_that_is_no_evaluation_is_refused(drawn: DrawnWorld) -> None:
    with pytest.raises(DatasetError, match=r"metrics\.parquet does not exist"):
        write_report(drawn.features)


@pytest.mark.parametrize("name", ["metrics.parquet", "curves/tokenizer.parquet"])
def test_damaged_tables_are_refused(out: Path, name: str) -> None:
    (out / name).write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=name.rsplit("/", maxsplit=1)[-1]):
        write_report(out)


@pytest.mark.slow
def test_damaged_examples_are_refused(out: Path) -> None:
    path = next((out / "examples").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=path.name):
        write_report(out)


def test_equal_features_have_equal_colours_and_predictions_do_not_move_them() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(5, 6, 32)) @ rng.normal(size=(32, 32))
    projection = fit_projection([true])
    picture = projection.picture(true[0], (2, 3))
    assert picture.shape == (2, 3, 3)
    assert np.array_equal(picture, fit_projection([true]).picture(true[0].copy(), (2, 3)))
    # the first axis is the direction in which true features vary most
    centred = true.reshape(-1, 32) - true.reshape(-1, 32).mean(0)
    largest = np.linalg.svd(centred, compute_uv=False)[0]
    assert np.linalg.norm(centred @ projection.axes[0]) == pytest.approx(largest, rel=1e-4)


def test_change_is_opaque_where_a_patch_moved_most() -> None:
    before = np.zeros((6, 4))
    tokens = before.copy()
    tokens[4, 1], tokens[2, 0] = 3.0, 1.5
    alpha = change_picture(tokens, before, (2, 3), largest=3.0)[..., 3]
    assert alpha.tolist() == [[0, 0, 128], [0, 255, 0]]


def test_curves_are_found_from_any_part_of_a_training_output(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000500"
    checkpoint.mkdir(parents=True)
    assert find_curves(checkpoint) is None
    curves = tmp_path / "run" / "curves.parquet"
    curves.touch()
    assert find_curves(checkpoint) == curves
    assert find_curves(tmp_path / "run") == curves


def test_the_curves_of_every_tokenizer_are_kept(tmp_path: Path) -> None:
    out, runs = tmp_path / "out", [tmp_path / name for name in ("first", "second", "world")]
    out.mkdir()
    for run in runs:
        run.mkdir()
        (run / "curves.parquet").write_text(run.name)
    keep_curves(out, runs[:2], ["0123456789abcdef"], runs[2:])
    kept = {path.name: path.read_text() for path in (out / "curves").iterdir()}
    assert kept == {
        "tokenizer.parquet": "first",
        "tokenizer-2.parquet": "second",
        "0123456789abcdef.parquet": "world",
    }
