"""Recipes with other objectives: their noise and candidates, flags, refusals, and runs that older versions began."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import world_config
from pydantic import ValidationError

from deltacache.api import Launch, world_settings
from deltacache.models.checkpoints import load_world
from deltacache.schemas.configs import WorldConfig, world_preset
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from trainers import train_world


def _recipe(**model: Any) -> WorldConfig:
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "weight_decay": 0.0}
    return WorldConfig.model_validate({"model": model, "training": training})


def _train(deltas: Path, out: Path, config: WorldConfig, *, resume: bool = False) -> Path:
    return train_world(deltas, out, config, resume=resume, device="cpu", reporter=SilentReporter())


def test_what_a_recipe_does_not_say_follows_from_its_objective() -> None:
    found = {
        name: (config.model.noise_std, config.candidates)
        for name, config in {
            "none": _recipe(),
            "energy": _recipe(objective="energy"),
            "flow": _recipe(objective="flow"),
            "said": _recipe(objective="energy", noise_std=0.02),
        }.items()
    }
    assert found["none"] == (0.02, 256)
    assert found["said"] == (0.02, 8)
    assert found["energy"] == _noise_and_candidates("energy")
    assert found["flow"] == _noise_and_candidates("flow")


def _noise_and_candidates(preset: str) -> tuple[float, int]:
    config = world_preset(preset)
    assert config.model.objective == preset
    return config.model.noise_std, config.candidates


def test_the_flag_changes_what_the_preset_says_for_its_own_objective() -> None:
    def asked(**changes: Any) -> tuple[str, float, int]:
        config = world_settings("out", Launch(preset="released"), changes)
        return config.model.objective, config.model.noise_std, config.candidates

    assert asked() == ("best_of_many", 0.02, 256)
    assert asked(objective="energy") == ("energy", *_noise_and_candidates("energy"))
    assert asked(objective="flow", noise_std=0.5, candidates=3) == ("flow", 0.5, 3)


@pytest.mark.parametrize(
    ("model", "candidates", "message"),
    [
        (
            {"objective": "energy", "query": "learned"},
            1,
            "objective energy samples futures: set query to noise",
        ),
        ({"objective": "flow", "noise_std": 0.0}, 4, "noise_std above 0"),
        ({"objective": "energy"}, 1, "compares samples: set candidates to 2 or more"),
        ({"objective": "odds"}, 4, "best_of_many"),
    ],
)
def test_recipes_that_cannot_be_trained(model: dict[str, Any], candidates: int, message: str) -> None:
    content = _recipe().model_dump() | {"model": model, "candidates": candidates}
    with pytest.raises(ValidationError, match=message):
        WorldConfig.model_validate(content)


@pytest.mark.parametrize("objective", ["energy", "flow"])
def test_a_training_that_is_resumed_is_the_same_however_it_is_cut(
    objective: Any, deltas: Path, tmp_path: Path
) -> None:
    def config(**training: Any) -> WorldConfig:
        plain = world_config(**{"batch_size": 4, **training})
        model = plain.model.model_copy(update={"objective": objective, "noise_std": 1.0})
        return plain.model_copy(update={"model": model, "candidates": 3})

    whole = _train(deltas, tmp_path / "whole", config(steps=4))
    _train(deltas, tmp_path / "parts", config(steps=2))
    resumed = _train(deltas, tmp_path / "parts", config(steps=4), resume=True)
    halves = _train(deltas, tmp_path / "halves", config(steps=4, batch_size=2, accumulation=2))
    expected = load_world(whole).model.state_dict()
    for name, weight in load_world(resumed).model.state_dict().items():
        assert torch.equal(weight, expected[name])
    for name, weight in load_world(halves).model.state_dict().items():  # the same noise for every pass
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3)
    assert json.loads((whole / "config.json").read_text())["config"]["model"]["objective"] == objective


def test_a_run_of_an_older_version_goes_on_as_best_of_many_and_as_nothing_else(
    deltas: Path, tmp_path: Path
) -> None:
    checkpoint = _train(deltas, tmp_path / "out", world_config(steps=2))
    content = json.loads((checkpoint / "config.json").read_text())
    assert "objective" not in content["arguments"]  # as it was written before there were others
    for name in ("objective", "flow_layers", "flow_steps"):
        del content["config"]["model"][name]
    for name in ("rollout_steps", "context_noise"):
        del content["config"][name]
    (checkpoint / "config.json").write_text(json.dumps(content))
    plain = world_config(steps=3)
    energy = plain.model_copy(update={"model": plain.model.model_copy(update={"objective": "energy"})})
    with pytest.raises(MismatchError, match=r"model\.objective was best_of_many, now energy"):
        _train(deltas, tmp_path / "out", energy, resume=True)
    _train(deltas, tmp_path / "out", plain, resume=True)


def test_training_against_drift_is_the_same_however_it_is_cut(deltas: Path, tmp_path: Path) -> None:
    def weights(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        cut = {key: changes.pop(key) for key in ("batch_size", "accumulation") if key in changes}
        config = world_config(**{"steps": 3, "batch_size": 4, **cut}).model_copy(update=changes)
        return load_world(_train(deltas, tmp_path / name, config)).model.state_dict()

    drift = {"rollout_steps": 3, "context_noise": 0.5}
    whole, plain = weights("whole", **drift), weights("plain")
    assert any(not torch.equal(whole[name], plain[name]) for name in plain)
    for name, weight in weights("halves", batch_size=2, accumulation=2, **drift).items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "architecture", "message"),
    [
        ({"rollout_steps": 6}, "deltaworld", "clips of 6 frames have 5 that are predicted; give 5 at most"),
        ({"context_noise": 0.1}, "foresight_delta", "foresight_delta takes neither: leave both out"),
    ],
)
def test_training_against_drift_that_cannot_be(
    changes: dict[str, Any], architecture: str, message: str, deltas: Path, tmp_path: Path
) -> None:
    config = world_config("learned")
    model = config.model.model_copy(update={"architecture": architecture})
    with pytest.raises(DeltacacheError, match=message):
        _train(deltas, tmp_path / "out", config.model_copy(update={"model": model, **changes}))
