"""``train-tokenizer``: DeltaTok on pairs of consecutive frames (method section 1)."""

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind, load_tokenizer
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.pipeline.dataset import Dataset
from deltacache.pipeline.storage import AnyPath
from deltacache.schemas.configs import TokenizerConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.data import PairBatch, PairSettings, open_pairs, pair_batches
from deltacache.train.loop import train
from deltacache.train.order import step_generator
from deltacache.train.setup import check_fits, open_output, open_training_data


class TokenizerTask:
    """Reconstruct a frame from the frame before it and one token."""

    kind: Kind = "tokenizer"

    def __init__(
        self, model: DeltaTok, dataset: Dataset, config: TokenizerConfig, device: torch.device
    ) -> None:
        self.model = model.to(device).train()
        self._dataset = dataset
        self._config = config
        self._device = device
        self._grid = dataset.card.patch_grid
        self._settings = PairSettings(
            clips=len(dataset),
            frames=dataset.card.sampling.frames,
            batch_size=config.training.batch_size,
            seed=config.training.seed,
            black_first_fraction=config.black_first_fraction,
        )

    def batches(self, steps: range) -> Generator[PairBatch]:
        """See ``TrainingTask``."""
        source = open_pairs(self._dataset)
        return pair_batches(source, self._dataset.black_patch_tokens, self._settings, steps, self._device)

    def training_loss(self, batch: PairBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TrainingTask``; ``mse`` beside ``copy_last_mse``, that of the previous frame as a guess."""
        generator = step_generator("rope", self._config.training.seed, step, torch.device("cpu"))
        result = self.model.training_loss(
            batch.previous, batch.current, self._grid, self._config.loss, generator=generator
        )
        copy_last = torch.nn.functional.mse_loss(batch.previous, batch.current)
        return result.loss, {"mse": result.mse.detach(), "copy_last_mse": copy_last}


def train_tokenizer(
    features: AnyPath | str,
    out: Path,
    config: TokenizerConfig,
    *,
    resume: bool,
    device: str,
    reporter: Reporter,
) -> Path:
    """Train on a feature dataset and return the last checkpoint; a finished run returns at once.

    Raises:
        DatasetError: ``features`` is not a feature dataset that can be trained on.
        MismatchError: tokens of a width unfit for the config, or ``resume`` with another config or data.
        CheckpointError: ``resume`` with a damaged newest checkpoint.
        DeltacacheError: ``out`` holds something else, or the loss became non-finite.
    """
    target = choose_device(device)
    dataset = open_training_data(features, "features")

    def build() -> DeltaTok:
        return DeltaTok(dataset.card.hidden_size, **config.model.model_dump())

    check_fits(dataset, build)
    output = open_output(out, dataset, config, "tokenizer", load_tokenizer, resume=resume)
    if output.finished is not None:
        reporter.line(f"train tokenizer: {output.finished} has all its steps, nothing to do")
        return output.finished
    model = output.model(build)
    return train(TokenizerTask(model, dataset, config, target), output.run(reporter))
