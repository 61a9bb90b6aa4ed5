"""Videos whose content is another than when their shard was made, behind the same name."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from deltacache.pipeline.datasets.plan import Plan, hashes, is_among, iter_tasks, open_plan
from deltacache.pipeline.datasets.receipts import BESIDE, finished_shards, read_receipts
from deltacache.pipeline.datasets.writing import (
    INDEX_FILE,
    SOURCES_FILE,
    TablesSummary,
    clips_in,
    distinct,
    drop_durably,
    failures_in,
    finished_summary,
    fold,
    open_table,
    read_card,
    read_tables_summary,
    sources_in,
)
from deltacache.pipeline.inputs.fetching import content_sha256
from deltacache.pipeline.inputs.side_arrays import SideSource, side_values
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, in_threads
from deltacache.schemas.datasets import DatasetCard, SideArray, size_text
from deltacache.schemas.errors import (
    DatasetError,
    FailureReason,
    MismatchError,
    StorageError,
    VideoRefusedError,
)
from deltacache.schemas.tables import INDEX_SCHEMA, SOURCES_SCHEMA
from deltacache.schemas.texts import counted, disk_text

# ----------------------------------------------------------------------------------------------------
# What the finished shards hold, from the tables where they are of all shards, else from parts and receipts.
#
# A command that runs commits shards that the tables do not know yet, and folds them into parts: receipts are
# read of the others alone.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a dataset holds; ``videos`` are those of which at least one clip is there."""

    clips: int
    videos: int
    planned_videos: int
    shards: int
    planned_shards: int
    failures: dict[str, int]
    bytes: int


def held_parts(root: AnyPath, plan: Plan) -> Iterator[pa.Table]:
    """What the finished shards of a plan hold, some at a time, as ``fold`` gives it.

    Raises:
        DatasetError: a receipt is damaged.
    """
    return fold(root, plan.shard_ids, finished_shards(root), partial(read_receipts, root))


def recorded_sources(root: AnyPath, plan: Plan, held: TablesSummary | None) -> Iterator[pa.Table]:
    """The videos of all finished shards as they were then, with the columns of ``SOURCES_SCHEMA``, some at a time.

    Compare ``version``, and where that differs ``sha256``, to notice replaced videos. ``held`` is
    ``finished_summary`` of this plan.

    Raises:
        DatasetError: a receipt is damaged.
    """
    if held is not None:
        try:
            file = open_table(root / SOURCES_FILE, SOURCES_SCHEMA, held)
        except StorageError:
            raise
        except DatasetError:
            pass  # damaged: the receipts say the same
        else:
            with file:
                for batch in file.iter_batches():
                    yield pa.Table.from_batches([batch], SOURCES_SCHEMA)
            return
    yield from map(sources_in, held_parts(root, plan))


def holdings(root: AnyPath) -> Holdings:
    """Add up what the finished shards of a dataset hold, also while a command writes to it.

    Raises:
        DatasetError: a receipt is damaged.
    """
    plan = open_plan(root)
    summary = finished_summary(root, plan)
    if summary is not None:
        return Holdings(
            summary.clips,
            summary.videos,
            summary.planned_videos,
            summary.shards,
            summary.planned_shards,
            summary.failures,
            summary.shard_bytes,
        )
    clips = size = shards = 0
    videos, failures = [np.empty(0, np.int64)], Counter[str]()
    for part in held_parts(root, plan):
        rows = clips_in(part)
        clips += rows.num_rows
        shards += part.num_rows
        size += int(part["bytes"].to_numpy().sum())
        videos.append(np.unique(hashes(rows["video_uri"].unique().to_pylist())))
        failures.update(failures_in(part)["reason"].to_pylist())
    return Holdings(
        clips=clips,
        videos=len(np.unique(np.concatenate(videos))),
        planned_videos=distinct(batch.column(0) for batch in plan.batches(["video_uri"])),
        shards=shards,
        planned_shards=len(plan.shard_ids),
        failures=dict(failures),
        bytes=size,
    )


_HASH_THREADS = 8
_ROWS_AT_ONCE = 1 << 16


def same_videos(
    root: UPath, plan: Plan, held: TablesSummary, sources: Collection[VideoSource], views: int
) -> bool:
    """Whether a finished dataset is of these very videos, none new, gone or changed, and has all their views.

    It holds ``held``. Says no of videos that are not in the plan's order too, as after a second run added some: then
    ``changed_videos`` and ``grow_plan`` find out, which takes longer.
    """
    if plan.videos != len(sources):
        return False
    for batch in plan.batches(["first_view", "views"]):
        first, number = (column.to_numpy() for column in batch.columns)
        if first.any() or (number < views).any():
            return False
    rest = iter(sources)
    try:
        file = open_table(root / SOURCES_FILE, SOURCES_SCHEMA, held)
    except StorageError:
        raise
    except DatasetError:
        return False  # damaged: ``recorded_sources`` knows the way
    with file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["video_uri", "size_bytes", "version"]):
            some = list(islice(rest, batch.num_rows))
            found = [
                pa.array([video.video_uri for video in some], pa.string()),
                pa.array([video.size_bytes for video in some], pa.int64()),
                pa.array([video.version for video in some], pa.string()),
            ]
            if not all(held.equals(now) for held, now in zip(batch.columns, found, strict=True)):
                return False
    return next(rest, None) is None


def changed_videos(
    sources: Collection[VideoSource],
    root: UPath,
    plan: Plan,
    held: TablesSummary | None,
    say: Callable[[str], object],
) -> list[VideoSource]:
    """The sources whose content differs from what clips in the dataset at ``root`` were made of.

    Only a video whose size or version (its time of change, its ETag) differs from a recorded one is read again:
    copying a file or touching it is not a change. A video that could not be read then has no content to differ from.
    The dataset has this plan, and ``held`` is its ``finished_summary``.

    Raises:
        DatasetError: a receipt is damaged.
    """
    names = np.sort(hashes(video.video_uri for video in sources))
    states = np.sort(hashes((video.video_uri, video.size_bytes, video.version) for video in sources))
    differing: dict[str, set[str]] = {}
    for records in recorded_sources(root, plan, held):
        uris, *about, sha256 = (
            records[name].to_pylist() for name in ("video_uri", "size_bytes", "version", "sha256")
        )
        same = is_among(states, hashes(zip(uris, *about, strict=True)))
        for place in np.flatnonzero(is_among(names, hashes(uris)) & ~same).tolist():
            if sha256[place]:
                differing[uris[place]] = set()
    suspects = [video for video in sources if video.video_uri in differing]
    if not suspects:
        return []
    say(
        f"{counted(len(suspects), 'video has', 'videos have')} another size or time of change: comparing their contents"
    )
    for records in recorded_sources(
        root, plan, held
    ):  # what is known of them, several when one changed between two shards
        for uri, sha256 in zip(*(records[name].to_pylist() for name in ("video_uri", "sha256")), strict=True):
            if uri in differing:
                differing[uri].add(sha256)
    now = in_threads(_sha256, suspects, threads=_HASH_THREADS)
    return [
        video
        for video, sha256 in zip(suspects, now, strict=True)
        if sha256 is not None and differing[video.video_uri] - {"", sha256}
    ]


def _sha256(source: VideoSource) -> str | None:
    """None for one that cannot be read now, of which nobody knows whether it changed."""
    try:
        return content_sha256(source.path)
    except VideoRefusedError as error:
        unknown = error.reason in (FailureReason.UNREADABLE, FailureReason.UNAVAILABLE)
        return None if unknown else ""


def videos_of_other_rows(root: UPath, plan: Plan, beside: SideSource) -> set[str]:
    """Videos of finished shards whose clips hold other side arrays than ``beside`` has for them now.

    Raises:
        DatasetError: a receipt is damaged, or ``beside`` cannot be read.
    """
    arrays, others = beside.arrays, set[str]()
    done = finished_shards(root)
    for receipt in read_receipts(root, [shard for shard in plan.shard_ids if shard in done]):
        for row in receipt.clips:
            uri = row["video_uri"]
            if uri in others:
                continue
            now = beside.at(uri, np.asarray(row["timestamps_s"], np.float32))
            for name, then in side_values(row[BESIDE], arrays).items():
                if isinstance(then, list):
                    same = then == now[name]
                else:
                    same = np.array_equal(then, np.asarray(now[name]), equal_nan=True)
                if not same:
                    others.add(uri)
    return others


def shards_of_other_rows(features: UPath, deltas: UPath) -> list[str]:
    """Finished shards of deltas that hold other side arrays than those of their features do now.

    Raises:
        DatasetError: a receipt is damaged.
    """
    shards = sorted(finished_shards(deltas) & finished_shards(features))
    receipts = zip(read_receipts(features, shards), read_receipts(deltas, shards), strict=True)
    others = list[str]()
    for shard, (of_features, of_deltas) in zip(shards, receipts, strict=True):
        now = {row["clip_id"]: row[BESIDE] for row in of_features.clips}
        if any(row[BESIDE] != now.get(row["clip_id"], row[BESIDE]) for row in of_deltas.clips):
            others.append(shard)
    return others


def refuse_changed(root: UPath, changed: Sequence[VideoSource]) -> None:
    """Refuse to go on with videos that were replaced, or whose side arrays were.

    Raises:
        DatasetError: there are some; the message names the first ones.
    """
    if changed:
        names = ", ".join(source.video_uri for source in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise DatasetError(
            f"{counted(len(changed), 'video has', 'videos have')} changed since {root} was made, in content or in "
            f"side arrays: {names}. Put the old files back, "
            "give the new ones other names, or use --changed-videos recompute, which makes their "
            "shards again. Nothing was changed"
        )


def drop_changed(root: UPath, changed: Sequence[VideoSource]) -> int:
    """Drop every shard that holds one of these videos, and plan it again with their sizes of now.

    Returns:
        How many shards were dropped.
    """
    sizes = {source.video_uri: source.size_bytes for source in changed}
    plan = open_plan(root)
    affected = [
        task.shard_id
        for task in iter_tasks(plan.batches())
        if any(video.video_uri in sizes for video in task.videos)
    ]
    if affected:
        drop_durably(root, affected, sizes)
    return len(affected)


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the finished shards of deltas have in common with the features that are there now.

    Attributes:
        same: how many are of these features as they are.
        grown: whose features hold the same videos and all their clips, and more clips.
        changed: whose features hold other videos, or no longer all clips.
        missing: which the features do not have.
        unknown: one of the same whose videos have clips and no checksum, if there is one.
        example: a video of ``changed`` or ``missing`` with the SHA-256 of its content, in the deltas and in the
            features; empty where it is unknown or not there.
    """

    same: int
    grown: list[str]
    changed: list[str]
    missing: list[str]
    unknown: str | None
    example: tuple[str, str, str]

    def check_known(self, features: UPath, deltas: UPath, *, adds: bool) -> None:
        """Refuse to add to deltas of which nobody can tell what they were made of.

        Raises:
            DatasetError: the message names both.
        """
        if adds and self.unknown is not None:
            raise DatasetError(
                f"{deltas} has no checksums of the videos in its shard {self.unknown}, so it cannot be checked whether "
                f"it was made from {features}: nothing was added. Tokenize into a new folder"
            )

    def to_drop(self, features: UPath, deltas: UPath, made_of: str, *, recompute: bool) -> list[str]:
        """The shards to drop: none, or with ``recompute`` those of videos that were replaced in the same features.

        Args:
            made_of: the features that the deltas were made of, as far as they say so.

        Raises:
            MismatchError: the deltas were made of another feature dataset.
            DatasetError: shards would have to be dropped, and nobody asked for that.
        """
        others = len(self.changed) + len(self.missing)
        if not others:
            return []
        video, was, now = self.example
        content = f"{video} with content {was[:16]}" if was else f"{video}, whose content it does not record"
        found = f"has it with content {now[:16]}" if now else "does not have it in this shard"
        shards = counted(self.same + len(self.grown) + others, "shard")
        between = (
            f"{deltas} was made from {made_of} and holds {content}, but {features} {found}: {others} of its {shards} "
            "differ in their videos. Nothing was changed"
        )
        if not self.same + len(self.grown):
            raise MismatchError(
                f"{features} is not the feature dataset that these deltas were made from. {between}. Give the features "
                "that they were made from, or another output folder"
            )
        if not recompute:
            raise DatasetError(
                f"The videos of {features} have changed since these deltas were made from it. {between}. Give the "
                "features as they were, another output folder, or --changed-videos recompute, which removes these "
                "shards and makes them again"
            )
        return [*self.changed, *self.missing]


def lineage(features: UPath, deltas: UPath, summaries: Sequence[TablesSummary] = ()) -> Lineage:
    """Compare finished deltas with the features that they are said to come from, by the contents of their videos.

    The SHA-256 of every video tells one feature dataset from another: it stays when a dataset grows, is copied or
    repaired, while the settings are the same for datasets of different videos.

    Both have their tables. Two that have the same contents are known as such from ``tables.json`` alone; ``summaries``
    are those of both, if they were read already.

    Raises:
        DatasetError: a table of one of them is damaged.
    """
    summaries = summaries or [read_tables_summary(root) for root in (features, deltas)]
    if len({summary.contents_sha256 for summary in summaries}) == 1:
        return Lineage(summaries[1].shards, [], [], [], None, ("", "", ""))
    of_features, _ = _contents(features)
    of_deltas, unknown = _contents(deltas)
    differing = [shard for shard, content in of_deltas.items() if of_features.get(shard) != content]
    now, then = _held_by(features, differing), _held_by(deltas, differing)
    grown, changed, missing, example = [], [], [], ("", "", "")
    for shard in differing:
        mine, theirs = then[shard], now.get(shard)
        altered = [
            uri
            for uri in mine.with_clips
            if not mine.sha256.get(uri) or mine.sha256[uri] != (theirs.sha256.get(uri) if theirs else None)
        ]
        if theirs is not None and not altered and mine.clips <= theirs.clips:
            grown.append(shard)
            continue
        (missing if theirs is None else changed).append(shard)
        if example[0]:
            continue
        video = next(iter(altered or mine.with_clips or mine.sha256), shard)
        example = (video, mine.sha256.get(video, ""), theirs.sha256.get(video, "") if theirs else "")
    same = len(of_deltas) - len(differing)
    unknown.difference_update(differing)
    return Lineage(same, grown, changed, missing, min(unknown, default=None), example)


@dataclass(slots=True)
class _Held:
    """Of one shard: contents of its videos by uri, which of them have clips, and the ids of the clips."""

    sha256: dict[str, str] = field(default_factory=dict)
    with_clips: dict[str, None] = field(default_factory=dict)
    clips: set[str] = field(default_factory=set)


def _held_by(root: UPath, shards: Sequence[str]) -> dict[str, _Held]:
    held: dict[str, _Held] = {}
    for uri, shard, sha256 in _rows_of(shards, root / SOURCES_FILE, SOURCES_SCHEMA, "sha256"):
        held.setdefault(shard, _Held()).sha256[uri] = sha256
    for uri, shard, clip_id in _rows_of(shards, root / INDEX_FILE, INDEX_SCHEMA, "clip_id"):
        of = held.setdefault(shard, _Held())
        of.with_clips[uri] = None
        of.clips.add(clip_id)
    return held


def _rows_of(
    shards: Sequence[str], path: UPath, schema: pa.Schema, column: str
) -> Iterator[tuple[str, str, str]]:
    """``video_uri``, ``shard`` and ``column`` of the rows of these shards."""
    if not shards:
        return
    with open_table(path, schema) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["video_uri", "shard", column]):
            rows = pa.Table.from_batches([batch]).filter(pc.field("shard").isin(shards))
            yield from zip(*(rows[name].to_pylist() for name in ("video_uri", "shard", column)), strict=True)


def _contents(root: UPath) -> tuple[dict[str, str], set[str]]:
    """By shard, a digest of the contents of its videos and of which clips it has.

    Also the shards with clips of whose videos no content is known.
    """
    digests: dict[str, Any] = {}
    with_clips, known = set[str](), set[str]()
    for name, schema, column, having in (
        (SOURCES_FILE, SOURCES_SCHEMA, "sha256", known),
        (INDEX_FILE, INDEX_SCHEMA, "clip_id", with_clips),
    ):
        with open_table(root / name, schema) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["shard", column]):
                for shard, value in zip(*(part.to_pylist() for part in batch.columns), strict=True):
                    digests.setdefault(shard, hashlib.sha256()).update(f"{value} ".encode())
                    if value:
                        having.add(shard)
    return {shard: digest.hexdigest() for shard, digest in digests.items()}, with_clips - known


# ----------------------------------------------------------------------------------------------------
# What a dataset is, from its card, tables and receipts: also while a command is still making it.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DatasetDescription:
    """What a dataset holds now.

    Attributes:
        videos: of which at least one clip is there.
        planned_videos: in the plan, refused ones too.
        failures: refused videos and clips, by reason.
        bytes: size of all finished shards.
    """

    root: AnyPath
    card: DatasetCard
    clips: int
    videos: int
    planned_videos: int
    shards: int
    planned_shards: int
    failures: Mapping[str, int]
    bytes: int

    @property
    def finished(self) -> bool:
        """Whether every planned shard is there."""
        return self.shards == self.planned_shards > 0

    def __str__(self) -> str:
        card, sampling = self.card, self.card.sampling
        rows, columns = card.patch_grid
        refused = ", ".join(f"{reason} {count}" for reason, count in self.failures.items()) or "none"
        parents = ", ".join(f"{name} {value}" for name, value in card.parents.items())
        taken = ""
        if card.backbone.layers is not None:
            taken += f", layers {','.join(map(str, card.backbone.layers))}"
        if card.backbone.pca_fingerprint is not None:
            taken += f", PCA {card.backbone.pca_fingerprint}"
        spacing = f"{sampling.spacing_min_s:g}-{sampling.spacing_max_s:g} s apart"
        state = "finished" if self.finished else "not finished"
        lines = [
            f"{self.root}: {card.kind} in {card.store} shards, {state}",
            f"  holds        {counted(self.clips, 'clip')} of {counted(self.videos, 'video')} in "
            f"{self.shards} of {self.planned_shards} "
            f"shards, {disk_text(self.bytes)}",
            f"  refused      {refused}",
            f"  fingerprint  {card.fingerprint}, made from {parents}",
            f"  backbone     {card.backbone.id}{taken}, {size_text(card.image_size)} px, "
            f"{rows} x {columns} patches, {card.hidden_size} wide, {card.dtype}, {card.precision} forward",
            f"  sampling     {counted(sampling.frames, 'frame')} {spacing}, "
            f"{'augmented' if sampling.augment else 'not augmented'}, seed {sampling.seed}"
            f"{', within shots' if sampling.shots else ''}"
            f"{f', all clips with stride {sampling.stride}' if sampling.windows else ''}",
            *(f"  beside       {name}: {_beside(array)}" for name, array in sorted(card.side_arrays.items())),
            f"  written by   deltacache {card.code_version}, format {card.format_version}",
        ]
        return "\n".join(lines)


def _beside(array: SideArray) -> str:
    what = "text" if array.kind == "text" else counted(array.width or 1, "number")
    return f"{what} a frame, {array.rule}"


def describe(root: AnyPath | str) -> DatasetDescription:
    """Describe the dataset at ``root``, finished or not, also while a command writes to it.

    Of a finished one a few files are read; else the parts, and the receipts of shards that no part knows.

    Raises:
        DatasetError: not a dataset, or its card, plan or a receipt is damaged.
    """
    root = dataset_root(root)
    card, held = read_card(root), holdings(root)
    return DatasetDescription(
        root=root,
        card=card,
        clips=held.clips,
        videos=held.videos,
        planned_videos=held.planned_videos,
        shards=held.shards,
        planned_shards=held.planned_shards,
        failures=dict(sorted(held.failures.items())),
        bytes=held.bytes,
    )
