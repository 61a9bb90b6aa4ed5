"""Paired differences against obvious loops; what does not belong together is refused by name."""

import io
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_runs import mini_settings
from drawn_features import DrawnWorld
from rich.console import Console

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.comparing.compare import Comparison, Difference, compare_runs
from deltacache.evaluate.comparing.tables import print_comparison
from deltacache.evaluate.rows import write_table
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import SEQUENCES_SCHEMA, STATISTICS_SCHEMA

Row = dict[str, Any]


@pytest.fixture(scope="module")
def benchmarks(
    golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The miniature benchmarks with two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    outs = (folder / "one", folder / "two")
    for seed, out in enumerate(outs):
        evaluate_benchmarks(mini_settings(golden, mini_benchmarks, out, seed=seed), SilentReporter())
    return outs


@pytest.fixture(scope="module")
def clips(evaluated: DrawnWorld) -> tuple[Path, Path]:
    settings = evaluated.settings(out="compared", seed=4, examples=0)
    evaluate_clips(settings, SilentReporter())
    return evaluated.root / "out", settings.out


def found(comparison: Comparison, **columns: object) -> Difference:
    (difference,) = [
        each
        for each in comparison.differences
        if all(getattr(each, name) == value for name, value in columns.items())
    ]
    return difference


def shown(comparison: Comparison, **options: bool) -> str:
    """What a terminal shows."""
    text = io.StringIO()
    print_comparison(comparison, Console(file=text, width=200), **options)
    return text.getvalue()


def rewritten(out: Path, target: Path, name: str, schema: pa.Schema, rows: Iterable[Row]) -> Path:
    """A copy of an evaluation with another table."""
    shutil.copytree(out, target)
    write_table(pa.Table.from_pylist(list(rows), schema=schema), target / name)
    return target


def test_clips_by_hand(clips: tuple[Path, Path]) -> None:
    keys = {"method": "deltaworld", "aggregation": "best", "metric": "smooth_l1", "horizon": 3}
    values = [
        {
            row["sequence_id"]: row["value"]
            for row in pq.read_table(out / "sequences.parquet").to_pylist()
            if all(row[name] == value for name, value in keys.items())
        }
        for out in clips
    ]
    differences = np.array([values[1][name] - values[0][name] for name in values[0]])
    difference = found(compare_runs(*clips), metric="smooth_l1", label="DeltaWorld, best of 6", horizon=3)
    assert difference.difference == pytest.approx(differences.mean())
    assert difference.a == pytest.approx(np.mean(list(values[0].values())))
    rng = np.random.default_rng(5)
    drawn = [rng.choice(differences, len(differences)).mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low
    assert difference.low == pytest.approx(low, abs=0.1 * width)
    assert difference.high == pytest.approx(high, abs=0.1 * width)
    assert width > 1e-4


def test_benchmarks_are_pooled_and_resampled_by_group(benchmarks: tuple[Path, Path]) -> None:
    """RMSE from the sums; with two drives a resample is one of three mixtures, whose ends are the interval's."""
    keys = {"dataset": "kitti", "task": "depth", "method": "deltaworld", "aggregation": "mean", "horizon": 3}
    drives = []
    for out in benchmarks:
        rows = [
            row
            for row in pq.read_table(out / "statistics.parquet").to_pylist()
            if all(row[name] == value for name, value in keys.items())
        ]
        groups = sorted({row["group"] for row in rows})
        drives.append([np.sum([row["totals"] for row in rows if row["group"] == each], 0) for each in groups])

    def rmse(sums: np.ndarray) -> float:
        return float(np.sqrt(sums[1] / sums[0]))

    difference = found(
        compare_runs(*benchmarks), dataset="kitti", metric="rmse", label="DeltaWorld, mean of 4", horizon=3
    )
    a, b = drives
    assert difference.difference == pytest.approx(rmse(b[0] + b[1]) - rmse(a[0] + a[1]))
    alone = [rmse(b[each]) - rmse(a[each]) for each in (0, 1)]
    assert (difference.low, difference.high) == pytest.approx((min(alone), max(alone)))
    assert difference.groups == 2
    assert difference.verdict == "undecided, 2 groups"


def test_a_run_equals_itself(clips: tuple[Path, Path], benchmarks: tuple[Path, Path]) -> None:
    for out in (clips[0], benchmarks[0]):
        comparison = compare_runs(out, out)
        assert {each.verdict for each in comparison.differences} == {"equal"}
        assert comparison.notes == ()


def test_a_shift_of_all_sequences_is_seen_and_has_a_direction(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    """1 % of every loss, far less than sequences differ from each other: only pairing can see it."""
    rows = pq.read_table(clips[0] / "sequences.parquet").to_pylist()
    shifted = [row | {"value": 0.99 * row["value"]} if row["task"] == "features" else row for row in rows]
    other = rewritten(clips[0], tmp_path / "shifted", "sequences.parquet", SEQUENCES_SCHEMA, shifted)
    forth, back = compare_runs(clips[0], other), compare_runs(other, clips[0])
    loss = {"metric": "smooth_l1", "label": "Copy of the last frame", "horizon": 3}
    assert (found(forth, **loss).verdict, found(back, **loss).verdict) == ("better", "worse")
    cosine = loss | {"metric": "cosine"}
    assert (found(forth, **cosine).verdict, found(back, **cosine).verdict) == ("worse", "better")
    assert found(forth, metric="mode_coverage", label="DeltaWorld, 6 samples", horizon=3).verdict == "equal"


def test_what_only_one_has_is_said(evaluated: DrawnWorld, clips: tuple[Path, Path]) -> None:
    settings = evaluated.settings(out="compared-fewer", horizons=(3,), worlds=(evaluated.noise,), examples=0)
    evaluate_clips(settings, SilentReporter())
    comparison = compare_runs(clips[0], settings.out)
    assert {each.horizon for each in comparison.differences} == {3}
    assert "clips, horizon 1: only out has it" in comparison.notes
    assert comparison.notes == (
        "clips, horizon 1: only out has it",
        "DeltaWorld, learned query: only out has it (clips, horizon 3)",
    )
    assert comparison.settings == ("horizons 1, 3 and 3",)


def test_each_method_that_only_one_has_is_one_line(evaluated: DrawnWorld, clips: tuple[Path, Path]) -> None:
    """Another number of samples: best, mean and the sampled metrics at two horizons have no partner."""
    settings = evaluated.settings(out="compared-samples", samples=2, seed=4, examples=0)
    evaluate_clips(settings, SilentReporter())
    comparison = compare_runs(clips[1], settings.out)
    assert comparison.notes == (
        "DeltaWorld: only compared has it (best of 6, mean of 6, 6 samples; clips, horizons 1, 3); only "
        "compared-samples has it (best of 2, mean of 2, 2 samples; clips, horizons 1, 3)",
    )
    assert comparison.settings == ("samples 6 and 2",)
    text = shown(comparison)
    assert text.splitlines()[2] == "settings that differ: samples 6 and 2"
    assert text.count("not compared") == 1
    assert "settings that differ" not in shown(compare_runs(clips[1], clips[1]))


@pytest.mark.parametrize(("share", "verdict"), [(1e-7, "equal"), (1e-5, "worse")])
def test_differences_below_rounding_are_none(
    clips: tuple[Path, Path], tmp_path: Path, share: float, verdict: str
) -> None:
    rows = pq.read_table(clips[0] / "sequences.parquet").to_pylist()
    moved = [row | {"value": (1 + share) * row["value"]} for row in rows]
    other = rewritten(clips[0], tmp_path / "moved", "sequences.parquet", SEQUENCES_SCHEMA, moved)
    loss = {"metric": "smooth_l1", "label": "Copy of the last frame", "horizon": 3}
    assert found(compare_runs(clips[0], other), **loss).verdict == verdict


def test_other_data_is_refused_by_name(
    clips: tuple[Path, Path], benchmarks: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        MismatchError, match="out is an evaluation of clips, one one of vspw, cityscapes, kitti"
    ):
        compare_runs(clips[0], benchmarks[0])
    rows = pq.read_table(clips[0] / "sequences.parquet").to_pylist()
    kept = [row for row in rows if row["sequence_id"] != "scene0-left-v000"]
    other = rewritten(clips[0], tmp_path / "other", "sequences.parquet", SEQUENCES_SCHEMA, kept)
    with pytest.raises(
        MismatchError, match=r"out has 10 sequences and other 9; 1 only in out \(scene0-left-v000\)"
    ):
        compare_runs(clips[0], other)


def test_other_labels_are_refused_by_name(benchmarks: tuple[Path, Path], tmp_path: Path) -> None:
    rows = pq.read_table(benchmarks[0] / "statistics.parquet").to_pylist()
    name = next(row["sequence_id"] for row in rows if row["task"] == "segmentation")
    for row in rows:
        if row["task"] == "segmentation" and row["sequence_id"] == name:
            row["totals"][-1] += 1
    other = rewritten(benchmarks[0], tmp_path / "relabelled", "statistics.parquet", STATISTICS_SCHEMA, rows)
    with pytest.raises(
        MismatchError, match=rf"sequence {re.escape(name)} has other labels in one than in relabelled"
    ):
        compare_runs(benchmarks[0], other)


def test_features_of_another_backbone_are_left_out(benchmarks: tuple[Path, Path], tmp_path: Path) -> None:
    table = pq.read_table(benchmarks[1] / "metrics.parquet")
    rows = [row | {"backbone": "other@0"} for row in table.to_pylist()]
    other = rewritten(benchmarks[1], tmp_path / "foreign", "metrics.parquet", table.schema, rows)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("context: 4", "context: 3"))
    comparison = compare_runs(benchmarks[0], other)
    backbone = table["backbone"][0].as_py()
    assert comparison.settings == ("context 4 and 3", "seed 0 and 1", f"backbone {backbone} and other@0")
    assert {"miou", "rmse"} <= {each.metric for each in comparison.differences}
    assert not {"smooth_l1", "spread_skill"} & {each.metric for each in comparison.differences}
    assert any("distances of features" in note and "other@0" in note for note in comparison.notes)


def test_the_table_says_it_in_words(clips: tuple[Path, Path], tmp_path: Path) -> None:
    rows = pq.read_table(clips[0] / "sequences.parquet").to_pylist()
    shifted = [row | {"value": 0.9 * row["value"]} if row["method"] == "copy_last" else row for row in rows]
    other = rewritten(clips[0], tmp_path / "shifted", "sequences.parquet", SEQUENCES_SCHEMA, shifted)
    for every, titles in ((False, 1), (True, 3)):
        text = shown(compare_runs(clips[0], other), every_metric=every)
        assert text.count("method ") == titles
        line = next(line for line in text.splitlines() if line.strip().startswith("Copy of the last frame"))
        assert line.split()[-1] == "better"
        assert "A: out\nB: shifted" in text
        (equal,) = [
            line for line in text.splitlines() if line.startswith("clips: no difference beyond rounding for")
        ]
        assert "True future (bound)" in equal
        assert "Copy of the last frame" not in equal
