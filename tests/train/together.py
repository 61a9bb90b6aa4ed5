"""Trains with several workers in a process of its own: ``python together.py KIND DATA OUT WORKERS TRAINING RESUME``.

Prints what the reporter is told; exits as the command does.
"""

import json
import sys
from pathlib import Path

from drawn import tokenizer_config, world_config

from deltacache.models.checkpoints import Kind
from deltacache.schemas.errors import DeltacacheError
from deltacache.train.setup import TrainingRequest, holding_output
from deltacache.train.workers.ray_workers import train_together
from deltacache.train.workers.trainable import Workers
from reporters import Lines


class Printed(Lines):
    """Says everything at once."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def advance(self, items: int = 1, **status: float | str) -> None:
        print("advance", items, flush=True)


def main() -> None:
    """See above."""
    name, data, out, workers, training, resume = sys.argv[1:]
    kind: Kind = "tokenizer" if name == "tokenizer" else "world"
    build = tokenizer_config if name == "tokenizer" else world_config
    config = build(**json.loads(training))
    request = TrainingRequest(Path(data), Path(out), config, resume == "resume", "cpu")
    try:
        with holding_output(request.out, f"train-{kind}", resume=request.resume):
            train_together(kind, request, Workers(int(workers)), Printed())
    except DeltacacheError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
