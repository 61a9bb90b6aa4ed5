"""Crops, label halves, upsampling and pooled metrics against the released code's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deltacache.evaluate.benchmarks.labels import depth_totals, segmentation_totals
from deltacache.evaluate.metrics import pooled_metrics
from deltacache.pipeline.benchmarks.frames import (
    CropSplit,
    crop_frames,
    label_halves,
    resize_frame,
    split_of,
    upsample,
)
from deltacache.schemas.benchmarks import IGNORE, MAX_DEPTH_M, MIN_DEPTH_M

CASES = range(5)
SQUARE = -1


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[dict[str, torch.Tensor]]:
    tensors = load_file(golden / "tiny" / "protocol_io.safetensors")
    found = sorted({int(name.split(".")[0]) for name in tensors})
    assert found == list(CASES)
    return [
        {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}
        for case in found
    ]


def split_of_case(case: dict[str, torch.Tensor]) -> CropSplit:
    height, width = case["frames"].shape[-2:]
    return split_of(height, width, min(height, width))


@pytest.mark.parametrize("number", CASES)
def test_split(number: int, cases: list[dict[str, torch.Tensor]]) -> None:
    case = cases[number]
    overlap, wide = case["flags"].tolist()
    split = split_of_case(case)
    assert split.resized == tuple(case["frames"].shape[-2:])
    assert split.overlap == bool(overlap)
    assert (split.crops == 1) == (wide == SQUARE)
    if wide != SQUARE:
        assert split.wide == bool(wide)


@pytest.mark.parametrize("number", CASES)
def test_crops_and_halves_are_exact(number: int, cases: list[dict[str, torch.Tensor]]) -> None:
    case = cases[number]
    split = split_of_case(case)
    crops = crop_frames(case["frames"][0].permute(0, 2, 3, 1).numpy(), split)
    np.testing.assert_array_equal(crops, case["crop_frames"].permute(0, 1, 3, 4, 2).numpy())
    halves = label_halves(case["labels"][0].numpy(), split, IGNORE)
    np.testing.assert_array_equal(halves, case["crop_labels"].numpy())


@pytest.mark.parametrize("number", CASES)
def test_upsampling(number: int, cases: list[dict[str, torch.Tensor]]) -> None:
    case = cases[number]
    half = (case["crop_labels"].shape[-2], case["crop_labels"].shape[-1])
    upsampled = upsample(case["logits"], split_of_case(case), half)
    torch.testing.assert_close(upsampled, case["upsampled"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("number", CASES)
def test_metrics(number: int, cases: list[dict[str, torch.Tensor]]) -> None:
    case = cases[number]
    count = case["logits"].shape[1]
    totals = segmentation_totals(case["upsampled"].argmax(1), case["crop_labels"][:, -1], count)
    assert pooled_metrics("segmentation", totals.numpy())["miou"] == pytest.approx(
        case["miou"].item(), abs=2e-5
    )
    truth = case["depth_gt"]
    truth = torch.where((truth > MIN_DEPTH_M) & (truth < MAX_DEPTH_M), truth, 0.0)
    totals = depth_totals(case["depth_pred"][:, 0], truth)
    assert pooled_metrics("depth", totals.numpy())["rmse"] == pytest.approx(case["rmse"].item(), rel=1e-4)


def test_sizes_are_those_of_the_released_code(golden: Path) -> None:
    for case in json.loads((golden / "sampling.json").read_text())["resize"]:
        split = split_of(case["h"], case["w"], case["short"])
        assert list(split.resized) == case["size"], case


def test_resizing_keeps_what_fits_already() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert resize_frame(frame, split_of(64, 96, 64)) is frame
    assert resize_frame(frame, split_of(64, 96, 32)).shape == (32, 48, 3)
