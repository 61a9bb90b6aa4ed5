"""The last line of a job."""

from types import SimpleNamespace
from typing import Any

import pytest

from deltacache.pipeline.jobs.progress import Throughput


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
