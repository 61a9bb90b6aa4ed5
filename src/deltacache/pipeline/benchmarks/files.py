"""Files of a benchmark's tree; what is missing is said with its name."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deltacache.schemas.errors import DatasetError
from deltacache.schemas.texts import decoded

_LOSSLESS = (".png",)
_PICTURES = (".png", ".jpg", ".jpeg")


def existing(path: Path) -> Path:
    """``path``, if it is there.

    Raises:
        DatasetError: it is not.
    """
    if not path.exists():
        raise DatasetError(
            f"{path} is missing: the folder must have the published layout (docs/evaluation.md)"
        )
    return path


def existing_label(path: Path) -> Path:
    """A label or depth map; its suffix may be in capitals.

    Raises:
        DatasetError: it is not there.
    """
    return existing(_with_suffix(path, _LOSSLESS))


def existing_picture(path: Path) -> Path:
    """A frame; its suffix may be in capitals, and it may have been converted between PNG and JPEG.

    Raises:
        DatasetError: it is not there.
    """
    return existing(_with_suffix(path, (path.suffix, *_PICTURES)))


def _with_suffix(path: Path, suffixes: Sequence[str]) -> Path:
    """``path``, or the first file that is there of those that differ from it in one of these suffixes."""
    if path.is_file():
        return path
    ways = (
        path.with_suffix(cased) for suffix in suffixes for cased in (suffix, suffix.upper(), suffix.lower())
    )
    return next((way for way in ways if way.is_file()), path)


def lines_of(path: Path) -> list[str]:
    """Lines of a text file that are not empty; see ``numbered_lines``."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file that are not empty, with their numbers from 1.

    Raises:
        DatasetError: it is missing or not a text file.
    """
    try:
        lines = decoded(existing(path).read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): give a text file") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def names_in(folder: Path, suffix: str) -> list[str]:
    """Sorted names of a folder's files that end on ``suffix``, in capitals or not; hidden ones are left out.

    Raises:
        DatasetError: the folder is missing, or two names differ in nothing but capitals behind the stem.
    """
    names = sorted(
        path.name
        for path in existing(folder).iterdir()
        if path.name.casefold().endswith(suffix.casefold()) and not path.name.startswith(".")
    )
    stems = Counter(name[: -len(suffix)] for name in names)
    if twice := next((stem for stem, count in stems.items() if count > 1), None):
        raise DatasetError(
            f"{folder} holds {twice}{suffix} twice, with its ending in capitals and without: remove one of them"
        )
    return names


def safe_id(name: str) -> str:
    """``name`` with what is not a letter, digit, ``_`` or ``-`` replaced: it becomes part of file names."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
