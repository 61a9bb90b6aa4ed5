"""Where datasets lie: local folders and object stores, behind the same few calls.

Local places are ``pathlib.Path``; all others are fsspec's (``s3://``, ``gs://``, ``memory://`` ...), where an object
is there whole or not at all, nothing can be renamed, and folders do not exist. fsspec's cache of listings
is off, for other processes write into the same place. What may pass by itself (EIO, ESTALE, time-outs,
connections, HTTP 429 and 5xx) is tried again with growing pauses, as long as ``set_patience`` says.
"""

import errno
import hashlib
import os
import re
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec
import fsspec.config
from fsspec import AbstractFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from tenacity.wait import wait_base
from typing_extensions import TypeIs
from upath import UPath

from deltacache.schemas.errors import DatasetError, FailureReason, VideoRefusedError
from deltacache.schemas.secrets import has_secrets, without_secrets

# ----------------------------------------------------------------------------------------------------
# Files on object stores and web servers through fsspec, and which of their errors may pass when tried again.
# ----------------------------------------------------------------------------------------------------


KNOWN_SCHEMES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "memory", "file", "local"}
)
"""What entries of lists may begin with; ``--allow-scheme`` adds others by name."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_CHAINED = re.compile(r"(?:[a-z][a-z0-9+.-]*(?:://[^:]*)?::)+[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)", re.IGNORECASE)
_ENCODED = re.compile(r"(?:[!$&-;=?-Z\[\]_a-z~#]|%[0-9a-f]{2})*", re.IGNORECASE)
_LONGEST_WAIT_S = 30.0
# fmt: off
_PASSING = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.ENETDOWN,
    errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN, errno.EREMOTEIO,
})
# fmt: on
# What clients of stores raise beside OSError, and what of that is about the connection. They are looked up
# among loaded modules: a client that is not loaded has raised nothing.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp.client_exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
_CONNECTION_ERRORS = (
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("aiohttp.client_exceptions", "ClientConnectionError"),
    ("aiohttp.client_exceptions", "ClientPayloadError"),
    ("azure.core.exceptions", "ServiceRequestError"),
    ("azure.core.exceptions", "ServiceResponseError"),
)
_T = TypeVar("_T")


class _Patience:
    """Seconds for which what may pass is tried again, in this process."""

    seconds = 300.0


_failing: set[str] = set()
_at_most: ContextVar[float] = ContextVar("at_most", default=float("inf"))


def set_patience(seconds: float) -> None:
    """For how long errors that may pass are tried again from now on; see ``DecodeLimits.retry_s``."""
    _Patience.seconds = seconds


def patience_s() -> float:
    """For how many seconds errors that may pass are tried again here."""
    return min(_Patience.seconds, _at_most.get())


@contextmanager
def patience_of_at_most(seconds: float) -> Iterator[None]:
    """Within the block, and in this thread, errors that may pass are not tried again for longer."""
    token = _at_most.set(seconds)
    try:
        yield
    finally:
        _at_most.reset(token)


def growing_pauses(seconds: float) -> wait_base:
    """Pauses between tries that go on for ``seconds``."""
    return wait_random_exponential(multiplier=0.2, max=min(_LONGEST_WAIT_S, seconds / 4))


def is_remote(place: str) -> bool:
    """Whether ``place`` is a url such as ``s3://bucket/key``."""
    return _SCHEME.match(place) is not None


def is_http(place: str) -> bool:
    """Whether ``place`` is on a web server, where ``?`` and ``#`` end the path."""
    return place[:8].lower().startswith(("http://", "https://"))


def split_query(url: str) -> tuple[str, str]:
    """The url of a file without its query and the query with its mark; of other stores ``?`` is part of a name.

    What follows ``#`` is never sent to a server, so there it is taken for a part of the name unless the name
    is whole without it: ``a#1.mp4`` becomes ``a%231.mp4``, ``a.mp4#t=10`` becomes ``a.mp4``.
    """
    if not is_http(url):
        return url, ""
    path, mark, query = url.partition("?")
    name, sharp, _ = path.partition("#")
    if sharp and not re.search(r"\.[a-z0-9]{2,5}$", name, re.IGNORECASE):
        name = path.replace("#", "%23")
    return name, mark + query.partition("#")[0]


def refused_place(place: str, schemes: Iterable[str] = ()) -> str:
    """Why a path or url is not opened, "" if it is: of a scheme that is not known, or chained protocols.

    Args:
        schemes: names that are allowed beside the known ones.
    """
    if _CHAINED.match(place) and not os.path.exists(place):  # noqa: PTH110 - a file may be called so
        chain = without_secrets(place).rpartition("://")[0]
        return f"{chain} chains protocols, which is not supported: give the url of the file itself"
    allowed = {*KNOWN_SCHEMES, *schemes}
    remote = allowed - {"file", "local"}
    slash = _ONE_SLASH.match(place)
    if slash and slash[1].lower() in remote:
        return f"{place} has one slash behind its scheme: give {slash[1]}://{place[slash.end() :]}"
    match = _SCHEME.match(place)
    if match is None or match[1].lower() in allowed:
        return ""
    known = ", ".join(sorted(remote - {"memory"}))
    return f"scheme {match[1]} is not opened, only {known}: --allow-scheme {match[1]} allows it"


def filesystem_of(url: str) -> tuple[Any, str]:  # fsspec's annotations do not know detail=True
    """The file system of a url and the path that it uses there. Its settings are those of fsspec's
    configuration and of the client's environment (``AWS_ENDPOINT_URL`` and so on).

    Nothing in the url is taken for a chain of protocols: ``::`` may be part of a name.

    Raises:
        ValueError, ImportError: there is no such protocol, or its package is not installed.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    if scheme in ("s3", "s3a", "gs", "gcs") and has_secrets(url.partition("?")[0]):
        raise ValueError(
            f"user name and password in {without_secrets(url)}: {scheme} takes its credentials from the environment"
        )
    kind = fsspec.get_filesystem_class(scheme)
    options = kind._get_kwargs_from_urls(url)
    if is_http(url):
        options["encoded"] = _ENCODED.fullmatch(url) is not None  # or signatures would be encoded again
    path = kind._strip_protocol(url)
    if scheme == "memory":  # which leaves names with :: as they are
        path = f"/{path.lstrip('/')}"
    return fsspec.filesystem(scheme, **options), path


def info_of(fs: Any, path: str) -> dict[str, Any]:
    """``fs.info`` asked again; its error is the server's: fsspec says of every HTTP status that there is no file.

    Raises:
        FileNotFoundError: it is not there; other errors of clients as they are.
    """
    fs.invalidate_cache(path)
    try:
        return fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, client_errors()) and _http_status(cause) not in (404, 410):
            raise cause from None
        raise


def url_of(fs: AbstractFileSystem, path: str) -> str:
    """The url of a path that ``fs`` gave."""
    return fs.unstrip_protocol(path)


def version_of(info: Mapping[str, Any]) -> str:
    """What tells that an object was replaced, from a listing: its ETag, else what the store has instead."""
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "generation",
        "mtime",
        "LastModified",
        "created",
        "Last-Modified",
        "Content-MD5",
        "Digest",
    ):
        value = info.get(key)
        if isinstance(value, datetime):  # a store's listing and its answer for one file may differ in kind
            value = value.timestamp()
        if value:
            return str(value).strip('"')
    return ""


def frames_version(frames: Iterable[tuple[str, str]]) -> str:
    """Of a folder of frames on a store, from names and versions in the order of names."""
    about = "".join(f"{name}\0{version}\n" for name, version in frames)
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def client_errors() -> tuple[type[BaseException], ...]:
    """What reading from a store may raise."""
    return (OSError, TimeoutError, *_loaded(_CLIENT_ERRORS))


def _loaded(names: tuple[tuple[str, str], ...]) -> Iterator[type[BaseException]]:
    for module, name in names:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            yield kind


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: I/O and connections, HTTP 408, 425, 429 and 5xx."""
    status = _http_status(error)
    if status is not None:
        return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, socket.gaierror) or isinstance(getattr(error, "os_error", None), socket.gaierror):
        return getattr(error, "errno", None) == socket.EAI_AGAIN
    if isinstance(error, tuple(_loaded(_CONNECTION_ERRORS))):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING


def _http_status(error: BaseException) -> int | None:
    """Of the answer that an error is about; s3fs has the answer in the cause of its own error."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)  # botocore's
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = metadata.get("HTTPStatusCode") or getattr(each, "status", None)
        status = status or getattr(each, "status_code", None)  # azure's
        if status is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                status = getattr(each, "code", None)  # gcsfs's, a number or a text
        if re.fullmatch(r"[1-5]\d\d", str(status)):
            return int(str(status))
    return None


def _attempts(seconds: float, before_sleep: Callable[[RetryCallState], None] | None = None) -> Retrying:
    """What sources and outputs share: errors that may pass, tried again with growing pauses."""
    return Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(seconds),
        wait=growing_pauses(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )


def retried_call(call: Callable[[], _T], host: str = "") -> _T:
    """``call()``, tried again with growing pauses while its errors may pass, for as long as ``set_patience`` says.

    A ``host`` that failed for so long is asked once, until it answers: a thousand videos of it must not wait each.
    """
    seconds = 0.0 if host in _failing else patience_s()
    try:
        result = _attempts(seconds)(call)
    except Exception as error:
        if host and may_pass(error):
            _failing.add(host)
        raise
    _failing.discard(host)
    return result


def host_of(url: str) -> str:
    """Scheme and host or bucket of a url, "" of a path."""
    return without_secrets("/".join(url.split("/", 3)[:3])) if is_remote(url) else ""


def is_answer(error: BaseException) -> bool:
    """Whether a server answered, if only with an error."""
    return _http_status(error) is not None


def refusal_of(error: BaseException) -> VideoRefusedError:
    """What reading a video gives when a client's error stays: its row says whether it may pass."""
    if may_pass(error):
        message = f"{explain(error)}, also when tried again for {_Patience.seconds:g} s"
        return VideoRefusedError(FailureReason.UNAVAILABLE, message)
    if isinstance(error, ImportError | ValueError):
        return VideoRefusedError(FailureReason.UNREADABLE, f"{error}")
    return VideoRefusedError(FailureReason.UNREADABLE, explain(error))


def explain(error: BaseException) -> str:
    """The error in words that name no path: the same failure says the same wherever the collection lies."""
    if isinstance(error, socket.gaierror) or isinstance(getattr(error, "os_error", None), socket.gaierror):
        return "the name of its host is not known"
    if any("Credential" in kind.__name__ for kind in type(error).__mro__):
        return (
            f"{type(error).__name__}: set the credentials of the store, for S3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        )
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError):
        number = errno.ENOENT
    elif isinstance(error, PermissionError):
        number = errno.EACCES
    if number is not None:
        return os.strerror(number)
    status = _http_status(error)
    return type(error).__name__ if status is None else f"{type(error).__name__}, HTTP status {status}"


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

    return _attempts(seconds, say)(call, *arguments, **options)


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
        exact = {"cache_type": "none"} if path.protocol == "hf" else {}  # it would read 5 MiB ahead
        fetched: Any = (
            retried(path.fs.cat_file, path.path, start=offset, end=offset + size, **exact) if size else b""
        )
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


# ----------------------------------------------------------------------------------------------------
# Working on many items in threads, a bounded number ahead: results in order, memory that does not grow.
# ----------------------------------------------------------------------------------------------------


Item = TypeVar("Item")


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int | None = None
) -> Generator[Result]:
    """The results of ``work`` in the order of ``items``; at most ``ahead`` (twice the threads) wait to be taken.

    For work that waits or leaves the interpreter: files, object stores, checksums. The first error ends it.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="deltacache") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= (ahead or 2 * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
