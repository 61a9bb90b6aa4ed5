"""Time and peak memory of each stage of a command, all its processes counted.

    python benchmarks/stages.py demo /tmp/demo
    python benchmarks/stages.py extract-features videos/ /tmp/features --backbone tiny --image-size 256 --views 2

A stage ends where the command prints a line ``[stage: … s …]``; a command without such lines is one stage. Memory
is the proportional set size (shared pages are divided among their users) of the command and all its descendants,
sampled five times a second.
"""

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil

_STAGE = re.compile(r"\[(?P<name>.+): (?P<seconds>[0-9.]+) s")


@dataclass
class Watch:
    """Peak memory of a process tree since the last stage ended."""

    process: psutil.Process
    peak_bytes: int = 0
    stages: list[tuple[str, float, int]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def sample(self) -> None:
        """Take the tree's memory now."""
        total = 0
        try:
            tree = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                continue
        self.peak_bytes = max(self.peak_bytes, total)

    def end_stage(self, name: str, seconds: float) -> None:
        """Close a stage and start the next."""
        self.stages.append((name, seconds, self.peak_bytes))
        self.peak_bytes, self.started = 0, time.perf_counter()


def main() -> int:
    """Run the command and print a row a stage."""
    arguments = sys.argv[1:]
    command = subprocess.Popen(
        [sys.executable, "-m", "deltacache", *arguments], stdout=subprocess.PIPE, text=True
    )
    watch = Watch(psutil.Process(command.pid))
    done = threading.Event()

    def sampler() -> None:
        while not done.wait(0.2):
            watch.sample()

    thread = threading.Thread(target=sampler)
    thread.start()
    assert command.stdout is not None
    for line in command.stdout:
        print(line, end="", flush=True)
        match = _STAGE.match(line)
        if match:
            watch.end_stage(match["name"], float(match["seconds"]))
    code = command.wait()
    done.set()
    thread.join()
    if not watch.stages:
        watch.end_stage(arguments[0], time.perf_counter() - watch.started)
    print("\n| stage | seconds | peak memory, GiB |\n|---|---|---|")
    for name, seconds, peak in watch.stages:
        print(f"| {name} | {seconds:.1f} | {peak / 2**30:.2f} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
