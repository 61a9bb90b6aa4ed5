"""The training loop, shared by the tokenizer and the world model."""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deltacache.models.checkpoints import Kind
from deltacache.models.deltatok import DeltaTok
from deltacache.models.deltaworld import DeltaWorld
from deltacache.models.optimizer_groups import decay_groups
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.progress import ProgressStage, Reporter
from deltacache.train.checkpoints import checkpoint_folder, delete_old, save_checkpoint
from deltacache.train.curves import Meter
from deltacache.train.logs import RunLog
from deltacache.train.schedules import warmup_constant

BatchT = TypeVar("BatchT")


class TrainingTask(Protocol[BatchT]):
    """What is trained. Both methods depend on the step alone, so a resumed run repeats an unbroken one."""

    @property
    def kind(self) -> Kind:
        """Which of the two models."""
        ...

    @property
    def model(self) -> DeltaTok | DeltaWorld:
        """In train mode, on the device of the batches."""
        ...

    def batches(self, steps: range) -> Generator[BatchT]:
        """The batches of these steps, in order."""
        ...

    def training_loss(self, batch: BatchT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, and detached scalars to log beside it."""
        ...


@dataclass(frozen=True)
class Run:
    """Where one call of a trainer starts and where it writes.

    Attributes:
        metadata: goes into every checkpoint's ``config.json``.
        first_step: how many steps are done; ``optimizer_state`` is the optimizer's after them.
    """

    out: Path
    config: TrainingConfig
    metadata: Mapping[str, Any]
    reporter: Reporter
    first_step: int = 0
    optimizer_state: dict[str, Any] | None = None

    def save(self, task: TrainingTask[Any], optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the checkpoint after ``step`` steps, then delete those that are not to be kept."""
        save_checkpoint(self.out, task.kind, task.model, optimizer, {**self.metadata, "step": step})
        delete_old(self.out, self.config.keep)


def train(task: TrainingTask[BatchT], run: Run) -> Path:
    """Train from ``run.first_step`` to ``run.config.steps`` and return the last checkpoint.

    Raises:
        DeltacacheError: a loss or gradient norm is not finite; the checkpoints before stay.
    """
    config = run.config
    steps = range(run.first_step, config.steps)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(task.model, run)
    meter = Meter(run.first_step, config.batch_size)
    with (
        closing(task.batches(steps)) as batches,
        RunLog(run.out, task.kind, run.first_step) as log,
        run.reporter.stage(f"train {task.kind}", config.steps, done=run.first_step) as stage,
    ):
        for step in steps:
            with meter.waiting():
                batch = next(batches)
            with forward_precision(parameters[0].device):
                loss, scalars = task.training_loss(batch, step)
            optimizer.zero_grad()
            loss.backward()
            norm = clip_gradients(parameters, config.gradient_clip)
            rate = set_rate(optimizer, warmup_constant(step, config.learning_rate, config.warmup_steps))
            optimizer.step()
            meter.add({"loss": loss.detach(), **scalars, "gradient_norm": norm})
            done = step + 1
            save = done % config.save_every == 0 or done == config.steps
            if save or done % config.log_every == 0:
                row = meter.row(rate)  # refuses what is not finite before it can be saved
                log.add(row)
                show(stage, meter, row)
                if save:
                    log.save()
                    run.save(task, optimizer, done)
                meter.restart_clock()
        log.plot()
    run.reporter.line(f"train {task.kind}: {meter.summary()}")
    return checkpoint_folder(run.out, config.steps)


def forward_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where it is fast: on CUDA. Weights, gradients and optimizer stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def make_optimizer(model: nn.Module, run: Run) -> torch.optim.AdamW:
    """AdamW with weight decay on Linear and Conv weights only, in the state that the run starts from."""
    groups = [dict(group) for group in decay_groups(model, run.config.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=run.config.learning_rate, fused=True)
    if run.optimizer_state is not None:
        optimizer.load_state_dict(run.optimizer_state)
    return optimizer


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most ``limit`` and return their norm before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(gradients, foreach=True)
    if limit is not None:
        clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


def show(stage: ProgressStage, meter: Meter, row: Mapping[str, float]) -> None:
    """Move the bar to the row's step, with the loss, the time of a step and how much of it was waiting."""
    waiting = row["data_wait_s"] / row["step_time_s"]
    stage.advance(
        meter.interval_steps,
        loss=f"{row['loss']:.4g}",
        step=f"{1000 * row['step_time_s']:.1f} ms",
        data_wait=f"{100 * waiting:.1f} %",
    )
