"""Sixteen steps and more: on a drawn benchmark whose videos are long, and on long clips of features."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from benchmark_runs import mini_settings, same_tables, table
from drawn_features import DrawnClip, drawn_card, save_tokenizer, save_world, write_features
from torch.nn.functional import smooth_l1_loss

from deltacache.evaluate.benchmarks import run as blocks
from deltacache.evaluate.benchmarks import sampling
from deltacache.evaluate.benchmarks.benchmark_inputs import load_inputs
from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.benchmarks.loading import load_sequence
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.report.charts import drift_of
from deltacache.evaluate.report.page import write_report
from deltacache.evaluate.report.panels import panels
from deltacache.evaluate.report.runs import open_runs
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.progress import SilentReporter

HORIZONS = (1, 2, 4, 8, 16)
VIDEOS = {"long": 64, "longer": 84, "short": 24}
"""Frames by video: targets 59 of ``long``, 59 and 79 of ``longer`` have 16 steps and a context before them."""
SIZE = (48, 80)
CLIP_FRAMES, CLIP_HORIZONS = 24, (1, 5, 10, 16, 20)


def draw_vspw(root: Path) -> Path:
    """VSPW's layout: a bright square walks over a pattern that is each video's own."""
    rng = np.random.default_rng(0)
    for name, frames in VIDEOS.items():
        pattern = cv2.resize(rng.integers(0, 120, (6, 10, 3), dtype=np.uint8), SIZE[::-1])
        for folder in ("origin", "mask"):
            (root / "data" / name / folder).mkdir(parents=True)
        for number in range(frames):
            picture, mask = pattern.copy(), np.full(SIZE, 5, np.uint8)
            left = number % (SIZE[1] - 12)
            picture[12:30, left : left + 12] = 250
            mask[12:30, left : left + 12] = 9
            cv2.imwrite(str(root / "data" / name / "origin" / f"{number:08d}.jpg"), picture)
            cv2.imwrite(str(root / "data" / name / "mask" / f"{number:08d}.png"), mask)
    (root / "val.txt").write_text("\n".join(VIDEOS) + "\n")
    return root


@pytest.fixture(scope="module")
def settings(
    golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory
) -> BenchmarkEvaluation:
    root = tmp_path_factory.mktemp("long")
    data = {"vspw": draw_vspw(root / "vspw")}
    heads = {"vspw": golden / "eval" / "head_vspw.safetensors"}
    return mini_settings(
        golden, mini_benchmarks, root / "out", data=data, heads=heads, horizons=HORIZONS, samples=2
    )


@pytest.fixture(scope="module")
def evaluated_long(settings: BenchmarkEvaluation) -> Path:
    evaluate_benchmarks(settings, SilentReporter())
    return settings.out


def rows_of(out: Path, name: str, **wanted: object) -> list[dict[str, Any]]:
    return [
        row
        for row in table(out, name).to_pylist()
        if all(row[column] == value for column, value in wanted.items())
    ]


def test_every_method_has_rows_up_to_the_last_horizon(evaluated_long: Path) -> None:
    rows = rows_of(evaluated_long, "metrics", metric="smooth_l1")
    counts = {(row["horizon"], row["n_sequences"]) for row in rows}
    assert counts == {(1, 8), (2, 8), (4, 5), (8, 5), (16, 3)}
    for method in ("copy_last", "present", "deltatok", "deltatok_parallel", "deltaworld"):
        own = [row for row in rows if row["method"] == method and row["aggregation"] != "mean"]
        assert [row["horizon"] for row in own] == list(HORIZONS), method
        assert [row["horizon_s"] for row in own] == pytest.approx([0.2 * each for each in HORIZONS])
        assert all(np.isfinite(row["value"]) for row in own)
        assert all(row["value"] > 0 for row in own) or method == "present"


@torch.inference_mode()
def test_copies_are_those_of_a_slow_loop(settings: BenchmarkEvaluation, evaluated_long: Path) -> None:
    """The last seen frame is 3 * horizon recorded frames before the target."""
    inputs, root, side = load_inputs(settings), settings.data["vspw"], settings.image_size
    scores = {
        (row["sequence_id"], row["horizon"]): row["value"]
        for row in rows_of(evaluated_long, "sequences", metric="smooth_l1", method="copy_last")
    }
    for name, target in (("long", 59), ("longer", 79)):
        for horizon in HORIZONS:
            tokens = []
            for number in (target - 3 * horizon, target):
                picture = cv2.imread(str(root / "data" / name / "origin" / f"{number:08d}.jpg"))[..., ::-1]
                width = round(side * picture.shape[1] / picture.shape[0])
                wide = cv2.resize(picture, (width, side), interpolation=cv2.INTER_LINEAR)
                crops = np.stack([wide[:, :side], wide[:, -side:]])
                tokens.append(inputs.backbone.patch_tokens(torch.from_numpy(crops).permute(0, 3, 1, 2)))
            slow = smooth_l1_loss(*tokens, beta=0.1).item()
            assert scores[f"{name}_{target:08d}", horizon] == pytest.approx(slow, rel=1e-4), (name, horizon)


@pytest.mark.slow
@torch.inference_mode()
def test_true_deltas_in_chunks_are_those_of_single_pairs(
    settings: BenchmarkEvaluation, evaluated_long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, most = DeltaTok.encode, [0]

    def counting(self: DeltaTok, before: torch.Tensor, *rest: Any) -> torch.Tensor:
        most[0] = max(most[0], len(before))
        return encode(self, before, *rest)

    monkeypatch.setattr(DeltaTok, "encode", counting)
    monkeypatch.setattr(sampling, "_CHUNK_NUMBERS", 1)
    evaluate_benchmarks(settings.model_copy(update={"out": tmp_path}), SilentReporter())
    assert most == [2]  # both crops of one frame
    one, many = ([row["value"] for row in rows_of(out, "sequences")] for out in (tmp_path, evaluated_long))
    assert one == pytest.approx(many, abs=1e-5)


@pytest.mark.slow
def test_long_sequences_split_over_blocks_change_nothing(
    settings: BenchmarkEvaluation, evaluated_long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SEQUENCES", 2)
    evaluate_benchmarks(settings.model_copy(update={"out": tmp_path}), SilentReporter())
    assert same_tables(tmp_path, evaluated_long)


@pytest.mark.slow
def test_drift_is_over_the_sequences_that_go_furthest(evaluated_long: Path) -> None:
    (run,) = open_runs([evaluated_long])
    panel = next(each for each in panels({"": run.metrics}) if each.metric == "smooth_l1")
    drift = drift_of(panel, run)
    assert drift is not None
    assert drift.over == "over the 3 of 8 sequences that reach 16 steps"
    rows = rows_of(evaluated_long, "sequences", metric="smooth_l1")
    furthest = {row["sequence_id"] for row in rows if row["horizon"] == 16}
    assert furthest == {"long_00000059", "longer_00000059", "longer_00000079"}
    label = next(line.label for line in panel.own if line.method == "deltatok")
    for horizon in HORIZONS:
        sums = {
            method: sum(
                row["value"]
                for row in rows
                if (row["method"], row["horizon"]) == (method, horizon) and row["sequence_id"] in furthest
            )
            for method in ("deltatok", "copy_last")
        }
        found = next(value for at, value in drift.ratios[label].items() if at == pytest.approx(0.2 * horizon))
        assert found == pytest.approx(sums["deltatok"] / sums["copy_last"], rel=1e-5)
        everyone = next(line for line in panel.own if line.method == "deltatok").cells
        assert len(everyone) == len(HORIZONS)
    page = write_report(evaluated_long).read_text()
    assert "vspw, over the 3 of 8 sequences that reach 16 steps" in page
    assert "Sequences: 8 at 1, 2 steps; 5 at 4, 8 steps; 3 at 16 steps." in page


def test_frames_of_a_long_sequence_are_every_third(settings: BenchmarkEvaluation) -> None:
    found = benchmark_sequences("vspw", settings.data["vspw"], FrameCounts(settings.frame_counts)).sequences
    longest = next(each for each in found if each.sequence_id == "longer_00000079")
    numbers = [int(Path(path).stem) for path in longest.frames]
    assert len(numbers) == 20
    assert numbers[-1] == 79
    assert {later - earlier for earlier, later in pairwise(numbers)} == {3}
    assert load_sequence("vspw", longest, settings.image_size, labelled=True).crops is not None


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[DrawnClip], ClipEvaluation]:
    """Six clips of 24 frames that drift away from where they began."""
    root, rng = tmp_path_factory.mktemp("long-clips"), np.random.default_rng(3)
    clips = [
        DrawnClip(
            f"clip{number}-only", rng.normal(size=(6, 32)) + 0.2 * rng.normal(size=(24, 6, 32)).cumsum(0)
        )
        for number in range(6)
    ]
    tokenizer = save_tokenizer(root / "tokenizer")
    settings = ClipEvaluation(
        out=root / "out",
        features=str(write_features(root / "features", clips, drawn_card(CLIP_FRAMES))),
        tokenizer=tokenizer,
        worlds=(save_world(root / "world", tokenizer),),
        horizons=CLIP_HORIZONS,
        samples=3,
        device="cpu",
    )
    evaluate_clips(settings, SilentReporter())
    return clips, settings


def test_clips_of_24_frames(long_clips: tuple[list[DrawnClip], ClipEvaluation]) -> None:
    clips, settings = long_clips
    rows = rows_of(settings.out, "metrics", metric="smooth_l1")
    assert {(row["horizon"], row["n_sequences"]) for row in rows} == {(each, 6) for each in CLIP_HORIZONS}
    copies = [row["value"] for row in rows if row["method"] == "copy_last"]
    assert copies == sorted(copies)
    for horizon, value in zip(CLIP_HORIZONS, copies, strict=True):
        losses = []
        for clip in clips:
            stored = torch.from_numpy(clip.tokens.astype(np.float16).astype(np.float32))
            losses.append(smooth_l1_loss(stored[3], stored[3 + horizon], beta=0.1).item())
        assert value == pytest.approx(np.mean(losses), rel=1e-5), horizon
    (run,) = open_runs([settings.out])
    drift = drift_of(next(each for each in panels({"": run.metrics}) if each.metric == "smooth_l1"), run)
    assert drift is not None
    assert drift.over == "over all 6 sequences"
    assert all(len(values) == len(CLIP_HORIZONS) for values in drift.ratios.values())


@pytest.mark.slow
def test_deltas_of_a_context_do_not_depend_on_what_comes_after_it(
    long_clips: tuple[list[DrawnClip], ClipEvaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = long_clips
    encode, shapes = DeltaTok.encode_clip, set[tuple[int, ...]]()

    def counting(self: DeltaTok, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.add(tuple(tokens.shape[:2]))
        return encode(self, tokens, *rest)

    monkeypatch.setattr(DeltaTok, "encode_clip", counting)
    evaluate_clips(settings.model_copy(update={"out": tmp_path / "out"}), SilentReporter())
    assert shapes == {(1, settings.context)}
