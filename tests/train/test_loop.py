from pathlib import Path

import pytest
import torch
from drawn import HIDDEN, tokenizer_config, world_config
from torch import nn

from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.train.data import open_clips
from deltacache.train.loop import TrainingTask
from deltacache.train.optimizer import clip_gradients, set_rate
from deltacache.train.order import MicroBatch
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.world import WorldTask

CPU = torch.device("cpu")


@pytest.fixture(params=["tokenizer", "world"])
def task(request: pytest.FixtureRequest, features: Path, deltas: Path) -> TrainingTask:
    """Attention at initialisation hardly looks at positions: weights are made larger."""
    torch.manual_seed(0)
    if request.param == "tokenizer":
        tokenizer = tokenizer_config()
        model = DeltaTok(HIDDEN, **tokenizer.model.model_dump())
        task = TokenizerTask(model, open_dataset(features), tokenizer, CPU)
    else:
        world = world_config()
        task = WorldTask(
            DeltaWorld(HIDDEN, **world.model.arguments),
            open_clips(open_dataset(deltas, "deltas")),
            (1, 1),
            world,
            CPU,
        )
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.mul_(10)
    return task


def test_what_a_step_draws_is_its_own_and_always_the_same(task: TrainingTask) -> None:
    batch = next(task.batches([MicroBatch(0, 0, 5)]))
    first, again, other = (task.training_loss(batch, MicroBatch(step, 0, 5))[0].item() for step in (3, 3, 4))
    assert first == again
    assert abs(other - first) > 1e-4 * first


def test_gradients_are_scaled_to_the_limit_and_their_norm_is_that_before() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.tensor([3.0])
    parameters[1].grad = torch.tensor([0.0, 4.0])
    assert clip_gradients(parameters, None) == 5.0
    assert parameters[0].grad == 3.0
    assert clip_gradients(parameters, 0.5) == 5.0
    assert parameters[0].grad.item() == pytest.approx(0.3, rel=1e-4)
    assert parameters[1].grad.tolist() == pytest.approx([0.0, 0.4], rel=1e-4)
    assert parameters[2].grad is None
    assert clip_gradients(parameters, 100.0).item() == pytest.approx(0.5, rel=1e-4)
    assert parameters[0].grad.item() == pytest.approx(0.3, rel=1e-4)


def test_every_group_gets_the_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 2.0)]
    optimizer = torch.optim.AdamW(groups)
    assert set_rate(optimizer, 0.25) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
