"""``report.html``: one or several evaluations as one page that needs nothing but itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate import output
from deltacache.evaluate.examples import load_examples, load_frames, save_frames, spread
from deltacache.evaluate.report.charts import (
    MAIN_METRICS,
    ChartGroup,
    Curve,
    LegendEntry,
    Shown,
    Style,
    all_styles,
    calibration_groups,
    curve_chart,
    drift_group,
    legend,
    panel_view,
    samples_groups,
)
from deltacache.evaluate.report.panels import (
    METRIC_WORDS,
    SOURCES,
    Panel,
    data_title,
    leads,
    panels,
    published_at,
)
from deltacache.evaluate.report.runs import ReportRun, facts_of, open_runs
from deltacache.evaluate.report.strips import Detail, PixelLookup, example_views, opening_view, page_template
from deltacache.evaluate.report.tables import class_tables, findings, headline, intervals_text
from deltacache.pipeline.storage.files import write_bytes
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.texts import disk_text

MOST_BYTES = 15_000_000
_DETAILS = (Detail(), Detail(6, 6, 160), Detail(4, 6, 128), Detail(3, 4, 96), Detail(2, 3, 64))
_FEWER_EXAMPLES = (8, 4, 2, 1)


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
    runs = open_runs([run.out])
    if run.pixels is not None:
        for clip_id in clips_to_show(run.out):
            frames = run.pixels.get(clip_id) if isinstance(run.pixels, Mapping) else run.pixels(clip_id)
            if frames is not None:
                save_frames(run.out / output.EXAMPLES, clip_id, frames)
    return _write(runs, run.out / output.REPORT)


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about one or several evaluations to ``out``, or where it belongs.

    Raises:
        DatasetError: a folder is not the output of an evaluation, or a part of it is damaged.
        DeltacacheError: ``out`` is a folder.
    """
    if out is None:
        out = folders[0] / output.REPORT if len(folders) == 1 else Path(output.REPORT)
    if out.is_dir():
        raise DeltacacheError(f"{out} is a folder: give the name of the page, such as {out / output.REPORT}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return _write(open_runs(folders), out)


def _write(runs: Sequence[ReportRun], path: Path) -> Path:
    shown = panels({run.name: run.metrics for run in runs}, {run.name: run.names for run in runs})
    styles = all_styles(shown)
    context = _context(runs, shown, styles)
    examples = [load_examples(run.out / output.EXAMPLES) for run in runs]
    page = b""
    most = max(map(len, examples))
    for detail, count in [
        *((each, most) for each in _DETAILS),
        *((_DETAILS[-1], few) for few in _FEWER_EXAMPLES),
    ]:
        views = [
            {"run": run.name, "example": view}
            for run, each in zip(runs, examples, strict=True)
            for view in example_views(
                [each[at] for at in spread(range(len(each)), count)],
                _frames_of(run),
                detail,
                _looks(run, styles),
            )
        ]
        short = Detail(3, 4, min(detail.side, 128))
        opening = [
            {"run": run.name, "example": opening_view(each, _frames_of(run), short, _looks(run, styles))}
            for run, each in zip(runs, examples, strict=True)
            if each
        ]
        page = page_template("report.html").render(**context, examples=views, opening=opening).encode()
        if len(page) <= MOST_BYTES:
            write_bytes(path, page)
            return path
    raise DatasetError(
        f"the report would be {disk_text(len(page))} even with few pictures; the limit is "
        f"{disk_text(MOST_BYTES)}: give fewer runs"
    )


def _frames_of(run: ReportRun) -> PixelLookup:
    return lambda clip_id: load_frames(run.out / output.EXAMPLES, clip_id)


def _looks(run: ReportRun, styles: Mapping[str, Style]) -> dict[str, tuple[str, int | None]]:
    """Name and colour of world models, by fingerprint."""
    return {
        world: (label, styles[label].colour if label in styles else None)
        for world, label in run.world_labels.items()
    }


def _context(
    runs: Sequence[ReportRun], shown: Sequence[Panel], styles: Mapping[str, Style]
) -> dict[str, Any]:
    datasets = dict.fromkeys(panel.dataset for panel in shown)
    facts = [facts_of(run) for run in runs]
    by_run = {
        run.name: tuple(each.of_run(run.name) for each in shown if run.name in each.runs) for run in runs
    }
    published = {line.published for panel in shown for line in panel.published}
    return {
        "title": "Evaluation on " + ", ".join(map(data_title, datasets)),
        "sampled": any(line.aggregation != "single" for panel in shown for line in panel.own),
        "runs": [run.name for run in runs],
        "context": runs[0].settings.context,
        "facts": {
            name: [each.get(name, "") for each in facts]
            for name in dict.fromkeys(n for f in facts for n in f)
        },
        "findings": [(name, headline(own), findings(own)) for name, own in by_run.items()],
        "sections": [
            _section(dataset, shown, styles) | {"classes": class_tables(runs, dataset)}
            for dataset in datasets
        ],
        "words": METRIC_WORDS,
        "rows_text": {name: text for panel in shown for name, text in panel.rows_text.items()},
        "intervals": " and ".join(dict.fromkeys(intervals_text(run.metrics) for run in runs)),
        "sources": {name: text for name, text in SOURCES.items() if name in published},
        "published_at": published_at(datasets),
        "drift": drift_group(shown, runs, styles),
        "samples": samples_groups(runs, styles),
        "calibration": calibration_groups(runs),
        "curves": [group for run in runs for group in _curve_groups(run, styles)],
    }


def _section(dataset: str, shown: Sequence[Panel], styles: Mapping[str, Style]) -> dict[str, Any]:
    views = [panel_view(panel, styles) for panel in shown if panel.dataset == dataset]
    modes = [view for view in views if view.panel.task in output.SCENE_TASKS]
    main = [view for view in views if leads(dataset, view.panel.metric, MAIN_METRICS)]
    return {
        "dataset": data_title(dataset),
        "main": main,
        "modes": modes,
        "more": [view for view in views if view not in main and view not in modes],
    }


def _curve_groups(run: ReportRun, styles: Mapping[str, Style]) -> list[ChartGroup]:
    """Every tokenizer's error beside that of copying, and the loss of every world model."""
    folder, groups = run.out / output.CURVES, []
    several = len(run.settings.tokenizers) > 1
    for number in range(1, len(run.settings.tokenizers) + 1):
        tokenizer = _read_curve(folder / f"{output.tokenizer_curve(number)}.parquet")
        if tokenizer is not None:
            columns = {"mse": "squared error", "copy_last_mse": "that of copying the frame before"}
            found = {label: name for name, label in columns.items() if name in tokenizer} or {"loss": "loss"}
            shown = {label: (tokenizer, name) for label, name in found.items()}
            groups.append(_curve_group(run, f"Tokenizer {number}" if several else "Tokenizer", shown, {}))
    worlds: dict[str, tuple[Curve, str]] = {}
    for world, label in run.world_labels.items():
        curve = _read_curve(folder / f"{world}.parquet")
        if curve is not None:
            worlds[label] = (curve, "loss")
    if worlds:
        groups.append(_curve_group(run, "World models: loss", worlds, styles))
    return groups


def _curve_group(
    run: ReportRun, title: str, curves: Mapping[str, tuple[Curve, str]], styles: Mapping[str, Style]
) -> ChartGroup:
    looks = (Style(1, ""), Style(4, "", (4, 2)), Style(6, "", (1, 1.5)), Style(3, "", (4, 1.5, 1, 1.5)))
    drawn = {
        label: (curve, column, styles.get(label) or looks[position % len(looks)])
        for position, (label, (curve, column)) in enumerate(curves.items())
    }
    entries: tuple[LegendEntry, ...] = legend((label, style, False) for label, (_, _, style) in drawn.items())
    return ChartGroup(title, (Shown(run.name, replace(curve_chart(title, drawn), title="")),), entries)


def _read_curve(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        curve = pq.read_table(path).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): run evaluate again") from error
    return curve if {"step", "loss"} <= curve.keys() and curve["step"] else None
