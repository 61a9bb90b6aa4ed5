"""What a disk or an object store refuses, as one readable error with the way out."""

import errno
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from upath import UPath

from deltacache.pipeline.storage.storage import AnyPath, fetch, is_local, may_pass, read_many
from deltacache.schemas.errors import StorageError

_LIBRARIES = frozenset(
    {"botocore", "aiobotocore", "aiohttp", "requests", "fsspec", "s3fs", "gcsfs", "google", "adlfs", "azure"}
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUCKET = re.compile(r"bucket (does not exist|is not valid|name)|NoSuchBucket", re.IGNORECASE)
_DENIED = re.compile(r"forbidden|denied|\b403\b", re.IGNORECASE)


@contextmanager
def readable_errors(target: AnyPath, doing: Literal["written", "read"] = "written") -> Iterator[None]:
    """Turn what the system or the store refuses at ``target`` into an error that says what to do.

    Raises:
        StorageError: instead of an ``OSError`` or an error of a storage library.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        kept = "what was finished is kept. " if doing == "written" else ""
        refused = StorageError(f"{target} cannot be {doing} ({said.strip()}): {kept}{way_out(error, target)}")
        refused.passing = is_local(target) and may_pass(error)
        raise refused from error


def is_refusal(error: BaseException) -> bool:
    """Whether an error comes from a file system or a storage library, and not from a mistake of ours."""
    if isinstance(error, OSError) or (isinstance(error, ImportError) and "install" in str(error).lower()):
        return True
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


def is_damage(error: Exception) -> bool:
    """Whether an error says that a file is missing or cut off, not that its store refuses or is away."""
    if isinstance(error, ValueError):
        return True
    return isinstance(error, FileNotFoundError) and not _BUCKET.search(str(error))


def way_out(error: Exception, target: AnyPath) -> str:
    """What to do about an error for which ``is_refusal`` holds."""
    code, names = getattr(error, "errno", None), [kind.__name__ for kind in type(error).__mro__]
    full = code in _FULL
    if is_local(target):
        cases = {
            "Make room, or give an output folder on another disk": full,
            "The file system is mounted read-only: mount it for writing, or give another": code
            == errno.EROFS,
            "Make room, or give write permission": True,
        }
    else:
        away = any("Connect" in name or "Timeout" in name for name in names)
        cases = {
            f"Make room in {tempfile.gettempdir()} for one shard, or set TMPDIR to a larger folder": full,
            "Install that package": isinstance(error, ImportError),
            "Set the credentials of the store, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE": (
                any("Credential" in name for name in names)
            ),
            "Let these credentials list, read, write and delete there, or use others": (
                isinstance(error, PermissionError) or bool(_DENIED.search(str(error)))
            ),
            "Create the bucket, or correct its name": bool(_BUCKET.search(str(error))),
            "The store does not answer: check the network and its address (for S3 AWS_ENDPOINT_URL)": away,
            "See what the store says": True,
        }
    return f"{next(text for text, holds in cases.items() if holds)}, and run the command again"


def read_file(path: AnyPath) -> bytes:
    """The content of a small file.

    Raises:
        OSError: it is missing or broken, such as a folder in its place.
        StorageError: the system or the store refuses, or does not answer.
    """
    try:
        return next(read_many([path]))
    except Exception as error:
        if is_damage(error) or (is_local(path) and not isinstance(error, PermissionError)):
            raise
        with readable_errors(path, "read"):
            raise


def fetch_file(path: UPath, local: Path) -> None:
    """Copy a file of any size from an object store to a local file.

    Raises:
        OSError: it is missing.
        StorageError: the store refuses, or does not answer, or the disk is full.
    """
    try:
        fetch(path, local)
    except Exception as error:
        if is_damage(error):
            raise
        with readable_errors(path, "read"):
            raise
