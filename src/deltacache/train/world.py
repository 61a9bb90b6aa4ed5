"""``train-world``: DeltaWorld on the delta tokens of whole clips (method section 1)."""

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind, load_world
from deltacache.models.deltaworld import DeltaWorld
from deltacache.models.devices import choose_device
from deltacache.pipeline.dataset import DeltaArrays, load_deltas
from deltacache.pipeline.storage import AnyPath
from deltacache.schemas.configs import WorldConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.data import DeltaBatch, delta_batches
from deltacache.train.loop import train
from deltacache.train.order import step_generator
from deltacache.train.setup import check_fits, open_output, open_training_data


class WorldTask:
    """Predict each delta token of a clip from those before it, best of K candidates."""

    kind: Kind = "world"

    def __init__(
        self, model: DeltaWorld, arrays: DeltaArrays, config: WorldConfig, device: torch.device
    ) -> None:
        self.model = model.to(device).train()
        self._arrays = arrays
        self._config = config
        self._device = device

    def batches(self, steps: range) -> Generator[DeltaBatch]:
        """See ``TrainingTask``."""
        training = self._config.training
        return delta_batches(self._arrays, training.batch_size, training.seed, steps, self._device)

    def training_loss(self, batch: DeltaBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TrainingTask``; the noise is that of the step."""
        generator = step_generator("noise", self._config.training.seed, step, self._device)
        result = self.model.training_loss(
            batch.delta_tokens,
            batch.timestamps_s,
            candidates=self._config.candidates,
            beta=self._config.smooth_l1_beta,
            generator=generator,
        )
        return result.loss, {}


def train_world(
    deltas: AnyPath | str, out: Path, config: WorldConfig, *, resume: bool, device: str, reporter: Reporter
) -> Path:
    """Train on a delta dataset and return the last checkpoint; a finished run returns at once.

    Raises:
        DatasetError: ``deltas`` is not a delta dataset that can be trained on.
        MismatchError: tokens of a width unfit for the config, or ``resume`` with another config or data.
        CheckpointError: ``resume`` with a damaged newest checkpoint.
        DeltacacheError: ``out`` holds something else, or the loss became non-finite.
    """
    target = choose_device(device)
    dataset = open_training_data(deltas, "deltas")

    def build() -> DeltaWorld:
        return DeltaWorld(dataset.card.hidden_size, **config.model.model_dump())

    check_fits(dataset, build)
    output = open_output(out, dataset, config, "world", load_world, resume=resume)
    if output.finished is not None:
        reporter.line(f"train world: {output.finished} has all its steps, nothing to do")
        return output.finished
    model = output.model(build)
    return train(WorldTask(model, load_deltas(deltas), config, target), output.run(reporter))
