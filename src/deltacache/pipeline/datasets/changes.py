"""Videos whose content is another than when their shard was made, behind the same name."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from upath import UPath

from deltacache.pipeline.datasets.dropping import drop_shards
from deltacache.pipeline.datasets.finishing import INDEX_FILE, SOURCES_FILE, read_table
from deltacache.pipeline.datasets.plan import read_plan, replace_plan, resized, shard_tasks
from deltacache.pipeline.datasets.recorded import recorded_sources
from deltacache.pipeline.inputs.fetching import content_sha256
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.parallel import in_threads
from deltacache.schemas.errors import DatasetError, VideoRefusedError
from deltacache.schemas.tables import INDEX_SCHEMA, SOURCES_SCHEMA

_HASH_THREADS = 8


@dataclass(frozen=True, slots=True)
class Recorded:
    """A video as it was when a shard was made of it. ``version`` and ``sha256`` are empty when unknown."""

    size_bytes: int
    version: str
    sha256: str


def recorded_videos(root: UPath) -> dict[str, set[Recorded]]:
    """What is known of every video of a finished shard, by uri; several when it changed between two shards.

    Raises:
        DatasetError: a receipt is damaged.
    """
    sources = recorded_sources(root)
    recorded: dict[str, set[Recorded]] = {}
    columns = (sources[name].to_pylist() for name in ("video_uri", "size_bytes", "version", "sha256"))
    for uri, *about in zip(*columns, strict=True):
        recorded.setdefault(uri, set()).add(Recorded(*about))
    return recorded


def changed_videos(
    sources: Iterable[VideoSource], recorded: dict[str, set[Recorded]], say: Callable[[str], object]
) -> list[VideoSource]:
    """The sources whose content differs from what clips were made of.

    Only a video whose size or version (its time of change, its ETag) differs is read again: copying a file or
    touching it is no change. A video that could not be read then has no content to differ from.
    """
    suspects = [
        source
        for source in sources
        if not all(_looks_the_same(source, known) for known in recorded.get(source.video_uri, ()))
    ]
    if suspects:
        say(f"{len(suspects)} videos have another size or time of change: comparing their contents")
    hashes = in_threads(_sha256, suspects, threads=_HASH_THREADS)
    return [
        source
        for source, sha256 in zip(suspects, hashes, strict=True)
        if {known.sha256 for known in recorded[source.video_uri]} - {"", sha256}
    ]


def _looks_the_same(source: VideoSource, known: Recorded) -> bool:
    return not known.sha256 or (source.size_bytes == known.size_bytes and source.version == known.version)


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


def _contents(root: UPath) -> dict[str, str]:
    """By shard, a digest of the contents of its videos and of which clips it has."""
    digests: dict[str, Any] = {}
    for name, schema, column in (
        (SOURCES_FILE, SOURCES_SCHEMA, "sha256"),
        (INDEX_FILE, INDEX_SCHEMA, "clip_id"),
    ):
        for batch in (
            read_table(root / name, schema).select(["shard", column]).to_batches(max_chunksize=1 << 16)
        ):
            for shard, value in zip(*(part.to_pylist() for part in batch.columns), strict=True):
                digests.setdefault(shard, hashlib.sha256()).update(f"{value} ".encode())
    return {shard: digest.hexdigest() for shard, digest in digests.items()}
