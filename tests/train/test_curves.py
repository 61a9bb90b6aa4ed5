from pathlib import Path

import pytest
import torch

from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.train.curves import Meter, plot_curves, read_curves, write_curves


def add(meter: Meter, loss: float, norm: float = 1.0) -> None:
    meter.add(
        {"loss": torch.tensor(loss), "mse": torch.tensor(2 * loss), "gradient_norm": torch.tensor(norm)}
    )


def test_a_row_holds_the_means_since_the_row_before() -> None:
    meter = Meter(10, batch_size=4)
    for loss in (1.0, 3.0):
        add(meter, loss)
    first = meter.row(0.5)
    meter.restart_clock()
    add(meter, 8.0)
    second = meter.row(0.25)
    assert (first["step"], first["loss"], first["mse"], first["learning_rate"]) == (12, 2.0, 4.0, 0.5)
    assert (second["step"], second["loss"]) == (13, 8.0)
    assert first["clips_per_s"] == pytest.approx(4 / first["step_time_s"])
    assert meter.summary().startswith("3 steps, ")


def test_waiting_is_a_part_of_the_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    meter = Meter(0, batch_size=20)
    with meter.waiting():
        pass
    add(meter, 1.0)
    row = meter.row(0.1)
    assert (row["step_time_s"], row["data_wait_s"], row["clips_per_s"]) == (10.0, 3.0, 2.0)
    assert meter.summary() == "1 steps, 2 clips/s, 30.0 % of the time waiting for data"


@pytest.mark.parametrize("bad", [("nan", "1"), ("inf", "1"), ("1", "nan")])
def test_the_first_step_that_is_not_finite_is_named(bad: tuple[str, str]) -> None:
    meter = Meter(100, batch_size=1)
    add(meter, 1.0)
    add(meter, *map(float, bad))
    add(meter, float("nan"))
    with pytest.raises(DeltacacheError, match=r"step 102 has .*must be finite.*learning rate"):
        meter.row(0.1)


def test_curves_go_on_from_a_step_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    assert read_curves(path, 10) == []
    write_curves([{"step": step, "loss": 0.5} for step in (2, 4, 6)], path)
    assert read_curves(path, 4) == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.5}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.parquet"]


def test_damaged_curves_are_named(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DatasetError, match=r"curves\.parquet cannot be read.*delete it"):
        read_curves(path, 4)


def test_a_single_row_with_rate_zero_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves([{"step": 1, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 0.0}], path, "world")
    assert path.read_bytes().startswith(b"\x89PNG")
