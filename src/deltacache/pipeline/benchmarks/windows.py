"""Which frames stand before a labelled one, and what is left out for want of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.texts import counted


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """How many frames sequences may have, ascending: context plus horizon, for each horizon.

    A sequence takes the largest count that its video has frames for; without frames for the smallest it is
    dropped.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"frame counts {self.counts} must be ascending and positive")

    def fit(self, available: int) -> int | None:
        """The largest count of at most ``available`` frames."""
        return max((count for count in self.counts if count <= available), default=None)


@dataclass(frozen=True, slots=True)
class SequenceSet:
    """The sequences of one benchmark in a fixed order, and how many targets were dropped for which reason."""

    sequences: tuple[LabelledSequence, ...]
    dropped: Mapping[str, int]


def choose(candidates: Iterable[LabelledSequence], counts: FrameCounts, dropped: Counter[str]) -> SequenceSet:
    """Cut each candidate, which holds all the frames there are, to the frames that are used.

    Raises:
        DatasetError: two sequences have the same id.
    """
    chosen: list[LabelledSequence] = []
    for each in candidates:
        count = counts.fit(len(each.frames))
        if count is None:
            dropped[f"fewer than {counted(counts.counts[0], 'frame')} up to the target"] += 1
        else:
            chosen.append(replace(each, frames=each.frames[-count:]))
    ids = Counter(each.sequence_id for each in chosen)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise DatasetError(f"{twice[0]} is listed {ids[twice[0]]} times: list every target once")
    return SequenceSet(tuple(chosen), dict(dropped))


def frame_numbers(target: int, step: int, first: int, most: int) -> Sequence[int]:
    """At most ``most`` numbers ``target - k * step`` that are not before ``first``, ascending."""
    count = min(most, (target - first) // step + 1)
    return range(target - (count - 1) * step, target + 1, step)
