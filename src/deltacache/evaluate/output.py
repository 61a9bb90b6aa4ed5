"""The folder of an evaluation: whose it is, what is in it, and whether it is finished."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from deltacache.evaluate.settings import CONFIG
from deltacache.pipeline.storage.files import (
    is_temporary,
    remove,
    remove_leftovers,
    replacing,
    sync,
    temporary_path,
)
from deltacache.pipeline.storage.locking import LOCK_FILE
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName, Task
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DatasetError, NotFiniteError, OtherEvaluationError, problems_of
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES
from deltacache.schemas.tables import LATER_METRIC_COLUMNS, METRICS_SCHEMA

# ----------------------------------------------------------------------------------------------------
# What rows of ``metrics.parquet`` and ``sequences.parquet`` say beside their numbers.
# ----------------------------------------------------------------------------------------------------


Aggregation = Literal["best", "mean", "single"]
TABLES_VERSION = 2
"""Part of every ``run_id``: tables whose numbers mean something else are another evaluation's."""
_UNIT_KINDS = {"vspw": "video", "cityscapes": "city", "kitti": "drive", WHOLE_FRAMES: "city"}
UNIT_PLURALS = {"video": "videos", "city": "cities", "drive": "drives", "scene": "scenes"}


@dataclass(frozen=True, slots=True)
class Method:
    """Who predicted. ``tokenizer`` and ``world`` are fingerprints of what took part, else ``None``."""

    name: str
    tokenizer: str | None = None
    world: str | None = None


def method_now(name: str) -> str:
    """Today's name of a method of the first version of the tables: its ``deltatok_parallel`` was one step."""
    return "deltatok_one_step" if name == "deltatok_parallel" else name


@dataclass(frozen=True, slots=True)
class RunStamp:
    """Columns that every row of a run shares.

    Attributes:
        image_size: height and width in pixels.
        trained_sizes: see ``inputs.Models``.
    """

    run_id: str
    dataset: str
    context: int
    image_size: tuple[int, int]
    seed: int
    backbone: str
    code_version: str
    created_at: datetime
    trained_sizes: Mapping[str, str] = field(default_factory=dict)


SCENE_TASKS = frozenset({"modes", "odds"})
"""Whose items are scenes with several futures, not sequences."""


def unit_kind(dataset: str, task: str) -> str:
    """What the sequences of a data set are grouped by, since those of one group are not independent."""
    return "scene" if task in SCENE_TASKS else _UNIT_KINDS.get(dataset, "video")


def units_text(count: int, kind: str) -> str:
    """Such as ``3 cities``."""
    return f"{count} {kind if count == 1 else UNIT_PLURALS[kind]}"


def is_clips(dataset: str) -> bool:
    """Whether a data set of the tables is a feature dataset, not a benchmark."""
    return dataset not in (*BENCHMARKS, WHOLE_FRAMES)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is either whole or not there."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


METRICS = "metrics.parquet"
SEQUENCES = "sequences.parquet"
NOTES = "notes.json"
EXAMPLES = "examples"
CURVES = "curves"
REPORT = "report.html"
STATISTICS = "statistics.parquet"
SAMPLES = "samples.parquet"
TIMING = "timing.json"
MODELS = "models.json"
PARTS = "parts"
SYSTEMS, SYSTEMS_TEXT = "systems.parquet", "systems.md"
"""Of ``compare-systems``, where the evaluation is not the first of its systems."""
TABLES = (METRICS, SEQUENCES, SAMPLES, STATISTICS, REPORT)
OURS = frozenset(
    {CONFIG, NOTES, EXAMPLES, CURVES, TIMING, MODELS, PARTS, SYSTEMS, SYSTEMS_TEXT, LOCK_FILE, *TABLES}
)


def finished_run(out: Path) -> str | None:
    """``run_id`` of the evaluation that ``out`` holds, or ``None``.

    Raises:
        DatasetError: ``out`` is a file, or holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise DatasetError(f"{out} is a file: the output must be a folder; choose another one")
    strangers = sorted(path.name for path in out.iterdir() if not _is_ours(path.name))
    if strangers:
        raise DatasetError(
            f"{out} holds something else ({', '.join(strangers[:5])}): the output must be a new or empty "
            "folder, or that of an earlier evaluation; choose another one"
        )
    if not ((out / METRICS).exists() and (out / SEQUENCES).exists()):
        return None
    run_ids = read_metrics(out)["run_id"].unique().to_pylist()
    return run_ids[0] if len(run_ids) == 1 else None


def is_finished(out: Path, earlier: str | None, run_id: str) -> bool:
    """Whether ``out`` holds the evaluation ``run_id``; ``earlier`` is what it holds, see ``finished_run``.

    Raises:
        OtherEvaluationError: it holds another one.
    """
    if earlier is not None and earlier != run_id:
        raise OtherEvaluationError(
            f"{out} holds another evaluation ({earlier}; this one is {run_id}): "
            "its tables are not overwritten; choose another folder"
        )
    return earlier is not None


def _is_ours(name: str) -> bool:
    return name in OURS or is_temporary(name)


def read_metrics(out: Path) -> pa.Table:
    """The table of a finished evaluation; ``out`` may be the folder or the file.

    Raises:
        DatasetError: it is not there, damaged, or has other columns.
    """
    return _read(out / METRICS if out.is_dir() else out, METRICS_SCHEMA)


def read_samples(out: Path) -> pa.Table:
    """Best and mean by the number of samples, rows as in ``metrics.parquet``; none in an older evaluation."""
    path = out / SAMPLES
    return _read(path, METRICS_SCHEMA) if path.exists() else METRICS_SCHEMA.empty_table()


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: run evaluate first, or give its output folder") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): run evaluate again into a new folder"
        ) from error
    if "unit_kind" not in table.column_names and "method" in table.column_names:  # the first version
        names = [method_now(name) for name in table["method"].to_pylist()]
        at = table.column_names.index("method")
        table = table.set_column(at, table.field(at), pa.array(names, table.field(at).type))
    for name in LATER_METRIC_COLUMNS:
        if name not in table.column_names:
            field = schema.field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if table.schema != schema:
        raise DatasetError(
            f"{path} has the columns {', '.join(table.column_names)}, not those of evaluate: "
            "give the output folder of an evaluation"
        )
    bad = np.flatnonzero(~np.isfinite(table["value"].to_numpy()))
    if len(bad):
        row = table.slice(bad[0], 1).to_pylist()[0]
        raise NotFiniteError(
            f"{path}: {row['metric']} of {row['method']} on {row['dataset']}, horizon {row['horizon']}, is "
            f"{row['value']}: an older version let predictions that are not finite into means; run evaluate again into "
            "a new folder"
        )
    return table


def read_notes(out: Path) -> list[str]:
    """What the evaluation said about its data, such as sequences left out."""
    path = out / NOTES
    try:
        return [str(note) for note in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise DatasetError(f"{path} is damaged ({error}): run evaluate again into a new folder") from error


def write_notes(out: Path, notes: Iterable[str]) -> None:
    """Keep ``notes`` for the report."""
    with replacing(out / NOTES) as temporary:
        temporary.write_text(json.dumps(list(notes), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill; it takes the place of ``final`` when the block ends without error."""
    remove_leftovers(final.parent)
    temporary = temporary_path(final)
    temporary.mkdir()
    try:
        yield temporary
        remove(final)
        temporary.replace(final)
    finally:
        remove(temporary)
    sync(final.parent)


def keep_curves(
    out: Path, tokenizers: Iterable[Path], worlds: Iterable[str | None], paths: Iterable[Path]
) -> None:
    """Copy the training curves of models that lie in a training output.

    Tokenizers are ``tokenizer``, ``tokenizer-2``, ... in the order of the settings; ``worlds`` by fingerprint, at
    ``paths``.
    """
    named = [(tokenizer_curve(number), path) for number, path in enumerate(tokenizers, 1)]
    named += [(world or "", path) for world, path in zip(worlds, paths, strict=True)]
    with new_folder(out / CURVES) as folder:
        for name, path in named:
            curves = find_curves(path)
            if curves is not None:
                shutil.copyfile(curves, folder / f"{name}.parquet")


def tokenizer_curve(number: int) -> str:
    """The name of the curves of the first, second, ... tokenizer."""
    return "tokenizer" if number == 1 else f"tokenizer-{number}"


def find_curves(model: Path) -> Path | None:
    """``curves.parquet`` of the training output that ``model`` is or lies in."""
    candidates = [model, *model.resolve().parents[:2]]
    return next((each / "curves.parquet" for each in candidates if (each / "curves.parquet").is_file()), None)


# ----------------------------------------------------------------------------------------------------
# ``models.json`` of an evaluation: fingerprints of what gave its numbers and pictures.
# ----------------------------------------------------------------------------------------------------


HeadName = BenchmarkName | Task


class ModelRecord(Frozen):
    """Fingerprints of all models that took part.

    Attributes:
        backbone: SHA-256 of its weights.
        pca: what reduces the backbone's features.
        tokenizer: the main one; it, ``more_tokenizers`` and ``worlds`` are in the order of the settings.
        heads: by benchmark; of whole frames by task.
        heads_trained_on: what the training wrote into the head, such as ``benchmark``, ``split`` and ``frames``;
            released heads say nothing.
        rgb_decoder: that of the pictures; it takes part in no number.
        sources: inputs downloaded from the hub, by the name of the setting: ``hf://org/name@commit``.
    """

    backbone: str
    pca: str | None = None
    tokenizer: str | None
    more_tokenizers: tuple[str, ...] = ()
    worlds: tuple[str, ...]
    heads: Mapping[HeadName, str] = {}
    heads_trained_on: Mapping[HeadName, Mapping[str, Any]] = {}
    rgb_decoder: str | None = None
    sources: Mapping[str, str] = {}

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """All of them, the main one first."""
        return (*(() if self.tokenizer is None else (self.tokenizer,)), *self.more_tokenizers)

    def head_text(self, name: HeadName) -> str:
        """A head's fingerprint and training data in words."""
        split = self.heads_trained_on.get(name, {}).get("split")
        return self.heads[name] + (f", trained on the {split} split" if split else "")


def training_record(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """``trained_on`` of a head's checkpoint; nothing in a released one."""
    said = metadata.get("trained_on")
    return said if isinstance(said, Mapping) else {}


def write_models(out: Path, record: ModelRecord, sources: Mapping[str, str]) -> None:
    """Keep ``record`` beside the tables, with further ``sources``."""
    record = record.model_copy(update={"sources": {**record.sources, **sources}})
    with replacing(out / MODELS) as temporary:
        temporary.write_text(record.model_dump_json(indent=2) + "\n")


def read_models(out: Path) -> ModelRecord | None:
    """What was kept; None in an older evaluation.

    Raises:
        DatasetError: it is damaged.
    """
    path = out / MODELS
    if not path.exists():
        return None
    try:
        return ModelRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = problems_of(error, ModelRecord)
        raise DatasetError(f"{path} is damaged ({problems}): run evaluate again into a new folder") from error
