"""``tokenize FEATURES`` again, after clips of a shard could not be encoded."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
from trained_systems import TrainedSystems
from upath import UPath

from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset
from deltacache.pipeline.datasets.plan import read_plan, shard_tasks
from deltacache.pipeline.datasets.writing import drop_shards
from deltacache.pipeline.jobs.offline import tokenize_features
from deltacache.pipeline.jobs.parts import feature_worker
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.schemas.jobs import ClusterSettings, TokenizeSettings
from deltacache.schemas.progress import SilentReporter


def test_a_video_that_failed_joins_its_shard_at_the_next_run(systems: TrainedSystems, tmp_path: Path) -> None:
    features, out = UPath(systems.train), UPath(tmp_path / "deltas")
    shutil.copytree(systems.paths.deltas("delta"), out)
    shards = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    blamed = _lose_a_video(features, out, systems.paths.tokenizer("delta"))
    settings = TokenizeSettings(
        features=str(features),
        tokenizer=systems.paths.tokenizer("delta"),
        cluster=ClusterSettings(encoders=0),
    )

    assert pq.read_table(out / "failures.parquet")["video_uri"].to_pylist() == [blamed]
    tokenize_features(settings, out, SilentReporter())
    assert pq.read_table(out / "failures.parquet").num_rows == 0
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == shards


def _lose_a_video(features: UPath, out: UPath, tokenizer: Path) -> str:
    """Make the first shard again as if the encoder had died with its first video."""
    task = shard_tasks(read_plan(out))[0]
    cards = open_dataset(features), open_dataset(out)
    drop_shards(out, [task.shard_id])
    worker = feature_worker(
        (features, cards[0].card),
        (out, cards[1].card),
        tokenizer,
        cards[0].black_patch_tokens,
        "",
        300.0,
        "cpu",
    )
    blamed = task.videos[0].video_uri
    work = Work(Kind.COMMIT, task, known_failures=((blamed, "the encoder died"),))
    worker.run(work, lambda _: iter(()), lambda _: None)
    finish_dataset(out)
    return blamed
