"""SIGTERM, and losses that are not finite: the run stops, and what it had is kept."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from safetensors.torch import load_file

from deltacache.schemas.errors import DeltacacheError
from deltacache.train.checkpoints import finished_checkpoints
from deltacache.train.optimizer import FiniteGuard
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.workers.group import stop_on_sigterm
from deltacache.train.world import WorldTask
from reporters import Lines
from warm_process import start_command


def changed_loss(monkeypatch: pytest.MonkeyPatch, factor: Any) -> None:
    """Multiply the loss of both trainers by ``factor(step)``."""
    for task in (TokenizerTask, WorldTask):
        original = task.training_loss

        def poisoned(self: Any, batch: Any, part: Any, original: Any = original) -> Any:
            loss, scalars = original(self, batch, part)
            return loss * factor(part.step), scalars

        monkeypatch.setattr(task, "training_loss", poisoned)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_and_the_run_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)  # Ray leaves one of its own in a process that has used it
    with monkeypatch.context() as patched:

        def terminate(step: int) -> float:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return 1.0

        changed_loss(patched, terminate)
        reporter = Lines()
        with pytest.raises(SystemExit) as stopped:
            case.run(tmp_path / "out", reporter=reporter)
    assert stopped.value.code == 0
    assert finished_checkpoints(tmp_path / "out")[-1].name == "step-00000006"
    assert pq.read_table(tmp_path / "out/curves.parquet")["step"].to_pylist() == [2, 4, 6]
    assert "stopped by SIGTERM" in reporter.said[-1]
    assert "step-00000006 is saved; run the same command with --resume to continue" in reporter.said[-1]
    assert signal.getsignal(signal.SIGTERM) is before
    resumed, unbroken = case.run(tmp_path / "out", resume=True), case.run(tmp_path / "unbroken")
    assert all(torch.equal(*pair) for pair in _pairs(resumed, unbroken))


def test_sigterm_in_the_last_step_is_a_finished_run(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_loss(monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGTERM) or 1.0 if step == 7 else 1.0)
    assert case.run(tmp_path / "out").name == "step-00000008"


def test_the_command_exits_0_when_it_is_terminated(features: Path, tmp_path: Path) -> None:
    flags = ("--preset", "tiny", "--steps", 10**6, "--batch-size", 4, "--log-every", 5, "--device", "cpu")
    log = tmp_path / "log"
    with start_command("train-tokenizer", features, tmp_path / "out", *flags, stdout=log) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("tensorboard/*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    (saved,) = finished_checkpoints(tmp_path / "out")
    assert f"{saved} is saved" in log.read_text()


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with stop_on_sigterm() as stop:
            inside.append((signal.getsignal(signal.SIGTERM), stop.asked))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [(before, False)]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("bad_step", "log_every"), [(6, 2), (5, 8), (4, 2), (0, 2)])
def test_a_loss_that_is_not_finite_stops_with_the_state_before(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, bad_step: int, log_every: int
) -> None:
    with monkeypatch.context() as patched:
        changed_loss(patched, lambda step: bad if step == bad_step else 1.0)
        with pytest.raises(
            DeltacacheError, match=rf"step {bad_step + 1} has loss {bad}.*before it, step {bad_step}"
        ):
            case.run(tmp_path / "out", log_every=log_every)
    newest = finished_checkpoints(tmp_path / "out")[-1]
    assert newest.name == f"step-{bad_step:08d}"
    if bad_step:
        rows = pq.read_table(tmp_path / "out/curves.parquet")
        assert rows["step"].to_pylist()[-1] == bad_step
        stopped = case.run(tmp_path / "stopped", steps=bad_step)
        assert all(torch.equal(*pair) for pair in _pairs(newest, stopped))
    resumed, unbroken = case.run(tmp_path / "out", resume=True), case.run(tmp_path / "unbroken")
    assert all(torch.equal(*pair) for pair in _pairs(resumed, unbroken))


@pytest.mark.slow
def test_spikes_are_said_and_counted(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_loss(monkeypatch, lambda step: 1e4 if step == 31 else 1.0)
    reporter = Lines()
    case.run(tmp_path / "out", steps=40, log_every=10, reporter=reporter, learning_rate=1e-6)
    (said,) = [line for line in reporter.said if line.startswith("spike")]
    assert said.startswith("spike at step 32: loss ")
    assert said.endswith("(and 1 more since the row before)")  # that of the gradient norm
    spikes = pq.read_table(tmp_path / "out/curves.parquet").to_pydict()
    assert dict(zip(spikes["step"], spikes["spikes"], strict=True))[32] == 2


def test_spikes_of_the_warm_up_are_counted_and_not_said(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_loss(monkeypatch, lambda step: 1e4 if step == 31 else 1.0)
    reporter = Lines()
    case.run(tmp_path / "out", steps=40, log_every=10, warmup_steps=40, reporter=reporter, learning_rate=1e-6)
    assert not [line for line in reporter.said if line.startswith("spike")]
    spikes = pq.read_table(tmp_path / "out/curves.parquet").to_pydict()
    assert sum(spikes["spikes"]) >= 1


@pytest.mark.parametrize("found", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_the_optimizer_does_nothing_from_the_first_bad_step_on(found: tuple[float, float]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    guard = FiniteGuard(optimizer, parameter.device)
    states = []
    for loss, norm in ((1.0, 1.0), found, (1.0, 1.0)):
        parameter.grad = torch.full((3,), loss)
        guard.look_at(torch.tensor(loss), torch.tensor(norm))
        optimizer.step()
        states.append((parameter.detach().clone(), optimizer.state[parameter]["step"].item()))
    assert not torch.equal(states[0][0], torch.ones(3))
    for weights, step in states[1:]:
        assert torch.equal(weights, states[0][0])
        assert step == 1.0


def _pairs(one: Path, other: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    return [(first[name], second[name]) for name in first]
