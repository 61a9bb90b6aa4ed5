"""Text as people's programs write it, and counts as people read them."""

import codecs


def counted(number: float, one: str, several: str = "", form: str = "") -> str:
    """A count and its noun: ``1 clip``, ``2 clips``.

    Args:
        several: the plural where it is not ``one`` with an s, such as ``entries``, or ``shards are`` of ``shard is``.
        form: of the number: "," separates thousands.
    """
    return f"{number:{form}} {one if number == 1 else several or f'{one}s'}"


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
