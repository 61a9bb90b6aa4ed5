"""Which clips a training takes: splits and validation, mixtures and filters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from drawn import drawn_deltas, drawn_features, write_dataset

from deltacache import api
from deltacache.descriptions import describe_output
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.settings import clip_evaluation
from deltacache.pipeline.datasets.choice import is_held_out, rows_where
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.configs import DataChoice
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError, SettingsError
from deltacache.schemas.jobs import DataPart
from deltacache.schemas.progress import SilentReporter
from deltacache.train import validation
from deltacache.train.mixture import choose_clips
from deltacache.train.order import Mixture, batch_items
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.group import SingleProcess
from deltacache.train.workers.trainable import PREPARE
from reporters import Lines


def run(
    case: Case,
    out: Path,
    *,
    data: Any = None,
    validate: Path | None = None,
    choice: dict[str, Any] | None = None,
    resume: bool = False,
    reporter: Any = None,
    **training: Any,
) -> Path:
    """Train ``case`` with another choice of data."""
    config = case.config(data=choice, **training)
    root = case.root if data is None else data
    request = TrainingRequest(
        root, out, config, resume, "cpu", validation=None if validate is None else str(validate)
    )
    return PREPARE[case.kind](request, reporter or SilentReporter(), SingleProcess()).train()  # type: ignore[index]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def column(out: Path, name: str) -> list[Any]:
    return pq.read_table(out / "curves.parquet").column(name).to_pylist()


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other clips of both kinds, of videos with other names, that the trainers' own are not among."""
    root = tmp_path_factory.mktemp("more")
    return {
        "tokenizer": write_dataset(
            root / "features", "features", drawn_features(7, 6, seed=5), seed=5, first=100
        ),
        "world": write_dataset(root / "deltas", "deltas", drawn_deltas(7, 6, seed=5), seed=5, first=100),
    }


def test_a_split_follows_from_video_and_seed_alone() -> None:
    videos = [f"video{number:05d}" for number in range(20_000)]
    held = [is_held_out(video, 0.9) for video in videos]
    assert np.flatnonzero(held[:60]).tolist() == [3, 7, 23, 49, 50]  # in every process and version
    assert abs(np.mean(held) - 0.1) < 0.01
    assert [is_held_out(video, 0.9) for video in reversed(videos)] == held[::-1]
    assert [is_held_out(video, 0.9, seed=1) for video in videos] != held
    smaller = [is_held_out(video, 0.8) for video in videos]
    assert all(
        one <= other for one, other in zip(held, smaller, strict=True)
    )  # less training moves no video back


def test_a_split_divides_the_clips_by_video(features: Path) -> None:
    parts, choice = [DataPart(path=str(features))], DataChoice(split=0.6)
    train, held = (choose_clips(parts, "features", choice, held_out=side) for side in (False, True))
    assert {*train.clip_ids} | {*held.clip_ids} == {*open_dataset(features).clip_ids}
    assert not {*train.clip_ids} & {*held.clip_ids}
    assert held.clip_ids
    assert all(is_held_out(clip.rpartition("-v")[0], 0.6) for clip in held.clip_ids)
    whole = open_dataset(features)
    for clips in (train, held):
        places = [whole.clip_ids.index(clip) for clip in clips.clip_ids]
        assert np.array_equal(clips.read_all(), whole.read_all()[places])
        assert np.array_equal(clips.timestamps_s, whole.timestamps_s[places])


def test_validation_is_logged_and_the_best_checkpoint_is_kept(
    case: Case, more: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.35])
    monkeypatch.setattr(validation.Validator, "__call__", lambda self: next(losses))
    out, reporter = tmp_path / "out", Lines()
    last = run(case, out, validate=more[case.kind], choice={"validate_every": 2}, keep=1, reporter=reporter)
    assert [row for row in column(out, "validation_loss") if row is not None] == [0.5, 0.3, 0.4, 0.35]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000004", "step-00000008"}
    assert (out / "best").resolve() == out / "checkpoints/step-00000004"
    record = {"step": 8, "loss": 0.35, "best_step": 4, "best_loss": 0.3, "waited": 2}
    assert json.loads((last / "config.json").read_text())["validation"] == record
    assert any(
        "validation loss 0.35 after step 8, the lowest is 0.3 after step 4" in line for line in reporter.said
    )
    assert any("validated on 7 clips of" in line for line in reporter.said)
    assert case.load(out / "best").metadata["step"] == 4
    assert "loss 0.35 after step 8, the lowest is 0.3 after step 4" in describe_output(last)


def test_a_training_stops_early_and_stays_stopped(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.3, 0.4, 0.5])
    monkeypatch.setattr(validation.Validator, "__call__", lambda self: next(losses))
    out, reporter, choice = tmp_path / "out", Lines(), {"split": 0.6, "validate_every": 2, "patience": 2}
    last = run(case, out, choice=choice, steps=20, reporter=reporter)
    assert last.name == "step-00000006"
    assert any("stopped early after step 6" in line and "2 times in a row" in line for line in reporter.said)
    assert run(case, out, choice=choice, steps=20, resume=True, reporter=reporter) == last
    assert reporter.said[-1].endswith("nothing to do")
    monkeypatch.setattr(validation.Validator, "__call__", lambda self: 0.2)
    assert run(case, out, choice={**choice, "patience": 4}, steps=8, resume=True).name == "step-00000008"
    assert (out / "best").resolve().name == "step-00000008"


def test_resuming_with_a_split_is_bitwise(case: Case, tmp_path: Path) -> None:
    choice = {"split": 0.6, "validate_every": 2}
    unbroken = case.weights(run(case, tmp_path / "a", choice=choice))
    run(case, tmp_path / "b", choice=choice, steps=4)
    assert equal(unbroken, case.weights(run(case, tmp_path / "b", choice=choice, resume=True)))
    for name in ("loss", "validation_loss"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    with pytest.raises(MismatchError, match=r"data\.split was 0\.6, now 0\.7"):
        run(case, tmp_path / "b", choice={"split": 0.7}, resume=True, steps=10)
    assert not equal(unbroken, case.weights(case.run(tmp_path / "whole")))


def test_the_validation_loss_of_a_tokenizer_is_that_of_evaluate(
    features: Path, case: Case, tmp_path: Path
) -> None:
    if case.kind != "tokenizer":
        return
    out = tmp_path / "out"
    run(case, out, validate=features, choice={"validate_every": 4}, steps=4, save_every=4)
    settings = clip_evaluation(
        features=features,
        out=tmp_path / "scores",
        tokenizer=out,
        context=1,
        horizons=(1, 2, 3, 4, 5),
        device="cpu",
    )
    evaluate_clips(settings, SilentReporter())
    rows = pq.read_table(tmp_path / "scores/metrics.parquet").to_pylist()
    found = [
        row["value"] for row in rows if (row["method"], row["metric"]) == ("deltatok_one_step", "smooth_l1")
    ]
    assert len(found) == 5
    assert column(out, "validation_loss")[-1] == pytest.approx(np.mean(found), rel=1e-5)


def test_the_validation_loss_of_a_world_of_patches_is_that_of_evaluate(
    features: Path, tmp_path: Path
) -> None:
    settings = {
        "preset": "dino-world",
        "heads": 2,
        "steps": 2,
        "batch_size": 2,
        "candidates": 4,
        "query": "noise",
    }
    small = ["model.num_layers=1", "model.mlp_ratio=1.0"]
    long = write_dataset(tmp_path / "long", "features", drawn_features(8, 8, seed=3))
    out = tmp_path / "out"
    api.train_world(long, out, device="cpu", split=0.5, assignments=small, **settings)
    evaluated = api.evaluate(tmp_path / "scores", {"clips": long}, world=out, device="cpu", split=0.5)
    held = {clip for clip in open_dataset(long).clip_ids if is_held_out(clip.rpartition("-v")[0], 0.5)}
    assert set(evaluated.sequences["sequence_id"].to_pylist()) == held
    assert 0 < len(held) < 8
    found = [
        row["value"]
        for row in evaluated.metrics.to_pylist()
        if row["metric"] == "smooth_l1" and row["aggregation"] == "best" and row["num_samples"] == 20
    ]
    assert len(found) == 2
    assert column(out, "validation_loss")[-1] == pytest.approx(np.mean(found), rel=1e-5)


def test_a_mixture_has_its_shares_and_goes_through_each_part_in_epochs() -> None:
    mixture = Mixture((50, 7), (7, 3))
    items = np.concatenate([batch_items(1, step, 16, 57, mixture) for step in range(200)])
    parts = items >= 50
    for first in range(0, 3200, 10):
        assert parts[first : first + 10].sum() == 3
    assert mixture.drawn(3200).tolist() == [2240, 960]
    for own, count in ((items[~parts], 50), (items[parts] - 50, 7)):
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(count))
    for cut in (0, 1, 9, 10, 23, 777):
        assert mixture.drawn(cut).tolist() == [int((~parts[:cut]).sum()), int(parts[:cut].sum())]
    late = batch_items(1, 150, 16, 57, mixture)
    assert np.array_equal(late, items[2400:2416])  # whatever was asked before
    assert not np.array_equal(late, batch_items(2, 150, 16, 57, mixture))


def test_a_mixture_trains_resumes_and_logs_its_shares(
    case: Case, more: dict[str, Path], tmp_path: Path
) -> None:
    data = api.training_data([f"{case.root}:0.75", f"{more[case.kind]}:0.25"])
    reporter = Lines()
    whole = case.weights(run(case, tmp_path / "a", data=data, batch_size=8, reporter=reporter))
    run(case, tmp_path / "b", data=data, batch_size=8, steps=3)
    resumed = case.weights(run(case, tmp_path / "b", data=data, batch_size=8, resume=True))
    assert equal(whole, resumed)
    assert all(shares == [0.75, 0.25] for shares in column(tmp_path / "a", "shares"))
    assert any("the datasets had 0.7500 / 0.2500 of the samples" in line for line in reporter.said)
    assert any(f"{more[case.kind]}: 7 of 7 clips, share 0.25" in line for line in reporter.said)
    metadata = case.load(tmp_path / "a").metadata
    assert [(each["clips"], each["share"]) for each in metadata["datasets"]] == [(12, 0.75), (7, 0.25)]
    other = api.training_data([f"{case.root}:0.5", f"{more[case.kind]}:0.5"])
    with pytest.raises(MismatchError, match="datasets was"):
        run(case, tmp_path / "b", data=other, batch_size=8, steps=9, resume=True)


def test_datasets_are_given_as_texts_mappings_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "a:2"
    folder.mkdir()
    assert api.training_data(folder) == (DataPart(path=str(folder)),)
    assert api.training_data(["x/:0.7", "y/:0.3"]) == api.training_data({"x/": 0.7, "y/": 0.3})
    assert [part.weight for part in api.training_data(["x", "s3://bucket/y"])] == [None, None]
    file = tmp_path / "mixture.yaml"
    file.write_text("datasets:\n- {path: x/, weight: 0.7, where: view = 0}\n- {path: y/, weight: 0.3}\n")
    read = api.training_data(file)
    assert [(part.weight, part.where) for part in read] == [(0.7, "view = 0"), (0.3, None)]
    with pytest.raises(SettingsError, match="has no weight, but other datasets have one"):
        api.training_data(["x/:0.7", "y/"])


def test_datasets_that_do_not_belong_together_are_refused(case: Case, tmp_path: Path) -> None:
    kind = "features" if case.kind == "tokenizer" else "deltas"
    drawn: Callable[..., Any] = drawn_features if kind == "features" else drawn_deltas
    short = write_dataset(tmp_path / "short", kind, drawn(3, 4))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="cannot be read together, their shapes of a clip differ"):
        run(case, tmp_path / "out", data=api.training_data([str(case.root), str(short)]))
    with pytest.raises(MismatchError, match="cannot be read together"):
        run(case, tmp_path / "out", validate=short)
    with pytest.raises(SettingsError, match="--patience stops when"):
        run(case, tmp_path / "out", choice={"patience": 2})
    with pytest.raises(SettingsError, match="give one of both"):
        run(case, tmp_path / "out", choice={"split": 0.5}, validate=case.root)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("step-*"))


def test_where_filters_by_index_and_source_columns(features: Path, case: Case, tmp_path: Path) -> None:
    dataset = open_dataset(features)
    uris, ids = dataset.column("video_uri").to_pylist(), dataset.clip_ids
    sizes = dict(zip(ids, range(len(ids)), strict=True))
    assert rows_where(dataset, "video_uri glob 'video00[0-3]*'").tolist() == [0, 1, 2, 3]
    assert rows_where(dataset, "view = 0 and row in (0, 2)").tolist() == [0, 2, 5, 7, 10]
    assert rows_where(dataset, "video_id = 'video011' or clip_id = 'video000-v000'").tolist() == [0, 11]
    assert rows_where(dataset, "end_s - start_s > 0 and not flip").tolist() == list(sizes.values())
    assert rows_where(dataset, "shard = (SELECT min(shard) FROM clips)").tolist() == list(range(5))
    assert len(uris) == 12
    for wrong, what in {
        "view =": "syntax error",
        "vieww = 0": "no such column: vieww",
        "1 = 1": "names no column",
        "random() % 2 = view": "random",
        "view = 0; DROP TABLE clips": "syntax error",
        "view = 0) UNION SELECT writefile('x', 'y') WHERE (1": "no such function|not authorized",
    }.items():
        with pytest.raises(DatasetError, match=what):
            rows_where(dataset, wrong)
    with pytest.raises(DatasetError, match="no clip for which 'view = 7' holds, of 12"):
        rows_where(dataset, "view = 7")
    out = tmp_path / "out"
    run(case, out, choice={"where": "row < 2"}, steps=2)
    metadata = case.load(out).metadata
    assert metadata["clips"]["count"] == 6
    assert metadata["config"]["data"]["where"] == "row < 2"
    with pytest.raises(DeltacacheError, match=r"data\.where was row < 2, now row < 3"):
        run(case, out, choice={"where": "row < 3"}, steps=4, resume=True)
