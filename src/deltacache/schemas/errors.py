"""Errors that are the user's business: one readable message, exit code 1, no traceback.

Anything that is not one of these is a bug of ours and keeps its traceback.
"""

from enum import StrEnum

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
