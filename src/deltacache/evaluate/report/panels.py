"""``metrics.parquet`` of one or several runs arranged as a person reads it: methods by horizons."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from deltacache.schemas.benchmarks import SPACING_S
from deltacache.schemas.foresight import DATASET as FORESIGHT
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES
from deltacache.schemas.foresight import PAPER_SIZE
from deltacache.schemas.tables import METRICS_SCHEMA
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Names that a person reads, and which way of a metric is better.
# ----------------------------------------------------------------------------------------------------


METHOD_LABELS = {
    "copy_last": "Copy of the last frame",
    "present": "True future (bound)",
    "deltatok": "DeltaTok, closed loop",
    "deltatok_parallel": "DeltaTok, parallel",
    "deltatok_one_step": "DeltaTok, one step",
    "deltatok_swapped": "DeltaTok, swapped token",
    "deltaworld": "DeltaWorld",
    "deltaworld_discriminative": "DeltaWorld, learned query",
    "deltaworld_energy": "DeltaWorld, energy score",
    "deltaworld_flow": "DeltaWorld, flow",
    "dino_world": "DINO-world",
    "dino_world_best_of_many": "DINO-world, best of many",
    "dino_world_energy": "DINO-world, energy score",
    "dino_world_flow": "DINO-world, flow",
    "dino_foresight": "DINO-Foresight",
    "dino_foresight_delta": "DINO-Foresight on delta tokens",
}
METHOD_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "copy_last": "the last seen frame, as a model that expects no change would predict it",
        "present": "the true future itself: no prediction can be better",
        "deltatok": "the true future through the tokenizer, no prediction: each frame is encoded against the frame "
        "reconstructed before it and decoded from that; about what the tokenizer allows a world model to reach",
        "deltatok_parallel": "the same, but delta tokens of pairs of true frames are decoded one after the other",
        "deltatok_one_step": "the same, but each frame from the true frame before it: the error of one delta token",
        "deltatok_swapped": "the same as one step with the delta token of another video: if it is as good, the "
        "decoder ignores its token",
        "deltaworld": "a world model that samples futures, each from other noise, trained on its best candidate",
        "deltaworld_energy": "a world model that samples futures, each from other noise, trained on the energy score",
        "deltaworld_flow": "a world model that samples futures by flow matching",
        "deltaworld_discriminative": "a world model that predicts one future, from a learned query",
        "dino_world": "a world model that predicts all patch features of one future, without delta tokens",
        "dino_world_best_of_many": "a world model that samples futures as patch features, without delta tokens",
        "dino_foresight": "a world model that predicts one future as features of several layers",
        "dino_foresight_delta": "the same on delta tokens",
        "cosmos_12b": "a world model that generates pixels",
    }
)
METRIC_LABELS = {
    "smooth_l1": "Feature loss (smooth L1)",
    "mse": "Feature loss (squared error)",
    "cosine": "Cosine similarity",
    "mode_coverage": "Mode coverage",
    "mode_balance": "Mode balance",
    "odds_error": "Odds error",
    "miou": "Mean IoU (%)",
    "miou_movable": "Mean IoU of movable classes (%)",
    "accuracy": "Pixel accuracy (%)",
    "rmse": "Depth RMSE (m)",
    "abs_rel": "Depth AbsRel",
    "delta1": "Depth δ < 1.25 (%)",
    "energy_score": "Energy score",
    "spread_skill": "Spread-skill ratio",
    "vote_coverage": "Coverage of the samples' vote (%)",
}
NOT_PREDICTED = frozenset(
    {"copy_last", "present", "deltatok", "deltatok_parallel", "deltatok_one_step", "deltatok_swapped"}
)
"""Methods without a world model."""
HIGHER_IS_BETTER = frozenset(
    {"cosine", "mode_coverage", "mode_balance", "miou", "miou_movable", "accuracy", "delta1", "vote_coverage"}
)
NEITHER_IS_BETTER = frozenset({"spread_skill"})
PERCENT = frozenset({"miou", "miou_movable", "accuracy", "delta1", "vote_coverage"})
"""Shares of pixels, which are read in per cent."""

METRIC_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "smooth_l1": "mean smooth L1 (β = 0.1) between predicted and true features, the loss of world models",
        "mse": "mean squared error of the features",
        "cosine": "cosine between predicted and true features of a patch, mean over patches",
        "miou": "overlap of predicted and labelled pixels of a class (intersection over union), mean over classes",
        "miou_movable": "the same over Cityscapes' people and vehicles",
        "accuracy": "share of labelled pixels whose class is right",
        "rmse": "root of the mean squared error of depth over all pixels, in metres",
        "abs_rel": "mean error of depth as a share of the true depth",
        "delta1": "share of pixels whose depth is within 25 % of the true one",
        "energy_score": "distance of the samples to the truth less half their distance to each other: it rewards "
        "samples that are close, and different where the future is open",
        "spread_skill": "how far samples lie apart over how far their mean lies from the truth; below 1 the "
        "samples are too alike",
        "vote_coverage": "share of pixels whose true class is that of at least one sample, or whose true depth lies "
        "between the samples'",
        "mode_coverage": "share of scenes in which the samples reach all true futures",
        "mode_balance": "1 where all true futures are reached equally often, 0 where one is missed",
        "odds_error": "how far the shares of the samples that are nearest to each true future are from its "
        "probability; a few samples differ from it by chance",
    }
)

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)

VSPW_CLASSES = (
    *("wall", "ceiling", "door", "stair", "ladder", "escalator", "playground slide", "handrail or fence"),
    *("window", "rail", "goal", "pillar", "pole", "floor", "ground", "grass", "sand", "athletic field"),
    *("road", "path", "crosswalk", "building", "house", "bridge", "tower", "windmill", "well or well lid"),
    *("other construction", "sky", "mountain", "stone", "wood", "ice", "snowfield", "grandstand", "sea"),
    *("river", "lake", "waterfall", "water", "billboard or bulletin board", "sculpture", "pipeline"),
    *("flag", "parasol or umbrella", "cushion or carpet", "tent", "roadblock", "car", "bus", "truck"),
    *("bicycle", "motorcycle", "wheeled machine", "ship or boat", "raft", "airplane", "tyre"),
    *("traffic light", "lamp", "person", "cat", "dog", "horse", "cattle", "other animal", "tree", "flower"),
    *("other plant", "toy", "ball net", "backboard", "skateboard", "bat", "ball"),
    *("cupboard or showcase or storage rack", "box", "traveling case or trolley case", "basket"),
    *("bag or package", "trash can", "cage", "plate", "tub or bowl or pot", "bottle or cup", "barrel"),
    *("fishbowl", "bed", "pillow", "table or desk", "chair or seat", "bench", "sofa", "shelf", "bathtub"),
    *("gun", "commode", "roaster", "other machine", "refrigerator", "washing machine", "microwave oven"),
    *("fan", "curtain", "textiles", "clothes", "painting or poster", "mirror", "flower pot or vase"),
    *("clock", "book", "tool", "blackboard", "tissue", "screen or television", "computer", "printer"),
    *("mobile phone", "keyboard", "other electronic product", "fruit", "food", "instrument", "train"),
)
"""By class id, which is that of the masks less one."""

_TABLE_D = frozenset({"miou_movable", "delta1"})


def leads(dataset: str, metric: str, main: frozenset[str]) -> bool:
    """Whether a metric is one of the ``main`` ones, or one that Table D is about."""
    return metric in main or (dataset == WHOLE_FRAMES and metric in _TABLE_D)


def data_title(dataset: str) -> str:
    """A data set's name in headings."""
    return "Cityscapes as whole frames" if dataset == WHOLE_FRAMES else dataset


def metric_title(metric: str) -> str:
    """The metric's name, and which way is better."""
    label = METRIC_LABELS.get(metric, metric)
    if metric in NEITHER_IS_BETTER:
        return f"{label}, 1 is calibrated"
    return f"{label}, {'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better"


def class_name(dataset: str, label: int) -> str:
    """What a class id stands for, as far as the benchmark's list of names is known."""
    names = {"cityscapes": CITYSCAPES_CLASSES, WHOLE_FRAMES: CITYSCAPES_CLASSES, "vspw": VSPW_CLASSES}
    known = names.get(dataset, ())
    return known[label] if label < len(known) else f"class {label}"


# ----------------------------------------------------------------------------------------------------
# Numbers that others published, as rows in the words of ``metrics.parquet`` (method section 4).
#
# ``published.csv``: the main table (512 px; best and mean of 20 samples), Table C (256 px, mid-term) and
# Table D (DINO-Foresight's setting, 448 × 896). Short is one step, mid three.
# ----------------------------------------------------------------------------------------------------


Row = dict[str, Any]
_HORIZONS = {"short": 1, "mid": 3}
_CONTEXT = 4
_SPACING_S: dict[str, float] = {**SPACING_S, FORESIGHT: SPACING_S["cityscapes"]}
_RUN = "published:"
SOURCES = {
    "paper": "“A Frame is Worth One Token”, CVPR 2026, arXiv 2604.04913",
    "released": "the released code and weights, amazon-far/deltatok (its README says that DeltaTok reconstructs in "
    "parallel, the code computes the closed loop: compare with the row of that name)",
}


@cache
def _entries() -> tuple[Row, ...]:
    """Rows of ``metrics.parquet``, each with its ``label`` and ``source``."""
    text = resources.files("deltacache.evaluate.report").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(row for entry in csv.DictReader(text.splitlines()) for row in _rows(entry))


def _rows(entry: dict[str, str]) -> Iterator[Row]:
    for name, horizon in _HORIZONS.items():
        if entry[name]:
            yield {
                **dict.fromkeys(METRICS_SCHEMA.names),
                **{key: entry[key] for key in ("dataset", "task", "metric", "method", "aggregation")},
                "run_id": _RUN + entry["source"],
                "horizon": horizon,
                "horizon_s": horizon * _SPACING_S[entry["dataset"]],
                "context": _CONTEXT,
                "num_samples": int(entry["num_samples"]),
                "image_size": int(entry["image_size"]),
                "image_width": PAPER_SIZE[1] if entry["table"] == "D" else int(entry["image_size"]),
                "value": float(entry[name]),
                "label": entry["label"],
                "source": entry["source"],
                "main": entry["table"] == "main",
            }


def published_rows() -> pa.Table:
    """All published numbers as rows of ``metrics.parquet``; their ``run_id`` begins with ``published:``."""
    return pa.Table.from_pylist(list(_entries()), schema=METRICS_SCHEMA)


def published_at(datasets: Iterable[str]) -> str:
    """The image size of the published numbers of some data sets, in words."""
    whole = f"{PAPER_SIZE[0]} × {PAPER_SIZE[1]} px"
    found = set(datasets)
    if found == {FORESIGHT}:
        return f"at {whole}"
    others = "at 512 px unless the method says otherwise"
    return f"{others}, those of whole frames at {whole}" if FORESIGHT in found else others


def references(rows: Iterable[Row]) -> list[Row]:
    """Published rows to show beside one's own ``rows``: of the same data, metrics and horizons.

    Those of the main table always; those of Tables C and D beside evaluations of their image size.
    """
    own = {(row["dataset"], row["task"], row["metric"], row["horizon"]) for row in rows}
    sizes = {(row["image_size"], row.get("image_width")) for row in rows}
    return [
        row
        for row in _entries()
        if (row["dataset"], row["task"], row["metric"], row["horizon"]) in own
        and (
            row["main"]
            or not sizes.isdisjoint({(row["image_size"], width) for width in (row["image_width"], None)})
        )
    ]


PUBLISHED_MARK = "†"


@dataclass(frozen=True, slots=True)
class Cell:
    """One number with its interval, over ``sequences`` sequences, ``seconds`` after the context.

    A published number has neither interval nor count.
    """

    value: float
    low: float | None
    high: float | None
    sequences: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """One method, summarised in one way, in every column.

    Attributes:
        model: the method's name, with a fingerprint where there are several of it.
        label: the same with how it is summarised.
        published: its source, if it is not one's own.
        samples: how many futures are summarised.
    """

    method: str
    aggregation: str
    model: str
    label: str
    cells: tuple[Cell | None, ...]
    published: str = ""
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Column:
    """One horizon of one run."""

    horizon: int
    seconds: float
    run: str = ""

    @property
    def heading(self) -> str:
        """The horizon, in steps and seconds."""
        return f"{counted(self.horizon, 'step')} ({self.seconds:.2f} s)"


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric of one task on one dataset."""

    dataset: str
    task: str
    metric: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """The metric's name, and which way is better."""
        return metric_title(self.metric)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that have this metric."""
        return tuple(dict.fromkeys(column.run for column in self.columns))

    @property
    def horizons(self) -> tuple[Column, ...]:
        """A column a horizon, of the first run that has it."""
        return tuple({column.horizon: column for column in reversed(self.columns)}.values())[::-1]

    @property
    def scale(self) -> float:
        """What values are shown in units of: shares of pixels in per cent."""
        return 100.0 if self.metric in PERCENT else 1.0

    @property
    def decimals(self) -> int:
        """Digits behind the point: four that count for the largest value, fewer for shares."""
        if self.task == "modes":
            return 2
        if self.task == "odds":
            return 3
        if self.metric in PERCENT:
            return 1
        if self.metric in NEITHER_IS_BETTER:  # ratios
            return 3
        largest = max(abs(cell.value) for cell in self.cells)
        return 3 if largest == 0 else min(8, max(3, 3 - math.floor(math.log10(largest))))

    @property
    def rows_text(self) -> dict[str, str]:
        """What every row is, by the name before its summary."""
        texts = {}
        for line in self.lines:
            model = line.model.partition(", ")[0] if line.published else line.model
            label = METHOD_LABELS.get(line.method, line.method)
            world = line.method not in NOT_PREDICTED and not line.published
            words = METHOD_WORDS.get(line.method, "a world model")
            texts.setdefault(model, f"{label}: {words}" if world and label not in model else words)
        return texts

    @property
    def cells(self) -> list[Cell]:
        """All of one's own numbers."""
        return [cell for line in self.own for cell in line.cells if cell is not None]

    @property
    def own(self) -> tuple[Line, ...]:
        """Lines that were not published by others."""
        return tuple(line for line in self.lines if not line.published)

    @property
    def published(self) -> tuple[Line, ...]:
        """Lines that others published."""
        return tuple(line for line in self.lines if line.published)

    @property
    def counts(self) -> tuple[int, ...]:
        """Sequences of each column."""
        columns = zip(*(line.cells for line in self.own), strict=True)
        return tuple(max((cell.sequences or 0 for cell in each if cell), default=0) for each in columns)

    @property
    def counts_note(self) -> str:
        """Over which sequences the columns are, if not all over the same number."""
        if len(set(self.counts)) < 2:
            return ""
        steps: dict[int, list[int]] = {}
        for column, count in zip(self.columns, self.counts, strict=True):
            steps.setdefault(count, []).append(column.horizon)
        texts = [f"{count} at {', '.join(map(str, dict.fromkeys(at)))} steps" for count, at in steps.items()]
        return f"Sequences: {'; '.join(texts)}. Columns are not over the same ones."

    def heading(self, column: int) -> str:
        """The horizon, in steps and seconds."""
        return self.columns[column].heading

    def best(self, column: int) -> frozenset[str]:
        """Labels of the lines with the best number in a column, as it is printed.

        Lines that know the true future, such as the bound, do not take part; one line alone is not the best.
        """
        shown = {
            line.label: float(self.text(cell)[0])
            for line in self.own
            if (cell := line.cells[column]) is not None
            and (line.method == "copy_last" or line.method not in NOT_PREDICTED)
        }
        if len(shown) < 2:
            return frozenset()
        rank = {
            label: abs(value - 1)
            if self.metric in NEITHER_IS_BETTER
            else -value
            if self.metric in HIGHER_IS_BETTER
            else value
            for label, value in shown.items()
        }
        return frozenset(label for label, value in rank.items() if value == min(rank.values()))

    def text(self, cell: Cell | None) -> tuple[str, str]:
        """A number and its interval."""
        if cell is None:
            return "", ""
        digits = 2 if cell.sequences is None and self.metric == "rmse" else self.decimals  # as published
        value = f"{self.scale * cell.value:.{digits}f}"
        if cell.low is None or cell.high is None:
            return value, ""
        return value, f"[{self.scale * cell.low:.{digits}f}, {self.scale * cell.high:.{digits}f}]"

    def of_run(self, run: str) -> "Panel":
        """The columns of one run alone, and the lines that have numbers there."""
        kept = [at for at, column in enumerate(self.columns) if column.run == run]
        lines = [replace(line, cells=tuple(line.cells[at] for at in kept)) for line in self.lines]
        return replace(
            self,
            columns=tuple(self.columns[at] for at in kept),
            lines=tuple(line for line in lines if any(line.cells)),
        )


def panels(
    metrics: pa.Table | Mapping[str, pa.Table], names: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> tuple[Panel, ...]:
    """Arrange the rows of one run, or of several by name; everything keeps the order it has there.

    ``names`` are those of each run's models by fingerprint, see ``labelled``.
    Metrics of which there are many (``iou/<class>``, ``rank/<rank>``) are no tables.
    """
    tables = metrics if isinstance(metrics, Mapping) else {"": metrics}
    by_run = {run: labelled(table.to_pylist(), names.get(run, {})) for run, table in tables.items()}
    rows = [row | {"run": run} for run, own in by_run.items() for row in own if "/" not in row["metric"]]
    published = references(rows)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return tuple(
        _panel(key, own, [row for row in published if _key(row) == key]) for key, own in groups.items()
    )


def _key(row: Row) -> tuple[str, str, str]:
    return row["dataset"], row["task"], row["metric"]


def labelled(rows: Sequence[Row], names: Mapping[str, str] = MappingProxyType({})) -> list[Row]:
    """Rows of one run with a ``label``: no two methods, summaries or models have the same.

    ``model`` is the label without the summary. A world model is called by its name in ``names`` (by fingerprint), one
    that has none by its method and, where there are several, its fingerprint.
    """
    models: dict[str, set[str]] = {}
    for row in rows:
        models.setdefault(row["method"], set()).add(model_of(row))
    return [row | _names(row, names, several=len(models[row["method"]]) > 1) for row in rows]


def model_of(row: Row) -> str:
    """The fingerprint that tells rows of one method apart: of the world model, else of the tokenizer, if any."""
    return row["world"] or row["tokenizer"] or ""


def _names(row: Row, names: Mapping[str, str], *, several: bool) -> dict[str, str]:
    method, given = str(row["method"]), names.get(model_of(row), "")
    name = METHOD_LABELS.get(method, method)
    which = f" ({given or model_of(row)[:8]})" if several else ""
    if row["world"] and given:
        name, which = given, ""
    if row.get("trained_image_size"):
        which += f", trained at {row['trained_image_size']} px"
    return {"model": name + which, "label": name + summary_of(row["aggregation"], row["num_samples"]) + which}


def summary_of(aggregation: str, samples: int) -> str:
    """How the futures of a method are summarised, behind its name; nothing where there is but one."""
    if aggregation != "single":
        return f", {aggregation} of {samples}"
    return f", {samples} samples" if samples > 1 else ""


def _panel(key: tuple[str, str, str], rows: Sequence[Row], published: Sequence[Row]) -> Panel:
    seconds = {(row["horizon"], row["run"]): row["horizon_s"] for row in rows}
    runs = list(dict.fromkeys(row["run"] for row in rows))
    columns = tuple(
        Column(horizon, seconds[horizon, run], run)
        for horizon, run in sorted(seconds, key=lambda each: (each[0], runs.index(each[1])))
    )
    own: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:
        own.setdefault(row["label"], {})[row["horizon"], row["run"]] = row
    others: dict[str, dict[int, Row]] = {}
    for row in published:
        of_samples = (
            "" if row["aggregation"] == "single" else f", {row['aggregation']} of {row['num_samples']}"
        )
        label = f"{row['label']}{of_samples}, {row['source']} {PUBLISHED_MARK}"
        others.setdefault(label, {})[row["horizon"]] = row
    lines = [
        _line(label, next(iter(found.values())), [found.get((each.horizon, each.run)) for each in columns])
        for label, found in own.items()
    ]
    lines += [
        _line(label, next(iter(found.values())), [found.get(each.horizon) for each in columns])
        for label, found in others.items()
    ]
    return Panel(*key, columns, tuple(lines))


def _line(label: str, row: Row, cells: Sequence[Row | None]) -> Line:
    return Line(
        row["method"],
        row["aggregation"],
        row.get("model") or label,
        label,
        tuple(_cell(each) for each in cells),
        row.get("source") or "",
        row["num_samples"],
    )


def _cell(row: Row | None) -> Cell | None:
    if row is None:
        return None
    return Cell(row["value"], row["ci_low"], row["ci_high"], row["n_sequences"], row["horizon_s"])
