"""``--dry-run``: what extraction would make, and how long it would take here, tried on a few of the videos."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from deltacache.models.backbone import Backbone
from deltacache.models.flops import cpu_bfloat16_gain
from deltacache.pipeline.cluster.session import cluster
from deltacache.pipeline.cluster.shards import DecodePlan, probe
from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.datasets.stores import token_shape
from deltacache.pipeline.decoding.work import DecodeSettings
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.jobs.parts import (
    chosen_backbone,
    feature_encoder,
    features_card,
    find_sources,
    video_worker,
)
from deltacache.pipeline.jobs.progress import NARROW
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, set_patience
from deltacache.pipeline.work.encoders import black_patch_tokens_of, resolve_precision
from deltacache.pipeline.work.placement import Placement
from deltacache.schemas.datasets import DatasetCard, sides
from deltacache.schemas.jobs import ExtractionSettings
from deltacache.schemas.texts import counted, disk_text

_SAMPLE = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a whole extraction would cost, from a few videos.

    Attributes:
        decode_s: of one decoder for all videos, seconds; likewise ``forward_s`` of one encoder.
        refused: share of the sampled videos.
        clips, encoded: of the whole job, and how many clips' worth of frames are encoded and stored for them: fewer
            with ``windows``, which share frames.
    """

    decode_s: float
    forward_s: float
    refused: float
    placement: Placement
    clips: float
    encoded: float

    @property
    def seconds(self) -> float:
        """Of the whole job. On CPUs decoders and encoders share the cores."""
        if self.placement.device == "cpu":
            return (self.decode_s + self.forward_s) / max(self.placement.decoders, self.placement.encoders)
        return max(self.decode_s / self.placement.decoders, self.forward_s / self.placement.encoders)

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        decoding, forward = self.decode_s, self.forward_s
        if self.placement.device == "cuda":
            decoding, forward = decoding / self.placement.decoders, forward / self.placement.encoders
        return "decoding" if decoding > forward else "the forward pass"


def preview_extraction(
    settings: ExtractionSettings, out: AnyPath | str, say: Callable[[str], None] = lambda text: None
) -> str:
    """What ``extract_features`` would make and how long it would take, as text; writes nothing.

    A few videos, spread over the source, are decoded and the encoder is tried, where the job would run.

    Args:
        say: hears which cluster was found, and what is waited for.
    """
    set_patience(settings.limits.retry_s)
    notes = list[str]()
    sources = find_sources(settings, notes.append)
    backbone = chosen_backbone(settings).load()
    card = _card(settings, backbone)
    shape = token_shape(card)
    width = 1 if card.dtype == "int8" else 2
    clip_bytes = width * math.prod(shape) + (4 * shape[0] * shape[1] if card.dtype == "int8" else 0)
    shards = -(-len(sources) // settings.videos_per_shard)
    estimate, sampled = _try(settings, card, sources, say)
    clips, encoded = round(estimate.clips), round(estimate.encoded)
    about = "about " if settings.sampling.windows is not None else ""
    size = sum(source.size_bytes for source in sources)
    faster = ""
    if estimate.placement.device == "cpu" and card.precision == "float32" and card.hidden_size >= NARROW:
        share = _share_in_bfloat16(backbone, settings)
        if share < 0.9:
            seconds = replace(estimate, forward_s=share * estimate.forward_s).seconds
            faster = (
                f"\n--precision bfloat16 would take about {_hours(seconds)}: this CPU multiplies it faster"
            )
    return "".join(f"{note}\n" for note in notes) + (
        f"{settings.source}: {counted(len(sources), 'video')} ({disk_text(size)})\n"
        f"{dataset_root(out)}: would hold {about}{counted(clips, 'clip')} of {shape[0]} x {shape[1]} x {shape[2]} "
        f"{card.dtype} in at "
        f"least {counted(shards, 'shard')}, {disk_text(encoded * clip_bytes)}\n"
        f"tried on {counted(sampled, 'video')}, {estimate.placement}: {_hours(estimate.seconds)} in all; limit: "
        f"{estimate.limit} (decoding {_hours(estimate.decode_s)} of one decoder, the forward pass "
        f"{_hours(estimate.forward_s)} of one encoder); rejected {estimate.refused:.0%}{faster}"
    )


def _share_in_bfloat16(backbone: Backbone, settings: ExtractionSettings) -> float:
    """Of the time of a forward pass in float32; changes the precision of ``backbone``."""
    if cpu_bfloat16_gain() < 1.5:
        return 1.0
    frame = torch.zeros(1, 3, *sides(settings.image_size), dtype=torch.uint8)

    def shortest() -> float:
        taken: list[float] = []
        for _ in range(3):
            begun = time.perf_counter()
            backbone.patch_tokens(frame)
            taken.append(time.perf_counter() - begun)
        return min(taken)

    exact = shortest()
    backbone.to_precision("bfloat16_autocast")
    return shortest() / exact


def _card(settings: ExtractionSettings, backbone: Backbone) -> DatasetCard:
    black = black_patch_tokens_of(backbone, settings.image_size)
    asked = "float32" if settings.precision == "auto" else settings.precision
    return features_card(settings, backbone, black, resolve_precision("cpu", asked))


def _try(
    settings: ExtractionSettings, card: DatasetCard, sources: list[VideoSource], say: Callable[[str], None]
) -> tuple[Estimate, int]:
    step = max(1, len(sources) // _SAMPLE)
    sample = sources[step // 2 :: step][:_SAMPLE]
    videos = [PlannedVideo(s.video_id, s.video_uri, s.size_bytes, 0, settings.views) for s in sample]
    locations = {source.video_uri: source.path for source in sample}
    decode = DecodePlan(DecodeSettings(settings.image_size, settings.sampling, settings.limits), locations)
    with cluster(settings.cluster, say) as placement:
        fast = "bfloat16" if placement.device == "cuda" else "float32"
        asked = fast if settings.precision == "auto" else settings.precision
        precision = resolve_precision("cpu", asked)
        build = partial(
            video_worker,
            dataset_root("unused"),
            card,
            feature_encoder(settings, precision),
            "",
            settings.limits.retry_s,
            placement.device,
        )
        rate, groups = probe(build, videos, decode, placement)
    decode_s = sum(group.decode_s for group in groups) / len(groups)
    refused = sum(bool(group.failures) for group in groups) / len(groups)
    clips = encoded = len(sources) * settings.views
    made = (1 - refused) * encoded
    if settings.sampling.windows is not None:
        a_video = len(sources) / len(groups)
        clips = a_video * sum(len(group.clips[0].windows) for group in groups if group.clips)
        made = encoded = a_video * sum(len(group.clips) for group in groups)
    return Estimate(decode_s * len(sources), made / rate, refused, placement, clips, encoded), len(sample)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
