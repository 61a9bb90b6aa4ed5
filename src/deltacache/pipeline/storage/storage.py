"""Where datasets lie: local folders and object stores, behind the same few calls.

Local places are ``pathlib.Path``; all others are fsspec's (``s3://``, ``gs://``, ``memory://`` ...), where an object
is there whole or not at all, nothing can be renamed, and folders do not exist. fsspec's cache of listings
is off, for other processes write into the same place. What may pass by itself (EIO, ESTALE, time-outs,
connections, HTTP 429 and 5xx) is tried again with growing pauses, as long as ``set_patience`` says.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec.config
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay
from typing_extensions import TypeIs
from upath import UPath

from deltacache.pipeline.storage.remote_files import (
    growing_pauses,
    is_remote,
    may_pass,
    patience_s,
    refused_place,
)
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.secrets import has_secrets, without_secrets

AnyPath: TypeAlias = Path | UPath
Result = TypeVar("Result")

_AT_ONCE = 64
_SAID_AFTER_S = 5.0
_S3_UPLOAD = {"chunksize": 1 << 24, "max_concurrency": 4}
"""At most 64 MiB of a file in memory; s3fs would take 500."""

for _protocol in ("s3", "s3a", "gs", "gcs", "abfs", "az"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def dataset_root(root: str | Path | UPath) -> UPath:
    """``root`` as the kind of path that its place needs: local ones are a ``pathlib.Path`` too.

    Raises:
        DatasetError: a url of a scheme that nobody knows, with one slash, of chained protocols, or with credentials.
    """
    place = str(root)
    if not isinstance(root, Path):
        scheme = place.partition("://")[0] if is_remote(place) else ""
        refused = refused_place(place, [scheme.lower()])
        if not refused and scheme and "::" in place:
            refused = f"{place} has '::' in it, which the url of a dataset cannot have: give another name"
        if not refused and scheme and has_secrets(place):
            refused = (
                f"{without_secrets(place)} was given with a user name, password or signature, which a dataset's url "
                "cannot have: give them as the store's own clients read them (AWS_*, fsspec's configuration)"
            )
        if refused:
            raise DatasetError(refused)
    try:
        path = UPath(root)
    except (ValueError, ImportError) as error:
        raise DatasetError(
            f"{place} cannot be opened: {error}. Give a folder, or a url of a store such as s3://bucket/folder"
        ) from error
    return UPath(path.path) if path.protocol in ("file", "local") and not isinstance(path, Path) else path


def is_local(path: AnyPath) -> TypeIs[Path]:
    """Whether ``path`` is on a file system of this machine, with renames and folders."""
    return isinstance(path, Path)


def retried(call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call until it succeeds, as long as what it raises may pass by itself and ``set_patience`` says."""
    seconds, said = patience_s(), False

    def say(state: RetryCallState) -> None:
        nonlocal said
        if not said and (state.seconds_since_start or 0) > _SAID_AFTER_S and state.outcome is not None:
            said = True
            error = state.outcome.exception()
            text = f"the output does not answer ({error}): trying again for up to {seconds:g} s"
            print(without_secrets(text), file=sys.stderr, flush=True)

    attempts = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(seconds),
        wait=growing_pauses(seconds),
        before_sleep=say,
        reraise=True,
    )
    return attempts(call, *arguments, **options)


def make_folder(folder: AnyPath) -> None:
    """Make a local folder and those above it; elsewhere nothing, least of all a bucket."""
    if is_local(folder):
        retried(folder.mkdir, parents=True, exist_ok=True)


def size_of(path: AnyPath) -> int | None:
    """Size of a file as it is now; None if it is not there."""
    try:
        return retried(path.stat).st_size if is_local(path) else retried(path.fs.info, path.path)["size"]
    except (FileNotFoundError, NotADirectoryError):
        return None


def names_in(folder: AnyPath) -> list[str]:
    """Sorted names of what is in ``folder`` now; none if it does not exist."""
    try:
        if is_local(folder):
            return retried(lambda: sorted(entry.name for entry in os.scandir(folder)))
        paths = retried(folder.fs.ls, folder.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    start = folder.path.rstrip("/") + "/"
    return sorted(
        name for path in paths if (name := path.rstrip("/").removeprefix(start)) and "/" not in name
    )


def sizes_in(folder: AnyPath) -> dict[str, int]:
    """Sizes of what is in ``folder`` now (of folders in it 0), by name; nothing if it does not exist.

    Of a store by one request.
    """
    try:
        if is_local(folder):
            return {
                entry.name: entry.stat().st_size if entry.is_file() else 0 for entry in os.scandir(folder)
            }
        infos = retried(folder.fs.ls, folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    start = folder.path.rstrip("/") + "/"
    return {
        name: info["size"] or 0
        for info in infos
        if (name := info["name"].rstrip("/").removeprefix(start)) and "/" not in name
    }


def read_many(paths: Iterable[AnyPath]) -> Iterator[bytes]:
    """The contents of files in one place, in order; from object stores many at once.

    Raises:
        OSError: one of them cannot be read.
    """
    rest = iter(paths)
    while batch := list(islice(rest, _AT_ONCE)):
        first = batch[0]
        if is_local(first):
            yield from (retried(path.read_bytes) for path in batch if is_local(path))
            continue
        fs: Any = first.fs
        names = [path.path for path in batch if not is_local(path)]
        # cat() would take [ and * for patterns; without a beginning, s3fs asks for the size first
        contents = fs.cat_ranges(names, 0, None, on_error="return")
        for name, content in zip(names, contents, strict=True):
            yield content if isinstance(content, bytes) else retried(fs.cat_file, name)


def read_range(path: UPath, offset: int, size: int) -> bytes:
    """``size`` bytes of an object, by one request.

    Raises:
        ValueError: it ends before.
        OSError: it is not there.
    """
    try:
        fetched: Any = retried(path.fs.cat_file, path.path, start=offset, end=offset + size) if size else b""
        content = bytes(fetched)
    except Exception as error:
        if getattr(error, "errno", None) != errno.EINVAL and getattr(error, "code", None) != 416:
            raise
        content = b""  # a range that begins after the end, as S3 and GCS say it
    if len(content) != size:
        raise ValueError(f"{path} has {len(content)} bytes at {offset}, must have {size}")
    return content


def put(path: UPath, content: bytes, *, exclusive: bool = False) -> None:
    """Write an object whole.

    Raises:
        FileExistsError: ``exclusive``, and it is there already.
    """
    mode = {"mode": "create"} if exclusive else {}
    retried(path.fs.pipe_file, path.path, content, **mode)


def fetch(path: UPath, file: Path) -> None:
    """Copy an object to a local file, by one request.

    Raises:
        OSError: it is not there.
    """
    retried(path.fs.get_file, path.path, str(file))


def upload(file: Path, path: UPath) -> None:
    """Make a local file an object, which appears when all of it has arrived."""
    options = _S3_UPLOAD if path.protocol in ("s3", "s3a") else {}
    retried(path.fs.put_file, str(file), path.path, **options)


def copy_object(source: UPath, target: UPath) -> None:
    """Copy an object within its store, whole.

    Raises:
        FileNotFoundError: ``source`` is not there.
    """
    try:
        retried(source.fs.cp_file, source.path, target.path)
    except NotImplementedError:  # such as sftp: it renames
        retried(source.fs.mv, source.path, target.path)


def objects_below(folder: UPath) -> list[UPath]:
    """All objects below ``folder``, or it alone if it is one."""
    start = folder.path.rstrip("/")
    paths = retried(folder.fs.find, start)
    return [folder / path[len(start) + 1 :] if path != start else folder for path in sorted(paths)]


def remove_object(path: UPath) -> None:
    """Remove an object if it is there."""
    with suppress(FileNotFoundError):
        retried(path.fs.rm_file, path.path)
