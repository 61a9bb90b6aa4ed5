"""Runs the installed command as a user would: its exit code, and what it printed."""

import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import fsspec
import numpy as np
import pytest
import torch
from command_runs import Command, Outcome

from deltacache import cli
from shared_ray import SharedRay
from warm_process import start_command


def run_process(*arguments: object, timeout: float = 240) -> Outcome:
    """Run ``deltacache`` with the arguments in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with start_command(*arguments, stdout=out, stderr=err) as process:
            return Outcome(process.wait(timeout), out.read_text(), err.read_text())


def run_here(*arguments: object) -> Outcome:
    """Run ``deltacache`` with the arguments in this process, which is afterwards as it was before.

    ``cli.main`` is what the installed command calls. A warning is an error, as in every test.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        _process_state(),
        _printing_to(out, err),
        patch.object(sys, "argv", ["deltacache", *map(str, arguments)]),
    ):
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:  # noqa: BLE001 - what the interpreter does at the end of a process
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
            code = 1
        assert isinstance(code, int), code
        said = []
        for file in (out, err):
            file.flush()
            file.seek(0)
            said.append(file.read())
    return Outcome(code, *said)


@contextmanager
def _printing_to(out: TextIO, err: TextIO) -> Iterator[None]:
    """What Python, libraries in C and child processes print."""
    before = [os.dup(1), os.dup(2)]
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    try:
        with patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
            yield
    finally:
        for number, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def _process_state() -> Iterator[None]:
    """Puts back what belongs to a process and would outlive a command; a thread that a command left is an error."""
    hook, folder, threads = sys.excepthook, Path.cwd(), set(threading.enumerate())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cli._state["debug"] = False
    for kind in {*fsspec.registry.values()}:
        kind.clear_instance_cache()  # a process begins without connections and listings
    try:
        with patch.dict(os.environ):
            yield
    finally:
        sys.excepthook = hook
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(torch_threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        cli._state["debug"] = False
    left = [thread.name for thread in set(threading.enumerate()) - threads if not thread.daemon]
    assert not left, left


@pytest.fixture(scope="session")
def deltacache() -> Command:
    """The command in this process, without Ray: ``extract-features`` and ``tokenize`` with ``--encoders 0``."""

    def run(*arguments: object) -> Outcome:
        encodes = {"extract-features", "tokenize"}.intersection(arguments[:2])
        return run_here(*arguments, *(("--encoders", 0) if encodes else ()))

    return run


@pytest.fixture(scope="session")
def deltacache_on_ray(shared_ray: SharedRay) -> Command:
    """The command, in this process and on a Ray that many tests share."""

    def run(*arguments: object) -> Outcome:
        shared_ray.start()
        return run_here(*arguments)

    return run


@pytest.fixture(scope="session")
def deltacache_process() -> Command:
    """The command in a process of its own, on a Ray of its own: where its start, its environment or its end matter."""
    return run_process


@pytest.fixture(scope="session")
def real_features(
    deltacache_on_ray: Command, real_videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The 12 ordinary clips at 256 px, 8 frames, 2 views, in tar shards of 4 videos; made on Ray."""
    out = tmp_path_factory.mktemp("real") / "features"
    deltacache_on_ray(
        "extract-features", real_videos / "fixture", out, "--backbone", "tiny", "--image-size", 256,
        "--views", 2, "--videos-per-shard", 4,
    ).done()  # fmt: skip
    return out
