"""Feature metrics against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from deltacache.evaluate.metrics import check_finite, feature_metrics, token_distance
from deltacache.models.blocks import smooth_l1
from deltacache.schemas.errors import NotFiniteError


def test_metrics_of_two_patches_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    prediction = torch.tensor([[1.0, 0.05], [3.0, 2.0]])
    # errors 0, 0.05, 3, 0; smooth-L1 with beta 0.1: 0.05^2 / 0.2 = 0.0125 and 3 - 0.05 = 2.95
    cosines = [1 / np.sqrt(1 + 0.05**2), 2 / np.sqrt(13)]
    expected = [(0.0125 + 2.95) / 4, (0.0025 + 9) / 4, np.mean(cosines)]
    np.testing.assert_allclose(feature_metrics(prediction, target).numpy(), expected, rtol=1e-6)


def test_metrics_broadcast_the_target_and_use_the_models_smooth_l1() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, truth = torch.randn(5, 3, 4, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)
    metrics = feature_metrics(samples, truth)
    assert metrics.shape == (5, 3, 3)
    assert metrics.dtype == torch.float64
    one_by_one = [
        [smooth_l1(s, t, 0.1).mean().item() for s, t in zip(each, truth, strict=True)] for each in samples
    ]
    np.testing.assert_allclose(metrics[..., 0].numpy(), one_by_one, rtol=1e-5)
    assert torch.equal(metrics[2], feature_metrics(samples[2], truth))


def test_the_truth_itself_is_perfect() -> None:
    truth = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)).half().float()
    metrics = feature_metrics(truth, truth)
    assert torch.equal(metrics[:, :2], torch.zeros(2, 2, dtype=torch.float64))
    np.testing.assert_allclose(metrics[:, 2].numpy(), 1, atol=1e-12)


def test_token_distance_is_over_all_patches() -> None:
    zeros = torch.zeros(2, 2)
    assert token_distance(zeros, torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item() == 5.0


@pytest.mark.parametrize("values", [[1.0, torch.inf, 0.0], [0.5, 0.5, torch.nan]])
def test_one_metric_that_is_not_finite_is_enough(values: list[float]) -> None:
    """Numbers so large that their squares overflow have a smooth-L1, but no squared error."""
    with pytest.raises(
        NotFiniteError, match=r"world predicts values that are not finite .* clip-1, 3 steps ahead"
    ):
        check_finite(torch.tensor(values), "world", "clip-1", 3)
    check_finite(torch.tensor([1.0, 2.0, 0.0]), "world", "clip-1", 3)
