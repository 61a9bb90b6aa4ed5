"""Two evaluations into one folder: the second is refused while the first one writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_runs import mini_settings
from drawn_features import DrawnWorld
from foresight_runs import save_models, whole_settings

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.pipeline.storage.locking import dataset_lock, read_lock
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import SilentReporter


def check_refused_while_locked(out: Path, evaluate: Callable[[], Path]) -> None:
    """Nothing is written while another command holds the folder; afterwards all is well."""
    with dataset_lock(out, "evaluate"):
        with pytest.raises(DatasetError, match="evaluate"):
            evaluate()
        assert [path.name for path in out.iterdir()] == [".lock"]
    evaluate()
    assert read_lock(out) is None


def test_benchmarks(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    data = {"vspw": mini_benchmarks / "vspw"}
    settings = mini_settings(
        golden, mini_benchmarks, tmp_path / "out", data=data, heads={}, tokenizer=None, worlds=()
    )
    check_refused_while_locked(settings.out, lambda: evaluate_benchmarks(settings, SilentReporter()))


def test_whole_frames(mini_benchmarks: Path, tmp_path: Path) -> None:
    cityscapes = mini_benchmarks / "cityscapes"
    models = save_models(tmp_path, cityscapes)
    settings = whole_settings(models, cityscapes, tmp_path / "out", worlds=())
    check_refused_while_locked(settings.out, lambda: evaluate_foresight(settings, SilentReporter()))


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
