"""How a batch is split changes neither what is drawn nor, beyond rounding, what is learned."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from drawn import HIDDEN, world_config
from torch import nn

from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.configs import WorldConfig
from deltacache.train.data import open_clips
from deltacache.train.order import MicroBatch, Split, normal_draws
from deltacache.train.world import WorldTask

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "workers"), [(16, 1, 1), (8, 2, 1), (4, 2, 2), (2, 1, 8)]
)
def test_all_workers_together_compute_every_position_once(
    batch_size: int, accumulation: int, workers: int
) -> None:
    splits = [Split(batch_size, accumulation, workers, rank) for rank in range(workers)]
    parts = [part for split in splits for part in split.parts(3)]
    positions = [position for part in parts for position in range(part.start, part.stop)]
    assert sorted(positions) == list(range(16))
    assert {part.step for part in parts} == {3}
    assert {split.effective_batch for split in splits} == {16}
    assert str(splits[0]) == f"16 (batch {batch_size} x accumulation {accumulation} x workers {workers})"


@pytest.mark.parametrize(("effective_batch", "size"), [(6, 2), (64, 16), (64, 4), (40, 20), (48, 24)])
def test_noise_belongs_to_the_step_and_position(effective_batch: int, size: int) -> None:
    def draw(part: MicroBatch) -> torch.Tensor:
        return normal_draws("noise", 3, part, effective_batch, (4, 16), CPU)

    whole = draw(MicroBatch(5, 0, effective_batch))
    parts = [draw(MicroBatch(5, start, start + size)) for start in range(0, effective_batch, size)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.unique().numel() == whole.numel()
    assert not torch.equal(whole, draw(MicroBatch(6, 0, effective_batch)))
    assert abs(normal_draws("noise", 0, MicroBatch(0, 0, 100), 100, (1000,), CPU).std().item() - 1) < 0.01


def test_noise_beyond_the_effective_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="positions up to 8 of an effective batch of 6"):
        normal_draws("noise", 3, MicroBatch(5, 4, 8), 6, (4,), CPU)


@pytest.mark.slow
def test_two_passes_of_eight_learn_what_one_of_sixteen_does(case: Case, tmp_path: Path) -> None:
    losses, weights = [], []
    for name, training in (("whole", {"batch_size": 16}), ("halves", {"batch_size": 8, "accumulation": 2})):
        checkpoint = case.run(tmp_path / name, log_every=1, steps=12, **training)
        losses.append(pq.read_table(tmp_path / name / "curves.parquet").to_pydict())
        weights.append(case.weights(checkpoint))
    for column in ("loss", "gradient_norm"):
        assert losses[0][column] == pytest.approx(losses[1][column], rel=2e-5)
    assert losses[0]["clips_per_s"][0] == pytest.approx(16 / losses[0]["step_time_s"][0])
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-4, rtol=1e-3)


def test_the_mean_of_two_workers_gradients_is_that_of_one(deltas: Path) -> None:
    config = world_config(batch_size=8)
    gradients = []
    for splits in ([Split(16)], [Split(8, 1, 2, rank) for rank in range(2)]):
        passes = [_gradients(deltas, config, split) for split in splits]
        gradients.append([torch.stack(each).mean(0) for each in zip(*passes, strict=True)])
    for one, both in zip(*gradients, strict=True):
        torch.testing.assert_close(one, both, atol=1e-7, rtol=1e-4)


def _gradients(deltas: Path, config: WorldConfig, split: Split) -> list[torch.Tensor]:
    torch.manual_seed(0)
    task = WorldTask(
        DeltaWorld(HIDDEN, **config.model.arguments),
        open_clips(open_dataset(deltas, "deltas")),
        (1, 1),
        config,
        CPU,
        split,
    )
    parts = list(split.parts(4))
    for part, batch in zip(parts, task.batches(parts), strict=True):
        (task.training_loss(batch, part)[0] / len(parts)).backward()
    return [_gradient(parameter) for parameter in task.model.parameters()]


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(5, 2), (1, 10)])
def test_a_run_goes_on_with_another_split(
    case: Case, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    unbroken = case.weights(case.run(tmp_path / "unbroken", batch_size=10))
    case.run(tmp_path / "out", batch_size=10, steps=4)
    split = {"batch_size": batch_size, "accumulation": accumulation}
    resumed = case.weights(case.run(tmp_path / "out", resume=True, **split))
    for name in unbroken:
        torch.testing.assert_close(resumed[name], unbroken[name], atol=2e-4, rtol=1e-3)
