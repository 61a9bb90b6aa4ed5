"""inspect says of a training how far it is: while it runs, after it was stopped, and when it is finished."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cases import Case

from deltacache.descriptions import describe_output
from deltacache.schemas.progress import ProgressStage


class Inspecting:
    """A reporter that inspects the output at every row; interrupts the training at the sixth."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.texts: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        yield self

    def advance(self, items: int = 1, **status: float | str) -> None:
        self.texts.append(describe_output(self.out))
        if len(self.texts) == 6:
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        pass


def test_a_training_is_shown_from_its_first_row_to_its_end(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows: dict[str, Any] = {"steps": 8, "log_every": 1, "save_every": 4}
    reporter = Inspecting(out)
    with pytest.raises(KeyboardInterrupt):
        case.run(out, reporter=reporter, **rows)
    first, second, sixth = (reporter.texts[number] for number in (0, 1, 5))
    assert "running: step 0 of 8" in first
    assert "speed" not in first  # no row yet
    assert "a training without a checkpoint yet" in second
    assert "running: step 1 of 8" in second  # no checkpoint, but a row
    for name in ("loss  ", "steps/s", "time left              about"):
        assert name in second
    assert "running: step 4 of 8" in sixth
    stopped = describe_output(out)
    assert "stopped after step 4 of 8; the same command with --resume continues after step 4" in stopped
    assert "running" not in stopped
    case.run(out, resume=True, **rows)
    finished = describe_output(out)
    assert "finished: step 8 of 8" in finished
    assert "steps/s" in finished
    assert "time left" not in finished
