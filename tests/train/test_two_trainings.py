"""Two trainings into one output: the second is refused, also when the first was started for several workers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn import tokenizer_config

from deltacache.schemas.configs import head_preset, rgb_preset, tokenizer_preset
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.foresight import FrameFeatureConfig, foresight_head
from deltacache.schemas.progress import SilentReporter
from deltacache.systems.training import systems_preset, train_systems
from deltacache.train.heads.foresight import train_foresight_head
from deltacache.train.heads.setup import HeadRequest
from deltacache.train.heads.training import train_head, train_rgb_decoder
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.launch import launch
from deltacache.train.workers.trainable import Workers
from trainers import train_tokenizer

HOLD = """
import sys
from pathlib import Path
from deltacache.train.setup import holding_output
with holding_output(Path(sys.argv[1]), "train-world", resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""
QUIET = SilentReporter()


@pytest.mark.parametrize(
    "trainer", ["tokenizer", "world", "two workers", "head", "rgb", "foresight", "systems"]
)
def test_a_second_training_into_one_output_is_refused(trainer: str, features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    head = HeadRequest(tmp_path / "no root", out, "tiny", True, "cpu")
    request = TrainingRequest(features, out, tokenizer_preset("tiny"), True, "cpu")
    foresight = foresight_head("segmentation", "tiny", FrameFeatureConfig(backbone="tiny"), None)
    trainers: dict[str, Callable[[], object]] = {
        "tokenizer": lambda: train_tokenizer(
            features, out, request.config, resume=True, device="cpu", reporter=QUIET
        ),
        "world": lambda: launch("world", request, QUIET),
        "two workers": lambda: launch("tokenizer", request, QUIET, Workers(2)),
        "head": lambda: train_head(head, head_preset("vspw", "tiny"), QUIET),
        "rgb": lambda: train_rgb_decoder(head, rgb_preset("tiny"), QUIET),
        "foresight": lambda: train_foresight_head(
            tmp_path, out, foresight, resume=True, device="cpu", reporter=QUIET
        ),
        "systems": lambda: train_systems(
            systems_preset("tiny-table2"), features, out, Workers(), "cpu", QUIET
        ),
    }
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            DatasetError, match=rf"is being written by `train-world` \(process {first.pid} on"
        ):
            trainers[trainer]()
        assert [path.name for path in out.iterdir()] == [".lock"]
        first.kill()
    assert [path.name for path in out.iterdir()] == [".lock"], "left by the killed one"


def test_a_training_goes_on_where_a_killed_one_left_its_lock(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text("{}")
    config = tokenizer_config(steps=2)
    last = train_tokenizer(features, out, config, resume=False, device="cpu", reporter=QUIET)
    assert last.is_dir()
    assert not (out / ".lock").exists()
