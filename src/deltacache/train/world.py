"""``train-world``: a world model on the tokens of whole clips, delta tokens or patch tokens (method section 1)."""

import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind, load_world
from deltacache.models.devices import choose_device, forward_precision
from deltacache.models.query_world import QueryWorld
from deltacache.models.selection import WAYS, ways_for
from deltacache.models.world_model import WorldLoss, WorldModel
from deltacache.models.worlds import world_class
from deltacache.schemas.configs import SelectionName, WorldConfig
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import Reporter
from deltacache.train.data import (
    ClipBatch,
    MappedClips,
    PendingClips,
    ResidentClips,
    clip_batches,
    open_clips,
    stored_bytes,
)
from deltacache.train.loop import split_of, train
from deltacache.train.mixture import mixture_of
from deltacache.train.order import MicroBatch, Mixture, Split, normal_draws, probe_items, seed_of
from deltacache.train.probes import probe_world
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

_TRIED_ON_CPU, _TRIED = 2, 16
"""Clips that each way of selection is tried on: on a CPU seconds of a ViT-B in float32, on a GPU little memory."""
_AS_GOOD = 1.001


class WorldTask:
    """Predict each frame of a clip from those before it, by the model's objective."""

    kind: Kind = "world"
    divisible = True

    def __init__(
        self,
        model: WorldModel,
        arrays: ResidentClips | MappedClips | PendingClips,
        grid: tuple[int, int],
        config: WorldConfig,
        device: torch.device,
        split: Split | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        training = config.training
        split = split or Split(training.batch_size, training.accumulation or 1)
        self.model = model.to(device).train()
        self._given, self._grid = arrays, grid
        self._config = config
        self._device = device
        self._effective_batch = split.effective_batch
        self._mixture = mixture
        self.selection: SelectionName = (
            ways_for(device, model.hidden_size)[0] if config.selection == "auto" else config.selection
        )

    @cached_property
    def _arrays(self) -> ResidentClips | MappedClips:
        given = self._given
        return (
            open_clips(given.dataset, given.device, given.sharers)
            if isinstance(given, PendingClips)
            else given
        )

    def batches(self, parts: Iterable[MicroBatch]) -> Generator[ClipBatch]:
        seed = self._config.training.seed
        return clip_batches(self._arrays, self._effective_batch, seed, parts, self._device, self._mixture)

    def trial_batches(self, parts: Iterable[MicroBatch]) -> Generator[ClipBatch]:
        given, seed = self._given, self._config.training.seed
        clips = MappedClips.of(given.dataset) if isinstance(given, PendingClips) else given
        return clip_batches(clips, self._effective_batch, seed, parts, self._device, self._mixture)

    def bytes_to_load(self, device: torch.device) -> int:
        return self._given.bytes_to_load if isinstance(self._given, PendingClips) else 0

    def bytes_to_read(self, samples: int) -> int:
        given = self._given
        if not isinstance(given, PendingClips):
            return 0
        once = stored_bytes(given.dataset)
        return once if given.resident else samples * once // len(given.dataset)

    def inputs_computed(self, samples: int) -> int:
        """None: tokens are read as they are."""
        return 0

    def choose_selection(self, group: ProcessGroup, reporter: Reporter) -> None:
        """Take the fastest way to compare candidates on this machine whose winners are as good as those of float32.

        Each way chooses among the candidates of the first few clips. Winners are as good if their loss, which has the
        precision of the training whatever chose them, is at most 0.1 % above that of the winners in float32, for ways
        may differ in candidates that are equally good. The first worker measures for all. Frames of many tokens would
        take too long: they keep the likeliest way.
        """
        ways = ways_for(self._device, self.model.hidden_size)
        several_tokens = (
            self.model.trains_on != "deltas" or self.model.arguments.get("tokens_per_frame", 1) > 1
        )
        compares = self.model.stochastic and self._config.model.objective == "best_of_many"
        if len(ways) == 1 or not compares or several_tokens:
            return

        def measure() -> tuple[SelectionName, int]:
            tried = _TRIED_ON_CPU if self._device.type == "cpu" else _TRIED
            part = MicroBatch(0, 0, min(self._effective_batch, tried))
            with closing(self.trial_batches([part])) as batches:
                batch = next(batches)
            seconds = dict.fromkeys(ways, math.inf)
            losses, winners = dict[str, float](), dict[str, Tensor]()
            for way in (*ways, *ways):  # the first time does not count
                begun = time.perf_counter()
                with torch.no_grad(), forward_precision(self._device, self._config.training.precision):
                    result = self._loss(batch, part, way)
                losses[way], winners[way] = result.loss.item(), result.winners  # waits for the device
                seconds[way] = min(seconds[way], time.perf_counter() - begun)
            limit = _AS_GOOD * losses["float32"]  # NaN where the model is broken: only float32 is left then
            good: list[SelectionName] = [way for way in ways if way == "float32" or losses[way] <= limit]
            best = min(good, key=lambda way: seconds[way])
            listed = [
                f"{way} {1e3 * seconds[way] / len(batch.tokens):.3g} ms a clip, "
                f"{100 * (winners[way] == winners['float32']).float().mean().item():.3g} % of its winners"
                for way in ways
                if way != "float32"
            ]
            reporter.line(
                f"train world: candidates are compared by {best}, the fastest that is as good as float32 "
                f"({1e3 * seconds['float32'] / len(batch.tokens):.3g} ms a clip): {'; '.join(listed)}"
            )
            return best, ways.index(best)

        self.selection = group.rank_zero_first(measure, lambda index: ways[index])

    def training_loss(self, batch: ClipBatch, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The noise of a clip follows from its step and its position in the batch."""
        return self._loss(batch, part, self.selection).loss, {}

    def _loss(self, batch: ClipBatch, part: MicroBatch, way: SelectionName) -> WorldLoss:
        # For models with dropout: it depends on the step and the part, so other splits draw other numbers.
        dropout = seed_of("dropout", self._config.training.seed, part.step, part.start)
        return self.model.training_loss(
            batch.tokens,
            batch.timestamps_s,
            grid=self._grid,
            candidates=self._config.candidates,
            beta=self._config.smooth_l1_beta,
            noise=self._noise(batch, part),
            generator=torch.Generator().manual_seed(dropout),
            selection=WAYS[way],
            **self._drift(batch, part),
        )

    def _drift(self, batch: ClipBatch, part: MicroBatch) -> dict[str, Any]:
        """What trains for drift, nothing where it is off: not every model takes it."""
        config, found = self._config, dict[str, Any]()
        if config.rollout_steps > 1:
            found["rollout_steps"] = config.rollout_steps
        if config.context_noise > 0:
            shape, seed = tuple(batch.tokens[0, 1:].shape), config.training.seed
            noise = normal_draws("context noise", seed, part, self._effective_batch, shape, self._device)
            found["context_noise"] = noise.mul_(config.context_noise)
        return found

    def _noise(self, batch: ClipBatch, part: MicroBatch) -> Tensor | None:
        """(B, T-1, K, Z), or ``None`` where nothing is random."""
        if not self.model.stochastic:
            return None
        width = self.model.noise_width(self._grid, training=True)
        shape = (batch.tokens.shape[1] - 1, self._config.candidates, width)
        seed, batch_size = self._config.training.seed, self._effective_batch
        noise = normal_draws("noise", seed, part, batch_size, shape, self._device)
        return noise.mul_(self.model.noise_std)

    def probes(self) -> dict[str, float]:
        """Health of the world model; clips and candidates depend on the seed alone."""
        config, seed = self._config, self._config.training.seed
        tokens, seconds = self._arrays.tokens, self._arrays.timestamps_s
        clips = probe_items(seed, config.training.probe_clips, len(tokens))
        batch = ClipBatch(
            torch.from_numpy(tokens[clips]).to(self._device).float(),
            torch.from_numpy(seconds[clips] - seconds[clips, :1]).to(self._device),
        )
        noise = None
        if self.model.stochastic:
            shape = (config.candidates, self.model.noise_width(self._grid))
            noise = normal_draws("probe noise", seed, MicroBatch(0, 0, 1), 1, shape, self._device)[0]
            noise *= self.model.noise_std
        with forward_precision(self._device, config.training.precision):
            return probe_world(self.model, batch, self._grid, noise, config.smooth_l1_beta)


def prepare_world(request: TrainingRequest[WorldConfig], reporter: Reporter, group: ProcessGroup) -> Prepared:
    """What training does before the first step, for one worker of ``group``.

    Raises:
        DatasetError: the data are not a dataset of the kind that the architecture trains on.
        MismatchError: tokens of a width unfit for the config, or ``resume`` with another config or data.
        CheckpointError: ``resume`` with a damaged newest checkpoint.
        DeltacacheError: the output folder holds something else, or the stage before is missing.
    """
    config, target = request.config, choose_device(request.device)
    data, build = open_world_inputs(request)
    dataset = data.train
    said = dataset.card.other_size(dataset.card.tokenizer_image_size, "the tokenizer of these tokens")
    if said and group.rank == 0:
        reporter.line(f"train world: {said}")
    opened = open_stage(request, data, "world", build, load_world, group)
    if opened.finished is not None:
        return nothing_to_do("world", opened.finished, config.training, reporter)

    def run() -> Path:
        split = split_of(config.training, group)
        arrays = PendingClips(dataset, target, group.on_this_node)
        model, grid = opened.model(build), dataset.card.patch_grid
        task = WorldTask(model, arrays, grid, config, target, split, mixture_of(dataset))
        before = None if opened.resumed is None else opened.resumed.metadata.get("selection")
        if config.selection == "auto" and before is not None:
            task.selection = before
        elif config.selection == "auto":
            task.choose_selection(group, reporter)
        chosen = replace(opened, metadata={**opened.metadata, "selection": task.selection})
        return train(task, chosen.begin(reporter, request.hint, data=data, model=task.model, device=target))

    return Prepared(opened.first_step, run)


def open_world_inputs(
    request: TrainingRequest[WorldConfig],
) -> tuple[TrainingClips, Callable[[], WorldModel]]:
    """The data, and what builds a new model for them; see ``prepare_world`` for what is rejected."""
    config = request.config.model
    made = world_class(config.architecture)
    data = open_inputs(request, made.trains_on)
    dataset = data.train
    arguments = dict(config.arguments)
    if dataset.card.tokens_per_frame > 1:
        arguments["tokens_per_frame"] = dataset.card.tokens_per_frame

    def build() -> WorldModel:
        return made(dataset.card.hidden_size, **arguments)

    check_fits(dataset, build)
    _check_drift(request.config, made, dataset.card.sampling.frames)
    return data, build


def _check_drift(config: WorldConfig, made: type[WorldModel], frames: int) -> None:
    if config.rollout_steps == 1 and config.context_noise == 0:
        return
    if not issubclass(made, QueryWorld):
        raise DeltacacheError(
            f"rollout_steps {config.rollout_steps} and context_noise {config.context_noise:g} are for deltaworld and "
            f"dino_world, and {config.model.architecture} takes neither: leave both out"
        )
    if config.rollout_steps >= frames:
        raise DeltacacheError(
            f"rollout_steps {config.rollout_steps}: clips of {frames} frames have {frames - 1} that are predicted; "
            f"give {frames - 1} at most"
        )
