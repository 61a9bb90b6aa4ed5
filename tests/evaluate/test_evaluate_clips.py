"""The tables of an evaluation against obvious loops, one clip and one sample at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from drawn_features import (
    CONTEXT,
    FRAMES,
    GRID,
    HIDDEN,
    OUTCOMES,
    SCENES,
    DrawnClip,
    DrawnWorld,
    black_tokens,
    draw_clips,
    timestamps,
    write_features,
)
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.clips.sequences import CachedSequences, _partners
from deltacache.evaluate.inputs import Tokenizer
from deltacache.evaluate.metrics import feature_metrics
from deltacache.evaluate.predictions import RolloutProtocol, reconstructions
from deltacache.models.blocks import smooth_l1
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.models.futures import sequence_generator
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA
from reporters import Lines

HORIZONS, SAMPLES, SEED = (1, 3), 6, 3
Row = dict[str, Any]


def stored_clips() -> dict[str, Tensor]:
    """Clip id -> (T, N, D), as float16 keeps them."""
    return {
        f"{clip.name}-v000": torch.from_numpy(clip.tokens.astype(np.float16)).float() for clip in draw_clips()
    }


def rows_of(table: Path, **columns: object) -> list[Row]:
    """Rows whose columns have these values."""
    return [
        row
        for row in pq.read_table(table).to_pylist()
        if all(row[name] == value for name, value in columns.items())
    ]


def values_of(world: DrawnWorld, **columns: object) -> dict[str, float]:
    """Sequence -> value."""
    rows = rows_of(world.root / "out" / "sequences.parquet", **columns)
    values = {row["sequence_id"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    return values


def loss(prediction: Tensor, target: Tensor) -> float:
    """Smooth-L1 as the trainers define it."""
    return smooth_l1(prediction, target, 0.1).mean().item()


def roll_out_one_by_one(world: DrawnWorld, clip_id: str) -> Iterator[list[Tensor]]:
    """Each sample's predicted frames, decoded on their own from the last seen frame."""
    tokenizer, predictor = load_tokenizer(world.tokenizer).model, load_world(world.noise).model
    clip = stored_clips()[clip_id]
    black = torch.from_numpy(black_tokens()).float()
    deltas = [
        tokenizer.encode(before[None], after[None], GRID)[0]
        for before, after in zip([black, *clip[: CONTEXT - 1]], clip[:CONTEXT], strict=True)
    ]
    seconds = torch.from_numpy(timestamps()).double()
    seconds = (seconds - seconds[0]).float()[None]
    noise = predictor.draw_noise((SAMPLES, 3, HIDDEN), sequence_generator(SEED, clip_id))
    for sample in range(SAMPLES):
        known = torch.stack(deltas)[None]
        frame, frames = clip[None, CONTEXT - 1], []
        for step in range(3):
            times = seconds[:, : CONTEXT + step + 1]
            token = predictor.rollout(known, times, noise[None, sample, None, step, None])[:, 0, 0]
            frame = tokenizer.decode(token, frame, GRID)
            frames.append(frame[0])
            known = torch.cat((known, token[:, None]), 1)
        yield frames


@pytest.mark.slow
@torch.no_grad()
def test_best_and_mean_equal_a_loop_over_samples(evaluated: DrawnWorld) -> None:
    clip_id = "scene2-right-v000"
    samples = list(roll_out_one_by_one(evaluated, clip_id))
    for horizon in HORIZONS:
        target = stored_clips()[clip_id][CONTEXT + horizon - 1]
        frames = [frames[horizon - 1] for frames in samples]
        losses = [loss(frame, target) for frame in frames]
        best = frames[int(np.argmin(losses))]
        expected = {
            ("best", "smooth_l1"): min(losses),
            ("best", "mse"): (best - target).square().mean().item(),
            ("best", "cosine"): torch.cosine_similarity(best, target, dim=-1).mean().item(),
            ("mean", "smooth_l1"): loss(torch.stack(frames).mean(0), target),
        }
        for (aggregation, metric), value in expected.items():
            columns = {
                "method": "deltaworld",
                "aggregation": aggregation,
                "metric": metric,
                "horizon": horizon,
            }
            assert values_of(evaluated, **columns)[clip_id] == pytest.approx(value, rel=1e-4)
        assert np.ptp(losses) > 0.001  # else best would say nothing


def test_the_learned_query_gives_one_future(evaluated: DrawnWorld) -> None:
    rows = rows_of(
        evaluated.root / "out" / "metrics.parquet", method="deltaworld_discriminative", task="features"
    )
    assert {(row["aggregation"], row["num_samples"]) for row in rows} == {("single", 1)}
    tokenizer, predictor = load_tokenizer(evaluated.tokenizer).model, load_world(evaluated.learned).model
    clip = stored_clips()["scene0-left-v000"]
    black, seconds = torch.from_numpy(black_tokens()).float(), torch.from_numpy(timestamps())
    deltas = tokenizer.encode_clip(clip[None, :CONTEXT], black, GRID)
    with torch.no_grad():
        token = predictor.rollout(deltas, (seconds - seconds[0])[None, : CONTEXT + 1])[:, 0, 0]
        frame = tokenizer.decode(token, clip[None, CONTEXT - 1], GRID)[0]
    values = values_of(evaluated, method="deltaworld_discriminative", metric="smooth_l1", horizon=1)
    assert values["scene0-left-v000"] == pytest.approx(loss(frame, clip[CONTEXT]), rel=1e-4)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_bounds_by_hand(evaluated: DrawnWorld, horizon: int) -> None:
    for metric, value in {"smooth_l1": 0.0, "mse": 0.0, "cosine": 1.0}.items():
        present = values_of(evaluated, method="present", metric=metric, horizon=horizon)
        np.testing.assert_allclose(list(present.values()), value, atol=1e-12)
    copy_last = values_of(evaluated, method="copy_last", metric="mse", horizon=horizon)
    for clip_id, clip in stored_clips().items():
        error = clip.numpy()[CONTEXT - 1] - clip.numpy()[CONTEXT + horizon - 1]
        assert copy_last[clip_id] == pytest.approx(np.mean(error**2), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("horizon", HORIZONS)
def test_reconstructions_equal_a_loop_over_frames(evaluated: DrawnWorld, horizon: int) -> None:
    tokenizer = load_tokenizer(evaluated.tokenizer).model
    clips = list(stored_clips().values())
    closed = values_of(evaluated, method="deltatok", metric="smooth_l1", horizon=horizon)
    parallel = values_of(evaluated, method="deltatok_parallel", metric="smooth_l1", horizon=horizon)
    one_step = values_of(evaluated, method="deltatok_one_step", metric="smooth_l1", horizon=horizon)
    swapped = values_of(evaluated, method="deltatok_swapped", metric="smooth_l1", horizon=horizon)
    at = CONTEXT + horizon - 1
    for position, (clip_id, clip) in enumerate(stored_clips().items()):
        other = clips[(position + 1) % len(clips)]
        frame = own = clip[None, CONTEXT - 1]
        for step in range(CONTEXT, at + 1):
            frame = tokenizer.decode(tokenizer.encode(frame, clip[None, step], GRID), frame, GRID)
            true_pair = tokenizer.encode(clip[None, step - 1], clip[None, step], GRID)
            own = tokenizer.decode(true_pair, own, GRID)
        assert closed[clip_id] == pytest.approx(loss(frame[0], clip[at]), rel=1e-4)
        assert parallel[clip_id] == pytest.approx(loss(own[0], clip[at]), rel=1e-4)
        before = clip[None, at - 1]
        alone = tokenizer.decode(tokenizer.encode(before, clip[None, at], GRID), before, GRID)
        assert one_step[clip_id] == pytest.approx(loss(alone[0], clip[at]), rel=1e-4)
        token = tokenizer.encode(other[None, at - 1], other[None, at], GRID)
        assert swapped[clip_id] == pytest.approx(
            loss(tokenizer.decode(token, before, GRID)[0], clip[at]), rel=1e-4
        )


@pytest.mark.slow
@torch.no_grad()
def test_modes_equal_a_loop_over_samples(drawn: DrawnWorld, tmp_path: Path) -> None:
    """Of scene 0 two samples are the true futures, of scene 1 one is, of the others none."""
    clips = draw_clips()
    for position, sample in {0: 0, 1: 1, 2: 4}.items():
        context_of = f"scene{position // 2}-left-v000"
        predicted = list(roll_out_one_by_one(drawn, context_of))[sample]
        clips[position].tokens[CONTEXT:] = torch.stack(predicted).numpy()
    header, *rows = drawn.futures.read_text().splitlines()
    chances = [f"{row},{0.8 if 'left' in row else 0.2}" for row in rows]
    with_odds = tmp_path / "futures.csv"
    with_odds.write_text("\n".join([f"{header},probability", *chances]) + "\n")
    features = write_features(tmp_path / "reached", clips)
    evaluate_clips(drawn.settings(features=features, futures=with_odds), SilentReporter())
    assert not values_of(drawn, metric="odds_error", method="deltaworld_discriminative")  # it has one future
    futures = {f"{clip.name}-v000": torch.from_numpy(clip.tokens).half().float() for clip in clips}
    for horizon in HORIZONS:
        columns = {"method": "deltaworld", "horizon": horizon}
        coverage = values_of(drawn, metric="mode_coverage", **columns)
        balance = values_of(drawn, metric="mode_balance", **columns)
        errors = values_of(drawn, metric="odds_error", **columns)
        assert [coverage[f"scene{scene}"] for scene in range(SCENES)] == [1.0, 0.0, 0.0, 0.0, 0.0]
        for scene in range(SCENES):
            left, right = (futures[f"scene{scene}-{name}-v000"][CONTEXT + horizon - 1] for name in OUTCOMES)
            counts, lefts = [0, 0], 0
            for frames in roll_out_one_by_one(drawn, f"scene{scene}-left-v000"):
                distances = [(frames[horizon - 1] - future).norm().item() for future in (left, right)]
                lefts += distances[0] < distances[1]
                if min(distances) < (left - right).norm().item() / 2:
                    counts[int(np.argmin(distances))] += 1
            assert balance[f"scene{scene}"] == pytest.approx(2 * min(counts) / max(sum(counts), 1))
            assert errors[f"scene{scene}"] == pytest.approx(abs(lefts / 6 - 0.8))
            assert scene > 0 or min(counts) >= 1
            assert scene != 1 or counts[0] >= 1


@pytest.mark.slow
def test_tables_have_the_agreed_columns_and_say_over_how_many(evaluated: DrawnWorld) -> None:
    out = evaluated.root / "out"
    metrics, sequences = pq.read_table(out / "metrics.parquet"), pq.read_table(out / "sequences.parquet")
    assert metrics.schema.equals(METRICS_SCHEMA)
    assert sequences.schema.equals(SEQUENCES_SCHEMA)
    counts = {(row["task"], row["n_sequences"], row["n_targets"]) for row in metrics.to_pylist()}
    assert counts == {
        *((task, 2 * SCENES, 2 * SCENES) for task in ("features", "samples")),
        ("modes", SCENES, 2 * SCENES),
    }
    # 3 feature metrics at 2 horizons: 6 methods alone, DeltaWorld twice, the learned query once
    # energy, spread and 7 ranks of the model that samples
    assert metrics.num_rows == 3 * 2 * 9 + 2 * 2 * 2 + 2 * (2 + 7)
    for row in metrics.to_pylist():
        columns = {name: row[name] for name in ("method", "metric", "aggregation", "horizon", "world")}
        values = [each["value"] for each in rows_of(out / "sequences.parquet", **columns)]
        assert len(values) == (0 if row["metric"].startswith("rank/") else row["n_sequences"])
        if row["task"] != "samples":  # that one pools, see test_sample_counts
            assert row["value"] == pytest.approx(np.mean(values))
        assert row["unit_kind"] == ("scene" if row["task"] == "modes" else "video")
        assert row["n_units"] == row["n_sequences"]  # every sequence of these is a video of its own
        if row["ci_low"] is None:  # all units agree: the truth itself, or no scene whose futures are reached
            assert np.ptp(values) < 1e-9 or row["metric"].startswith("rank/")
        else:
            assert row["ci_low"] < row["value"] < row["ci_high"]
    units = {row["sequence_id"]: row["unit"] for row in sequences.to_pylist() if row["task"] == "features"}
    assert len(set(units.values())) == 2 * SCENES
    assert units["scene0-left-v000"] == "scene0-left.mp4"


def test_horizons_are_also_told_in_seconds(evaluated: DrawnWorld) -> None:
    times = timestamps().astype(np.float64)
    for row in rows_of(evaluated.root / "out" / "metrics.parquet"):
        expected = times[CONTEXT + row["horizon"] - 1] - times[CONTEXT - 1]
        assert row["horizon_s"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_tables(evaluated: DrawnWorld) -> None:
    evaluate_clips(evaluated.settings("again"), SilentReporter())
    for name in ("metrics.parquet", "sequences.parquet"):
        first, second = (
            pq.read_table(evaluated.root / out / name).drop_columns(["created_at"])
            for out in ("out", "again")
        )
        assert first.equals(second)


@pytest.mark.slow
def test_another_seed_gives_other_futures_and_the_same_bounds(evaluated: DrawnWorld) -> None:
    evaluate_clips(evaluated.settings("other-seed", seed=4), SilentReporter())
    for method, changes in {
        "deltaworld": True,
        "deltatok": False,
        "deltaworld_discriminative": False,
    }.items():
        first, second = (
            [
                row["value"]
                for row in rows_of(evaluated.root / out / "sequences.parquet", method=method, task="features")
            ]
            for out in ("out", "other-seed")
        )
        assert (first != second) is changes


@pytest.mark.slow
def test_numbers_depend_neither_on_the_batch_nor_on_the_order(
    evaluated: DrawnWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltacache.evaluate.clips.sequences.BATCH_CLIPS", 3)
    monkeypatch.setattr(
        "deltacache.evaluate.clips.rollouts._CHUNK_NUMBERS", 2 * 3 * 6 * HIDDEN
    )  # two samples at a time
    features = write_features(tmp_path / "reversed", draw_clips()[::-1])
    evaluate_clips(evaluated.settings("batches", features=features), SilentReporter())
    for method in ("copy_last", "deltatok", "deltaworld", "deltaworld_discriminative"):
        columns = {"method": method, "task": "features"}
        first, second = (
            {
                (row["sequence_id"], row["metric"], row["aggregation"], row["horizon"]): row["value"]
                for row in rows_of(evaluated.root / out / "sequences.parquet", **columns)
            }
            for out in ("out", "batches")
        )
        assert first.keys() == second.keys()
        assert second == {key: pytest.approx(value, rel=1e-4) for key, value in first.items()}


def test_noise_depends_on_the_seed_and_the_clip() -> None:
    draws = {
        (seed, clip_id): torch.randn(4, generator=sequence_generator(seed, clip_id)).tolist()
        for seed in (0, 1)
        for clip_id in ("a-v000", "b-v000")
    }
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert torch.randn(4, generator=sequence_generator(1, "a-v000")).tolist() == draws[1, "a-v000"]


def test_more_samples_add_to_those_of_fewer(evaluated: DrawnWorld) -> None:
    evaluate_clips(evaluated.settings("more", samples=SAMPLES + 3), SilentReporter())
    columns = {"method": "deltaworld", "aggregation": "best", "metric": "smooth_l1"}
    few, many = (
        [row["value"] for row in rows_of(evaluated.root / out / "sequences.parquet", **columns)]
        for out in ("out", "more")
    )
    assert all(more <= fewer * (1 + 1e-5) for fewer, more in zip(few, many, strict=True))
    assert any(more < fewer * 0.999 for fewer, more in zip(few, many, strict=True))


def test_a_finished_evaluation_is_left_alone_and_another_is_refused(drawn: DrawnWorld) -> None:
    settings = drawn.settings(worlds=(), futures=None)
    metrics = evaluate_clips(settings, SilentReporter())
    before = metrics.stat().st_mtime_ns
    reporter = Lines()
    assert evaluate_clips(settings, reporter) == metrics
    assert metrics.stat().st_mtime_ns == before
    assert "already" in reporter.said[0]
    with pytest.raises(DatasetError, match="holds another evaluation"):
        evaluate_clips(settings.model_copy(update={"horizons": (2,)}), SilentReporter())
    assert metrics.stat().st_mtime_ns == before


def test_without_models_there_are_bounds_alone(drawn: DrawnWorld) -> None:
    settings = drawn.settings(tokenizer=None, worlds=(), futures=None)
    rows = rows_of(evaluate_clips(settings, SilentReporter()))
    assert {row["method"] for row in rows} == {"copy_last", "present"}
    assert {(row["tokenizer"], row["world"]) for row in rows} == {(None, None)}


def test_views_of_one_video_do_not_swap_with_each_other(drawn: DrawnWorld, tmp_path: Path) -> None:
    tokens = [clip.tokens for clip in draw_clips()[:4]]
    clips = [DrawnClip(f"video{at // 2}", tokens[at], at % 2) for at in range(4)]
    features = write_features(tmp_path / "views", clips)
    settings = drawn.settings(features=features, worlds=(), futures=None)
    evaluate_clips(settings, SilentReporter())
    tokenizer = load_tokenizer(drawn.tokenizer).model
    stored = [torch.from_numpy(each.astype(np.float16)).float()[None] for each in tokens]
    partners = {"video0-v000": 2, "video0-v001": 2, "video1-v000": 0, "video1-v001": 0}
    swapped = values_of(drawn, method="deltatok_swapped", metric="smooth_l1", horizon=1)
    for clip, (clip_id, partner) in zip(stored, partners.items(), strict=True):
        with torch.no_grad():
            token = tokenizer.encode(stored[partner][:, CONTEXT - 1], stored[partner][:, CONTEXT], GRID)
            frame = tokenizer.decode(token, clip[:, CONTEXT - 1], GRID)
        assert swapped[clip_id] == pytest.approx(loss(frame, clip[:, CONTEXT]), rel=1e-4)


def test_futures_that_do_not_differ_yet_are_not_counted(drawn: DrawnWorld, tmp_path: Path) -> None:
    clips = draw_clips()
    clips[1].tokens[CONTEXT] = clips[0].tokens[CONTEXT]  # scene 0 parts one step later
    features = write_features(tmp_path / "late", clips)
    reporter = Lines()
    rows = rows_of(evaluate_clips(drawn.settings(features=features), reporter), metric="mode_coverage")
    assert {(row["horizon"], row["n_sequences"]) for row in rows} == {(1, SCENES - 1), (3, SCENES)}
    assert any("1 scenes have futures that do not differ yet at horizon 1" in line for line in reporter.said)


def test_the_last_line_says_how_fast_it_was(drawn: DrawnWorld) -> None:
    reporter = Lines()
    evaluate_clips(drawn.settings(worlds=(), futures=None), reporter)
    assert "sequences/s" in reporter.said[-1]
    assert "limit: " in reporter.said[-1]


@pytest.mark.slow
def test_frames_beyond_the_longest_horizon_change_nothing(drawn: DrawnWorld, tmp_path: Path) -> None:
    clips = draw_clips()
    for clip in clips:
        clip.tokens[FRAMES - 1] += 1.0
    settings = drawn.settings(horizons=(1, 2))
    evaluate_clips(settings, SilentReporter())
    other = settings.model_copy(
        update={"features": str(write_features(tmp_path / "longer", clips)), "out": tmp_path / "other"}
    )
    evaluate_clips(other, SilentReporter())
    first, second = (
        [row["value"] for row in rows_of(each.out / "sequences.parquet")] for each in (settings, other)
    )
    assert first == second


def test_parallel_is_what_the_released_readme_calls_so(golden: Path) -> None:
    """Tokens of true pairs, decoded from the decoder's own output; one step from the true frame is less wrong."""
    held = load_file(golden / "tiny" / "deltatok_released_io.safetensors")
    clips, frames = held["patch_tokens"].shape[:2]
    side = int(held["patch_tokens"].shape[2] ** 0.5)
    model = load_tokenizer(golden / "tiny" / "deltatok_released.safetensors").model
    tokenizer = Tokenizer(model, "golden")
    black = held["black_patch_tokens"][0]
    protocol = RolloutProtocol(frames - 3, (1, 3), 0, (side, side), black)
    names = tuple(f"clip{at}" for at in range(clips))
    batch = CachedSequences(tuple(range(clips)), names, names, held["patch_tokens"], None, held["timestamps"])
    deltas = model.encode_clip(held["patch_tokens"], black, protocol.grid)
    found = {method.name: values for method, values in reconstructions(tokenizer, batch, deltas, protocol)}
    truth = held["patch_tokens"][:, protocol.targets]
    loss = {name: feature_metrics(values, truth)[..., 0].mean(0).tolist() for name, values in found.items()}
    torch.testing.assert_close(found["deltatok"][:, -1], held["rollout_h3"][:, -1], atol=2e-5, rtol=1e-4)
    readme = model.reconstruct_parallel(held["patch_tokens"], black, protocol.grid, 3)
    torch.testing.assert_close(found["deltatok_parallel"][:, -1], readme[:, -1])
    assert loss["deltatok_parallel"][0] == pytest.approx(loss["deltatok_one_step"][0])
    if side == 4:  # the set that the released code was run on
        assert loss["deltatok_parallel"][1] == pytest.approx(1.16927, abs=1e-5)
        assert loss["deltatok_one_step"][1] == pytest.approx(1.06506, abs=1e-5)


def test_partners_are_of_the_next_video_and_found_in_one_pass() -> None:
    class Counted(list[str]):
        asked = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.asked += 1
            return super().__getitem__(at)

    rng = np.random.default_rng(0)
    for videos in (1, 2, 3):
        uris = [f"{video}.mp4" for video in rng.integers(0, videos, 12)]
        rows = [row for row in range(12) if row not in (3, 7)]
        for at, partner in enumerate(_partners(rows, uris)):
            following = [rows[(at + step) % 10] for step in range(1, 10)]
            others = [row for row in following if uris[row] != uris[rows[at]]]
            assert partner == (others or following)[0]
    _partners(range(2000), Counted(["a.mp4"] * 1000 + ["b.mp4"] * 1000))
    assert Counted.asked <= 10_000


def test_views_of_one_video_are_one_unit(drawn: DrawnWorld, tmp_path: Path) -> None:
    """Four videos with three views each, all but alike within a video."""
    rng = np.random.default_rng(8)
    clips = []
    for video in range(4):
        tokens = rng.normal(0, 0.1 * (1 + video), (FRAMES, GRID[0] * GRID[1], HIDDEN)).cumsum(0)
        clips += [
            DrawnClip(f"video{video}", tokens + rng.normal(0, 1e-3, tokens.shape), view=view)
            for view in range(3)
        ]
    settings = drawn.settings(features=write_features(tmp_path / "views", clips), futures=None)
    evaluate_clips(settings, SilentReporter())
    sequences = pq.read_table(settings.out / "sequences.parquet").to_pylist()
    assert {row["unit"] for row in sequences} == {f"video{video}.mp4" for video in range(4)}
    losses: dict[str, list[float]] = {}
    for row in sequences:
        if (row["method"], row["metric"], row["horizon"]) == ("copy_last", "smooth_l1", 1):
            losses.setdefault(row["unit"], []).append(row["value"])
    means = np.array([np.mean(each) for each in losses.values()])
    logs = np.log([np.delete(means, at).mean() for at in range(4)])
    half = stats.t.ppf(0.975, 3) * np.sqrt(3 / 4 * np.square(logs - logs.mean()).sum())
    (row,) = rows_of(settings.out / "metrics.parquet", method="copy_last", metric="smooth_l1", horizon=1)
    assert (row["n_sequences"], row["n_units"], row["unit_kind"]) == (12, 4, "video")
    assert np.log([row["ci_low"], row["ci_high"]]) == pytest.approx(
        np.log(means.mean()) + np.array([-half, half])
    )
    (pooled,) = rows_of(settings.out / "metrics.parquet", metric="spread_skill", horizon=1)
    assert pooled["n_units"] == 4
