"""Fingerprints: short content hashes that say which things belong together."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint_of(value: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def fingerprint_of_list(name: str, texts: Iterable[str]) -> str:
    """``fingerprint_of({name: [*texts]})`` of texts that need not fit in memory."""
    digest, separator = hashlib.sha256(f"{{{canonical_json(name)}:[".encode()), ""
    for text in texts:
        digest.update(f"{separator}{canonical_json(text)}".encode())
        separator = ","
    digest.update(b"]}")
    return digest.hexdigest()[:16]
