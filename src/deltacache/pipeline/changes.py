"""Videos whose content is another than when their shard was made, behind the same name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
from upath import UPath

from deltacache.pipeline.dropping import drop_shards
from deltacache.pipeline.fetching import content_sha256
from deltacache.pipeline.finishing import INDEX_FILE, SOURCES_FILE, read_table
from deltacache.pipeline.parallel import in_threads
from deltacache.pipeline.plan import read_plan, replace_plan, resized, shard_tasks
from deltacache.pipeline.sources import VideoSource
from deltacache.schemas.errors import DatasetError, VideoRefusedError
from deltacache.schemas.tables import INDEX_SCHEMA, SOURCES_SCHEMA

_HASH_THREADS = 8


@dataclass(frozen=True, slots=True)
class Recorded:
    """A video as it was when a shard was made of it, or planned when none was."""

    size_bytes: int
    version: str  # empty when unknown
    sha256: str


def recorded_videos(root: UPath) -> dict[str, Recorded]:
    """What is known of every planned video, by uri. The tables must have been merged.

    Raises:
        DatasetError: a table is damaged.
    """
    known = {
        video.video_uri: Recorded(video.size_bytes, "", "")
        for task in shard_tasks(read_plan(root))
        for video in task.videos
    }
    if known:
        sources = read_table(root / SOURCES_FILE, SOURCES_SCHEMA)
        columns = (sources[name].to_pylist() for name in ("video_uri", "size_bytes", "version", "sha256"))
        known.update((uri, Recorded(*rest)) for uri, *rest in zip(*columns, strict=True))
    return known


def changed_videos(sources: Iterable[VideoSource], recorded: dict[str, Recorded]) -> list[VideoSource]:
    """The sources whose content differs from what is recorded.

    Only a video whose size or version (its time of change, its ETag) differs is read again: copying a file or
    touching it is no change.
    """
    suspects, changed = [], []
    for source in sources:
        known = recorded.get(source.video_uri)
        if known is None or _looks_the_same(source, known):
            continue
        (suspects if known.sha256 else changed).append(source)
    hashes = in_threads(_sha256, suspects, threads=_HASH_THREADS)
    for source, sha256 in zip(suspects, hashes, strict=True):
        if sha256 != recorded[source.video_uri].sha256:
            changed.append(source)
    return sorted(changed, key=lambda source: source.video_uri)


def _looks_the_same(source: VideoSource, known: Recorded) -> bool:
    return source.size_bytes == known.size_bytes and known.version in ("", source.version)


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
            "shards anew; nothing was changed"
        )


def drop_changed(root: UPath, changed: Sequence[VideoSource]) -> int:
    """Drop every shard that holds one of these videos, and plan it again with their sizes of now.

    Returns:
        How many shards were dropped.
    """
    sizes = {source.video_uri: source.size_bytes for source in changed}
    plan = read_plan(root)
    tasks = shard_tasks(plan)
    affected = [task.shard_id for task in tasks if any(v.video_uri in sizes for v in task.videos)]
    if affected:
        drop_shards(root, affected)
        replace_plan(root, resized(plan, sizes))
    return len(affected)


def shards_made_of_others(features: UPath, deltas: UPath) -> list[str]:
    """Shards of deltas whose features were made anew since, from other videos or more of them.

    Raises:
        DatasetError: a table of one of them is damaged.
    """
    of_features, of_deltas = _contents(features), _contents(deltas)
    return [shard for shard, content in of_deltas.items() if of_features.get(shard) != content]


def _contents(root: UPath) -> dict[str, tuple[list[str], list[str]]]:
    """By shard: the content hashes of its videos, and its clips."""
    sources: pa.Table = read_table(root / SOURCES_FILE, SOURCES_SCHEMA)
    index: pa.Table = read_table(root / INDEX_FILE, INDEX_SCHEMA)
    contents = {shard: ([], []) for shard in sources["shard"].unique().to_pylist()}
    for part, table, column in ((0, sources, "sha256"), (1, index, "clip_id")):
        for shard, value in zip(table["shard"].to_pylist(), table[column].to_pylist(), strict=True):
            contents[shard][part].append(value)
    return contents
