"""How many workers of which size: what ``auto`` settings become on the nodes that are there. Free of Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings
from deltacache.schemas.texts import counted

_GPU_ENCODER_CPUS = 1.0
_CPU_ENCODER_BYTES = 3 << 30  # a ViT-B with its activations, and room
_SHARED_CPUS = 0.01  # of encoders that share cores with decoders; not 0, or nodes without CPUs would get them
_AHEAD = 2  # groups of videos that are decoded or waiting, for each decoder


class NoRoomError(DeltacacheError):
    """The nodes that are there cannot hold what was asked for; a cluster that grows may."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of the cluster offers to Ray.

    Attributes:
        store_bytes: of Ray's object store, where decoded videos lie until they are encoded.
    """

    cpus: float
    gpus: float
    memory_bytes: float
    store_bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class DecodeShare:
    """What one encoder may have decoded ahead, in groups of videos.

    Attributes:
        at_once: groups that are decoded at the same time.
        in_flight: groups that are decoded or wait to be encoded.
    """

    at_once: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Placement:
    """How many workers of which size.

    Attributes:
        decoders: decode tasks that can run at once on the nodes that are there.
        most_decoders: ``--decoders`` where it is more or less than the remaining CPUs for decoding.
        store_bytes: of all nodes' object stores.
        remarks: what was asked for or is there, and is not used, with the reason.
        ray_start_s: seconds until Ray was there.
        wait_s: how long to wait for room.
        here: in this process, without Ray: the one encoder, which decodes too.
    """

    encoders: int
    gpus_per_encoder: float
    cpus_per_encoder: float
    decoders: int
    most_decoders: int | None = None
    nodes: int = 1
    store_bytes: float = math.inf
    remarks: tuple[str, ...] = ()
    ray_start_s: float = 0.0
    wait_s: float = math.inf
    here: bool = False

    @property
    def device(self) -> str:
        """Where an encoder runs its model."""
        return "cuda" if self.gpus_per_encoder else "cpu"

    def in_flight(self, group_bytes: int) -> int:
        """Groups of ``group_bytes`` of all encoders together: two a decoder, at most half of the object stores."""
        groups = _AHEAD * (self.most_decoders or self.decoders)
        if self.store_bytes < math.inf:
            groups = min(groups, int(self.store_bytes / 2 // group_bytes))
        return max(groups, 2 * self.encoders)

    def decode_share(self, encoder: int, group_bytes: int) -> DecodeShare:
        """The part of encoder number ``encoder``. Where --decoders is less than the CPUs, all parts add up to it."""
        in_flight = _part(self.in_flight(group_bytes), self.encoders, encoder)
        at_once = _part(self.most_decoders, self.encoders, encoder) if self.most_decoders else in_flight
        return DecodeShare(at_once, in_flight)

    def for_shards(self, shards: int) -> "Placement":
        """Without encoders that would have no shard."""
        return replace(self, encoders=min(self.encoders, max(shards, 1)))

    def __str__(self) -> str:
        if self.here:
            return f"this process decodes and encodes on the {'CPU' if self.device == 'cpu' else 'GPU'}, without Ray"
        where = "on the CPU" if self.device == "cpu" else f"with {self.gpus_per_encoder:g} GPU each"
        decoders, encoders = counted(self.decoders, "decoder"), counted(self.encoders, "encoder")
        return f"{decoders} and {encoders} {where} on {counted(self.nodes, 'node')}"


def place_here(settings: ClusterSettings, *, has_gpu: bool) -> Placement:
    """``--encoders 0``: this process, on its GPU unless ``--gpus-per-encoder 0`` leaves that out.

    Raises:
        DeltacacheError: a GPU is asked for, and there is none.
    """
    gpus = float(has_gpu) if settings.gpus_per_encoder is None else settings.gpus_per_encoder
    if gpus and not has_gpu:
        raise DeltacacheError(
            f"--gpus-per-encoder {gpus:g}: this machine has no GPU that PyTorch can use; give 0"
        )
    return Placement(1, gpus, 0.0, decoders=1, here=True)


def _part(whole: int, parts: int, number: int) -> int:
    return max(1, whole // parts + (number < whole % parts))


def place(
    settings: ClusterSettings, nodes: Sequence[Node], *, cores: int | None, ray_start_s: float
) -> Placement:
    """Fill in what the settings leave open.

    Args:
        cores: of this machine, when Ray runs here alone and its CPUs are no more than slots for decoders.

    Raises:
        NoRoomError: the nodes cannot hold what was asked for.
        DeltacacheError: no cluster could.
    """
    per_encoder = settings.gpus_per_encoder
    if per_encoder is None:
        per_encoder = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if per_encoder > 1 and per_encoder != int(per_encoder):
        raise DeltacacheError(
            f"--gpus-per-encoder {per_encoder:g}: give a part of one GPU, such as 0.5, or whole ones"
        )
    if cores is None and settings.decoders and settings.decoders < (settings.encoders or 0):
        raise DeltacacheError(
            f"--decoders {settings.decoders} for {settings.encoders} encoders: each encoder "
            "needs one at least, so "
            f"give {settings.encoders} or more, or fewer --encoders"
        )
    remarks: list[str] = []
    cpus_per_encoder, most = _most_encoders(per_encoder, nodes, cores)
    if per_encoder:
        remarks += _check_gpus(per_encoder, settings.encoders, most, nodes)
    encoders = settings.encoders or max(sum(most), 1)
    if cores is None and settings.decoders and encoders > settings.decoders:
        remarks.append(
            f"{counted(settings.decoders, 'encoder')}, not {encoders}: each needs a decoder, and "
            f"--decoders is {settings.decoders}"
        )
        encoders = settings.decoders
    room = _decoding_room(nodes, most, encoders, cpus_per_encoder)
    wanted = encoders
    while room < 1 and settings.encoders is None and encoders > 1:
        encoders -= 1
        room = _decoding_room(nodes, most, encoders, cpus_per_encoder)
    if room < 1:
        raise NoRoomError(
            f"{counted(wanted, 'encoder')} on {sum(node.cpus for node in nodes):g} CPUs of "
            f"{counted(len(nodes), 'node')} leave none for "
            "decoding: ask for fewer --encoders, or give the cluster nodes with CPUs"
        )
    if encoders < wanted:
        remarks.append(
            f"{counted(encoders, 'encoder')}, not {wanted}: one more would leave no CPU for decoding"
        )
    if settings.decoders and settings.decoders > room:
        remarks.append(
            f"{counted(room, 'decoder')}, not {settings.decoders}: that many CPUs are free beside the encoders"
            + ("" if cores is not None else "; more decode when nodes join")
        )
    return Placement(
        encoders,
        per_encoder,
        cpus_per_encoder,
        decoders=min(settings.decoders or room, room),
        most_decoders=settings.decoders if cores is None and settings.decoders != room else None,
        nodes=len(nodes),
        store_bytes=sum(node.store_bytes for node in nodes),
        remarks=tuple(remarks),
        ray_start_s=ray_start_s,
        wait_s=math.inf if cores is not None else settings.wait_for_nodes_s,
    )


def _most_encoders(
    gpus_per_encoder: float, nodes: Sequence[Node], cores: int | None
) -> tuple[float, list[int]]:
    """CPUs of an encoder, and how many encoders each node can hold: on its GPUs, or one a core as memory allows."""
    if not gpus_per_encoder:
        by_cores = [cores if cores is not None else int(node.cpus) for node in nodes]
        by_memory = [int(node.memory_bytes // _CPU_ENCODER_BYTES) for node in nodes]
        return _SHARED_CPUS, [min(each) for each in zip(by_cores, by_memory, strict=True)]
    by_gpus = _on_gpus(gpus_per_encoder, nodes)
    spare = sum(node.cpus for node in nodes) >= 2 * sum(by_gpus)
    whole = cores is None and spare and all(n.cpus >= m for n, m in zip(nodes, by_gpus, strict=True))
    cpus = _GPU_ENCODER_CPUS if whole else _SHARED_CPUS
    return cpus, [min(most, int(node.cpus / cpus)) for node, most in zip(nodes, by_gpus, strict=True)]


def _on_gpus(gpus_per_encoder: float, nodes: Sequence[Node]) -> list[int]:
    if gpus_per_encoder >= 1:
        return [int(node.gpus // gpus_per_encoder) for node in nodes]
    return [int(node.gpus) * int(1 / gpus_per_encoder + 1e-9) for node in nodes]


def _check_gpus(
    per_encoder: float, encoders: int | None, most: list[int], nodes: Sequence[Node]
) -> list[str]:
    """Remarks about GPUs that nobody can use."""
    by_gpus, held = _on_gpus(per_encoder, nodes), ", ".join(f"{node.gpus:g}" for node in nodes)
    idle = sum(by_gpus) - sum(most)
    why = (
        f"{counted(idle, 'encoder')} more would find GPUs, but no CPU beside them, and each needs a part "
        "of one: start those "
        "nodes with --num-cpus, or with a CPU limit on Kubernetes"
    )
    if sum(most) < (encoders or 1):
        raise NoRoomError(
            f"{encoders or 1} encoders with {per_encoder:g} GPUs each do not fit on nodes with {held or 'no'} GPUs: "
            f"ask for at most {sum(most)} --encoders, or fewer --gpus-per-encoder (0 runs on CPUs)"
            + (f". {why}" if idle else "")
        )
    return (
        [f"{counted(sum(most), 'encoder')}, not {sum(by_gpus)}: {why}"] if idle and encoders is None else []
    )


def _decoding_room(nodes: Sequence[Node], most: list[int], encoders: int, cpus_per_encoder: float) -> int:
    """Decode tasks, of one CPU of one node each, that find room beside the encoders, which Ray spreads evenly."""
    there, left = [0] * len(nodes), encoders
    open_nodes = [place for place, each in enumerate(most) if each] or list(range(len(nodes)))
    while left and open_nodes:
        for place in open_nodes[:left]:
            there[place] += 1
        left -= min(left, len(open_nodes))
        open_nodes = [place for place in open_nodes if there[place] < most[place]] or open_nodes
    return sum(math.floor(n.cpus - each * cpus_per_encoder) for n, each in zip(nodes, there, strict=True))


def gpu_share(workers: int, gpus: int) -> float:
    """The part of a GPU that each of ``workers`` gets: one k-th, so that k of them fill a GPU and all find room.

    Three workers on two GPUs get a half each: of two thirds, one of them would wait for ever.
    """
    return 1 / math.ceil(workers / gpus) if gpus else 0.0


def place_tasks(workers: int, nodes: Sequence[Node]) -> tuple[int, float]:
    """How many of ``workers`` processes of one CPU find room, and the part of a GPU that each gets.

    Raises:
        NoRoomError: none does.
    """
    gpus = gpu_share(workers, sum(int(node.gpus) for node in nodes if node.cpus >= 1))
    fitting = sum(
        min(int(node.cpus), int(node.gpus) * int(1 / gpus + 1e-9)) if gpus else int(node.cpus)
        for node in nodes
    )
    if not fitting:
        raise NoRoomError(
            f"{counted(workers, 'worker needs', 'workers need')} a CPU each, and the "
            f"{counted(len(nodes), 'node')} of the cluster offer none: give the "
            "cluster nodes with CPUs, or leave --ray-address out to run on this machine"
        )
    return min(workers, fitting), gpus
