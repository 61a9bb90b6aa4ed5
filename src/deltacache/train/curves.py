"""Training curves: one row an interval, in Parquet and as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.errors import DatasetError

Row = Mapping[str, float | None]
"""``step`` (finished ones), means over the steps since the row before, ``learning_rate`` of the last step;
probes are absent or ``None`` in rows where none was made."""


def read_curves(path: Path, up_to_step: int) -> list[Row]:
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


def write_curves(rows: Sequence[Row], path: Path, schema: pa.Schema) -> None:
    """Replace the file, all or nothing."""
    if not rows:
        return
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


_PANELS: tuple[tuple[str, ...], ...] = (
    ("loss", "mse", "copy_last_mse"),
    ("gradient_norm", "gradient_norm_max", "learning_rate"),
    ("copy_ratio", "z_swap_ratio", "zero_z_ratio", "black_first_ratio"),
    ("delta_rank", "predicted_rank", "queries_winning"),
)


def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw losses, gradient norm, learning rate and probes over the steps."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8, 10), layout="constrained")
    panels = [names for names in _PANELS if any(_curve(rows, name)[0] for name in names)]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            steps, values = _curve(rows, name)
            if steps:
                axis.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 30 else None)
        axis.set_yscale("log")
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have ``name``."""
    points = [(row["step"], row.get(name)) for row in rows]
    shown = [(step, value) for step, value in points if step is not None and _drawable(value)]
    return [step for step, _ in shown], [value for _, value in shown if value is not None]


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
