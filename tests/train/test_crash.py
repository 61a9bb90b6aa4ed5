"""A trainer that is killed while it writes: the last good checkpoint survives and a resumed run is exact."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import tokenizer_config

from deltacache.models.checkpoints import load_tokenizer
from deltacache.schemas.progress import SilentReporter
from deltacache.train import train_tokenizer
from deltacache.train.checkpoints import finished_checkpoints

# Dies in {victim} while a second checkpoint is being written or the first deleted.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from drawn import tokenizer_config
from deltacache.schemas.progress import SilentReporter
from deltacache.train import checkpoints, train_tokenizer

out = Path({out!r})
original = getattr({victim})

def dying(*arguments, **keywords):
    if len(os.listdir(out / "checkpoints")) == 2:
        if {after}:
            original(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)

setattr({victim}, dying)
train_tokenizer(
    Path({features!r}), out, tokenizer_config(keep=1), resume=False, device="cpu", reporter=SilentReporter()
)
"""


@pytest.mark.parametrize(
    ("victim", "after", "left"),
    [
        ("checkpoints.torch, 'save'", True, "step-00000004"),
        ("checkpoints, 'sync'", False, "step-00000004"),
        ("checkpoints, 'remove'", False, "step-00000008"),
    ],
)
def test_killed_while_writing(features: Path, tmp_path: Path, victim: str, after: bool, left: str) -> None:
    out = tmp_path / "out"
    script = KILLED.format(
        tests=str(Path(__file__).parent), out=str(out), features=str(features), victim=victim, after=after
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in finished_checkpoints(out)] == [left]
    assert len(list((out / "checkpoints").iterdir())) == 2  # the leftover of what was going on
    resumed = train_tokenizer(
        features, out, tokenizer_config(keep=1), resume=True, device="cpu", reporter=SilentReporter()
    )
    assert list((out / "checkpoints").iterdir()) == [resumed]
    unbroken = train_tokenizer(
        features, tmp_path / "un", tokenizer_config(), resume=False, device="cpu", reporter=SilentReporter()
    )
    weights = [load_tokenizer(path).model.state_dict() for path in (resumed, unbroken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
