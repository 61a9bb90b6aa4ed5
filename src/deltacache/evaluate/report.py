"""``report.html``: an evaluation as one page that needs nothing but itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from deltacache.evaluate import output
from deltacache.evaluate.examples import load_examples, load_frames, save_frames
from deltacache.evaluate.plots import Chart, Curve, curve_chart, metric_chart
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.evaluate.strips import PixelLookup, example_views
from deltacache.evaluate.tables import METHOD_LABELS, Line, Panel, panels
from deltacache.pipeline.atomic import write_bytes
from deltacache.schemas.configs import load_config
from deltacache.schemas.errors import DatasetError

MOST_BYTES = 15_000_000


@dataclass(frozen=True)
class ReportInput:
    """What a report is made from.

    Attributes:
        out: output folder of an evaluation.
        pixels: frames (T, H, W, 3) uint8 of clips, which features do not hold, by clip id or from a function
            of it. Those of ``clips_to_show`` are wanted; they are kept in ``out``, so that a later report has
            them too.
    """

    out: Path
    pixels: PixelLookup | Mapping[str, np.ndarray] | None = None


def clips_to_show(out: Path) -> list[str]:
    """Ids of the clips that appear in the report's pictures, and so could do with pixels.

    Raises:
        DatasetError: an example is damaged.
    """
    examples = load_examples(out / output.EXAMPLES)
    return list(dict.fromkeys(clip_id for example in examples for clip_id in example.clip_ids))


def write_report(run: ReportInput | Path) -> Path:
    """Write ``report.html`` beside the tables; a folder alone will do.

    Raises:
        DatasetError: ``out`` is not the output of an evaluation, or a part of it is damaged.
    """
    if isinstance(run, Path):
        run = ReportInput(run)
    metrics = output.read_metrics(run.out)
    folder = run.out / output.EXAMPLES
    examples = load_examples(folder)
    if run.pixels is not None:
        _keep_frames(run.out, run.pixels)
    tables = panels(metrics)
    page = _template().render(
        settings=load_config(run.out / output.CONFIG, ClipEvaluation),
        facts=_facts(metrics),
        findings=findings(tables),
        notes=output.read_notes(run.out),
        features=[(panel, metric_chart(panel)) for panel in tables if panel.task == "features"],
        modes=[panel for panel in tables if panel.task == "modes"],
        curves=_curve_charts(run.out / output.CURVES, metrics),
        examples=example_views(examples, lambda clip_id: load_frames(folder, clip_id)),
    )
    if len(page.encode()) > MOST_BYTES:
        raise DatasetError(
            f"the report would have {len(page.encode()) / 1e6:.1f} MB, a page may have {MOST_BYTES / 1e6:.0f}: "
            "evaluate with fewer examples"
        )
    path = run.out / output.REPORT
    write_bytes(path, page.encode())
    return path


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("deltacache.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _keep_frames(out: Path, pixels: PixelLookup | Mapping[str, np.ndarray]) -> None:
    for clip_id in clips_to_show(out):
        frames = pixels.get(clip_id) if isinstance(pixels, Mapping) else pixels(clip_id)
        if frames is not None:
            save_frames(out / output.EXAMPLES, clip_id, frames)


def _facts(metrics: pa.Table) -> dict[str, str]:
    """Where the numbers come from: one row's shared columns, and the fingerprints of all models."""
    rows = metrics.to_pylist()
    first = rows[0]
    facts: dict[str, str] = {
        "Dataset": first["dataset"],
        "Image size": f"{first['image_size']} px",
        "Backbone": first["backbone"],
    }
    for row in rows:
        if row["tokenizer"]:
            facts["Tokenizer"] = row["tokenizer"]
    for world, label in _world_labels(rows).items():
        facts[label] = world
    return facts | {
        "Run": first["run_id"],
        "Seed": str(first["seed"]),
        "Code": f"deltacache {first['code_version']}",
        "Made": f"{first['created_at']:%Y-%m-%d %H:%M} UTC",
    }


def _world_labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A name for every world model's fingerprint; no two are alike."""
    methods: dict[str, str] = {row["world"]: row["method"] for row in rows if row["world"]}
    several = len(set(methods.values())) < len(methods)
    return {
        world: METHOD_LABELS.get(method, method) + (f" ({world[:8]})" if several else "")
        for world, method in methods.items()
    }


def findings(tables: tuple[Panel, ...]) -> list[str]:
    """The numbers that a reader looks for first, in words."""
    by_metric = {panel.metric: panel for panel in tables}
    sentences = []
    loss = by_metric.get("smooth_l1")
    if loss is not None:
        sentences += [text for column in range(len(loss.horizons)) if (text := _loss_sentence(loss, column))]
    modes = by_metric.get("mode_coverage")
    if modes is not None:
        sentences += [text for line in modes.lines if (text := _mode_sentence(modes, line))]
    return sentences


def _loss_sentence(panel: Panel, column: int) -> str:
    names = {
        ("deltaworld", "best"): "best future",
        ("deltaworld", "mean"): "average future",
        ("copy_last", "single"): "repeating the last frame",
    }
    cells = {(line.method, line.aggregation): line.cells[column] for line in panel.lines}
    if any(cells.get(key) is None for key in names):
        return ""
    texts = [f"{name} {panel.text(cells[key])[0]}" for key, name in names.items()]
    return f"Feature loss {panel.heading(column)} ahead: {', '.join(texts)} (lower is better)."


def _mode_sentence(panel: Panel, line: Line) -> str:
    shares = [
        f"in {100 * cell.value:.0f} % of {cell.sequences} scenes {panel.heading(column)} ahead"
        for column, cell in enumerate(line.cells)
        if cell is not None
    ]
    return f"{line.label}: reaches every true future {', '.join(shares)}."


def _curve_charts(folder: Path, metrics: pa.Table) -> list[Chart]:
    """The tokenizer's error beside that of copying, and the loss of every world model."""
    charts = []
    tokenizer = _read_curve(folder / "tokenizer.parquet")
    if tokenizer is not None:
        columns = {"mse": "squared error", "copy_last_mse": "that of copying the frame before"}
        shown = {label: (tokenizer, name) for name, label in columns.items() if name in tokenizer}
        charts.append(curve_chart("Tokenizer", shown or {"loss": (tokenizer, "loss")}))
    worlds: dict[str, tuple[Curve, str]] = {}
    for world, label in _world_labels(metrics.to_pylist()).items():
        curve = _read_curve(folder / f"{world}.parquet")
        if curve is not None:
            worlds[label] = (curve, "loss")
    if worlds:
        charts.append(curve_chart("World models: loss", worlds))
    return charts


def _read_curve(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        curve = pq.read_table(path).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): run evaluate again") from error
    return curve if {"step", "loss"} <= curve.keys() and curve["step"] else None
