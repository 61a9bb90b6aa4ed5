"""Files of a benchmark's tree; what is missing is said with its name."""

import re
from pathlib import Path

from deltacache.schemas.errors import DatasetError


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


def lines_of(path: Path) -> list[str]:
    """Lines of a text file that are not empty; see ``numbered_lines``."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file that are not empty, with their numbers from 1.

    Raises:
        DatasetError: it is missing or no text.
    """
    try:
        lines = existing(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): give a text file") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def names_in(folder: Path, suffix: str) -> list[str]:
    """Sorted names of a folder's files that end on ``suffix``.

    Raises:
        DatasetError: the folder is missing.
    """
    return sorted(
        path.name
        for path in existing(folder).iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(".")
    )


def safe_id(name: str) -> str:
    """``name`` with what is no letter, digit, ``_`` or ``-`` replaced: it becomes part of file names."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
