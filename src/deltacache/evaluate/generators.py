"""Video generators: contexts exported for them, and their frames read back, checked and cropped (method section 3)."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.error import FFmpegError
from pydantic import Field, ValidationError

from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.benchmarks.frames import (
    CropSplit,
    crop_frames,
    frame_shape,
    read_frame,
    resize_frame,
)
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.files import replacing
from deltacache.pipeline.storage.storage import in_threads
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.datasets import Frozen, fingerprint_of
from deltacache.schemas.errors import DatasetError, MismatchError, problems_of
from deltacache.schemas.jobs import ContextExport
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# The pictures of a generator's sample in the order of their numbers: none may be missing without a word.
# ----------------------------------------------------------------------------------------------------


_PICTURES = (".png", ".jpg", ".jpeg")
_WAY_OUT = "generate it again, or number its pictures one by one from 0 or 1, all samples alike"


@dataclass(frozen=True, slots=True)
class Numbered:
    """Pictures of one folder, numbered one by one.

    Attributes:
        first: the number of the first picture, 0 or 1.
        pictures: in order.
    """

    folder: Path
    first: int
    pictures: tuple[Path, ...]

    def name_of(self, number: int) -> str:
        """What the picture of that number is called here, or would be."""
        path = self.pictures[0]
        *_, digits = re.finditer(r"\d+", path.stem)
        written = f"{number:0{len(digits[0])}d}"
        return f"{path.stem[: digits.start()]}{written}{path.stem[digits.end() :]}{path.suffix}"


def numbered_pictures(folder: Path) -> Numbered:
    """The pictures of ``folder`` by the last number in their names, with or without leading zeros.

    Raises:
        DatasetError: a name without a number, a number twice, or one that is missing.
    """
    found = sorted(
        (_number_of(path), path.name, path)
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES and not path.name.startswith(".")
    )
    numbers, pictures = [number for number, _, _ in found], tuple(path for _, _, path in found)
    for (one, name, _), (other, following, _) in pairwise(found):
        if one == other:
            raise DatasetError(
                f"{folder} has number {one} twice, {name} and {following}: the last number in a name is that of "
                "the frame; remove one of them, or name them so"
            )
    sample = Numbered(folder, numbers[0] if numbers else 0, pictures)
    for expected, number in enumerate(numbers, min(sample.first, 1)):
        if number != expected:
            raise _missing(sample, expected, f"it holds {pictures[0].name} to {pictures[-1].name}")
    return sample


def check_first_numbers(samples: Sequence[Numbered]) -> None:
    """Refuse samples that begin with 1 where most begin with 0, and the other way round.

    Raises:
        DatasetError: names the folder and the number.
    """
    usual = _usual([each.first for each in samples if each.pictures])
    for each in samples:
        if each.pictures and each.first != usual:
            raise _missing(
                each, 0, f"it begins with {each.name_of(each.first)}, most samples with number {usual}"
            )


def check_counts(samples: Sequence[Numbered], of: str) -> None:
    """Refuse samples that have another number of pictures than most.

    Raises:
        DatasetError: names the folder and the first number that is missing or too many.
    """
    usual = _usual([len(each.pictures) for each in samples])
    for each in samples:
        count = len(each.pictures)
        told = f"it holds {counted(count, 'picture')}, most samples of {of} {usual}"
        if count < usual:
            raise _missing(each, each.first + count, told)
        if count > usual:
            surplus = each.first + usual
            raise DatasetError(
                f"{each.folder} has a picture of number {surplus} ({each.name_of(surplus)}; {told}): "
                "remove it and what follows, or generate the others again"
            )


def _usual(values: Sequence[int]) -> int:
    """What most have; the higher one where there are as many."""
    counts = Counter(values)
    return max(counts, key=lambda each: (counts[each], each), default=0)


def _missing(sample: Numbered, number: int, told: str) -> DatasetError:
    name = f"{sample.name_of(number)}; " if sample.pictures else ""
    return DatasetError(f"{sample.folder} has no picture of number {number} ({name}{told}): {_WAY_OUT}")


def _number_of(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    if not numbers:
        raise DatasetError(
            f"{path} has no number in its name, so its frame is unknown: name pictures by their "
            "frame, such as 000.png, or remove it"
        )
    return int(numbers[-1])


# ----------------------------------------------------------------------------------------------------
# Short clips as numbered pictures or as mp4.
#
# Shapes: T frames, P x Q pixels.
# ----------------------------------------------------------------------------------------------------


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
        stream.width, stream.height = width, height
        # With chroma at half size, as players want it, where both sides are even.
        stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
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
        path = picture_of(numbered_pictures(clip), number)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
        if picture is None:
            raise DatasetError(f"{path} is damaged or not a picture: generate it again")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise DatasetError(f"{clip} is damaged or not a video (it has no frames): generate it again")
            for at, frame in enumerate(container.decode(video=0)):
                if at == number:
                    return frame.to_ndarray(format="rgb24")
    except FFmpegError as error:
        raise DatasetError(f"{clip} is damaged or not a video ({error}): generate it again") from error
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
            raise DatasetError(f"{path} and {following.name} are the same sample: remove one of them")
    return samples


def _in_order(path: Path) -> tuple[list[tuple[str, int]], str]:
    """``frame_2`` before ``frame_10``: words and numbers in turn; equal numbers by name."""
    parts = re.findall(r"(\D*)(\d*)", _name(path))
    return [(word, int(number or -1)) for word, number in parts], path.name


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _too_short(clip: Path, number: int) -> str:
    return f"{clip} has no frame {number}: a sample must hold at least {counted(number + 1, 'frame')} after its context"


# ----------------------------------------------------------------------------------------------------
# Frames as a generator wants them, and back (method section 3, external generators).
#
# Shapes: H x W a frame as the evaluation sees it (of KITTI the KB crop), P x Q padded.
# ----------------------------------------------------------------------------------------------------


Padding = Literal["plain", "cosmos"]

_COSMOS_HEIGHT, _COSMOS_WIDTH = 640, 1024
_PICTURE_HEIGHT = 512


class CropPlacement(Frozen):
    """Where the picture lies in a frame for the generator: all of it for ``plain``.

    Attributes:
        height, width: of the frame.
        top, left, rows, columns: of the picture in it.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def placement_of(height: int, width: int, padding: Padding, benchmark: BenchmarkName) -> CropPlacement:
    """Where frames of ``height`` x ``width`` go: as they are, or 512 high in 640 x 1024.

    The aspect is kept, but for KITTI and what would be wider than 1024: squashed to that width.
    """
    if padding == "plain":
        return CropPlacement(height=height, width=width, top=0, left=0, rows=height, columns=width)
    columns = min(round(width * _PICTURE_HEIGHT / height), _COSMOS_WIDTH)
    columns = _COSMOS_WIDTH if benchmark == "kitti" else columns
    return CropPlacement(
        height=_COSMOS_HEIGHT,
        width=_COSMOS_WIDTH,
        top=(_COSMOS_HEIGHT - _PICTURE_HEIGHT) // 2,
        left=(_COSMOS_WIDTH - columns) // 2,
        rows=_PICTURE_HEIGHT,
        columns=columns,
    )


def padded(frame: np.ndarray, place: CropPlacement) -> np.ndarray:
    """(H, W, 3) uint8 to (P, Q, 3): resized bilinearly, its mirrored edges around it."""
    if frame.shape[:2] != (place.rows, place.columns):
        frame = cv2.resize(frame, (place.columns, place.rows), interpolation=cv2.INTER_LINEAR)
    bottom, right = place.height - place.top - place.rows, place.width - place.left - place.columns
    if not any((place.top, place.left, bottom, right)):
        return frame
    return cv2.copyMakeBorder(frame, place.top, bottom, place.left, right, cv2.BORDER_REFLECT_101)


def unpadded(frame: np.ndarray, place: CropPlacement) -> np.ndarray:
    """(P, Q, 3) to the picture in it, (rows, columns, 3)."""
    return frame[place.top : place.top + place.rows, place.left : place.left + place.columns]


# ----------------------------------------------------------------------------------------------------
# ``contexts.json``: what was exported for a generator, and what is expected back.
# ----------------------------------------------------------------------------------------------------


MANIFEST = "contexts.json"
_FORMAT_VERSION = 1


class ContextEntry(Frozen):
    """One context: of one sequence, at one horizon.

    Attributes:
        target_frame: which frame of the generated ones is scored, from 0: the one at the labelled target.
    """

    dataset: BenchmarkName
    horizon: int = Field(ge=1)
    sequence_id: str
    context_frames: int = Field(ge=1)
    target_frame: int = Field(ge=0)
    frames_per_second: float = Field(gt=0)
    place: CropPlacement

    @property
    def folder(self) -> Path:
        """Below the export: holds ``context``, and the samples that come back."""
        return Path(self.dataset) / f"h{self.horizon}" / self.sequence_id


class ContextManifest(Frozen):
    """All contexts of an export."""

    format_version: int = _FORMAT_VERSION
    padding: Padding
    contexts: tuple[ContextEntry, ...]


def write_manifest(root: Path, manifest: ContextManifest) -> None:
    """Written last: an export without it is not finished."""
    with replacing(root / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n")


def read_manifest(root: Path) -> ContextManifest:
    """What was exported to ``root``.

    Raises:
        DatasetError: it is missing, damaged or of another format.
    """
    path = root / MANIFEST
    try:
        manifest = ContextManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing: predictions lie in the folder that `deltacache export-contexts` wrote, or beside a "
            "copy of its contexts.json"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): export the contexts again") from error
    except ValidationError as error:
        problems = problems_of(error, ContextManifest)
        raise DatasetError(f"{path} is damaged ({problems}): export the contexts again") from error
    if manifest.format_version != _FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format {manifest.format_version}, this code reads {_FORMAT_VERSION}: export again"
        )
    return manifest


# ----------------------------------------------------------------------------------------------------
# ``export-contexts``: what a video generator needs to predict the benchmarks' labelled frames.
# ----------------------------------------------------------------------------------------------------


NATIVE_STEP: Mapping[BenchmarkName, int] = {"vspw": 3, "cityscapes": 3, "kitti": 2}
"""Recorded frames from one frame of the evaluation to the next."""
_THREADS = 4
_NUMBERS = re.compile(r"\d{3,}")
"""In a frame's name; the last one is that of the frame (VSPW, KITTI: all; Cityscapes: behind city and drive)."""


@dataclass(frozen=True, slots=True)
class _Work:
    entry: ContextEntry
    paths: tuple[str, ...]


def export_contexts(wanted: ContextExport, out: Path, reporter: Reporter) -> Path:
    """Write a context for every sequence and horizon below ``out``; returns the manifest's path.

    Raises:
        DatasetError: ``out`` is not empty, a benchmark is incomplete, or there are too few frames.
        StorageError: the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} is not empty: contexts are exported to a new folder; choose another one")
    found: dict[BenchmarkName, SequenceSet] = {
        name: _sequences(wanted, name, root) for name, root in wanted.data.items()
    }
    works = [
        _work(wanted, name, sequence, horizon)
        for name, each in found.items()
        for horizon in wanted.horizons
        for sequence in each.sequences
        if len(sequence.frames) >= wanted.context + horizon
    ]

    def write(work: _Work) -> None:
        frames = [padded(read_frame(work.entry.dataset, path), work.entry.place) for path in work.paths]
        target = out / work.entry.folder / "context"
        with readable_errors(out):
            write_clip(target, frames, wanted.clip_format, work.entry.frames_per_second)

    with reporter.stage("export contexts", len(works)) as stage:
        for _ in in_threads(write, works, threads=_THREADS):
            stage.advance()
    manifest = ContextManifest(padding=wanted.padding, contexts=tuple(work.entry for work in works))
    with readable_errors(out):
        write_manifest(out, manifest)
    for name, each in found.items():
        for reason, count in each.dropped.items():
            reporter.line(f"export contexts: {name}: {count} dropped: {reason}")
    shown = works[0].entry.context_frames
    reporter.line(
        f"export contexts: {counted(len(works), 'context')} of {counted(shown, 'frame')}; put the frames "
        "that follow into "
        f"{out}/DATASET/hH/SEQUENCE/sample-00 (pictures) or sample-00.mp4, sample-01 and so on; {MANIFEST} says "
        "which frame is scored"
    )
    return out / MANIFEST


def _sequences(wanted: ContextExport, benchmark: BenchmarkName, root: Path) -> SequenceSet:
    counts = FrameCounts(tuple(wanted.context + horizon for horizon in wanted.horizons))
    return benchmark_sequences(benchmark, root, counts, wanted.kitti_split if benchmark == "kitti" else None)


def _work(wanted: ContextExport, benchmark: BenchmarkName, sequence: LabelledSequence, horizon: int) -> _Work:
    step = NATIVE_STEP[benchmark] if wanted.rate == "native" else 1
    last = sequence.frames[-1 - horizon]
    if wanted.rate == "native":
        paths = _recorded_before(last, wanted.frames, wanted.context)
    else:
        paths = sequence.frames[-horizon - wanted.context : -horizon][-wanted.frames :]
    height, width = frame_shape(benchmark, last)
    entry = ContextEntry(
        dataset=benchmark,
        horizon=horizon,
        sequence_id=sequence.sequence_id,
        context_frames=len(paths),
        target_frame=horizon * step - 1,
        frames_per_second=step / sequence.spacing_s,
        place=placement_of(height, width, wanted.padding, benchmark),
    )
    return _Work(entry, tuple(paths))


def _recorded_before(last: str, count: int, context: int) -> tuple[str, ...]:
    """The ``count`` recorded frames up to and with ``last``: those of the numbers before it.

    Raises:
        DatasetError: one is missing.
    """
    path = Path(last)
    *_, number = _NUMBERS.finditer(path.name)
    newest, width = int(number[0]), len(number[0])
    found: list[str] = []
    for at in range(newest, newest - count, -1):
        before = path.with_name(f"{path.name[: number.start()]}{at:0{width}d}{path.name[number.end() :]}")
        if at < 0 or not before.is_file():
            fewer = f"--frames {len(found)}, or " if len(found) > 1 else ""
            raise DatasetError(
                f"{path} has {counted(len(found), 'recorded frame')} up to it, not {count} ({before.name} "
                f"is missing): give {fewer}--rate evaluation --frames {context}, the frames that the evaluation sees"
            )
        found.append(str(before))
    return tuple(reversed(found))


# ----------------------------------------------------------------------------------------------------
# A generator's frames, checked and cut like the benchmark's own.
#
# Shapes: S samples, C crops, s input size.
# ----------------------------------------------------------------------------------------------------


_STAT_THREADS = 8

Key = tuple[BenchmarkName, str, int]
"""Benchmark, sequence, horizon."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a generator has for one evaluation.

    Attributes:
        samples: of every context; as many of each.
        fingerprint: of names and sizes of the files that are scored, and of where in them.
    """

    samples: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """To one context: its number of samples, those that are pictures, the fingerprint of the scored files."""

    samples: int
    folders: tuple[Numbered, ...]
    fingerprint: str


@dataclass(frozen=True)
class GeneratedFutures:
    """Where one generator's samples lie; contexts that nobody asks for need none."""

    name: str
    root: Path
    entries: Mapping[Key, ContextEntry]

    @classmethod
    def open(cls, name: str, root: Path) -> "GeneratedFutures":
        """Read what was exported.

        Raises:
            DatasetError: ``contexts.json`` is missing or damaged.
        """
        entries: dict[Key, ContextEntry] = {
            (each.dataset, each.sequence_id, each.horizon): each for each in read_manifest(root).contexts
        }
        return cls(name, root, entries)

    def check_covers(
        self,
        sequences: Mapping[BenchmarkName, Sequence[LabelledSequence]],
        context: int,
        horizons: Sequence[int],
    ) -> Answers:
        """Refuse an evaluation of what was not exported or not answered; frames are not decoded.

        Raises:
            MismatchError: names the first sequence and horizon that was not exported.
            DatasetError: contexts without samples, with different numbers of them, or folders in which a picture is
                missing or without a number.
        """
        wanted = [
            self._entry((dataset, each.sequence_id, horizon))
            for dataset, of_dataset in sequences.items()
            for each in of_dataset
            for horizon in horizons
            if context + horizon <= len(each.frames)
        ]
        answers = list(in_threads(self._answer, wanted, threads=_STAT_THREADS))
        common = Counter(each.samples for each in answers).most_common(1)[0][0]
        for entry, each in zip(wanted, answers, strict=True):
            if each.samples != common or each.samples == 0:
                raise DatasetError(
                    f"{self.root / entry.folder} holds {counted(each.samples, 'sample')} (sample-00, ...), "
                    "most contexts "
                    f"{common}: every context needs at least one sample, and all the same number"
                )
        _check_pictures(wanted, answers)
        return Answers(common, fingerprint_of({"contexts": [each.fingerprint for each in answers]}))

    def _entry(self, key: Key) -> ContextEntry:
        dataset, sequence_id, horizon = key
        if key not in self.entries:
            raise MismatchError(
                f"{self.root} has no context of {dataset}'s {sequence_id} at horizon {horizon}: export with the same "
                "--data, --context and --horizons as the evaluation has"
            )
        return self.entries[key]

    def _answer(self, entry: ContextEntry) -> "_Answer":
        samples = samples_in(self.root / entry.folder)
        folders = {path: numbered_pictures(path) for path in samples if path.is_dir()}
        scored = [
            picture_of(folders[path], entry.target_frame) if path in folders else path for path in samples
        ]
        named = [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in scored]
        fingerprint = fingerprint_of({"entry": entry.model_dump(mode="json"), "files": named})
        return _Answer(len(samples), tuple(folders.values()), fingerprint)

    def load(self, key: Key, split: CropSplit) -> np.ndarray:
        """The scored frame of every sample, resized and cut as the true frames are: (S, C, s, s, 3) uint8.

        Raises:
            DatasetError: a frame is missing, damaged, or of another size than the context's.
        """
        entry = self.entries[key]
        place = entry.place
        crops = []
        for sample in samples_in(self.root / entry.folder):
            frame = read_frame_at(sample, entry.target_frame)
            if frame.shape[:2] != (place.height, place.width):
                raise DatasetError(
                    f"{sample} has frames of {frame.shape[0]} x {frame.shape[1]} pixels, its context {place.height} x "
                    f"{place.width}: resize the generator's frames to the size that was exported"
                )
            resized = resize_frame(unpadded(frame, place), split)
            crops.append(crop_frames(resized[None], split)[:, 0])
        return np.stack(crops)


def _check_pictures(entries: Sequence[ContextEntry], answers: Sequence[_Answer]) -> None:
    """All begin with the same number; there may be fewer for a shorter horizon, or another benchmark."""
    check_first_numbers([folder for each in answers for folder in each.folders])
    alike: dict[str, list[Numbered]] = defaultdict(list)
    for entry, each in zip(entries, answers, strict=True):
        alike[f"{entry.dataset} at horizon {entry.horizon}"].extend(each.folders)
    for of, samples in alike.items():
        check_counts(samples, of)


def open_generators(settings: BenchmarkEvaluation) -> tuple[GeneratedFutures, ...]:
    """Those that ``settings`` names; see ``GeneratedFutures.open``."""
    return tuple(GeneratedFutures.open(name, root) for name, root in settings.predictions.items())
