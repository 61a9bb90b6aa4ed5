"""Where the work runs: the one module of the pipeline that knows Ray.

A row is a shard task: paths and settings going in, one small result coming out. Decoding runs as CPU tasks
and yields pixels; encoders are actors that hold the model and commit the shard. The two ask for different
resources, or Ray would fuse them into one process and nothing would overlap.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

import deltacache
from deltacache.pipeline.decode_log import native_log
from deltacache.pipeline.encoders import ClipEncoder
from deltacache.pipeline.plan import PlannedVideo, ShardTask
from deltacache.pipeline.shard_work import (
    DecodedShard,
    DecodeSettings,
    Row,
    ShardResult,
    commit_decoded,
    decode_shard,
    from_row,
    measure_forward,
    to_row,
)
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings

_DECODE_CPUS = 1.0
_ENCODE_CPUS = 0.9  # not _DECODE_CPUS: see the module's docstring


@dataclass(frozen=True, slots=True)
class Placement:
    """How many workers of which size; what ``auto`` settings became."""

    encoders: int
    gpus_per_encoder: float
    decoders: int

    @property
    def device(self) -> str:
        """Where an encoder runs its model."""
        return "cuda" if self.gpus_per_encoder else "cpu"


@contextmanager
def cluster(settings: ClusterSettings) -> Iterator[Placement]:
    """Start a local Ray, or join the one at ``ray_address``; leave it afterwards.

    Ray's core writes notes about itself to file descriptor 2; they are kept from the user's terminal.
    """
    with native_log():
        _connect(settings)
        try:
            yield _place(settings, ray.cluster_resources())
        finally:
            ray.shutdown()


def _connect(settings: ClusterSettings) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.ray_address is None:
        # Loopback only. With one CPU decoding and encoding would wait for each other for ever.
        cpus = max(2, os.cpu_count() or 1)
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet
        )
    else:
        package = str(Path(deltacache.__file__).parent)
        try:
            ray.init(address=settings.ray_address, runtime_env={"py_modules": [package]}, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DeltacacheError(
                f"no Ray cluster answers at {settings.ray_address} ({error}): start one with "
                "'ray start --head', or leave --ray-address out to run on this machine"
            ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a large shard may well take longer than Ray's 30 minutes


def _place(settings: ClusterSettings, resources: Mapping[str, float]) -> Placement:
    cpus, gpus = resources.get("CPU", 2.0), resources.get("GPU", 0.0)
    per_encoder = settings.gpus_per_encoder
    if per_encoder is None:
        per_encoder = 1.0 if gpus else 0.0
    if per_encoder > gpus:
        raise DeltacacheError(
            f"--gpus-per-encoder {per_encoder:g}, but the cluster has {gpus:g} GPUs: "
            "ask for at most that, or 0"
        )
    encoders = settings.encoders or (int(gpus / per_encoder) if per_encoder else max(1, int(cpus) // 2))
    room = cpus - encoders * _ENCODE_CPUS
    if room < _DECODE_CPUS:
        most = max(1, math.floor((cpus - _DECODE_CPUS) / _ENCODE_CPUS))
        raise DeltacacheError(
            f"--encoders {encoders} leave no CPU for decoding on {cpus:g} CPUs: ask for at most {most}"
        )
    return Placement(encoders, per_encoder, settings.decoders or int(room / _DECODE_CPUS))


class _Encode:
    """Actor: holds an encoder, commits each decoded shard it is given."""

    def __init__(self, root: Path, card: DatasetCard, build: Callable[[], ClipEncoder], device: str) -> None:
        _settle_threads(device)
        self._root, self._card, self._encoder = root, card, build()
        self._forward_s = measure_forward(self._encoder.encode, card.sampling.frames, card.image_size)

    def __call__(self, row: Row) -> Row:
        shard = from_row(row)
        return _outcome(lambda: commit_decoded(self._root, self._card, shard, self._encoder, self._forward_s))


class _Apply:
    """Actor: holds a function from shard id to result."""

    def __init__(self, build: Callable[[], Callable[[str], ShardResult]], device: str) -> None:
        _settle_threads(device)
        self._apply = build()

    def __call__(self, row: Row) -> Row:
        return _outcome(lambda: self._apply(str(row["shard_id"])))


def _settle_threads(device: str) -> None:
    """One thread a CPU encoder: sums never depend on the machine's size; more encoders use more cores."""
    if device == "cpu":
        import torch

        torch.set_num_threads(1)


def encode_videos(
    tasks: Sequence[ShardTask],
    paths: dict[str, str],
    decode: DecodeSettings,
    root: Path,
    card: DatasetCard,
    build: Callable[[], ClipEncoder],
    placement: Placement,
) -> Iterator[ShardResult]:
    """Decode, encode and commit shards; yields a result as each is committed, in no fixed order."""
    rows: list[Row] = [{"shard_id": task.shard_id, "task": _task_text(task, paths)} for task in tasks]

    def decode_row(row: Row) -> Row:
        return to_row(_decode_text(str(row["task"]), decode), decode)

    pixels = _rows(rows).map(decode_row, num_cpus=_DECODE_CPUS, concurrency=placement.decoders)
    done = pixels.map(
        _Encode,  # pyright: ignore[reportArgumentType] - Ray's types leave out classes of callables
        fn_constructor_args=(root, card, build, placement.device),
        **_encoder_resources(placement),
    )
    yield from _results(done)


def encode_shards(
    shard_ids: Sequence[str], build: Callable[[], Callable[[str], ShardResult]], placement: Placement
) -> Iterator[ShardResult]:
    """Apply ``build()`` to every shard id on the encoders; yields results as they are committed."""
    done = _rows([{"shard_id": shard_id} for shard_id in shard_ids]).map(
        _Apply,  # pyright: ignore[reportArgumentType] - as above
        fn_constructor_args=(build, placement.device),
        **_encoder_resources(placement),
    )
    yield from _results(done)


def _encoder_resources(placement: Placement) -> dict[str, Any]:
    return {
        "compute": ActorPoolStrategy(size=placement.encoders),
        "num_cpus": _ENCODE_CPUS,
        "num_gpus": placement.gpus_per_encoder or None,
    }


def _rows(rows: list[Row]) -> Dataset:
    # One block a row, or several shards would become one task.
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _outcome(work: Callable[[], ShardResult]) -> Row:
    """A result, or why it was refused, as text: Ray keeps no more of a worker's exception than its traceback."""
    try:
        return {"result": json.dumps(asdict(work())), "refused": ""}
    except DeltacacheError as error:
        return {"result": "", "refused": str(error)}


def _results(dataset: Dataset) -> Iterator[ShardResult]:
    """Results as they come; what a worker refused is refused here."""
    for row in dataset.iter_rows():
        if row["refused"]:
            raise DeltacacheError(row["refused"])
        yield ShardResult(**json.loads(row["result"]))


def _task_text(task: ShardTask, paths: dict[str, str]) -> str:
    uris = [video.video_uri for video in task.videos]
    return json.dumps(
        {
            "shard_id": task.shard_id,
            "videos": [asdict(video) for video in task.videos],
            "paths": {uri: paths[uri] for uri in uris if uri in paths},
        }
    )


def _decode_text(text: str, decode: DecodeSettings) -> DecodedShard:
    task = json.loads(text)
    videos = tuple(PlannedVideo(**video) for video in task["videos"])
    return decode_shard(ShardTask(task["shard_id"], videos), task["paths"], decode)
