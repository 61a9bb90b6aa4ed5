"""Sizes of the golden numbers, which ``DELTACACHE_GOLDEN`` may name another set of."""

import json
from pathlib import Path


def golden_sizes(golden: Path) -> tuple[int, int, int]:
    """Pixels of a side of a frame, patches of a side, hidden width."""
    meta = json.loads((golden / "tiny" / "meta.json").read_text())
    patch = json.loads((golden / "tiny" / "backbone" / "config.json").read_text())["patch_size"]
    return meta["px"], meta["px"] // patch, meta["hidden"]
