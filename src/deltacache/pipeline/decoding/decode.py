"""From one video file to the pixels of its clips, in this process.

``decode_child`` runs this in a disposable process; nothing else should decode files that are not trusted.

Shapes: T frames, h x w pixels of a clip, H, W of the upright frame.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltacache.pipeline.decoding.folder_frames import FolderSource
from deltacache.pipeline.decoding.frame_source import (
    FrameSource,
    SourceFailedError,
    Span,
    SpanSource,
    check_size,
)
from deltacache.pipeline.decoding.native_log import NativeLog, native_log
from deltacache.pipeline.decoding.pyav_frames import CODECS_THAT_HIDE_DAMAGE, TwiceDecodedSource
from deltacache.pipeline.decoding.sampling import (
    ViewSample,
    Window,
    draw_view,
    draw_windows,
    largest_crop,
    pieces_of,
    window_indices,
)
from deltacache.schemas.clips import PixelClip, clip_id_of
from deltacache.schemas.datasets import SamplingSettings, Size, sides
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.texts import counted

if TYPE_CHECKING:
    from deltacache.pipeline.decoding.probe import VideoProbe


@dataclass(frozen=True, slots=True)
class VideoJob:
    """One video and the views wanted of it: ``first_view .. first_view + views - 1``.

    Attributes:
        path: of a video file or a folder of frames on this machine.
        image_size: what every crop is resized to, pixels.
        window: the frames of its one view, in the largest centred crop, instead of those that ``sampling`` draws.
        span: where in the file the video lies, if other videos are in it too.
        pieces: all frames of its ``windows``, each once, in pieces as long as a clip, instead of single clips.
    """

    path: str
    video_uri: str
    video_id: str
    first_view: int
    views: int
    image_size: Size
    sampling: SamplingSettings
    window: Window | None = None
    span: Span | None = None
    pieces: bool = False


Allow = Callable[[float], None]
"""Called with how many times the time limit of a short video this one may take."""

_BYTES, _PIXELS = 3e9, 2e10  # of which each takes one more limit: ten minutes of 1080p are 3.7e10 pixels
_MOST_LIMITS = 100  # a file can claim anything


def allowed(file_bytes: int, pixels: int) -> float:
    """How many times the time limit a file of this size may take, whose frames have so many pixels together.

    With the default of 300 s, reading 10 MB/s and decoding 67 million pixels/s (32 frames of 1080p) is enough.
    """
    return min(1 + file_bytes / _BYTES + pixels / _PIXELS, _MOST_LIMITS)


def decode_video(job: VideoJob, allow: Allow = lambda factor: None) -> list[PixelClip]:
    """Decode every wanted view of one video; the file is gone through once for all of them.

    Args:
        allow: hears of a long file how long it may take, as soon as its size and again when its frames are known.

    Raises:
        VideoRefusedError: the video cannot be used; the reason is one of the closed list.
    """
    with native_log() as log:
        try:
            return _decode(job, log, allow)
        except MemoryError:
            raise VideoRefusedError(FailureReason.OUT_OF_MEMORY, "no memory left") from None


def _decode(job: VideoJob, log: NativeLog, allow: Allow) -> list[PixelClip]:
    failed: SourceFailedError | None = None
    for source in frame_sources(job.path, log, allow, job.sampling.frames_per_second, job.span):
        try:
            return _cut_clips(job, source)
        except SourceFailedError as error:
            failed = error
    raise VideoRefusedError(FailureReason.CORRUPT_STREAM, f"{failed}")


def frame_sources(
    path: str,
    log: NativeLog,
    allow: Allow = lambda factor: None,
    frames_per_second: float | None = None,
    span: Span | None = None,
) -> Iterator[FrameSource]:
    """Ways to decode ``path`` that are exact, the fastest first; with ``span`` the frames within it alone."""
    if Path(path).is_dir():
        yield FolderSource(path, frames_per_second)
        return
    # Decoders are loaded where videos are decoded, not in every process that names a VideoJob.
    from deltacache.pipeline.decoding.decord_frames import DecordSource, decord_is_exact
    from deltacache.pipeline.decoding.probe import probe_video
    from deltacache.pipeline.decoding.pyav_frames import IndexedPyavSource, SequentialPyavSource

    size = Path(path).stat().st_size if Path(path).is_file() else 0
    allow(allowed(size, 0))
    probe = probe_video(path, span)
    allow(allowed(size, probe.frames * probe.height * probe.width))
    index = probe.index
    if index is not None:
        if span is None and decord_is_exact(probe) and not index.unreferenced:  # PyAV can leave those out
            yield DecordSource(probe, index, log)
        indexed = _trusted(probe, lambda held: IndexedPyavSource(probe, index, held_frames=held))
        yield indexed if span is None else SpanSource(indexed, span, probe.begins_s)
    sequential = _trusted(probe, lambda held: SequentialPyavSource(probe, held_frames=held))
    yield sequential if span is None else SpanSource(sequential, span)


def _trusted(probe: "VideoProbe", make: Callable[[int], FrameSource]) -> FrameSource:
    if probe.codec in CODECS_THAT_HIDE_DAMAGE:
        return TwiceDecodedSource(make)
    return make(0)


def _cut_clips(job: VideoJob, source: FrameSource) -> list[PixelClip]:
    check_size(source.height, source.width)
    views = range(job.first_view, job.first_view + job.views)
    times, target = source.timestamps_s, sides(job.image_size)
    begins: tuple[int, ...] = ()
    if job.window is None:
        shots = None
        if job.sampling.shots:
            from deltacache.pipeline.decoding.shots import shots_of

            shots = shots_of(source)
        if job.pieces:
            indices, begins = draw_windows(times, job.sampling, shots)
            samples = pieces_of(indices, times, source.height, source.width, job.sampling, target)
            views = range(len(samples))
        else:
            samples = [
                draw_view(job.video_id, view, times, source.height, source.width, job.sampling, target, shots)
                for view in views
            ]
    else:
        indices = window_indices(times, job.window)
        crop = largest_crop(source.height, source.width, target)
        shown = (times - times[0]).astype(np.float32)[indices]
        samples = [ViewSample(tuple(indices), shown, crop, False, 0)]
    canvases = _fill(samples, source, job.image_size)
    return [
        PixelClip(
            clip_id=clip_id_of(job.video_id, view),
            video_uri=job.video_uri,
            view=view,
            pixels=pixels,
            timestamps_s=sample.timestamps_s,
            frame_indices=sample.frame_indices,
            crop=sample.crop,
            flip=sample.flip,
            decoder=source.decoder,
            duplicate_frames=sample.duplicate_frames,
            windows=begins,
        )
        for view, sample, pixels in zip(views, samples, canvases, strict=True)
    ]


def _fill(samples: list[ViewSample], source: FrameSource, size: Size) -> list[np.ndarray]:
    """(T, h, w, 3) uint8 for each sample; full frames are dropped as soon as they are cut."""
    from deltacache.pipeline.decoding.resampling import CroppedClip, Resizer

    clips = [CroppedClip(len(s.frame_indices), size, s.crop, flip=s.flip) for s in samples]
    places = _places(samples)
    resizer = Resizer(size)
    for frame in source.frames(sorted(places)):
        resizer.load(frame.rgb)
        for view, t in places.pop(frame.index):
            resizer.cut(clips[view], t)
    if places:
        raise SourceFailedError(f"{counted(len(places), 'frame')} did not come out the second time")
    return [clip.finish() for clip in clips]


def _places(samples: list[ViewSample]) -> dict[int, list[tuple[int, int]]]:
    """Where each frame goes: by its index, numbers of views and places t in their clips."""
    places: dict[int, list[tuple[int, int]]] = {}
    for view, sample in enumerate(samples):
        for t, index in enumerate(sample.frame_indices):
            places.setdefault(index, []).append((view, t))
    return places
