"""Several workers under a real Ray: the same losses, lost workers replaced, SIGTERM, going on with another number."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from drawn import tokenizer_config, world_config

from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.train.checkpoints import finished_checkpoints
from trainers import train_tokenizer, train_world
from warm_process import WarmProcess, start_script

SCRIPT = (Path(__file__).parent / "together.py").read_text()
FAR: dict[str, Any] = {"batch_size": 8, "steps": 10**6, "save_every": 20, "log_every": 20, "keep": 3}


def world_case(deltas: Path) -> Case:
    return Case("world", train_world, world_config, load_world, deltas)


@contextmanager
def together(
    case: Case, out: Path, workers: int, *, resume: bool = False, **training: object
) -> Iterator[tuple[WarmProcess, Path]]:
    """The process, and the file with what it prints. Whatever is left of it is killed.

    One worker is one of Ray Train too: enough where nothing is said to another worker.
    """
    arguments = [case.kind, case.root, out, workers, json.dumps(training), "resume" if resume else "new"]
    log = out.with_suffix(".log")
    with start_script(SCRIPT, *arguments, stdout=log) as process:
        yield process, log


def finished(case: Case, out: Path, workers: int, **training: object) -> str:
    """What a run to the end prints."""
    with together(case, out, workers, **training) as (process, log):
        assert process.wait(200) == 0, log.read_text()
    return log.read_text()


def wait_for(what: Callable[[], object], process: WarmProcess, log: Path) -> None:
    """Until ``what`` is true."""
    deadline = time.monotonic() + 150
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def trainers(process: WarmProcess) -> list[psutil.Process]:
    """The processes that train."""
    found = []
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            if "TrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def curves(out: Path, columns: list[str]) -> dict[str, list[float]]:
    return pq.read_table(out / "curves.parquet", columns=columns).to_pydict()


def test_two_workers_learn_what_one_does(case: Case, tmp_path: Path) -> None:
    """With one pass of eight each, or with two of four, on one side of a split, and validated on the other."""
    split = {"batch_size": 8} if case.kind == "tokenizer" else {"batch_size": 4, "accumulation": 2}
    data = {"split": 0.6, "validate_every": 4, "patience": 2}
    alone = case.run(tmp_path / "alone", batch_size=16, steps=12, log_every=1, data=data)
    said = finished(case, tmp_path / "both", 2, **split, steps=12, log_every=1, data=data)
    assert "effective batch 16 (batch " in said
    assert said.count("effective batch") == 1  # one worker speaks for all
    columns = ["step", "loss", "gradient_norm", "validation_loss"]
    one, both = (curves(tmp_path / name, columns) for name in ("alone", "both"))
    validated = [
        step for step, loss in zip(both["step"], both["validation_loss"], strict=True) if loss is not None
    ]
    assert validated == [4, 8, 12]
    for column in columns:
        found, expected_of = ([value for value in run[column] if value is not None] for run in (both, one))
        assert found == pytest.approx(expected_of, rel=2e-5)
    weights, expected = (case.weights(path) for path in (finished_checkpoints(tmp_path / "both")[-1], alone))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=2e-4, rtol=1e-3)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )


def test_a_killed_worker_is_replaced_and_the_run_goes_on_from_the_last_checkpoint(
    deltas: Path, tmp_path: Path
) -> None:
    case, out = world_case(deltas), tmp_path / "out"
    with together(case, out, 2, **FAR) as (process, log):
        wait_for(lambda: finished_checkpoints(out), process, log)
        victim = trainers(process)[1]
        victim.kill()
        wait_for(lambda: "a worker was lost" in log.read_text(), process, log)
        newest = int(finished_checkpoints(out)[-1].name.removeprefix("step-"))
        wait_for(lambda: "2 workers go on from step" in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0, log.read_text()
    said = log.read_text()
    went_on = int(said.split("2 workers go on from step ")[1].split()[0])
    assert went_on == newest
    assert went_on % FAR["save_every"] == 0
    stopped = finished_checkpoints(out)[-1]
    assert f"stopped by SIGTERM, {stopped} is saved" in said
    assert not (out / ".ray-train").exists()
    _check_it_goes_on_alone(case, out, stopped, tmp_path)


def _check_it_goes_on_alone(case: Case, out: Path, stopped: Path, folder: Path) -> None:
    """With one worker, in the same order: as a run that one worker made from the start."""
    steps = int(stopped.name.removeprefix("step-")) + 5
    flags = {**FAR, "batch_size": 16, "log_every": 1, "save_every": 10**6}
    case.run(out, resume=True, **{**flags, "steps": steps})
    case.run(folder / "unbroken", **{**flags, "steps": steps})
    last, expected = (curves(path, ["step", "loss"]) for path in (out, folder / "unbroken"))
    assert last["step"][-5:] == expected["step"][-5:]
    # Rounding grows over hundreds of steps; another order of samples or noise differs by more than half
    assert last["loss"][-5:] == pytest.approx(expected["loss"][-5:], rel=0.05)


def test_a_loss_that_is_not_finite_stops_all_workers_with_the_state_before(
    deltas: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {"batch_size": 8, "steps": 40, "learning_rate": 1e30, "warmup_steps": 0}
    with together(world_case(deltas), out, 2, **flags) as (process, log):
        assert process.wait(240) == 1
    said = log.read_text()
    assert "both must be finite" in said
    assert "worker was lost" not in said
    saved = finished_checkpoints(out)[-1].name
    assert f"step {int(saved.removeprefix('step-'))}; continue from there" in said


def test_what_one_worker_alone_refuses_ends_all_at_once(deltas: Path, tmp_path: Path) -> None:
    case, out = world_case(deltas), tmp_path / "out"
    case.run(out, batch_size=8, steps=4)
    (out / "curves.parquet").write_bytes(b"garbage")  # read by the first worker, when all have begun
    with together(case, out, 2, resume=True, batch_size=4, steps=8) as (process, log):
        assert process.wait(240) == 1
    said = log.read_text()
    assert f"error: {out / 'curves.parquet'} cannot be read" in said
    assert "worker was lost" not in said


def test_a_dead_relay_ends_the_training_with_one_message(deltas: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with together(world_case(deltas), out, 1, **FAR) as (process, log):
        wait_for(lambda: finished_checkpoints(out), process, log)
        relays = [each for each in process.children() if each.name().startswith("ray::RelayActor")]
        assert len(relays) == 1
        relays[0].kill()
        assert process.wait(240) == 1
    said = log.read_text()
    assert "error: the process through which the workers report died" in said
    assert f"start again with --resume; {finished_checkpoints(out)[-1]} is the newest checkpoint" in said
    assert "Traceback" not in said
    assert not (out / ".ray-train").exists()


def test_workers_that_always_die_are_not_started_for_ever(deltas: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with together(world_case(deltas), out, 2, batch_size=4, steps=10**6, save_every=10**6) as (process, log):
        for start in range(1, 4):
            wait_for(lambda: log.read_text().count("effective batch") == start, process, log)  # noqa: B023
            trainers(process)[0].kill()
        assert process.wait(240) == 1
    said = log.read_text()
    assert said.count("a worker was lost") == 2
    assert "error: workers were lost 3 times without a new checkpoint after step 0" in said


def test_what_a_worker_refuses_is_said_and_not_tried_again(features: Path, tmp_path: Path) -> None:
    case, out = (
        Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, features),
        tmp_path / "out",
    )
    case.run(out, batch_size=8, steps=4)
    with together(case, out, 1, resume=True, batch_size=4, steps=8) as (process, log):
        assert process.wait(240) == 1
    said = log.read_text()
    assert "error: " in said
    assert "effective batch of 8, now it is 4" in said
    assert "Traceback" not in said
    assert "worker was lost" not in said
