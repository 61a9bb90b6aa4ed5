"""Numbers that others published, as rows in the words of ``metrics.parquet`` (method section 4).

``published.csv``: the main table (512 px; best and mean of 20 samples), Table C (256 px, mid-term) and Table D
(DINO-Foresight's setting, 448 × 896). Short is one step, mid three.
"""

import csv
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any

import pyarrow as pa

from deltacache.schemas.benchmarks import SPACING_S
from deltacache.schemas.foresight import DATASET as FORESIGHT
from deltacache.schemas.foresight import PAPER_SIZE
from deltacache.schemas.tables import METRICS_SCHEMA

Row = dict[str, Any]
_HORIZONS = {"short": 1, "mid": 3}
_CONTEXT = 4
_SPACING_S: dict[str, float] = {**SPACING_S, FORESIGHT: SPACING_S["cityscapes"]}
_RUN = "published:"
SOURCES = {
    "paper": "“A Frame is Worth One Token”, CVPR 2026, arXiv 2604.04913",
    "released": "the released code and weights, amazon-far/deltatok (its README says that DeltaTok reconstructs in "
    "parallel, the code computes the closed loop: compare with the row of that name)",
}


@cache
def _entries() -> tuple[Row, ...]:
    """Rows of ``metrics.parquet``, each with its ``label`` and ``source``."""
    text = resources.files("deltacache.evaluate.report").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(row for entry in csv.DictReader(text.splitlines()) for row in _rows(entry))


def _rows(entry: dict[str, str]) -> Iterator[Row]:
    for name, horizon in _HORIZONS.items():
        if entry[name]:
            yield {
                **dict.fromkeys(METRICS_SCHEMA.names),
                **{key: entry[key] for key in ("dataset", "task", "metric", "method", "aggregation")},
                "run_id": _RUN + entry["source"],
                "horizon": horizon,
                "horizon_s": horizon * _SPACING_S[entry["dataset"]],
                "context": _CONTEXT,
                "num_samples": int(entry["num_samples"]),
                "image_size": int(entry["image_size"]),
                "image_width": PAPER_SIZE[1] if entry["table"] == "D" else int(entry["image_size"]),
                "value": float(entry[name]),
                "label": entry["label"],
                "source": entry["source"],
                "main": entry["table"] == "main",
            }


def published_rows() -> pa.Table:
    """All published numbers as rows of ``metrics.parquet``; their ``run_id`` begins with ``published:``."""
    return pa.Table.from_pylist(list(_entries()), schema=METRICS_SCHEMA)


def published_at(datasets: Iterable[str]) -> str:
    """The image size of the published numbers of some data sets, in words."""
    whole = f"{PAPER_SIZE[0]} × {PAPER_SIZE[1]} px"
    found = set(datasets)
    if found == {FORESIGHT}:
        return f"at {whole}"
    others = "at 512 px unless the method says otherwise"
    return f"{others}, those of whole frames at {whole}" if FORESIGHT in found else others


def is_published(run_id: str) -> bool:
    """Whether a row is a published one."""
    return run_id.startswith(_RUN)


def references(rows: Iterable[Row]) -> list[Row]:
    """Published rows to show beside one's own ``rows``: of the same data, metrics and horizons.

    Those of the main table always; those of Tables C and D beside evaluations of their image size.
    """
    own = {(row["dataset"], row["task"], row["metric"], row["horizon"]) for row in rows}
    sizes = {(row["image_size"], row.get("image_width")) for row in rows}
    return [
        row
        for row in _entries()
        if (row["dataset"], row["task"], row["metric"], row["horizon"]) in own
        and (
            row["main"]
            or not sizes.isdisjoint({(row["image_size"], width) for width in (row["image_width"], None)})
        )
    ]
