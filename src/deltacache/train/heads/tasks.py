"""What the heads' trainings share: batches of labelled frames through a frozen backbone, and the linear heads' losses.

Shapes: M crops or frames of a batch, D hidden, h x w patches, K numbers a patch of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.train.heads.losses import DepthLosses
from deltacache.train.order import Part

LinearHead = SegmentationHead | DepthHead
ModelT = TypeVar("ModelT", SegmentationHead | DepthHead, RgbDecoder)
BatchT = TypeVar("BatchT")


class Features(Protocol):
    """A batch of features (M, D, h, w) float32 on the device, with what belongs to them."""

    @property
    def features(self) -> Tensor:
        """(M, D, h, w)."""
        ...


FeaturesT = TypeVar("FeaturesT", bound=Features)
BatchT_co = TypeVar("BatchT_co", covariant=True)


class Frames(Protocol[BatchT_co]):
    """Frames that come in batches."""

    def computed(self, samples: int) -> int:
        """How many of so many frames go through the backbone; the others are kept."""
        ...

    @property
    def frame_bytes(self) -> float:
        """Of the files of a frame, on average."""
        ...

    def batches(self, seed: int, effective_batch: int, parts: Iterable[Part]) -> Generator[BatchT_co]:
        """The batches of ``parts``, in order."""
        ...


class HeadTask(ABC, Generic[ModelT, BatchT]):
    """A head and its frames; see ``TrainingTask``."""

    kind: Kind = "head"
    divisible = False  # a linear head's BatchNorm sees a whole pass

    def __init__(self, model: ModelT, frames: Frames[BatchT], seed: int, effective_batch: int) -> None:
        self.model = model.train()
        self._frames, self._seed, self._effective_batch = frames, seed, effective_batch

    def batches(self, parts: Iterable[Part]) -> Generator[BatchT]:
        """See ``TrainingTask``."""
        return self._frames.batches(self._seed, self._effective_batch, parts)

    trial_batches = batches

    def bytes_to_load(self, device: torch.device) -> int:
        """See ``TrainingTask``: none at the beginning."""
        return 0

    def bytes_to_read(self, samples: int) -> int:
        """See ``TrainingTask``."""
        return int(self._frames.computed(samples) * self._frames.frame_bytes)

    def inputs_computed(self, samples: int) -> int:
        """See ``TrainingTask``: frames go through the backbone when they come up."""
        return self._frames.computed(samples)

    @abstractmethod
    def training_loss(self, batch: BatchT, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TrainingTask``."""

    def probes(self) -> dict[str, float]:
        """See ``TrainingTask``: none, ``evaluate`` tells how good a head is."""
        return {}


class LinearTask(HeadTask[LinearHead, FeaturesT]):
    """Predictions at the label's resolution, as an evaluation makes them, against the label."""

    def __init__(
        self,
        model: LinearHead,
        frames: Frames[FeaturesT],
        seed: int,
        effective_batch: int,
        weights: tuple[float, float],
    ) -> None:
        """``weights``: of depth's gradient and metric losses, beside the scale-invariant one."""
        super().__init__(model, frames, seed, effective_batch)
        self._weights = weights

    def training_loss(self, batch: FeaturesT, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``TrainingTask``. In float32 everywhere: the head costs nothing, and depth needs the digits."""
        del part
        gradient, rmse = self._weights
        with torch.autocast(batch.features.device.type, enabled=False):
            small = self.model(batch.features)
            if isinstance(self.model, SegmentationHead):
                return self.segmentation(small, batch), {}
            losses = self.depth(small, batch)
            loss = losses.silog + gradient * losses.gradient + rmse * losses.rmse
        return loss, {"main_loss": losses.silog.detach(), "gradient_loss": losses.gradient.detach()}

    @abstractmethod
    def segmentation(self, small: Tensor, batch: FeaturesT) -> Tensor:
        """The loss of logits (M, K, h, w)."""

    @abstractmethod
    def depth(self, small: Tensor, batch: FeaturesT) -> DepthLosses:
        """The losses of metres (M, 1, h, w)."""
