"""Videos whose content is another than when their shard was made, behind the same name."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from deltacache.pipeline.datasets.dropping import drop_shards
from deltacache.pipeline.datasets.finishing import (
    INDEX_FILE,
    SOURCES_FILE,
    TablesSummary,
    open_table,
    read_tables_summary,
)
from deltacache.pipeline.datasets.plan import Plan, hashes, is_among, open_plan, resize_plan
from deltacache.pipeline.datasets.recorded import recorded_sources
from deltacache.pipeline.inputs.fetching import content_sha256
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.parallel import in_threads
from deltacache.schemas.errors import DatasetError, StorageError, VideoRefusedError
from deltacache.schemas.tables import INDEX_SCHEMA, SOURCES_SCHEMA

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
    copying a file or touching it is no change. A video that could not be read then has no content to differ from.
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
    say(f"{len(suspects)} videos have another size or time of change: comparing their contents")
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
        if differing[video.video_uri] - {"", sha256}
    ]


def _sha256(source: VideoSource) -> str:
    try:
        return content_sha256(source.path)
    except VideoRefusedError:
        return ""


def refuse_changed(root: UPath, changed: Sequence[VideoSource]) -> None:
    """Refuse to go on with videos that were replaced.

    Raises:
        DatasetError: there are some; the message names the first ones.
    """
    if changed:
        names = ", ".join(source.video_uri for source in changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise DatasetError(
            f"{len(changed)} videos have another content than when {root} was made of them: {names}. Put the old "
            "files back, give the new ones other names, or say --changed-videos recompute, which makes their "
            "shards anew. Nothing was changed"
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
        for task in plan.only(plan.shard_ids)
        if any(video.video_uri in sizes for video in task.videos)
    ]
    if affected:
        drop_shards(root, affected)
        resize_plan(root, sizes)
    return len(affected)


def shards_made_of_others(features: UPath, deltas: UPath) -> list[str]:
    """Shards of deltas whose features were made anew since, from other videos or more of them.

    Both have their tables. Two that have the same contents are known as such from ``tables.json`` alone.

    Raises:
        DatasetError: a table of one of them is damaged.
    """
    if len({read_tables_summary(root).contents_sha256 for root in (features, deltas)}) == 1:
        return []
    of_features, of_deltas = _contents(features), _contents(deltas)
    return [shard for shard, content in of_deltas.items() if of_features.get(shard) != content]


def _contents(root: UPath) -> dict[str, str]:
    """By shard, a digest of the contents of its videos and of which clips it has."""
    digests: dict[str, Any] = {}
    for name, schema, column in (
        (SOURCES_FILE, SOURCES_SCHEMA, "sha256"),
        (INDEX_FILE, INDEX_SCHEMA, "clip_id"),
    ):
        with open_table(root / name, schema) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["shard", column]):
                for shard, value in zip(*(part.to_pylist() for part in batch.columns), strict=True):
                    digests.setdefault(shard, hashlib.sha256()).update(f"{value} ".encode())
    return {shard: digest.hexdigest() for shard, digest in digests.items()}
