"""Both trainers from a dataset to a checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cases import Case
from drawn import drawn_card, drawn_deltas, drawn_features, tokenizer_config, world_config, write_dataset

from deltacache.models.checkpoints import load_tokenizer
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.train import data
from reporters import Lines
from trainers import train_tokenizer, train_world


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def curves(out: Path) -> dict[str, list[float]]:
    return pq.read_table(out / "curves.parquet").to_pydict()


def test_a_run_leaves_everything_that_is_promised(
    case: Case, tmp_path: Path, drawing: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltacache.train.logs.plot_curves", drawing["plot_curves"])
    reporter = Lines()
    checkpoint = case.run(tmp_path / "out", reporter=reporter)
    assert checkpoint == tmp_path / "out/checkpoints/step-00000008"
    assert {path.name for path in checkpoint.iterdir()} == {
        "config.json",
        "model.safetensors",
        "training_state.pt",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("checkpoints", "config.yaml", "curves.parquet", "curves.png", "tensorboard")
    }
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text()) == case.config().model_dump(mode="json")
    assert list((tmp_path / "out/tensorboard").glob("events.out.tfevents.*"))
    _, batch, summary = reporter.said  # the schedule, how steps are cut, how it went
    assert batch.startswith(
        f"train {case.kind}: effective batch 5 (batch 5 x accumulation 1 x workers 1): a pass takes "
    )
    assert re.search(r"[GM]iB that are free on cpu; at most about [\d.]+ s for 8 steps$", batch)
    assert summary.startswith(f"train {case.kind}: 8 steps, ")
    assert "clips/s" in summary
    assert "% of the time waiting for data" in summary


def test_curves_have_a_row_at_each_interval_and_each_save(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path / "out", log_every=3, save_every=5)
    table = curves(tmp_path / "out")
    assert table["step"] == [3, 5, 6, 8]
    assert table["learning_rate"] == pytest.approx([2e-3, 3e-3, 3e-3, 3e-3])
    timing = {"learning_rate", "gradient_norm", "step_time_s", "data_wait_s", "clips_per_s"}
    assert timing | {"step", "loss"} <= table.keys()
    assert all(
        0 <= wait < step for wait, step in zip(table["data_wait_s"], table["step_time_s"], strict=True)
    )


def test_metadata_says_what_the_model_was_made_from(case: Case, tmp_path: Path) -> None:
    metadata = case.load(case.run(tmp_path / "out")).metadata
    card = drawn_card("features" if case.kind == "tokenizer" else "deltas", 6)
    assert metadata["step"] == 8
    assert metadata["config"] == case.config().model_dump(mode="json")
    assert metadata["data_fingerprint"] == card.fingerprint
    assert metadata["features_fingerprint"] == card.features_fingerprint
    assert metadata["backbone_sha256"] == card.backbone.weights_sha256
    assert metadata.get("tokenizer_fingerprint") == card.tokenizer_fingerprint
    assert (metadata["patch_grid"], metadata["hidden_size"], metadata["image_size"]) == ([2, 2], 16, 32)
    assert metadata["clips"]["count"] == 12


def test_only_the_asked_number_of_checkpoints_is_kept(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path / "out", save_every=2, keep=3)
    names = [path.name for path in sorted((tmp_path / "out/checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = case.weights(case.run(tmp_path / "a"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_equal_weights(first, case.weights(case.run(tmp_path / "b")))
    assert torch.equal(torch.get_rng_state(), state)
    other = case.weights(case.run(tmp_path / "c", seed=8))
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("proj.weight"))


def test_the_bar_reaches_its_end_also_after_a_stop(case: Case, tmp_path: Path) -> None:
    for resume, steps, done in ((False, 5, 0), (True, 9, 5)):
        reporter = Lines()
        case.run(tmp_path / "out", resume=resume, steps=steps, reporter=reporter)
        assert reporter.stages == [(f"train {case.kind}", steps, done)]
        assert done + sum(items for items, _ in reporter.advances) == steps
        assert all(
            status.keys() == {"loss", "clips_per_s", "step", "data_wait"} for _, status in reporter.advances
        )


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 4, 5])
def test_a_resumed_run_is_bitwise_the_unbroken_one(case: Case, tmp_path: Path, stopped: int) -> None:
    unbroken = case.weights(case.run(tmp_path / "unbroken"))
    case.run(tmp_path / "resumed", steps=stopped)
    resumed = case.weights(case.run(tmp_path / "resumed", resume=True))
    assert_equal_weights(unbroken, resumed)


@pytest.mark.slow
def test_a_run_goes_on_in_its_precision_and_one_that_names_none_in_that_of_its_device(
    case: Case, tmp_path: Path
) -> None:
    """Configs of older versions do not name one."""
    out, exact = tmp_path / "out", case.weights(case.run(tmp_path / "exact", precision="float32"))
    case.run(out, steps=4)
    path = out / "checkpoints/step-00000004/config.json"
    config = json.loads(path.read_text())
    assert config["config"]["training"].pop("precision") == "auto"
    path.write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"training\.precision was auto, now bfloat16"):
        case.run(out, resume=True, precision="bfloat16")
    assert_equal_weights(case.weights(case.run(out, resume=True)), exact)
    fast = case.weights(case.run(tmp_path / "fast", precision="bfloat16"))
    assert {weight.dtype for weight in fast.values()} == {torch.float32}
    assert not all(torch.equal(fast[name], exact[name]) for name in exact)


@pytest.mark.slow
def test_curves_of_a_resumed_run_are_those_of_the_unbroken_one(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path / "unbroken")
    case.run(tmp_path / "resumed", steps=4)
    case.run(tmp_path / "resumed", resume=True)
    unbroken, resumed = curves(tmp_path / "unbroken"), curves(tmp_path / "resumed")
    for name in ("step", "loss", "gradient_norm", "learning_rate"):
        assert unbroken[name] == resumed[name]


def test_streamed_features_train_the_same_weights(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, features)
    resident = case.weights(case.run(tmp_path / "resident"))
    monkeypatch.setattr(data, "memory_bytes", lambda: 0)
    assert_equal_weights(resident, case.weights(case.run(tmp_path / "streamed")))


@pytest.mark.slow
def test_resuming_a_finished_run_returns_at_once(case: Case, tmp_path: Path) -> None:
    checkpoint = case.run(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    reporter = Lines()
    assert case.run(tmp_path / "out", resume=True, reporter=reporter) == checkpoint
    assert reporter.said == [f"train {case.kind}: {checkpoint} has all its steps, nothing to do"]
    assert case.run(tmp_path / "out", resume=True, steps=1, reporter=reporter) == checkpoint
    assert reporter.said[-1].endswith("has all its steps, more than the 1 asked for, nothing to do")
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_resume_without_a_checkpoint_starts(case: Case, tmp_path: Path) -> None:
    fresh = case.weights(case.run(tmp_path / "fresh", resume=True))
    assert_equal_weights(fresh, case.weights(case.run(tmp_path / "plain")))


@pytest.mark.slow
def test_the_tokenizer_learns_what_only_the_token_can_tell(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "features", "features", drawn_features(40, 6))
    config = tokenizer_config(0.0, steps=300, batch_size=32, save_every=300, log_every=50, learning_rate=1e-2)
    train_tokenizer(root, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    table = curves(tmp_path / "out")
    assert table["mse"][-1] < 0.2 * table["copy_last_mse"][-1]


@pytest.mark.slow
def test_best_of_many_learns_both_futures_and_one_query_their_mean(tmp_path: Path) -> None:
    deltas = write_dataset(tmp_path / "deltas", "deltas", drawn_deltas(40, 6))
    last_loss = {}
    for query in ("noise", "learned"):
        config = world_config(query, steps=150, batch_size=32, save_every=150, log_every=50)
        out = tmp_path / query
        train_world(deltas, out, config, resume=False, device="cpu", reporter=SilentReporter())
        last_loss[query] = curves(out)["loss"][-1]
    assert last_loss["noise"] < 0.2 * last_loss["learned"]


def test_state_holds_nothing_but_numbers_and_tensors(case: Case, tmp_path: Path) -> None:
    checkpoint = case.run(tmp_path / "out")
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    assert state["step"] == 8
    assert json.loads((checkpoint / "config.json").read_text())["kind"] == case.kind
