"""The sequences of any benchmark."""

from pathlib import Path

from deltacache.pipeline.benchmarks.cityscapes import cityscapes_sequences
from deltacache.pipeline.benchmarks.files import existing
from deltacache.pipeline.benchmarks.kitti import kitti_sequences
from deltacache.pipeline.benchmarks.vspw import vspw_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.texts import counted


def benchmark_sequences(
    benchmark: BenchmarkName, root: Path, counts: FrameCounts, kitti_split: Path | None = None
) -> SequenceSet:
    """List the labelled sequences below ``root``; see the modules of the single benchmarks.

    Raises:
        DatasetError: a file is missing, or no sequence is left.
    """
    existing(root)
    if benchmark == "vspw":
        found = vspw_sequences(root, counts)
    elif benchmark == "cityscapes":
        found = cityscapes_sequences(root, counts)
    else:
        found = kitti_sequences(root, counts, kitti_split)
    if not found.sequences:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.dropped.items())
        raise DatasetError(
            f"{root} has no sequence of {benchmark} to score ({reasons or 'no target'}): context and horizon "
            f"need {counted(counts.counts[0], 'frame')}"
        )
    return found
