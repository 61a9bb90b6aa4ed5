import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import TOKENIZER_CURVES_SCHEMA
from deltacache.train.logs import plot_curves, read_curves, write_curves

SCHEMA = pa.schema([("step", pa.int64()), ("loss", pa.float64()), ("copy_ratio", pa.float64())])


def test_curves_go_on_from_a_step_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    assert read_curves(path, 10) == []
    write_curves(
        [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.5, "copy_ratio": 2.0}, {"step": 6}], path, SCHEMA
    )
    assert read_curves(path, 4) == [
        {"step": 2, "loss": 0.5, "copy_ratio": None},
        {"step": 4, "loss": 0.5, "copy_ratio": 2.0},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.parquet"]


def test_damaged_curves_are_named(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DatasetError, match=r"curves\.parquet cannot be read.*delete it"):
        read_curves(path, 4)


def test_a_single_row_with_rate_zero_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves([{"step": 1, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 0.0}], path, "world")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_of_an_earlier_schema_go_on(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    write_curves([{"step": 2, "loss": 0.5}], path, SCHEMA)
    write_curves(
        [*read_curves(path, 2), {"step": 4, "loss": 0.25, "mse": 0.1}], path, TOKENIZER_CURVES_SCHEMA
    )
    table = pq.read_table(path)
    assert table.schema == TOKENIZER_CURVES_SCHEMA
    assert table["loss"].to_pylist() == [0.5, 0.25]


def test_probes_that_are_missing_or_infinite_do_not_spoil_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    rows = [{"step": s, "loss": 0.5, "copy_ratio": r} for s, r in ((1, None), (2, 0.5), (3, math.inf))]
    plot_curves(rows, path, "tokenizer")
    assert path.read_bytes().startswith(b"\x89PNG")
