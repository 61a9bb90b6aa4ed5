"""Files on object stores and web servers through fsspec, and which of their errors may pass when tried again."""

import errno
import hashlib
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from tenacity.wait import wait_base

from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.secrets import has_secrets, without_secrets

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
        return f"{chain} chains protocols, which is not opened: give the url of the file itself"
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


def retried(call: Callable[[], _T], host: str = "") -> _T:
    """``call()``, tried again with growing pauses while its errors may pass, for as long as ``set_patience`` says.

    A ``host`` that failed for so long is asked once, until it answers: a thousand videos of it must not wait each.
    """
    seconds = 0.0 if host in _failing else patience_s()
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(seconds),
        wait=growing_pauses(seconds),
        reraise=True,
    )
    try:
        result = retrying(call)
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
