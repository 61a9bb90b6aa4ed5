"""``tokenize FEATURES`` again, after clips of a shard could not be encoded."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from trained_systems import TrainedSystems
from upath import UPath

from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset, prepare_dataset, write_plan
from deltacache.pipeline.datasets.dropping import drop_shards
from deltacache.pipeline.datasets.plan import plan_of, read_plan, shard_tasks
from deltacache.pipeline.jobs.offline import tokenize_features
from deltacache.pipeline.jobs.parts import feature_worker
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.jobs import TokenizeSettings
from deltacache.schemas.progress import SilentReporter


def test_a_video_that_failed_joins_its_shard_at_the_next_run(systems: TrainedSystems, tmp_path: Path) -> None:
    features, out = UPath(systems.train), UPath(tmp_path / "deltas")
    shutil.copytree(systems.paths.deltas("delta"), out)
    shards = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    blamed = _lose_a_video(features, out, systems.paths.tokenizer("delta"))
    settings = TokenizeSettings(features=str(features), tokenizer=systems.paths.tokenizer("delta"))

    assert pq.read_table(out / "failures.parquet")["video_uri"].to_pylist() == [blamed]
    tokenize_features(settings, out, SilentReporter())
    assert pq.read_table(out / "failures.parquet").num_rows == 0
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == shards


def test_deltas_go_on_in_the_precision_that_they_were_made_in(
    systems: TrainedSystems, tmp_path: Path
) -> None:
    """Older versions knew float32 only: their datasets are continued in it, and never mixed with another."""
    features, out = UPath(systems.train), UPath(tmp_path / "deltas")
    shutil.copytree(systems.paths.deltas("delta"), out)
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    settings = TokenizeSettings(features=str(features), tokenizer=systems.paths.tokenizer("delta"))
    for precision in ("auto", "float32"):
        again = settings.model_copy(update={"precision": precision})
        assert tokenize_features(again, out, SilentReporter()).new_clips == 0
    with pytest.raises(
        MismatchError, match=r"made in float32, and --precision bfloat16 .*Leave --precision out"
    ):
        tokenize_features(settings.model_copy(update={"precision": "bfloat16"}), out, SilentReporter())
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before

    card, old = open_dataset(features).card, open_dataset(out).card
    like = {"store": old.store, "tokenizer": old.tokenizer_fingerprint, "code_version": old.code_version}
    fast = card.deltas(**like, precision="bfloat16_autocast")
    task, black = shard_tasks(read_plan(out))[0], open_dataset(features).black_patch_tokens
    found = []
    for name, made in (("exact", card.deltas(**like)), ("fast", fast)):
        root = UPath(tmp_path / name)
        prepare_dataset(root, made, black)
        write_plan(root, plan_of([task]))
        tokenizer = systems.paths.tokenizer("delta")
        worker = feature_worker((features, card), (root, made), tokenizer, black, "cpu")
        worker.run(Work(Kind.COMMIT, task), lambda _: iter(()), lambda _: None)
        finish_dataset(root)
        found.append(open_dataset(root, "deltas").read_all())
    error = np.abs(found[0].astype(np.float32) - found[1].astype(np.float32)).max()
    assert 0 < error < 0.1


def _lose_a_video(features: UPath, out: UPath, tokenizer: Path) -> str:
    """Make the first shard again as if the encoder had died with its first video."""
    task = shard_tasks(read_plan(out))[0]
    cards = open_dataset(features), open_dataset(out)
    drop_shards(out, [task.shard_id])
    worker = feature_worker(
        (features, cards[0].card), (out, cards[1].card), tokenizer, cards[0].black_patch_tokens, "cpu"
    )
    blamed = task.videos[0].video_uri
    work = Work(Kind.COMMIT, task, culprits=((blamed, "the encoder died"),))
    worker.run(work, lambda _: iter(()), lambda _: None)
    finish_dataset(out)
    return blamed
