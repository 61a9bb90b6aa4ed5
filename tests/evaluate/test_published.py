"""Published numbers are those of the table, in the words of one's own, and never taken for one's own."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from benchmark_runs import mini_settings
from rich.console import Console

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.report.page import write_report
from deltacache.evaluate.report.panels import PUBLISHED_MARK, panels, published_rows, references
from deltacache.evaluate.report.tables import print_metrics
from deltacache.schemas.benchmarks import BENCHMARK_TASK
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import METRICS_SCHEMA


@pytest.fixture(scope="module")
def run(golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "out"
    evaluate_benchmarks(mini_settings(golden, mini_benchmarks, out), SilentReporter())
    return out


def published(**columns: object) -> float:
    rows = [
        row
        for row in published_rows().to_pylist()
        if all(row[name] == value for name, value in columns.items())
    ]
    (row,) = rows
    return row["value"]


def test_rows_are_in_the_words_of_metrics() -> None:
    table = published_rows()
    assert table.schema.equals(METRICS_SCHEMA)
    assert all(name.startswith("published:") for name in table["run_id"].to_pylist())
    for row in table.to_pylist():
        assert row["task"] == BENCHMARK_TASK.get(row["dataset"]) or row["dataset"] == "foresight"
        assert 0 < row["value"] < (1 if row["metric"] != "rmse" else 10)
    # the main table: 6 own methods, of which two have best and mean, Cosmos without the mean at short, and the rest
    main = table.filter(pc.field("image_size") == 512)
    assert main.num_rows == 3 * (2 * 4 + 3 + 2 * 4)


def test_some_numbers_by_hand() -> None:
    paper, released = "published:paper", "published:released"
    vspw = {"dataset": "vspw", "metric": "miou", "image_size": 512}
    assert published(**vspw, run_id=paper, method="deltaworld", aggregation="best", horizon=1) == 0.554
    assert published(**vspw, run_id=released, method="deltaworld", aggregation="mean", horizon=3) == 0.466
    kitti = {"dataset": "kitti", "metric": "rmse"}
    assert published(**kitti, run_id=paper, method="cosmos_12b", aggregation="mean", horizon=3) == 4.14
    assert published(**kitti, run_id=released, method="deltatok", horizon=3) == 2.86
    assert published(dataset="foresight", metric="delta1", method="dino_foresight_delta", horizon=3) == 0.856
    table_c = {"dataset": "cityscapes", "image_size": 256, "horizon": 3}
    assert published(**table_c, method="deltaworld_discriminative") == 0.469


def test_other_tables_are_shown_at_their_image_size_alone() -> None:
    row = {"dataset": "vspw", "task": "segmentation", "metric": "miou", "horizon": 3}
    assert {each["image_size"] for each in references([row | {"image_size": 512}])} == {512}
    assert {each["image_size"] for each in references([row | {"image_size": 256}])} == {256, 512}
    assert not references([row | {"image_size": 512, "dataset": "clips"}])
    assert not references([row | {"image_size": 512, "horizon": 2}])


def test_they_stand_apart_on_a_terminal(run: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    print_metrics(pq.read_table(run / "metrics.parquet"), console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert f"DeltaWorld, best of 20, paper {PUBLISHED_MARK}" in text
    assert f"DeltaWorld, best of 20, released {PUBLISHED_MARK}" in text
    assert f"{PUBLISHED_MARK} published by others" in text
    line = next(line for line in text.splitlines() if "best of 20, released" in line)
    assert line.split()[-2:] == ["56.3", "51.5"]


@pytest.mark.slow
def test_they_stand_apart_in_a_report(run: Path) -> None:
    page = write_report(run).read_text()
    assert page.count('<tr class="published') == 3 * 10
    assert "were published by others" in page
    for panel in panels(pq.read_table(run / "metrics.parquet")):
        for line in panel.lines:
            assert bool(line.published) == line.label.endswith(PUBLISHED_MARK)


def test_they_are_never_written_as_results(run: Path) -> None:
    for name in ("metrics", "sequences", "samples"):
        table: pa.Table = pq.read_table(run / f"{name}.parquet")
        assert not any(each.startswith("published:") for each in table["run_id"].to_pylist())
