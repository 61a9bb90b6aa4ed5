"""Contact sheets show the dataset's features, all of them in the same colours."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_features import FRAMES, GRID, DrawnWorld, draw_clips, write_features
from PIL import Image

from deltacache.evaluate.report.contact_sheet import write_contact_sheet
from deltacache.evaluate.report.strips import fit_projection, gap_of
from deltacache.schemas.errors import DatasetError, DeltacacheError


def films_of(page: Path) -> list[np.ndarray]:
    contents = re.findall(r'src="data:image/webp;base64,([^"]+)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in contents]


def test_a_page_shows_every_frame_of_every_clip(evaluated: DrawnWorld, tmp_path: Path) -> None:
    page = write_contact_sheet(str(evaluated.features), tmp_path / "sheet.html")
    tokens = [clip.tokens.astype(np.float16) for clip in draw_clips()]
    projection = fit_projection(tokens)
    films = films_of(page)
    assert len(films) == len(tokens)
    scale = films[0].shape[0] // GRID[0]
    width = scale * GRID[1]
    for film, clip in zip(films, tokens, strict=True):
        for at in range(FRAMES):
            start = at * (width + gap_of(width))
            shown = film[scale // 2 :: scale, start + scale // 2 : start + width : scale]
            assert np.array_equal(shown, projection.picture(clip[at], GRID))
    text = page.read_text()
    assert all(f"{clip.name}-v000" in text for clip in draw_clips())
    assert not re.search(r"https?://|<script|<link", text)


def test_a_picture_has_content(evaluated: DrawnWorld, tmp_path: Path) -> None:
    with Image.open(write_contact_sheet(str(evaluated.features), tmp_path / "new" / "sheet.png")) as sheet:
        pixels = np.asarray(sheet)
    assert min(pixels.shape[:2]) > 200
    assert (np.ptp(pixels, axis=-1) > 60).mean() > 0.1


def test_large_datasets_are_sampled(
    evaluated: DrawnWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltacache.evaluate.report.contact_sheet._MOST_CLIPS", 3)
    monkeypatch.setattr("deltacache.evaluate.report.contact_sheet._MOST_TOKENS", 50)
    page = write_contact_sheet(str(evaluated.features), tmp_path / "sheet.html")
    assert len(films_of(page)) == 3
    assert "3 of 10 clips" in page.read_text()


def test_refusals(evaluated: DrawnWorld, tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match=r"sheet\.jpg is neither a \.png nor a \.html"):
        write_contact_sheet(str(evaluated.features), tmp_path / "sheet.jpg")
    empty = write_features(tmp_path / "empty", [])
    with pytest.raises(DatasetError, match="holds no clips"):
        write_contact_sheet(str(empty), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
