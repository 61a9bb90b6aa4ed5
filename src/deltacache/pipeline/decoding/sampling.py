"""Which frames, which part of the picture, mirrored or not: pure functions of times and numbers.

No file is opened here and no global random state is used. Times are seconds.

One clip of four frames, three spacings and the start fraction f::

    frames of the video   |  |  |  |   |  |  |  |  |  |   |  |  |  |  |  |  |  |  |
    time                  0                                                   t[-1]
                          |-f * room-|
                                     |-- d0 --|- d1 -|---- d2 ----|
    wanted times                     x        x      x            x
    nearest frames                   ^        ^     ^             ^     -> indices

The span is the sum of the spacings, ``room = t[-1] - span``. A span that does not fit leaves no room: it
starts at 0, and the wanted times past the end all meet the last frame, which then repeats.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from deltacache.schemas.clips import CropBox
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.texts import counted

_CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop


@dataclass(frozen=True, slots=True)
class ViewSample:
    """What one view of one video shows.

    Attributes:
        frame_indices: T indices in presentation order, non-decreasing.
        timestamps_s: (T,) float32, the real times of those frames from the first frame of the video.
        crop: the part of the upright frame that is kept, the same for all T frames.
        duplicate_frames: how many of the T frames repeat the one before.
    """

    frame_indices: tuple[int, ...]
    timestamps_s: np.ndarray
    crop: CropBox
    flip: bool
    duplicate_frames: int


def clip_indices(
    timestamps_s: Sequence[float] | np.ndarray, *, spacings_s: Sequence[float], start_fraction: float
) -> list[int]:
    """Indices of the frames nearest to the wanted times; of two equally near, the earlier.

    Args:
        timestamps_s: (frames,) non-decreasing, at least one; time 0 is where the earliest clip starts.
        spacings_s: (T-1,) time from each frame of the clip to the next.
        start_fraction: 0 starts at time 0, 1 ends at the last frame.

    Returns:
        T indices.
    """
    times = np.asarray(timestamps_s, dtype=np.float64)
    if times.size == 0:
        raise ValueError("a clip needs at least one frame to sample from")
    offsets = np.concatenate([[0.0], np.cumsum(np.asarray(spacings_s, dtype=np.float64))])
    room = max(0.0, times[-1] - offsets[-1])
    return _nearest(times, start_fraction * room + offsets)


def _nearest(times: np.ndarray, wanted: np.ndarray) -> list[int]:
    after = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)  # one frame: both sides are it
    nearer_before = wanted - times[before] <= times[after] - wanted
    return np.where(nearer_before, before, after).tolist()


@dataclass(frozen=True, slots=True)
class Window:
    """Frames around one moment: what is seen of a video, and what comes after it as far as the video goes on.

    Attributes:
        at_s: when the last seen frame is shown, seconds from the first frame of the video; ``None``: as late as the
            ``steps`` still lie within the video, or else as early as the context does.
        context: frames up to that moment, ``spacing_s`` apart.
        steps: frames after it.
    """

    at_s: float | None
    context: int
    steps: int
    spacing_s: float


def window_indices(timestamps_s: Sequence[float] | np.ndarray, window: Window) -> list[int]:
    """Indices of the frames nearest to the wanted times; those after the moment end where the video does.

    Args:
        timestamps_s: (frames,) non-decreasing, at least one.

    Raises:
        VideoRefusedError: ``too_short``, when the context does not lie within the video, or frames would repeat.
    """
    times = np.asarray(timestamps_s, dtype=np.float64)
    times = times - times[0]
    span, spacing = (window.context - 1) * window.spacing_s, window.spacing_s
    at_s, last = window.at_s, float(times[-1])
    slack = 1e-3  # float32 times: the last frame of a video at 5 frames per second is at 1.399999976 s
    if at_s is None:
        at_s = max(span, last - window.steps * spacing)
    if at_s - span < -slack or at_s > last + slack:
        raise VideoRefusedError(
            FailureReason.TOO_SHORT,
            f"{window.context} frames {spacing:g} s apart up to {at_s:g} s do not lie within its {last:.3f} s: give "
            + (
                f"--at between {span:g} and {last:.3f}"
                if span <= last
                else "a shorter --spacing, fewer frames of --context, or a longer video"
            ),
        )
    wanted = at_s + spacing * np.arange(1 - window.context, window.steps + 1)
    indices = _nearest(times, wanted[wanted <= last + slack])
    repeated = next((at for at, pair in enumerate(pairwise(indices), 1) if pair[0] == pair[1]), None)
    if repeated is not None:
        raise VideoRefusedError(
            FailureReason.TOO_SHORT,
            f"its frames around {wanted[repeated]:.3f} s lie further apart than {spacing:g} s, so one would be taken "
            f"twice: give a longer --spacing ({len(times)} frames in {last:.3f} s)",
        )
    return indices


def middle_clip_indices(*, frame_count: int, fps: float, num_frames: int, stride_s: float) -> list[int]:
    """``num_frames`` indices around the middle of a video of constant rate, a whole stride apart.

    Args:
        fps: frames per second.
        stride_s: wanted time between frames; rounded to a whole number of frames, at least one.

    Raises:
        ValueError: the video is too short for it.
    """
    step = max(1, round(stride_s * fps))
    first = frame_count // 2 - num_frames // 2 * step
    last = first + (num_frames - 1) * step
    if first < 0 or last >= frame_count:
        raise ValueError(
            f"{num_frames} frames {step} apart do not fit around the middle of {counted(frame_count, 'frame')}"
        )
    return list(range(first, last + 1, step))


def indices_within_shots(
    timestamps_s: np.ndarray, shots: Sequence[range], *, spacings_s: Sequence[float], start_fraction: float
) -> list[int]:
    """``clip_indices`` of a clip that lies within one shot.

    ::

        shots               |--- a ---||- b -||------- c -------|
        span of the clip    |----|
        where it may start  |~~~~|     (none) |~~~~~~~~~~~~~~|       start_fraction goes over these, one after the other

    Where no shot is as long as the clip, it begins with the longest one, whose last frame then repeats.

    Args:
        shots: frames of each, in order.
    """
    times = np.asarray(timestamps_s, dtype=np.float64)
    lengths = np.array([times[shot[-1]] - times[shot[0]] for shot in shots])
    rooms = lengths - sum(spacings_s)
    fitting = np.flatnonzero(rooms >= 0)
    ends = np.cumsum(rooms[fitting])
    if not fitting.size:
        chosen, fraction = int(lengths.argmax()), 0.0
    else:
        place = min(int(np.searchsorted(ends, start_fraction * ends[-1])), len(fitting) - 1)
        chosen = int(fitting[place])
        begun = ends[place] - rooms[chosen]
        fraction = (start_fraction * ends[-1] - begun) / rooms[chosen] if rooms[chosen] > 0 else 0.0
    shot = shots[chosen]
    own = times[shot.start : shot.stop] - times[shot.start]
    return [
        shot.start + index
        for index in clip_indices(own, spacings_s=spacings_s, start_fraction=float(fraction))
    ]


def draw_windows(
    timestamps_s: np.ndarray, settings: SamplingSettings, shots: Sequence[range] | None = None
) -> tuple[list[int], tuple[int, ...]]:
    """All clips of a video on one grid of times, as frames that they share.

    ::

        grid, one spacing apart     0 1 2 3 4 5 6 7 8 9
        clips of 4, stride 3        [0 1 2 3] [3 4 5 6] [6 7 8 9]
        frames                      0 1 2 3 4 5 6 7 8 9        begins 0, 3, 6

    With ``shots`` each has a grid of its own, and no clip lies in two. Frames in no clip are left out.

    Returns:
        Indices of the frames, each once but where the video has fewer than the grid; and where in them clips begin.

    Raises:
        VideoRefusedError: ``too_short``, when no clip fits, or frames would repeat and ``allow_duplicates`` is off.
    """
    times = np.asarray(timestamps_s, dtype=np.float64)
    spacing, length = settings.spacing_min_s, settings.frames
    indices, begins = list[int](), list[int]()
    for shot in shots if shots is not None else [range(len(times))]:
        own = times[shot.start : shot.stop] - times[shot.start]
        count = math.floor(own[-1] / spacing + 1e-3) + 1  # times are float32
        grid = [shot.start + index for index in _nearest(own, spacing * np.arange(count))]
        covered = 0
        for start in range(0, count - length + 1, settings.stride):
            begins.append(len(indices) - max(0, covered - start))
            indices += grid[max(covered, start) : start + length]
            covered = start + length
    if not begins:
        raise VideoRefusedError(
            FailureReason.TOO_SHORT,
            f"no clip of {length} frames {spacing:g} s apart fits into {times[-1] - times[0]:.3f} s"
            f"{'' if shots is None else ' without a cut'}: give fewer --frames or a shorter --spacing",
        )
    if not settings.allow_duplicates:
        repeats = sum(a == b for begin in begins for a, b in pairwise(indices[begin : begin + length]))
        _refuse_repeats(times - times[0], 0.0, repeats)
    return indices, tuple(begins)


def pieces_of(
    indices: Sequence[int],
    timestamps_s: np.ndarray,
    height: int,
    width: int,
    settings: SamplingSettings,
    target: tuple[int, int],
) -> list[ViewSample]:
    """Frames in pieces as long as a clip, which encoders take; the last piece repeats its last frame."""
    times, length = np.asarray(timestamps_s, dtype=np.float32), settings.frames
    padded = [*indices, *[indices[-1]] * (-len(indices) % length)]
    crop = largest_crop(height, width, target)
    return [
        ViewSample(tuple(piece), (times - times[0])[piece], crop, False, 0)
        for piece in (padded[start : start + length] for start in range(0, len(padded), length))
    ]


def draw_view(
    video_id: str,
    view: int,
    timestamps_s: np.ndarray,
    height: int,
    width: int,
    settings: SamplingSettings,
    target: tuple[int, int] = (1, 1),
    shots: Sequence[range] | None = None,
) -> ViewSample:
    """Draw one view from (seed, video id, view) alone, never from worker, order or clock.

    Args:
        timestamps_s: (frames,) float32, seconds from the first frame, non-decreasing.
        height: of the upright frame, pixels.
        width: of the upright frame, pixels.
        target: height and width that the crop is resized to; only their ratio counts. Crops have that aspect, or
            when augmented aspects around it: ``crop_ratio`` is how much wider than the target they look.
        shots: one of which the clip must lie within; None: anywhere.

    Raises:
        VideoRefusedError: ``too_short``, when frames would repeat and ``allow_duplicates`` is off.
    """
    if settings.windows is not None:
        shared, begins = draw_windows(timestamps_s, settings, shots)
        if view >= len(begins):
            raise VideoRefusedError(FailureReason.TOO_SHORT, f"it has {counted(len(begins), 'clip')}")
        own = shared[begins[view] : begins[view] + settings.frames]
        (sample,) = pieces_of(own, timestamps_s, height, width, settings, target)
        return replace(sample, duplicate_frames=sum(a == b for a, b in pairwise(own)))
    # Only .random() is drawn from it: that stream has never changed between numpy releases.
    digest = hashlib.sha256(f"{settings.seed}/{video_id}/{view}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    count = settings.frames - 1
    if settings.augment:
        spread = settings.spacing_max_s - settings.spacing_min_s
        spacings = settings.spacing_min_s + spread * rng.random(count)
        start_fraction = rng.random()
        narrowest, widest = settings.crop_ratio
        aspect = target[1] / target[0]
        crop = random_crop(height, width, settings.crop_scale, (narrowest * aspect, widest * aspect), rng)
        flip = bool(rng.random() < settings.flip_probability)
    else:
        spacings = np.full(count, (settings.spacing_min_s + settings.spacing_max_s) / 2)
        start_fraction = van_der_corput(view + 1)
        crop, flip = largest_crop(height, width, target), False
    times = np.asarray(timestamps_s, dtype=np.float32)
    times = times - times[0]
    if shots is None:
        indices = clip_indices(times, spacings_s=spacings.tolist(), start_fraction=start_fraction)
    else:
        indices = indices_within_shots(
            times, shots, spacings_s=spacings.tolist(), start_fraction=start_fraction
        )
    duplicates = sum(a == b for a, b in pairwise(indices))
    if not settings.allow_duplicates:
        longest = max(shots or [range(len(times))], key=lambda shot: times[shot[-1]] - times[shot[0]])
        seen = times[longest.start : longest.stop] - times[longest.start]
        _refuse_repeats(seen, float(spacings.sum()), duplicates)
    return ViewSample(tuple(indices), times[indices], crop, flip, duplicates)


def _refuse_repeats(timestamps_s: np.ndarray, span_s: float, duplicates: int) -> None:
    duration = float(timestamps_s[-1])
    if span_s > duration:
        raise VideoRefusedError(
            FailureReason.TOO_SHORT,
            f"the sampled span of {span_s:.3f} s does not fit into {duration:.3f} s "
            f"({counted(len(timestamps_s), 'frame')}): allow duplicates or sample a shorter span",
        )
    if duplicates:
        raise VideoRefusedError(
            FailureReason.TOO_SHORT,
            f"{duplicates} sampled frames would repeat, the spacing being finer than the video's "
            f"{counted(len(timestamps_s), 'frame')} in {duration:.3f} s: allow duplicates or sample more coarsely",
        )


def van_der_corput(n: int) -> float:
    """The n-th number of the base-2 sequence 1/2, 1/4, 3/4, 1/8, ... (n from 1).

    Every prefix is spread evenly over (0, 1), so later views fill gaps and move no earlier one.
    """
    value, weight = 0.0, 0.5
    while n:
        value += weight * (n & 1)
        n, weight = n >> 1, weight / 2
    return value


def largest_crop(height: int, width: int, target: tuple[int, int]) -> CropBox:
    """The largest centred crop that has the aspect of ``target`` (height, width), to the nearest pixel."""
    rows, columns = target
    if width * rows >= height * columns:  # the frame is wider
        crop_height, crop_width = height, max(1, min(width, round(height * columns / rows)))
    else:
        crop_height, crop_width = max(1, min(height, round(width * rows / columns))), width
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def random_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> CropBox:
    """A crop of random area and aspect, as torchvision's RandomResizedCrop draws it.

    Args:
        scale: range of the share of the frame's area, drawn uniformly.
        ratio: range of width / height, drawn uniformly in the logarithm.

    Returns:
        The first of ten draws that fits, else the largest centred crop whose aspect is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            return CropBox(top, left, crop_height, crop_width)
    crop_height = min(height, max(1, round(width / ratio[0])))
    crop_width = min(width, max(1, round(height * ratio[1])))
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
