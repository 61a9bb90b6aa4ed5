"""Best and mean by the number of samples are what fewer samples would have given; spread and ranks against loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from benchmark_runs import mini_settings
from drawn_features import SCENES, DrawnWorld

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.benchmarks.sampling import ensemble_of
from deltacache.evaluate.clips.rollouts import best_samples
from deltacache.evaluate.clips.run import evaluate_clips, open_run
from deltacache.evaluate.metrics import SampleSums, feature_metrics, sample_counts
from deltacache.evaluate.output import read_notes, read_samples
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.progress import SilentReporter

Row = dict[str, Any]
KEYS = ("dataset", "method", "task", "metric", "aggregation", "horizon")


def by_key(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    found = {tuple(row[name] for name in KEYS): row for row in rows}
    assert len(found) == len(rows)
    return found


def best_and_mean(table: Path) -> list[Row]:
    return [row for row in pq.read_table(table).to_pylist() if row["aggregation"] != "single"]


def assert_same_numbers(found: list[Row], expected: list[Row]) -> None:
    """Also the intervals."""
    mine, theirs = by_key(found), by_key(expected)
    assert mine.keys() == theirs.keys()
    for key, row in mine.items():
        for name in ("value", "ci_low", "ci_high", "n_sequences", "n_targets", "num_samples"):
            if row[name] is None or theirs[key][name] is None:
                assert row[name] == theirs[key][name], (key, name)
            else:
                assert row[name] == pytest.approx(theirs[key][name], rel=1e-4, abs=1e-7), (key, name)


@pytest.mark.parametrize(
    ("samples", "counts"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 5, 6)), (20, (1, 2, 5, 10, 20)), (50, (1, 2, 5, 10, 20, 50))],
)
def test_counts(samples: int, counts: tuple[int, ...]) -> None:
    assert sample_counts(samples) == counts


@pytest.mark.parametrize("count", [2, 6])
def test_clips_of_fewer_samples(evaluated: DrawnWorld, count: int) -> None:
    settings = evaluated.settings(out=f"of-{count}", samples=count, examples=0)
    evaluate_clips(settings, SilentReporter())
    rows = [row for row in read_samples(evaluated.root / "out").to_pylist() if row["num_samples"] == count]
    assert {row["horizon"] for row in rows} == {1, 3}
    assert_same_numbers(rows, best_and_mean(settings.out / "metrics.parquet"))


@pytest.mark.slow
def test_benchmarks_of_fewer_samples(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    outs = {count: tmp_path / str(count) for count in (2, 5)}
    for count, out in outs.items():
        settings = mini_settings(golden, mini_benchmarks, out, samples=count)
        only = {name: {"vspw": getattr(settings, name)["vspw"]} for name in ("data", "heads")}
        evaluate_benchmarks(settings.model_copy(update=only), SilentReporter())
    rows = [row for row in read_samples(outs[5]).to_pylist() if row["num_samples"] == 2]
    assert {row["task"] for row in rows} == {"segmentation", "features"}
    assert_same_numbers(rows, best_and_mean(outs[2] / "metrics.parquet"))
    # what is of fewer samples is in that table alone
    for name in ("metrics", "sequences", "statistics"):
        assert {row["num_samples"] for row in best_and_mean(outs[5] / f"{name}.parquet")} == {5}


def test_sums_over_chunks_are_those_of_all_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 6, 8, generator=generator)
    samples = truth + torch.randn(7, 3, 6, 8, generator=generator)
    sums = SampleSums(truth, 7)
    for chunk in samples.split(3):
        sums.add(chunk)
    whole = SampleSums(truth, 7, hold=True)
    whole.add(samples)
    torch.testing.assert_close(sums.totals(), whole.totals(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sums.mean, samples.mean(0))


def test_too_many_samples_have_no_energy_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacache.evaluate.metrics.ENERGY_NUMBERS", 7 * 2 * 6 * 8 - 1)
    samples = torch.randn(7, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    sums = SampleSums(torch.zeros(2, 6, 8), 7)
    sums.add(samples)
    totals = sums.totals()
    assert totals[:, 1].isnan().all()
    assert totals[:, 2:].isfinite().all()


def test_which_world_models_have_no_energy_score_is_said(
    evaluated: DrawnWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 samples at 2 horizons are one frame too many; the world model of a single future has none anyway."""
    settings = evaluated.settings(out="without-energy", examples=0, futures=None)
    assert not [note for note in open_run(settings).notes if "energy" in note]
    frame = open_dataset(settings.features).black_patch_tokens.size
    monkeypatch.setattr("deltacache.evaluate.metrics.ENERGY_NUMBERS", 12 * frame - 1)
    evaluate_clips(settings, SilentReporter())
    (note,) = [note for note in read_notes(settings.out) if "energy" in note]
    assert note.startswith("deltaworld (")
    assert f"has no energy score: 6 samples of 2 frames of {frame} numbers" in note
    metrics = {row["metric"] for row in pq.read_table(settings.out / "metrics.parquet").to_pylist()}
    assert "energy_score" not in metrics
    assert "spread_skill" in metrics


def test_ranks_and_spread_of_clips_are_pooled_over_sequences(evaluated: DrawnWorld) -> None:
    out = evaluated.root / "out"
    totals = np.array(
        [
            row["totals"]
            for row in pq.read_table(out / "statistics.parquet").to_pylist()
            if (row["task"], row["horizon"]) == ("samples", 3)
        ],
        np.float64,
    )
    assert totals.shape == (2 * SCENES, 4 + 6 + 1)
    rows = {
        row["metric"]: row["value"]
        for row in pq.read_table(out / "metrics.parquet").to_pylist()
        if row["task"] == "samples" and row["horizon"] == 3
    }
    ranks = totals[:, 4:].sum(0)
    assert [rows[f"rank/{rank}"] for rank in range(7)] == pytest.approx(list(ranks / ranks.sum()))
    assert rows["spread_skill"] == pytest.approx((totals[:, 2].sum() / totals[:, 3].sum()) ** 0.5)
    assert rows["energy_score"] == pytest.approx(totals[:, 1].mean())


def test_the_best_sample_has_the_lowest_smooth_l1_not_the_lowest_squared_error() -> None:
    """One large error is worse in squares, many small ones are worse in smooth-L1."""
    truth = torch.zeros(1, 4, 4)
    samples = torch.full((2, 1, 4, 4), 0.4)
    samples[1] = 0
    samples[1, 0, 0, 0] = 3.0
    metrics = feature_metrics(samples, truth)
    assert metrics[0, 0, 1] < metrics[1, 0, 1]
    assert metrics[1, 0, 0] < metrics[0, 0, 0]
    assert torch.equal(best_samples(metrics), metrics[1])
    assert ensemble_of(samples[:, 0], truth[0]).best == 1
