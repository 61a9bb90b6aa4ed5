"""What the finished shards hold, from the merged tables where they are there, else from the receipts.

A command that runs commits shards that the tables do not know yet: of those alone the receipts are read. The
tables say for which shards they were merged, for ``sources.parquet`` has rows of every shard.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from crc32c import crc32c

from deltacache.pipeline.datasets.finishing import (
    FAILURES_FILE,
    INDEX_FILE,
    SOURCES_FILE,
    read_tables_summary,
    source_rows,
)
from deltacache.pipeline.datasets.receipts import (
    FileRecord,
    finished_shards,
    read_receipts,
    receipt_path,
    unseal_receipt,
)
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.sealing import read_parquet
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, read_many
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, SOURCES_SCHEMA

_URI = re.compile(rb'"video_uri":("(?:[^"\\]|\\.)*")')


def recorded_sources(root: AnyPath | str) -> pa.Table:
    """The videos of all finished shards as they were then, with the columns of ``SOURCES_SCHEMA``.

    In no certain order. Compare ``version``, and where that differs ``sha256``, to notice replaced videos.

    Raises:
        DatasetError: a receipt is damaged.
    """
    root = dataset_root(root)
    finished = finished_shards(root)
    merged = _merged_sources(root)
    shards = _shards_in(merged)
    if not shards <= finished:
        keep = [shard in finished for shard in merged["shard"].to_pylist()]
        merged = merged.filter(pa.array(keep, pa.bool_()))
    rows = [row for receipt in read_receipts(root, sorted(finished - shards)) for row in source_rows(receipt)]
    return pa.concat_tables([merged, pa.Table.from_pylist(rows, schema=SOURCES_SCHEMA)])


@dataclass(slots=True)
class Holdings:
    """What finished shards hold; ``videos`` are uris of which at least one clip is there."""

    clips: int
    videos: set[str]
    failures: Counter[str]
    bytes: int


def holdings(root: AnyPath, finished: Iterable[str]) -> Holdings:
    """Add up what the shards ``finished`` hold.

    Raises:
        DatasetError: a receipt is damaged.
    """
    rest, total = set(finished), Holdings(0, set(), Counter(), 0)
    shards = _shards_in(_merged_sources(root))
    if shards and shards <= rest:
        try:
            total = _merged_holdings(root)
            rest -= shards
        except (DatasetError, OSError, ValueError):  # tables that are being replaced, or damaged
            pass
    ids = sorted(rest)
    paths = [receipt_path(root, shard_id) for shard_id in ids]
    for path, content in zip(paths, read_many(paths), strict=True):
        try:
            _add_up(content, total)
        except ValueError as error:
            raise DatasetError(
                f"{path} is damaged ({error}): `deltacache verify {root} --repair` drops that shard, and the command "
                "that made the dataset makes it again"
            ) from error
    return total


def _add_up(content: bytes, total: Holdings) -> None:
    """Add what a receipt says, without parsing its rows, which takes ten times as long.

    Receipts have their keys in alphabetical order, and no text in them can hold a quote that is not escaped.

    Raises:
        ValueError: it is damaged.
    """
    body = unseal_receipt(content)
    clips, failures = body.index(b',"clips":['), body.index(b',"failures":[')
    files, fingerprint = body.index(b',"files":{'), body.index(b',"fingerprint":')
    uris = _URI.findall(body, clips, failures)
    total.clips += len(uris)
    total.videos.update(json.loads(uri) for uri in set(uris))
    total.failures.update(row["reason"] for row in json.loads(body[failures + len(b',"failures":') : files]))
    records = json.loads(body[files + len(b',"files":') : fingerprint])
    total.bytes += sum(record["bytes"] for record in records.values())


def _merged_holdings(root: AnyPath) -> Holdings:
    videos = read_parquet(read_file(root / INDEX_FILE), INDEX_SCHEMA, ["video_uri"])
    failures = read_parquet(read_file(root / FAILURES_FILE), FAILURES_SCHEMA, ["reason"])
    return Holdings(
        clips=videos.num_rows,
        videos=set(videos["video_uri"].unique().to_pylist()),
        failures=Counter(failures["reason"].to_pylist()),
        bytes=read_tables_summary(root).shard_bytes,
    )


def _shards_in(sources: pa.Table) -> set[str]:
    return set(sources["shard"].unique().to_pylist())


def _merged_sources(root: AnyPath) -> pa.Table:
    """``sources.parquet`` if it is the one that ``tables.json`` says, else an empty table.

    Whatever takes a shard out of a dataset removes ``tables.json`` first, so that no shard made anew is taken
    for the one that the table knew.
    """
    try:
        record = read_tables_summary(root).files.get(SOURCES_FILE)
        content = read_file(root / SOURCES_FILE)
        if record != FileRecord(len(content), crc32c(content)):
            raise ValueError(f"{SOURCES_FILE} is another than tables.json says")
        return read_parquet(content, SOURCES_SCHEMA)
    except (DatasetError, OSError, ValueError):
        return SOURCES_SCHEMA.empty_table()
