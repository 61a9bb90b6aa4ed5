"""What training a head does before the loop: backbone, device, checks, output folder, seeded weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from deltacache import __version__
from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import Kind, LoadedModel, SavedModel
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.training_frames import TrainingFrames
from deltacache.pipeline.storage.files import crc32c_of_file, replacing
from deltacache.schemas.configs import HeadConfig, RgbConfig, save_config
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import Reporter
from deltacache.train.checkpoints import Resumed
from deltacache.train.heads.data import HeadFrames
from deltacache.train.loop import Run, split_of
from deltacache.train.order import seed_of
from deltacache.train.setup import claim_output
from deltacache.train.workers.group import SingleProcess

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
class HeadSetup(Generic[ModelT]):
    """An output folder that is claimed, and what the run begins with there."""

    request: HeadRequest
    config: HeadConfig | RgbConfig
    frames: TrainingFrames
    backbone: Backbone
    device: torch.device
    metadata: dict[str, Any]
    resumed: Resumed[ModelT] | None

    @property
    def finished(self) -> Path | None:
        """The newest checkpoint if it has all the steps already."""
        if self.resumed is None or self.resumed.step < self.config.training.steps:
            return None
        return self.resumed.folder

    def model(self, build: Callable[[], ModelT]) -> ModelT:
        """The resumed model, or a new one whose random weights depend on the config's seed alone."""
        if self.resumed is not None:
            return self.resumed.model
        return seeded(build, self.config.training.seed)

    def seen(self, *, pictures: bool = False) -> HeadFrames:
        """The frames through the backbone."""
        return HeadFrames(self.frames, self.config.frames, self.backbone, self.device, pictures=pictures)

    @property
    def effective_batch(self) -> int:
        """Frames of a step."""
        return split_of(self.config.training, SingleProcess()).effective_batch

    def run(self, reporter: Reporter) -> Run:
        """Begin: the resolved config is saved beside what follows."""
        out, training, resumed = self.request.out, self.config.training, self.resumed
        if not self.request.dry_run:
            with replacing(out / "config.yaml") as temporary:
                save_config(self.config, temporary)
        run = Run(out, training, self.metadata, reporter, dry_run=self.request.dry_run)
        if resumed is None:
            return run
        passes = resumed.metadata.get("samples_per_pass")
        state = resumed.optimizer_state
        return replace(run, first_step=resumed.step, optimizer_state=state, samples_per_pass=passes)


def open_head(
    request: HeadRequest,
    config: HeadConfig | RgbConfig,
    frames: TrainingFrames,
    kind: Kind,
    load: Callable[[Path, Backbone], LoadedModel[ModelT]],
) -> HeadSetup[ModelT]:
    """Load the backbone and claim the output folder; see ``claim_output`` for what is refused."""
    device = choose_device(request.device)
    backbone = load_backbone(request.backbone, config.frames.precision)
    metadata = {
        "config": config.model_dump(mode="json"),
        "backbone_sha256": backbone.weights_sha256,
        "hidden_size": backbone.hidden_size,
        "patch_grid": list(backbone.grid(config.frames.image_size)),
        "image_size": config.frames.image_size,
        **described_frames(frames, config.frames.split, request.root),
        "effective_batch": split_of(config.training, SingleProcess()).effective_batch,
        "code_version": __version__,
    }
    resumed = claim_output(
        request.out,
        kind,
        lambda path: load(path, backbone),
        metadata,
        resume=request.resume,
        dry_run=request.dry_run,
    )
    return HeadSetup(request, config, frames, backbone, device, metadata, resumed)


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
            "there say nothing about new frames, and are not to be compared with published ones"
        )


def seeded(build: Callable[[], ModelT], seed: int) -> ModelT:
    """A new model whose random weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of("weights", seed))
        return build()


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
