"""The work of a decode worker, free of Ray: a few videos of a shard in, their pixels out."""

import atexit
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.datasets.receipts import Failure, SourceRecord
from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.pipeline.inputs.fetching import FetchedVideo, fetched
from deltacache.pipeline.storage.files import spool_folder
from deltacache.pipeline.storage.storage import set_patience
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings, Size, sides
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.jobs import DecodeLimits

_GROUP_BYTES = 16 << 20
_GROUP_VIDEOS = 8


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What decoding needs beside the videos."""

    image_size: Size
    sampling: SamplingSettings
    limits: DecodeLimits


@dataclass(frozen=True, slots=True)
class DecodedGroup:
    """A few videos of a shard as pixels, the ones that gave none, and which contents were read.

    Attributes:
        decode_s: seconds that one decoder worked on it.
    """

    clips: tuple[PixelClip, ...]
    failures: tuple[Failure, ...]
    sources: tuple[SourceRecord, ...]
    decode_s: float


class _Decoders:
    """One decoder a process, kept from task to task: starting one takes as long as decoding ten videos."""

    def __init__(self) -> None:
        self._limits: DecodeLimits | None = None
        self._decoder: ChildDecoder | None = None

    def get(self, limits: DecodeLimits) -> ChildDecoder:
        if self._decoder is None or self._limits != limits:
            self.close()
            self._decoder = ChildDecoder(limits.timeout_s, limits.memory_bytes)
            self._limits = limits
        return self._decoder

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


_decoders = _Decoders()
atexit.register(_decoders.close)


def warm_up(settings: DecodeSettings) -> None:
    """Start this process's decoder, so that the first video need not wait for it."""
    _decoders.get(settings.limits).start()


def groups_of(
    videos: Sequence[PlannedVideo], settings: DecodeSettings, most: int = _GROUP_VIDEOS
) -> list[tuple[PlannedVideo, ...]]:
    """Consecutive videos in groups of at most ``most`` and about 16 MiB of pixels, several even of a small shard."""
    most = 1 if settings.sampling.windows is not None else most  # all frames of a video are decoded
    most_views = max((video.views for video in videos), default=1)
    fitting = _GROUP_BYTES // _video_bytes(most_views, settings)
    size = max(1, min(most, fitting, -(-len(videos) // 4)))
    return [tuple(videos[start : start + size]) for start in range(0, len(videos), size)]


def group_size(videos: int, decoders: int) -> int:
    """How many videos to decode in one go, when there are this many in all: a few goes for each decoder."""
    return max(1, min(_GROUP_VIDEOS, videos // (4 * decoders)))


def group_bytes(views: int, settings: DecodeSettings) -> int:
    """The most pixels of a group, of videos with at most ``views`` clips: 16 MiB, or more if one video has more."""
    return max(_GROUP_BYTES, _video_bytes(views, settings))


def _video_bytes(views: int, settings: DecodeSettings) -> int:
    return settings.sampling.frames * math.prod(sides(settings.image_size)) * 3 * views


def decode_group(
    videos: Sequence[PlannedVideo],
    locations: Mapping[str, str],
    settings: DecodeSettings,
    known_failures: Mapping[str, str],
) -> DecodedGroup:
    """Decode some videos, each in a disposable child; a refused video becomes a failure.

    Args:
        locations: where each ``video_uri`` lies; one without is no longer in the source, and refused.
        known_failures: videos that are not decoded because workers die with them, and how.
    """
    set_patience(settings.limits.retry_s)
    decoder = _decoders.get(settings.limits)
    decoder.start()
    start = time.perf_counter()
    clips: list[PixelClip] = []
    failures: list[Failure] = []
    sources: list[SourceRecord] = []
    with spool_folder() as spool:
        for video in videos:
            content = None
            if video.video_uri in known_failures:
                failures.append(
                    Failure(
                        video.video_uri,
                        None,
                        "encode",
                        FailureReason.ENCODE_FAILED.value,
                        known_failures[video.video_uri],
                    )
                )
                sources.append(_source(video, None))
                continue
            try:
                if video.video_uri not in locations:
                    raise VideoRefusedError(
                        FailureReason.UNREADABLE, "it is planned, but no longer in the source"
                    )
                with fetched(locations[video.video_uri], spool, settings.limits.temporary_share) as content:
                    clips.extend(decoder.decode(_job(video, content, settings)))
            except VideoRefusedError as error:
                failures.append(Failure(video.video_uri, None, "decode", error.reason.value, error.message))
            sources.append(_source(video, content))
    return DecodedGroup(tuple(clips), tuple(failures), tuple(sources), time.perf_counter() - start)


def _job(video: PlannedVideo, content: FetchedVideo, settings: DecodeSettings) -> VideoJob:
    return VideoJob(
        path=content.path,
        video_uri=video.video_uri,
        video_id=video.video_id,
        first_view=video.first_view,
        views=video.views,
        image_size=settings.image_size,
        sampling=content.sampling_of(settings.sampling),
        span=content.span,
        pieces=settings.sampling.windows is not None,
    )


def _source(video: PlannedVideo, content: FetchedVideo | None) -> SourceRecord:
    """What was read of a video, under the size that was planned; an unknown content when it could not be."""
    return SourceRecord(
        video_id=video.video_id,
        video_uri=video.video_uri,
        size_bytes=video.size_bytes,
        first_view=video.first_view,
        views=video.views,
        version="" if content is None else content.version,
        sha256="" if content is None else content.sha256,
    )
