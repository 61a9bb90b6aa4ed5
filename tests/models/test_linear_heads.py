"""Linear heads: the released code's numbers, and what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltacache.models.checkpoints import save_model
from deltacache.models.heads import load_head
from deltacache.schemas.errors import CheckpointError


def test_golden_numbers(golden: Path) -> None:
    io = load_file(golden / "tiny" / "heads_io.safetensors")
    with torch.inference_mode():
        logits = load_head(golden / "tiny" / "head_seg.safetensors", "segmentation").model(io["features"])
        depth = load_head(golden / "tiny" / "head_depth.safetensors", "depth").model(io["features"])
    torch.testing.assert_close(logits, io["seg_logits"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(depth, io["depth"], atol=2e-5, rtol=1e-4)


def test_folders_and_bin_files_hold_the_same_head(golden: Path, tmp_path: Path) -> None:
    released = load_head(golden / "eval" / "head_cityscapes.safetensors", "segmentation")
    save_model(tmp_path / "head", released.model, "head", {"benchmark": "cityscapes"})
    torch.save(load_file(golden / "eval" / "head_cityscapes.safetensors"), tmp_path / "pytorch_model.bin")
    ours = load_head(tmp_path / "head", "segmentation")
    assert ours.fingerprint == released.fingerprint
    assert ours.metadata["benchmark"] == "cityscapes"
    assert load_head(tmp_path / "pytorch_model.bin", "segmentation").fingerprint == released.fingerprint


def test_what_is_no_such_head_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"head_vspw\.safetensors gives 124 numbers per patch"):
        load_head(golden / "eval" / "head_vspw.safetensors", "depth")
    with pytest.raises(CheckpointError, match="holds no linear head"):
        load_head(golden / "tiny" / "deltatok_paper.safetensors", "segmentation")
    weights = load_file(golden / "eval" / "head_vspw.safetensors")
    del weights["bn.weight"]
    save_file(weights, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: bn\.weight"):
        load_head(tmp_path / "head.safetensors", "segmentation")


def test_a_head_of_the_other_task_is_named(golden: Path, tmp_path: Path) -> None:
    """A released file by its number of channels, a folder by its arguments."""
    released = golden / "eval" / "head_kitti.safetensors"
    with pytest.raises(
        CheckpointError, match=r"head_kitti\.safetensors is a head of depth .*give a head of seg"
    ):
        load_head(released, "segmentation")
    save_model(tmp_path / "depth", load_head(released, "depth").model, "head", {})
    with pytest.raises(CheckpointError, match="depth is a head of depth: give a head of segmentation"):
        load_head(tmp_path / "depth", "segmentation")
    vspw = load_head(golden / "eval" / "head_vspw.safetensors", "segmentation").model
    save_model(tmp_path / "classes", vspw, "head", {})
    with pytest.raises(CheckpointError, match="classes is a head of segmentation: give a head of depth"):
        load_head(tmp_path / "classes", "depth")
