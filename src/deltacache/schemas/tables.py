"""Arrow schemas of every Parquet file the project writes. Column names are fixed: others rely on them."""

import pyarrow as pa

PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("video_id", pa.string()),
        ("video_uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("first_view", pa.int32()),
        ("views", pa.int32()),
    ]
)
"""Which videos form which shard. A row is one video with views ``first_view .. first_view + views - 1``."""

INDEX_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_uri", pa.string()),
        ("view", pa.int32()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("frame_indices", pa.list_(pa.int32())),
        ("timestamps_s", pa.list_(pa.float32())),
        ("crop", pa.list_(pa.int32())),
        ("flip", pa.bool_()),
        ("decoder", pa.string()),
        ("duplicate_frames", pa.int32()),
        ("crc32c", pa.uint32()),
    ]
)
"""A row a clip. ``crop`` is top, left, height, width; ``crc32c`` is that of the token array's bytes."""

FAILURES_SCHEMA = pa.schema(
    [
        ("video_uri", pa.string()),
        ("view", pa.int32()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
"""A row a refused video or clip. ``view`` is null when the whole video was refused."""

SOURCES_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("video_id", pa.string()),
        ("video_uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""A row a video of a finished shard, in the plan's order, as it was when the shard was made; a video whose views
are in several shards has a row of each. ``version`` and ``sha256`` as in ``receipts.SourceRecord``."""

PART_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("bytes", pa.int64()),
        ("clips", pa.list_(pa.struct(list(INDEX_SCHEMA)))),
        ("failures", pa.list_(pa.struct(list(FAILURES_SCHEMA)))),
        ("sources", pa.list_(pa.struct(list(SOURCES_SCHEMA)))),
    ]
)
"""A row a finished shard: the size of its files, and what its receipt gives to the three tables above."""

_METRIC_FIELDS = [
    ("run_id", pa.string()),
    ("method", pa.string()),
    ("dataset", pa.string()),
    ("task", pa.string()),
    ("metric", pa.string()),
    ("aggregation", pa.string()),
    ("horizon", pa.int32()),
    ("horizon_s", pa.float64()),
    ("context", pa.int32()),
    ("num_samples", pa.int32()),
    ("value", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
    ("n_sequences", pa.int64()),
    ("n_targets", pa.int64()),
    ("image_size", pa.int32()),
    ("seed", pa.int64()),
    ("backbone", pa.string()),
    ("tokenizer", pa.string()),
    ("world", pa.string()),
    ("code_version", pa.string()),
    ("created_at", pa.timestamp("us", tz="UTC")),
    ("image_width", pa.int32()),
    ("unit_kind", pa.string()),
    ("n_units", pa.int64()),
    ("trained_image_size", pa.string()),
]
LATER_METRIC_COLUMNS = ("image_width", "unit_kind", "n_units", "trained_image_size")
"""Evaluations of older versions lack them; they are null then."""

METRICS_SCHEMA = pa.schema(_METRIC_FIELDS)
"""``metrics.parquet``: a row a number. ``image_size`` is the height in pixels; ``unit_kind`` is what an interval is
over (video, scene, city or drive), and ``n_units`` how many of these there are; ``trained_image_size`` is that which
the row's models were trained at where it is another one (``96``, ``256, 448x896``), else null."""

SEQUENCES_SCHEMA = pa.schema(
    [("sequence_id", pa.string()), ("unit", pa.string())]
    + [field for field in _METRIC_FIELDS if field[0] not in ("ci_low", "ci_high", "n_sequences", "n_units")]
)
"""``sequences.parquet``: the same per sequence. ``unit`` names the video, scene, city or drive that it is from, since
sequences of one unit are not independent."""

_CURVE_FIELDS = [
    ("step", pa.int64()),
    ("loss", pa.float64()),
    ("gradient_norm", pa.float64()),
    ("loss_max", pa.float64()),
    ("gradient_norm_max", pa.float64()),
    ("spikes", pa.int64()),
    ("learning_rate", pa.float64()),
    ("step_time_s", pa.float64()),
    ("data_wait_s", pa.float64()),
    ("clips_per_s", pa.float64()),
]
_OF_DATA = [("validation_loss", pa.float64()), ("shares", pa.list_(pa.float64()))]
"""Null in rows without a validation, and where there is no mixture."""
_PROBES = ("copy_ratio", "z_swap_ratio", "zero_z_ratio", "delta_rank")

TOKENIZER_CURVES_SCHEMA = pa.schema(
    [
        *_CURVE_FIELDS,
        ("mse", pa.float64()),
        ("copy_last_mse", pa.float64()),
        *((name, pa.float64()) for name in (*_PROBES, "black_first_ratio")),
        *_OF_DATA,
    ]
)
"""``curves.parquet`` of a tokenizer: a row an interval; probes are null in rows where none was made."""

WORLD_CURVES_SCHEMA = pa.schema(
    [
        *_CURVE_FIELDS,
        *((name, pa.float64()) for name in (*_PROBES, "predicted_rank", "query_entropy", "queries_winning")),
        *_OF_DATA,
    ]
)
"""``curves.parquet`` of a world model: a row an interval; probes are null in rows where none was made."""

HEAD_CURVES_SCHEMA = pa.schema([*_CURVE_FIELDS, ("main_loss", pa.float64()), ("gradient_loss", pa.float64())])
"""``curves.parquet`` of a head: the parts of its loss are null where it has one part only."""

STATISTICS_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("task", pa.string()),
        ("method", pa.string()),
        ("tokenizer", pa.string()),
        ("world", pa.string()),
        ("aggregation", pa.string()),
        ("horizon", pa.int32()),
        ("horizon_s", pa.float64()),
        ("num_samples", pa.int32()),
        ("sequence_id", pa.string()),
        ("group", pa.string()),
        ("n_targets", pa.int64()),
        ("totals", pa.list_(pa.float64())),
    ]
)
"""``statistics.parquet``: sums of single sequences, from which ``evaluate.pooled`` makes every metric. ``group`` is the
unit of ``sequences.parquet``."""
