"""The offline jobs as one reads them: find, plan, run what is missing, finish, say what was done."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import deltacache
from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import load_tokenizer
from deltacache.pipeline.checksums import crc32c_of_npy
from deltacache.pipeline.cluster import Placement, cluster, encode_shards, encode_videos
from deltacache.pipeline.dataset import (
    finish_dataset,
    finished_shards,
    open_dataset,
    prepare_dataset,
    read_plan,
    write_plan,
)
from deltacache.pipeline.encoders import (
    ClipEncoder,
    black_patch_tokens_of,
    build_delta_encoder,
    build_feature_encoder,
)
from deltacache.pipeline.plan import ShardTask, extend_plan, shard_tasks
from deltacache.pipeline.shard_work import DecodeSettings, ShardResult
from deltacache.pipeline.sources import find_videos
from deltacache.pipeline.throughput import Throughput
from deltacache.pipeline.tokenize_work import build_shard_tokenizer, check_tokenizer_fits
from deltacache.schemas.configs import save_config
from deltacache.schemas.datasets import BackboneCard, DatasetCard
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.jobs import (
    ExtractionSettings,
    TokenizeSettings,
    TokenizeVideosSettings,
)
from deltacache.schemas.progress import Reporter


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What lies in the output after a job, and how much of it is new."""

    clips: int
    videos: int
    new_clips: int
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """``--max-failed-fraction`` of the planned videos."""

    videos: int
    fraction: float

    def exceeded_by(self, failed: int) -> bool:
        """Whether so many failures are too many, whatever becomes of the other videos."""
        return failed > self.fraction * self.videos

    def check(self, failures: Counter[str], out: Path) -> None:
        """Raise when the whole dataset has too many failures."""
        if self.exceeded_by(failures.total()):
            raise DeltacacheError(
                f"{failures.total()} of {self.videos} videos were refused, more than --max-failed-fraction "
                f"{self.fraction:g} allows. What was finished is kept; {out / 'failures.parquet'} says why. "
                "Raise --max-failed-fraction to go on without them; or mend them, or name them in "
                "--exclude-list, and extract into a new folder"
            )


@dataclass(frozen=True, slots=True)
class _VideoJob:
    """What differs between extracting features and tokenizing straight from videos."""

    name: str
    settings: ExtractionSettings
    resolved: ExtractionSettings | TokenizeVideosSettings
    card: DatasetCard
    black: np.ndarray  # (N, D) float16
    build: Callable[..., ClipEncoder]


def extract_features(settings: ExtractionSettings, out: Path, reporter: Reporter) -> JobSummary:
    """Videos to a feature dataset at ``out``; finishes what is missing, touches nothing else.

    Raises:
        DeltacacheError: bad input, settings that differ from the dataset's, or too many failed videos.
    """
    backbone = load_backbone(settings.backbone)
    black = black_patch_tokens_of(backbone, settings.image_size)
    card = _card(settings, backbone, black, "features", None)
    build = partial(build_feature_encoder, settings.backbone)
    return _encode_videos(
        _VideoJob("extract-features", settings, settings, card, black, build), out, reporter
    )


def preview_extraction(settings: ExtractionSettings, out: Path) -> str:
    """What ``extract_features`` would make, as text; writes nothing."""
    sources = find_videos(settings.source, settings.exclude_list)
    backbone = load_backbone(settings.backbone)
    rows, columns = backbone.grid(settings.image_size)
    clips = len(sources) * settings.views
    clip_bytes = settings.sampling.frames * rows * columns * backbone.hidden_size * 2
    shards = -(-len(sources) // settings.videos_per_shard)
    return (
        f"{settings.source}: {len(sources)} videos ({sum(s.size_bytes for s in sources) / 1e9:.2f} GB)\n"
        f"{out}: would hold {clips} clips of {settings.sampling.frames} x {rows * columns} x "
        f"{backbone.hidden_size} float16 in at least {shards} shards, {clips * clip_bytes / 1e9:.2f} GB"
    )


def tokenize_videos(settings: TokenizeVideosSettings, out: Path, reporter: Reporter) -> JobSummary:
    """Videos straight to a delta dataset at ``out``: equal to tokenizing their feature dataset.

    Raises:
        DeltacacheError: as for features, or a tokenizer made for other features.
    """
    videos = settings.videos
    backbone = load_backbone(videos.backbone)
    tokenizer = load_tokenizer(settings.tokenizer)
    black = black_patch_tokens_of(backbone, videos.image_size)
    card = _card(videos, backbone, black, "deltas", tokenizer.fingerprint)
    check_tokenizer_fits(tokenizer, card, settings.tokenizer)
    build = partial(build_delta_encoder, settings.tokenizer, black, card.patch_grid, backbone=videos.backbone)
    return _encode_videos(_VideoJob("tokenize", videos, settings, card, black, build), out, reporter)


def tokenize_features(settings: TokenizeSettings, out: Path, reporter: Reporter) -> JobSummary:
    """A feature dataset to a delta dataset at ``out``, shard by shard.

    Raises:
        MismatchError: the tokenizer was made for other features.
    """
    _refuse_unfinished(settings.features)
    features = open_dataset(settings.features, "features")
    tokenizer = load_tokenizer(settings.tokenizer)
    check_tokenizer_fits(tokenizer, features.card, settings.tokenizer)
    card = features.card.model_copy(
        update={
            "kind": "deltas",
            "store": settings.store,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "code_version": deltacache.__version__,
        }
    )
    prepare_dataset(out, card, features.black_patch_tokens)
    write_plan(out, read_plan(settings.features))
    pending = _pending(out)
    throughput = None
    if pending:
        save_config(settings, out / "config.yaml")
        build = partial(build_shard_tokenizer, settings.features, out, card, settings.tokenizer)
        with cluster(settings.cluster) as placement:
            ids = [task.shard_id for task in pending]
            results = encode_shards(ids, partial(build, device=placement.device), placement)
            throughput = _collect("tokenize", results, pending, placement, reporter, None)
    return _finish(out, throughput, reporter)


def _encode_videos(job: _VideoJob, out: Path, reporter: Reporter) -> JobSummary:
    settings = job.settings
    sources = find_videos(settings.source, settings.exclude_list)
    prepare_dataset(out, job.card, job.black)
    plan = extend_plan(read_plan(out), sources, settings.views, settings.videos_per_shard)
    write_plan(out, plan)
    pending = _pending(out)
    budget = FailureBudget(plan.num_rows, settings.max_failed_fraction)
    throughput = None
    if pending:
        save_config(job.resolved, out / "config.yaml")
        paths = {source.video_uri: source.path for source in sources}
        decode = DecodeSettings(settings.image_size, settings.sampling, settings.limits)
        with cluster(settings.cluster) as placement:
            build = partial(job.build, device=placement.device)
            results = encode_videos(pending, paths, decode, out, job.card, build, placement)
            throughput = _collect(job.name, results, pending, placement, reporter, budget)
    summary = _finish(out, throughput, reporter)
    budget.check(summary.failures, out)
    return summary


def _refuse_unfinished(features: Path) -> None:
    """An index that does not know all shards would give delta shards without their clips, for good."""
    missing = len(_pending(features)) if (features / "plan.parquet").is_file() else 0
    if missing:
        raise DatasetError(
            f"{features} is not finished: {missing} planned shards are missing. Run extract-features on it again, "
            "then tokenize"
        )
    finish_dataset(features)


def _pending(out: Path) -> list[ShardTask]:
    done = finished_shards(out)
    return [task for task in shard_tasks(read_plan(out)) if task.shard_id not in done]


def _collect(
    name: str,
    results: Iterable[ShardResult],
    pending: list[ShardTask],
    placement: Placement,
    reporter: Reporter,
    budget: FailureBudget | None,
) -> Throughput:
    """Show progress as shards are committed; stop early when the failures can no longer be allowed."""
    throughput = Throughput(placement.decoders, placement.encoders)
    failed = 0
    with reporter.stage(name, sum(len(task.videos) for task in pending)) as stage:
        for result in results:
            throughput.add(result)
            failed += result.failures
            stage.advance(result.videos, clips_per_s=throughput.clips_per_s, failed=failed)
            if budget is not None and budget.exceeded_by(failed):
                break
    return throughput


def _finish(out: Path, throughput: Throughput | None, reporter: Reporter) -> JobSummary:
    finish_dataset(out)
    dataset = open_dataset(out)
    reasons = Counter(dataset.failures["reason"].to_pylist())
    summary = JobSummary(
        clips=len(dataset),
        videos=len(dataset.index["video_uri"].unique()),
        new_clips=throughput.clips if throughput else 0,
        failures=reasons,
    )
    reporter.line(_summary_line(out, summary, throughput))
    if throughput is not None:
        throughput.save(out / "throughput.json")
    return summary


def _summary_line(out: Path, summary: JobSummary, throughput: Throughput | None) -> str:
    text = f"{out}: {summary.clips} clips of {summary.videos} videos"
    if summary.failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.failures.items()))
        text += f"; refused {summary.failures.total()} ({reasons}), see {out / 'failures.parquet'}"
    if throughput is None:
        return text + "; already complete, nothing to do"
    return text + f"; {throughput.line()}"


def _card(
    settings: ExtractionSettings,
    backbone: Backbone,
    black: np.ndarray,
    kind: Literal["features", "deltas"],
    tokenizer: str | None,
) -> DatasetCard:
    return DatasetCard(
        kind=kind,
        store=settings.store,
        backbone=BackboneCard(
            id=backbone.id,
            weights_sha256=backbone.weights_sha256,
            patch_size=backbone.patch_size,
            hidden_size=backbone.hidden_size,
            image_mean=backbone.image_mean,
            image_std=backbone.image_std,
        ),
        tokenizer_fingerprint=tokenizer,
        image_size=settings.image_size,
        patch_grid=backbone.grid(settings.image_size),
        hidden_size=backbone.hidden_size,
        sampling=settings.sampling,
        black_crc32c=crc32c_of_npy(black),
        code_version=deltacache.__version__,
    )
