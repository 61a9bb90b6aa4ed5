"""Losses of heads against slow ones that are easy to read."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deltacache.pipeline.benchmarks.frames import split_of, upsample
from deltacache.schemas.benchmarks import IGNORE
from deltacache.train.heads import losses as head_losses
from deltacache.train.heads.data import LabelledCrops
from deltacache.train.heads.losses import (
    depth_losses,
    picture_losses,
    segmentation_loss_by_rows,
)

CLASSES = 5
SHAPES = ((36, 64), (64, 36), (20, 70), (41, 47), (33, 90), (30, 30))
"""Crops that overlap (side by side, one above the other, odd), that do not, and a single one."""


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def segmentation_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean over all valid pixels of (C, K, H, W) logits against (C, H, W) ids, all of them in memory."""
    sums = [
        functional.cross_entropy(each, label.long(), ignore_index=IGNORE, reduction="sum")
        for each, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(sums).sum() / torch.stack([(label != IGNORE).sum() for label in labels]).sum()


def test_segmentation_is_the_mean_over_valid_pixels_of_frames_of_any_size(draw: torch.Generator) -> None:
    logits = [torch.randn(2, 5, *size, generator=draw) for size in ((3, 4), (6, 2))]
    labels = [torch.randint(0, 5, (2, *size), generator=draw, dtype=torch.uint8) for size in ((3, 4), (6, 2))]
    labels[0][0, 0] = IGNORE
    expected = [
        -each[crop, :, row, column].log_softmax(0)[int(label[crop, row, column])]
        for each, label in zip(logits, labels, strict=True)
        for crop, row, column in (label != IGNORE).nonzero().tolist()
    ]
    assert len(expected) == 44
    torch.testing.assert_close(segmentation_loss(logits, labels), torch.stack(expected).mean())


def labelled(draw: torch.Generator) -> list[LabelledCrops]:
    """A frame of each shape, a fifth of its pixels ignored."""
    frames: list[LabelledCrops] = []
    for height, width in SHAPES:
        split, start = split_of(height, width, 16), frames[-1].stop if frames else 0
        half = (height, -(-width // 2)) if width >= height else (-(-height // 2), width)
        size = (split.crops, *(half if split.crops == 2 else (height, width)))
        label = torch.randint(0, CLASSES, size, generator=draw, dtype=torch.uint8)
        label[torch.rand(size, generator=draw) < 0.2] = IGNORE
        frames.append(LabelledCrops(start, start + split.crops, split, label))
    return frames


@pytest.mark.parametrize("strip", [1, 700, 1 << 20])
def test_rows_one_strip_after_the_other_give_loss_and_gradient_of_whole_labels(
    draw: torch.Generator, monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    monkeypatch.setattr(head_losses, "_STRIP_LOGITS", strip)
    frames = labelled(draw)
    whole = torch.randn(frames[-1].stop, CLASSES, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    parts = whole.detach().clone().requires_grad_()
    large = [
        upsample(whole[each.start : each.stop], each.split, (each.label.shape[-2], each.label.shape[-1]))
        for each in frames
    ]
    plain = segmentation_loss(large, [each.label for each in frames])
    by_rows = segmentation_loss_by_rows(parts, frames)
    torch.testing.assert_close(by_rows, plain, rtol=1e-12, atol=0)
    (3 * plain).backward()
    (3 * by_rows).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("strip", [1, 700, 1 << 20])
def test_whole_frames_by_rows_give_loss_and_gradient_of_whole_logits(
    draw: torch.Generator, monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    monkeypatch.setattr(head_losses, "_STRIP_LOGITS", strip)
    sizes = ((36, 64), (24, 60), (3, 5))
    labels = [torch.randint(0, CLASSES, size, generator=draw, dtype=torch.uint8) for size in sizes]
    labels[0][torch.rand(sizes[0], generator=draw) < 0.2] = IGNORE
    whole = torch.randn(len(sizes), CLASSES, 4, 8, generator=draw).requires_grad_()
    parts = whole.detach().clone().requires_grad_()
    large = [
        functional.interpolate(each[None], size=size, mode="bilinear", align_corners=False)
        for each, size in zip(whole, sizes, strict=True)
    ]
    plain = segmentation_loss(large, [label[None] for label in labels])
    frames = [LabelledCrops(at, at + 1, None, label[None]) for at, label in enumerate(labels)]
    by_rows = segmentation_loss_by_rows(parts, frames)
    torch.testing.assert_close(by_rows, plain, rtol=1e-5, atol=0)
    (3 * plain).backward()
    (3 * by_rows).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_a_batch_without_a_valid_pixel_gives_zero_and_no_gradient() -> None:
    logits, depth = torch.ones(1, 3, 2, 2, requires_grad=True), torch.ones(1, 9, 9, requires_grad=True)
    label = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    loss = segmentation_loss_by_rows(logits, [LabelledCrops(0, 1, None, label)])
    loss = loss + segmentation_loss_by_rows(logits, [LabelledCrops(0, 1, split_of(2, 2, 16), label)])
    (loss + sum(depth_losses([depth], [torch.zeros(1, 9, 9)]))).backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert depth.grad is not None
    assert not depth.grad.any()


def test_depth_by_a_loop(draw: torch.Generator) -> None:
    depths = [torch.rand(2, *size, generator=draw) * 50 + 1 for size in ((18, 20), (17, 9))]
    labels = [torch.rand(2, *size, generator=draw) * 50 + 1 for size in ((18, 20), (17, 9))]
    for label in labels:
        label[torch.rand(label.shape, generator=draw) < 0.3] = 0
    errors, metres = [], []
    steps: dict[int, list[float]] = {stride: [] for stride in (1, 2, 4, 8)}
    for depth, label in zip(depths, labels, strict=True):
        crops, rows, columns = label.shape
        off = ((depth + 1e-3).log() - (label + 1e-3).log()).tolist()
        known = (label > 0).tolist()
        errors += [off[c][y][x] for c, y, x in (label > 0).nonzero().tolist()]
        metres += (depth - label)[label > 0].tolist()
        for c in range(crops):
            for s, found in steps.items():
                for y in range(0, rows, s):
                    for x in range(0, columns, s):
                        for below, right in ((y + s, x), (y, x + s)):
                            if below < rows and right < columns and known[c][y][x] and known[c][below][right]:
                                found.append(abs(off[c][below][right] - off[c][y][x]))
    mean = sum(errors) / len(errors)
    variance = sum((each - mean) ** 2 for each in errors) / len(errors)
    losses = depth_losses(depths, labels)
    assert float(losses.silog) == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    assert float(losses.gradient) == pytest.approx(sum(sum(f) / len(f) for f in steps.values()) / 4, rel=1e-5)
    assert float(losses.rmse) == pytest.approx(math.sqrt(sum(m**2 for m in metres) / len(metres)), rel=1e-5)


def test_pictures_are_judged_by_colour_and_by_edges(draw: torch.Generator) -> None:
    truth = torch.rand(2, 3, 32, 32, generator=draw)
    absolute, gradient = picture_losses(truth + 0.25, truth)
    assert absolute.tolist() == pytest.approx([0.25] * 2)
    assert gradient.tolist() == pytest.approx([0.0] * 2, abs=1e-6)  # an offset has no edges
    ramp = torch.stack((torch.arange(32.0), torch.zeros(32)))[:, None, None] / 10
    _, gradient = picture_losses(truth + ramp, truth)
    assert gradient.tolist() == pytest.approx([0.1 * (1 + 2 + 4 + 8) / 4, 0.0], rel=1e-4, abs=1e-6)
