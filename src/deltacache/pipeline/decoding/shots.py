"""Where the shots of a video begin, by PySceneDetect: the extra ``shots``."""

from importlib.util import find_spec
from itertools import pairwise

import cv2

from deltacache.pipeline.decoding.frame_source import FrameSource
from deltacache.schemas.errors import SettingsError

_WIDTH = 256
"""Pixels, to which wider frames are scaled down: as PySceneDetect does, whose thresholds are meant for that."""


def require_detector() -> None:
    """Refuse to look for shots without PySceneDetect.

    Raises:
        SettingsError: it is not installed.
    """
    if find_spec("scenedetect") is None:
        raise SettingsError(
            "shots needs PySceneDetect, which is not installed: pip install 'deltacache[shots]', or leave --shots out"
        )


def shots_of(source: FrameSource) -> list[range]:
    """The frames of each shot, in order; all frames of the video are decoded. PySceneDetect's defaults decide.

    Raises:
        VideoRefusedError, SourceFailedError: as its frames do.
    """
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import ContentDetector

    detector, frames = ContentDetector(), len(source.timestamps_s)
    height, width = source.height, source.width
    scale = min(1.0, _WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    cuts = [0]
    for frame in source.frames(range(frames)):
        small = cv2.resize(frame.rgb, size, interpolation=cv2.INTER_LINEAR)
        # Shots have a shortest length in frames, so the rate decides nothing.
        found = detector.process_frame(
            FrameTimecode(frame.index, 25.0), cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        )
        cuts += [cut.frame_num for cut in found]
    cuts += [cut.frame_num for cut in detector.post_process(FrameTimecode(frames - 1, 25.0))]
    bounds = sorted({*cuts, frames})
    return [range(first, end) for first, end in pairwise(bounds)]
