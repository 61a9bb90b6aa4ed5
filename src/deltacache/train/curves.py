"""Training curves: one row an interval, in Parquet, in TensorBoard's format and as a picture."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deltacache.pipeline.atomic import replacing
from deltacache.schemas.errors import DatasetError, DeltacacheError

Row = Mapping[str, float]
"""``step`` (finished ones), means over the steps since the row before, ``learning_rate`` of the last step."""


class Meter:
    """Collects what the steps of one interval gave, and where their time went.

    Values stay on the device until the interval ends, so that a GPU is not waited for at every step.
    """

    def __init__(self, first_step: int, batch_size: int) -> None:
        self._step = first_step
        self._batch_size = batch_size
        self._total_steps = 0
        self._total_s = 0.0
        self._total_wait_s = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin an interval: time since the last one (saving, plotting) belongs to no step."""
        self._values: list[dict[str, Tensor]] = []
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

    def add(self, values: dict[str, Tensor]) -> None:
        """One step is done; ``values`` are scalars, ``loss`` and ``gradient_norm`` among them."""
        self._values.append(values)

    def row(self, learning_rate: float) -> dict[str, float]:
        """The interval as a row.

        Raises:
            DeltacacheError: a loss or gradient norm is not finite; names the first step where.
        """
        steps = len(self._values)
        names = list(self._values[0])
        table = torch.stack([torch.stack([v[name].float() for name in names]) for v in self._values]).cpu()
        elapsed_s = time.perf_counter() - self._started  # after the copy: the device has finished
        self._check_finite(names, table)
        self._step += steps
        self._total_steps += steps
        self._total_s += elapsed_s
        self._total_wait_s += self._wait_s
        return {
            "step": self._step,
            **dict(zip(names, table.double().mean(0).tolist(), strict=True)),
            "learning_rate": learning_rate,
            "step_time_s": elapsed_s / steps,
            "data_wait_s": self._wait_s / steps,
            "clips_per_s": self._batch_size * steps / elapsed_s,
        }

    def summary(self) -> str:
        """All intervals in one line."""
        seconds = max(self._total_s, 1e-9)
        return (
            f"{self._total_steps} steps, {self._batch_size * self._total_steps / seconds:,.0f} clips/s, "
            f"{100 * self._total_wait_s / seconds:.1f} % of the time waiting for data"
        )

    def _check_finite(self, names: Sequence[str], table: Tensor) -> None:
        checked = table[:, [names.index("loss"), names.index("gradient_norm")]]
        bad = (~checked.isfinite()).any(dim=1).nonzero()
        if len(bad) == 0:
            return
        loss, norm = checked[bad[0, 0]].tolist()
        raise DeltacacheError(
            f"step {self._step + int(bad[0, 0]) + 1} has loss {loss} and gradient norm {norm}: both must be "
            "finite, so training stopped and the checkpoints from before are kept; lower the learning rate, "
            "warm up longer or clip gradients harder"
        )


def read_curves(path: Path, up_to_step: int) -> list[dict[str, float]]:
    """Rows of an earlier run up to a step; none if the file is not there."""
    if not path.exists():
        return []
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): delete it to go on without the curves so far"
        ) from error
    return [row for row in rows if row["step"] <= up_to_step]


def write_curves(rows: Sequence[Row], path: Path) -> None:
    """Replace the file, all or nothing."""
    if not rows:
        return
    names = list(rows[-1])
    schema = pa.schema([(name, pa.int64() if name == "step" else pa.float64()) for name in names])
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


_NOT_LOSSES = {"step", "learning_rate", "gradient_norm", "step_time_s", "data_wait_s", "clips_per_s"}


def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw losses, gradient norm and learning rate over the steps."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    for name in sorted(set(rows[-1]) - _NOT_LOSSES, key=lambda name: name != "loss"):
        upper.plot(steps, [row[name] for row in rows], label=name, linewidth=1)
    for name in ("gradient_norm", "learning_rate"):
        lower.plot(steps, [row[name] for row in rows], label=name, linewidth=1)
    for axes in (upper, lower):
        axes.set_yscale("log")
        axes.legend()
        axes.grid(alpha=0.3)
    upper.set_title(title)
    lower.set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
