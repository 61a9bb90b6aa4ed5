"""What ``inspect`` says of folders with several outputs: contexts for generators, systems, chains."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from deltacache.chain.descriptions.lines import line, size_of
from deltacache.chain.run import ChainPaths
from deltacache.chain.systems import open_systems
from deltacache.evaluate.generators.manifest import read_manifest
from deltacache.evaluate.output import METRICS, SYSTEMS, SYSTEMS_TEXT
from deltacache.pipeline.datasets.inspection import describe
from deltacache.pipeline.datasets.preparation import is_dataset
from deltacache.schemas.benchmarks import BENCHMARKS
from deltacache.schemas.configs import TrainingConfig
from deltacache.train.checkpoints import finished_checkpoints


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
        yield line(str(folder.relative_to(path)), state(folder))


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
