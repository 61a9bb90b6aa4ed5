"""Text as people's programs write it, and counts and sizes as people read them."""

import codecs
from collections.abc import Sequence


def counted(number: float, one: str, several: str = "", form: str = "") -> str:
    """A count and its noun: ``1 clip``, ``2 clips``.

    Args:
        several: the plural where it is not ``one`` with an s, such as ``entries``, or ``shards are`` of ``shard is``.
        form: of the number: "," separates thousands.
    """
    return f"{number:{form}} {one if number == 1 else several or f'{one}s'}"


def bytes_text(size: float) -> str:
    """A size in memory: ``5.8 MiB``, ``1.25 GiB``, ``139 GiB``."""
    return _in_units(size, 1024, ("KiB", "MiB", "GiB", "TiB"))


def disk_text(size: float) -> str:
    """A size on a disk, in the units that disks are sold in: ``5.8 MB``, ``1.25 GB``, ``805 TB``."""
    return _in_units(size, 1000, ("kB", "MB", "GB", "TB"))


def _in_units(size: float, step: int, units: Sequence[str]) -> str:
    """Three digits that count, in the largest unit of which there is a whole one."""
    if size < step:
        return counted(round(size), "byte")
    place = next((at for at in range(len(units)) if size < step ** (at + 2)), len(units) - 1)
    value = size / step ** (place + 1)
    return f"{value:,.0f} {units[place]}" if value >= 100 else f"{value:.3g} {units[place]}"


def decoded(content: bytes) -> str:
    """The text of a file, without its byte-order mark: UTF-8, with or without one, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is neither UTF-8 nor, with a mark, UTF-16 or UTF-32.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return content.decode("utf-32")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")
