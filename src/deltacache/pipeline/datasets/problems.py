"""What verification finds, and what repairing does about it."""

from dataclasses import dataclass
from enum import StrEnum


class Remedy(StrEnum):
    """What ``verify --repair`` does about a problem."""

    DROP_SHARD = "the shard is dropped"
    REMOVE = "the file is removed"
    REBUILD_PLAN = "the plan is made again from the receipts"
    MERGE = "the tables are merged again"
    REWRITE_GROUP = "the group's metadata are written again"
    SWEEP = "what dead commands left is removed"
    RERUN = "nothing: the command that made the dataset finishes it"
    LEAVE = "nothing: it may be yours"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: in which file (relative to the dataset), and of which clip if it is one's.

    Attributes:
        shard_id: of the shard that the file belongs to, if it does.
    """

    file: str
    clip_id: str | None
    message: str
    remedy: Remedy = Remedy.LEAVE
    shard_id: str | None = None

    def __str__(self) -> str:
        clip = "" if self.clip_id is None else f" (clip {self.clip_id})"
        return f"{self.file}{clip}: {self.message}"
