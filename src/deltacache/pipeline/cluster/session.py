"""Ray: one of our own or one that is joined, how long to wait for room in it, and what its errors say."""

import functools
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError, RayError, RayTaskError

import deltacache
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.work.placement import Node, NoRoomError, Placement, place, place_here
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.texts import counted

POLL_S = 0.5
SAY_S = 120.0
"""Between two lines about the same wait."""
MOST_STARTS = 5
"""Of one worker without any work done in between."""
_LONGEST_TEMP_DIR = 107 - len("/session_2026-11-30_06-51-58_123456_1234567/sockets/plasma_store") - 4
"""Bytes of Ray's temporary folder; the paths of the sockets below it may have 107."""
_CONNECT_S = 10.0
_HTTP2_SETTINGS = b"\x04"  # the kind of frame that both sides of HTTP/2, and so of gRPC, begin with
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0" * 5


@contextmanager
def cluster(settings: ClusterSettings, say: Callable[[str], None] = lambda text: None) -> Iterator[Placement]:
    """Start a local Ray, or use the one that runs, see ``ray_running``; or none, for ``--encoders 0``.

    Args:
        say: hears which cluster was found, what is waited for, and what was asked for and is not used.

    Raises:
        DeltacacheError: no cluster answers, or it has no room for what was asked for within ``wait_for_nodes_s``.
    """
    if settings.encoders == 0:
        yield place_here(settings, has_gpu=torch.cuda.is_available())
        return
    started = time.perf_counter()
    own = settings.ray_address is None and not ray.is_initialized()
    # On one machine the slots are counted in decoders: encoders share the cores with them.
    with ray_running(settings.ray_address, (settings.decoders or os.cpu_count() or 1) + 1, say):
        ray_start_s = time.perf_counter() - started
        cores = os.cpu_count() if own else None
        gpus = settings.gpus_per_encoder or 0
        placement = when_there_is_room(
            lambda: place(settings, nodes(), cores=cores, ray_start_s=ray_start_s),
            [{"CPU": 1, **({"GPU": gpus} if gpus else {})}] * (settings.encoders or 1)
            + [{"CPU": 1}] * (settings.decoders or 1),
            0 if own else settings.wait_for_nodes_s,
            say,
        )
        for remark in placement.remarks:
            say(remark)
        yield placement


RoomT = TypeVar("RoomT")


def when_there_is_room(
    find: Callable[[], RoomT],
    bundles: Sequence[Mapping[str, float]],
    wait_s: float,
    say: Callable[[str], None],
) -> RoomT:
    """What ``find`` gives, as soon as it raises no ``NoRoomError``; until then an autoscaler is asked for nodes.

    Args:
        bundles: CPUs and GPUs that the autoscaler, if there is one, is asked for.

    Raises:
        NoRoomError: not within ``wait_s``.
    """
    started, said_at = time.monotonic(), -math.inf
    try:
        while True:
            try:
                return find()
            except NoRoomError as error:
                waited = time.monotonic() - started
                if waited >= wait_s:
                    limit = f" (waited {waited:.0f} s for nodes; --wait-for-nodes sets the limit)"
                    raise NoRoomError(f"{error}{limit if wait_s else ''}") from error
                if said_at == -math.inf:
                    request_resources(bundles=[dict(bundle) for bundle in bundles])
                if time.monotonic() - said_at > SAY_S:
                    said_at = time.monotonic()
                    say(
                        f"waiting for the cluster to grow, {waited:.0f} of at most {wait_s:g} s (--wait-for-nodes): "
                        f"{error}"
                    )
            time.sleep(min(POLL_S, wait_s))
    finally:
        if said_at != -math.inf:
            request_resources(bundles=[])  # or the autoscaler keeps the nodes for ever


@contextmanager
def ray_running(
    ray_address: str | None, slots: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Start a local Ray with this many CPU ``slots``, or join the one at ``ray_address``; leave it afterwards.

    Without an address, a Ray that the program is connected to already is used, and left running.

    Ray's core writes notes about itself to file descriptor 2; they are kept from the user's terminal.

    Raises:
        DeltacacheError: no cluster answers, a local Ray cannot start, or the process has a Ray and is to join another.
    """
    if ray.is_initialized():
        if ray_address is not None:
            raise DeltacacheError(
                f"this program is already connected to Ray, so it cannot join {ray_address}: leave ray_address out "
                "to use the Ray that it is connected to, or call ray.shutdown() first"
            )
        with native_log():
            say(_found("this process"))
            yield
        return
    with native_log(), _authentication(), _clean_command_line():
        if ray_address is None:
            with _loopback_only():
                _start(slots)
        else:
            _join(ray_address)
            say(_found(ray_address))
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that starts inside listens on the loopback address alone, as it does on Windows and macOS.

    On Linux Ray replaces 127.0.0.1 by the address of the host and listens on all of them; ``ray.init`` has no
    setting for this. The variable is for the processes that Ray starts, the constant for this one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


@contextmanager
def _clean_command_line() -> Iterator[None]:
    """Ray lists jobs by their command lines, in its dashboard too: without the credentials of urls."""
    before = ray_utils.get_entrypoint_name
    ray_utils.get_entrypoint_name = lambda: without_secrets(before())
    try:
        yield
    finally:
        ray_utils.get_entrypoint_name = before


@functools.cache
def _own_token() -> str:
    return secrets.token_hex(32)


@contextmanager
def _authentication() -> Iterator[None]:
    """Inside, ``_use_token`` may be called; afterwards this process authenticates itself as it did before."""
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")  # reads the mode from the environment


def _use_token(token: str | None = None) -> None:
    """Token authentication from here on, with this token or the one that Ray finds."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if token is not None:
        os.environ["RAY_AUTH_TOKEN"] = token
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def _start(slots: int) -> None:
    folder = Path(get_default_ray_temp_dir())
    own: dict[str, Any] = {}
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray would write one to ~/.ray/auth_token and leave it there: every ``ray start`` then asks for it, but whoever
        # joins by an address does not send it.
        _use_token(_own_token())
    if len(os.fsencode(folder)) > _LONGEST_TEMP_DIR:
        own["_temp_dir"] = "/tmp/ray"  # its sockets need a short path; videos still go to TMPDIR
    try:
        ray.init(address="local", num_cpus=slots, include_dashboard=False, **own, **_QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        ray.shutdown()
        raise DeltacacheError(
            f"Ray does not start on this machine ({type(error).__name__}: {error}): it needs a temporary folder with "
            f"a short path that can be written ({own.get('_temp_dir', folder)}; RAY_TMPDIR names another), and /dev/shm"
        ) from error


def _join(ray_address: str) -> None:
    package = str(Path(deltacache.__file__).parent)
    # Names beyond ASCII, on nodes whose processes start without a locale.
    environment = {"py_modules": [package], "env_vars": {"PYTHONUTF8": "1"}}
    try:
        _check_answers(ray_address)
        try:
            ray.init(address=ray_address, runtime_env=environment, **_QUIET)
        except ConnectionError:
            # It listens, so it may ask for a token. One that lies in the home is not tried first: a cluster without
            # authentication starts no actors for whoever has it on.
            loader = AuthenticationTokenLoader.instance()
            if "RAY_AUTH_MODE" in os.environ or not loader.has_token(ignore_auth_mode=True):
                raise
            _use_token()
            ray.init(address=ray_address, runtime_env=environment, **_QUIET)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        raise DeltacacheError(
            f"no Ray cluster answers at {ray_address} ({error}): start one with "
            "'ray start --head', or leave --ray-address out to run on this machine. A cluster with token "
            "authentication answers only to its own token, in RAY_AUTH_TOKEN or the file that RAY_AUTH_TOKEN_PATH "
            "names, with RAY_AUTH_MODE=token; see docs/cluster.md"
        ) from error


def _found(ray_address: str) -> str:
    """Which cluster was found, in words."""
    there = nodes()
    cpus, gpus = sum(node.cpus for node in there), sum(node.gpus for node in there)
    free = ray.available_resources()
    own = (
        "; 'auto' takes whichever runs on this machine, so look whether it is yours"
        if ray_address == "auto"
        else ""
    )
    return (
        f"Ray cluster at {ray.get_runtime_context().gcs_address}: {counted(len(there), 'node')}, "
        f"{counted(cpus, 'CPU', form='g')} "
        f"({free.get('CPU', 0):g} free), {counted(gpus, 'GPU', form='g')} ({free.get('GPU', 0):g} free){own}"
    )


def _check_answers(address: str) -> None:
    """Raise at once where Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there, or something that does not speak HTTP/2, such as Ray's dashboard.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        connection.sendall(_HTTP2_GREETING)
        if connection.recv(4)[3:] != _HTTP2_SETTINGS:
            raise OSError("what listens there is not Ray: its port is 6379 unless you chose one, not 8265")


def nodes() -> list[Node]:
    """The machines of the cluster that live."""
    return [
        Node(*(node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "memory", "object_store_memory")))
        for node in ray.nodes()
        if node["Alive"]
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's, which a driver need not import."""
    return type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError)


def cause_of(error: RayError) -> str:
    """The exception behind an error of Ray in one line."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1].strip()}" if lines else type(cause).__name__
