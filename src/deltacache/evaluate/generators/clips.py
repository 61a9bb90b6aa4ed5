"""Short clips as numbered pictures or as mp4.

Shapes: T frames, P x Q pixels.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.error import FFmpegError

from deltacache.evaluate.generators.numbering import Numbered, numbered_pictures
from deltacache.schemas.errors import DatasetError

ClipFormat = Literal["frames", "mp4"]
_VIDEOS = (".mp4", ".mkv", ".webm")
_CRF = "8"  # of x264: hardly visible


def write_clip(path: Path, frames: Sequence[np.ndarray], clip_format: ClipFormat, fps: float) -> Path:
    """Write (P, Q, 3) uint8 frames as ``path/00000.png`` and so on, or as ``path.mp4``."""
    if clip_format == "frames":
        path.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            _, content = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            (path / f"{number:05d}.png").write_bytes(content.tobytes())
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    video = path.with_name(f"{path.name}.mp4")
    height, width = frames[0].shape[:2]
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, _pixel_format(height, width)
        stream.options = {"crf": _CRF}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return video


def read_frame_at(clip: Path, number: int) -> np.ndarray:
    """Frame ``number`` (P, Q, 3) uint8 RGB of a folder of pictures or a video, counted from 0.

    Raises:
        DatasetError: there are fewer frames, a picture is missing before the last, or the frame is damaged.
    """
    if clip.is_dir():
        return _read_picture(picture_of(numbered_pictures(clip), number))
    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise DatasetError(f"{clip} is damaged or no video (it has no pictures): generate it again")
            for at, frame in enumerate(container.decode(video=0)):
                if at == number:
                    return frame.to_ndarray(format="rgb24")
    except FFmpegError as error:
        raise DatasetError(f"{clip} is damaged or no video ({error}): generate it again") from error
    raise DatasetError(_too_short(clip, number))


def picture_of(sample: Numbered, number: int) -> Path:
    """The file of frame ``number``, counted from 0 whatever the first picture's number.

    Raises:
        DatasetError: there are fewer pictures.
    """
    if len(sample.pictures) <= number:
        raise DatasetError(_too_short(sample.folder, number))
    return sample.pictures[number]


def samples_in(folder: Path) -> list[Path]:
    """Folders and videos named ``sample-*``, in the order of the numbers in their names.

    Raises:
        DatasetError: a sample is there twice, as pictures and as a video.
    """
    found = folder.glob("sample-*")
    samples = sorted(
        (path for path in found if path.is_dir() or path.suffix.lower() in _VIDEOS), key=_in_order
    )
    for path, following in pairwise(samples):
        if _name(path) == _name(following):
            raise DatasetError(f"{path} and {following.name} are one sample twice: remove one of them")
    return samples


def _read_picture(path: Path) -> np.ndarray:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if picture is None:
        raise DatasetError(f"{path} is damaged or no picture: generate it again")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _in_order(path: Path) -> tuple[list[tuple[str, int]], str]:
    """``frame_2`` before ``frame_10``: words and numbers in turn; equal numbers by name."""
    parts = re.findall(r"(\D*)(\d*)", _name(path))
    return [(word, int(number or -1)) for word, number in parts], path.name


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _too_short(clip: Path, number: int) -> str:
    return f"{clip} has no frame {number}: a sample must hold at least {number + 1} frames after its context"


def _pixel_format(height: int, width: int) -> str:
    """With chroma at half size, as players want it, where both sides are even."""
    return "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
