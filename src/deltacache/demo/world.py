"""The demo's videos: a world in which every future is known.

A shape drives up a road, reaches a T-junction in the fourth frame and goes left or right, with equal
chance or other odds. Nothing before the turn tells which: the outcome is drawn apart from everything that
is seen.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.progress import Reporter, SilentReporter
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# How the junction looks and how the shape moves: pure functions from a scene to pixels.
#
# Lengths and positions are shares of the frame's side, x to the right and y down.
# ----------------------------------------------------------------------------------------------------


Outcome = Literal["left", "right"]
Kind = Literal["disc", "square", "diamond"]
Colour = tuple[int, int, int]
"""RGB, 0-255."""
Point = tuple[float, float]

FRAMES = 8
CONTEXT_FRAMES = 4

_KINDS: tuple[Kind, ...] = ("disc", "square", "diamond")
_SUPERSAMPLING = 4
_SUBPIXEL_BITS = 4
_ROAD_HALF_WIDTH = 0.135


_RED, _ORANGE, _YELLOW = (226, 50, 56), (250, 130, 30), (250, 204, 40)
_LIME, _CYAN, _BLUE = (150, 230, 60), (30, 200, 214), (40, 80, 230)
_MAGENTA, _WHITE, _DARK = (214, 66, 190), (250, 250, 250), (26, 26, 34)


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one scenery, and those of the shapes that stand out from it."""

    ground: Colour
    road: Colour
    kerb: Colour
    marking: Colour
    plant: Colour
    bodies: tuple[Colour, Colour, Colour]


_MEADOW = Palette(
    ground=(112, 168, 84),
    road=(92, 96, 104),
    kerb=(206, 208, 202),
    marking=(240, 240, 232),
    plant=(52, 110, 58),
    bodies=(_RED, _YELLOW, _WHITE),
)
_DESERT = Palette(
    ground=(222, 190, 130),
    road=(150, 112, 84),
    kerb=(240, 220, 176),
    marking=(250, 236, 204),
    plant=(150, 140, 70),
    bodies=(_CYAN, _BLUE, _DARK),
)
_SNOW = Palette(
    ground=(228, 236, 244),
    road=(128, 142, 160),
    kerb=(186, 198, 214),
    marking=(246, 250, 255),
    plant=(70, 116, 122),
    bodies=(_RED, _ORANGE, _DARK),
)
_NIGHT = Palette(
    ground=(38, 46, 78),
    road=(70, 70, 96),
    kerb=(112, 112, 150),
    marking=(244, 214, 120),
    plant=(26, 78, 84),
    bodies=(_YELLOW, _LIME, _WHITE),
)
_AUTUMN = Palette(
    ground=(204, 138, 74),
    road=(84, 78, 82),
    kerb=(224, 196, 164),
    marking=(246, 226, 190),
    plant=(164, 66, 42),
    bodies=(_YELLOW, _MAGENTA, _WHITE),
)
_HARBOUR = Palette(
    ground=(72, 148, 190),
    road=(176, 140, 98),
    kerb=(122, 92, 62),
    marking=(214, 184, 142),
    plant=(214, 236, 240),
    bodies=(_CYAN, _BLUE, _DARK),
)
_PALETTES = (_MEADOW, _DESERT, _SNOW, _NIGHT, _AUTUMN, _HARBOUR)


@dataclass(frozen=True, slots=True)
class DrawnScene:
    """All that is seen of one video, except which way the shape turns.

    ``speed`` is in sides a frame; ``plants`` are (x, y, radius); ``grain`` seeds the ground's texture.
    """

    palette: Palette
    kind: Kind
    colour: Colour
    radius: float
    speed: float
    junction: Point
    plants: tuple[tuple[float, float, float], ...]
    grain: int

    def position(self, frame: int, outcome: Outcome) -> Point:
        """Centre of the shape; it is at the junction in the last context frame."""
        x, y = self.junction
        travelled = self.speed * (frame - (CONTEXT_FRAMES - 1))
        if travelled <= 0:
            return x, y - travelled
        return (x - travelled if outcome == "left" else x + travelled), y


def draw_scene(rng: np.random.Generator) -> DrawnScene:
    """Draw how a scene looks and moves; without the way the shape turns."""
    palette = _PALETTES[rng.integers(len(_PALETTES))]
    junction = (0.5 + rng.uniform(-0.015, 0.015), 0.36 + rng.uniform(-0.015, 0.015))
    return DrawnScene(
        palette=palette,
        kind=_KINDS[rng.integers(len(_KINDS))],
        colour=palette.bodies[rng.integers(len(palette.bodies))],
        radius=rng.uniform(0.105, 0.12),
        speed=rng.uniform(0.114, 0.128),
        junction=junction,
        plants=_draw_plants(junction, rng),
        grain=int(rng.integers(2**31)),
    )


def draw_video(scene: DrawnScene, outcome: Outcome, image_size: int) -> np.ndarray:
    """Frames (T, S, S, 3) uint8 RGB; the first four do not depend on ``outcome``."""
    canvas = _Canvas(image_size)
    palette = scene.palette
    canvas.pixels[...] = palette.ground
    grain = np.random.default_rng(scene.grain)
    for x, y, shade in grain.uniform(0, 1, (60, 3)):
        canvas.disc((x, y), 0.012, _shaded(palette.ground, 0.92 + 0.16 * shade))
    _draw_road(canvas, scene.junction, _ROAD_HALF_WIDTH + 0.022, palette.kerb)
    _draw_road(canvas, scene.junction, _ROAD_HALF_WIDTH, palette.road)
    _draw_markings(canvas, scene.junction, palette.marking)
    for x, y, radius in scene.plants:
        canvas.disc((x + 0.012, y + 0.016), radius, _shaded(palette.ground, 0.72))
        canvas.disc((x, y), radius, palette.plant)
        canvas.disc((x - 0.25 * radius, y - 0.3 * radius), 0.5 * radius, _shaded(palette.plant, 1.25))
    scenery = canvas.pixels.copy()
    frames = np.empty((FRAMES, image_size, image_size, 3), np.uint8)
    for frame in range(FRAMES):
        canvas.pixels[...] = scenery
        _draw_shape(canvas, scene, scene.position(frame, outcome))
        frames[frame] = canvas.finish()
    return frames


def _draw_plants(junction: Point, rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    """Where plants stand: beside the stem and above the arms, never on the road."""
    x, y = junction
    margin = _ROAD_HALF_WIDTH + 0.05
    regions = (
        ((0.0, x - margin), (y + margin, 1.0)),
        ((x + margin, 1.0), (y + margin, 1.0)),
        ((0.0, 1.0), (0.0, y - margin)),
    )
    plants: list[tuple[float, float, float]] = []
    for (left, right), (top, bottom) in regions:
        for _ in range(rng.integers(2, 5)):
            radius = rng.uniform(0.03, 0.06)
            across = rng.uniform(left, right - radius) if right < 1 else rng.uniform(left + radius, right)
            down = rng.uniform(top, bottom - radius) if bottom < 1 else rng.uniform(top + radius, bottom)
            plants.append((across, down, radius))
    return tuple(plants)


class _Canvas:
    """Draws in shares of the side on a larger picture, which ``finish`` averages down."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.side = image_size * _SUPERSAMPLING
        self.pixels = np.zeros((self.side, self.side, 3), np.uint8)

    def fixed(self, value: float) -> int:
        """A share of the side as OpenCV's fixed-point number."""
        return round(value * self.side * 2**_SUBPIXEL_BITS)

    def polygon(self, points: np.ndarray, colour: Colour) -> None:
        """Fill a convex polygon of (P, 2) points."""
        corners = np.array([[self.fixed(x), self.fixed(y)] for x, y in points], np.int32)
        cv2.fillConvexPoly(self.pixels, corners, colour, cv2.LINE_AA, _SUBPIXEL_BITS)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]), colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        at = (self.fixed(centre[0]), self.fixed(centre[1]))
        cv2.circle(self.pixels, at, self.fixed(radius), colour, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL_BITS)

    def finish(self) -> np.ndarray:
        """(S, S, 3) uint8."""
        return cv2.resize(self.pixels, (self.image_size, self.image_size), interpolation=cv2.INTER_AREA)


def _shaded(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _draw_road(canvas: _Canvas, junction: Point, half_width: float, colour: Colour) -> None:
    x, y = junction
    canvas.rectangle(0, y - half_width, 1, y + half_width, colour)
    canvas.rectangle(x - half_width, y, x + half_width, 1, colour)


def _draw_markings(canvas: _Canvas, junction: Point, colour: Colour) -> None:
    """Dashed middle lines that stop short of the junction."""
    x, y = junction
    half_length, half_width, first = 0.035, 0.008, _ROAD_HALF_WIDTH + 0.06
    for step in range(8):
        along = first + 0.13 * step
        canvas.rectangle(
            x - half_width, y + along - half_length, x + half_width, y + along + half_length, colour
        )
        for middle in (x - along, x + along):
            canvas.rectangle(
                middle - half_length, y - half_width, middle + half_length, y + half_width, colour
            )


def _outline(kind: Kind, centre: Point, radius: float) -> np.ndarray:
    """Corners (P, 2) of a shape of about the area of a disc of ``radius``."""
    corners, first, reach = {"disc": (48, 0.0, 1.0), "square": (4, 0.5, 1.2), "diamond": (4, 0.0, 1.25)}[kind]
    angles = 2 * np.pi * (np.arange(corners) + first) / corners
    return np.array(centre) + radius * reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _draw_shape(canvas: _Canvas, scene: DrawnScene, centre: Point) -> None:
    x, y = centre
    shadow = _shaded(scene.palette.road, 0.6)
    canvas.polygon(_outline(scene.kind, (x + 0.015, y + 0.02), scene.radius), shadow)
    canvas.polygon(_outline(scene.kind, centre, scene.radius), _shaded(scene.colour, 0.62))
    canvas.polygon(_outline(scene.kind, centre, scene.radius * 0.84), scene.colour)


FRAMES_PER_SECOND = 5
MIN_IMAGE_SIZE = 32

_OUTCOMES: tuple[Outcome, ...] = ("left", "right")
_QUANTISER = 6
_TRAIN, _TEST, _COIN = 0, 1, 2
EVEN = 0.5


@dataclass(frozen=True, slots=True)
class DrawnWorld:
    """Folders of the drawn videos, and the table that says which test videos share a past.

    ``futures_csv`` has the columns ``video_uri`` (relative to ``test``), ``scene``, ``outcome``, ``probability``.
    """

    train: Path
    test: Path
    futures_csv: Path


def encode_mp4(frames: np.ndarray, frames_per_second: int = FRAMES_PER_SECOND) -> bytes:
    """H.264 in MP4: the same frames (T, S, S, 3) give the same bytes.

    Every frame is coded by itself at a fixed quantiser, so that two videos that begin with the same
    frames decode to the same frames.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"qp": str(_QUANTISER), "g": "1", "preset": "veryfast"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def draw_world(
    out: Path,
    *,
    seed: int,
    train_videos: int,
    test_scenes: int,
    image_size: int,
    odds: float = EVEN,
    reporter: Reporter | None = None,
) -> DrawnWorld:
    """Write ``videos/train``, ``videos/test`` and ``futures.csv`` below ``out``.

    A training video turns left with the probability ``odds``, by a coin drawn from the seed; the same scenes are drawn
    for all odds. Every test scene is there twice, once for each outcome. Drawing again with the same arguments writes
    the same bytes.

    Raises:
        DeltacacheError: a size that cannot be drawn.
        DatasetError: the folders hold other files, which would join the dataset.
    """
    _check_sizes(train_videos, test_scenes, image_size)
    if not 0 <= odds <= 1:
        raise DeltacacheError(
            f"odds {odds:g} are not a probability: give the share of shapes that turn left, from 0 to 1"
        )
    world = DrawnWorld(out / "videos" / "train", out / "videos" / "test", out / "futures.csv")
    training = [_train_video(seed, index, odds) for index in range(train_videos)]
    tests: list[_Video] = []
    for index in range(test_scenes):  # every outcome of each scene
        scene, name = draw_scene(np.random.default_rng((seed, _TEST, index))), f"scene-{index:03d}"
        tests += [_Video(f"{name}-{outcome}.mp4", name, scene, outcome) for outcome in _OUTCOMES]
    _prepare_folder(world.train, [video.name for video in training])
    _prepare_folder(world.test, [video.name for video in tests])
    with (reporter or SilentReporter()).stage("draw videos", len(training) + len(tests)) as stage:
        for folder, videos in ((world.train, training), (world.test, tests)):
            for video in videos:
                frames = draw_video(video.scene, video.outcome, image_size)
                _replace_file(folder / video.name, encode_mp4(frames))
                stage.advance()
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    chances = {"left": odds, "right": round(1 - odds, 12)}
    writer.writerow(["video_uri", "scene", "outcome", "probability"])
    writer.writerows(
        [video.name, video.scene_name, video.outcome, repr(chances[video.outcome])] for video in tests
    )
    _replace_file(world.futures_csv, table.getvalue().encode())
    return world


def draw_pictures(folder: Path, *, seed: int, videos: int, image_size: int, odds: float = EVEN) -> None:
    """Write every frame of the first training videos as a PNG; what is there already is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(videos):
        video = _train_video(seed, index, odds)
        paths = [folder / f"{video.scene_name}-{number}.png" for number in range(FRAMES)]
        if all(path.exists() for path in paths):
            continue
        for path, pixels in zip(paths, draw_video(video.scene, video.outcome, image_size), strict=True):
            _replace_file(path, cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())


@dataclass(frozen=True, slots=True)
class _Video:
    name: str
    scene_name: str
    scene: DrawnScene
    outcome: Outcome


def _train_video(seed: int, index: int, odds: float) -> _Video:
    rng, name = np.random.default_rng((seed, _TRAIN, index)), f"train-{index:04d}"
    outcome: Outcome = _OUTCOMES[rng.integers(2)]
    if odds != EVEN:  # another coin, so that the scene stays the same
        outcome = _OUTCOMES[int(np.random.default_rng((seed, _COIN, index)).random() >= odds)]
    return _Video(f"{name}.mp4", name, draw_scene(rng), outcome)


def _check_sizes(train_videos: int, test_scenes: int, image_size: int) -> None:
    if image_size < MIN_IMAGE_SIZE or image_size % 2:
        raise DeltacacheError(
            f"image size {image_size} cannot be drawn: give an even number from {MIN_IMAGE_SIZE} up"
        )
    if train_videos < 1 or test_scenes < 1:
        raise DeltacacheError(
            f"{train_videos} training videos and {test_scenes} test scenes: give at least one of each"
        )


def _prepare_folder(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted({path.name for path in folder.iterdir() if not path.name.startswith(".")} - set(names))
    if others:
        raise DatasetError(
            f"{folder} holds {counted(len(others), 'file')} that are not part of this world, such as {others[0]}: "
            "give another output folder or remove them"
        )


def _replace_file(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)
