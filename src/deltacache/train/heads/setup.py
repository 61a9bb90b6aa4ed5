"""What training a head does before the loop: its frames, their backbone, and what checkpoints say of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from deltacache import __version__
from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import Kind, LoadedModel, SavedModel
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.training_frames import LoadedFrame, TrainingFrames, load_frame
from deltacache.pipeline.storage.files import crc32c_of_file
from deltacache.schemas.configs import HeadConfig, RgbConfig
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import Reporter
from deltacache.train.heads.data import HeadFrames
from deltacache.train.setup import OpenedRun, open_run

ModelT = TypeVar("ModelT", bound=SavedModel)


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What ``train-head`` is asked for beside its config.

    Attributes:
        root: of a benchmark, or a folder of pictures.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        kitti_split: list of KITTI's training frames, instead of its folders.
        kitti_test: list of KITTI's test frames, if it is not in the root.
        dry_run: say what the training would take, and write nothing.
    """

    root: Path
    out: Path
    backbone: str
    resume: bool
    device: str
    kitti_split: Path | None = None
    kitti_test: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class HeadInputs:
    """Frames, and the frozen backbone that sees them."""

    frames: TrainingFrames
    config: HeadConfig | RgbConfig
    backbone: Backbone
    device: torch.device

    def seen(self, *, pictures: bool = False) -> HeadFrames:
        """The frames through the backbone."""
        size, flip = self.config.frames.image_size, self.config.frames.flip

        def load(number: int, mirrored: bool) -> LoadedFrame:
            return load_frame(self.frames, number, size, flip=mirrored)

        return HeadFrames(self.frames, load, size, flip, self.backbone, self.device, pictures=pictures)


def open_head(
    request: HeadRequest,
    config: HeadConfig | RgbConfig,
    frames: TrainingFrames,
    kind: Kind,
    load: Callable[[Path, Backbone], LoadedModel[ModelT]],
) -> tuple[OpenedRun[ModelT], HeadInputs]:
    """Load the backbone and claim the output folder; see ``open_run`` for what is refused."""
    device = choose_device(request.device)
    backbone = load_backbone(request.backbone, config.frames.precision)
    metadata = {
        "config": config.model_dump(mode="json"),
        "backbone_sha256": backbone.weights_sha256,
        "hidden_size": backbone.hidden_size,
        "patch_grid": list(backbone.grid(config.frames.image_size)),
        "image_size": config.frames.image_size,
        **described_frames(frames, config.frames.split, request.root),
        **({"sources": {"backbone": backbone.source}} if backbone.source else {}),
        "code_version": __version__,
    }
    opened = open_run(
        request.out,
        config,
        kind,
        lambda path: load(path, backbone),
        metadata,
        resume=request.resume,
        dry_run=request.dry_run,
    )
    return opened, HeadInputs(frames, config, backbone, device)


def described_frames(frames: TrainingFrames, split: str, *roots: Path) -> dict[str, Any]:
    """What a checkpoint says of the frames that it learned from, which lie below ``roots``.

    ``trained_on`` is what ``evaluate`` reads: a head of the split that is scored has no comparable numbers.

    Raises:
        DatasetError: a file went away since it was listed.
    """
    count = len(frames.frames)
    described: dict[str, Any] = {
        "benchmark": frames.benchmark,
        "frames": {"count": count, "fingerprint": _fingerprint(frames, roots)},
    }
    if frames.benchmark is not None:
        described["trained_on"] = {"benchmark": frames.benchmark, "split": split, "frames": count}
    return described


def say_if_scored(frames: TrainingFrames, split: str, reporter: Reporter) -> None:
    """Say that a head learns from the frames that it will be scored on, if it does."""
    if split == "val":
        reporter.line(
            f"train head: these are the frames that {frames.benchmark} is scored on (--split val): the head's numbers "
            "there say nothing about new frames and cannot be compared with published ones"
        )


def _fingerprint(frames: TrainingFrames, roots: Sequence[Path]) -> str:
    """Of places and sizes of all files, and the content of the lists that name them: a tree may move as a whole."""
    try:
        files = [
            [_place(path, roots), Path(path).stat().st_size]
            for each in frames.frames
            for path in (each.frame, each.label)
            if path is not None
        ]
        lists = [crc32c_of_file(path) for path in frames.lists]
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read ({error.strerror}): get it again") from error
    return fingerprint_of({"files": files, "lists": lists})


def _place(path: str, roots: Sequence[Path]) -> str:
    """Below a root; a list may also give absolute places."""
    whole = Path(path)
    root = next((each for each in roots if whole.is_relative_to(each)), None)
    return (whole if root is None else whole.relative_to(root)).as_posix()
