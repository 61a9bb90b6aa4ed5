"""How a world's trainer chooses the way in which candidates are compared, and that a resumed run keeps it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import world_config

from deltacache.models import query_world, selection
from deltacache.schemas.errors import MismatchError
from deltacache.train import world
from deltacache.train.loop import NonFiniteError
from reporters import Lines
from trainers import train_world

WAYS = ("bfloat16", "shortlist", "float32")


def trained(deltas: Path, out: Path, how: str = "auto", **options: Any) -> tuple[str, list[str]]:
    """The way that the last checkpoint says, and what was said about it."""
    config = world_config(**options).model_copy(update={"selection": how})
    reporter = Lines()
    checkpoint = train_world(deltas, out, config, resume=out.exists(), device="cpu", reporter=reporter)
    chosen = json.loads((checkpoint / "config.json").read_bytes())["selection"]
    return chosen, [line for line in reporter.said if "compared by" in line]


@pytest.fixture
def slow_ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Three ways to choose from, and the seconds that each takes beyond what it does."""
    delays = {"bfloat16": 0.0, "shortlist": 0.2, "float32": 0.4}
    names = {how: name for name, how in selection.WAYS.items()}
    select = selection.select_winners

    def delayed(*given: Any) -> torch.Tensor:
        time.sleep(delays[names[given[-1]]])
        return select(*given)

    monkeypatch.setattr(world, "ways_for", lambda device, hidden_size: WAYS)
    monkeypatch.setattr(query_world, "select_winners", delayed)
    return delays


def test_the_fastest_is_taken_and_said(deltas: Path, tmp_path: Path, slow_ways: dict[str, float]) -> None:
    slow_ways |= {"bfloat16": 0.2, "shortlist": 0.0}
    chosen, said = trained(deltas, tmp_path / "out", steps=2)
    assert chosen == "shortlist"
    assert len(said) == 1
    assert "compared by shortlist" in said[0]
    assert "100 % of its winners" in said[0]


def test_a_fast_way_that_chooses_worse_is_not_taken(
    deltas: Path, tmp_path: Path, slow_ways: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = query_world.select_winners

    def worst(*given: Any) -> torch.Tensor:
        winners = select(*given)
        return winners if given[-1] != selection.WAYS["bfloat16"] else (winners + 1) % given[1].shape[2]

    monkeypatch.setattr(query_world, "select_winners", worst)
    chosen, said = trained(deltas, tmp_path / "out", steps=2)
    assert chosen == "shortlist"
    assert "bfloat16 " in said[0]
    assert ", 0 % of its winners" in said[0]


def test_a_loss_that_is_not_finite_ends_the_training_and_not_the_choice(
    deltas: Path, tmp_path: Path, slow_ways: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_world, "smooth_l1", lambda prediction, target, beta: prediction * torch.nan)
    with pytest.raises(NonFiniteError, match="step 1 has loss nan"):
        trained(deltas, tmp_path / "out", steps=2)


def test_a_resumed_run_keeps_the_choice(deltas: Path, tmp_path: Path, slow_ways: dict[str, float]) -> None:
    slow_ways |= {"bfloat16": 0.2, "shortlist": 0.0}
    trained(deltas, tmp_path / "out", steps=2)
    slow_ways |= {"bfloat16": 0.0, "shortlist": 0.2}  # another machine
    assert trained(deltas, tmp_path / "out", steps=4) == ("shortlist", [])


def test_a_forced_way_is_not_measured(deltas: Path, tmp_path: Path, slow_ways: dict[str, float]) -> None:
    assert trained(deltas, tmp_path / "out", "float32", steps=2) == ("float32", [])
    with pytest.raises(MismatchError, match=r"selection was float32, now auto"):
        trained(deltas, tmp_path / "out", steps=4)


def test_a_small_model_has_one_way(deltas: Path, tmp_path: Path) -> None:
    assert trained(deltas, tmp_path / "out", steps=2) == ("float32", [])


def test_a_run_from_before_there_was_a_choice_goes_on(deltas: Path, tmp_path: Path) -> None:
    trained(deltas, tmp_path / "out", steps=2)
    path = tmp_path / "out" / "checkpoints" / "step-00000002" / "config.json"
    content = json.loads(path.read_bytes())
    del content["selection"], content["config"]["selection"]
    path.write_text(json.dumps(content))
    assert trained(deltas, tmp_path / "out", steps=4) == ("float32", [])
