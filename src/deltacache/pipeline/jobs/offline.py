"""The offline jobs as one reads them: find, plan, run what is missing, finish, say what was done."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow.compute as pc
import yaml
from upath import UPath

import deltacache
from deltacache.models.checkpoints import load_tokenizer
from deltacache.pipeline.cluster.session import cluster
from deltacache.pipeline.cluster.shards import SHARDS_AT_ONCE, DecodePlan, Events, run_shards
from deltacache.pipeline.datasets.changes import (
    changed_videos,
    drop_changed,
    lineage,
    refuse_changed,
    same_videos,
    shards_of_other_rows,
    videos_of_other_rows,
)
from deltacache.pipeline.datasets.dataset import open_dataset, prepare_dataset
from deltacache.pipeline.datasets.plan import (
    Plan,
    PlannedShards,
    ShardTask,
    copy_plan,
    grow_plan,
    missing_views,
    open_plan,
)
from deltacache.pipeline.datasets.receipts import finished_shards
from deltacache.pipeline.datasets.writing import (
    CARD_FILE,
    FAILURES_FILE,
    INDEX_FILE,
    STAGING,
    Folding,
    TablesSummary,
    checked_receipts,
    commits_under_way,
    distinct,
    drop_durably,
    drop_under_way,
    existing_card,
    finish_dataset,
    finished_summary,
    open_table,
    read_card,
    read_table,
    settle,
    settle_commits,
)
from deltacache.pipeline.decoding.work import DecodeSettings, group_bytes
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.jobs.parts import (
    BuildEncoder,
    chosen_backbone,
    feature_encoder,
    feature_worker,
    features_card,
    find_sources,
    side_table,
    video_delta_encoder,
    video_worker,
)
from deltacache.pipeline.jobs.progress import FailureBudget, JobProgress, Throughput, clips_of
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.files import readable_errors, write_if_changed
from deltacache.pipeline.storage.locking import DatasetLock, dataset_lock
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, set_patience, sizes_in
from deltacache.pipeline.work.attempts import Attempts, Kind
from deltacache.pipeline.work.encoders import black_patch_tokens_of, resolve_precision
from deltacache.pipeline.work.placement import Placement
from deltacache.pipeline.work.shard_work import check_is_here
from deltacache.pipeline.work.workers import ShardWorker, check_tokenizer_fits
from deltacache.schemas.configs import config_yaml
from deltacache.schemas.datasets import AskedPrecision, DatasetCard, Frozen, Precision
from deltacache.schemas.errors import DatasetError, FailureReason, MismatchError
from deltacache.schemas.hub import origins
from deltacache.schemas.jobs import (
    ClusterSettings,
    ExtractionSettings,
    TokenizeSettings,
    TokenizeVideosSettings,
)
from deltacache.schemas.progress import Reporter
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA
from deltacache.schemas.texts import bytes_text, counted


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
            self._placement = self._resources.enter_context(cluster(self.cluster, self._say))
        return self._placement

    def _say(self, text: str) -> None:
        self.reporter.line(f"{self.name}: {text}")

    def run(
        self,
        attempts: Attempts,
        plan: Plan,
        clips: dict[str, int],
        build: Callable[[str], ShardWorker],
        decode: DecodePlan | None,
        budget: FailureBudget | None = None,
    ) -> Throughput:
        """Do the work on shards of ``plan``, of ``clips`` clips each, showing progress; fold what is committed.

        Stops early when the failures can no longer be allowed.
        """
        placement = self.placement().for_shards(len(clips))
        ahead = ""
        if decode is not None:
            decode = replace(decode, videos=sum(clips.values()) // decode.views)
            size = group_bytes(decode.views, decode.settings)
            ahead = f"; up to {bytes_text(placement.in_flight(size) * size)} of decoded videos in flight"
        started = "" if placement.here else f"; Ray started in {placement.ray_start_s:.1f} s{ahead}"
        self._say(f"{placement}{started}")
        reads, at_once = "reading" if decode is None else "decoding", 1 if placement.here else SHARDS_AT_ONCE
        throughput = Throughput(placement, reads, at_once)
        receipts = partial(checked_receipts, self.out, card=read_card(self.out))
        missing = clips if attempts.kind is Kind.COMMIT else ()  # shards that are tried again are finished
        with (
            self.reporter.stage(self.name, sum(clips.values())) as stage,
            Folding(self.out, plan.shard_ids, missing, receipts) as folding,
        ):
            progress = JobProgress(stage, throughput, self.lock, attempts, clips)
            events = progress.events(Events(line=self.reporter.line))
            build_here = partial(build, placement.device)
            with closing(run_shards(attempts, build_here, decode, placement, events)) as results:
                for result in results:
                    check_is_here(self.out, result)
                    progress.committed(result)
                    folding.committed(result.shard_id)
                    if budget is not None and budget.exceeded_by(len(progress.failed)):
                        break  # the check of the whole dataset, in which these count too, says so
        self.lock.check()
        settle_commits(self.out, alone=True, lock=self.lock.token)
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
    set_patience(settings.limits.retry_s)
    with _job("extract-features", out, settings.cluster, reporter) as job:
        precision = _precision(settings, job)
        backbone = chosen_backbone(settings).load()
        black = black_patch_tokens_of(backbone, settings.image_size)
        card = features_card(settings, backbone, black, precision)
        encoder = feature_encoder(settings, precision)
        return _encode_videos(job, _VideoJob(settings, settings, card, black, encoder))


def videos_to_add(settings: ExtractionSettings, out: AnyPath | str) -> list[str]:
    """Videos of which ``extract_features`` would add clips to the dataset at ``out``; of none there, no videos."""
    plan = open_plan(dataset_root(out))
    if not plan.videos:
        return []
    missing = missing_views(plan, find_sources(settings), settings.views)
    return list(dict.fromkeys(video.video_uri for video in missing))


def tokenize_videos(settings: TokenizeVideosSettings, out: AnyPath | str, reporter: Reporter) -> JobSummary:
    """Videos straight to a delta dataset at ``out``: equal to tokenizing their feature dataset.

    Raises:
        DeltacacheError: as for features, or a tokenizer made for other features.
    """
    videos = settings.videos
    set_patience(videos.limits.retry_s)
    with _job("tokenize", out, videos.cluster, reporter) as job:
        precision = _precision(videos, job)
        backbone = chosen_backbone(videos).load()
        tokenizer = load_tokenizer(settings.tokenizer)
        black = black_patch_tokens_of(backbone, videos.image_size)
        features = features_card(videos, backbone, black, precision)
        check_tokenizer_fits(tokenizer, features, settings.tokenizer)
        if said := features.other_size(tokenizer.metadata.get("image_size"), settings.tokenizer):
            reporter.line(f"tokenize: {said}")
        card = features.deltas(
            store=videos.store,
            tokenizer=tokenizer.fingerprint,
            code_version=deltacache.__version__,
            tokens_per_frame=tokenizer.model.tokens_per_frame,
            tokenizer_image_size=tokenizer.metadata.get("image_size"),
            precision=_tokenizer_precision(videos.precision, job),
            sources=origins(tokenizer=settings.tokenizer),
        )
        encoder = video_delta_encoder(videos, card, settings.tokenizer, black)
        return _encode_videos(job, _VideoJob(videos, settings, card, black, encoder))


def tokenize_features(settings: TokenizeSettings, out: AnyPath | str, reporter: Reporter) -> JobSummary:
    """A feature dataset to a delta dataset at ``out``, shard by shard.

    Of features that have grown since, what is new is tokenized. Those of which other videos were made need
    ``changed_videos`` "recompute".

    Raises:
        DeltacacheError: the features are not finished or not those that ``out`` was made of, the tokenizer was
            made for others, or another command is at work on ``out``.
    """
    set_patience(settings.retry_s)
    root = dataset_root(settings.features)
    plan, held = _finished_features(root)
    features = open_dataset(root, "features", held)
    tokenizer = load_tokenizer(settings.tokenizer)
    check_tokenizer_fits(tokenizer, features.card, settings.tokenizer)
    if said := features.card.other_size(tokenizer.metadata.get("image_size"), settings.tokenizer):
        reporter.line(f"tokenize: {said}")
    with _job("tokenize", out, settings.cluster, reporter) as job:
        card = features.card.deltas(
            store=settings.store,
            tokenizer=tokenizer.fingerprint,
            code_version=deltacache.__version__,
            tokens_per_frame=tokenizer.model.tokens_per_frame,
            tokenizer_image_size=tokenizer.metadata.get("image_size"),
            precision=_tokenizer_precision(settings.precision, job),
            sources=origins(features=root, tokenizer=settings.tokenizer),
        )
        prepare_dataset(job.out, card, features.black_patch_tokens)
        settle(job.out)
        done, grown = _follow_plan(settings, card, job.out, plan, held)
        tasks = plan.only({*plan.shard_ids} - finished_shards(job.out) if done is None else ())
        throughput = None
        if grown or len(tasks):
            done = None
            _save(settings, job.out)
            build = partial(
                feature_worker,
                (root, features.card),
                (job.out, card),
                settings.tokenizer,
                features.black_patch_tokens,
                job.lock.token,
                settings.retry_s,
            )
            if grown:
                clips = {task.shard_id: clips_of([task]) for task in grown}
                throughput = job.run(Attempts(grown, Kind.RETRY), plan, clips, build, None)
            if len(tasks):
                throughput = job.run(Attempts(tasks), plan, tasks.clips(), build, None)
        return _finish(job, done or finish_dataset(job.out, plan), throughput)


def _encode_videos(job: _Job, work: _VideoJob) -> JobSummary:
    settings, out = work.settings, job.out
    job.reporter.line(f"looking for videos in {settings.source}")
    sources = find_sources(settings, job.reporter.line)
    prepare_dataset(out, work.card, work.black)
    settle(out)
    plan = open_plan(out)
    held = finished_summary(out, plan)
    beside = side_table(settings)
    others = set[str]()
    if settings.side_arrays is not None and beside is not None:  # those of a LeRobot dataset have versions
        others = videos_of_other_rows(out, plan, beside)
    if held is not None and not others and same_videos(out, plan, held, sources, settings.views):
        if not _retried(held, settings):
            return _checked(job, held, None, settings)
    elif plan.videos and _settle_changes(job, plan, held, sources, settings, others):
        plan, held = open_plan(out), None
    there = {source.video_uri for source in sources}
    gone = [
        uri
        for batch in plan.batches(["video_uri", "first_view"])
        for uri, first in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        if first == 0 and uri not in there
    ]
    if gone:
        job.reporter.line(
            f"{len(gone)} planned videos are no longer in {settings.source}, or excluded now, such as {gone[0]}: what "
            "was made from them stays"
        )
    retried: list[ShardTask] = []
    if plan.videos and _retried(held or finish_dataset(out, plan), settings):
        retried = _failed_tasks(out, plan, None if settings.retry_failed else FailureReason.UNAVAILABLE)
    grown = grow_plan(out, plan, sources, settings.views, settings.videos_per_shard)
    if held is not None and grown is plan and not retried:
        return _checked(job, held, None, settings)
    plan = grown
    videos = distinct(batch.column(0) for batch in plan.batches(["video_uri"]))
    budget = FailureBudget(videos, settings.max_failed_fraction)
    locations = {source.video_uri: source.path for source in sources}
    decode = DecodePlan(
        DecodeSettings(settings.image_size, settings.sampling, settings.limits), locations, settings.views
    )
    if beside is not None and (lacking := beside.lacking(locations)):
        job.reporter.line(
            f"{len(lacking):,} of {counted(len(locations), 'video has', 'videos have', form=',')} no row in "
            f"{settings.side_arrays}, such as {lacking[0]}: their side arrays are NaN, or empty texts"
        )
    build = partial(
        video_worker, out, work.card, work.encoder, job.lock.token, settings.limits.retry_s, beside=beside
    )
    throughput = None
    if retried:
        _save(work.resolved, out)
        clips = {task.shard_id: clips_of([task]) for task in retried}
        throughput = job.run(Attempts(retried, Kind.RETRY), plan, clips, build, decode)
    tasks = _pending(out, plan)  # also shards that lost their receipt to a crash while they were retried
    if len(tasks):
        _save(work.resolved, out)
        throughput = job.run(Attempts(tasks), plan, tasks.clips(), build, decode, budget)
    return _checked(job, finish_dataset(out, plan), throughput, settings)


def _settle_changes(
    job: _Job,
    plan: Plan,
    held: TablesSummary | None,
    sources: list[VideoSource],
    settings: ExtractionSettings,
    of_other_rows: Collection[str],
) -> bool:
    """Notice videos that were replaced behind their names; refuse them, or plan their shards again: then true.

    So are those ``of_other_rows``, whose side arrays have changed.

    A video that is about to be tried again may be another: of those that gave no clip, nothing was made.
    """
    changed = changed_videos(sources, job.out, plan, held, job.reporter.line)
    if settings.retry_failed and changed:
        finish_dataset(job.out)
        with open_table(job.out / INDEX_FILE, INDEX_SCHEMA) as file:
            uris = {video.video_uri for video in changed}
            batches = file.iter_batches(columns=["video_uri"])
            given = {uri for batch in batches for uri in batch.column(0).unique().to_pylist() if uri in uris}
        changed = [source for source in changed if source.video_uri in given]
    known = {video.video_uri for video in changed}
    changed += [
        video for video in sources if video.video_uri in of_other_rows and video.video_uri not in known
    ]
    if settings.changed_videos == "refuse":
        refuse_changed(job.out, changed)
    elif changed:
        shards = drop_changed(job.out, changed)
        job.reporter.line(
            f"{counted(len(changed), 'video has', 'videos have')} changed: "
            f"{counted(shards, 'shard is', 'shards are')} made again"
        )
    return bool(changed)


def _retried(held: TablesSummary, settings: ExtractionSettings) -> int:
    """How many refusals are tried again: all if asked, and always those whose reason may have passed."""
    return (
        held.failed_videos if settings.retry_failed else held.failures.get(FailureReason.UNAVAILABLE.value, 0)
    )


def _failed_tasks(out: UPath, plan: Plan, only: FailureReason | None) -> list[ShardTask]:
    """The refused videos of finished shards, by shard; ``only`` those of one reason."""
    finish_dataset(out, plan)
    failures = read_table(out / FAILURES_FILE, FAILURES_SCHEMA)
    if only is not None:
        failures = failures.filter(pc.field("reason") == only.value)
    failed = set(failures["video_uri"].to_pylist())
    tasks = (
        ShardTask(task.shard_id, tuple(video for video in task.videos if video.video_uri in failed))
        for task in plan.only(finished_shards(out))
    )
    return [task for task in tasks if task.videos]


def _follow_plan(
    settings: TokenizeSettings, card: DatasetCard, deltas: UPath, plan: Plan, held: TablesSummary
) -> tuple[TablesSummary | None, list[ShardTask]]:
    """Give the deltas the plan of their features, which hold ``held``; those of other features are refused.

    Returns:
        The ``finished_summary`` of the deltas, and finished shards whose features hold more clips now.
    """
    features, old = dataset_root(settings.features), open_plan(deltas)
    done, grown = finished_summary(deltas, old), list[str]()
    if old.videos:
        found = lineage(features, deltas, (held, done or finish_dataset(deltas, old)))
        found.check_known(features, deltas, adds=bool(found.grown) or plan.seal != old.seal)
        recompute = settings.changed_videos == "recompute"
        made_of = _made_of(deltas) if found.changed or found.missing else ""
        dropped = found.to_drop(features, deltas, made_of, recompute=recompute)
        if dropped:
            drop_durably(deltas, dropped, {})
            done = None
        grown = found.grown
        if card.side_arrays and (others := shards_of_other_rows(features, deltas)):
            if not recompute:
                raise DatasetError(
                    f"The side arrays of {features} have changed since {deltas} was made from it, in "
                    f"{counted(len(others), 'shard')} such as {others[0]}. Give the features as they were, another "
                    "output folder, or --changed-videos recompute, which makes these shards again. Nothing was changed"
                )
            drop_durably(deltas, others, {})
            done, grown = None, [shard for shard in grown if shard not in others]
    if plan.seal != old.seal:
        copy_plan(plan, deltas)
        done = None
    return done, list(plan.only({*grown}))


def _made_of(deltas: UPath) -> str:
    """The features that the settings beside a delta dataset name."""
    try:
        settings = yaml.safe_load(read_file(deltas / "config.yaml"))
        return str(settings["features"] if "features" in settings else settings["videos"]["source"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "features that its config.yaml does not name"


def _finished_features(features: UPath) -> tuple[Plan, TablesSummary]:
    """The plan of a feature dataset and what it holds. An unfinished one is refused: an index that does not know all
    shards would give delta shards without their clips, for good.
    """
    with readable_errors(features, "read"):
        sizes = sizes_in(features)
    if CARD_FILE not in sizes:
        read_card(features)  # says what it is
    broken_off = STAGING in sizes and (bool(commits_under_way(features)) or drop_under_way(features))
    plan = open_plan(features)
    held = finished_summary(features, plan, sizes)
    if broken_off or held is None:
        missing = len(_pending(features, plan))
        what = f"{missing} planned shards are missing" if missing else "its tables do not hold all shards"
        what = "a command was interrupted while it replaced shards" if broken_off else what
        raise DatasetError(
            f"{features} is not finished: {what}. Run extract-features on it again, then tokenize"
        )
    return plan, held


def _save(settings: Frozen, out: UPath) -> None:
    path = out / "config.yaml"
    with readable_errors(path):
        write_if_changed(path, config_yaml(settings).encode())


def _pending(out: UPath, plan: Plan) -> PlannedShards:
    """The shards that are to be made; a finished dataset is known as such without listing what it has."""
    if finished_summary(out, plan) is not None:
        return plan.only(())
    return plan.only({*plan.shard_ids} - finished_shards(out))


def _checked(
    job: _Job, held: TablesSummary, throughput: Throughput | None, settings: ExtractionSettings
) -> JobSummary:
    """``_finish``, and the end with an error if too many videos were refused."""
    summary = _finish(job, held, throughput)
    budget = FailureBudget(held.planned_videos, settings.max_failed_fraction)
    budget.check(held.failed_videos, summary.failures, job.out)
    return summary


def _finish(job: _Job, held: TablesSummary, throughput: Throughput | None) -> JobSummary:
    out = job.out
    summary = JobSummary(
        clips=held.clips,
        videos=held.videos,
        new_clips=throughput.clips if throughput else 0,
        failures=Counter(held.failures),
    )
    text = f"{out}: {counted(summary.clips, 'clip')} of {counted(summary.videos, 'video')}"
    if summary.failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.failures.items()))
        text += f"; rejected {summary.failures.total()} ({reasons}), see {out / FAILURES_FILE}"
    if throughput is None:
        job.reporter.line(f"{text}; already complete, nothing to do")
    else:
        job.reporter.line(f"{text}; {throughput.line()}{throughput.bfloat16_hint(read_card(out))}")
        throughput.save(out)
    return summary


def _precision(settings: ExtractionSettings, job: _Job) -> Precision:
    """The one asked for; else that of the dataset that is continued; else bfloat16 on GPUs.

    Raises:
        MismatchError: the dataset there was made in the bfloat16 of older versions.
    """
    card = existing_card(job.out)
    if card is not None:
        made = card.precision
        if made == "bfloat16" and settings.precision != "float32":
            raise MismatchError(
                f"{job.out} was made with precision bfloat16 by an older version, which rounded the whole forward pass "
                "of the backbone. This version keeps the residual stream and norms in float32 (bfloat16_autocast), and "
                "one dataset must not mix the two: give another output folder. What was made can still be read, "
                "trained on and evaluated"
            )
        if settings.precision == "auto":
            return made
    return _on_this_device(settings.precision, job)


def _tokenizer_precision(asked: AskedPrecision, job: _Job) -> Precision:
    """The one asked for; else that of the delta tokens that are continued; else bfloat16 on GPUs.

    Raises:
        MismatchError: those there were made in another precision than the one asked for.
    """
    if not (job.out / CARD_FILE).exists():
        return _on_this_device(asked, job)
    made = read_card(job.out).tokenizer_precision
    if asked != "auto" and resolve_precision("cpu", asked) != made:
        raise MismatchError(
            f"{job.out} holds delta tokens that the tokenizer made in {made}, and --precision {asked} asks for others: "
            "one dataset must not mix the two. Leave --precision out to continue in theirs, or give another output "
            "folder"
        )
    return made


def _on_this_device(asked: AskedPrecision, job: _Job) -> Precision:
    if asked != "auto":
        return resolve_precision("cpu", asked)
    return "bfloat16_autocast" if job.placement().device == "cuda" else "float32"
