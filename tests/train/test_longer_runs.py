"""``--steps`` and ``--resume``: a schedule keeps its shape, and more steps go on wherever it allows them."""

import json
from pathlib import Path

import pytest
import torch
from cases import Case
from typer.testing import CliRunner

from deltacache.cli import app
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.systems.training import SystemsConfig
from reporters import Lines


def schedule_of(checkpoint: Path) -> list[int | None]:
    training = json.loads((checkpoint / "config.json").read_text())["config"]["training"]
    return [training[name] for name in ("steps", "warmup_steps", "decay_steps")]


def same(case: Case, one: Path, other: Path) -> bool:
    first, second = case.weights(one), case.weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_schedule_whose_past_rates_stay_may_change(case: Case, tmp_path: Path) -> None:
    """Before its decay has begun, a decay to a later step is that of an unbroken run."""
    case.run(tmp_path / "out", steps=3, warmup_steps=3, decay_steps=6)
    longer = case.run(tmp_path / "out", resume=True, steps=10, warmup_steps=3, decay_steps=12)
    assert same(case, longer, case.run(tmp_path / "unbroken", steps=10, warmup_steps=3, decay_steps=12))


@pytest.mark.parametrize("changes", [{"warmup_steps": 6}, {"warmup_steps": 2}, {"decay_steps": 30}])
def test_a_schedule_with_other_past_rates_is_refused(
    case: Case, tmp_path: Path, changes: dict[str, int]
) -> None:
    schedule = {"warmup_steps": 3, "decay_steps": 20}
    case.run(tmp_path / "out", **schedule)
    with pytest.raises(
        MismatchError, match=r"step \d had another rate.*give --warmup-steps and --decay-steps"
    ):
        case.run(tmp_path / "out", resume=True, steps=12, **schedule | changes)


@pytest.mark.slow
def test_a_cool_down_is_past_any_warm_up(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path / "before")
    case.run(tmp_path / "out", start="everything", start_from=tmp_path / "before", steps=10, warmup_steps=3)
    case.run(tmp_path / "out", start="everything", resume=True, steps=12, warmup_steps=5)


def test_a_run_says_its_schedule_and_that_it_ends_in_its_warm_up(case: Case, tmp_path: Path) -> None:
    lines = Lines()
    case.run(tmp_path / "out", reporter=lines, steps=2, warmup_steps=3)
    assert any("2 steps: a warm-up of 3 steps to 0.003, then constant" in line for line in lines.said)
    assert any("ends in its warm-up, at rate 0.001 of 0.003" in line for line in lines.said)


@pytest.mark.slow
def test_the_commands_shrink_the_schedule_and_resume_keeps_what_was_begun(case: Case, tmp_path: Path) -> None:
    out, run = tmp_path / "out", CliRunner().invoke
    small = ["--preset", "tiny", "--batch-size", "2", "--device", "cpu", "--heads", "2"]
    whole = 1600 if case.kind == "tokenizer" else 1000
    command = [f"train-{case.kind}", str(case.root), str(out), *small]
    begun = run(app, [*command, "--steps", "32"])
    assert begun.exit_code == 0, begun.output
    warmup = 100 * 32 // whole
    assert f"32 steps: a warm-up of {warmup} steps" in begun.output
    assert schedule_of(out / "checkpoints/step-00000032") == [32, warmup, None]
    longer = run(app, [*command, "--steps", "40", "--resume"])
    assert longer.exit_code == 0, longer.output
    assert schedule_of(out / "checkpoints/step-00000040") == [40, warmup, None]
    decaying = [*command[:2], str(tmp_path / "decaying"), *small, "--decay-steps", "9", "--warmup-steps", "1"]
    assert run(app, [*decaying, "--steps", "6"]).exit_code == 0
    resumed = run(app, [*command[:2], str(tmp_path / "decaying"), *small, "--steps", "9", "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert schedule_of(tmp_path / "decaying/checkpoints/step-00000009") == [9, 1, 9]
    with pytest.raises(
        DeltacacheError, match=r"has 9 steps, and its rate goes down to 0 at step 9: .*another folder"
    ):
        run(
            app,
            [*command[:2], str(tmp_path / "decaying"), *small, "--steps", "12", "--resume"],
            catch_exceptions=False,
        )


def test_steps_in_a_file_keep_the_shape_of_the_preset_too() -> None:
    world = {"preset": "tiny", "training": {"steps": 100}}
    config = SystemsConfig.model_validate(
        {"tokenizers": {"a": world}, "systems": {"b": {"tokenizer": "a", "world": world}}}
    )
    assert (
        config.tokenizers["a"].training.warmup_steps,
        config.systems["b"].world.training.warmup_steps,
    ) == (6, 10)
    given = {"preset": "tiny", "training": {"steps": 100, "warmup_steps": 7}}
    assert (
        SystemsConfig.model_validate(
            {"systems": {"b": {"world": given | {"model": {"architecture": "dino_world"}}}}}
        )
        .systems["b"]
        .world.training.warmup_steps
        == 7
    )
