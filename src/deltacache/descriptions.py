"""``inspect``: what lies at a place, where it came from and how large it is."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from safetensors import SafetensorError, safe_open

from deltacache.chain import ChainPaths
from deltacache.evaluate.generators import MANIFEST, read_manifest
from deltacache.evaluate.output import (
    METRICS,
    PARTS,
    REPORT,
    STATISTICS,
    SYSTEMS,
    SYSTEMS_TEXT,
    TABLES,
    read_metrics,
    read_models,
)
from deltacache.evaluate.prediction.run import PAGE, TENSORS
from deltacache.evaluate.report.contact_sheet import write_contact_sheet
from deltacache.evaluate.report.runs import ReportRun, facts_of, open_runs
from deltacache.evaluate.settings import CONFIG, ClipEvaluation
from deltacache.models import pca
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoadedModel,
    holds_checkpoint,
    load_tokenizer,
    load_world,
    recorded_config,
)
from deltacache.models.heads import load_head
from deltacache.models.pca import load_pca
from deltacache.models.worlds import is_known
from deltacache.pipeline.datasets.changes import describe
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.writing import is_dataset, read_card
from deltacache.pipeline.storage.locking import read_lock
from deltacache.pipeline.storage.storage import AnyPath, dataset_root
from deltacache.schemas.benchmarks import BENCHMARK_TASK, BENCHMARKS
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.errors import CheckpointError, DatasetError, DeltacacheError
from deltacache.schemas.hub import origin_of
from deltacache.schemas.texts import counted, disk_text
from deltacache.systems import training as systems
from deltacache.systems.training import open_systems
from deltacache.terminal import duration
from deltacache.train.checkpoints import finished_checkpoints, steps_of
from deltacache.train.logs import CURVES, read_curves
from deltacache.train.setup import fingerprint_at

# ----------------------------------------------------------------------------------------------------
# How descriptions are laid out, and what can be said of any folder: its size, and who writes to it.
# ----------------------------------------------------------------------------------------------------


_WIDTH = 22


def line(name: str, value: object) -> str:
    """A fact under its name."""
    return f"  {name:<{_WIDTH}} {value}"


def size_of(path: Path) -> str:
    """Bytes of a file, or of all files below a folder; those that vanish meanwhile do not count."""
    files = [path] if path.is_file() else path.rglob("*")
    total = 0
    for each in files:
        try:
            total += each.stat().st_size if each.is_file() else 0
        except FileNotFoundError:
            continue
    return disk_text(total)


def running(root: AnyPath) -> Iterator[str]:
    """What a command that is writing to ``root``, or died while it did, says of itself."""
    lock = read_lock(root)
    if lock is None:
        return
    where = f"process {lock.pid} on {lock.host}, since {lock.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if not lock.alive:
        yield f"  stopped      {lock.command} ({where}) has died: run it again"
        return
    yield f"  running      {lock.command} ({where})"
    if lock.status:
        yield f"               {_progress(lock.status)}"


def _progress(status: Mapping[str, Any]) -> str:
    if "planned_clips" not in status:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in status.items())
    left = status["seconds_left"]
    return (
        f"{status['clips']} of {status['planned_clips']} clips of this run, "
        f"{status['clips_per_s']:.1f} clips/s, {counted(status['failed_videos'], 'video')} rejected, "
        f"{'time left not known yet' if left is None else duration(left) + ' left'}"
    )


# ----------------------------------------------------------------------------------------------------
# What ``inspect`` says of folders with several outputs: contexts for generators, systems, chains.
# ----------------------------------------------------------------------------------------------------


def describe_contexts(path: Path) -> Iterator[str]:
    """The output of export-contexts, and how many samples came back.

    Raises:
        DatasetError: ``contexts.json`` is damaged.
    """
    manifest = read_manifest(path)
    yield (
        f"{path}: contexts for a video generator, {len(manifest.contexts)}, padding {manifest.padding}, "
        f"{size_of(path)}"
    )
    counts = Counter((each.dataset, each.horizon) for each in manifest.contexts)
    for (dataset, horizon), count in counts.items():
        yield line(f"{dataset}, horizon {horizon}", counted(count, "context"))
    answered = sum(any(True for _ in (path / each.folder).glob("sample-*")) for each in manifest.contexts)
    yield line("answered", f"{answered} of {len(manifest.contexts)} contexts have samples")


def is_export_begun(path: Path) -> bool:
    """Whether contexts were written to ``path``; their list comes last."""
    return any(_written(path, name) for name in BENCHMARKS)


def describe_export_begun(path: Path) -> Iterator[str]:
    """The output of export-contexts while it is written, or after it was stopped."""
    yield f"{path}: contexts for a video generator, not all exported yet, {size_of(path)}"
    for name in BENCHMARKS:
        if count := _written(path, name):
            yield line(name, counted(count, "context"))


def _written(path: Path, benchmark: str) -> int:
    return sum(1 for _ in path.glob(f"{benchmark}/h*/*/context*"))


def describe_systems(path: Path) -> Iterator[str]:
    """The output of train-systems, with the table of compare-systems if there is one.

    Raises:
        DeltacacheError: ``systems.yaml`` is damaged.
    """
    config, paths = open_systems(path)
    yield (
        f"{path}: {counted(len(config.systems), 'system')} on "
        f"{counted(len(config.tokenizers), 'tokenizer')}, {size_of(path)}"
    )
    for name, tokenizer in config.tokenizers.items():
        yield line(f"tokenizer {name}", _trained(paths.tokenizer(name), tokenizer.training))
        yield line("", f"delta tokens {_dataset(paths.deltas(name))}")
    for name, system in config.systems.items():
        on = "patch tokens" if system.tokenizer is None else f"tokens of {system.tokenizer}"
        state = _trained(paths.world(name), system.world.training)
        yield line(f"system {name}", f"{system.world.model.architecture} on {on}, {state}")
    yield line("evaluation", _evaluation(paths.evaluation))
    yield systems_table(path) or line("table", "none here: deltacache compare-systems")


def systems_table(folder: Path) -> str:
    """Where the table of compare-systems is, if ``folder`` holds one."""
    table = folder / SYSTEMS
    return line("table of systems", f"{table}, {folder / SYSTEMS_TEXT}") if table.is_file() else ""


def is_chain(path: Path) -> bool:
    """Whether ``path`` holds what ``deltacache run`` makes first."""
    return is_dataset(ChainPaths(path).train_features)


def describe_chain(path: Path) -> Iterator[str]:
    """The output of ``deltacache run``: its parts, each of which can be inspected."""
    paths = ChainPaths(path)
    yield f"{path}: a chain of outputs, {size_of(path)}"
    parts: list[tuple[Path, Callable[[Path], str]]] = [
        *((folder, _dataset) for folder in sorted((path / "features").iterdir()) if is_dataset(folder)),
        *((folder, _steps) for folder in sorted((path / "stages/tokenizer").glob("*"))),
        (paths.tokenizer, _steps),
        (paths.deltas, _dataset),
        *((folder, _steps) for folder in sorted((path / "stages/worlds").glob("*/*"))),
        *((folder, _steps) for folder in sorted((path / "worlds").glob("*"))),
        (paths.evaluation, _evaluation),
    ]
    for folder, state in parts:
        stale = _made_of_others(paths, folder)
        yield line(str(folder.relative_to(path)), state(folder) + (f"; STALE: {stale}" if stale else ""))


def _made_of_others(paths: ChainPaths, folder: Path) -> str:
    """Why a part of a chain is stale: of what other model or dataset it was made; empty if it is not."""
    tokenizer = fingerprint_at(paths.tokenizer)
    if folder == paths.deltas and is_dataset(folder):
        made = read_card(dataset_root(folder)).tokenizer_fingerprint
        return (
            f"made with tokenizer {made}, but the tokenizer is now {tokenizer}" if made != tokenizer else ""
        )
    if folder != paths.evaluation and (checkpoints := finished_checkpoints(folder)):
        trained = json.loads((checkpoints[-1] / CONFIG_FILE).read_bytes())
        if (stages := paths.out / "stages") in folder.parents:  # what a stage begins with lies beside it
            earlier, data = folder.parent, None
        else:
            earlier = stages / folder.relative_to(paths.out)
            data = paths.deltas if "tokenizer_fingerprint" in trained else paths.train_features
        begun, made = (trained.get("started_from") or {}).get("fingerprint"), trained.get("data_fingerprint")
        if begun and earlier.is_dir() and begun not in map(fingerprint_at, earlier.iterdir()):
            place = earlier.relative_to(paths.out)
            return f"begun with checkpoint {begun}, which is no longer among those in {place}"
        now = read_card(dataset_root(data)).fingerprint if data and is_dataset(data) else None
        return f"trained on data {made}, but the data are now {now}" if data and made != now else ""
    record = read_models(folder) if folder == paths.evaluation else None
    if record is None:
        return ""
    worlds = {fingerprint_at(world) for world in (paths.out / "worlds").glob("*")}
    if record.tokenizer not in (None, tokenizer):
        return f"of tokenizer {record.tokenizer}, but the tokenizer is now {tokenizer}"
    return "of world models that have changed since" if set(record.worlds) - worlds else ""


def _trained(folder: Path, training: TrainingConfig) -> str:
    return f"{_steps(folder)} of {training.steps}"


def _steps(folder: Path) -> str:
    """What a part of a chain or of systems has learned, and how far it is if it is being trained."""
    done, lock = finished_checkpoints(folder), read_lock(folder)
    state = f"trained for {steps_of(done[-1])} steps" if done else "no checkpoint yet"
    if lock is not None and lock.alive:
        now = [text.split(maxsplit=1)[1] for text in training_progress(folder) if "running: " in text]
        return ", ".join([state, *now])
    return state


def _dataset(folder: Path) -> str:
    if not is_dataset(folder):
        return "not begun"
    found = describe(folder)
    return f"{'finished' if found.finished else 'not finished'}, {counted(found.clips, 'clip')}"


def _evaluation(folder: Path) -> str:
    return str(folder) if (folder / METRICS).is_file() else "none yet"


# ----------------------------------------------------------------------------------------------------
# What ``inspect`` says of models: checkpoints, trainings, heads, released files, backbones, PCAs.
# ----------------------------------------------------------------------------------------------------


LOADERS: Mapping[str, Callable[[Path], LoadedModel[Any]]] = {
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


def describe_model(path: Path) -> Iterator[str]:
    """A checkpoint folder, a training output (its newest checkpoint), a head, a released file.

    Raises:
        CheckpointError: it is damaged, or none of our models.
    """
    recorded = recorded_config(path)
    architecture = str((recorded or {}).get("architecture", ""))
    if recorded is not None and (recorded["kind"] == "rgb_decoder" or not is_known(architecture)):
        # A decoder's weights need the backbone whose norm they undo; code outside of the package is not imported here.
        yield f"{path}: {architecture or 'RgbDecoder'}, {size_of(path)}"
        yield line("fingerprint", recorded["fingerprint"])
        yield from _metadata(recorded)
        return
    loaded = _load(path, None if recorded is None else str(recorded["kind"]))
    yield f"{path}: {type(loaded.model).__name__}, {_parameters(loaded.model)}, {size_of(path)}"
    yield line("fingerprint", loaded.fingerprint)
    yield from _metadata(loaded.metadata)


def describe_training(path: Path) -> Iterator[str]:
    """A training output, from its newest checkpoint if there is one yet, and how far the training is.

    Raises:
        DatasetError: the curves are damaged.
    """
    if finished_checkpoints(path):
        yield from describe_model(path)
    else:
        yield f"{path}: a training without a checkpoint yet, {size_of(path)}"
    yield from training_progress(path)


_RECENT = 10
"""Rows of the curves that the speed is the mean of."""


def training_progress(path: Path) -> Iterator[str]:
    """Whether a training runs, was stopped or is finished; its step, loss, speed and time left.

    Raises:
        DatasetError: the curves are damaged.
    """
    lock, rows, checkpoints = read_lock(path), read_curves(path / CURVES), finished_checkpoints(path)
    settings: dict[str, Any] = {}
    with suppress(OSError, yaml.YAMLError):  # a checkpoint that was copied from elsewhere
        settings = yaml.safe_load((path / CONFIG).read_bytes())
    steps = (settings.get("training") or {}).get("steps")
    if not rows and steps is None:
        return
    saved = steps_of(checkpoints[-1]) if checkpoints else 0
    done = max(saved, *(int(row["step"]) for row in rows[-1:]), 0)
    of_steps = f"step {done:,}" + ("" if steps is None else f" of {steps:,}")
    validation = (recorded_config(path) or {}).get("validation") or {} if checkpoints else {}
    patience = (settings.get("data") or {}).get("patience")
    left = None if steps is None or done >= steps else steps - done
    if lock is not None and lock.alive:
        yield line("training", f"running: {of_steps}")
    elif steps is not None and saved >= steps:
        yield line("training", f"finished: {of_steps}")
    elif patience is not None and validation.get("waited", 0) >= patience:
        yield line(
            "training", f"finished: stopped early after {of_steps}, since the validation loss no longer fell"
        )
        left = None
    else:
        after = (
            f"continues after step {saved:,}"
            if saved
            else "starts from the beginning: there is no checkpoint"
        )
        yield line("training", f"stopped after {of_steps}; the same command with --resume {after}")
    if not rows:
        return
    recent = rows[-_RECENT:]
    step_s = sum(row["step_time_s"] for row in recent) / len(recent)
    yield line("loss", f"{rows[-1]['loss']:.5g}")
    yield line("speed", f"{1 / step_s:.3g} steps/s")
    if left is not None:
        yield line("time left", f"about {duration(left * step_s)} at this speed")


def describe_pca(path: Path) -> Iterator[str]:
    """The output of fit-pca.

    Raises:
        CheckpointError: it is damaged.
    """
    pca = load_pca(path)
    yield (
        f"{path}: a PCA, {pca.size} components of {pca.channels} channels, which explain {pca.explained:.2%} of the "
        f"variance, {size_of(path)}"
    )
    yield line("fingerprint", pca.fingerprint)
    for name, value in pca.metadata.items():
        yield line(name, value["id"] if name == "backbone" else value)


def describe_backbone(path: Path) -> Iterator[str]:
    """A Hugging Face directory.

    Raises:
        CheckpointError: it is damaged, or holds no image encoder.
    """
    backbone = load_backbone(str(path))
    yield (
        f"{path}: a backbone, {type(backbone.model).__name__}, {_parameters(backbone.model)}, {size_of(path)}"
    )
    yield line("weights_sha256", backbone.weights_sha256)
    yield line("patch tokens", f"{backbone.hidden_size} wide, of {backbone.patch_size} px patches")
    config = read_config(path)
    for name in ("model_type", "_name_or_path", "transformers_version"):
        if config.get(name):
            yield line(name.removeprefix("_"), config[name])


def read_config(folder: Path) -> Mapping[str, Any]:
    """``config.json`` of any folder; empty if it is missing or not a JSON object."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def made_from(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Fingerprints of what a model was made from."""
    for name, value in metadata.items():
        if name.endswith(("_fingerprint", "sha256")):
            yield line("", f"of {name.replace('_', ' ')} {str(value)[:16]}")


def _metadata(metadata: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metadata.items():
        if name != "fingerprint" and name.endswith(_MADE_FROM):
            yield line(name, value)
    for name, each in zip(metadata.get("dataset_names", ()), metadata.get("datasets", ()), strict=True):
        share = f", share {each['share']:.4g}" if "share" in each else ""
        where = f" where {each['where']}" if "where" in each else ""
        yield line("dataset", f"{name}: {each['clips']:,} of {each['of_clips']:,} clips{where}{share}")
    standing = metadata.get("validation") or {}
    if standing.get("best_loss") is not None:
        best = f"the lowest is {standing['best_loss']:.5g} after step {standing['best_step']:,}"
        yield line("validation", f"loss {standing['loss']:.5g} after step {standing['step']:,}, {best}")
    for name, value in (metadata.get("sources") or {}).items():
        yield line(f"{name} from the hub", value)
    said = metadata.get("trained_on")
    if isinstance(said, Mapping):
        yield line("trained_on", ", ".join(f"{name} {value}" for name, value in said.items()))


def _load(path: Path, kind: str | None) -> LoadedModel[Any]:
    """The model at ``path``; without a record of its kind, whichever its tensors fit."""
    refusals: dict[str, CheckpointError] = {}
    for name, load in LOADERS.items():
        if kind is None or name.endswith(kind):
            try:
                return load(path)
            except CheckpointError as error:
                refusals[name] = error
    reasons = list(dict.fromkeys(str(error).split("\n")[0] for error in refusals.values()))
    if len(reasons) == 1 or kind == "head":
        raise next(iter(refusals.values()))  # damaged
    raise CheckpointError(
        f"{path} is not a model of deltacache, looked for a {', '.join(LOADERS)}: {reasons[0]}"
        if kind is None
        else f"{path} says that it is a {kind}, looked for a {', '.join((*LOADERS, 'rgb_decoder', 'pca'))}"
    )


def _parameters(model: Any) -> str:
    return f"{sum(tensor.numel() for tensor in model.parameters()) / 1e6:.2f} M parameters"


# ----------------------------------------------------------------------------------------------------
# What ``inspect`` says of evaluations: finished, running, stopped, and of tables alone.
# ----------------------------------------------------------------------------------------------------


def describe_evaluation(path: Path) -> Iterator[str]:
    """A finished one, and whether its models are still the same.

    Raises:
        DatasetError: a table is damaged.
    """
    (run,) = open_runs([path])
    yield f"{path}: an evaluation, {run.metrics.num_rows} numbers, {size_of(path)}"
    for name, value in facts_of(run).items():
        yield line(name, value)
    yield from _models(run)
    if isinstance(run.settings, ClipEvaluation):
        yield _dataset_parent(run.settings.features)
    if table := systems_table(path):
        yield table
    report = path / REPORT
    yield line("report", report if report.exists() else f"none: deltacache report {path}")


def describe_metrics(path: Path) -> Iterator[str]:
    """A ``metrics.parquet`` without its evaluation.

    Raises:
        DatasetError: it is damaged or another table.
    """
    rows = read_metrics(path).to_pylist()
    yield f"{path}: the table of an evaluation, {len(rows)} numbers, {size_of(path)}"
    for name in (
        "dataset",
        "method",
        "horizon",
        "context",
        "seed",
        "backbone",
        "tokenizer",
        "world",
        "run_id",
    ):
        values = [str(value) for value in dict.fromkeys(row[name] for row in rows) if value is not None]
        yield line(name, ", ".join(values) or "none")


def is_unfinished(path: Path) -> bool:
    """Whether an evaluation was begun in ``path``; one of clips or whole frames leaves its lock alone."""
    lock = read_lock(path)
    return (path / PARTS).is_dir() or (lock is not None and lock.command.startswith("evaluate"))


def describe_unfinished(path: Path) -> Iterator[str]:
    """One without tables yet: how far it is."""
    yield f"{path}: an evaluation without tables yet, {size_of(path)}"
    done: dict[str, list[int]] = {}
    for block in sorted((path / PARTS).glob(f"*/*/{STATISTICS}")):
        sequences = pq.read_table(block, columns=["sequence_id"])["sequence_id"].unique()
        done.setdefault(block.parent.name.rpartition("-")[0], []).append(len(sequences))
    for dataset, counts in done.items():
        yield line("finished", f"{dataset}: {counted(sum(counts), 'sequence')}, in {len(counts)} blocks")
    if not done:
        yield line("finished", "no block of sequences")


def _models(run: ReportRun) -> Iterator[str]:
    """Tokenizers, world models and heads at their recorded paths."""
    settings = run.settings
    recorded = {path: fingerprint for fingerprint, path in run.places.items()}
    any_of_them = {row[name] for row in run.rows for name in ("tokenizer", "world")}
    places = [("tokenizer", path) for path in settings.tokenizers]
    places += [("world", path) for path in settings.worlds]
    for name, path in places:
        yield from _parent(name, path, {recorded[path]} if path in recorded else any_of_them)
    if isinstance(settings, ClipEvaluation) or run.models is None:
        return
    tasks = {**BENCHMARK_TASK}
    for name, head in settings.heads.items():
        yield from _parent(f"{tasks.get(name, name)} head", head, {run.models.heads.get(name)})


def _parent(name: str, path: Path, fingerprints: Collection[str | None]) -> Iterator[str]:
    """What a model that took part was made from, if it is still where it was."""
    try:
        loaded = LOADERS[name](path)
    except CheckpointError as error:
        yield line(f"made from: {name}", str(error) if path.exists() else f"{path} no longer exists")
        return
    same = "unchanged" if loaded.fingerprint in fingerprints else "not the one that was evaluated"
    yield line(f"made from: {name}", f"{loaded.fingerprint} at {path}, {same}")
    yield from made_from(loaded.metadata)


def _dataset_parent(features: str) -> str:
    try:
        card = open_dataset(features, "features").card
    except DeltacacheError as error:
        gone = "://" not in features and not Path(features).exists()
        return line("made from: features", f"{features} no longer exists" if gone else str(error))
    parents = ", ".join(f"{name} {value[:16]}" for name, value in card.parents.items())
    return line("made from: features", f"{card.fingerprint} at {features}, of {parents}")


def describe_prediction(path: Path) -> Iterator[str]:
    """Futures of one video.

    Raises:
        DatasetError: the tensors are damaged.
    """
    tensors = path / TENSORS
    try:
        with safe_open(tensors, "pt") as file:
            about = dict(file.metadata() or {})
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise DatasetError(f"{tensors} is damaged ({error}): run predict again into a new folder") from error
    yield f"{path}: sampled futures of one video, {size_of(path)}"
    for name, shape in shapes.items():
        yield line(name, " x ".join(map(str, shape)))
    for name, value in sorted(about.items()):
        yield line(name, value)
    yield line("page", path / PAGE)


# ----------------------------------------------------------------------------------------------------
# What lies at a place, where it came from and how large it is: the ``inspect`` command.
# ----------------------------------------------------------------------------------------------------


_MODEL_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of output.

    Attributes:
        name: with what it is known by.
        files: that stand for the whole folder.
    """

    name: str
    known: Callable[[Path], bool]
    describe: Callable[[Path], Iterator[str]]
    files: tuple[str, ...] = ()


def _holds(name: str) -> Callable[[Path], bool]:
    return lambda path: (path / name).is_file()


_KINDS = (
    _Kind(
        f"an evaluation ({METRICS})",
        _holds(METRICS),
        describe_evaluation,
        (*TABLES, SYSTEMS, CONFIG),
    ),
    _Kind(
        "an evaluation that is not finished (parts/, or the lock of one)",
        is_unfinished,
        describe_unfinished,
    ),
    _Kind(
        f"systems ({systems.CONFIG})",
        _holds(systems.CONFIG),
        describe_systems,
        (systems.CONFIG, SYSTEMS),
    ),
    _Kind(f"a prediction ({TENSORS})", _holds(TENSORS), describe_prediction, (TENSORS, PAGE, CONFIG)),
    _Kind(f"contexts ({MANIFEST})", _holds(MANIFEST), describe_contexts, (MANIFEST,)),
    _Kind(
        "contexts that are not all exported (vspw/h1/*/context)",
        is_export_begun,
        describe_export_begun,
    ),
    _Kind(
        f"a PCA ({pca.WEIGHTS_FILE})",
        _holds(pca.WEIGHTS_FILE),
        describe_pca,
        (pca.WEIGHTS_FILE, CONFIG_FILE),
    ),
    _Kind(
        f"a Hugging Face backbone ({CONFIG_FILE} with model_type)",
        lambda path: "model_type" in read_config(path),
        describe_backbone,
        (WEIGHTS_FILE, CONFIG_FILE),
    ),
    _Kind(
        "a training (checkpoints/)",
        lambda path: (path / "checkpoints").is_dir(),
        describe_training,
        (CURVES, CONFIG),
    ),
    _Kind("a chain of outputs (features/train)", is_chain, describe_chain),
    _Kind(
        f"a model ({CONFIG_FILE} and {WEIGHTS_FILE}, pytorch_model.bin or last.ckpt)",
        holds_checkpoint,
        describe_model,
        (WEIGHTS_FILE, CONFIG_FILE),
    ),
)


def describe_output(place: str | Path) -> str:
    """What lies at ``place``: any output, also while it is written, or a file that stands for one.

    Raises:
        DeltacacheError: it is not a dataset, or damaged.
    """
    name = origin_of(place)
    of_hub = [line("hub", name)] if name else []
    if is_dataset(place):
        root = dataset_root(place)
        return "\n".join([str(describe(root)), *of_hub, *running(root)])
    path = Path(place)
    if not path.exists():
        raise DeltacacheError(f"{path} does not exist: give the output folder of one of the commands")
    lines = _file(path) if path.is_file() else _folder(path)
    return "\n".join([*lines, *of_hub])


def _folder(path: Path) -> Iterator[str]:
    kind = _kind_of(path)
    if kind is not None:
        yield from kind.describe(path)
    elif read_lock(path) is not None:
        yield f"{path}: the output of a command that has written nothing yet"
    else:
        raise _unknown(path)
    yield from running(path)


def _file(path: Path) -> Iterator[str]:
    """The folder that a file stands for, a table without its folder, or a model's weights."""
    kind = _kind_of(path.parent)
    if path.name == METRICS and not (path.parent / CONFIG).is_file():
        return describe_metrics(path)
    if kind is not None and path.name in kind.files:
        return _folder(path.parent)
    if path.suffix in _MODEL_FILES:
        return describe_model(path)
    if path.suffix == ".parquet":
        return describe_metrics(path)
    raise _unknown(path)


def _kind_of(folder: Path) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.known(folder)), None)


def _unknown(path: Path) -> DeltacacheError:
    names = ["a dataset (dataset.json)", *(kind.name for kind in _KINDS)]
    return DeltacacheError(
        f"{path} is not an output of deltacache: looked for {'; '.join(names)}. Give the output folder of one of the "
        "commands, or a model's file"
    )


def write_pictures(place: str | Path, sheet: Path) -> Path:
    """Write a contact sheet of the feature dataset at ``place``.

    Raises:
        DeltacacheError: it is something else.
    """
    if not is_dataset(place):
        raise DeltacacheError(f"{place} is not a dataset: --pictures shows the clips of a feature dataset")
    if read_card(dataset_root(place)).kind != "features":
        raise DeltacacheError(
            f"{place} holds delta tokens, which are not pictures: give the feature dataset they were made from"
        )
    return write_contact_sheet(place, sheet)
