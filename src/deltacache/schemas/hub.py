"""Names of the Hugging Face hub where a path may stand: what a name means, and its files in the hub's cache.

``org/name``, ``org/name@revision``, ``hf://org/name[/sub/path][@revision]`` and the hub's own
``hf://datasets/org/name[@revision][/sub/path]`` are names. A path that exists here always wins. Everything that takes a
model or a dataset resolves names here: fields of settings are a ``ModelPath`` or a ``DatasetPlace``.

Files are downloaded into the hub's cache by commit, so that a name means the same files until the end of a command;
an interrupted download is continued. Files whose hash the hub gives (all: SHA-256 of large files, git's hash of small
ones) are compared with it once. No token passes through here: the hub's own client reads it.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deltacache.schemas.errors import CheckpointError, DatasetError, DeltacacheError

Kind = Literal["model", "dataset"]

_BARE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_SNAPSHOT = re.compile(
    r".*/(?P<kind>models|datasets)--(?P<repo>.+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<path>/.*)?"
)
_CONFIG, _WEIGHTS, _STATE = "config.json", ("model.safetensors", "pca.safetensors"), "training_state.pt"
_RELEASED = ("pytorch_model.bin", "last.ckpt")
_ARTICLE = {"model": "a model", "dataset": "a dataset"}


_as_saved: ContextVar[bool] = ContextVar("as_saved", default=False)


@contextmanager
def as_saved() -> Iterator[None]:
    """Within the block settings are read as they were saved: their paths were resolved then, and may be gone."""
    token = _as_saved.set(True)
    try:
        yield
    finally:
        _as_saved.reset(token)


@dataclass(frozen=True, slots=True)
class HubName:
    """A place in a repository of the hub.

    Attributes:
        kind: of the repository.
        revision: branch, tag or commit; ``None`` for the default branch.
        path: of a file or folder in it; "" for all of it.
    """

    kind: Kind
    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """The canonical name, which ``parsed`` reads and the hub's own libraries do."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{prefix}{self.repo}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def page(self) -> str:
        """Where it is looked at in a browser."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


def parsed(text: str, kind: Kind) -> HubName | None:
    """What ``text`` names on the hub; ``None`` of a path, of a url of another store, and of anything that exists here.

    Args:
        kind: of repositories that do not say theirs, as ``hf://datasets/…`` does.

    Raises:
        DeltacacheError: it begins with ``hf://`` and is no name of the hub.
    """
    if _as_saved.get():
        return None
    scheme = re.match(r"hf:/{1,2}(?!/)", text)  # a Path of the name has one slash
    if scheme is None:
        if not _BARE.fullmatch(text) or ".." in text or Path(text).exists():
            return None
        body = text
    else:
        body = text[scheme.end() :]
    left, at, right = body.partition("@")
    parts = left.rstrip("/").split("/")
    typed = parts[0] in ("datasets", "models") and scheme is not None
    if at and len(parts) > (
        3 if typed else 2
    ):  # hf://org/name/sub/path@revision: the hub has it behind the name
        at_name = 3 if typed else 2
        body = "/".join(parts[:at_name]) + f"@{right.replace('/', '%2F')}/" + "/".join(parts[at_name:])
    from huggingface_hub.errors import HfUriError, HFValidationError
    from huggingface_hub.utils import parse_hf_uri, validate_repo_id

    try:
        uri = parse_hf_uri(f"hf://{body.rstrip('/')}")
        validate_repo_id(uri.id)
        if uri.type not in ("model", "dataset"):
            raise HFValidationError(f"a {uri.type} holds neither")
    except (HfUriError, HFValidationError):
        if scheme is None:
            return None
        raise DeltacacheError(
            f"{_shown(text)} is not the name of a model or dataset on the hub: it must be hf://OWNER/NAME, with /PATH "
            "of a file or folder in it and @REVISION if needed"
        ) from None
    meant: Kind = "dataset" if uri.type == "dataset" else "model" if typed else kind
    return HubName(meant, uri.id, uri.revision, uri.path_in_repo.strip("/"))


def origin_of(path: object) -> str | None:
    """The name with its commit of what lies in the hub's cache, ``hf://org/name@commit/path``; ``None`` elsewhere."""
    match = _SNAPSHOT.fullmatch(str(path))
    if match is None:
        return str(path) if str(path).startswith("hf://") else None
    kind: Kind = "dataset" if match["kind"] == "datasets" else "model"
    return str(
        HubName(kind, match["repo"].replace("--", "/", 1), match["commit"], (match["path"] or "").strip("/"))
    )


def origins(**paths: Any) -> dict[str, str]:
    """``origin_of`` what comes from the hub, by name: for the records of what something was made from."""
    return {name: found for name, path in paths.items() if path is not None and (found := origin_of(path))}


def origins_within(settings: Mapping[str, Any]) -> dict[str, str]:
    """``origin_of`` every path in settings that comes from the hub, by its dotted place."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        several = value if isinstance(value, Mapping) else {}
        if isinstance(value, list | tuple):
            several = {str(number): each for number, each in enumerate(value)}
        found |= {f"{name}.{inner}": each for inner, each in origins_within(several).items()}
        if isinstance(value, str | Path):
            found |= origins(**{name: value})
    return found


# ----------------------------------------------------------------------------------------------------
# What takes a name resolves it with one of these.
# ----------------------------------------------------------------------------------------------------


def model_path(path: Any) -> Any:
    """A checkpoint, head or PCA: the path as it is, or the downloaded files of the name of a model.

    Of a repository only what loads is downloaded: ``config.json`` with its weights, or a released file.

    Raises:
        CheckpointError: there is no such model, or it cannot be had: says what was looked for, and where.
    """
    if not isinstance(path, str | Path) or (name := parsed(str(path), "model")) is None:
        return path
    within = f"{name.path}/" if name.path else ""
    snapshot = _download(
        name, str(path), [*filter(None, [name.path]), *(within + each for each in (_CONFIG, *_WEIGHTS))]
    )
    found = snapshot / name.path
    if not found.is_file() and not any((found / each).is_file() for each in _WEIGHTS):
        _download(name, str(path), [within + each for each in _RELEASED])
        if not any((found / each).is_file() for each in _RELEASED):
            raise CheckpointError(
                f"{name} holds no model: expected {_CONFIG} and {_WEIGHTS[0]}, or {' or '.join(_RELEASED)}. It holds "
                f"{_held(name, snapshot)}: give the name of another repository, or of a file in it"
            )
    return found


def training_path(path: Any) -> Any:
    """``model_path``, with the optimizer's state if there is one: what a training goes on from."""
    found = model_path(path)
    if found is not path and (name := parsed(str(path), "model")) is not None:
        _download(name, str(path), [f"{name.path}/{_STATE}".lstrip("/")])
    return found


def dataset_place(place: Any) -> Any:
    """A dataset or an evaluation: the path or url as it is, or the downloaded files of the name of a dataset.

    Raises:
        DatasetError: there is no such dataset, or it cannot be had: says what was looked for, and where.
    """
    if not isinstance(place, str | Path) or (name := parsed(str(place), "dataset")) is None:
        return place
    return str(_whole(name, str(place)))


def output_place(place: Any) -> Any:
    """Anything that a command wrote: a dataset of this name, else a model."""
    text = str(place)
    if (name := parsed(text, "dataset")) is None:
        return place
    if name.kind == "model" or _is_typed(text):
        return str(_whole(name, text))
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return str(_whole(name, text))
    except DatasetError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
    return str(model_path(place))


def backbone_folder(source: str, patterns: Sequence[str]) -> Path:
    """The files of a backbone's repository that match ``patterns``.

    Raises:
        CheckpointError: there is none of this name, it is gated, or the hub does not answer.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = parsed(source, "model") or HubName("model", source)
    try:
        validate_repo_id(name.repo)
    except HFValidationError:
        raise CheckpointError(
            f"backbone {source!r} is neither a directory nor a name on the Hugging Face hub: give the path of a "
            "directory with config.json and model.safetensors, or use 'tiny'"
        ) from None
    within = f"{name.path}/" if name.path else ""
    return _download(name, source, [within + each for each in patterns], "backbone ") / name.path


def streamed_place(place: Any) -> Any:
    """``dataset_place`` without a download: the url, pinned to its commit, from which clips are read one by one."""
    if not isinstance(place, str | Path) or (name := parsed(str(place), "dataset")) is None:
        return place
    with _readable(name, str(place)), quiet_client():
        commit = _commit(name)
    return str(HubName("dataset", name.repo, commit, name.path))


def refuse_output(place: str) -> None:
    """Refuse a name of the hub as the place of an output.

    Raises:
        DeltacacheError: it is one.
    """
    if re.match("hf:/", place):
        raise DeltacacheError(
            f"{_shown(place)} is on the hub, where no command writes its output: give a folder, and upload it "
            "with `deltacache push FOLDER OWNER/NAME`"
        )


ModelPath = Annotated[Path, BeforeValidator(model_path)]
TrainingPath = Annotated[Path, BeforeValidator(training_path)]
DatasetPlace = Annotated[str, BeforeValidator(lambda place: _as_text(dataset_place(place)))]


def _as_text(place: Any) -> Any:
    return str(place) if isinstance(place, Path) else place


# ----------------------------------------------------------------------------------------------------
# Downloads, and what becomes of their errors.
# ----------------------------------------------------------------------------------------------------


def _is_typed(text: str) -> bool:
    return re.match(r"hf:/{1,2}(datasets|models)/", text) is not None


def _whole(name: HubName, asked: str) -> Path:
    patterns = [name.path, f"{name.path}/*"] if name.path else ["*"]
    snapshot = _download(name, asked, patterns)
    if not (snapshot / name.path).exists():
        raise DatasetError(f"{name} is not there: the repository holds {_held(name, snapshot)}")
    return snapshot / name.path


def _commit(name: HubName) -> str:
    import huggingface_hub

    return (
        huggingface_hub.HfApi()
        .resolve_revision(name.repo, repo_type=name.kind, revision=name.revision)
        .resolved
    )


def _download(name: HubName, asked: str, patterns: Sequence[str], what: str = "") -> Path:
    """The snapshot's folder in the cache with the files that match, verified."""
    import huggingface_hub

    with _readable(name, asked, what), quiet_client():
        commit = _commit(name)
        folder = Path(
            huggingface_hub.snapshot_download(
                name.repo, repo_type=name.kind, revision=commit, allow_patterns=list(patterns)
            )
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
    wanted = huggingface_hub.utils.filter_repo_objects(
        [path.relative_to(folder).as_posix() for path in files], allow_patterns=list(patterns)
    )
    _verify([folder / each for each in wanted], name)
    return folder


@contextmanager
def quiet_client() -> Iterator[None]:
    """The hub's client without bars where there is no terminal, and without remarks: what matters is raised."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled() and not sys.stderr.isatty()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


@contextmanager
def _readable(name: HubName, asked: str, what: str = "") -> Iterator[None]:
    """Errors of the hub and of the network in words that say what was looked for, where, and the way out."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    # OSError covers files, HTTP statuses and what is not in the cache, HTTPError a connection that fails.
    expected = (
        OSError,
        HTTPError,
        errors.RevisionResolutionError,
        errors.HFValidationError,
        errors.XetDownloadError,
    )
    try:
        yield
    except expected as error:
        why = error.__cause__ if isinstance(error, errors.RevisionResolutionError) else None
        revision, reason = name.revision or "main", str(why or error).strip().split("\n")[0]
        looked = f"{what}{_shown(asked)} ({name.page})"
        if not asked.startswith("hf:"):  # both readings
            looked = (
                f"{what}{asked} is not a {'directory' if what else 'path'} here ({Path(asked).absolute()}), and as "
                f"{_ARTICLE[name.kind]} on the hub ({name.page})"
            )
        way_out = "check the name, or give a local path" + (" or 'tiny'" if what else "")
        if isinstance(error, errors.GatedRepoError):
            said = f"it is gated: accept its licence at {name.page}, log in with 'hf auth login', and run this again"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"it has no revision {revision!r}: give a branch, tag or commit that {name.page} lists"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            said = f"it does not exist there, or is private: {way_out}, or log in with 'hf auth login'"
        elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            said = (
                f"access is denied ({reason}): accept its licence at {name.page} if it has one, and log in with "
                "'hf auth login'"
            )
        elif constants.HF_HUB_OFFLINE:
            said = (
                f"revision {revision} is not (completely) in the hub's cache ({constants.HF_HUB_CACHE}), and offline "
                f"mode is on (HF_HUB_OFFLINE): download it once without offline mode, or {way_out}"
            )
        else:
            said = (
                f"it is not (completely) in the hub's cache ({constants.HF_HUB_CACHE}) and could not be fetched "
                f"({reason}): check the connection and run this again, or {way_out}"
            )
        refusal = CheckpointError if name.kind == "model" else DatasetError
        raise refusal(f"{looked}: {said}") from error


def _held(name: HubName, snapshot: Path) -> str:
    """What the repository holds, for messages."""
    import huggingface_hub

    listed = huggingface_hub.get_cached_repo_tree(name.repo, repo_type=name.kind, revision=snapshot.name)
    names = sorted(each.path for each in listed)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"


def _shown(text: str) -> str:
    return re.sub(r"^hf:/(?!/)", "hf://", text)


def _verify(files: Sequence[Path], name: HubName) -> None:
    """Compare files with the hashes by which the hub's cache names them; what was compared before is left out.

    Raises:
        CheckpointError, DatasetError: a file has another hash. It is removed from the cache.
    """
    from huggingface_hub import cached_assets_path, constants

    seen = cached_assets_path("deltacache", name.kind, "verified", assets_dir=constants.HF_ASSETS_CACHE)
    blobs = [(path, blob) for path in files if (blob := _blob(path)) is not None]

    def check(each: tuple[Path, Path]) -> str | None:
        path, blob = each
        found = blob.stat()
        note, state = seen / blob.name, f"{found.st_size} {found.st_mtime_ns}"
        if note.is_file() and note.read_text() == state:
            return None
        digest = _hash(blob)
        if digest == blob.name:
            note.write_text(state)
            return None
        path.unlink()
        blob.unlink()
        return f"{path.name} has the hash {digest}, but the hub says {blob.name}"

    with ThreadPoolExecutor(4) as pool:
        wrong = [said for said in pool.map(check, blobs) if said is not None]
    if wrong:
        refusal = CheckpointError if name.kind == "model" else DatasetError
        raise refusal(
            f"{name} arrived damaged: {'; '.join(wrong)}. It was removed from the cache: run this again, which "
            "downloads it again"
        )


def _blob(path: Path) -> Path | None:
    """The file that a link of a snapshot leads to, whose name is its hash; ``None`` where there are no links."""
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()
    return blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None


def _hash(blob: Path) -> str:
    """SHA-256 of a large file, git's hash of a small one: whichever its name is."""
    digest = hashlib.sha256()
    if len(blob.name) == 40:
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    for part in _parts(blob):
        digest.update(part)
    return digest.hexdigest()


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            yield part
