"""The examples of docs/reports.md run as they stand, and other libraries read what we read."""

import re
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from drawn_features import DrawnWorld

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "reports.md"


def examples() -> dict[str, str]:
    """Blocks of Python in the page by the library they import first."""
    blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    return {re.findall(r"^import (\w+)", block, re.MULTILINE)[0]: block for block in blocks}


def test_each_library_has_its_example() -> None:
    assert set(examples()) == {"pandas", "polars", "duckdb"}


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_an_example_gives_the_numbers(
    evaluated: DrawnWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str
) -> None:
    (tmp_path / "results").symlink_to(evaluated.root / "out")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(examples()[library], names)  # our own page
    table = names["table"]
    if isinstance(table, duckdb.DuckDBPyRelation):
        table = table.df()
    elif isinstance(table, pl.DataFrame):
        table = pd.DataFrame(table.to_dict(as_series=False))
    assert isinstance(table, pd.DataFrame)
    table = table.reset_index() if "method" not in table.columns else table
    expected = {
        (row["method"], row["aggregation"], row["horizon"]): row["value"]
        for row in pq.read_table(evaluated.root / "out" / "metrics.parquet").to_pylist()
        if row["metric"] == "smooth_l1"
    }
    found = {
        (row["method"], row["aggregation"], int(str(column))): row[column]
        for row in table.to_dict("records")
        for column in table.columns
        if str(column).isdigit()
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["metrics", "sequences", "samples", "statistics"])
def test_every_table_opens_everywhere(evaluated: DrawnWorld, name: str) -> None:
    path = evaluated.root / "out" / f"{name}.parquet"
    rows = pq.read_table(path).num_rows
    assert rows > 0
    assert len(pd.read_parquet(path)) == pl.read_parquet(path).height == rows
    assert duckdb.sql(f"SELECT count(*) FROM '{path}'").fetchall() == [(rows,)]
