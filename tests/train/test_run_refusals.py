"""What a trainer refuses, and that it changes nothing when it does."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from drawn import drawn_deltas, drawn_features, tokenizer_config, world_config, write_dataset

from deltacache.models.devices import choose_device
from deltacache.schemas.configs import TokenizerConfig
from deltacache.schemas.errors import CheckpointError, DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from trainers import train_tokenizer, train_world


def tokenizer(features: Path, out: Path, config: TokenizerConfig | None = None, **options: Any) -> Path:
    options = {"resume": False, "device": "cpu", "reporter": SilentReporter()} | options
    return train_tokenizer(features, out, config or tokenizer_config(), **options)


def world(deltas: Path, out: Path, **options: Any) -> Path:
    options = {"resume": False, "device": "cpu", "reporter": SilentReporter()} | options
    return train_world(deltas, out, world_config(), **options)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "out"
    tokenizer(features, out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_world_training_on_features_says_to_tokenize(features: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds features, but deltas.*tokenize"):
        world(features, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_training_on_deltas_says_to_extract(deltas: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds deltas, but features.*extract-features"):
        tokenizer(deltas, tmp_path / "out")


def test_an_empty_dataset(tmp_path: Path) -> None:
    features = write_dataset(tmp_path / "features", "features", drawn_features(0, 6))
    deltas = write_dataset(tmp_path / "deltas", "deltas", drawn_deltas(0, 6))
    for train, root in ((tokenizer, features), (world, deltas)):
        with pytest.raises(DatasetError, match=r"holds no clips.*at least one.*failures\.parquet"):
            train(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a dataset"):
        tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("heads", [3, 8])  # 16 / 8 = 2: too narrow for two axes of rotary positions
def test_heads_that_the_tokens_do_not_split_into(features: Path, tmp_path: Path, heads: int) -> None:
    config = tokenizer_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_heads": heads})})
    with pytest.raises(MismatchError, match=rf"16-wide tokens.*{heads} heads.*--heads"):
        tokenizer(features, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_world_heads_too_narrow_for_time(deltas: Path, tmp_path: Path) -> None:
    config = world_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_heads": 4})})
    with pytest.raises(MismatchError, match=r"16-wide tokens.*4 heads.*least 6.*--heads"):
        train_world(deltas, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    assert not (tmp_path / "out").exists()


def test_an_output_with_checkpoints_without_resume(features: Path, run: Path) -> None:
    before = content(run)
    with pytest.raises(DeltacacheError, match=r"checkpoints up to step-00000008.*--resume.*another folder"):
        tokenizer(features, run)
    assert content(run) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_an_output_that_holds_something_else(features: Path, tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(DeltacacheError, match=rf"holds something else \({name}\).*new or empty"):
        tokenizer(features, tmp_path / "out", resume=resume)
    assert content(tmp_path / "out") == {tmp_path / "out" / name: b"mine"}


def test_an_output_that_is_a_file(features: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DeltacacheError, match="is a file"):
        tokenizer(features, tmp_path / "out")


def test_resume_with_another_config_names_every_difference(features: Path, run: Path) -> None:
    before = content(run)
    config = tokenizer_config(0.5, seed=6, steps=20, keep=1, log_every=3, save_every=9)
    with pytest.raises(MismatchError) as refused:
        tokenizer(features, run, config, resume=True)
    message = str(refused.value)
    assert "black_first_fraction was 0.25, now 0.5; training.seed was 7, now 6)" in message
    assert content(run) == before


def test_resume_with_another_effective_batch(features: Path, run: Path) -> None:
    with pytest.raises(MismatchError, match=r"effective batch of 5, now it is 12: .*change --batch-size"):
        tokenizer(features, run, tokenizer_config(batch_size=6, accumulation=2), resume=True)


def test_steps_and_keeping_may_change(features: Path, run: Path) -> None:
    config = tokenizer_config(steps=10, keep=1, log_every=1, save_every=2)
    assert tokenizer(features, run, config, resume=True).name == "step-00000010"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]


def test_resume_on_other_data_names_both(run: Path, tmp_path: Path) -> None:
    more_clips = write_dataset(tmp_path / "more", "features", drawn_features(13, 6))
    with pytest.raises(MismatchError, match=r"other data \(clips was .*12.*now .*13"):
        tokenizer(more_clips, run, tokenizer_config(steps=10), resume=True)
    longer = write_dataset(tmp_path / "longer", "features", drawn_features(12, 7))
    with pytest.raises(MismatchError, match="data_fingerprint was"):
        tokenizer(longer, run, tokenizer_config(steps=10), resume=True)


def test_resume_with_the_other_trainer(deltas: Path, run: Path) -> None:
    with pytest.raises(
        MismatchError, match="step-00000008 is of a tokenizer, not of a world: choose another"
    ):
        world(deltas, run, resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_newest_checkpoint_is_named_with_the_way_out(
    features: Path, run: Path, file: str, damage: str
) -> None:
    newest = run / "checkpoints/step-00000008"
    body = bytearray((newest / file).read_bytes())
    body[len(body) // 2] ^= 0xFF
    if damage == "missing":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(bytes(body) if damage == "flip" else bytes(body[: len(body) // 2]))
    before = content(run)
    with pytest.raises(CheckpointError, match=r"step-00000008 is damaged.*Delete.*step-00000004") as refused:
        tokenizer(features, run, tokenizer_config(steps=10), resume=True)
    assert file in str(refused.value)
    assert content(run) == before


def test_the_way_out_of_damage_leads_out(features: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000008")
    tokenizer(features, run, resume=True)
    assert pq.read_table(run / "curves.parquet")["step"].to_pylist() == [2, 4, 6, 8]


def test_the_only_checkpoint_damaged_says_that_training_starts_again(features: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    (run / "checkpoints/step-00000008/training_state.pt").unlink()
    with pytest.raises(CheckpointError, match="none, so that training starts again"):
        tokenizer(features, run, resume=True)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DeltacacheError, match="'tpu' is not known: give auto, cpu, cuda or mps"):
        choose_device("tpu")


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeltacacheError, match="'cuda' needs a GPU"):
        choose_device("cuda")
