"""Text as people's programs write it: UTF-8, with or without a byte-order mark, or UTF-16 with one."""

import codecs


def decoded(content: bytes) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        UnicodeDecodeError: it is neither UTF-8 nor, with a mark, UTF-16 or UTF-32.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return content.decode("utf-32")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")
