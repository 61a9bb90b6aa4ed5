"""The offline jobs as one reads them: find, plan, run what is missing, finish, say what was done."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from upath import UPath

import deltacache
from deltacache.models.checkpoints import load_tokenizer
from deltacache.pipeline.cluster import SHARDS_AT_ONCE, DecodePlan, Events, cluster, run_shards
from deltacache.pipeline.datasets.changes import (
    changed_videos,
    drop_changed,
    recorded_videos,
    refuse_changed,
    shards_made_of_others,
)
from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    open_dataset,
    prepare_dataset,
)
from deltacache.pipeline.datasets.dropping import drop_shards
from deltacache.pipeline.datasets.finishing import FAILURES_FILE, INDEX_FILE, is_merged, read_table
from deltacache.pipeline.datasets.plan import (
    ShardTask,
    extend_plan,
    read_plan,
    replace_plan,
    shard_tasks,
    write_plan,
)
from deltacache.pipeline.datasets.preparation import CARD_FILE, read_card
from deltacache.pipeline.decoding.work import DecodeSettings
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.jobs.parts import (
    BuildEncoder,
    chosen_backbone,
    feature_encoder,
    feature_worker,
    features_card,
    video_delta_encoder,
    video_worker,
)
from deltacache.pipeline.jobs.progress import FailureBudget, JobProgress, clips_of
from deltacache.pipeline.jobs.throughput import Throughput
from deltacache.pipeline.storage.atomic import readable_errors, write_if_changed
from deltacache.pipeline.storage.locking import DatasetLock, dataset_lock
from deltacache.pipeline.storage.storage import AnyPath, dataset_root
from deltacache.pipeline.work.attempts import Attempts, Kind
from deltacache.pipeline.work.encoders import black_patch_tokens_of, resolve_precision
from deltacache.pipeline.work.placement import Placement
from deltacache.pipeline.work.tokenize_work import check_tokenizer_fits
from deltacache.pipeline.work.workers import ShardWorker
from deltacache.schemas.configs import config_yaml
from deltacache.schemas.datasets import DatasetCard, Frozen, Precision
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.jobs import (
    ClusterSettings,
    ExtractionSettings,
    TokenizeSettings,
    TokenizeVideosSettings,
)
from deltacache.schemas.progress import Reporter
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What lies in the output after a job, and how much of it is new."""

    clips: int
    videos: int
    new_clips: int
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Job:
    """One command at work on one output, which it holds the lock of."""

    name: str
    out: UPath
    cluster: ClusterSettings
    lock: DatasetLock
    reporter: Reporter
    _resources: ExitStack
    _placement: Placement | None = None

    def placement(self) -> Placement:
        """Where the work runs; Ray starts when this is first asked, for a finished dataset needs none."""
        if self._placement is None:
            self._placement = self._resources.enter_context(cluster(self.cluster))
        return self._placement

    def run(
        self,
        attempts: Attempts,
        tasks: list[ShardTask],
        build: Callable[[str], ShardWorker],
        decode: DecodePlan | None,
        budget: FailureBudget | None = None,
    ) -> Throughput:
        """Do the work on these shards, showing progress; stop early when the failures can no longer be allowed."""
        placement = self.placement().for_shards(len(tasks))
        self.reporter.line(f"{self.name}: {placement}; Ray started in {placement.ray_start_s:.1f} s")
        throughput = Throughput(placement, "reading" if decode is None else "decoding", SHARDS_AT_ONCE)
        with self.reporter.stage(self.name, clips_of(tasks)) as stage:
            progress = JobProgress(stage, throughput, self.lock, attempts, tasks)
            events = progress.events(Events(line=self.reporter.line))
            for result in run_shards(attempts, partial(build, placement.device), decode, placement, events):
                progress.committed(result)
                if budget is not None and budget.exceeded_by(len(progress.failed)):
                    break  # the check of the whole dataset, in which these count too, says so
        return throughput


@contextmanager
def _job(name: str, out: AnyPath | str, settings: ClusterSettings, reporter: Reporter) -> Iterator[_Job]:
    root = dataset_root(out)
    with dataset_lock(root, name) as lock, ExitStack() as resources:
        yield _Job(name, root, settings, lock, reporter, resources)


@dataclass(frozen=True, slots=True)
class _VideoJob:
    """What differs between extracting features and tokenizing straight from videos."""

    settings: ExtractionSettings
    resolved: ExtractionSettings | TokenizeVideosSettings
    card: DatasetCard
    black: np.ndarray  # (N, D) float16
    encoder: BuildEncoder


def extract_features(settings: ExtractionSettings, out: AnyPath | str, reporter: Reporter) -> JobSummary:
    """Videos to a feature dataset at ``out``; finishes what is missing, touches nothing else.

    Raises:
        DeltacacheError: bad input, settings that differ from the dataset's, videos that were replaced, another
            command at work on ``out``, or too many failed videos.
    """
    with _job("extract-features", out, settings.cluster, reporter) as job:
        precision = _precision(settings, job)
        backbone = chosen_backbone(settings).load()
        black = black_patch_tokens_of(backbone, settings.image_size)
        card = features_card(settings, backbone, black, precision)
        encoder = feature_encoder(settings, precision)
        return _encode_videos(job, _VideoJob(settings, settings, card, black, encoder))


def tokenize_videos(settings: TokenizeVideosSettings, out: AnyPath | str, reporter: Reporter) -> JobSummary:
    """Videos straight to a delta dataset at ``out``: equal to tokenizing their feature dataset.

    Raises:
        DeltacacheError: as for features, or a tokenizer made for other features.
    """
    videos = settings.videos
    with _job("tokenize", out, videos.cluster, reporter) as job:
        precision = _precision(videos, job)
        backbone = chosen_backbone(videos).load()
        tokenizer = load_tokenizer(settings.tokenizer)
        black = black_patch_tokens_of(backbone, videos.image_size)
        features = features_card(videos, backbone, black, precision)
        check_tokenizer_fits(tokenizer, features, settings.tokenizer)
        card = features.deltas(
            store=videos.store,
            tokenizer=tokenizer.fingerprint,
            code_version=deltacache.__version__,
            tokens_per_frame=tokenizer.model.tokens_per_frame,
        )
        encoder = video_delta_encoder(videos, card, settings.tokenizer, black)
        return _encode_videos(job, _VideoJob(videos, settings, card, black, encoder))


def tokenize_features(settings: TokenizeSettings, out: AnyPath | str, reporter: Reporter) -> JobSummary:
    """A feature dataset to a delta dataset at ``out``, shard by shard.

    Shards of features that were made anew since (videos replaced, failures mended) are tokenized again.

    Raises:
        DeltacacheError: the features are not finished, the tokenizer was made for others, or another command is
            at work on ``out``.
    """
    root = dataset_root(settings.features)
    _refuse_unfinished(root)
    features = open_dataset(root, "features")
    tokenizer = load_tokenizer(settings.tokenizer)
    check_tokenizer_fits(tokenizer, features.card, settings.tokenizer)
    with _job("tokenize", out, settings.cluster, reporter) as job:
        card = features.card.deltas(
            store=settings.store,
            tokenizer=tokenizer.fingerprint,
            code_version=deltacache.__version__,
            tokens_per_frame=tokenizer.model.tokens_per_frame,
        )
        prepare_dataset(job.out, card, features.black_patch_tokens)
        _follow_plan(root, job.out)
        tasks, throughput = _pending(job.out), None
        if tasks:
            _save(settings, job.out)
            build = partial(
                feature_worker,
                (root, features.card),
                (job.out, card),
                settings.tokenizer,
                features.black_patch_tokens,
            )
            throughput = job.run(Attempts(tasks), tasks, build, None)
        return _finish(job, throughput)


def _encode_videos(job: _Job, work: _VideoJob) -> JobSummary:
    settings, out = work.settings, job.out
    job.reporter.line(f"looking for videos in {settings.source}")
    sources = find_videos(settings.source, settings.exclude_list)
    prepare_dataset(out, work.card, work.black)
    finish_dataset(out)
    _settle_changes(job, sources, settings)
    retried = _failed_tasks(out) if settings.retry_failed else []
    plan = extend_plan(read_plan(out), sources, settings.views, settings.videos_per_shard)
    write_plan(out, plan)
    budget = FailureBudget(len(plan["video_uri"].unique()), settings.max_failed_fraction)
    locations = {source.video_uri: source.path for source in sources}
    decode = DecodePlan(DecodeSettings(settings.image_size, settings.sampling, settings.limits), locations)
    build = partial(video_worker, out, work.card, work.encoder)
    throughput = None
    if retried:
        _save(work.resolved, out)
        throughput = job.run(Attempts(retried, Kind.RETRY), retried, build, decode)
    tasks = _pending(out)  # also shards that lost their receipt to a crash while they were retried
    if tasks:
        _save(work.resolved, out)
        throughput = job.run(Attempts(tasks), tasks, build, decode, budget)
    summary = _finish(job, throughput)
    failed = set(read_table(out / FAILURES_FILE, FAILURES_SCHEMA)["video_uri"].to_pylist())
    budget.check(len(failed), summary.failures, out)
    return summary


def _settle_changes(job: _Job, sources: list[VideoSource], settings: ExtractionSettings) -> None:
    """Notice videos that were replaced behind their names; refuse them, or plan their shards anew.

    A video that is about to be tried again may be another: of those that gave no clip, nothing was made.
    """
    changed = changed_videos(sources, recorded_videos(job.out), job.reporter.line)
    if settings.retry_failed and changed:
        given = set(read_table(job.out / INDEX_FILE, INDEX_SCHEMA)["video_uri"].unique().to_pylist())
        changed = [source for source in changed if source.video_uri in given]
    if settings.changed_videos == "refuse":
        refuse_changed(job.out, changed)
    elif changed:
        shards = drop_changed(job.out, changed)
        job.reporter.line(f"{len(changed)} videos have another content: their {shards} shards are made anew")


def _failed_tasks(out: UPath) -> list[ShardTask]:
    """The refused videos of finished shards, by shard."""
    failed = set(read_table(out / FAILURES_FILE, FAILURES_SCHEMA)["video_uri"].to_pylist())
    finished = finished_shards(out)
    tasks = [
        ShardTask(task.shard_id, tuple(video for video in task.videos if video.video_uri in failed))
        for task in shard_tasks(read_plan(out))
        if task.shard_id in finished
    ]
    return [task for task in tasks if task.videos]


def _follow_plan(features: UPath, deltas: UPath) -> None:
    """Give the deltas the plan of their features; what was made of other features is dropped."""
    plan, old = read_plan(features), read_plan(deltas)
    if old.num_rows:
        finish_dataset(deltas)
        dropped = shards_made_of_others(features, deltas)
        if dropped:
            drop_shards(deltas, dropped)
        replace_plan(deltas, plan)
    else:
        write_plan(deltas, plan)


def _refuse_unfinished(features: UPath) -> None:
    """An index that does not know all shards would give delta shards without their clips, for good."""
    if not (features / CARD_FILE).exists():
        return  # opening it says what it is
    missing = len(_pending(features))
    if missing or not is_merged(features):
        what = f"{missing} planned shards are missing" if missing else "its tables do not hold all shards"
        raise DatasetError(
            f"{features} is not finished: {what}. Run extract-features on it again, then tokenize"
        )


def _save(settings: Frozen, out: UPath) -> None:
    path = out / "config.yaml"
    with readable_errors(path):
        write_if_changed(path, config_yaml(settings).encode())


def _pending(out: UPath) -> list[ShardTask]:
    done = finished_shards(out)
    return [task for task in shard_tasks(read_plan(out)) if task.shard_id not in done]


def _finish(job: _Job, throughput: Throughput | None) -> JobSummary:
    out = job.out
    finish_dataset(out)
    dataset = open_dataset(out)
    summary = JobSummary(
        clips=len(dataset),
        videos=len(dataset.index["video_uri"].unique()),
        new_clips=throughput.clips if throughput else 0,
        failures=Counter(dataset.failures["reason"].to_pylist()),
    )
    job.reporter.line(_summary_line(out, summary, throughput))
    if throughput is not None:
        throughput.save(out)
    return summary


def _summary_line(out: UPath, summary: JobSummary, throughput: Throughput | None) -> str:
    text = f"{out}: {summary.clips} clips of {summary.videos} videos"
    if summary.failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.failures.items()))
        text += f"; refused {summary.failures.total()} ({reasons}), see {out / FAILURES_FILE}"
    if throughput is None:
        return text + "; already complete, nothing to do"
    return text + f"; {throughput.line()}"


def _precision(settings: ExtractionSettings, job: _Job) -> Precision:
    """The one asked for; else that of the dataset that is continued; else bfloat16 on GPUs.

    Raises:
        MismatchError: the dataset there was made in the bfloat16 of older versions.
    """
    if (job.out / CARD_FILE).exists():
        made = read_card(job.out).precision
        if made == "bfloat16" and settings.precision != "float32":
            raise MismatchError(
                f"{job.out} was made with precision bfloat16 by an older version, which rounded the whole forward pass "
                "of the backbone. This version keeps the residual stream and norms in float32 (bfloat16_autocast), and "
                "one dataset must not mix the two: give another output folder. What was made can still be read, "
                "trained on and evaluated"
            )
        if settings.precision == "auto":
            return made
    if settings.precision != "auto":
        return resolve_precision("cpu", settings.precision)
    return "bfloat16_autocast" if job.placement().device == "cuda" else "float32"
