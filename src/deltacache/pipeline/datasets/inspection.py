"""What a dataset is, from its card, tables and receipts: also while a command is still making it."""

from collections.abc import Mapping
from dataclasses import dataclass

from deltacache.pipeline.datasets.preparation import read_card
from deltacache.pipeline.datasets.recorded import holdings
from deltacache.pipeline.storage.storage import AnyPath, dataset_root
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.images import size_text


@dataclass(frozen=True, slots=True)
class DatasetDescription:
    """What a dataset holds now.

    Attributes:
        videos: of which at least one clip is there.
        planned_videos: in the plan, refused ones too.
        failures: refused videos and clips, by reason.
        bytes: size of all finished shards.
    """

    root: AnyPath
    card: DatasetCard
    clips: int
    videos: int
    planned_videos: int
    shards: int
    planned_shards: int
    failures: Mapping[str, int]
    bytes: int

    @property
    def finished(self) -> bool:
        """Whether every planned shard is there."""
        return self.shards == self.planned_shards > 0

    def __str__(self) -> str:
        card, sampling = self.card, self.card.sampling
        rows, columns = card.patch_grid
        refused = ", ".join(f"{reason} {count}" for reason, count in self.failures.items()) or "none"
        parents = ", ".join(f"{name} {value}" for name, value in card.parents.items())
        spacing = f"{sampling.spacing_min_s:g}-{sampling.spacing_max_s:g} s apart"
        state = "finished" if self.finished else "not finished"
        lines = [
            f"{self.root}: {card.kind} in {card.store} shards, {state}",
            f"  holds        {self.clips} clips of {self.videos} videos in {self.shards} of {self.planned_shards} "
            f"shards, {readable_size(self.bytes)}",
            f"  refused      {refused}",
            f"  fingerprint  {card.fingerprint}, made from {parents}",
            f"  backbone     {card.backbone.id}{_taken(card)}, {size_text(card.image_size)} px, "
            f"{rows} x {columns} patches, {card.hidden_size} wide, {card.dtype}, {card.precision} forward",
            f"  sampling     {sampling.frames} frames {spacing}, "
            f"{'augmented' if sampling.augment else 'not augmented'}, seed {sampling.seed}",
            f"  written by   deltacache {card.code_version}, format {card.format_version}",
        ]
        return "\n".join(lines)


def _taken(card: DatasetCard) -> str:
    """Layers and PCA, where they are used."""
    layers, pca = card.backbone.layers, card.backbone.pca_fingerprint
    joined = f", layers {','.join(map(str, layers))}" if layers is not None else ""
    return joined + (f", PCA {pca}" if pca is not None else "")


def readable_size(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def describe(root: AnyPath | str) -> DatasetDescription:
    """Describe the dataset at ``root``, finished or not, also while a command writes to it.

    Of a finished one a few files are read; else the parts, and the receipts of shards that no part knows.

    Raises:
        DatasetError: not a dataset, or its card, plan or a receipt is damaged.
    """
    root = dataset_root(root)
    card, held = read_card(root), holdings(root)
    return DatasetDescription(
        root=root,
        card=card,
        clips=held.clips,
        videos=held.videos,
        planned_videos=held.planned_videos,
        shards=held.shards,
        planned_shards=held.planned_shards,
        failures=dict(sorted(held.failures.items())),
        bytes=held.bytes,
    )
