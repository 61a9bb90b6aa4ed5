"""One training step of each recipe on the simulated device: ``python steps.py NAME…`` prints a line of JSON a name.

    world/PRESET             the world model of a preset, at the whole batch unless :PASS says how many clips
    tokenizer/PRESET/STAGE   the tokenizer of a stage, pairs at its resolution

A step is the second one, when all that happens once has happened.
"""

import json
import sys
from contextlib import closing
from typing import Any

from device import CUDA, Watch, simulated  # isort: skip: it comes before torch

import numpy as np
import torch

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import forward_precision
from deltacache.models.worlds import world_class
from deltacache.schemas.configs import tokenizer_preset, world_preset
from deltacache.train.data import ClipBatch, PairBatch, ResidentClips, clip_batches
from deltacache.train.optimizer import FiniteGuard, clip_gradients, make_optimizer, set_rate
from deltacache.train.order import Part, Split
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.world import WorldTask

FRAMES, CLIPS = 8, 2048


class RandomPatches:
    """Stands for the patch tokens of a dataset, which would not fit here: batches on the device."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def batch(self, part: Part) -> ClipBatch:
        tokens = torch.empty(part.stop - part.start, *self._shape, device=CUDA)
        return ClipBatch(tokens, torch.empty(part.stop - part.start, FRAMES, device=CUDA))


def world_step(preset: str, samples: int | None) -> dict[str, Any]:
    config = world_preset(preset)
    made = world_class(config.model.architecture)
    hidden, grid = (1152, (16, 32)) if "foresight" in preset else (768, (16, 16))
    if "tiny" in preset:
        hidden, grid = 64, (4, 4)
    arguments = dict(config.model.arguments)
    tokens: tuple[int, ...] = (hidden,) if made.trains_on == "deltas" else (grid[0] * grid[1], hidden)
    training = config.training
    effective = training.batch_size * (training.accumulation or 1)
    split = Split(samples or effective, effective // (samples or effective))
    with torch.device("cuda"):
        model = made(hidden, **arguments)
    arrays = ResidentClips(np.zeros((CLIPS, FRAMES, 1), np.float16), np.zeros((CLIPS, FRAMES), np.float32))
    if made.trains_on == "deltas":
        arrays = ResidentClips(np.zeros((CLIPS, FRAMES, hidden), np.float16), arrays.timestamps_s)
    task = WorldTask(model, arrays, grid, config, CUDA, split)
    source = RandomPatches((FRAMES, *tokens))
    batches = clip_batches(arrays, effective, training.seed, split.parts_of(range(2)), CUDA)
    patches = made.trains_on != "deltas"
    with closing(batches):
        return measured(task, split, training, lambda part: source.batch(part) if patches else next(batches))


def tokenizer_step(preset: str, stage: str, samples: int | None) -> dict[str, Any]:
    config = tokenizer_preset(preset, stage)
    side = (512 if "512" in stage or "cooldown" in stage else 256) // 16
    hidden = 64 if preset == "tiny" else 768
    with torch.device("cuda"):
        model = DeltaTok(hidden, **config.model.model_dump())
    task = TokenizerTask.__new__(TokenizerTask)  # what opens a dataset is not needed
    task.model, task._config, task._grid = model.train(), config, (side, side)
    effective = config.training.batch_size * (config.training.accumulation or 1)
    split = Split(samples or effective, effective // (samples or effective))

    def batch(part: Part) -> PairBatch:
        pinned = torch.empty(
            2, part.stop - part.start, side * side, hidden, dtype=torch.float16, pin_memory=True
        )
        return PairBatch(*pinned.to(CUDA, non_blocking=True).float())

    return measured(task, split, config.training, batch)


def measured(task: Any, split: Split, training: Any, batch_of: Any) -> dict[str, Any]:
    """Two steps as ``train/loop.py`` does them; the second is counted, for one pass of it and the update."""
    watch = Watch()
    with watch:
        parameters = list(task.model.parameters())
        for each in (*parameters, *task.model.buffers()):
            watch.follow(each)
        assert {each.device.type for each in parameters} == {"cuda"}
        optimizer = make_optimizer(task.model, training)
        guard = FiniteGuard(optimizer, CUDA)
        for step in range(2):
            watch.launches.clear()
            watch.waits.clear()
            watch.dtypes.clear()
            optimizer.zero_grad()
            part = next(split.parts(step))
            with forward_precision(CUDA):
                loss, _ = task.training_loss(batch_of(part), part)
            assert loss.dtype == torch.float32
            (loss / split.accumulation).backward()
            norm = clip_gradients(parameters, training.gradient_clip)
            guard.look_at(loss.detach(), norm)
            set_rate(optimizer, 1e-4)
            optimizer.step()
    return {
        "samples": split.batch_size,
        "passes": split.accumulation,
        "launches": sum(watch.launches.values()),
        "draws": watch.launches["aten.normal_.default"],
        "waits": watch.waits,
        "products": dict(watch.dtypes),
        "peak_gib": round(watch.peak / 2**30, 2),
        "parameters": sum(each.numel() for each in parameters),
        "state_dtypes": sorted({str(each.dtype) for each in parameters}),
    }


def main() -> None:
    """See above."""
    for name in sys.argv[1:]:
        kind, *rest = name.partition(":")[0].split("/")
        samples = int(name.partition(":")[2] or 0) or None
        with simulated():
            result = {"world": world_step, "tokenizer": tokenizer_step}[kind](*rest, samples)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
