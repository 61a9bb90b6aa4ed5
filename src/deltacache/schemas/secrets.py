"""Credentials in urls: taken out of everything that is stored or shown.

A url without its credentials is the identity of what it leads to: it stays the same when a signature is renewed.
Credentials themselves come from the list, the command line or the environment each time, and are kept nowhere.
"""

import re
from urllib.parse import unquote

# user:password@ before the first slash, which every client takes for them; also a password with an unescaped slash in
# it, which none does: host:port/ is no user, unless the name has no dot and what follows an @ is a host. A url that was
# taken for a path has one slash. A quote or bracket ends a url, unless the url goes on behind it.
_USER = re.compile(
    r"(?P<scheme>\b(?:[a-z][a-z0-9+.-]*://|(?:https?|s?ftps?|s3a?|gc?s|abfss?|az|ray):/))"
    r"(?:(?:[^\s/?#\"<>]|[\"<>](?=[^\s\"<>),;:}\]]))*@"
    r"|[^\s/?#@:'\"<>\[]*:(?!(?:[0-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])[/?#])[^\s@'\"<>]*@"
    r"|(?!localhost:)[^\s/?#@:'\"<>\[.]*:\d+/[^\s@'\"<>]*@(?=(?:[a-z0-9-]+\.)+[a-z0-9-]+(?::\d+)?/))",
    re.IGNORECASE,
)
_ALONE = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/?#:]*:(?!\s|\d{1,5}\s)[^/?#]*@", re.IGNORECASE)
# A quote ends a url, unless the url goes on behind it.
_QUERY = re.compile(
    r"(?P<mark>[?#])(?P<pairs>(?:[^\s#'\"<>`]|['\"`](?=[\w%&=+/~-]))+?)"
    r"(?=[).,:;]*(?:[\s#<>]|['\"`](?![\w%&=+/~-])|$))"
)
_CONTAINER = re.compile(
    r"(?:abfss?|adl|wasbs?|az):/{1,2}[^\s/?#@:]+@", re.IGNORECASE
)  # container@account of Azure
_SIGNING = re.compile(
    r"x-(amz|goog|ms|oss)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|sign|expires|policy|key-pair-id"
    r"|hash-algorithm|sig|key|code|user|user_?name|login|hdn[a-z]+"
    r"|.*(token|secret|passw|pwd|credential|auth(?!or)|api[-_]?key|access[-_]?key|signature|session|jwt|bearer).*",
    re.IGNORECASE,
)
_AZURE = re.compile(
    r"sv|ss|srt|sp|se|st|spr|sr|sip|si|sk(oid|tid|t|e|s|v)|saoid|suoid|scid|sdd|ses", re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_FILE_NAME = re.compile(r".+\.[a-z0-9]{2,5}", re.IGNORECASE | re.DOTALL)


def without_secrets(text: str) -> str:
    """A url, or any text with urls in it, without user names, passwords, signatures and tokens.

    What else a query says (``?id=5``) stays.
    """
    text = _HUB_TOKEN.sub("hf_…", text) if "hf_" in text else text
    if ":/" in text:
        text = (
            _ALONE.sub(r"\g<scheme>", text, count=1) if _ALONE.match(text) else text
        )  # spaces in a password
        text = _USER.sub(lambda match: match[0] if _CONTAINER.match(match[0]) else match["scheme"], text)
    return _QUERY.sub(_without_signature, text) if "=" in text else text


def has_secrets(url: str) -> bool:
    """Whether ``without_secrets`` would change it."""
    return without_secrets(url) != url


def _without_signature(match: re.Match[str]) -> str:
    pairs = [
        (pair, unquote(pair.partition("=")[0]), pair.partition("=")[2])
        for pair in re.split("[&;]", match["pairs"])
    ]
    is_azure = any(name.lower() == "sig" for _, name, _ in pairs)
    kept = [
        pair
        for pair, name, value in pairs
        if not _is_secret(name, value) and not (is_azure and _AZURE.fullmatch(name))
    ]
    if len(kept) == len(pairs):
        return match[0]
    return match["mark"] + "&".join(kept) if kept else ""


def _is_secret(name: str, value: str) -> bool:
    if not value or not _SIGNING.fullmatch(name):
        return False
    return name.lower() not in ("key", "code") or not _FILE_NAME.fullmatch(value)  # ?key=films/a.mp4
