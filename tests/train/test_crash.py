"""A trainer that is killed while it writes: the last good checkpoint survives and a resumed run is exact."""

import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case

from deltacache.schemas.errors import StorageError
from deltacache.train import checkpoints
from deltacache.train.checkpoints import finished_checkpoints
from warm_process import start_script

# Dies in {victim} while a second checkpoint is being written or the first deleted.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from drawn import tokenizer_config, world_config
from deltacache.schemas.progress import SilentReporter
from deltacache.train import checkpoints
from trainers import train_tokenizer, train_world

out = Path({out!r})
original = getattr({victim})

def dying(*arguments, **keywords):
    if len(os.listdir(out / "checkpoints")) == 2:
        if {after}:
            original(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)

setattr({victim}, dying)
train_{kind}(
    Path({root!r}), out, {kind}_config(keep=1), resume=False, device="cpu", reporter=SilentReporter()
)
"""


ENDLESS = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from drawn import tokenizer_config, world_config
from deltacache.schemas.progress import SilentReporter
from trainers import train_tokenizer, train_world

config = {kind}_config(steps=10**6, save_every=1, log_every=1)
train_{kind}(Path({root!r}), Path({out!r}), config, resume=False, device="cpu", reporter=SilentReporter())
"""


@pytest.mark.parametrize(
    ("victim", "after", "left"),
    [
        ("checkpoints.torch, 'save'", True, "step-00000004"),
        ("checkpoints, 'save_weights'", True, "step-00000004"),
        ("checkpoints, 'sync'", False, "step-00000004"),
        ("checkpoints, 'remove'", False, "step-00000008"),
    ],
)
def test_killed_while_writing(case: Case, tmp_path: Path, victim: str, after: bool, left: str) -> None:
    out = tmp_path / "out"
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        out=str(out),
        root=str(case.root),
        kind=case.kind,
        victim=victim,
        after=after,
    )
    log = tmp_path / "log"
    with start_script(script, stdout=log) as process:
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert [path.name for path in finished_checkpoints(out)] == [left]
    assert len(list((out / "checkpoints").iterdir())) == 2  # the leftover of what was going on
    resumed = case.run(out, resume=True, keep=1)
    assert list((out / "checkpoints").iterdir()) == [resumed]
    weights = [case.weights(path) for path in (resumed, case.run(tmp_path / "unbroken"))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("seconds", [0.05, 0.4, 0.8])
def test_killed_at_any_moment(case: Case, tmp_path: Path, seconds: float) -> None:
    """A checkpoint after every step, so that hardly a moment is without one being written."""
    out = tmp_path / "out"
    script = ENDLESS.format(
        tests=str(Path(__file__).parent), out=str(out), root=str(case.root), kind=case.kind
    )
    with start_script(script) as process:
        deadline = time.monotonic() + 60
        while len(finished_checkpoints(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    step = int(finished_checkpoints(out)[-1].name.removeprefix("step-"))
    resumed = case.weights(case.run(out, resume=True, steps=step + 2))
    few = {"save_every": 10**6, "log_every": 10**6}
    unbroken = case.weights(case.run(tmp_path / "unbroken", steps=step + 2, **few))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    rows = pq.read_table(out / "curves.parquet")["step"].to_pylist()
    assert rows[:step] == list(range(1, step + 1))


def test_a_full_disk_is_said_in_one_line(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import resource, signal, sys, deltacache.cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "deltacache.cli.main()"
    )
    flags = ["--preset", "tiny", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    log = tmp_path / "log"
    with start_script(script, "train-tokenizer", features, out, *flags, stdout=log) as process:
        code = process.wait()
    said = log.read_text()
    assert code == 1, said
    assert "Traceback" not in said
    assert f"{out} cannot be written (File too large)" in said
    assert finished_checkpoints(out) == []


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "sync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*Make room"):
            case.run(tmp_path / "out", steps=100)
    assert finished_checkpoints(tmp_path / "out") == []
    rows = pq.read_table(tmp_path / "out/curves.parquet")["step"].to_pylist()
    assert max(rows) <= 8  # not a hundred steps that nobody can use
    case.run(tmp_path / "out", resume=True)
