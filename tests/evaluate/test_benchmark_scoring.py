"""The engine against one slow loop: a crop, a sample and a step at a time, on decoded pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_runs import SAMPLES, mini_settings, table

from deltacache.evaluate.benchmarks import labels, sampling
from deltacache.evaluate.benchmarks.benchmark_inputs import BenchmarkInputs, load_inputs
from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.benchmarks.loading import load_sequence
from deltacache.evaluate.metrics import feature_metrics
from deltacache.models.futures import sequence_generator
from deltacache.models.heads import load_head
from deltacache.pipeline.benchmarks.frames import upsample
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.benchmarks import BENCHMARK_TASK, IGNORE, BenchmarkName
from deltacache.schemas.progress import SilentReporter
from golden_sizes import golden_sizes

HORIZONS, SEED = (1, 3), 11


@pytest.fixture(scope="module")
def evaluated(golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    settings = mini_settings(golden, mini_benchmarks, out, seed=SEED, horizons=HORIZONS)
    evaluate_benchmarks(settings, SilentReporter())
    return out


@pytest.fixture(scope="module")
def inputs(golden: Path, mini_benchmarks: Path) -> BenchmarkInputs:
    return load_inputs(mini_settings(golden, mini_benchmarks, Path("unused"), seed=SEED, horizons=HORIZONS))


def slow_samples(
    inputs: BenchmarkInputs, clip: torch.Tensor, name: str, spacing: float, horizon: int
) -> torch.Tensor:
    """Futures (S, H, N, D) of one crop (T, N, D): contexts encoded pair by pair, samples one by one."""
    assert inputs.models.tokenizer is not None
    tokenizer, (world,) = inputs.models.tokenizer.model, inputs.models.worlds
    grid, context = inputs.protocol.grid, 4
    seen = clip[-horizon - context : -horizon]
    before = [inputs.protocol.black, *seen[:-1]]
    deltas = torch.cat([tokenizer.encode(b[None], a[None], grid) for b, a in zip(before, seen, strict=True)])
    futures = []
    for sample in range(SAMPLES):
        noise = torch.stack(
            [
                world.model.draw_noise((clip.shape[-1],), sequence_generator(SEED, f"{name} {sample} {step}"))
                for step in range(horizon)
            ]
        )
        seconds = torch.arange(context + horizon) * spacing
        rolled = world.model.rollout(deltas[None], seconds[None], noise[None, None])[0, 0]
        current, frames = seen[-1], []
        for delta in rolled:
            current = tokenizer.decode(delta[None], current[None], grid)[0]
            frames.append(current)
        futures.append(torch.stack(frames))
    return torch.stack(futures)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("benchmark", ["vspw", "cityscapes", "kitti"])
@torch.inference_mode()
def test_best_mean_and_vote_of_a_slow_loop(
    benchmark: BenchmarkName,
    horizon: int,
    evaluated: Path,
    inputs: BenchmarkInputs,
    golden: Path,
    mini_benchmarks: Path,
) -> None:
    counts = FrameCounts((5, 7))
    sequence = benchmark_sequences(benchmark, mini_benchmarks / benchmark, counts).sequences[-1]
    loaded = load_sequence(benchmark, sequence, golden_sizes(golden)[0], labelled=True)
    assert loaded.crops is not None
    assert loaded.label is not None
    head = load_head(golden / "eval" / f"head_{benchmark}.safetensors", BENCHMARK_TASK[benchmark]).model
    label = torch.from_numpy(loaded.label)
    best, mean, samples, losses = [], [], [], []
    for crop, pixels in enumerate(loaded.crops):
        clip = torch.cat(
            [inputs.backbone.patch_tokens(torch.from_numpy(f)[None].permute(0, 3, 1, 2)) for f in pixels]
        )
        futures = slow_samples(inputs, clip, f"{sequence.sequence_id} {crop}", sequence.spacing_s, horizon)[
            :, -1
        ]
        scores = [feature_metrics(each, clip[-1])[0].item() for each in futures]
        best.append(futures[int(np.argmin(scores))])
        mean.append(futures.mean(0))
        samples.append(futures)
        losses.append(min(scores))

    def picture(tokens: torch.Tensor) -> torch.Tensor:
        maps = head(tokens.transpose(1, 2).unflatten(2, inputs.protocol.grid))
        return upsample(maps, loaded.split, (label.shape[1], label.shape[2]))

    rows = [
        row for row in table(evaluated, "sequences").to_pylist() if row["sequence_id"] == sequence.sequence_id
    ]

    def value(metric: str, aggregation: str) -> float:
        (row,) = [
            row
            for row in rows
            if (row["method"], row["metric"], row["aggregation"]) == ("deltaworld", metric, aggregation)
            and row["horizon"] == horizon
        ]
        return row["value"]

    assert value("smooth_l1", "best") == pytest.approx(np.mean(losses), rel=1e-4)
    each = [picture(torch.stack([crop[sample] for crop in samples])) for sample in range(SAMPLES)]
    for aggregation, tokens in (("best", best), ("mean", mean)):
        predicted = picture(torch.stack(tokens))
        if benchmark == "kitti":
            valid = label > 0
            error = (predicted[:, 0][valid] - label[valid]).square().mean().sqrt().item()
            assert value("rmse", aggregation) == pytest.approx(error, rel=1e-4)
        else:
            valid = label != IGNORE
            right = (predicted.argmax(1) == label)[valid].float().mean().item()
            assert value("accuracy", aggregation) == pytest.approx(right, abs=1e-4)
    if benchmark == "kitti":
        depths = torch.stack(each)[:, :, 0]
        covered = (depths.amin(0) <= label) & (label <= depths.amax(0)) & (label > 0)
        assert value("vote_coverage", "single") == pytest.approx(
            (covered.sum() / (label > 0).sum()).item(), abs=1e-4
        )
    else:
        hits = torch.stack([predicted.argmax(1) == label for predicted in each]).any(0)
        share = hits[label != IGNORE].float().mean().item()
        assert value("vote_coverage", "single") == pytest.approx(share, abs=1e-4)


def test_every_row_says_over_how_many(evaluated: Path) -> None:
    expected = {"vspw": 5, "cityscapes": 2, "kitti": 2}
    rows = table(evaluated, "metrics").to_pylist()
    assert {(row["dataset"], row["n_sequences"], row["n_targets"]) for row in rows} == {
        (name, count, count) for name, count in expected.items()
    }


def test_metrics_follow_from_the_statistics(evaluated: Path) -> None:
    statistics = table(evaluated, "statistics").to_pylist()
    sums = [
        np.array(row["totals"])
        for row in statistics
        if (row["dataset"], row["task"], row["method"], row["horizon"]) == ("kitti", "depth", "copy_last", 1)
    ]
    count, squared, *_ = np.sum(sums, axis=0)
    (value,) = [
        row["value"]
        for row in table(evaluated, "metrics").to_pylist()
        if (row["dataset"], row["metric"], row["method"], row["horizon"]) == ("kitti", "rmse", "copy_last", 1)
    ]
    assert value == pytest.approx(np.sqrt(squared / count))


@pytest.mark.slow
def test_chunks_change_nothing(
    evaluated: Path,
    golden: Path,
    mini_benchmarks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sample at a time through decoder and head; the others in one pass."""
    monkeypatch.setattr(sampling, "_DECODED_NUMBERS", 1)
    monkeypatch.setattr(labels, "_CHUNK_NUMBERS", 1)
    settings = mini_settings(golden, mini_benchmarks, tmp_path, seed=SEED, horizons=HORIZONS)
    evaluate_benchmarks(settings, SilentReporter())
    one, many = (table(out, "sequences").to_pylist() for out in (tmp_path, evaluated))
    assert [row["value"] for row in one] == pytest.approx([row["value"] for row in many], abs=1e-5)
    votes = [row["value"] for row in one if row["metric"] == "vote_coverage"]
    assert len(votes) == 18


@pytest.mark.slow
def test_a_sample_goes_through_the_head_once(
    evaluated: Path, golden: Path, mini_benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best and mean of one sample are one prediction, and the best of two is often the best of four."""
    totals, seen = labels.SegmentationScorer.totals, []

    def counting(self: labels.SegmentationScorer, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tokens.numpy().tobytes())
        return totals(self, tokens, *rest)

    monkeypatch.setattr(labels.SegmentationScorer, "totals", counting)
    settings = mini_settings(golden, mini_benchmarks, tmp_path, seed=SEED, horizons=HORIZONS)
    only = {name: {"vspw": getattr(settings, name)["vspw"]} for name in ("data", "heads")}
    evaluate_benchmarks(settings.model_copy(update=only), SilentReporter())
    singles = 5 * (2 + 2 * 3)  # present and one step; copy, closed loop and parallel at both horizons
    assert singles + 5 * 2 * 3 <= len(seen) < singles + 5 * 2 * 6  # of 1, 2 and 4 samples best and mean
    assert len(seen) - len(set(seen)) <= 10  # closed loop and parallel are the same at one step
    of_vspw = [row for row in table(evaluated, "samples").to_pylist() if row["dataset"] == "vspw"]
    mine = table(tmp_path, "samples").to_pylist()
    assert [row["value"] for row in mine] == [row["value"] for row in of_vspw]
