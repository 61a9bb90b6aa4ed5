"""``tokenize FEATURES`` in a precision: datasets go on in theirs, and a trainer takes what either gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import tokenizer_config
from upath import UPath

from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset, prepare_dataset
from deltacache.pipeline.datasets.plan import copy_plan, open_plan, read_plan, shard_tasks
from deltacache.pipeline.jobs.offline import tokenize_features
from deltacache.pipeline.jobs.parts import feature_worker
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.jobs import TokenizeSettings
from deltacache.schemas.progress import SilentReporter


def test_deltas_go_on_in_the_precision_that_they_were_made_in(features: Path, tmp_path: Path) -> None:
    """Older versions knew float32 only and did not write it: their datasets are never mixed with another."""
    parent = open_dataset(features)
    torch.manual_seed(0)
    model = DeltaTok(parent.card.hidden_size, **tokenizer_config().model.model_dump())
    save_model(tmp_path / "tokenizer", model, "tokenizer", {})
    fingerprint = load_tokenizer(tmp_path / "tokenizer").fingerprint
    tokens = []
    for precision in ("float32", "bfloat16_autocast"):
        out = UPath(tmp_path / precision)
        card = parent.card.deltas(
            store="webdataset", tokenizer=fingerprint, code_version="0", precision=precision
        )
        prepare_dataset(out, card, parent.black_patch_tokens)
        copy_plan(open_plan(UPath(features)), out)
        places = (UPath(features), parent.card), (out, card)
        with dataset_lock(out, "tokenize") as lock:
            black = parent.black_patch_tokens
            worker = feature_worker(*places, tmp_path / "tokenizer", black, lock.token, 1.0, "cpu")
            for task in shard_tasks(read_plan(out)):
                worker.run(Work(Kind.COMMIT, task), lambda _: iter(()), lambda _: None)
        finish_dataset(out)
        tokens.append(open_dataset(out, "deltas").read_all().astype(np.float32))
    assert 0 < np.abs(tokens[0] - tokens[1]).max() < 0.1

    settings = TokenizeSettings(features=str(features), tokenizer=tmp_path / "tokenizer")
    for place, same, other in (
        ("float32", "float32", "bfloat16"),
        ("bfloat16_autocast", "bfloat16", "float32"),
    ):
        before = {path: path.read_bytes() for path in (tmp_path / place / "shards").iterdir()}
        for precision in ("auto", same):
            again = settings.model_copy(update={"precision": precision})
            summary = tokenize_features(again, tmp_path / place, SilentReporter())
            assert (summary.new_clips, summary.clips) == (0, len(parent))
        with pytest.raises(
            MismatchError, match=rf"made in {place}, and --precision {other} .*Leave --precision"
        ):
            tokenize_features(
                settings.model_copy(update={"precision": other}), tmp_path / place, SilentReporter()
            )
        assert {path: path.read_bytes() for path in (tmp_path / place / "shards").iterdir()} == before
