"""What labelled sequences are, for the id of a run: another label gives another id."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from deltacache.pipeline.storage.parallel import in_threads
from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.fingerprints import fingerprint_of

_THREADS = 16


def content_of(
    sequences: Sequence[LabelledSequence], labels_of: Callable[[LabelledSequence], Iterable[str | Path]]
) -> str:
    """Of names and sizes of all frames, which would take long to read, and of the bytes of the labels that are used."""

    def content(each: LabelledSequence) -> list[object]:
        frames = [Path(path) for path in each.frames]
        labels = [sha256(Path(path).read_bytes()).hexdigest() for path in labels_of(each)]
        return [each.sequence_id, *([path.name, path.stat().st_size] for path in frames), *labels]

    return fingerprint_of({"files": list(in_threads(content, sequences, threads=_THREADS))})
