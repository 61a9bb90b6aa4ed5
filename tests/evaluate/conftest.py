"""One small world for all tests of a session, and a fresh one for those that change something."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn_features import DrawnWorld, draw_world

from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.schemas.progress import SilentReporter


@pytest.fixture(scope="module", autouse=True)
def _whole_reports(drawing: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """With charts: these tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltacache.evaluate.report.charts.draw_svg", drawing["draw_svg"])
        yield


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> DrawnWorld:
    """A world whose evaluation with all models lies in ``root / "out"``; not to be changed."""
    world = draw_world(tmp_path_factory.mktemp("evaluated"))
    evaluate_clips(world.settings(), SilentReporter())
    return world


@pytest.fixture
def drawn(tmp_path: Path) -> DrawnWorld:
    """A world of one's own."""
    return draw_world(tmp_path)
