"""What lies at a place, where it came from and how large it is: the ``inspect`` command."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from upath import UPath

from deltacache.chain.terminal import duration
from deltacache.evaluate.output import METRICS
from deltacache.evaluate.report.contact_sheet import write_contact_sheet
from deltacache.evaluate.report.runs import facts_of, open_runs
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, LoadedModel, load_tokenizer, load_world
from deltacache.models.heads import load_head
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.inspection import describe, readable_size
from deltacache.pipeline.datasets.preparation import is_dataset, read_card
from deltacache.pipeline.storage.locking import read_lock
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.benchmarks import BENCHMARK_TASK
from deltacache.schemas.errors import CheckpointError, DeltacacheError

_LOADERS: Mapping[str, Callable[[Path], LoadedModel[Any]]] = {
    "tokenizer": load_tokenizer,
    "world": load_world,
    "depth head": lambda path: load_head(path, "depth"),  # first: 256 channels are its bins
    "segmentation head": lambda path: load_head(path, "segmentation"),
}
_MADE_FROM = (
    "architecture",
    "fingerprint",
    "sha256",
    "step",
    "image_size",
    "code_version",
    "benchmark",
    "patch_grid",
)
_WIDTH = 22


def describe_output(place: str | Path) -> str:
    """What lies at ``place``: a dataset, a model or training output, or an evaluation.

    Raises:
        DeltacacheError: it is none of these.
    """
    if is_dataset(place):
        root = dataset_root(place)
        return "\n".join([str(describe(root)), *_running(root)])
    path = Path(place)
    if not path.exists():
        raise DeltacacheError(f"{path} does not exist: give the output folder of one of the commands")
    lines = _evaluation(path) if (path / METRICS).is_file() else _model(path)
    return "\n".join(lines)


def write_pictures(place: str | Path, sheet: Path) -> Path:
    """Write a contact sheet of the feature dataset at ``place``.

    Raises:
        DeltacacheError: it is something else.
    """
    if not is_dataset(place):
        raise DeltacacheError(f"{place} is no dataset: --pictures shows the clips of a feature dataset")
    if read_card(dataset_root(place)).kind != "features":
        raise DeltacacheError(
            f"{place} holds delta tokens, which are no pictures: give the feature dataset they were made from"
        )
    return write_contact_sheet(place, sheet)


def _line(name: str, value: object) -> str:
    return f"  {name:<{_WIDTH}} {value}"


def _running(root: UPath) -> Iterator[str]:
    """What a command that is writing to a dataset says of itself."""
    lock = read_lock(root)
    if lock is None:
        return
    where = f"process {lock.pid} on {lock.host}, since {lock.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if not lock.alive:
        yield f"  stopped      {lock.command} ({where}) has died: run it again"
        return
    yield f"  running      {lock.command} ({where})"
    status = lock.status
    if "planned_clips" in status:
        left = status["seconds_left"]
        yield (
            f"               {status['clips']} of {status['planned_clips']} clips of this run, "
            f"{status['clips_per_s']:.1f} clips/s, {status['failed_videos']} videos refused, "
            f"{'time left not known yet' if left is None else duration(left) + ' left'}"
        )


def _evaluation(path: Path) -> Iterator[str]:
    (run,) = open_runs([path])
    yield f"{path}: an evaluation, {run.metrics.num_rows} numbers, {readable_size(_bytes(path))}"
    for name, value in facts_of(run).items():
        yield _line(name, value)
    settings = run.settings
    fingerprints = {row["tokenizer"] for row in run.rows} | {row["world"] for row in run.rows}
    models = [("tokenizer", tokenizer) for tokenizer in settings.tokenizers]
    for name, model in [*models, *(("world", world) for world in settings.worlds)]:
        yield from _parent(name, Path(model), fingerprints)
    if not isinstance(settings, ClipEvaluation) and run.models is not None:
        tasks = {**BENCHMARK_TASK}
        for name, head in settings.heads.items():
            yield from _parent(f"{tasks.get(name, name)} head", head, {run.models.heads.get(name)})
    features = settings.features if isinstance(settings, ClipEvaluation) else None
    if features is not None:
        yield _dataset_parent(features)
    report = path / "report.html"
    yield _line("report", report if report.exists() else f"none: deltacache report {path}")


def _parent(name: str, path: Path, fingerprints: set[str | None]) -> Iterator[str]:
    """What a model that took part was made from, if it is still where it was."""
    try:
        loaded = _LOADERS[name](path)
    except CheckpointError:
        yield _line(f"made from: {name}", f"{path} is not there any more")
        return
    same = "as it was" if loaded.fingerprint in fingerprints else "another one by now"
    yield _line(f"made from: {name}", f"{loaded.fingerprint} at {path}, {same}")
    for key, value in loaded.metadata.items():
        if key.endswith(("_fingerprint", "sha256")):
            yield _line("", f"of {key.replace('_', ' ')} {str(value)[:16]}")


def _dataset_parent(features: str) -> str:
    try:
        card = open_dataset(features, "features").card
    except DeltacacheError:
        return _line("made from: features", f"{features} is not there any more")
    parents = ", ".join(f"{name} {value[:16]}" for name, value in card.parents.items())
    return _line("made from: features", f"{card.fingerprint} at {features}, of {parents}")


def _model(path: Path) -> Iterator[str]:
    kind = _recorded_kind(path)
    if kind == "rgb_decoder":
        yield from _rgb_decoder(path)
        return
    loaded = _load(path, kind)
    parameters = sum(tensor.numel() for tensor in loaded.model.parameters())
    yield (
        f"{path}: {type(loaded.model).__name__}, {parameters / 1e6:.2f} M parameters, {readable_size(_bytes(path))}"
    )
    yield _line("fingerprint", loaded.fingerprint)
    yield from _metadata(loaded.metadata)


def _metadata(metadata: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metadata.items():
        if name != "fingerprint" and name.endswith(_MADE_FROM):
            yield _line(name, value)


def _load(path: Path, kind: str | None) -> LoadedModel[Any]:
    """The model at ``path``; without a record of its kind, whichever its tensors fit."""
    wanted = [name for name in _LOADERS if kind is None or name.endswith(kind)]
    refusals = []
    for name in wanted:
        try:
            return _LOADERS[name](path)
        except CheckpointError as error:
            refusals.append(error)
    raise refusals[0]


def _recorded_kind(path: Path) -> str | None:
    config = _config(path)
    return None if config is None else str(config.get("kind"))


def _config(path: Path) -> dict[str, Any] | None:
    """``config.json`` of a checkpoint folder or of the newest one of a training output."""
    steps = sorted((path / "checkpoints").glob("step-*"), reverse=True) if path.is_dir() else []
    for place in (path, *steps):
        if (place / CONFIG_FILE).is_file() and (place / WEIGHTS_FILE).is_file():
            try:
                return json.loads((place / CONFIG_FILE).read_text())
            except ValueError as error:
                raise CheckpointError(f"{place / CONFIG_FILE} is damaged ({error})") from error
    return None


def _rgb_decoder(path: Path) -> Iterator[str]:
    """From its card alone: its weights need the backbone whose norm they undo."""
    config = _config(path) or {}
    yield f"{path}: RgbDecoder, {readable_size(_bytes(path))}"
    yield _line("fingerprint", config.get("fingerprint"))
    yield from _metadata(config)


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
