"""The page and the movie of one prediction: the past, then the futures side by side, the truth beside them.

Shapes: C context, H steps, K of them that the video goes on for, S samples, s of them that are shown, N patches,
D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deltacache.evaluate.clips.scenes import NOTHING_REACHED
from deltacache.evaluate.examples import Example, ExampleMaps, ExampleWorld, MapKind, MapMaker, example_maps
from deltacache.evaluate.report.charts import Chart, Style, draw_svg, legend, series_colour
from deltacache.evaluate.report.panels import METHOD_LABELS
from deltacache.evaluate.report.strips import (
    Detail,
    class_colours,
    depth_colours,
    example_views,
    fit_projection,
    page_template,
)
from deltacache.pipeline.storage.files import write_bytes
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.texts import disk_text

MOST_SHOWN = 20
"""Samples on the page and in the movie; the tensors hold all."""
_MOST_BYTES = 15_000_000
_DETAILS = tuple(
    Detail(*each, branching=True) for each in ((20, 16, 192), (20, 12, 128), (12, 8, 96), (6, 6, 64))
)


@dataclass(frozen=True)
class PastAndFutures:
    """What is shown of one sequence and its sampled futures.

    Attributes:
        world: fingerprint of the world model, whose name in tables is ``method``.
        times_s: (C+H,) seconds since the first frame of the video.
        tokens: (C+K, N, D) float32, true.
        futures: (S, H, N, D) float32.
        pixels: (C+K, h, w, 3) uint8, or ``None``.
        spread: (H,) root mean square difference of two samples.
        distance: (S, K) that of each sample to the truth; ``copy_last`` (K,) that of the last seen frame.
        maps: what heads and a decoder of pictures make of the true frames and of the first s samples.
    """

    title: str
    method: str
    world: str
    context: int
    grid: tuple[int, int]
    times_s: np.ndarray
    tokens: np.ndarray
    futures: np.ndarray
    pixels: np.ndarray | None
    spread: np.ndarray
    distance: np.ndarray
    copy_last: np.ndarray
    maps: tuple[ExampleMaps, ...] = ()

    @property
    def ahead_s(self) -> np.ndarray:
        """(C+H,) seconds from the last seen frame."""
        return self.times_s - self.times_s[self.context - 1]

    def with_maps(self, makers: Sequence[MapMaker], tokens: Tensor, futures: Tensor) -> "PastAndFutures":
        """The same with maps of ``tokens`` (C+K, N, D) and of the first ``futures`` (S, H, N, D)."""
        shown = {self.world: futures[:MOST_SHOWN]}
        return replace(self, maps=tuple(example_maps(iter(makers), tokens, tokens[:0], shown)))


def write_page(prediction: PastAndFutures, path: Path) -> None:
    """Write one HTML page that needs nothing but itself.

    Raises:
        DatasetError: even with few pictures it is too large.
    """
    template = page_template("prediction.html")
    example, context = _example(prediction), _page_context(prediction)
    frames = {example.clip_ids[0]: prediction.pixels}
    page = b""
    for detail in _DETAILS:
        (view,) = example_views([example], lambda clip_id: frames[clip_id], detail)
        page = template.render(example=view, **context).encode()
        if len(page) <= _MOST_BYTES:
            write_bytes(path, page)
            return
    raise DatasetError(
        f"the page would be {disk_text(len(page))} even with few pictures; the limit is {disk_text(_MOST_BYTES)}: "
        "give fewer --steps or --head"
    )


def _example(prediction: PastAndFutures) -> Example:
    """As the report's examples are, with every sample that is shown."""
    samples = len(prediction.futures)
    none = np.full(samples, NOTHING_REACHED)
    world = ExampleWorld(
        method=prediction.method,
        fingerprint=prediction.world,
        samples=prediction.futures[:MOST_SHOWN],
        mean=prediction.futures[:, -1].mean(0),
        best=int(prediction.distance[:, -1].argmin()) if prediction.distance.shape[1] else -1,
        nearest=none,
        reached=none,
    )
    return Example(
        title="One past, many futures" if samples > 1 else "One past, one future",
        clip_ids=("this",),
        outcomes=("",),
        context=prediction.context,
        grid=prediction.grid,
        seconds=prediction.times_s - prediction.times_s[0],
        patch_tokens=prediction.tokens,
        futures=prediction.tokens[None, prediction.context :],
        reconstruction=prediction.tokens[:0],
        worlds=(world,),
        maps=prediction.maps,
    )


_SPREAD, _NEAREST, _MEAN, _COPY = (
    "between two samples",
    "nearest sample to the true future",
    "samples to the true future, on average",
    "last seen frame to the true future",
)
_STYLES = {
    _SPREAD: Style(4, ""),
    _NEAREST: Style(1, ""),
    _MEAN: Style(6, "", (4, 2)),
    _COPY: Style(0, "", (1, 1.5)),
}


def _page_context(prediction: PastAndFutures) -> dict[str, Any]:
    samples, steps = prediction.futures.shape[:2]
    ahead = prediction.ahead_s[prediction.context :]
    curves: dict[str, np.ndarray] = {}
    if samples > 1:
        curves[_SPREAD] = prediction.spread
    if prediction.distance.shape[1]:
        curves[_NEAREST] = prediction.distance.min(0)
        if samples > 1:
            curves[_MEAN] = prediction.distance.mean(0)
        curves[_COPY] = prediction.copy_last

    def draw(axes: Axes) -> None:
        for name, values in curves.items():
            style = _STYLES[name]
            axes.plot(ahead[: len(values)], values, color=series_colour(style.colour), linewidth=1.5, marker="o",
                      markersize=3, linestyle=(0, style.dash) if style.dash else "-")  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds ahead")
        axes.set_ylabel("difference")

    ends = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in curves.items())
    method = METHOD_LABELS.get(prediction.method, prediction.method)
    many = f"{samples} futures" if samples > 1 else "One future"
    return {
        "headline": f"{many} of {prediction.title}: {ahead[-1]:.1f} s ahead by {method}",
        "title": prediction.title,
        "context": prediction.context,
        "several": samples > 1,
        "known": bool(prediction.distance.shape[1]),
        "chart": Chart("", draw_svg(draw), f"Differences by seconds ahead: {ends}."),
        "legend": legend((name, _STYLES[name], False) for name in curves),
        "columns": list(curves),
        "rows": [
            (
                f"{ahead[step]:.2f}",
                [f"{values[step]:.3g}" if step < len(values) else "" for values in curves.values()],
            )
            for step in range(steps)
        ],
    }


# ----------------------------------------------------------------------------------------------------
# The movie: the video and what is expected of it, moment by moment; every future starts with the past.
# ----------------------------------------------------------------------------------------------------


_TILE, _COLUMNS, _GAP, _TOP = 96, 5, 10, 30
_SEEN, _PREDICTED, _TRUE = "#57606a", "#c65200", "#0072b2"
_PAGE = "#ffffff"
_PAINTS: dict[MapKind, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "rgb": ("decoded", lambda picture: picture),
    "segmentation": ("classes", class_colours),
    "depth": ("depth", depth_colours),
}
_SHORTEST_S, _LAST_S = 0.25, 1.5


def write_movie(prediction: PastAndFutures, path: Path) -> None:
    """Write an MP4 or, where ``path`` ends in ``.gif``, an animation that repeats."""
    frames = [_moment(prediction, at) for at in range(len(prediction.times_s))]
    steps = np.diff(prediction.times_s, append=prediction.times_s[-1] + _LAST_S)
    seconds = [max(_SHORTEST_S, float(each)) for each in steps]
    if path.suffix == ".gif":
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=[round(1000 * each) for each in seconds],
            loop=0,
            optimize=True,
        )
        return
    rate = 12
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for frame, length in zip(frames, seconds, strict=True):
            shown = av.VideoFrame.from_image(frame)
            for _ in range(max(1, round(length * rate))):
                container.mux(stream.encode(shown.reformat(format="yuv420p")))
        container.mux(stream.encode(None))


def _moment(prediction: PastAndFutures, at: int) -> Image.Image:
    """One frame of the movie: on the left the video and its features, on the right every future."""
    seen, count = at < prediction.context, min(len(prediction.futures), MOST_SHOWN)
    columns = min(_COLUMNS, count)
    rows = max(2, -(-count // columns))
    height, width = (max(1, round(_TILE * side / max(prediction.grid))) for side in prediction.grid)
    left = 2 * width + 3 * _GAP
    size = (left + columns * (width + _GAP) + _GAP, _TOP + rows * (height + _GAP) + _GAP)
    canvas = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), _PAGE)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    said = f"{prediction.ahead_s[at]:+.2f} s".replace("-", "\N{MINUS SIGN}")
    draw.text((_GAP, 6), "seen" if seen else "true future", fill=_SEEN if seen else _TRUE, font=font)
    many = f"{count} futures" if count > 1 else "one future"
    draw.text((left, 6), f"{said}  {'seen' if seen else many}", fill=_SEEN if seen else _PREDICTED, font=font)
    look, true_look, future_look = _looks(prediction)
    known = at < len(prediction.tokens)
    big = (2 * height + _GAP, 2 * width + _GAP)
    if known:
        picture = prediction.pixels[at] if prediction.pixels is not None else true_look(at)
        _paste(canvas, picture, (_GAP, _TOP), big, _SEEN if seen else _TRUE)
    else:
        draw.text((2 * _GAP, _TOP + _GAP), "the video has ended", fill=_SEEN, font=ImageFont.load_default(12))
    if known and rows > 2 and prediction.pixels is not None:
        below = _TOP + 2 * (height + _GAP)
        _paste(canvas, true_look(at), (_GAP, below), (height, width), _SEEN if seen else _TRUE)
        draw.text((width + 2 * _GAP, below), look, fill=_SEEN, font=ImageFont.load_default(12))
    for sample in range(count):
        row, column = divmod(sample, columns)
        place = (left + column * (width + _GAP), _TOP + row * (height + _GAP))
        picture = true_look(at) if seen else future_look(sample, at - prediction.context)
        _paste(canvas, picture, place, (height, width), _SEEN if seen else _PREDICTED)
    return canvas


def _looks(prediction: PastAndFutures) -> tuple[str, Any, Any]:
    """What futures are shown as, and the pictures of truth and samples.

    Decoded pictures if there are any, then classes, depth, features.
    """
    by_kind = {maps.kind: maps for maps in prediction.maps}
    kind: MapKind | None = next((each for each in _PAINTS if each in by_kind), None)
    if kind is not None:
        text, paint = _PAINTS[kind]
        truth, samples = by_kind[kind].truth, by_kind[kind].samples[prediction.world]
        return text, lambda at: paint(truth[at]), lambda sample, step: paint(samples[sample, step])
    projection = fit_projection([prediction.tokens])
    return (
        "features",
        lambda at: projection.picture(prediction.tokens[at], prediction.grid),
        lambda sample, step: projection.picture(prediction.futures[sample, step], prediction.grid),
    )


def _paste(
    canvas: Image.Image, picture: np.ndarray, place: tuple[int, int], size: tuple[int, int], colour: str
) -> None:
    """A picture (h, w, 3 or 4) at ``place`` (left, top) in ``size`` (height, width), in a frame of that colour."""
    height, width = size
    image = Image.fromarray(picture).convert("RGBA")
    patches = 4 * max(picture.shape[:2]) <= max(size)  # of so few each should be seen
    image = image.resize((width, height), Image.Resampling.NEAREST if patches else Image.Resampling.LANCZOS)
    canvas.paste(image, place, image)
    left, top = place
    ImageDraw.Draw(canvas).rectangle(
        (left - 2, top - 2, left + width + 1, top + height + 1), outline=colour, width=2
    )
