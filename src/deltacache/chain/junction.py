"""The demo's videos: a world in which every future is known.

A shape drives up a road, reaches a T-junction in the fourth frame and goes left or right with equal
chance. Nothing before the turn tells which: the outcome is drawn apart from everything that is seen.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from deltacache.chain.scenes import Outcome, Scene, draw_scene, draw_video
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.progress import Reporter, SilentReporter

FRAMES_PER_SECOND = 5
MIN_IMAGE_SIZE = 32

_OUTCOMES: tuple[Outcome, ...] = ("left", "right")
_QUANTISER = 6
_TRAIN, _TEST = 0, 1


@dataclass(frozen=True, slots=True)
class DrawnWorld:
    """Folders of the drawn videos, and the table that says which test videos share a past.

    ``futures_csv`` has the columns ``video_uri`` (relative to ``test``), ``scene``, ``outcome``.
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
    reporter: Reporter | None = None,
) -> DrawnWorld:
    """Write ``videos/train``, ``videos/test`` and ``futures.csv`` below ``out``.

    A training video turns left or right by a coin drawn from the seed. Every test scene is there
    twice, once for each outcome. Drawing again with the same arguments writes the same bytes.

    Raises:
        DeltacacheError: a size that cannot be drawn.
        DatasetError: the folders hold other files, which would join the dataset.
    """
    _check_sizes(train_videos, test_scenes, image_size)
    world = DrawnWorld(out / "videos" / "train", out / "videos" / "test", out / "futures.csv")
    training = [_train_video(seed, index) for index in range(train_videos)]
    tests = [video for index in range(test_scenes) for video in _test_videos(seed, index)]
    _prepare_folder(world.train, [video.name for video in training])
    _prepare_folder(world.test, [video.name for video in tests])
    with (reporter or SilentReporter()).stage("draw videos", len(training) + len(tests)) as stage:
        for folder, videos in ((world.train, training), (world.test, tests)):
            for video in videos:
                frames = draw_video(video.scene, video.outcome, image_size)
                _replace_file(folder / video.name, encode_mp4(frames))
                stage.advance()
    _replace_file(world.futures_csv, _futures_table(tests))
    return world


@dataclass(frozen=True, slots=True)
class _Video:
    name: str
    scene_name: str
    scene: Scene
    outcome: Outcome


def _train_video(seed: int, index: int) -> _Video:
    rng = np.random.default_rng((seed, _TRAIN, index))
    outcome: Outcome = _OUTCOMES[rng.integers(2)]
    return _Video(f"train-{index:04d}.mp4", f"train-{index:04d}", draw_scene(rng), outcome)


def _test_videos(seed: int, index: int) -> list[_Video]:
    scene, name = draw_scene(np.random.default_rng((seed, _TEST, index))), f"scene-{index:03d}"
    return [_Video(f"{name}-{outcome}.mp4", name, scene, outcome) for outcome in _OUTCOMES]


def _futures_table(tests: Iterable[_Video]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video_uri", "scene", "outcome"])
    writer.writerows([video.name, video.scene_name, video.outcome] for video in tests)
    return text.getvalue().encode()


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
            f"{folder} holds {len(others)} files that are not part of this world, such as {others[0]}: "
            "give another output folder or remove them"
        )


def _replace_file(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)
