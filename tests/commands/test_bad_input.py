"""Bad input: exit 1 or 2, one message with the value, the rule and the way out, nothing overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltacache import cli

TINY = ("--backbone", "tiny", "--image-size", "64")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["--debug", "inspect", "nowhere"],
        ["inspect"],
        ["inspect", "--no-such-flag"],
        ["--version"],
    ],
)
def test_the_command_called_here_ends_like_the_installed_one(
    deltacache, deltacache_process, arguments: list[str]
) -> None:
    """Most tests of commands rely on it."""
    command = [Path(sys.executable).with_name("deltacache"), *arguments]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    for outcome in (deltacache(*arguments), deltacache_process(*arguments)):
        assert (outcome.code, outcome.stdout) == (installed.returncode, installed.stdout)
        assert outcome.stderr.splitlines()[-1:] == installed.stderr.splitlines()[-1:]
        assert outcome.stderr.count("Traceback") == installed.stderr.count("Traceback")


def test_a_missing_folder(deltacache, tmp_path: Path) -> None:
    outcome = deltacache("extract-features", tmp_path / "nowhere", tmp_path / "out", *TINY)
    outcome.refused("nowhere", "does not exist")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder(deltacache, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    outcome = deltacache("extract-features", tmp_path / "videos", tmp_path / "out", *TINY)
    outcome.refused(str(tmp_path / "videos"), "no video")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_no_readable_video(deltacache, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"")
    (videos / "b.mp4").write_text("<html>not here</html>")
    outcome = deltacache("extract-features", videos, tmp_path / "out", *TINY)
    outcome.refused("2 of 2 videos", "--max-failed-fraction", "failures.parquet")


def test_an_output_that_holds_something_else(deltacache, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"x")
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for command in (
        ("extract-features", videos, out, *TINY),
        ("demo", out),
    ):
        deltacache(*command).refused(str(out), "another folder")
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--views", "0"), ("--views",)),
        (("--frames", "1"), ("--frames",)),
        (("--spacing", "0.5", "0.1"), ("0.5", "shorter")),
        (("--store", "hdf5"), ("hdf5",)),
        (("--nonsense",), ("--nonsense",)),
        (("--max-failed-fraction", "2"), ("max-failed-fraction",)),
    ],
)
def test_wrong_flags(deltacache, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    outcome = deltacache("extract-features", tmp_path, tmp_path / "out", *TINY, *flags)
    assert outcome.code == 2
    outcome.refused(*words)


def test_an_image_size_that_patches_do_not_divide(deltacache, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    outcome = deltacache(
        "extract-features", tmp_path, tmp_path / "out", "--backbone", "tiny", "--image-size", 100
    )
    outcome.refused("100", "16")


def test_a_backbone_that_is_not_there(deltacache, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    outcome = deltacache(
        "extract-features", tmp_path, tmp_path / "out", "--backbone", tmp_path / "dinov3", "--image-size", 64
    )
    outcome.refused(str(tmp_path / "dinov3"))


def test_other_settings_for_an_existing_dataset(deltacache, real_videos: Path, real_features: Path) -> None:
    before = (real_features / "dataset.json").read_bytes()
    outcome = deltacache(
        "extract-features", real_videos / "fixture", real_features, "--backbone", "tiny",
        "--image-size", 128, "--views", 2,
    )  # fmt: skip
    outcome.refused("image_size", "256", "128")
    assert (real_features / "dataset.json").read_bytes() == before


def test_evaluate_without_a_feature_dataset(deltacache, tmp_path: Path) -> None:
    deltacache("evaluate", tmp_path / "out", "--data", f"clips={tmp_path}").refused(str(tmp_path))
    outcome = deltacache("evaluate", tmp_path / "out", "--data", "clips")
    assert outcome.code == 2
    outcome.refused("clips=PATH")


def test_a_damaged_dataset_json(deltacache, tmp_path: Path) -> None:
    root = tmp_path / "features"
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps({"kind": "features"}))
    deltacache("train-tokenizer", root, tmp_path / "out", "--preset", "tiny").refused("dataset.json")


def test_noise_for_a_preset_of_one_candidate_needs_their_number(deltacache, tmp_path: Path) -> None:
    command = ("train-world", tmp_path / "features", tmp_path / "out", "--preset", "dino-world")
    deltacache(*command, "--query", "noise").refused("dino-world has one candidate", "--candidates")


def test_out_of_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(cli, "get_command", lambda app: full)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory on the GPU: ")
    assert "--image-size" in said
    assert said.endswith("Tried to allocate 2.00 GiB.\n")
