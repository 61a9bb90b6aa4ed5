import pytest
import torch

from deltacache.train.loop import Meter, NonFiniteError


def add(meter: Meter, loss: float, norm: float = 1.0, rate: float = 0.5) -> None:
    tensors = {"loss": loss, "mse": 2 * loss, "gradient_norm": norm}
    meter.add({name: torch.tensor(value) for name, value in tensors.items()}, rate)


def test_a_row_holds_the_means_since_the_row_before() -> None:
    meter = Meter(10, effective_batch=4)
    for loss in (1.0, 3.0):
        add(meter, loss)
    first = meter.row()
    meter.restart_clock()
    add(meter, 8.0, rate=0.25)
    second = meter.row()
    assert (first["step"], first["loss"], first["mse"], first["learning_rate"]) == (12, 2.0, 4.0, 0.5)
    assert (first["loss_max"], first["gradient_norm_max"], first["spikes"]) == (3.0, 1.0, 0)
    assert (second["step"], second["loss"], second["learning_rate"]) == (13, 8.0, 0.25)
    assert first["clips_per_s"] == pytest.approx(4 / first["step_time_s"])
    assert meter.summary().startswith("3 steps, ")


def test_waiting_is_a_part_of_the_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    meter = Meter(0, effective_batch=20)
    with meter.waiting():
        pass
    add(meter, 1.0)
    row = meter.row()
    assert (row["step_time_s"], row["data_wait_s"], row["clips_per_s"]) == (10.0, 3.0, 2.0)
    assert meter.summary() == "1 step, 2 clips/s, 30.0 % of the time waiting for data"


@pytest.mark.parametrize("bad", [("nan", "1"), ("inf", "1"), ("1", "nan")])
def test_the_first_step_that_is_not_finite_is_named_and_those_before_it_have_a_row(
    bad: tuple[str, str],
) -> None:
    meter = Meter(100, effective_batch=1)
    add(meter, 1.0, rate=0.25)
    add(meter, *map(float, bad))
    add(meter, float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"step 102 has .*must be finite.*step 101.*lower learning"
    ) as stopped:
        meter.row()
    row = stopped.value.row
    assert stopped.value.done == 101
    assert row is not None
    assert (row["step"], row["loss"], row["learning_rate"]) == (101, 1.0, 0.25)


def test_a_first_step_that_is_not_finite_has_no_row() -> None:
    meter = Meter(100, effective_batch=1)
    add(meter, float("nan"))
    with pytest.raises(NonFiniteError, match="step 101 has loss nan") as stopped:
        meter.row()
    assert (stopped.value.done, stopped.value.row) == (100, None)


def test_spikes_are_named_with_what_was_usual_before() -> None:
    meter = Meter(0, effective_batch=1)
    for _ in range(30):
        add(meter, 2.0, 0.5)
    assert meter.row()["spikes"] == 0
    meter.restart_clock()
    for loss, norm in ((5.9, 4.9), (6.1, 0.5), (2.0, 5.5)):
        add(meter, loss, norm)
    row = meter.row()
    assert (row["spikes"], row["loss_max"], row["gradient_norm_max"]) == (2, pytest.approx(6.1), 5.5)
    assert meter.spikes == [
        "spike at step 32: loss 6.1 is 3.0 times the median of the 30 steps before (2)",
        "spike at step 33: gradient norm 5.5 is 11.0 times the median of the 30 steps before (0.5)",
    ]


def test_the_first_steps_are_no_spikes() -> None:
    meter = Meter(0, effective_batch=1)
    for loss in (*([1.0] * 19), 100.0):
        add(meter, loss)
        assert meter.row()["spikes"] == 0
        meter.restart_clock()
