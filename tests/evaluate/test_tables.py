"""Metric tables as a person reads them: what is in which cell, with and without a terminal."""

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_features import SCENES, DrawnWorld
from rich.console import Console

from deltacache.evaluate.output import Method
from deltacache.evaluate.report.charts import all_styles, rank_verdict, spread_verdict, styles_of
from deltacache.evaluate.report.panels import (
    CITYSCAPES_CLASSES,
    VSPW_CLASSES,
    Cell,
    Column,
    Line,
    Panel,
    class_name,
    panels,
)
from deltacache.evaluate.report.runs import facts_of, open_runs, place_names
from deltacache.evaluate.report.tables import findings, headline, intervals_text, plain_text, print_metrics
from deltacache.evaluate.statistics import Series, Statistic, statistics_of, statistics_table
from deltacache.schemas.benchmarks import CLASSES
from deltacache.schemas.tables import METRICS_SCHEMA


def made_panel(*values: float) -> Panel:
    cells = tuple(Cell(value, value / 2, value * 2, 7, 0.2 * (1 + at)) for at, value in enumerate(values))
    lines = (
        Line("copy_last", "single", "Copy", "Copy", cells),
        Line("deltaworld", "best", "Best", "Best", (cells[0],) + (None,) * (len(cells) - 1)),
    )
    columns = tuple(Column(1 + at, 0.2 * (1 + at)) for at in range(len(values)))
    return Panel("clips", "features", "smooth_l1", columns, lines)


def test_numbers_keep_four_digits_of_the_largest() -> None:
    assert made_panel(0.012345).text(made_panel(0.012345).cells[0]) == ("0.01235", "[0.00617, 0.02469]")
    assert made_panel(12.3456).text(made_panel(12.3456).cells[0])[0] == "12.346"
    assert made_panel(0.0).text(made_panel(0.0).cells[0])[0] == "0.000"


def test_horizons_say_steps_and_seconds() -> None:
    panel = made_panel(0.5, 1.0)
    assert [panel.heading(column) for column in range(2)] == ["1 step (0.20 s)", "2 steps (0.40 s)"]


def test_plain_text_is_aligned(evaluated: DrawnWorld) -> None:
    metrics = pq.read_table(evaluated.root / "out" / "metrics.parquet")
    blocks = plain_text(metrics).split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [
        f"clips: {panel.title}" for panel in panels(metrics)
    ]
    for block in blocks:
        assert len({len(line) for line in block.split("\n")[1:]}) == 1
    value = next(
        row["value"] for row in metrics.to_pylist() if row["aggregation"] == "best" and row["horizon"] == 3
    )
    line = next(line for line in blocks[0].split("\n") if "best of 6" in line)
    assert line.split("  ")[-1].strip().startswith(f"{value:.4f} [")


@pytest.mark.parametrize("terminal", [True, False])
def test_every_number_is_printed_within_80_columns(evaluated: DrawnWorld, terminal: bool) -> None:
    metrics = pq.read_table(evaluated.root / "out" / "metrics.parquet")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, no_color=True, color_system=None)
    print_metrics(metrics, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for panel in panels(metrics):
        for line in panel.lines:
            for cell in line.cells:
                assert " ".join(panel.text(cell)) in text
    assert f"Over {2 * SCENES} sequences of {2 * SCENES} videos and {SCENES} scenes; in brackets 95 %" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_what_the_intervals_of_older_tables_are(evaluated: DrawnWorld) -> None:
    """Benchmarks were resampled by unit then, feature datasets by sequence."""
    rows = [
        row | {"unit_kind": None, "n_units": None}
        for row in pq.read_table(evaluated.root / "out" / "metrics.parquet").to_pylist()
    ]
    clips = intervals_text(pa.Table.from_pylist(rows, schema=METRICS_SCHEMA))
    benchmark = intervals_text(
        pa.Table.from_pylist([row | {"dataset": "kitti"} for row in rows], schema=METRICS_SCHEMA)
    )
    assert clips.startswith(f"{benchmark}; of feature datasets they are over sequences")
    assert "percentile bootstrap" in benchmark
    assert "sequences" not in benchmark


def test_two_models_of_one_kind_are_told_apart(evaluated: DrawnWorld) -> None:
    metrics = pq.read_table(evaluated.root / "out" / "metrics.parquet")
    rows = [row | {"method": row["method"].removesuffix("_discriminative")} for row in metrics.to_pylist()]
    tables = panels(pa.Table.from_pylist(rows, schema=metrics.schema))
    (coverage,) = [panel for panel in tables if panel.metric == "mode_coverage"]
    assert len({line.label for line in coverage.lines}) == 2


def test_models_have_the_names_of_their_folders_and_their_own_colours(evaluated: DrawnWorld) -> None:
    (run,) = open_runs([evaluated.root / "out"])
    assert sorted(run.names.values()) == ["learned", "noise", "tokenizer"]
    shown = panels({"": run.metrics}, {"": run.names})
    labels = [line.label for line in shown[0].own]
    assert labels[-3:] == ["noise, best of 6", "noise, mean of 6", "learned"]
    assert "DeltaTok, closed loop" in labels
    styles = all_styles(shown)
    assert styles["noise, best of 6"].colour == styles["noise, mean of 6"].colour == styles["noise"].colour
    assert styles["noise"].colour != styles["learned"].colour
    assert "noise, best of 6" in plain_text(run.metrics, run.names)
    facts = facts_of(run)
    assert facts["World model learned"].startswith("DeltaWorld, learned query, ")


def test_two_models_of_one_kind_have_two_colours() -> None:
    lines = [
        Line("deltaworld", each, name, f"{name}, {each}", ()) for name in "abc" for each in ("best", "mean")
    ]
    styles = styles_of(lines)
    assert len({styles[name].colour for name in "abc"}) == 3
    assert all(styles[f"{name}, mean"].colour == styles[f"{name}, best"].colour for name in "abc")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["chain/worlds/small", "chain/worlds/large"], ["small", "large"]),
        (["a/checkpoints/step-00000100", "b/best", "c/model.safetensors"], ["a", "b", "c"]),
        (["a/checkpoints/step-00000100", "a/checkpoints/step-00000200"], ["step-00000100", "step-00000200"]),
        (["a/world", "b/world"], ["a/world", "b/world"]),
        (["hub/models--org--released/snapshots/" + "0" * 40 + "/pytorch_model.bin"], ["released"]),
    ],
)
def test_names_are_what_tells_paths_apart(paths: list[str], names: list[str]) -> None:
    assert place_names([Path("/runs") / path for path in paths]) == names


def test_verdicts_say_what_the_calibration_charts_show() -> None:
    assert rank_verdict([0.4, 0.1, 0.1, 0.4]).startswith("In single features the samples are too alike: 80 %")
    assert rank_verdict([0.05, 0.45, 0.45, 0.05]).startswith(
        "In single features the samples are too different"
    )
    assert rank_verdict([0.25] * 4) == (
        "Close to calibrated: 50 % of features lie outside all samples, 50 % would if calibrated."
    )
    assert "lower than the true future on average" in rank_verdict([0.1, 0.15, 0.3, 0.45])
    assert spread_verdict({"1 step ahead": 0.5, "2 steps ahead": 1.0, "3 steps ahead": 1.5}) == (
        "Spread over error: 1 step ahead 0.50, too alike; 2 steps ahead 1.00, close to calibrated; "
        "3 steps ahead 1.50, too different (1 is calibrated)."
    )


def test_the_best_value_of_a_column_is_among_rows_that_do_not_know_the_future() -> None:
    values = {"present": 0.0, "copy_last": 0.5, "deltaworld": 0.3, "dino_world": 0.4}
    lines = tuple(
        Line(method, "single", method, method, (Cell(value, None, None, 1, 0.2), None))
        for method, value in values.items()
    )
    panel = Panel("clips", "features", "smooth_l1", (Column(1, 0.2), Column(2, 0.4)), lines)
    assert panel.best(0) == {"deltaworld"}
    assert panel.best(1) == replace(panel, lines=lines[:2]).best(0) == frozenset()
    assert replace(panel, metric="cosine").best(0) == {"copy_last"}
    assert replace(panel, metric="spread_skill").best(0) == {"copy_last"}


def test_classes_have_names() -> None:
    assert len(VSPW_CLASSES) == CLASSES["vspw"]
    assert len(CITYSCAPES_CLASSES) == CLASSES["cityscapes"]
    assert class_name("vspw", 0) == "wall"
    assert class_name("vspw", 60) == "person"
    assert class_name("vspw", 123) == "train"
    assert class_name("cityscapes", 18) == "bicycle"
    assert class_name("other", 3) == "class 3"


def test_findings_are_the_tables_numbers_in_words(evaluated: DrawnWorld) -> None:
    tables = panels(pq.read_table(evaluated.root / "out" / "metrics.parquet"))
    sentences = findings(tables)
    assert len(sentences) == 4
    best = next(line for line in tables[0].lines if line.aggregation == "best")
    assert f"best future {tables[0].text(best.cells[0])[0]}" in sentences[0]
    assert f"in 0 % of {SCENES} scenes" in sentences[-1]


def compared(copy: float, tokenizer: float, best: float, mean: float, metric: str = "smooth_l1") -> str:
    """The headline where these are the values at 0.2 s; every interval reaches 10 % to both sides."""
    names = {
        ("copy_last", "single"): copy,
        ("deltatok", "single"): tokenizer,
        ("deltaworld", "best"): best,
        ("deltaworld", "mean"): mean,
    }
    lines = tuple(
        Line(*name, "DeltaWorld", "", (Cell(value, 0.9 * value, 1.1 * value, 9, 0.2),), samples=20)
        for name, value in names.items()
    )
    return headline((Panel("clips", "features", metric, (Column(1, 0.2),), lines),))


def test_the_headline_says_how_a_model_compares_with_copying() -> None:
    assert compared(1.0, 0.2, 0.22, 0.68) == (
        "The best of 20 futures of DeltaWorld beats copying the last frame by 78 % at 0.2 s; "
        "the average future by 32 % at 0.2 s (feature loss)."
    )
    assert "; the average future is not clearly better or worse" in compared(1.0, 0.2, 0.22, 0.9)
    worse = "is worse than copying the last frame by 50 % at 0.2 s; the average future is worse"
    assert worse in compared(1.0, 0.2, 1.5, 1.6)
    assert "longer" not in compared(1.0, 0.2, 0.9, 1.6)
    assert ": train the world model longer (" in compared(1.0, 0.2, 1.5, 1.6)
    assert ": train the tokenizer, which is worse than copying too, longer (" in compared(1.0, 1.4, 1.5, 1.6)
    assert "beats copying the last frame by 30.0 points at 0.2 s" in compared(0.5, 0.9, 0.8, 0.7, "miou")


def test_findings_without_a_world_model_are_silent() -> None:
    panel = made_panel(0.5)
    assert findings((replace(panel, lines=panel.lines[:1]),)) == []
    assert headline((replace(panel, lines=panel.lines[:1]),)) == ""


def test_findings_name_every_one_of_several_models(evaluated: DrawnWorld) -> None:
    """A second DeltaWorld with the values of the first and one: neither is left out, and both have a name."""
    metrics = pq.read_table(evaluated.root / "out" / "metrics.parquet")
    rows = [row for row in metrics.to_pylist() if row["method"] != "deltaworld_discriminative"]
    first = next(row["world"] for row in rows if row["method"] == "deltaworld")
    rows += [
        row | {"world": "f" * 16, "value": row["value"] + 1} for row in rows if row["method"] == "deltaworld"
    ]
    tables = panels(pa.Table.from_pylist(rows, schema=metrics.schema))
    values = {
        (row["world"], row["aggregation"]): tables[0].text(Cell(row["value"], None, None, 1, 0.1))[0]
        for row in rows
        if (row["method"], row["metric"], row["horizon"]) == ("deltaworld", "smooth_l1", 1)
    }
    for world in (first, "f" * 16):
        best, mean = values[world, "best"], values[world, "mean"]
        assert f"DeltaWorld ({world[:8]}) best future {best}, average future {mean}; " in findings(tables)[0]


def test_rows_of_sums_cost_little_before_they_are_written() -> None:
    """A dict for each row took 1 KiB: 0.3 GiB of the rows that are held."""
    series = Series("clips", "features", Method("copy_last"), "single", 1, 1)
    held = [
        Statistic(series, f"clip-{at}", f"video-{at}", 0.2, np.full(4, float(at))) for at in range(20_000)
    ]
    statistics_table(held[:1])  # what this imports is none of the rows
    tracemalloc.start()
    table = statistics_table(held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(held)
    back = list(statistics_of(table.slice(19_999)))
    assert (back[0].series, back[0].sequence_id, back[0].group) == (series, "clip-19999", "video-19999")
    assert (back[0].totals == 19_999).all()
