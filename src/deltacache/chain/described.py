"""What lies at a place, where it came from and how large it is: the ``inspect`` command."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deltacache.chain import systems
from deltacache.chain.descriptions import evaluations, folders, models
from deltacache.chain.descriptions.lines import running
from deltacache.evaluate.generators.manifest import MANIFEST
from deltacache.evaluate.output import METRICS, SYSTEMS, TABLES
from deltacache.evaluate.report.contact_sheet import write_contact_sheet
from deltacache.evaluate.settings import CONFIG
from deltacache.models import pca
from deltacache.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, holds_checkpoint
from deltacache.pipeline.datasets.inspection import describe
from deltacache.pipeline.datasets.preparation import is_dataset, read_card
from deltacache.pipeline.storage.locking import read_lock
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.errors import DeltacacheError

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
        evaluations.describe_evaluation,
        (*TABLES, SYSTEMS, CONFIG),
    ),
    _Kind(
        "an evaluation that is not finished (parts/, or the lock of one)",
        evaluations.is_unfinished,
        evaluations.describe_unfinished,
    ),
    _Kind(
        f"systems ({systems.CONFIG})",
        _holds(systems.CONFIG),
        folders.describe_systems,
        (systems.CONFIG, SYSTEMS),
    ),
    _Kind(f"contexts ({MANIFEST})", _holds(MANIFEST), folders.describe_contexts, (MANIFEST,)),
    _Kind(
        "contexts that are not all exported (vspw/h1/*/context)",
        folders.is_export_begun,
        folders.describe_export_begun,
    ),
    _Kind(
        f"a PCA ({pca.WEIGHTS_FILE})",
        _holds(pca.WEIGHTS_FILE),
        models.describe_pca,
        (pca.WEIGHTS_FILE, CONFIG_FILE),
    ),
    _Kind(
        f"a Hugging Face backbone ({CONFIG_FILE} with model_type)",
        lambda path: "model_type" in models.read_config(path),
        models.describe_backbone,
        (WEIGHTS_FILE, CONFIG_FILE),
    ),
    _Kind(
        "a training (checkpoints/)",
        lambda path: (path / "checkpoints").is_dir(),
        models.describe_training,
        ("curves.parquet", CONFIG),
    ),
    _Kind("a chain of outputs (features/train)", folders.is_chain, folders.describe_chain),
    _Kind(
        f"a model ({CONFIG_FILE} and {WEIGHTS_FILE}, pytorch_model.bin or last.ckpt)",
        holds_checkpoint,
        models.describe_model,
        (WEIGHTS_FILE, CONFIG_FILE),
    ),
)


def describe_output(place: str | Path) -> str:
    """What lies at ``place``: any output, also while it is written, or a file that stands for one.

    Raises:
        DeltacacheError: it is none, or damaged.
    """
    if is_dataset(place):
        root = dataset_root(place)
        return "\n".join([str(describe(root)), *running(root)])
    path = Path(place)
    if not path.exists():
        raise DeltacacheError(f"{path} does not exist: give the output folder of one of the commands")
    lines = _file(path) if path.is_file() else _folder(path)
    return "\n".join(lines)


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
        return evaluations.describe_metrics(path)
    if kind is not None and path.name in kind.files:
        return _folder(path.parent)
    if path.suffix in _MODEL_FILES:
        return models.describe_model(path)
    if path.suffix == ".parquet":
        return evaluations.describe_metrics(path)
    raise _unknown(path)


def _kind_of(folder: Path) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.known(folder)), None)


def _unknown(path: Path) -> DeltacacheError:
    names = ["a dataset (dataset.json)", *(kind.name for kind in _KINDS)]
    return DeltacacheError(
        f"{path} is no output of deltacache: looked for {'; '.join(names)}. Give the output folder of one of the "
        "commands, or a model's file"
    )


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
