"""``train-tokenizer``: DeltaTok on pairs of consecutive frames (method section 1)."""

from collections.abc import Callable, Generator, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind, load_tokenizer
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device, forward_precision
from deltacache.schemas.configs import TokenizerConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.data import (
    PairBatch,
    PairSettings,
    PairSource,
    StreamedFeatures,
    fits_in_memory,
    open_pairs,
    pair_batches,
    stored_bytes,
    tokens_bytes,
)
from deltacache.train.loop import split_of, train
from deltacache.train.mixture import Clips, mixture_of
from deltacache.train.order import MicroBatch, Split, probe_items, step_generator, step_rng
from deltacache.train.probes import PairProbe, probe_tokenizer
from deltacache.train.setup import (
    Prepared,
    TrainingClips,
    TrainingRequest,
    check_fits,
    nothing_to_do,
    open_inputs,
    open_stage,
)
from deltacache.train.workers.group import ProcessGroup


class TokenizerTask:
    """Reconstruct a frame from the frame before it and one token."""

    kind: Kind = "tokenizer"
    divisible = True

    def __init__(
        self,
        model: DeltaTok,
        dataset: Clips,
        config: TokenizerConfig,
        device: torch.device,
        split: Split | None = None,
        sharers: int = 1,
    ) -> None:
        training = config.training
        split = split or Split(training.batch_size, training.accumulation or 1)
        self.model = model.to(device).train()
        self._dataset = dataset
        self._config = config
        self._device = device
        self._sharers = sharers
        self._grid = dataset.card.patch_grid
        self._settings = PairSettings(
            clips=len(dataset),
            frames=dataset.card.sampling.frames,
            effective_batch=split.effective_batch,
            seed=training.seed,
            black_first_fraction=config.black_first_fraction,
            mixture=mixture_of(dataset),
        )

    @cached_property
    def _source(self) -> PairSource:
        return open_pairs(self._dataset, self._sharers)

    def batches(self, parts: Iterable[MicroBatch]) -> Generator[PairBatch]:
        black = self._dataset.black_patch_tokens
        return pair_batches(self._source, black, self._settings, parts, self._device)

    def trial_batches(self, parts: Iterable[MicroBatch]) -> Generator[PairBatch]:
        source, black = StreamedFeatures(self._dataset), self._dataset.black_patch_tokens
        return pair_batches(source, black, self._settings, parts, self._device)

    def bytes_to_load(self, device: torch.device) -> int:
        """All features, if they fit in the host's memory, where they are kept."""
        loads = device.type == "cpu" and fits_in_memory(self._dataset, self._sharers)
        return tokens_bytes(self._dataset) if loads else 0

    def bytes_to_read(self, samples: int) -> int:
        once = stored_bytes(self._dataset)
        if fits_in_memory(self._dataset, self._sharers):
            return once
        return samples * 2 * once // (len(self._dataset) * self._settings.frames)

    def inputs_computed(self, samples: int) -> int:
        """None: pairs are read ahead."""
        return 0

    def training_loss(self, batch: PairBatch, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and ``mse`` beside ``copy_last_mse``, that of the previous frame as a guess.

        The factor of the RoPE augmentation is one for the whole step, whatever the part.
        """
        generator = step_generator("rope", self._config.training.seed, part.step, torch.device("cpu"))
        result = self.model.training_loss(
            batch.previous, batch.current, self._grid, self._config.loss, generator=generator
        )
        copy_last = torch.nn.functional.mse_loss(batch.previous, batch.current)
        return result.loss, {"mse": result.mse.detach(), "copy_last_mse": copy_last}

    def probes(self) -> dict[str, float]:
        """Health of the tokenizer on the same pairs every time, in the precision of the training."""
        with forward_precision(self._device, self._config.training.precision):
            return probe_tokenizer(self.model, self._probe, self._grid, self._config.loss)

    @cached_property
    def _probe(self) -> PairProbe:
        """Clips and places in them that depend on the seed alone; kept on the device."""
        settings, training = self._settings, self._config.training
        rng = step_rng("probe", settings.seed, 0)
        clips = probe_items(settings.seed, training.probe_clips, settings.clips)
        starts = rng.integers(0, settings.frames - 1, len(clips))
        pairs = np.stack(list(self._source.read(clips, starts)), axis=1)
        first = np.stack([frames[0] for frames in self._source.read(clips, starts * 0)])
        previous, current, first, black = (
            torch.from_numpy(tokens).to(self._device).float()
            for tokens in (*pairs, first, self._dataset.black_patch_tokens)
        )
        return PairProbe(PairBatch(previous, current), first, black)


def prepare_tokenizer(
    request: TrainingRequest[TokenizerConfig], reporter: Reporter, group: ProcessGroup
) -> Prepared:
    """What training does before the first step, for one worker of ``group``.

    Raises:
        DatasetError: the data are not a feature dataset that can be trained on.
        MismatchError: tokens of a width unfit for the config, or ``resume`` with another config or data.
        CheckpointError: ``resume`` with a damaged newest checkpoint.
        DeltacacheError: the output folder holds something else, or the stage before is missing.
    """
    config, target = request.config, choose_device(request.device)
    data, build = open_tokenizer_inputs(request)
    opened = open_stage(request, data, "tokenizer", build, load_tokenizer, group)
    if opened.finished is not None:
        return nothing_to_do("tokenizer", opened.finished, config.training, reporter)

    def run() -> Path:
        split = split_of(config.training, group)
        task = TokenizerTask(opened.model(build), data.train, config, target, split, group.on_this_node)
        return train(task, opened.begin(reporter, request.hint, data=data, model=task.model, device=target))

    return Prepared(opened.first_step, run)


def open_tokenizer_inputs(
    request: TrainingRequest[TokenizerConfig],
) -> tuple[TrainingClips, Callable[[], DeltaTok]]:
    """The data, and what builds a new model for them; see ``prepare_tokenizer`` for what is rejected."""
    data = open_inputs(request, "features")

    def build() -> DeltaTok:
        return DeltaTok(data.train.card.hidden_size, **request.config.model.model_dump())

    check_fits(data.train, build)
    return data, build
