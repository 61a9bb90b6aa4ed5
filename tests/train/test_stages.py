"""Stages: weights alone with a fresh optimizer, or everything with another rate."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from drawn import drawn_features, tokenizer_config, write_dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from deltacache.cli import app
from deltacache.models.checkpoints import load_tokenizer
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from trainers import train_tokenizer


def state_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "training_state.pt", weights_only=True)


def metadata_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def before(case: Case, tmp_path: Path) -> Path:
    """The output of a stage of eight steps."""
    case.run(tmp_path / "before")
    return tmp_path / "before"


def test_weights_alone_begin_at_step_0_with_a_fresh_optimizer(
    case: Case, before: Path, tmp_path: Path
) -> None:
    # the first step of a warm-up has rate 0, so the weights after it are those it began with
    after = case.run(tmp_path / "after", start="weights", start_from=before, steps=1)
    first, second = weights_of(before / "checkpoints/step-00000008"), weights_of(after)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {state["step"].item() for state in state_of(after)["optimizer"]["state"].values()} == {1.0}
    assert pq.read_table(tmp_path / "after/curves.parquet")["step"].to_pylist() == [1]
    assert metadata_of(after)["started_from"] == {
        "start": "weights",
        "fingerprint": metadata_of(before / "checkpoints/step-00000008")["fingerprint"],
        "step": 8,
    }


@pytest.mark.slow
def test_everything_at_the_same_rate_is_the_unbroken_run(case: Case, before: Path, tmp_path: Path) -> None:
    continued = case.run(tmp_path / "after", start="everything", start_from=before, steps=13)
    unbroken = case.run(tmp_path / "unbroken", steps=13)
    first, second = weights_of(continued), weights_of(unbroken)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cool_down_has_its_own_rate_and_decay_and_the_moments_of_before(
    case: Case, before: Path, tmp_path: Path
) -> None:
    changes = {"start": "everything", "learning_rate": 3e-5, "weight_decay": 0.5, "steps": 9}
    after = case.run(tmp_path / "after", start_from=before, **changes)
    optimizer = state_of(after)["optimizer"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0]
    assert [group["lr"] for group in optimizer["param_groups"]] == [3e-5, 3e-5]  # no second warm-up
    assert {state["step"].item() for state in optimizer["state"].values()} == {9.0}
    assert pq.read_table(tmp_path / "after/curves.parquet")["step"].to_pylist() == [9]


@pytest.mark.slow
def test_a_stopped_stage_goes_on_without_naming_the_stage_before(
    case: Case, before: Path, tmp_path: Path
) -> None:
    stage = {"start": "weights", "learning_rate": 1e-3}
    unbroken = case.run(tmp_path / "unbroken", start_from=before, **stage)
    case.run(tmp_path / "after", start_from=before, steps=4, **stage)
    resumed = case.run(tmp_path / "after", resume=True, **stage)
    first, second = weights_of(unbroken), weights_of(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metadata_of(resumed)["started_from"] == metadata_of(unbroken)["started_from"]


def test_a_stage_that_needs_another_says_how_to_give_it(case: Case, tmp_path: Path) -> None:
    for start, flag in (("weights", "--init-from"), ("everything", "--continue-from")):
        with pytest.raises(
            DeltacacheError, match=f"starts with {start} of the stage before.*give {flag} PATH"
        ):
            case.run(tmp_path / "out", start=start)
    with pytest.raises(DeltacacheError, match=r"start is random, but .* give --init-from"):
        case.run(tmp_path / "out", start_from=tmp_path)
    assert not (tmp_path / "out").exists()


def test_going_on_from_another_stage_than_before_is_refused(case: Case, before: Path, tmp_path: Path) -> None:
    case.run(tmp_path / "other", seed=1)
    case.run(tmp_path / "out", start="weights", start_from=before, steps=4)
    with pytest.raises(
        MismatchError, match=r"started from a checkpoint with fingerprint .* --resume continues"
    ):
        case.run(tmp_path / "out", start="weights", start_from=tmp_path / "other", resume=True)


def test_a_stage_without_steps_left_is_refused(case: Case, before: Path, tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match=r"has 8 steps and this stage ends at 8: .*larger --steps"):
        case.run(tmp_path / "out", start="everything", start_from=before, steps=8)
    assert not (tmp_path / "out").exists()


def test_nothing_to_start_from(case: Case, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for start in ("weights", "everything"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            case.run(tmp_path / "out", start=start, start_from=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_by_name(features: Path, tmp_path: Path) -> None:
    def train(out: Path, mlp: str, start_from: Path | None = None) -> Path:
        config = tokenizer_config(start="random" if start_from is None else "weights", steps=2)
        config = config.model_copy(update={"model": config.model.model_copy(update={"mlp": mlp})})
        options = {"resume": False, "device": "cpu", "reporter": SilentReporter(), "start_from": start_from}
        return train_tokenizer(features, out, config, **options)

    train(tmp_path / "gelu", "gelu")
    with pytest.raises(MismatchError, match=r"does not belong to this stage \(mlp was gelu, now swiglu\)"):
        train(tmp_path / "out", "swiglu", tmp_path / "gelu")
    assert not (tmp_path / "out").exists()


def test_weights_go_over_to_another_dataset_and_everything_too(features: Path, tmp_path: Path) -> None:
    """As from 256 px to 512 px: other features of the same backbone."""
    case = Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, features)
    case.run(tmp_path / "before")
    longer = write_dataset(tmp_path / "longer", "features", drawn_features(9, 7))
    case = Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, longer)
    for start, steps in (("weights", 2), ("everything", 10)):
        after = case.run(tmp_path / start, start=start, start_from=tmp_path / "before", steps=steps)
        assert metadata_of(after)["clips"]["count"] == 9


def test_released_weights_are_a_start(features: Path, tmp_path: Path) -> None:
    case = Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, features)
    weights = weights_of(case.run(tmp_path / "before"))
    released = tmp_path / "released"
    released.mkdir()
    torch.save(weights, released / "pytorch_model.bin")
    after = case.run(tmp_path / "after", start="weights", start_from=released, steps=1)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(after).items())


@pytest.mark.slow
def test_the_flags_choose_stage_and_start(features: Path, tmp_path: Path) -> None:
    small = ["--preset", "tiny", "--batch-size", "2", "--device", "cpu"]
    run = CliRunner().invoke
    begun = run(app, ["train-tokenizer", str(features), str(tmp_path / "a"), *small, "--steps", "2"])
    assert begun.exit_code == 0, begun.output
    for flag, steps, done in (("--init-from", 3, 3), ("--continue-from", 5, 5)):
        out = tmp_path / flag
        flags = [flag, str(tmp_path / "a"), "--steps", str(steps), "--accumulation", "1", "--keep", "1"]
        result = run(app, ["train-tokenizer", str(features), str(out), *small, *flags])
        assert result.exit_code == 0, result.output
        assert "effective batch 2 (batch 2 x accumulation 1 x workers 1)" in result.output
        metadata = metadata_of(out / f"checkpoints/step-{done:08d}")
        assert metadata["config"]["training"]["start"] == metadata["started_from"]["start"]
    both = ["--init-from", str(tmp_path), "--continue-from", str(tmp_path)]
    assert run(app, ["train-tokenizer", str(features), str(tmp_path / "b"), *small, *both]).exit_code == 2
    with pytest.raises(
        DeltacacheError, match="stage 'x' is not one of the world preset 'paper': give one of main"
    ):
        run(
            app,
            ["train-world", "deltas", str(tmp_path / "b"), "--preset", "paper", "--stage", "x"],
            catch_exceptions=False,
        )
