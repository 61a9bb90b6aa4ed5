"""A contact sheet of a feature dataset: what its features see, as colours. It shows no frames: they are not stored.

Shapes: T frames, N patches, D hidden.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deltacache.evaluate.examples import spread
from deltacache.evaluate.report.strips import Projection, film, fit_projection, page_template, webp_uri
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.storage.files import write_bytes
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.errors import DatasetError, DeltacacheError

_MOST_CLIPS = 24
_MOST_FRAMES = 8
_MOST_TOKENS = 20_000  # that the colours are fitted to
_CELL = 72  # pixels of a picture, about
_MARGIN, _LINE = 16, 18
_SUFFIXES = (".png", ".html")


@dataclass(frozen=True, repr=False)
class SheetRow:
    """One clip: ``film`` (h, w, 4) uint8, its frames side by side."""

    clip_id: str
    note: str
    film: np.ndarray


def write_contact_sheet(root: AnyPath | str, path: Path) -> Path:
    """Write a PNG or a self-contained HTML page of clips spread over the dataset; all share their colours.

    Raises:
        DeltacacheError: ``path`` is neither .png nor .html.
        DatasetError: ``root`` is not a finished feature dataset, is empty or damaged.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise DeltacacheError(f"{path} is neither a .png nor a .html: give a name that ends in one of these")
    dataset = open_dataset(root, "features")
    if not len(dataset):
        raise DatasetError(f"{root} holds no clips: there is nothing to show")
    rows = _rows(dataset)
    title = f"{len(rows)} of {len(dataset)} clips of {root}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".html":
        shown = [(row, webp_uri(row.film, lossless=True)) for row in rows]
        content = page_template("contact_sheet.html").render(title=title, rows=shown).encode()
    else:
        content = _png(title, rows)
    write_bytes(path, content)
    return path


def _rows(dataset: Dataset) -> list[SheetRow]:
    chosen = spread(range(len(dataset)), _MOST_CLIPS)
    frames = spread(range(dataset.card.sampling.frames), _MOST_FRAMES)
    tokens = [dataset.read_frames(clip, frames[0], frames[-1] + 1) for clip in chosen]
    tokens = [each[[at - frames[0] for at in frames]] for each in tokens]
    projection = fit_projection(_thinned(tokens))
    return [_row(dataset, clip, each, frames, projection) for clip, each in zip(chosen, tokens, strict=True)]


def _thinned(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every n-th token of the clips (T, N, D), so that fitting colours stays quick at any size."""
    count = sum(each.shape[0] * each.shape[1] for each in tokens)
    step = -(-count // _MOST_TOKENS)
    return [each.reshape(-1, each.shape[-1])[::step] for each in tokens]


def _row(
    dataset: Dataset, clip: int, tokens: np.ndarray, frames: Sequence[int], projection: Projection
) -> SheetRow:
    grid = dataset.card.patch_grid
    scale = max(1, round(_CELL / grid[1]))
    pictures = [projection.picture(each, grid).repeat(scale, 0).repeat(scale, 1) for each in tokens]
    seconds = dataset.timestamps_s[clip][list(frames)]
    note = f"{seconds[0]:.2f} to {seconds[-1]:.2f} s"
    return SheetRow(dataset.clip_ids[clip], note, film(pictures, max(pictures[0].shape)))


def _png(title: str, rows: Sequence[SheetRow]) -> bytes:
    height, width = rows[0].film.shape[:2]
    columns = 2 if len(rows) > 1 and width < 4 * height * 3 else 1
    lines = -(-len(rows) // columns)
    size = (_MARGIN + columns * (width + _MARGIN), 2 * _MARGIN + _LINE + lines * (height + _LINE + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_MARGIN, _MARGIN // 2), title, fill="black", font=font)
    for at, row in enumerate(rows):
        left = _MARGIN + at % columns * (width + _MARGIN)
        top = _MARGIN + _LINE + at // columns * (height + _LINE + _MARGIN)
        draw.text(
            (left, top), _clipped(draw, f"{row.clip_id}, {row.note}", width, font), fill="#57606a", font=font
        )
        picture = Image.fromarray(row.film)
        sheet.paste(picture, (left, top + _LINE), picture)
    buffer = io.BytesIO()
    sheet.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _clipped(draw: ImageDraw.ImageDraw, text: str, width: int, font: object) -> str:
    """As much of the end of ``text`` as fits."""
    if draw.textlength(text, font=font) <= width:  # pyright: ignore[reportArgumentType]
        return text
    while text and draw.textlength("…" + text, font=font) > width:  # pyright: ignore[reportArgumentType]
        text = text[1:]
    return "…" + text
