"""Errors that are the user's business: one readable message, exit code 1, no traceback.

Anything that is not one of these is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from deltacache.schemas.secrets import without_secrets


class DeltacacheError(Exception):
    """Something was refused or failed. The message names the value, the rule and the way out; no credentials."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class SettingsError(DeltacacheError):
    """A setting is unknown, out of bounds, or does not go with another one: wrong usage."""


class DatasetError(DeltacacheError):
    """A dataset folder is missing, damaged, of another kind, or holds something else."""


class OtherEvaluationError(DatasetError):
    """A folder holds another evaluation, whose tables are not overwritten."""


class StorageError(DatasetError):
    """A disk or an object store refuses or does not answer; what lies there may be well.

    Attributes:
        passing: what a local disk said may pass, and whoever writes the file again may succeed.
    """

    passing = False


class CheckpointError(DeltacacheError):
    """A checkpoint is missing, damaged, or its tensors do not fit the model."""


class MismatchError(DeltacacheError):
    """Two things that do not belong together were combined; the message names both fingerprints."""


class NotFiniteError(DeltacacheError):
    """Features, predictions or labels hold NaN or infinity; the message says whose and where."""


class FailureReason(StrEnum):
    """Why a video or clip was refused: the closed list of ``failures.parquet``."""

    EMPTY_FILE = "empty_file"  # zero bytes
    NOT_A_VIDEO = "not_a_video"  # no demuxer recognises the content
    NO_VIDEO_STREAM = "no_video_stream"  # a media file without pictures (audio only)
    TRUNCATED = "truncated"  # the header is there, the frames it needs are not
    CORRUPT_STREAM = "corrupt_stream"  # the decoder reports damage, or frames are missing
    NO_FRAMES = "no_frames"  # a video stream that decodes to nothing
    NO_TIMES = "no_times"  # frames that are only counted, and nobody said how many a second has
    TOO_SHORT = "too_short"  # the sampled span does not fit and duplicates are refused
    TOO_SMALL = "too_small"  # fewer pixels than a crop needs
    ENCRYPTED = "encrypted"  # protected by DRM or a password
    COMPRESSED_ARCHIVE = "compressed_archive"  # a compressed tar: it must be unpacked first
    TOO_LARGE = "too_large"  # its copy needs more temporary space than one video may take
    UNSUPPORTED_CODEC = "unsupported_codec"  # no decoder in this installation
    DECODER_CRASHED = (
        "decoder_crashed"  # the child process died, or an error other than a refusal was raised in it
    )
    DECODE_TIMEOUT = "decode_timeout"  # the child process outlived its time limit
    OUT_OF_MEMORY = "out_of_memory"  # the child process hit its memory limit
    ENCODE_FAILED = "encode_failed"  # the encoder fails, or its process dies, with this video
    UNREADABLE = "unreadable"  # the file cannot be opened or read (missing, permissions)
    UNAVAILABLE = "unavailable"  # I/O or its store failed in a way that may pass; every run tries it again


class VideoRefusedError(DeltacacheError):
    """One video cannot be used. Costs that video a row in ``failures.parquet``, never the job."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(f"{reason.value}: {message}")
        self.reason = reason
        self.message = without_secrets(message)


# ----------------------------------------------------------------------------------------------------
# What a config refuses, in words: the value, the rule, and the names that there are.
# ----------------------------------------------------------------------------------------------------


_LONGEST = 80
"""Characters of a value that are shown."""


def problems_of(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """All problems in one line. ``kind`` is what was validated: its fields are named where one is unknown."""
    return "; ".join(dict.fromkeys(_problem(each, kind) for each in error.errors(include_url=False)))


def closest_first(name: str, known: Sequence[str]) -> list[str]:
    """``known`` by how much they look like ``name``."""
    return sorted(known, key=lambda each: -SequenceMatcher(None, name, each).ratio())


def _problem(each: Any, kind: type[BaseModel] | None) -> str:
    place = ".".join(_readable(part) for part in each["loc"])
    if each["type"] == "missing":
        return f"{place} is missing: give it"
    message = each["msg"].removeprefix("Value error, ")
    if each["type"] == "extra_forbidden":
        message = _unknown(each["loc"], kind)
    shown = without_secrets(repr(each["input"]))
    got = f" (got {shown})" if place and len(shown) <= _LONGEST else ""
    return f"{place}: {message}{got}" if place else message


def _readable(part: int | str) -> str:
    """Without what pydantic writes around the name of one of several kinds."""
    text = str(part)
    return text.removesuffix("]").rpartition(", ")[2] if text.startswith("function-") else text


def _unknown(place: Sequence[int | str], kind: type[BaseModel] | None) -> str:
    owner = kind if kind is None else _model_at(kind, place[:-1])
    if owner is None:
        return "is not known: leave it out"
    names = closest_first(str(place[-1]), list(owner.model_fields))
    return f"is not known: give {', '.join(names)}, or leave it out"


def _model_at(kind: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    """The kind of what lies at ``place``."""
    at: Any = kind
    for part in place:
        at = _within(at, part)
    return next(_models(at), None)


def _within(kind: Any, part: int | str) -> Any:
    """Of a model its field, of several kinds the one that is named so, of a mapping or a tuple what it holds."""
    named = [model for model in _models(kind) if model.__name__ == _readable(part)]
    if named:
        return named[0]
    for model in _models(kind):
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    return _held(kind)


def _held(kind: Any) -> Any:
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping | Sequence):
        return get_args(kind)[-1] if get_origin(kind) is not tuple else get_args(kind)[0]
    return next((found for each in get_args(kind) if (found := _held(each)) is not None), None)


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type says a value may be, its containers left out."""
    origin = get_origin(kind)
    if isinstance(kind, type) and origin is None:
        if issubclass(kind, BaseModel):
            yield kind
    elif not (isinstance(origin, type) and issubclass(origin, Mapping | Sequence)):
        for each in get_args(kind):
            yield from _models(each)


def out_of_memory_text(error: BaseException) -> str:
    """What torch's ``OutOfMemoryError`` means to a user of any command, in one line."""
    return (
        "out of memory on the GPU: free memory there, make the work smaller (--batch-size, --image-size, --samples: "
        f"what the command has), or give --device cpu. PyTorch says: {str(error).splitlines()[0]}"
    )
