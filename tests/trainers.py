"""Both trainers by one call each, as commands start them."""

from functools import partial
from pathlib import Path
from typing import Any

from deltacache.models.checkpoints import Kind
from deltacache.schemas.progress import Reporter
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.launch import launch


def _train(
    kind: Kind,
    data: Path | str,
    out: Path,
    config: Any,
    *,
    resume: bool,
    device: str,
    reporter: Reporter,
    start_from: Path | None = None,
) -> Path:
    """The last checkpoint."""
    return launch(kind, TrainingRequest(data, out, config, resume, device, start_from), reporter)


train_tokenizer = partial(_train, "tokenizer")
train_world = partial(_train, "world")
