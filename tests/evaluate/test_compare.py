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
from scipy import stats

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.comparing import Comparison, Difference, compare_runs, print_comparison
from deltacache.evaluate.output import write_table
from deltacache.schemas.errors import MismatchError, NotFiniteError
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import LATER_METRIC_COLUMNS, STATISTICS_SCHEMA

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
    # a video is a unit: the mean without each of them, by hand
    left_out = np.array([np.delete(differences, at).mean() for at in range(len(differences))])
    count = len(differences)
    error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, count - 1) * error
    assert (difference.low, difference.high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half)
    )
    assert (difference.groups, difference.unit_kind) == (count, "video")


def test_two_units_have_no_interval_and_no_verdict(benchmarks: tuple[Path, Path]) -> None:
    """The miniature KITTI has two drives."""
    difference = found(
        compare_runs(*benchmarks), dataset="kitti", metric="rmse", label="DeltaWorld, mean of 4", horizon=3
    )
    assert difference.difference != 0
    assert np.isnan([difference.low, difference.high]).all()
    assert difference.verdict == "undecided, 2 drives"


def test_the_same_difference_in_every_unit_is_explained(clips: tuple[Path, Path], tmp_path: Path) -> None:
    """Losses of one value, and of another: no spread, so no interval and no verdict, for a reason."""

    def constant(loss: float) -> Path:
        rows = [
            row | {"totals": [1.0, loss, loss, 0.5]}
            for row in pq.read_table(clips[0] / "statistics.parquet").to_pylist()
            if row["task"] == "features"
        ]
        return rewritten(clips[0], tmp_path / f"{loss}", "statistics.parquet", STATISTICS_SCHEMA, rows)

    comparison = compare_runs(constant(0.25), constant(0.5))
    difference = found(comparison, metric="smooth_l1", label="Copy of the last frame", horizon=3)
    assert (difference.difference, difference.verdict) == (0.25, "undecided, no interval")
    assert "the difference is the same whichever unit is left out" in shown(comparison)


def test_sequences_of_one_video_are_one_unit(clips: tuple[Path, Path], tmp_path: Path) -> None:
    """Two views of every video: as many units as videos, and a sequence that moved to another video is refused."""
    tables = [pq.read_table(out / "statistics.parquet").to_pylist() for out in clips]
    views = [
        [row | {"sequence_id": f"{row['sequence_id']}-{view}"} for row in rows for view in (0, 1)]
        for rows in tables
    ]
    outs = [
        rewritten(out, tmp_path / str(at), "statistics.parquet", STATISTICS_SCHEMA, rows)
        for at, (out, rows) in enumerate(zip(clips, views, strict=True))
    ]
    keys = {"metric": "smooth_l1", "label": "DeltaWorld, best of 6", "horizon": 3}
    once, twice = found(compare_runs(*clips), **keys), found(compare_runs(*outs), **keys)
    assert (once.groups, twice.groups) == (10, 10)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    moved = [
        row | {"group": "elsewhere.mp4"} if row["sequence_id"].endswith("-1") else row for row in views[1]
    ]
    other = rewritten(clips[1], tmp_path / "moved", "statistics.parquet", STATISTICS_SCHEMA, moved)
    with pytest.raises(
        MismatchError, match=r"sequence .+-1 is from .+ in 0 and from elsewhere\.mp4 in moved"
    ):
        compare_runs(outs[0], other)


def test_sequences_in_another_order_are_paired_by_name(clips: tuple[Path, Path], tmp_path: Path) -> None:
    rows = pq.read_table(clips[1] / "statistics.parquet").to_pylist()
    other = rewritten(clips[1], tmp_path / "turned", "statistics.parquet", STATISTICS_SCHEMA, rows[::-1])
    keys = {"metric": "smooth_l1", "label": "DeltaWorld, best of 6", "horizon": 3}
    straight, turned = found(compare_runs(*clips), **keys), found(compare_runs(clips[0], other), **keys)
    assert (turned.low, turned.high) == pytest.approx((straight.low, straight.high))


def test_an_older_evaluation_of_clips_is_refused_by_the_way_out(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    """It has no columns for units, and no sums of features."""
    table = pq.read_table(clips[0] / "metrics.parquet").drop_columns([*LATER_METRIC_COLUMNS])
    old = rewritten(clips[0], tmp_path / "old", "metrics.parquet", table.schema, table.to_pylist())
    with pytest.raises(
        MismatchError, match="clips: old is of an older version, which did not keep what video"
    ):
        compare_runs(old, clips[1])


def test_parallel_of_the_first_version_is_compared_with_one_step(
    benchmarks: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its ``deltatok_parallel`` decoded from the true frame before, whatever the horizon."""

    def before(name: str) -> list[Row]:
        rows = pq.read_table(benchmarks[0] / name).to_pylist()
        kept = [row for row in rows if row["method"] != "deltatok_parallel"]
        one_step = "deltatok_one_step", "deltatok_parallel"
        return [row | {"method": one_step[1]} if row["method"] == one_step[0] else row for row in kept]

    schema = pq.read_schema(benchmarks[0] / "metrics.parquet")
    old_schema = pa.schema([field for field in schema if field.name not in LATER_METRIC_COLUMNS])
    old = rewritten(benchmarks[0], tmp_path / "old", "metrics.parquet", old_schema, before("metrics.parquet"))
    statistics = pa.Table.from_pylist(before("statistics.parquet"), schema=STATISTICS_SCHEMA)
    write_table(statistics, old / "statistics.parquet")
    comparison = compare_runs(old, benchmarks[0])
    assert {each.verdict for each in comparison.differences} == {"equal"}
    labels = {each.label for each in comparison.differences}
    assert "DeltaTok, one step" in labels
    assert "DeltaTok, parallel" not in labels


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_of_an_older_version_that_are_not_finite_are_refused_by_name(
    clips: tuple[Path, Path], tmp_path: Path, value: float
) -> None:
    """Their metrics would vanish from the comparison."""
    rows = pq.read_table(clips[0] / "statistics.parquet").to_pylist()
    at = next(at for at, row in enumerate(rows) if row["method"] == "deltaworld" and row["horizon"] == 3)
    rows[at] |= {"totals": [rows[at]["totals"][0], value, *rows[at]["totals"][2:]]}
    assert rows[at]["task"] == "features"
    bad = rewritten(clips[0], tmp_path / "bad", "statistics.parquet", STATISTICS_SCHEMA, rows)
    name = re.escape(rows[at]["sequence_id"])
    with pytest.raises(
        NotFiniteError, match=rf"features of deltaworld on clips, horizon 3, .* for sequence {name}: an older"
    ):
        compare_runs(clips[0], bad)


def test_a_run_equals_itself(clips: tuple[Path, Path], benchmarks: tuple[Path, Path]) -> None:
    for out in (clips[0], benchmarks[0]):
        comparison = compare_runs(out, out)
        assert {each.verdict for each in comparison.differences} == {"equal"}
        assert comparison.notes == ()


def scaled(out: Path, target: Path, factor: float, method: str | None = None) -> Path:
    """A copy with other features' sums: of one method, or of all."""
    rows = pq.read_table(out / "statistics.parquet").to_pylist()
    changed = [
        row | {"totals": [row["totals"][0], *(factor * each for each in row["totals"][1:])]}
        if row["task"] == "features" and method in (None, row["method"])
        else row
        for row in rows
    ]
    return rewritten(out, target, "statistics.parquet", STATISTICS_SCHEMA, changed)


def test_a_shift_of_all_sequences_is_seen_and_has_a_direction(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    """1 % of every loss, far less than sequences differ from each other: only pairing can see it."""
    other = scaled(clips[0], tmp_path / "shifted", 0.99)
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
    other = scaled(clips[0], tmp_path / "moved", 1 + share)
    loss = {"metric": "smooth_l1", "label": "Copy of the last frame", "horizon": 3}
    assert found(compare_runs(clips[0], other), **loss).verdict == verdict


def test_other_data_is_refused_by_name(
    clips: tuple[Path, Path], benchmarks: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        MismatchError, match="out is an evaluation of clips, one one of vspw, cityscapes, kitti"
    ):
        compare_runs(clips[0], benchmarks[0])
    rows = pq.read_table(clips[0] / "statistics.parquet").to_pylist()
    kept = [row for row in rows if row["sequence_id"] != "scene0-left-v000"]
    other = rewritten(clips[0], tmp_path / "other", "statistics.parquet", STATISTICS_SCHEMA, kept)
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


def test_frames_of_another_shape_are_another_feature_space(clips: tuple[Path, Path], tmp_path: Path) -> None:
    """Of one height: the width alone differs."""
    table = pq.read_table(clips[1] / "metrics.parquet")
    rows = [row | {"image_width": 64} for row in table.to_pylist()]
    other = rewritten(clips[1], tmp_path / "wide", "metrics.parquet", table.schema, rows)
    message = (
        "clips: distances of features, which are those of .* at 32 px in out and of .* at 32x64 px in wide"
    )
    with pytest.raises(MismatchError, match=message):
        compare_runs(clips[0], other)


def test_the_table_says_it_in_words(clips: tuple[Path, Path], tmp_path: Path) -> None:
    other = scaled(clips[0], tmp_path / "shifted", 0.9, "copy_last")
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
