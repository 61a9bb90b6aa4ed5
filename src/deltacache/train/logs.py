"""Everything a run writes for people to look at: curves in Parquet, TensorBoard events, a picture."""

from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from deltacache.train.curves import plot_curves, read_curves, write_curves


class RunLog:
    """The curves of one run; goes on from those of an earlier call up to ``first_step``."""

    def __init__(self, out: Path, title: str, first_step: int) -> None:
        self._out = out
        self._title = title
        self._rows = read_curves(out / "curves.parquet", first_step)
        # what a crashed run logged beyond its last checkpoint is hidden
        self._events = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()

    def add(self, row: dict[str, float]) -> None:
        """One more interval."""
        self._rows.append(row)
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))

    def save(self) -> None:
        """Write what there is: before the checkpoint of the same step, so that no row is missed on resume."""
        write_curves(self._rows, self._out / "curves.parquet")
        self._events.flush()

    def plot(self) -> None:
        """Draw ``curves.png``."""
        if self._rows:
            plot_curves(self._rows, self._out / "curves.png", self._title)
