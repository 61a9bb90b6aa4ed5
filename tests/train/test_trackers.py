"""Trackers through one interface, with the real libraries and no network."""

import sqlite3
import traceback
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from drawn import world_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deltacache.schemas.errors import DeltacacheError
from reporters import Lines
from trainers import train_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class BreakingMlflow(Lines):
    """Takes the table of metrics out of MLflow's store at the second row."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def advance(self, items: int = 1, **status: float | str) -> None:
        super().advance(items, **status)
        if len(self.advances) == 2:
            with sqlite3.connect(self.out / "mlflow.db") as store:
                store.execute("ALTER TABLE metrics RENAME TO lost")
            store.close()


def steps_of_events(out: Path) -> list[int]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [each.step for each in events.Scalars("loss")]


def test_all_have_every_row_of_one_run_that_resume_continues(
    deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "out"
    chosen: dict[str, Any] = {"trackers": ["tensorboard", "mlflow"], "wandb": "offline", "project": "lab"}
    for steps, name, resume in ((4, "first try", False), (8, "second try", True)):
        config = world_config(**chosen, steps=steps, run_name=name)
        train_world(deltas, out, config, resume=resume, device="cpu", reporter=Lines())
    assert steps_of_events(out) == [2, 4, 6, 8]
    logs = list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len({each.name for each in logs}) == 1  # called by the run
    assert len(logs) == 2
    assert all(b"lab" in each.read_bytes() for each in logs)
    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("lab")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("second try", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    table = pq.read_table(out / "curves.parquet", columns=["step", "loss"]).to_pylist()
    assert [(each.step, each.value) for each in history] == [(row["step"], row["loss"]) for row in table]


def test_one_that_fails_does_not_end_the_training(
    deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "out"
    reporter = BreakingMlflow(out)
    config = world_config(trackers=["mlflow", "tensorboard"])
    checkpoint = train_world(deltas, out, config, resume=False, device="cpu", reporter=reporter)
    assert checkpoint.name == "step-00000008"
    said = [text for text in reporter.said if "failed" in text]
    assert len(said) == 1
    assert said[0].startswith("train world: mlflow failed and gets no more rows of this run (")
    assert steps_of_events(out) == [2, 4, 6, 8]
    assert pq.read_table(out / "curves.parquet")["step"].to_pylist() == [2, 4, 6, 8]


def test_credentials_of_a_tracking_server_are_not_said(
    deltas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:planted-secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = world_config(trackers=["mlflow"])
    with pytest.raises(
        DeltacacheError, match=r"MLflow does not start at http://\S*127\.0\.0\.1:9 "
    ) as caught:
        train_world(deltas, tmp_path / "out", config, resume=False, device="cpu", reporter=Lines())
    assert "planted-secret" not in "".join(traceback.format_exception(caught.value))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(b"planted-secret" not in path.read_bytes() for path in written)
