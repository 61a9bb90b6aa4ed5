"""Training on a cluster of several nodes, one of which is lost, by the command."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos import nodes
from deltacache.train.checkpoints import finished_checkpoints
from warm_process import WarmProcess, start_command


def test_a_lost_node_is_made_good_from_the_last_checkpoint(real_features: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    flags = ("--preset", "tiny", "--batch-size", 2, "--steps", 100_000, "--save-every", 3, "--workers", 2)
    with (
        nodes(2) as cluster,
        start_command(
            "train-tokenizer", real_features, out, *flags, "--ray-address", cluster.address, stdout=log
        ) as driver,
    ):
        _wait(lambda: bool(finished_checkpoints(out)), driver, log)
        cluster.kill_one(random.Random(0))
        _wait(lambda: "2 workers go on from step" in log.read_text(), driver, log)
        went_on = int(log.read_text().split("2 workers go on from step ")[1].split()[0])
        _wait(lambda: finished_checkpoints(out)[-1].name > f"step-{went_on:08d}", driver, log)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(90) == 0, log.read_text()
    said = log.read_text()
    assert "effective batch 4 (batch 2 x accumulation 1 x workers 2)" in said
    assert went_on > 0
    assert went_on % 3 == 0
    assert "stopped by SIGTERM" in said


def _wait(what: Callable[[], bool], driver: WarmProcess, log: Path) -> None:
    deadline = time.monotonic() + 150
    while not what():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
