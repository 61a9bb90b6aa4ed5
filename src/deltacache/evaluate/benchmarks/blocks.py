"""Fixed blocks of sequences: the unit of work, of resuming and of splitting over processes.

A finished block is a folder ``parts/<dataset>-<number>`` in the output: its sums, its timing and its examples,
written whole. What blocks there are depends on the sequences alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate.benchmarks.timing import Timing, timing_from
from deltacache.evaluate.output import EXAMPLES, PARTS, STATISTICS, TIMING
from deltacache.pipeline.storage.atomic import remove, remove_leftovers, replacing_folder
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.errors import DatasetError

BLOCK_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive sequences of one benchmark; ``examples`` are the ids of those that are kept for pictures."""

    dataset: BenchmarkName
    number: int
    sequences: tuple[LabelledSequence, ...]
    examples: frozenset[str]

    @property
    def name(self) -> str:
        """Safe as a folder's name."""
        return f"{self.dataset}-{self.number:05d}"


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a worker hands over. ``examples``: contents of files by name."""

    statistics: pa.Table
    timing: Timing
    examples: dict[str, bytes]


def blocks_of(
    dataset: BenchmarkName, sequences: Sequence[LabelledSequence], examples: frozenset[str]
) -> Iterator[Block]:
    """Cut the sequences into blocks, in order."""
    for number, start in enumerate(range(0, len(sequences), BLOCK_SEQUENCES)):
        part = tuple(sequences[start : start + BLOCK_SEQUENCES])
        kept = frozenset(each.sequence_id for each in part) & examples
        yield Block(dataset, number, part, kept)


class Parts:
    """The finished blocks of one run. Those of another run in the same folder are refused."""

    def __init__(self, out: Path, run_id: str) -> None:
        self._folder = out / PARTS / run_id
        self._out, self._run_id = out, run_id

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            DatasetError: an unfinished evaluation of other inputs is there.
        """
        others = (
            [path.name for path in self._folder.parent.iterdir() if path.name != self._run_id]
            if self._folder.parent.is_dir()
            else []
        )
        if others:
            raise DatasetError(
                f"{self._out} holds an unfinished evaluation of other inputs ({others[0]}; this one is "
                f"{self._folder.name}): choose another folder, or remove {self._folder.parent}"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)

    def has(self, block: Block) -> bool:
        """Whether the block is finished."""
        return (self._folder / block.name).is_dir()

    def write(self, block: Block, result: BlockResult) -> None:
        """Keep a finished block, whole or not at all."""
        with replacing_folder(self._folder / block.name) as folder:
            pq.write_table(result.statistics, folder / STATISTICS)
            (folder / TIMING).write_text(json.dumps(asdict(result.timing)))
            (folder / EXAMPLES).mkdir()
            for name, content in result.examples.items():
                (folder / EXAMPLES / name).write_bytes(content)

    def statistics(self, block: Block) -> pa.Table:
        """The sums of a finished block."""
        return pq.read_table(self._folder / block.name / STATISTICS)

    def timing(self, block: Block) -> Timing:
        """What a finished block took."""
        return timing_from(json.loads((self._folder / block.name / TIMING).read_bytes()))

    def examples(self, block: Block) -> list[Path]:
        """Files of the examples of a finished block."""
        return sorted((self._folder / block.name / EXAMPLES).iterdir())

    def remove(self) -> None:
        """Remove all blocks: their tables are made."""
        remove(self._folder.parent)
