"""The training loop, shared by the tokenizer and the world model."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind
from deltacache.models.devices import allow_tf32, forward_precision
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import ProgressStage, Reporter, duration
from deltacache.schemas.texts import bytes_text, counted
from deltacache.train.checkpoints import BEST, TrainedModel, checkpoint_folder
from deltacache.train.logs import FolderRecord, NoRecord, RunWriter
from deltacache.train.optimizer import (
    FiniteGuard,
    clip_gradients,
    make_optimizer,
    rate_at,
    schedule_lines,
    set_rate,
)
from deltacache.train.order import MicroBatch, Mixture, Split
from deltacache.train.passes import (
    CutBatches,
    PassCost,
    cut_into,
    describe_split,
    describe_time,
    fitting_split,
    measure_passes,
    memory_for,
)
from deltacache.train.preview import bfloat16_share, preview
from deltacache.train.validation import Validation
from deltacache.train.workers.group import Loss, OtherWorkerFailedError, ProcessGroup, SingleProcess

# ----------------------------------------------------------------------------------------------------
# What the steps of an interval gave and where their time went, as one row of the curves.
# ----------------------------------------------------------------------------------------------------


SPIKE_FACTORS: Mapping[str, float] = {"loss": 3.0, "gradient_norm": 10.0}
"""A value is a spike from this many times the median of the steps before it."""
_REMEMBERED, _LEAST_REMEMBERED = 200, 20


class NonFiniteError(DeltacacheError):
    """A loss or gradient norm is not finite.

    Attributes:
        done: finished steps before it, which is the state that the weights are in.
        row: the row of those of them that no row had yet, if any.
    """

    def __init__(self, message: str, done: int, row: dict[str, float] | None) -> None:
        super().__init__(message)
        self.done = done
        self.row = row


class SpikeWatch:
    """Compares each step with the median of up to 200 steps before it."""

    def __init__(self) -> None:
        self._past = {name: deque[float](maxlen=_REMEMBERED) for name in SPIKE_FACTORS}

    def found(self, first_step: int, values: Mapping[str, Sequence[float]]) -> list[str]:
        """A message for each spike among consecutive steps, the first of which is ``first_step``."""
        messages: list[str] = []
        for name, past in self._past.items():
            median = statistics.median(past) if len(past) >= _LEAST_REMEMBERED else float("inf")
            for step, value in enumerate(values[name], first_step):
                if value > SPIKE_FACTORS[name] * median:
                    messages.append(
                        f"spike at step {step}: {name.replace('_', ' ')} {value:.4g} is {value / median:.1f} times "
                        f"the median of the {len(past)} steps before ({median:.4g})"
                    )
            past.extend(values[name])
        return messages


class Meter:
    """Collects what the steps of one interval gave, and where their time went.

    Values stay on the device until the interval ends, so that a GPU is not waited for at every step.
    """

    def __init__(self, first_step: int, effective_batch: int) -> None:
        self._step = first_step
        self._effective_batch = effective_batch
        self._watch = SpikeWatch()
        self.total_steps = 0
        self.total_s = 0.0
        self._total_wait_s = 0.0
        self.spikes: list[str] = []  # of the last row
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin an interval: time since the last one (saving, probing) belongs to no step."""
        self._values: list[dict[str, Tensor]] = []
        self._rates: list[float] = []
        self._wait_s = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for a batch."""
        asked = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - asked

    @property
    def interval_steps(self) -> int:
        """Steps since the interval began."""
        return len(self._values)

    def add(self, values: dict[str, Tensor], learning_rate: float) -> None:
        """One step is done; ``values`` are scalars, ``loss`` and ``gradient_norm`` among them."""
        self._values.append(values)
        self._rates.append(learning_rate)

    def row(self) -> dict[str, float]:
        """The interval as a row.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite; names the first step where.
        """
        names = list(self._values[0])
        table = torch.stack([torch.stack([v[name].float() for name in names]) for v in self._values]).cpu()
        elapsed_s = time.perf_counter() - self._started  # after the copy: the device has finished
        checked = table[:, [names.index("loss"), names.index("gradient_norm")]]
        bad = (~checked.isfinite()).any(dim=1).nonzero()
        if len(bad) == 0:
            return self._row(names, table, elapsed_s)
        steps = int(bad[0, 0])
        loss, norm = checked[steps].tolist()
        done = self._step + steps
        row = self._row(names, table[:steps], elapsed_s * steps / len(table)) if steps else None
        raise NonFiniteError(
            f"step {done + 1} has loss {loss} and gradient norm {norm}: both must be finite, so training stopped "
            f"with a checkpoint of the state before it, step {done}; continue from there in another folder with "
            "--continue-from and a lower learning rate, a longer warm-up or a smaller gradient_clip",
            done,
            row,
        )

    def _row(self, names: Sequence[str], table: Tensor, elapsed_s: float) -> dict[str, float]:
        steps = len(table)
        columns = dict(zip(names, table.double().T.tolist(), strict=True))
        self.spikes = self._watch.found(self._step + 1, columns)
        self._step += steps
        self.total_steps += steps
        self.total_s += elapsed_s
        wait_s = self._wait_s * steps / len(self._values)  # fewer steps than values where one was not finite
        self._total_wait_s += wait_s
        return {
            "step": self._step,
            **dict(zip(names, table.double().mean(0).tolist(), strict=True)),
            "loss_max": max(columns["loss"]),
            "gradient_norm_max": max(columns["gradient_norm"]),
            "spikes": len(self.spikes),
            "learning_rate": self._rates[steps - 1],
            "step_time_s": elapsed_s / steps,
            "data_wait_s": wait_s / steps,
            "clips_per_s": self._effective_batch * steps / max(elapsed_s, 1e-9),
        }

    def summary(self) -> str:
        """All intervals in one line."""
        seconds = max(self.total_s, 1e-9)
        return (
            f"{counted(self.total_steps, 'step')}, {self._effective_batch * self.total_steps / seconds:,.0f} clips/s, "
            f"{100 * self._total_wait_s / seconds:.1f} % of the time waiting for data"
        )


BatchT = TypeVar("BatchT")
ResultT = TypeVar("ResultT")
_SHOW_S = 5.0
"""Between two movements of the bar without a row."""
_WORTH_A_HINT_S = 300.0
"""Of training, before a few passes are spent on what another precision would have saved."""


class TrainingTask(Protocol[BatchT]):
    """What is trained. All depends on the step and the part alone, so a resumed run repeats an unbroken one."""

    @property
    def kind(self) -> Kind:
        """Which of the two models."""
        ...

    @property
    def divisible(self) -> bool:
        """Whether a step may be cut into passes freely: the loss is a mean over samples that do not meet."""
        ...

    @property
    def model(self) -> TrainedModel:
        """In train mode, on the device of the batches."""
        ...

    def batches(self, parts: Iterable[MicroBatch]) -> Generator[BatchT]:
        """The batches of these parts, in order."""
        ...

    def trial_batches(self, parts: Iterable[MicroBatch]) -> Generator[BatchT]:
        """The same, for a few parts: data that ``batches`` loads whole are not loaded for them."""
        ...

    def bytes_to_load(self, device: torch.device) -> int:
        """Of the device's memory (the host's, of a CPU), that data take when ``batches`` begins."""
        ...

    def bytes_to_read(self, samples: int) -> int:
        """What a training of so many samples reads from the dataset."""
        ...

    def inputs_computed(self, samples: int) -> int:
        """How many inputs of so many samples are computed while a pass waits; the others are at hand."""
        ...

    def training_loss(self, batch: BatchT, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, and detached scalars to log beside it: means over the part."""
        ...

    def probes(self) -> dict[str, float]:
        """Numbers that tell whether the model does what it is meant to do."""
        ...


@dataclass(frozen=True)
class Run:
    """Where one call of a trainer starts and where it writes.

    Attributes:
        metadata: goes into every checkpoint's ``config.json``.
        first_step: how many steps are done; ``optimizer_state`` is the optimizer's after them.
        samples_per_pass: of the run that this one resumes.
        dry_run: say what the training would take, and write nothing.
        validation: how the model is validated, if it is.
        mixture: of the datasets, whose shares are logged.
    """

    out: Path
    config: TrainingConfig
    metadata: Mapping[str, Any]
    reporter: Reporter
    first_step: int = 0
    optimizer_state: dict[str, Any] | None = None
    samples_per_pass: int | None = None
    group: ProcessGroup = field(default_factory=SingleProcess)
    hint: str = "run the same command with --resume to continue"
    dry_run: bool = False
    validation: Validation | None = None
    mixture: Mixture | None = None

    @property
    def split(self) -> Split:
        """How a step is shared out, as the config says; in one pass where the config leaves that open."""
        return split_of(self.config, self.group)

    def record(self, kind: Kind, split: Split) -> RunWriter:
        """Where this worker's rows and checkpoints go."""
        if self.group.rank > 0:
            return NoRecord()
        record = FolderRecord(self.out, kind, self.config, self.metadata, self.first_step, self.reporter.line)
        record.note_split(split)
        if self.validation is not None:
            record.note_validation(self.validation.record)
        return record


def split_of(config: TrainingConfig, group: ProcessGroup) -> Split:
    """How the effective batch is shared out among the workers of ``group``."""
    return Split(config.batch_size, config.accumulation or 1, group.workers, group.rank)


def train(task: TrainingTask[BatchT], run: Run) -> Path:
    """Train from ``run.first_step`` to ``run.config.steps`` and return the last checkpoint.

    Raises:
        NonFiniteError: a loss or gradient norm is not finite; the state before that step is saved.
        SystemExit: 0 after SIGTERM, when the state is saved.
    """
    if _over(run.validation) and not run.dry_run:
        run.reporter.line(f"train {task.kind}: {_stopped_early(run)}, nothing to do")
        return checkpoint_folder(run.out, run.first_step)
    config, group = run.config, run.group
    steps, done, stopped = range(run.first_step, config.steps), run.first_step, False
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    device = parameters[0].device
    allow_tf32(device, config.precision != "float32")
    optimizer = make_optimizer(task.model, config, run.optimizer_state)
    guard = FiniteGuard(optimizer, device)
    for line in schedule_lines(config, run.first_step):
        run.reporter.line(f"train {task.kind}: {line}")
    cost, split = _choose_split(task, run, device)
    if run.dry_run:
        return _dry_run(task, run, optimizer, cost, split)
    meter = Meter(run.first_step, split.effective_batch)
    training_loss = group.shared(task.model, task.training_loss)
    with (
        group.stopping() as stop,
        run.record(task.kind, split) as record,
        run.reporter.stage(f"train {task.kind}", config.steps, done=run.first_step) as stage,
        closing(CutBatches(task, split, steps, device)) as batches,
    ):
        shown, shown_at, logged, early = run.first_step, time.monotonic(), run.first_step, False
        for step in steps:
            while (values := _gradients(batches, step, training_loss, optimizer, meter, run)) is None:
                batches.cut_smaller(step)  # outside, the traceback has let go of what the pass had computed
                record.note_split(batches.split)
                run.reporter.line(f"train {task.kind}: out of memory in step {step + 1}, now {batches.split}")
            with memory_for(f"the optimizer's update of step {step + 1}", device):
                norm = clip_gradients(parameters, config.gradient_clip)
                means = _means(values, group)
                guard.look_at(means["loss"], norm)
                rate = set_rate(optimizer, rate_at(step, config))
                optimizer.step()  # does nothing from the first step on that is not finite
            meter.add({**means, "gradient_norm": norm}, rate)
            done, stopped = step + 1, group.any(stop.asked)
            end = done == config.steps or stopped
            save, probe = end or done % config.save_every == 0, end or done % config.probe_every == 0
            validate = _validates(run, done)
            if save or probe or validate or done % config.log_every == 0:
                row = _row(meter, task, optimizer, record)
                _show(stage, meter, row, done - shown, run.reporter, warm=done > config.warmup_steps)
                if group.rank == 0:
                    row |= _beside(
                        task, optimizer, record, run, range(logged, done), probe=probe, validate=validate
                    )
                record.add(row)
                early = validate and group.any(_over(run.validation))
                if save or early or (validate and _is_best(run.validation, done)):
                    record.save(task.model, optimizer, done)
                meter.restart_clock()
                shown, shown_at, logged = done, time.monotonic(), done
            elif (
                time.monotonic() - shown_at > _SHOW_S
            ):  # rows may be far apart; loss and speed come with them
                stage.advance(done - shown)
                shown, shown_at = done, time.monotonic()
            if stopped or early:
                break
        record.finish()
    run.reporter.line(f"train {task.kind}: {_summary(task, run, meter, device)}")
    return _ended(task, run, done, early=early)


def _ended(task: TrainingTask[Any], run: Run, done: int, *, early: bool) -> Path:
    """The last checkpoint; says why steps are left.

    Raises:
        SystemExit: 0 after SIGTERM.
    """
    if early:
        if run.group.rank == 0:  # it alone has validated
            run.reporter.line(f"train {task.kind}: {_stopped_early(run)}")
    elif done < run.config.steps:
        run.reporter.line(
            f"train {task.kind}: stopped by SIGTERM, {checkpoint_folder(run.out, done)} is saved; {run.hint}"
        )
        raise SystemExit(0)
    return checkpoint_folder(run.out, done)


def _dry_run(
    task: TrainingTask[Any], run: Run, optimizer: torch.optim.Optimizer, cost: PassCost, split: Split
) -> Path:
    """Say what the training would take."""
    for line in preview(task, run.config, optimizer, cost, split, run.config.steps - run.first_step):
        run.reporter.line(f"train {task.kind}: {line}")
    run.reporter.line(f"train {task.kind}: this was a dry run, nothing was written to {run.out}")
    return run.out


def _beside(
    task: TrainingTask[Any],
    optimizer: torch.optim.Optimizer,
    record: RunWriter,
    run: Run,
    steps: range,
    *,
    probe: bool,
    validate: bool,
) -> dict[str, Any]:
    """What a row about ``steps`` holds beside their means: probes, validation loss, shares of a mixture.

    Raises:
        DeltacacheError: probes or validation run out of memory; the state after these steps is saved before.
    """
    done, validation, values = steps.stop, run.validation, dict[str, Any]()
    if probe:
        values |= _saved_before("the health probes", _PROBE_LESS, task, optimizer, record, done, task.probes)
    if run.mixture is not None:
        values["shares"] = _shares(run, steps.start, done).tolist()
    if validation is not None and validate:
        best = _saved_before(
            "the validation", _VALIDATE_LESS, task, optimizer, record, done, lambda: validation.add(done)
        )
        record.note_validation(validation.record)
        values["validation_loss"] = validation.standing.loss
        said = "the lowest so far" if best else f"the lowest is {_best(validation)}"
        run.reporter.line(
            f"train {task.kind}: validation loss {validation.standing.loss:.5g} after step {done:,}, {said}"
        )
    return values


def _validates(run: Run, done: int) -> bool:
    """Not where SIGTERM ends the run: one that goes on would have waited once more than an unbroken one."""
    return run.validation is not None and (done == run.config.steps or done % run.validation.every == 0)


def _over(validation: Validation | None) -> bool:
    return validation is not None and validation.over


def _is_best(validation: Validation | None, done: int) -> bool:
    return validation is not None and validation.standing.best_step == done


def _best(validation: Validation) -> str:
    standing = validation.standing
    return (
        "not finite"
        if standing.best_loss is None
        else f"{standing.best_loss:.5g} after step {standing.best_step:,}"
    )


def _stopped_early(run: Run) -> str:
    assert run.validation is not None
    standing = run.validation.standing
    return (
        f"stopped early after step {standing.step:,}, since the validation loss was not lower "
        f"{counted(standing.waited, 'time')} in a row (--patience); the lowest is {_best(run.validation)}: "
        f"{run.out / BEST}"
    )


def _shares(run: Run, first: int, done: int) -> np.ndarray:
    """What each dataset of the mixture had of the samples of steps ``first`` to ``done - 1``."""
    assert run.mixture is not None
    size = run.split.effective_batch
    counts = run.mixture.drawn(done * size) - run.mixture.drawn(first * size)
    return counts / counts.sum()


def _summary(task: TrainingTask[Any], run: Run, meter: Meter, device: torch.device) -> str:
    """The last line: shares of a mixture; of a long training, also what another precision would have saved."""
    said = meter.summary()
    if run.mixture is not None and meter.total_steps:
        first = run.first_step
        shares = " / ".join(f"{share:.4f}" for share in _shares(run, first, first + meter.total_steps))
        said += f"; the datasets had {shares} of the samples"
    if run.group.rank > 0 or meter.total_s < _WORTH_A_HINT_S:
        return said
    share = bfloat16_share(task, run.config, device)
    if share is None:
        return said
    return f"{said}; --precision bfloat16 would have taken about {duration(share * meter.total_s)} less on this CPU"


def _choose_split(task: TrainingTask[Any], run: Run, device: torch.device) -> tuple[PassCost, Split]:
    """How steps are cut into passes: as the config says, as before, or the largest passes that fit.

    Says which, and how long the training will take.

    Raises:
        OtherWorkerFailedError: another worker cannot measure, and has said why.
    """
    split, failed, steps = run.split, True, run.config.steps - run.first_step
    samples = split.batch_size * split.accumulation * steps

    def early(sample_s: float, input_s: float, at_least: bool) -> None:
        seconds = samples * sample_s + task.inputs_computed(samples) * input_s
        said = f"at least {duration(seconds)} for {counted(steps, 'step', form=',')}: the first pass has not ended yet"
        if not at_least:
            said = f"{describe_time(seconds, steps)}, from the first pass"
        run.reporter.line(f"train {task.kind}: {said}")

    try:
        cost = measure_passes(
            task,
            split.effective_batch,
            device,
            run.config.precision,
            moments_there=run.optimizer_state is not None,
            early=early,
        )
        failed = False
    finally:  # or those that measured would wait for this one
        failed_somewhere = run.group.any(failed)
    if failed_somewhere:
        raise OtherWorkerFailedError("another worker could not measure its passes")
    if run.config.accumulation is None and task.divisible:
        split = fitting_split(cost, split, run.group, device)
        before = run.samples_per_pass
        if before is not None and before < split.batch_size and run.split.batch_size % before == 0:
            split = cut_into(run.split, before)  # bitwise what an unbroken run would compute
    said = describe_split(cost, split, device)
    if not run.dry_run:
        seconds = samples * cost.sample_seconds + task.inputs_computed(samples) * cost.input_seconds
        said += f"; {describe_time(seconds, steps)}"
        if (size := task.bytes_to_load(device)) > 2**30:
            said += f"; {bytes_text(size)} of tokens are loaded first"
    run.reporter.line(f"train {task.kind}: {said}")
    return cost, split


def _gradients(
    batches: CutBatches[BatchT],
    step: int,
    training_loss: Loss,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    run: Run,
) -> list[dict[str, Tensor]] | None:
    """Leave the gradients of a step in the model and return the values of each pass.

    ``None``: a pass ran out of memory, and smaller ones are possible.

    Raises:
        DeltacacheError: out of memory, and passes cannot be smaller.
    """
    optimizer.zero_grad()
    values: list[dict[str, Tensor]] = []
    split, group = batches.split, run.group
    try:
        for part in split.parts(step):
            with meter.waiting():
                batch = next(batches)
            with group.gathering(last=len(values) + 1 == split.accumulation):
                with forward_precision(batches.device, run.config.precision):
                    loss, scalars = training_loss(batch, part)
                (loss / split.accumulation).backward()
            values.append({"loss": loss.detach(), **scalars})
    except torch.OutOfMemoryError as error:
        if group.workers > 1 or not batches.can_be_smaller:  # other workers wait for this one's gradients
            way = "" if split.batch_size == 1 else "give a larger --accumulation, "
            if not batches.divisible:
                way = "give a smaller --batch-size, "
            raise DeltacacheError(
                f"out of memory in step {step + 1}, in passes of {counted(split.batch_size, 'sample')} of "
                "an effective batch "
                f"{split}: {way}free memory on {batches.device}, or choose a smaller model or image size. PyTorch "
                f"says: {str(error).splitlines()[0]}"
            ) from error
        return None
    return values


def _means(values: list[dict[str, Tensor]], group: ProcessGroup) -> dict[str, Tensor]:
    """Means over the parts of a step, which are of equal size, and over the workers."""
    names = list(values[0])
    table = torch.stack([torch.stack([each[name].float() for name in names]) for each in values])
    return dict(zip(names, group.average(table.mean(0)).unbind(), strict=True))


def _row(
    meter: Meter, task: TrainingTask[Any], optimizer: torch.optim.Optimizer, record: RunWriter
) -> dict[str, float]:
    """The interval as a row; if one of its steps is not finite, the state before that step is saved.

    The updates since that step did nothing, so the state is still the one before it.
    """
    try:
        return meter.row()
    except NonFiniteError as error:
        if error.row is not None:
            record.add(error.row)
        record.save_now(task.model, optimizer, error.done)
        raise


_PROBE_LESS = "with a larger --probe-every or a smaller training.probe_clips"
_VALIDATE_LESS = "with a larger --validate-every or without --validate"


def _saved_before(
    what: str,
    way_out: str,
    task: TrainingTask[Any],
    optimizer: torch.optim.Optimizer,
    record: RunWriter,
    done: int,
    compute: Callable[[], ResultT],
) -> ResultT:
    """What ``compute`` gives.

    Raises:
        DeltacacheError: it runs out of memory; the state after ``done`` steps is saved before.
    """
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        record.save_now(task.model, optimizer, done)
        raise DeltacacheError(
            f"out of memory in {what} after step {done}, whose state is saved: continue with --resume, {way_out}. "
            f"PyTorch says: {str(error).splitlines()[0]}"
        ) from error


def _show(
    stage: ProgressStage,
    meter: Meter,
    row: Mapping[str, float],
    steps: int,
    reporter: Reporter,
    *,
    warm: bool,
) -> None:
    """Move the bar to the row's step: loss, speed, how much of the time was waiting; the bar knows what is left.

    Spikes are counted in every row, but said only once the learning rate is ``warm``: before, norms rise with it.
    """
    stage.advance(
        steps,
        loss=f"{row['loss']:.4g}",
        clips_per_s=f"{row['clips_per_s']:,.0f}",
        step=f"{1000 * row['step_time_s']:.1f} ms",
        data_wait=f"{100 * row['data_wait_s'] / row['step_time_s']:.1f} %",
    )
    if meter.spikes and warm:
        more = f" (and {len(meter.spikes) - 1} more since the row before)" if len(meter.spikes) > 1 else ""
        reporter.line(meter.spikes[0] + more)
