"""A folder of frames as a video: ``<video>/<anything>_<number>.jpg``, ``<video>/<number>.jpg``, or another picture.

Numbers with a decimal point are seconds. Where no name of a folder has one, they count frames (or milliseconds, or
anything else that passes at a constant rate), and how many of them a second has must be said.
"""

import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.AvifImagePlugin  # Pillow looks for these two only when a picture is of no common kind
import PIL.WebPImagePlugin  # noqa: F401
from PIL import Image, ImageOps, UnidentifiedImageError

from deltacache.pipeline.decoding.frame_source import IndexedFrame
from deltacache.pipeline.inputs.locations import frames_among
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF")
_LONGEST_S = 1e7


class FolderSource:
    """Frames that were stored as pictures.

    Args:
        frames_per_second: what numbers without a decimal point are divided by.
    """

    def __init__(self, path: str, frames_per_second: float | None = None) -> None:
        try:
            files = {file.name: file for file in Path(path).iterdir()}
        except OSError as error:
            raise VideoRefusedError(FailureReason.UNREADABLE, f"{error.strerror}") from error
        named = [(number, files[name]) for name, number in frames_among(files).items()]
        if not named:
            raise VideoRefusedError(
                FailureReason.NO_FRAMES,
                "the folder holds no frames: pictures must be named <anything>_<seconds>.jpg, or "
                "all count (0001.jpg, frame0001.jpg)",
            )
        timed = sorted((float(number), file) for number, file in named)
        self.decoder, rate = "frames", 1.0
        if len(named) > 1 and not any("." in number for number, _ in named):
            if frames_per_second is None:
                raise VideoRefusedError(
                    FailureReason.NO_TIMES,
                    f"{timed[0][1].name}, {timed[1][1].name}, ... are numbered without a decimal point, which tells no "
                    "times: give --frames-per-second (1000 for milliseconds, 1 for whole seconds), or a "
                    "column frames_per_second in a list of the folders",
                )
            self.decoder, rate = "frames-given-rate", frames_per_second
        times = np.array([time for time, _ in timed]) / rate
        if not np.isfinite(times[-1]) or times[-1] - times[0] > _LONGEST_S:
            raise VideoRefusedError(
                FailureReason.CORRUPT_STREAM,
                f"{timed[-1][1].name} claims to be too many seconds after the first frame",
            )
        if (np.diff(times) <= 0).any():
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, "two frames have the same time")
        self._files = [file for _, file in timed]
        self.timestamps_s = (times - times[0]).astype(np.float32)
        self.height, self.width = self._read(0).shape[:2]

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """Upright RGB frames of ``wanted``."""
        for index in wanted:
            rgb = self._read(index)
            if rgb.shape != (self.height, self.width, 3):
                raise VideoRefusedError(
                    FailureReason.CORRUPT_STREAM,
                    f"{self._files[index].name}: {rgb.shape[1]}x{rgb.shape[0]} pixels, the first frame has "
                    f"{self.width}x{self.height}",
                )
            yield IndexedFrame(index, rgb)

    def _read(self, index: int) -> np.ndarray:
        file = self._files[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged EXIF, which is not needed
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=_FORMATS) as image:
                    image.load()
                    return _rgb(_upright(image))
        except (UnidentifiedImageError, SyntaxError, ValueError) as error:
            message = f"{file.name} is not a readable picture"
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise VideoRefusedError(FailureReason.OUT_OF_MEMORY, f"{file.name}: {error}") from error
        except OSError as error:  # Pillow's word for a damaged picture too
            reason = FailureReason.UNREADABLE if error.errno else FailureReason.CORRUPT_STREAM
            message = f"{file.name}: {error.strerror or 'the picture is damaged'}"
            raise VideoRefusedError(reason, message) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except (TypeError, ValueError, KeyError, SyntaxError, OSError, struct.error, ZeroDivisionError, EOFError):
        return image


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Of 16 bits the upper eight are kept, as Pillow does with 16-bit colour."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        grey = (grey.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
