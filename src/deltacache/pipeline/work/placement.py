"""How many workers of which size: what ``auto`` settings become on the nodes that are there. Free of Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings

_GPU_ENCODER_CPUS = 1.0
_CPU_ENCODER_BYTES = 3 << 30  # a ViT-B with its activations, and room
_SHARED_CPUS = 0.01  # of encoders that share cores with decoders; not 0, or nodes without CPUs would get them


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of the cluster offers to Ray."""

    cpus: float
    gpus: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Placement:
    """How many workers of which size.

    Attributes:
        decoders: decode tasks that may run at once.
        ahead: how many times that many may be decoded or waiting to be encoded. 1 keeps to ``--decoders`` on a
            cluster with more CPUs.
        ray_start_s: seconds until Ray was there.
    """

    encoders: int
    gpus_per_encoder: float
    cpus_per_encoder: float
    decoders: int
    ahead: int = 2
    nodes: int = 1
    ray_start_s: float = 0.0

    @property
    def device(self) -> str:
        """Where an encoder runs its model."""
        return "cuda" if self.gpus_per_encoder else "cpu"

    def window(self, shards_at_once: int) -> int:
        """Groups of videos that one shard may have decoded or being decoded."""
        groups = self.ahead * self.decoders / (self.encoders * shards_at_once)
        return max(2, math.ceil(groups)) if self.ahead > 1 else max(1, math.floor(groups))

    def for_shards(self, shards: int) -> "Placement":
        """Without encoders that would have no shard."""
        return replace(self, encoders=min(self.encoders, max(shards, 1)))

    def __str__(self) -> str:
        where = "on the CPU" if self.device == "cpu" else f"with {self.gpus_per_encoder:g} GPU each"
        return f"{self.decoders} decoders and {self.encoders} encoders {where} on {self.nodes} nodes"


def place(
    settings: ClusterSettings, nodes: Sequence[Node], *, cores: int | None, ray_start_s: float
) -> Placement:
    """Fill in what the settings leave open.

    Args:
        cores: of this machine, when Ray runs here alone and its CPUs are no more than slots for decoders.

    Raises:
        DeltacacheError: the cluster cannot hold what was asked for.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    per_encoder = settings.gpus_per_encoder
    if per_encoder is None:
        per_encoder = 1.0 if gpus else 0.0
    most = _most_encoders(per_encoder, nodes, cores)
    encoders = settings.encoders or max(most, 1)
    if per_encoder:
        _check_gpus(per_encoder, encoders, most, nodes)
    shared = cores is not None or not per_encoder or cpus < 2 * encoders
    cpus_per_encoder = _SHARED_CPUS if shared else _GPU_ENCODER_CPUS
    room = math.floor(cpus - encoders * cpus_per_encoder)
    if room < 1:
        raise DeltacacheError(
            f"{encoders} encoders on {cpus:g} CPUs leave none for decoding: ask for fewer --encoders, or give "
            "the cluster nodes with CPUs"
        )
    decoders = min(settings.decoders or room, room)
    if cores is None and settings.decoders and settings.decoders < 2 * encoders:
        raise DeltacacheError(
            f"--decoders {settings.decoders} for {encoders} encoders: each works on two shards, so give at least "
            f"{2 * encoders}, or fewer --encoders"
        )
    ahead = 1 if cores is None and decoders < room else 2
    return Placement(encoders, per_encoder, cpus_per_encoder, decoders, ahead, len(nodes), ray_start_s)


def _most_encoders(gpus_per_encoder: float, nodes: Sequence[Node], cores: int | None) -> int:
    """Encoders that fit: each on GPUs of one node; or one a core, as far as memory goes."""
    if not gpus_per_encoder:
        by_memory = [int(node.memory_bytes // _CPU_ENCODER_BYTES) for node in nodes]
        by_cores = [cores if cores is not None else int(node.cpus) for node in nodes]
        return max(1, sum(map(min, by_cores, by_memory)))
    if gpus_per_encoder >= 1:
        return sum(int(node.gpus // gpus_per_encoder) for node in nodes)
    return sum(int(node.gpus) * int(1 / gpus_per_encoder + 1e-9) for node in nodes)


def _check_gpus(per_encoder: float, encoders: int, most: int, nodes: Sequence[Node]) -> None:
    if per_encoder > 1 and per_encoder != int(per_encoder):
        raise DeltacacheError(
            f"--gpus-per-encoder {per_encoder:g}: give a part of one GPU, such as 0.5, or whole ones"
        )
    if most < encoders:
        held = ", ".join(f"{node.gpus:g}" for node in nodes)
        raise DeltacacheError(
            f"{encoders} encoders with {per_encoder:g} GPUs each do not fit on nodes with {held} GPUs: ask for at "
            f"most {most} --encoders, or fewer --gpus-per-encoder (0 runs on CPUs)"
        )
