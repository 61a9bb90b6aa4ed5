"""What a dataset is, from its card and receipts: also while a command is still making it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltacache.pipeline.commits import checked_receipt
from deltacache.pipeline.plan import read_plan
from deltacache.pipeline.preparation import read_card
from deltacache.pipeline.receipts import finished_shards
from deltacache.schemas.datasets import DatasetCard


@dataclass(frozen=True, slots=True)
class DatasetDescription:
    """What a dataset holds now.

    Attributes:
        videos: of which at least one clip is there.
        planned_videos: in the plan, refused ones too.
        failures: refused videos and clips, by reason.
        bytes: size of all finished shards.
    """

    root: Path
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
        return self.shards == self.planned_shards

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
            f"shards, {_size(self.bytes)}",
            f"  refused      {refused}",
            f"  fingerprint  {card.fingerprint}, made from {parents}",
            f"  backbone     {card.backbone.id}, {card.image_size} px, {rows} x {columns} patches, "
            f"{card.hidden_size} wide, {card.dtype}",
            f"  sampling     {sampling.frames} frames {spacing}, "
            f"{'augmented' if sampling.augment else 'not augmented'}, seed {sampling.seed}",
            f"  written by   deltacache {card.code_version}, format {card.format_version}",
        ]
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def describe(root: Path) -> DatasetDescription:
    """Describe the dataset at ``root``, finished or not.

    Raises:
        DatasetError: not a dataset, or its card, plan or a receipt is damaged.
    """
    card, plan = read_card(root), read_plan(root)
    finished = finished_shards(root)
    clips, size, videos, failures = 0, 0, set[str](), Counter[str]()
    for shard_id in sorted(finished):
        receipt = checked_receipt(root, shard_id, card)
        clips += len(receipt.clips)
        size += receipt.total_bytes
        videos.update(row["video_uri"] for row in receipt.clips)
        failures.update(failure.reason for failure in receipt.failures)
    return DatasetDescription(
        root=root,
        card=card,
        clips=clips,
        videos=len(videos),
        planned_videos=len(plan["video_uri"].unique()),
        shards=len(finished),
        planned_shards=len(plan["shard"].unique()),
        failures=dict(sorted(failures.items())),
        bytes=size,
    )
