"""How descriptions are laid out, and what can be said of any folder: its size, and who writes to it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltacache.chain.terminal import duration
from deltacache.pipeline.datasets.inspection import readable_size
from deltacache.pipeline.storage.locking import read_lock
from deltacache.pipeline.storage.storage import AnyPath

_WIDTH = 22


def line(name: str, value: object) -> str:
    """A fact under its name."""
    return f"  {name:<{_WIDTH}} {value}"


def size_of(path: Path) -> str:
    """Bytes of a file, or of all files below a folder; those that vanish meanwhile do not count."""
    files = [path] if path.is_file() else path.rglob("*")
    total = 0
    for each in files:
        try:
            total += each.stat().st_size if each.is_file() else 0
        except FileNotFoundError:
            continue
    return readable_size(total)


def running(root: AnyPath) -> Iterator[str]:
    """What a command that is writing to ``root``, or died while it did, says of itself."""
    lock = read_lock(root)
    if lock is None:
        return
    where = f"process {lock.pid} on {lock.host}, since {lock.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if not lock.alive:
        yield f"  stopped      {lock.command} ({where}) has died: run it again"
        return
    yield f"  running      {lock.command} ({where})"
    if lock.status:
        yield f"               {_progress(lock.status)}"


def _progress(status: Mapping[str, Any]) -> str:
    if "planned_clips" not in status:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in status.items())
    left = status["seconds_left"]
    return (
        f"{status['clips']} of {status['planned_clips']} clips of this run, "
        f"{status['clips_per_s']:.1f} clips/s, {status['failed_videos']} videos refused, "
        f"{'time left not known yet' if left is None else duration(left) + ' left'}"
    )
