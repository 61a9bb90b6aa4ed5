"""Two evaluations into one folder: the second is refused while the first one writes."""

from pathlib import Path

import pytest
from benchmark_runs import mini_settings
from drawn_features import DrawnWorld

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.pipeline.storage.locking import dataset_lock, read_lock
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import SilentReporter


def test_benchmarks(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    data = {"vspw": mini_benchmarks / "vspw"}
    settings = mini_settings(
        golden, mini_benchmarks, tmp_path / "out", data=data, heads={}, tokenizer=None, worlds=()
    )
    with dataset_lock(settings.out, "evaluate"):
        with pytest.raises(DatasetError, match="evaluate"):
            evaluate_benchmarks(settings, SilentReporter())
        assert [path.name for path in settings.out.iterdir()] == [".lock"]
    evaluate_benchmarks(settings, SilentReporter())
    assert read_lock(settings.out) is None


def test_clips(drawn: DrawnWorld) -> None:
    settings = drawn.settings()
    with dataset_lock(settings.out, "evaluate"), pytest.raises(DatasetError, match="evaluate"):
        evaluate_clips(settings, SilentReporter())
    evaluate_clips(settings, SilentReporter())
    assert read_lock(settings.out) is None


def test_a_lock_that_a_killed_command_left_is_no_obstacle(drawn: DrawnWorld) -> None:
    settings = drawn.settings()
    settings.out.mkdir()
    (settings.out / ".lock").write_text("{}")
    evaluate_clips(settings, SilentReporter())
    assert (settings.out / "metrics.parquet").exists()
