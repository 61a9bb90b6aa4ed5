"""``train-world``: DeltaWorld on the delta tokens of whole clips (method section 1)."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind, load_world
from deltacache.models.deltaworld import DeltaWorld
from deltacache.models.devices import choose_device
from deltacache.models.selection import selection_for
from deltacache.pipeline.dataset import Dataset, DeltaArrays
from deltacache.pipeline.storage import AnyPath
from deltacache.schemas.configs import WorldConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.data import DeltaBatch, MappedDeltas, delta_batches, open_deltas
from deltacache.train.group import Alone, Group
from deltacache.train.loop import forward_precision, split_of, train
from deltacache.train.order import Part, Split, normal_draws, step_rng
from deltacache.train.probes import probe_world
from deltacache.train.setup import (
    Prepared,
    TrainingRequest,
    check_fits,
    nothing_to_do,
    open_output,
    open_training_data,
)


class WorldTask:
    """Predict each delta token of a clip from those before it, best of K candidates."""

    kind: Kind = "world"

    def __init__(
        self,
        model: DeltaWorld,
        arrays: DeltaArrays | MappedDeltas,
        config: WorldConfig,
        device: torch.device,
        split: Split | None = None,
    ) -> None:
        training = config.training
        split = split or Split(training.batch_size, training.accumulation)
        self.model = model.to(device).train()
        self._arrays = arrays
        self._config = config
        self._device = device
        self._effective_batch = split.effective_batch

    def batches(self, parts: Iterable[Part]) -> Generator[DeltaBatch]:
        """See ``TrainingTask``."""
        seed = self._config.training.seed
        return delta_batches(self._arrays, self._effective_batch, seed, parts, self._device)

    def training_loss(self, batch: DeltaBatch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TrainingTask``; the noise of a clip is that of its step and position."""
        result = self.model.training_loss(
            batch.delta_tokens,
            batch.timestamps_s,
            candidates=self._config.candidates,
            beta=self._config.smooth_l1_beta,
            noise=self._noise(batch, part),
            selection=selection_for(self._device, self.model.hidden_size),
        )
        return result.loss, {}

    def _noise(self, batch: DeltaBatch, part: Part) -> Tensor | None:
        """(B, T-1, K, D), or ``None`` for a learned query."""
        if self._config.model.query == "learned":
            return None
        _, frames, hidden = batch.delta_tokens.shape
        shape = (frames - 1, self._config.candidates, hidden)
        noise = normal_draws("noise", self._config.training.seed, part, shape, self._device)
        return noise.mul_(self.model.noise_std)

    def probes(self) -> dict[str, float]:
        """See ``TrainingTask`` and ``probe_world``; clips and candidates depend on the seed alone."""
        config, seed = self._config, self._config.training.seed
        tokens, seconds = self._arrays.delta_tokens, self._arrays.timestamps_s
        clips = step_rng("probe", seed, 0).permutation(len(tokens))[: config.training.probe_clips]
        batch = DeltaBatch(
            torch.from_numpy(tokens[clips]).to(self._device).float(),
            torch.from_numpy(seconds[clips] - seconds[clips, :1]).to(self._device),
        )
        noise = None
        if config.model.query == "noise":
            shape = (config.candidates, tokens.shape[-1])
            noise = (
                normal_draws("probe noise", seed, Part(0, 0, 1), shape, self._device)[0]
                * self.model.noise_std
            )
        with forward_precision(self._device):
            return probe_world(self.model, batch, noise, config.smooth_l1_beta)


def train_world(
    deltas: AnyPath | str,
    out: Path,
    config: WorldConfig,
    *,
    resume: bool,
    device: str,
    reporter: Reporter,
    start_from: Path | None = None,
) -> Path:
    """Train on a delta dataset and return the last checkpoint; a finished run returns at once.

    ``start_from`` is the stage before, of which ``config.training.start`` says what is taken.

    Raises:
        DatasetError: ``deltas`` is not a delta dataset that can be trained on.
        MismatchError: tokens of a width unfit for the config, or ``resume`` with another config or data.
        CheckpointError: ``resume`` with a damaged newest checkpoint.
        DeltacacheError: ``out`` holds something else, the stage before is missing, or the loss became non-finite.
    """
    request = TrainingRequest(deltas, out, config, resume, device, start_from)
    return prepare_world(request, reporter, Alone()).train()


def prepare_world(request: TrainingRequest[WorldConfig], reporter: Reporter, group: Group) -> Prepared:
    """What ``train_world`` does before the first step, for one worker of ``group``."""
    config, target = request.config, choose_device(request.device)
    dataset, build = open_world_inputs(request)
    output = open_output(request, dataset, "world", build, load_world, group)
    if output.finished is not None:
        return nothing_to_do("world", output.finished, config.training, reporter)

    def run() -> Path:
        split = split_of(config.training, group)
        arrays = open_deltas(dataset, target, group.on_this_node)
        task = WorldTask(output.model(build), arrays, config, target, split)
        return train(task, output.run(reporter, request.hint))

    return Prepared(output.first_step, run)


def open_world_inputs(request: TrainingRequest[WorldConfig]) -> tuple[Dataset, Callable[[], DeltaWorld]]:
    """The data, and what builds a new model for them; see ``train_world`` for what is refused."""
    dataset = open_training_data(request.data, "deltas")

    def build() -> DeltaWorld:
        return DeltaWorld(dataset.card.hidden_size, **request.config.model.model_dump())

    check_fits(dataset, build)
    return dataset, build
