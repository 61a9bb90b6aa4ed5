"""Everything a run writes for people to look at: curves in Parquet, rows for trackers, a picture."""

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from deltacache.models.checkpoints import Kind
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.files import replacing
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.tables import HEAD_CURVES_SCHEMA, TOKENIZER_CURVES_SCHEMA, WORLD_CURVES_SCHEMA
from deltacache.train.checkpoints import (
    TrainedModel,
    TrainingState,
    checkpoint_folder,
    delete_old,
    link_best,
    save_checkpoint,
)
from deltacache.train.order import Split

# ----------------------------------------------------------------------------------------------------
# Training curves: one row an interval, in Parquet and as a picture.
# ----------------------------------------------------------------------------------------------------


CURVES = "curves.parquet"
_LIVE_S = 10.0
"""Between two times that the table is written without a checkpoint."""

Row = Mapping[str, Any]
"""``step`` (finished ones), means over the steps since the row before, ``learning_rate`` of the last step;
probes and ``validation_loss`` are absent or ``None`` in rows where none was made. ``shares`` is a list: what each
dataset of a mixture had of the samples since the row before."""


def read_curves(path: Path, up_to_step: float = math.inf) -> list[Row]:
    """Rows of an earlier run up to a step; none if the file is not there.

    Raises:
        DatasetError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): delete it to go on without the curves so far"
        ) from error
    return [row for row in rows if row["step"] <= up_to_step]


def write_curves(rows: Sequence[Row], path: Path, schema: pa.Schema) -> None:
    """Replace the file, all or nothing."""
    if not rows:
        return
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


_PANELS: tuple[tuple[str, ...], ...] = (
    ("loss", "validation_loss", "mse", "copy_last_mse"),
    ("gradient_norm", "gradient_norm_max", "learning_rate"),
    ("copy_ratio", "z_swap_ratio", "zero_z_ratio", "black_first_ratio"),
    ("delta_rank", "predicted_rank", "queries_winning"),
)


def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw losses, gradient norm, learning rate and probes over the steps."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    # A fixed layout and few, plain numbers: to measure every label and to typeset exponents takes most of a second,
    # longer than a short run trains.
    figure = Figure(figsize=(8, 10))
    panels = [names for names in _PANELS if any(_curve(rows, name)[0] for name in names)]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.06, top=0.96, hspace=0.07)
    for axis, names in zip(axes, panels, strict=True):
        axis.set_yscale("log", subs=())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for name in names:
            steps, values = _curve(rows, name)
            if steps:
                axis.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 30 else None)
        low, high = axis.get_ylim()
        if high < 30 * low:  # too few powers of ten to read values from
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axis.legend(loc="upper right")
        axis.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have ``name``."""
    points = [(row["step"], row.get(name)) for row in rows]
    shown = [
        (step, value)
        for step, value in points
        if step is not None and (value is not None and math.isfinite(value))
    ]
    return [step for step, _ in shown], [value for _, value in shown if value is not None]


# ----------------------------------------------------------------------------------------------------
# Trackers: places that rows are sent to beside the table. W&B and MLflow are optional extras, imported here alone.
# ----------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """A place that rows are sent to beside the table."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One row's numbers, the step left out."""
        ...

    def flush(self) -> None:
        """Write what there is."""
        ...

    def close(self) -> None:
        """No more rows follow."""
        ...


class TensorBoardTracker:
    """Events that TensorBoard reads; what a crashed run logged beyond ``first_step`` is hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandbTracker:
    """Weights & Biases, online, or offline in ``OUT/wandb``, from where ``wandb sync`` sends the rows later.

    Raises:
        DeltacacheError: the package is not installed, or W&B refuses to start.
    """

    def __init__(
        self, out: Path, run: str, name: str, training: TrainingConfig, config: Mapping[str, Any]
    ) -> None:
        mode = "offline" if training.wandb == "offline" else "online"
        try:
            import wandb
        except ImportError as error:
            raise DeltacacheError(
                f"wandb is {mode}, but the package is not installed ({error}): "
                "pip install 'deltacache[wandb]', or leave --wandb out"
            ) from error
        try:
            self._run = wandb.init(
                project=training.project,
                name=name,
                id=run,
                dir=out,
                config=dict(config),
                mode=mode,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise DeltacacheError(
                f"Weights & Biases does not start ({error}): log in with `wandb login`, "
                "give --wandb offline, or leave it out"
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: W&B writes by itself."""

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """MLflow: where ``MLFLOW_TRACKING_URI`` says, else in a SQLite file ``OUT/mlflow.db``, without any server.

    Raises:
        DeltacacheError: the package is not installed, or the store cannot be opened.
    """

    def __init__(
        self, out: Path, run: str, name: str, training: TrainingConfig, config: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from mlflow import MlflowClient
                from mlflow.entities import Metric, Param
                from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise DeltacacheError(
                f"--tracker mlflow, but the package is not installed ({error}): "
                "pip install 'deltacache[mlflow]', or leave it out"
            ) from error
        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve()}/mlflow.db"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of SQLAlchemy about MLflow
                self._client = MlflowClient(tracking_uri=uri)
                experiment = self._client.get_experiment_by_name(training.project)
                place = (
                    experiment.experiment_id
                    if experiment is not None
                    else self._client.create_experiment(training.project)
                )
                found = self._client.search_runs([place], f"tags.deltacache_run = '{run}'")
                if found:
                    self._run = found[0].info.run_id
                    self._client.update_run(self._run, status="RUNNING", name=name)
                    return
                self._run = self._client.create_run(
                    place, run_name=name, tags={"deltacache_run": run}
                ).info.run_id
                settings = config.get("config", {}).get("training", {})
                params = [Param(key, str(value)) for key, value in settings.items()]
                self._client.log_batch(self._run, params=params)
        except MlflowException as error:
            raise DeltacacheError(
                f"MLflow does not start at {uri} ({error}): check MLFLOW_TRACKING_URI, or leave --tracker mlflow out"
            ) from None  # its own text may hold the credentials of the address

    def add(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def flush(self) -> None:
        """Nothing to do: every row is written at once."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


def open_trackers(
    out: Path, kind: Kind, first_step: int, training: TrainingConfig, config: Mapping[str, Any]
) -> dict[str, Tracker]:
    """Those that ``training`` names; a resumed run goes on in the same run, whose id follows from the output folder.

    Raises:
        DeltacacheError: one does not start.
    """
    run = fingerprint_of({"out": str(out.resolve())})
    name = training.run_name or f"{kind} {out.resolve().name}"
    names = dict.fromkeys((*(("wandb",) if training.wandb != "off" else ()), *training.trackers))
    opened: dict[str, Tracker] = {}
    for each in names:
        if each == "tensorboard":
            opened[each] = TensorBoardTracker(out / "tensorboard", first_step)
        else:
            tracker = WandbTracker if each == "wandb" else MlflowTracker
            opened[each] = tracker(out, run, name, training, config)
    return opened


SCHEMAS: Mapping[Kind, pa.Schema] = {
    "tokenizer": TOKENIZER_CURVES_SCHEMA,
    "world": WORLD_CURVES_SCHEMA,
    "head": HEAD_CURVES_SCHEMA,
    "rgb_decoder": HEAD_CURVES_SCHEMA,
}


class RunLog:
    """The curves of one run; goes on from those of an earlier call up to ``first_step``.

    A tracker that fails after its start gets no more rows, and the training goes on; ``say`` gets the message.

    Args:
        config: what the trackers show of the run.
    """

    def __init__(
        self,
        out: Path,
        kind: Kind,
        first_step: int,
        training: TrainingConfig,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._out = out
        self._kind: Kind = kind
        self._say = say
        self._rows: list[Row] = read_curves(out / CURVES, first_step)
        self._written_at = 0.0
        self._trackers = open_trackers(out, kind, first_step, training, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._of_each(lambda tracker: tracker.close())

    def _of_each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 whatever a tracker raises, the training goes on
                del self._trackers[name]
                self._say(
                    f"train {self._kind}: {name} failed and gets no more rows of this run ({error!r}); "
                    f"{self._out / CURVES} has all of them"
                )

    def add(self, row: Row) -> None:
        """One more interval.

        The table is written every few seconds, so that ``inspect`` shows a training that has no checkpoint yet. Rows
        beyond the newest checkpoint are left out on resume.
        """
        self._rows.append(row)
        if time.monotonic() - self._written_at > _LIVE_S:
            with suppress(OSError):  # a full disk ends the training at the next checkpoint, not here
                write_curves(self._rows, self._out / CURVES, SCHEMAS[self._kind])
            self._written_at = time.monotonic()
        step = row["step"]
        assert step is not None
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for number, share in enumerate(cast("list[float]", values.pop("shares", []))):
            values[f"share_{number}"] = share
        self._of_each(lambda tracker: tracker.add(int(step), values))

    def save(self) -> None:
        """Write what there is: before the checkpoint of the same step, so that no row is missed on resume."""
        write_curves(self._rows, self._out / CURVES, SCHEMAS[self._kind])
        self._of_each(lambda tracker: tracker.flush())

    def plot(self) -> None:
        """Draw ``curves.png``."""
        if self._rows:
            plot_curves(self._rows, self._out / "curves.png", self._kind)


# ----------------------------------------------------------------------------------------------------
# Checkpoints written beside the training: a copy of the state is taken, and a thread writes it to the disk.
# ----------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes one checkpoint at a time, then deletes those beyond ``keep``. Errors come up at the next call."""

    def __init__(self, out: Path, kind: Kind, metadata: Mapping[str, Any], keep: int) -> None:
        self._out, self._metadata, self._keep = out, metadata, keep
        self._kind: Kind = kind
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)  # also when training failed: what was begun is finished
        if error is None:
            self.wait()

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take the state after ``step`` steps; returns when it is copied, not when it is written."""
        self.wait()
        state = TrainingState(
            weights=_copied(model.state_dict()),
            arguments=copy.deepcopy(model.arguments),
            optimizer=_copied(optimizer.state_dict()),
        )
        self._pending = self._pool.submit(self._write, state, step)

    def wait(self) -> None:
        """Until what was given is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: TrainingState, step: int) -> None:
        metadata = {**self._metadata, "step": step}
        best = (metadata.get("validation") or {}).get("best_step")
        with readable_errors(self._out):
            save_checkpoint(self._out, self._kind, state, metadata)
            if best is not None:
                link_best(self._out, best)
            delete_old(self._out, self._keep, best)


def _copied(value: Any) -> Any:
    """Nested dicts and lists with their tensors copied into the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


# ----------------------------------------------------------------------------------------------------
# What a run leaves on the disk: rows of the curves and checkpoints. The first worker alone writes them.
# ----------------------------------------------------------------------------------------------------


class RunWriter(AbstractContextManager["RunWriter"], Protocol):
    """Where rows and checkpoints go; open until the training ends."""

    def add(self, row: Row) -> None:
        """One more row of the curves."""
        ...

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the rows so far, then the state after ``step`` steps; returns when it is copied."""
        ...

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """``save``, unless it is there already, and wait until it is on the disk."""
        ...

    def note_split(self, split: Split) -> None:
        """How steps are cut from now on: a run that is resumed computes the same bits with the same passes."""
        ...

    def note_validation(self, standing: Mapping[str, float | int | None]) -> None:
        """How the validation stands, for the checkpoints from now on."""
        ...

    def finish(self) -> None:
        """Wait until all is on the disk, and draw the curves."""
        ...


class NoRecord:
    """Of all workers but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def add(self, row: Row) -> None:
        pass

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        pass

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        pass

    def note_split(self, split: Split) -> None:
        pass

    def note_validation(self, standing: Mapping[str, float | int | None]) -> None:
        pass

    def finish(self) -> None:
        pass


class FolderRecord:
    """In the output folder ``out``, going on from the curves up to ``first_step``."""

    def __init__(
        self,
        out: Path,
        kind: Kind,
        config: TrainingConfig,
        metadata: Mapping[str, Any],
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._out = out
        metadata = self._metadata = dict(metadata)
        self._stack = ExitStack()
        self._log = RunLog(out, kind, first_step, config, metadata, say)
        self._writer = CheckpointWriter(out, kind, metadata, config.keep)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._writer)
        self._stack.enter_context(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, row: Row) -> None:
        self._log.add(row)

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        with readable_errors(self._out):
            self._log.save()
        self._writer.save(model, optimizer, step)

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        self._writer.wait()
        if checkpoint_folder(self._out, step).exists():
            with readable_errors(self._out):
                self._log.save()
        else:
            self.save(model, optimizer, step)
        self._writer.wait()

    def note_split(self, split: Split) -> None:
        self._writer.wait()  # it reads this
        self._metadata["samples_per_pass"] = split.batch_size

    def note_validation(self, standing: Mapping[str, float | int | None]) -> None:
        self._writer.wait()  # it reads this
        self._metadata["validation"] = dict(standing)

    def finish(self) -> None:
        self._writer.wait()
        with readable_errors(self._out):
            self._log.plot()
