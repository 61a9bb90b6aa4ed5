"""Weights & Biases offline: a real run folder, no network."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from cases import Case

from deltacache.schemas.errors import DeltacacheError


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_offline_runs_leave_what_sync_needs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint = case.run(tmp_path / "out", wandb="offline", steps=4)
    (folder,) = (tmp_path / "out/wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    assert b"gradient_norm" in content
    assert b"copy_ratio" in content
    resumed = case.run(tmp_path / "out", wandb="offline", resume=True)
    assert checkpoint.name < resumed.name
    folders = list((tmp_path / "out/wandb").glob("offline-run-*"))
    assert len({each.name.split("-")[3] for each in folders}) == 1  # the same run


def test_without_the_package_it_is_named(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        DeltacacheError, match=r"wandb is offline, but .*deltacache\[wandb\].*leave --wandb out"
    ):
        case.run(tmp_path / "out", wandb="offline")
