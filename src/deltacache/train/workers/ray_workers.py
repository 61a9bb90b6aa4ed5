"""Several workers under Ray Train: the one module of ``train`` that knows Ray.

The command starts a relay (an actor beside it) and the workers; Ray Train makes them one process group and starts
all of them again when one is lost. Every start reads the newest checkpoint in the output folder, as ``--resume``
does, so nothing but that folder has to survive.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    get_context,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deltacache.models.checkpoints import Kind
from deltacache.pipeline.cluster.session import nodes, ray_running, when_there_is_room
from deltacache.pipeline.work.placement import Node, NoRoomError
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import Reporter, SilentReporter
from deltacache.schemas.texts import counted
from deltacache.train.checkpoints import checkpoint_folder, finished_checkpoints
from deltacache.train.loop import NonFiniteError
from deltacache.train.setup import RAY_FOLDER, TrainingRequest, check_output
from deltacache.train.workers.group import Distributed, OtherWorkerFailedError, Stop, stop_on_sigterm
from deltacache.train.workers.relay import RelayActor, RelayReporter, Replay, Standing
from deltacache.train.workers.trainable import OPEN, PREPARE, Workers

_POLL_S = 0.2
_SAY_S = 60.0  # between two lines about missing room
_SAVING_S = 600.0
"""For the first worker to save, after the others know that the training cannot go on."""


def train_together(kind: Kind, request: TrainingRequest[Any], workers: Workers, reporter: Reporter) -> Path:
    """Train with several workers and return the last checkpoint.

    Paths of ``request`` are seen by all nodes. Lost workers and nodes are replaced; the training goes on from
    the newest checkpoint, until workers were lost three times in a row without a new one.

    Raises:
        DeltacacheError: what ``prepare_tokenizer`` and ``prepare_world`` reject, no cluster at ``ray_address``, no
            room for the workers, or a training that is lost again and again.
        SystemExit: 0 after SIGTERM, when the state is saved.
    """
    check_output(request.out, resume=request.resume)
    OPEN[kind](request)  # what the workers would refuse is refused before they start

    def say(text: str) -> None:
        reporter.line(f"train {kind}: {text}")

    if ray.is_initialized():
        raise DeltacacheError(
            f"train {kind}: this program is already connected to Ray, but workers need their own Ray, with which "
            "they end: call ray.shutdown() first"
        )
    try:
        with ray_running(workers.ray_address, max(workers.count, os.cpu_count() or 1), say):
            scaling = when_there_is_room(
                lambda: _scaling(workers, request.device, nodes()),
                [{"GPU": 1} if request.device.startswith("cuda") else {"CPU": 1}] * workers.count,
                0 if workers.ray_address is None else workers.wait_for_nodes_s,
                say,
            )
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            relay = ray.remote(num_cpus=0)(RelayActor).options(scheduling_strategy=here).remote()
            trainer = TorchTrainer(
                _work,
                train_loop_config={"kind": kind, "request": request, "relay": relay},
                scaling_config=scaling,
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo"),
                run_config=_run_config(request.out, relay, local=workers.ray_address is None),
            )
            try:
                error = _watch(trainer, relay, Replay(reporter, f"train {kind}"), workers)
                standing = _standing(relay)
            finally:
                shutil.rmtree(request.out / RAY_FOLDER, ignore_errors=True)
    except RayActorError as error:
        # The workers have ended with Ray: what they saved until then counts.
        raise DeltacacheError(
            "the process through which the workers report died (out of memory, or somebody ended it), so they "
            f"were ended too: start again with --resume; {_newest(request.out)}"
        ) from error
    return _outcome(kind, request, standing, error, reporter)


def _outcome(
    kind: Kind,
    request: TrainingRequest[Any],
    standing: Standing,
    error: BaseException | None,
    reporter: Reporter,
) -> Path:
    if standing.refusal is not None:
        raise DeltacacheError(standing.refusal)
    if standing.stop and not standing.stopped and not standing.alive:
        reporter.line(
            f"train {kind}: stopped by SIGTERM while no worker ran; {_newest(request.out)}; {request.hint}"
        )
        raise SystemExit(0)
    if standing.stopped:
        raise SystemExit(0)
    if error is not None:
        raise DeltacacheError(
            f"Ray Train ended the training ({_short(error)}): see Ray's own logs, or start again with --resume"
        ) from error
    return checkpoint_folder(request.out, request.config.training.steps)


def _newest(out: Path) -> str:
    newest = finished_checkpoints(out)
    return f"{newest[-1]} is the newest checkpoint" if newest else "there is no checkpoint yet"


def _scaling(workers: Workers, device: str, machines: list[Node]) -> ScalingConfig:
    """One GPU a worker where there are any, else an equal share of the CPUs, which become its threads."""
    gpus = sum(int(node.gpus) for node in machines)
    use_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if use_gpu and gpus < workers.count:
        raise NoRoomError(
            f"{counted(workers.count, 'worker needs', 'workers need')} a GPU each, and there are {gpus}: "
            "give fewer --workers, or --device cpu"
        )
    if use_gpu:
        return ScalingConfig(num_workers=workers.count, use_gpu=True)
    share = cpu_share(workers.count, [int(node.cpus) for node in machines])
    return ScalingConfig(num_workers=workers.count, resources_per_worker={"CPU": share})


def cpu_share(workers: int, cpus: Sequence[int]) -> int:
    """The most CPUs that each of ``workers`` can have on nodes of ``cpus``.

    Raises:
        NoRoomError: not even one.
    """
    for share in range(max(cpus, default=0), 0, -1):
        if sum(each // share for each in cpus) >= workers:
            return share
    raise NoRoomError(
        f"{counted(workers, 'worker needs', 'workers need')} a CPU each, and the nodes offer {sum(cpus)}: "
        "give fewer --workers"
    )


def _run_config(out: Path, relay: Any, *, local: bool) -> RunConfig:
    variables = {"OMP_WAIT_POLICY": "PASSIVE"}
    if local:
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # gradients do not leave the machine
    return RunConfig(
        name="run",
        storage_path=str(out / RAY_FOLDER),  # Ray Train's own notes; removed at the end
        # The relay counts what happens to workers that began; _watch looks at those that find no room.
        failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
        callbacks=[_Losses(relay)],
        worker_runtime_env={"env_vars": variables},
        logging_config=LoggingConfig(log_level="ERROR"),
    )


class _Losses(UserCallback):
    """Tells the relay of workers that are lost."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        told = "; ".join(f"rank {rank}: {_short(error)}" for rank, error in worker_exceptions.items())
        ray.get(self._relay.call.remote("lose", told))


def _short(error: BaseException) -> str:
    """The last line of what may be a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _watch(trainer: TorchTrainer, relay: Any, replay: Replay, workers: Workers) -> BaseException | None:
    """Run the training in a thread; this one shows what is told, passes SIGTERM on, and takes Ctrl-C.

    A refusal ends it at once: workers that wait for the one that refused would wait for half an hour.

    Raises:
        NoRoomError: the workers have not found room together for ``wait_for_nodes_s``.
        RayActorError: the relay is dead.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 raised again by the command
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with stop_on_sigterm() as stop, replay:
        thread.start()
        refused_at = None
        placed_at = said_at = time.monotonic()
        while thread.is_alive():
            thread.join(_POLL_S)
            if stop.asked:
                relay.call.remote("ask_to_stop")
            replay.show(ray.get(relay.call.remote("take")))
            standing = _standing(relay)
            if standing.refusal is not None:
                refused_at = refused_at or time.monotonic()
                if standing.settled or time.monotonic() - refused_at > _SAVING_S:
                    break
            if standing.stop and not standing.alive:
                break
            now = time.monotonic()
            if standing.placed:
                placed_at = said_at = now
            elif now - said_at > _SAY_S:
                said_at, why = now, _no_room(workers, now - placed_at)
                if now - placed_at > workers.wait_for_nodes_s:
                    raise NoRoomError(f"{why}. --resume continues when there is room")
                replay.show([("line", (why,), {})])
        replay.show(ray.get(relay.call.remote("take")))
    return errors[0] if errors else None


def _no_room(workers: Workers, waited: float) -> str:
    there, free = nodes(), ray.available_resources()
    return (
        f"{counted(workers.count, 'worker has', 'workers have')} not begun together for {waited:.0f} of at "
        f"most {workers.wait_for_nodes_s:g} s "
        f"(--wait-for-nodes): they find no room, or die before they begin (Ray's logs say why). The {len(there)} "
        f"nodes have {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
    )


def _standing(relay: Any) -> Standing:
    return ray.get(relay.standing.remote())


def _work(settings: Mapping[str, Any]) -> None:
    """What each worker does: train, and leave the reason with the relay if it cannot go on."""
    relay, request = settings["relay"], settings["request"]
    standing = _standing(relay)
    if standing.over:
        return
    ray.get(relay.call.remote("arrive"))
    group = Distributed(lambda: _stop_of(relay), get_context().get_local_world_size())
    try:
        _train(settings["kind"], request, relay, group, again=standing.started)
    except NonFiniteError as error:  # of all workers alike; the first one has saved the state before it
        ray.get(relay.call.remote("refuse", str(error), settled=group.rank == 0))
    except DeltacacheError as error:
        ray.get(relay.call.remote("refuse", str(error), settled=True))
    except OtherWorkerFailedError:
        return
    except SystemExit:  # after SIGTERM
        if group.rank == 0:
            ray.get(relay.call.remote("end"))


def _train(kind: Kind, request: TrainingRequest[Any], relay: Any, group: Distributed, *, again: bool) -> None:
    reporter: Reporter = SilentReporter()
    if group.rank == 0:
        reporter = RelayReporter(lambda *told, **more: relay.call.remote("tell", *told, **more))
    device = get_device()  # each worker its own
    prepared = PREPARE[kind](
        replace(request, resume=request.resume or again, device=str(device)), reporter, group
    )
    if group.rank == 0:
        ray.get(relay.call.remote("start", prepared.first_step, group.workers))
    prepared.train()


@contextmanager
def _stop_of(relay: Any) -> Iterator[Stop]:
    """Asks the relay now and then whether somebody asked the training to stop."""
    stop, ended = Stop(), threading.Event()

    def ask() -> None:
        while not ended.wait(_POLL_S) and not stop.asked:
            stop.asked = _standing(relay).stop

    thread = threading.Thread(target=ask, name="stop", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        ended.set()
        thread.join()
