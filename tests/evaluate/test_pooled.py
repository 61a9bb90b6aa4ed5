"""Pooled metrics against loops over pixels and samples."""

import numpy as np
import pytest
import torch

from deltacache.evaluate.benchmarks.labels import depth_totals, segmentation_totals
from deltacache.evaluate.metrics import SampleSums, energy_score, group_sums, metrics_of, pooled_metrics
from deltacache.schemas.benchmarks import IGNORE

CLASSES = 5


def draw_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true class ids; the last class is nowhere, some pixels are ignored."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, (2, 6, 7))
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    return rng.integers(0, CLASSES - 1, labels.shape), labels


def test_mean_iou_is_that_of_a_loop_over_pixels() -> None:
    maps = [draw_maps(seed) for seed in range(3)]
    totals = [
        segmentation_totals(torch.from_numpy(predicted), torch.from_numpy(true), CLASSES).numpy()
        for predicted, true in maps
    ]
    found = pooled_metrics("segmentation", np.stack(totals))
    ious = {}
    right = valid = 0
    for predicted, true in maps:
        for p, t in zip(predicted.flat, true.flat, strict=True):
            right += p == t
            valid += t != IGNORE
    assert found["accuracy"] == pytest.approx(right / valid)
    for label in range(CLASSES):
        both = either = 0
        for predicted, true in maps:
            for p, t in zip(predicted.flat, true.flat, strict=True):
                if t != IGNORE:
                    both += p == label and t == label
                    either += label in (p, t)
        if either:
            ious[f"iou/{label}"] = both / either
    assert len(ious) == CLASSES - 1
    assert {name: value for name, value in found.items() if "/" in name} == pytest.approx(ious)
    assert found["miou"] == pytest.approx(np.mean(list(ious.values())))


def test_depth_pools_pixels_not_pictures() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 60, (3, 5, 5)).astype(np.float32)
    truth[0, :, :3] = 0
    depth = (truth * rng.uniform(0.6, 1.6, truth.shape) + (truth == 0)).astype(np.float32)
    totals = [
        depth_totals(torch.from_numpy(d), torch.from_numpy(t)).numpy()
        for d, t in zip(depth, truth, strict=True)
    ]
    found = pooled_metrics("depth", np.stack(totals))
    valid = truth > 0
    d, t = depth[valid].astype(np.float64), truth[valid].astype(np.float64)
    assert found["rmse"] == pytest.approx(np.sqrt(((d - t) ** 2).mean()))
    assert found["abs_rel"] == pytest.approx((abs(d - t) / t).mean())
    assert found["delta1"] == pytest.approx((np.maximum(d / t, t / d) < 1.25).mean())


def totals_of(samples: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Sums of samples (S, N, D) of one crop."""
    sums = SampleSums(truth[None], len(samples))
    for each in samples.split(2):
        sums.add(each[:, None])
    return sums.totals()[0].numpy()


def test_ensemble_scores_are_those_of_loops() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(5, 3, 4)).astype(np.float32)
    truth = rng.normal(size=(3, 4)).astype(np.float32)
    found = pooled_metrics("samples", totals_of(torch.from_numpy(samples), torch.from_numpy(truth)))

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(((one - other) ** 2).mean()))

    pairs = [distance(samples[i], samples[j]) for i in range(5) for j in range(5) if i != j]
    energy = np.mean([distance(each, truth) for each in samples]) - np.mean(pairs) / 2
    assert found["energy_score"] == pytest.approx(energy, rel=1e-5)
    spread = samples.var(0, ddof=1).mean() * 6 / 5
    skill = ((samples.mean(0) - truth) ** 2).mean()
    assert found["spread_skill"] == pytest.approx(np.sqrt(spread / skill), rel=1e-5)
    ranks = [(samples[:, n, d] < truth[n, d]).sum() for n in range(3) for d in range(4)]
    for rank in range(6):
        assert found[f"rank/{rank}"] == pytest.approx(ranks.count(rank) / 12)


def test_a_calibrated_ensemble_has_flat_ranks_and_a_ratio_of_one() -> None:
    rng = np.random.default_rng(2)
    totals = []
    for _ in range(40):
        drawn = torch.from_numpy(rng.normal(size=(10, 16, 8)).astype(np.float32))
        totals.append(totals_of(drawn[1:], drawn[0]))
    found = pooled_metrics("samples", np.stack(totals))
    assert found["spread_skill"] == pytest.approx(1, abs=0.03)
    assert [found[f"rank/{rank}"] for rank in range(10)] == pytest.approx([0.1] * 10, abs=0.02)


def test_the_energy_score_is_that_of_float64_at_full_size() -> None:
    rng = np.random.default_rng(6)
    truth = rng.normal(size=(1024, 768)).astype(np.float32)
    samples = (truth + 0.1 * rng.normal(size=(4, 1024, 768))).astype(np.float32)
    found = energy_score(torch.from_numpy(samples), torch.from_numpy(truth))
    exact, wide = samples.astype(np.float64), truth.astype(np.float64)
    pairs = [np.linalg.norm(exact[i] - exact[j]) for i in range(4) for j in range(4) if i != j]
    expected = np.mean([np.linalg.norm(each - wide) for each in exact]) - np.mean(pairs) / 2
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_sums_and_vectors_agree() -> None:
    rng = np.random.default_rng(4)
    totals = rng.uniform(1, 9, (4, 4))
    together = metrics_of("features", totals)
    for row, each in enumerate(totals):
        assert {name: values[row] for name, values in together.items()} == pytest.approx(
            pooled_metrics("features", each)
        )
    np.testing.assert_allclose(
        group_sums(totals, ["x", "y", "x", "y"]), [totals[[0, 2]].sum(0), totals[[1, 3]].sum(0)]
    )


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="task 'taste' has no pooled metrics"):
        pooled_metrics("taste", np.ones(4))
