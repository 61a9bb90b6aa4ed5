"""deltacache: cache DINOv3 patch tokens and delta tokens once, then train and evaluate world models.

What is below is loaded when it is first used: ``import deltacache`` takes milliseconds and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltacache.api import (
        Evaluated,
        Predicted,
        evaluate,
        extract_features,
        load_backbone,
        load_tokenizer,
        load_world,
        open_dataset,
        predict,
        push,
        tokenize,
        train_tokenizer,
        train_world,
        write_report,
    )
    from deltacache.models.backbone import Backbone
    from deltacache.models.deltatok import DeltaTok
    from deltacache.models.encoders import PatchEncoder
    from deltacache.models.futures import decode_future
    from deltacache.models.world_model import WorldModel
    from deltacache.pipeline.datasets.dataset import Dataset
    from deltacache.pipeline.datasets.writing import DatasetWriter
    from deltacache.schemas.clips import DeltaClip, FeatureClip
    from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings
    from deltacache.schemas.errors import DeltacacheError
    from deltacache.schemas.progress import Reporter, SilentReporter
    from deltacache.train.clip_dataset import ClipDataset, ClipStream

__all__ = [
    "Backbone",
    "BackboneCard",
    "ClipDataset",
    "ClipStream",
    "Dataset",
    "DatasetCard",
    "DatasetWriter",
    "DeltaClip",
    "DeltaTok",
    "DeltacacheError",
    "Evaluated",
    "FeatureClip",
    "PatchEncoder",
    "Predicted",
    "Reporter",
    "SamplingSettings",
    "SilentReporter",
    "WorldModel",
    "__version__",
    "decode_future",
    "evaluate",
    "extract_features",
    "load_backbone",
    "load_tokenizer",
    "load_world",
    "open_dataset",
    "predict",
    "push",
    "tokenize",
    "train_tokenizer",
    "train_world",
    "write_report",
]

_ELSEWHERE = {
    "Backbone": "deltacache.models.backbone",
    "BackboneCard": "deltacache.schemas.datasets",
    "ClipDataset": "deltacache.train.clip_dataset",
    "ClipStream": "deltacache.train.clip_dataset",
    "Dataset": "deltacache.pipeline.datasets.dataset",
    "DatasetCard": "deltacache.schemas.datasets",
    "DatasetWriter": "deltacache.pipeline.datasets.writing",
    "DeltaClip": "deltacache.schemas.clips",
    "DeltaTok": "deltacache.models.deltatok",
    "DeltacacheError": "deltacache.schemas.errors",
    "FeatureClip": "deltacache.schemas.clips",
    "PatchEncoder": "deltacache.models.encoders",
    "Reporter": "deltacache.schemas.progress",
    "SamplingSettings": "deltacache.schemas.datasets",
    "SilentReporter": "deltacache.schemas.progress",
    "WorldModel": "deltacache.models.world_model",
    "decode_future": "deltacache.models.futures",
}
"""What does not come from ``deltacache.api``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deltacache' has no attribute {name!r}")
    if name == "evaluate":  # a package, which is called like the function (see there)
        return import_module("deltacache.evaluate")
    return getattr(import_module(_ELSEWHERE.get(name, "deltacache.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
