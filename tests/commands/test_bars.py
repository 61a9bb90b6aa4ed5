"""Progress bars on a terminal."""

import io

import pytest
from rich.console import Console

from deltacache.terminal import BarReporter


@pytest.mark.parametrize("name", ["train tokenizer", "validate deltaworld on heldout"])
def test_count_and_time_left_are_whole_in_80_columns(name: str) -> None:
    """Of a long training and with many figures: only these are cut."""
    console = Console(width=80, force_terminal=True, file=io.StringIO(), color_system=None)
    with BarReporter(console).stage(name, 1_000_000) as stage:
        stage.advance(400_000, loss="0.01234", clips_per_s="1,234", step="154.3 ms", data_wait="0.7 %")
        stage.advance(23_456)
    assert isinstance(console.file, io.StringIO)
    shown = [text for text in console.file.getvalue().splitlines() if name in text][-1]
    assert "423456/1000000" in shown
    assert shown.count(":") == 4  # h:mm:ss gone and left
    assert "…" in shown
