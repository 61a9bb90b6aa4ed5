"""The folder of an evaluation: whose it is, what is in it, and whether it is finished."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate.rows import method_now
from deltacache.evaluate.settings import CONFIG
from deltacache.pipeline.storage.atomic import (
    is_temporary,
    remove,
    remove_leftovers,
    replacing,
    sync,
    temporary_path,
)
from deltacache.pipeline.storage.locking import LOCK_FILE
from deltacache.schemas.errors import DatasetError, NotFiniteError, OtherEvaluationError
from deltacache.schemas.tables import LATER_METRIC_COLUMNS, METRICS_SCHEMA

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
_OURS = frozenset(
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
    return name in _OURS or is_temporary(name)


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
