"""Memory of the segmentation loss, as a process of its own sees it."""

import sys
from pathlib import Path

import pytest

from warm_process import start_script

MEASURE = """
import sys
from pathlib import Path
import torch
from deltacache.pipeline.benchmarks.frames import split_of
from deltacache.train.heads.data import LabelledCrops
from deltacache.train.heads.losses import segmentation_loss_by_rows

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

kind, (height, width, frames) = sys.argv[1], map(int, sys.argv[2:])
split = split_of(height, width, 512)
label = torch.randint(0, 124, (2, height, width // 2), dtype=torch.uint8)
batch = [LabelledCrops(2 * at, 2 * at + 2, split, label) for at in range(frames)]
logits = torch.randn(2 * frames, 124, 32, 32, requires_grad=True)
segmentation_loss_by_rows(logits[:2], [LabelledCrops(0, 2, split, label[:, :16])]).backward()  # code, threads
before = peak()
if kind == "crops":
    segmentation_loss_by_rows(logits, batch).backward()
else:
    whole = torch.randint(0, 124, (1, height, width), dtype=torch.uint8)
    batch = [LabelledCrops(at, at + 1, None, whole) for at in range(2 * frames)]
    segmentation_loss_by_rows(logits, batch).backward()
assert logits.grad.any()
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("kind", "height", "width", "frames"),
    [("crops", 720, 1280, 1), ("crops", 720, 1280, 2), ("crops", 1080, 1920, 1), ("whole", 1024, 2048, 1)],
)
def test_neither_the_size_nor_the_number_of_labels_takes_memory(
    kind: str, height: int, width: int, frames: int, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with start_script(MEASURE, kind, height, width, frames, stdout=said) as process:
        assert process.wait() == 0, said.read_text()
    logits_mib = 4 * 124 * height * width * frames >> 20  # of all pixels once: 435 MiB at 720p
    assert int(said.read_text()) < 150 < logits_mib
