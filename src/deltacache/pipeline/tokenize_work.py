"""Tokenizing one shard of a feature dataset, free of Ray."""

import time
from collections.abc import Callable
from pathlib import Path

from deltacache.models.checkpoints import LoadedModel
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.dataset import Dataset, open_dataset, write_shard
from deltacache.pipeline.encoders import build_delta_encoder
from deltacache.pipeline.receipts import StoredClip
from deltacache.pipeline.shard_work import ShardResult
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import MismatchError


def check_tokenizer_fits(tokenizer: LoadedModel[DeltaTok], card: DatasetCard, path: Path) -> None:
    """Refuse a tokenizer of another width or of another backbone's features.

    A tokenizer from a released checkpoint names no backbone; then only the width can be checked.
    """
    if tokenizer.model.hidden_size != card.hidden_size:
        raise MismatchError(
            f"the features are {card.hidden_size}-wide tokens of {card.backbone.id} at {card.image_size} px, "
            f"but {path} expects {tokenizer.model.hidden_size}: extract again or load the matching tokenizer"
        )
    made_for = tokenizer.metadata.get("backbone_sha256")
    if made_for is not None and made_for != card.backbone.weights_sha256:
        raise MismatchError(
            f"{path} was trained on features of backbone {made_for[:16]}, but these are of "
            f"{card.backbone.weights_sha256[:16]} ({card.backbone.id}): use the backbone it was trained with"
        )


def build_shard_tokenizer(
    features: Path, out: Path, card: DatasetCard, tokenizer: Path, device: str
) -> Callable[[str], ShardResult]:
    """Load what a worker needs and return the function from shard id to committed shard."""
    dataset = open_dataset(features, "features")
    encoder = build_delta_encoder(tokenizer, dataset.black_patch_tokens, card.patch_grid, device, None)

    def tokenize_shard(shard_id: str) -> ShardResult:
        start = time.perf_counter()
        clips = [(_read(dataset, clip), clip) for clip in dataset.clips_of(shard_id)]
        failures = dataset.failures_of(shard_id)
        read = time.perf_counter()
        deltas = [_stored(encoder.encode_features(clip), dataset, position) for clip, position in clips]
        encoded = time.perf_counter()
        receipt = write_shard(out, card, shard_id, deltas, failures)
        return ShardResult(
            shard_id=shard_id,
            clips=len(deltas),
            failures=len(failures),
            videos=len({clip.video_uri for clip in deltas}) + len(failures),
            bytes_written=receipt.total_bytes,
            decode_s=read - start,
            encode_s=encoded - read,
            write_s=time.perf_counter() - encoded,
            forward_s=(encoded - read) / max(len(deltas), 1),
        )

    return tokenize_shard


def _read(dataset: Dataset, position: int) -> FeatureClip:
    clip = dataset.read(position)
    assert isinstance(clip, FeatureClip)  # the dataset was opened as features
    return clip


def _stored(clip: DeltaClip, dataset: Dataset, position: int) -> StoredClip:
    """The delta clip under everything that the index says of its feature clip."""
    row = dataset.index.slice(position, 1).to_pylist()[0]
    return StoredClip(
        clip=clip,
        video_uri=row["video_uri"],
        view=row["view"],
        frame_indices=tuple(row["frame_indices"]),
        crop=CropBox(*row["crop"]),
        flip=row["flip"],
        decoder=row["decoder"],
        duplicate_frames=row["duplicate_frames"],
    )
