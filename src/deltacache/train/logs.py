"""Everything a run writes for people to look at: curves in Parquet, TensorBoard events, W&B, a picture."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa
from torch.utils.tensorboard import SummaryWriter

from deltacache.models.checkpoints import Kind
from deltacache.schemas.tables import HEAD_CURVES_SCHEMA, TOKENIZER_CURVES_SCHEMA, WORLD_CURVES_SCHEMA
from deltacache.train.curves import Row, plot_curves, read_curves, write_curves
from deltacache.train.wandb_log import WandbLog

SCHEMAS: Mapping[Kind, pa.Schema] = {
    "tokenizer": TOKENIZER_CURVES_SCHEMA,
    "world": WORLD_CURVES_SCHEMA,
    "head": HEAD_CURVES_SCHEMA,
    "rgb_decoder": HEAD_CURVES_SCHEMA,
}


class EventLog(Protocol):
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


class TensorBoardLog:
    """Events that TensorBoard reads; what a crashed run logged beyond ``first_step`` is hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See ``EventLog``."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """See ``EventLog``."""
        self._events.flush()

    def close(self) -> None:
        """See ``EventLog``."""
        self._events.close()


class RunLog:
    """The curves of one run; goes on from those of an earlier call up to ``first_step``.

    ``wandb`` is the mode of Weights & Biases, and ``config`` what it shows of the run.
    """

    def __init__(
        self,
        out: Path,
        kind: Kind,
        first_step: int,
        *,
        wandb: str = "off",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._out = out
        self._kind: Kind = kind
        self._rows: list[Row] = read_curves(out / "curves.parquet", first_step)
        self._events: list[EventLog] = []
        if wandb != "off":
            self._events.append(WandbLog(out, kind, wandb, config or {}))
        self._events.append(TensorBoardLog(out / "tensorboard", first_step))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for events in self._events:
            events.close()

    def add(self, row: Row) -> None:
        """One more interval."""
        self._rows.append(row)
        step = row["step"]
        assert step is not None
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for events in self._events:
            events.add(int(step), values)

    def save(self) -> None:
        """Write what there is: before the checkpoint of the same step, so that no row is missed on resume."""
        write_curves(self._rows, self._out / "curves.parquet", SCHEMAS[self._kind])
        for events in self._events:
            events.flush()

    def plot(self) -> None:
        """Draw ``curves.png``."""
        if self._rows:
            plot_curves(self._rows, self._out / "curves.png", self._kind)
