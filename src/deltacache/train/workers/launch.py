"""Where a training runs: in this process, or under Ray Train with several workers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from deltacache.models.checkpoints import Kind
from deltacache.schemas.progress import Reporter
from deltacache.train.outputs import holding_output
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.group import Alone
from deltacache.train.workers.trainable import PREPARE, Workers


def launch(
    kind: Kind, request: TrainingRequest[Any], reporter: Reporter, workers: Workers | None = None
) -> Path:
    """Train and return the last checkpoint. A single worker without a cluster needs no Ray."""
    with holding_output(request.out, f"train-{kind}", resume=request.resume):
        if workers is None or (workers.count == 1 and workers.ray_address is None):
            return PREPARE[kind](request, reporter, Alone()).train()
        from deltacache.train.workers.ray_workers import train_together

        return train_together(kind, _for_other_nodes(request), workers, reporter)


def _for_other_nodes(request: TrainingRequest[Any]) -> TrainingRequest[Any]:
    """Workers have other working directories."""
    start_from = None if request.start_from is None else request.start_from.absolute()
    return replace(request, out=request.out.absolute(), start_from=start_from)
