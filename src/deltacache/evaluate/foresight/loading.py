"""One labelled sequence of Cityscapes as whole frames.

Shapes: T frames, h x w pixels as the backbone sees them, N patches, D hidden, H x W pixels of the label.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.foresight.inputs import Inputs
from deltacache.evaluate.foresight.scoring import Labels
from deltacache.pipeline.benchmarks.full_frames import depth_of, read_depth_map, read_whole
from deltacache.pipeline.benchmarks.reading import frame_shape, read_label
from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.images import sides


@dataclass(frozen=True)
class WholeSequence:
    """``pictures`` (h, w, 3) uint8 of each frame, ``tokens`` (T, N, D) float32 on the device, labels of the last."""

    sequence: LabelledSequence
    pictures: tuple[np.ndarray, ...]
    tokens: Tensor
    labels: Labels


def load_whole(sequence: LabelledSequence, settings: ForesightEvaluation, inputs: Inputs) -> WholeSequence:
    """Read frames and labels.

    Raises:
        DatasetError: one is missing or damaged.
    """
    size = sides(settings.features.image_size)
    pictures = tuple(read_whole(path, size) for path in sequence.frames)
    tokens = inputs.features.tokens(pictures)
    return WholeSequence(sequence, pictures, tokens, _labels(sequence, settings, inputs, tokens.device))


def depth_place(sequence: LabelledSequence, settings: ForesightEvaluation) -> Path | None:
    """The depth map of the last frame, if depth is scored."""
    return None if settings.depth is None else depth_of(sequence.label, "val", settings.depth)


def _labels(
    sequence: LabelledSequence, settings: ForesightEvaluation, inputs: Inputs, device: torch.device
) -> Labels:
    shape = frame_shape("cityscapes", sequence.frames[-1])
    classes = depth = None
    if inputs.heads.segmentation is not None:
        classes = torch.from_numpy(read_label("cityscapes", sequence.label, shape)).to(device)
    place = depth_place(sequence, settings)
    if place is not None:
        depth = torch.from_numpy(read_depth_map(place, shape)).to(device)
    return Labels(classes, depth)
