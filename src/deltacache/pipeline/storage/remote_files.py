"""Files on object stores through fsspec, and which of their errors may pass when tried again."""

import errno
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ATTEMPTS = 4
_LONGEST_WAIT_S = 4.0
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
)
_CONNECTION_ERRORS = (
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("aiohttp.client_exceptions", "ClientConnectionError"),
    ("aiohttp.client_exceptions", "ClientPayloadError"),
)
_T = TypeVar("_T")


def is_remote(place: str) -> bool:
    """Whether ``place`` is a url such as ``s3://bucket/key``."""
    return _SCHEME.match(place) is not None


def filesystem_of(url: str) -> tuple[Any, str]:  # fsspec's annotations do not know detail=True
    """The file system of a url and the path that it uses there. Its settings are those of fsspec's
    configuration and of the client's environment (``AWS_ENDPOINT_URL`` and so on).

    Raises:
        ValueError, ImportError: there is no such protocol, or its package is not installed.
    """
    fs, path = url_to_fs(url)
    return fs, path


def url_of(fs: AbstractFileSystem, path: str) -> str:
    """The url of a path that ``fs`` gave."""
    return fs.unstrip_protocol(path)


def version_of(info: Mapping[str, Any]) -> str:
    """What tells that an object was replaced, from a listing: its ETag, else what the store has instead."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "created"):
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
    """Whether the same request may succeed a little later: I/O and connections, HTTP 429 and 5xx."""
    status = _http_status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return isinstance(error, tuple(_loaded(_CONNECTION_ERRORS)))


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)  # botocore's
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = metadata.get("HTTPStatusCode") or getattr(error, "status", None)
    if status is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            status = getattr(error, "code", None)  # gcsfs's, a number or a text
    return int(str(status)) if re.fullmatch(r"[1-5]\d\d", str(status)) else None


def retried(call: Callable[[], _T]) -> _T:
    """``call()``, tried up to four times while its errors may pass."""
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT_S),
        reraise=True,
    )
    return retrying(call)


def explain(error: BaseException) -> str:
    """The error in words that name no path: the same failure says the same wherever the collection lies."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError):
        number = errno.ENOENT
    elif isinstance(error, PermissionError):
        number = errno.EACCES
    if number is not None:
        return os.strerror(number)
    status = _http_status(error)
    return type(error).__name__ if status is None else f"{type(error).__name__}, HTTP status {status}"
