"""Where a training runs: in this process, or under Ray Train with several workers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deltacache.models.checkpoints import Kind
from deltacache.schemas.progress import Reporter
from deltacache.train.setup import TrainingRequest, holding_output
from deltacache.train.workers.group import SingleProcess
from deltacache.train.workers.trainable import PREPARE, Workers


def launch(
    kind: Kind, request: TrainingRequest[Any], reporter: Reporter, workers: Workers | None = None
) -> Path:
    """Train and return the last checkpoint. A single worker without a cluster needs no Ray.

    A dry run measures the first worker's share of a step in this process.
    """
    if request.dry_run:
        count = 1 if workers is None else workers.count
        here = count if workers is None or workers.ray_address is None else 1
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
        return PREPARE[kind](request, reporter, SingleProcess(count, here)).train()
    with holding_output(request.out, f"train-{kind}", resume=request.resume):
        if workers is None or (workers.count == 1 and workers.ray_address is None):
            return PREPARE[kind](request, reporter, SingleProcess()).train()
        from deltacache.train.workers.ray_workers import train_together

        # Workers on other nodes have other working directories.
        start_from = None if request.start_from is None else request.start_from.absolute()
        request = replace(request, out=request.out.absolute(), start_from=start_from)
        return train_together(kind, request, workers, reporter)
