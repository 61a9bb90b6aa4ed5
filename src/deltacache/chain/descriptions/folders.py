"""What ``inspect`` says of folders with several outputs: contexts for generators, systems, chains."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from deltacache.chain.descriptions.lines import line, size_of
from deltacache.chain.run import ChainPaths
from deltacache.chain.systems import open_systems
from deltacache.evaluate.generators.manifest import read_manifest
from deltacache.evaluate.model_record import read_models
from deltacache.evaluate.output import METRICS, SYSTEMS, SYSTEMS_TEXT
from deltacache.models.checkpoints import CONFIG_FILE
from deltacache.pipeline.datasets.inspection import describe
from deltacache.pipeline.datasets.preparation import is_dataset, read_card
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.benchmarks import BENCHMARKS
from deltacache.schemas.configs import TrainingConfig
from deltacache.train.checkpoints import finished_checkpoints
from deltacache.train.stages import fingerprint_at


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
        yield line(f"{dataset}, horizon {horizon}", f"{count} contexts")
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
            yield line(name, f"{count} contexts")


def _written(path: Path, benchmark: str) -> int:
    return sum(1 for _ in path.glob(f"{benchmark}/h*/*/context*"))


def describe_systems(path: Path) -> Iterator[str]:
    """The output of train-systems, with the table of compare-systems if there is one.

    Raises:
        DeltacacheError: ``systems.yaml`` is damaged.
    """
    config, paths = open_systems(path)
    yield (f"{path}: {len(config.systems)} systems on {len(config.tokenizers)} tokenizers, {size_of(path)}")
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
        (paths.tokenizer, _steps),
        (paths.deltas, _dataset),
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
        return f"made by tokenizer {made}, which is {tokenizer} by now" if made != tokenizer else ""
    if folder.parent == paths.out / "worlds" and finished_checkpoints(folder):
        trained_on = json.loads((finished_checkpoints(folder)[-1] / CONFIG_FILE).read_bytes())
        data = paths.train_features if "tokenizer_fingerprint" not in trained_on else paths.deltas
        now = read_card(dataset_root(data)).fingerprint if is_dataset(data) else None
        made = trained_on.get("data_fingerprint")
        return f"trained on data {made}, which are {now} by now" if made != now else ""
    record = read_models(folder) if folder == paths.evaluation else None
    if record is None:
        return ""
    worlds = {fingerprint_at(world) for world in (paths.out / "worlds").glob("*")}
    if record.tokenizer not in (None, tokenizer):
        return f"of tokenizer {record.tokenizer}, which is {tokenizer} by now"
    return "of world models that are others by now" if set(record.worlds) - worlds else ""


def _trained(folder: Path, training: TrainingConfig) -> str:
    return f"{_steps(folder)} of {training.steps}"


def _steps(folder: Path) -> str:
    done = finished_checkpoints(folder)
    return f"trained for {int(done[-1].name.removeprefix('step-'))} steps" if done else "no checkpoint yet"


def _dataset(folder: Path) -> str:
    if not is_dataset(folder):
        return "not begun"
    found = describe(folder)
    return f"{'finished' if found.finished else 'not finished'}, {found.clips} clips"


def _evaluation(folder: Path) -> str:
    return str(folder) if (folder / METRICS).is_file() else "none yet"
