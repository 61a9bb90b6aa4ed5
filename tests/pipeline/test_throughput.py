"""The last line of a job, and what a dry run of one says about precision."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltacache.models.backbone import Backbone
from deltacache.pipeline.jobs.preview import Estimate, preview_extraction
from deltacache.pipeline.jobs.progress import Throughput
from deltacache.schemas.jobs import ExtractionSettings


@pytest.mark.parametrize(
    ("device", "precision", "width", "gain", "said"),
    [
        ("cpu", "float32", 768, 4.0, True),
        ("cpu", "float32", 768, 1.1, False),
        ("cpu", "bfloat16_autocast", 768, 4.0, False),
        ("cpu", "float32", 64, 4.0, False),
        ("cuda", "float32", 768, 4.0, False),
    ],
)
def test_what_bfloat16_would_save(
    device: str, precision: str, width: int, gain: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltacache.pipeline.jobs.progress.cpu_bfloat16_gain", lambda: gain)
    placement: Any = SimpleNamespace(device=device, encoders=1, decoders=1)
    throughput = Throughput(placement, "decoding", 2, encode_s=3000.0, _start=10.0, _end=4010.0)
    card: Any = SimpleNamespace(precision=precision, hidden_size=width)
    # Three of four quarters of 3,000 s in the forward pass
    expected = "; --precision bfloat16 would save up to about 38 min of it on this CPU, into another dataset"
    assert throughput.bfloat16_hint(card) == (expected if said else "")


@pytest.mark.parametrize(
    ("device", "precision", "gain", "said"),
    [
        ("cpu", "auto", 4.0, True),
        ("cpu", "auto", 1.1, False),
        ("cpu", "bfloat16", 4.0, False),
        ("cuda", "auto", 4.0, False),
    ],
)
def test_what_a_dry_run_says_of_bfloat16(
    device: str, precision: Any, gain: float, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From forward passes in both precisions, here of a backbone that takes ten times as long in float32."""
    forward = Backbone.patch_tokens

    def slow(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2 if backbone._dtype is None else 0.02)
        return forward(backbone, pixels)

    placement: Any = SimpleNamespace(device=device, encoders=1, decoders=1)
    estimate = Estimate(3600.0, 360_000.0, refused=0.0, placement=placement, clips=1, encoded=1)
    monkeypatch.setattr(Backbone, "patch_tokens", slow)
    monkeypatch.setattr("deltacache.pipeline.jobs.preview.NARROW", 1)
    monkeypatch.setattr("deltacache.pipeline.jobs.preview.cpu_bfloat16_gain", lambda: gain)
    monkeypatch.setattr("deltacache.pipeline.jobs.preview._try", lambda *_: (estimate, 1))
    (tmp_path / "a.mp4").touch()
    settings = ExtractionSettings(
        source=str(tmp_path), backbone="tiny", image_size=32, views=1, precision=precision
    )
    text = preview_extraction(settings, tmp_path / "out")
    assert (
        "101.0 h in all" if device == "cpu" else "100.0 h in all"
    ) in text  # CPUs decode and encode in turn
    faster = re.search(
        r"--precision bfloat16 would take about ([\d.]+) h: this CPU multiplies it faster", text
    )
    assert (faster is not None) == said
    assert faster is None or 10 < float(faster[1]) < 60
