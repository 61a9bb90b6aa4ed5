"""Real processes that start at once: they are forked from one that has imported what takes seconds to import.

They have their own pid, environment and end, and may be signalled and killed. What a program does while it is imported
needs ``subprocess``.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # what any optimizer imports
        "ray.train.torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
        "deltacache.cli",
        "deltacache.descriptions",
        "deltacache.terminal",
        "deltacache.evaluate.benchmarks.engine",
        "deltacache.evaluate.clips.run",
        "deltacache.pipeline.jobs.offline",
        "deltacache.train.heads.training",
    ]
)


class WarmProcess:
    """One that runs the text of a script, or ``deltacache``; with the methods of ``psutil.Popen`` that tests use."""

    def __init__(self, argv: Sequence[object], script: str, stdout: Path | None, stderr: Path | None) -> None:
        files = [str(stdout or os.devnull), str(stderr or stdout or os.devnull)]
        for file in (stdout, stderr):
            if file is not None:
                file.write_bytes(b"")  # who reads it may be faster than the process
        state = dict(os.environ), str(Path.cwd()), sys.path
        self._process = _CONTEXT.Process(target=_run, args=(script, [*map(str, argv)], *files, *state))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 240) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To a process that runs; nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once, as SIGKILL does."""
        self.send_signal(signal.SIGKILL)

    def children(self) -> list[psutil.Process]:
        """All processes below it."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever is left of it is killed."""
        for left in self.children():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        self.kill()
        self.wait()


def start_command(*arguments: object, stdout: Path | None = None, stderr: Path | None = None) -> WarmProcess:
    """Start ``deltacache`` with the arguments; what it prints goes to the files."""
    return WarmProcess(["deltacache", *arguments], "from deltacache.cli import main; main()", stdout, stderr)


def start_script(script: str, *arguments: object, stdout: Path | None = None) -> WarmProcess:
    """Start Python on the text of a script; what it prints goes to the file."""
    return WarmProcess(["-c", *arguments], script, stdout, None)


def _run(
    script: str,
    argv: list[str],
    stdout: str,
    stderr: str,
    environment: Mapping[str, str],
    folder: str,
    path: list[str],
) -> None:
    """What the interpreter does with a program, in a process that has been forked."""
    for name, number in ((stdout, 1), (stderr, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[:] = argv, path
    code: object = 0
    try:
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        code = 1
    try:
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.exit(code)
