"""A folder of frames as a video: ``<video>/<anything>_<seconds>.jpg`` or ``.png``."""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deltacache.pipeline.decoding.frame_source import IndexedFrame
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_FRAME_NAME = re.compile(r".*_(\d+(?:\.\d+)?)\.(?:jpe?g|png)", re.IGNORECASE)


def frame_times(folder: Path) -> list[tuple[float, Path]]:
    """(seconds, file) of every frame in ``folder``, ascending; empty when it holds none."""
    matches = ((_FRAME_NAME.fullmatch(file.name), file) for file in folder.iterdir())
    return sorted((float(match[1]), file) for match, file in matches if match)


class FolderSource:
    """Frames that were stored as pictures."""

    decoder = "frames"

    def __init__(self, path: str) -> None:
        try:
            timed = frame_times(Path(path))
        except OSError as error:
            raise VideoRefusedError(FailureReason.UNREADABLE, f"{error.strerror}") from error
        if not timed:
            raise VideoRefusedError(
                FailureReason.NO_FRAMES, "no file is named <anything>_<seconds>.jpg or .png"
            )
        times = np.array([time for time, _ in timed])
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
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=("JPEG", "PNG")) as image:
                    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (UnidentifiedImageError, SyntaxError, ValueError) as error:
            message = f"{file.name} is not a readable picture"
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise VideoRefusedError(FailureReason.OUT_OF_MEMORY, f"{file.name}: {error}") from error
        except OSError as error:  # Pillow's word for a damaged picture too
            reason = FailureReason.UNREADABLE if error.errno else FailureReason.CORRUPT_STREAM
            message = f"{file.name}: {error.strerror or 'the picture is damaged'}"
            raise VideoRefusedError(reason, message) from error
