"""What ``launch`` can train, and with how many processes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltacache.models.checkpoints import Kind
from deltacache.schemas.jobs import WAIT_FOR_NODES_S
from deltacache.schemas.progress import Reporter
from deltacache.train.setup import Prepared, TrainingRequest
from deltacache.train.tokenizer import open_tokenizer_inputs, prepare_tokenizer
from deltacache.train.workers.group import ProcessGroup
from deltacache.train.world import open_world_inputs, prepare_world

PREPARE: Mapping[Kind, Callable[[TrainingRequest[Any], Reporter, ProcessGroup], Prepared]] = {
    "tokenizer": prepare_tokenizer,
    "world": prepare_world,
}
OPEN: Mapping[Kind, Callable[[TrainingRequest[Any]], Any]] = {
    "tokenizer": open_tokenizer_inputs,
    "world": open_world_inputs,
}


@dataclass(frozen=True, slots=True)
class Workers:
    """How many processes train one model, and on which cluster; ``None`` is this machine.

    Attributes:
        wait_for_nodes_s: how long a cluster may take to have room for them.
    """

    count: int = 1
    ray_address: str | None = None
    wait_for_nodes_s: float = WAIT_FOR_NODES_S
