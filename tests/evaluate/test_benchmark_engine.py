"""Splitting, resuming and caching change nothing; memory does not grow."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from benchmark_runs import mini_settings, same_tables, saved_decoder, table
from drawn_features import draw_clips, write_features

from deltacache.evaluate.benchmarks import run as blocks
from deltacache.evaluate.benchmarks import worker
from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.benchmarks.loading import Ahead
from deltacache.evaluate.benchmarks.sampling import SequenceBatch
from deltacache.evaluate.benchmarks.scoring import BatchScorer
from deltacache.evaluate.benchmarks.worker import BlockWorker
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.examples import load_examples, load_frames
from deltacache.evaluate.settings import clip_evaluation, evaluation
from deltacache.evaluate.statistics import Statistic
from deltacache.models.backbone import Backbone
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.progress import ProgressStage, SilentReporter
from golden_sizes import golden_sizes
from reporters import Lines


class Steps(SilentReporter):
    """Keeps how stages begin, and every step of them."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[int | None, int]] = {}
        self._steps: dict[str, list[int]] = {}

    def of(self, name: str) -> list[int]:
        return self._steps.get(name, [])

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        self.begun[name] = total, done
        yield _Counting(self._steps.setdefault(name, []))


class _Counting:
    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def advance(self, items: int = 1, **status: float | str) -> None:
        self._steps.append(items)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a benchmark, also on nine sequences."""
    monkeypatch.setattr(blocks, "BLOCK_SEQUENCES", 2)


@pytest.fixture(scope="module")
def plain(golden: Path, mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one process, in one go."""
    out = tmp_path_factory.mktemp("plain")
    evaluate_benchmarks(mini_settings(golden, mini_benchmarks, out, examples=1), SilentReporter())
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_a_killed_run_goes_on(
    plain: Path, golden: Path, mini_benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "out", examples=1)
    run, done = BlockWorker.run, []

    def dying(
        self: BlockWorker, item: blocks.Block, following: tuple[blocks.Block, ...] = ()
    ) -> blocks.BlockResult:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(item.name)
        return run(self, item, following)

    monkeypatch.setattr(BlockWorker, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmarks(settings, SilentReporter())
    assert not (tmp_path / "out" / "metrics.parquet").exists()
    other = settings.model_copy(update={"samples": 5})
    with pytest.raises(DatasetError, match="unfinished evaluation of other inputs"):
        evaluate_benchmarks(other, SilentReporter())
    again: list[str] = []
    monkeypatch.setattr(BlockWorker, "run", lambda *args: again.append(args[1].name) or run(*args))
    evaluate_benchmarks(settings, SilentReporter())
    assert done == ["vspw-00000", "vspw-00001", "vspw-00002"]
    assert again == ["cityscapes-00000", "kitti-00000"]
    assert same_tables(plain, tmp_path / "out")
    assert not (tmp_path / "out" / "parts").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cache", [False, True])
def test_progress_goes_sequence_by_sequence_and_counts_none_twice(
    golden: Path, mini_benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    """Killed within a block: what was not written is done, and counted, again."""
    blocks_done = 1
    settings = mini_settings(
        golden, mini_benchmarks, tmp_path / "out", cache=tmp_path / "cache" if cache else None
    )
    counted, score = Steps(), BatchScorer.score

    def dying(self: BatchScorer, batch: SequenceBatch) -> list[Statistic]:
        if sum(counted.of("evaluate")) == blocks.BLOCK_SEQUENCES * blocks_done + 1:
            raise KeyboardInterrupt
        return score(self, batch)

    monkeypatch.setattr(BatchScorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmarks(settings, counted)
    assert [each for each in counted.of("evaluate") if each] == [1, 1, 1]
    monkeypatch.setattr(BatchScorer, "score", score)
    again = Steps()
    evaluate_benchmarks(settings, again)
    assert again.begun["evaluate"] == (9, blocks.BLOCK_SEQUENCES * blocks_done)
    assert [each for each in again.of("evaluate") if each] == [1] * 7
    if cache:
        assert counted.of("cache vspw") == [1] * 5


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_workers_change_nothing(plain: Path, golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "out", examples=1, workers=2)
    evaluate_benchmarks(settings, SilentReporter())
    assert same_tables(plain, tmp_path / "out")
    names = [sorted(path.name for path in (out / "examples").iterdir()) for out in (plain, tmp_path / "out")]
    assert names[0] == names[1]


def test_a_finished_evaluation_is_left_alone_and_another_refused(
    plain: Path, golden: Path, mini_benchmarks: Path
) -> None:
    reporter = Lines()
    settings = mini_settings(golden, mini_benchmarks, plain, examples=1)
    before = (plain / "metrics.parquet").stat().st_mtime_ns
    evaluate_benchmarks(settings, reporter)
    assert "holds this evaluation already" in reporter.said[0]
    assert (plain / "metrics.parquet").stat().st_mtime_ns == before
    with pytest.raises(DatasetError, match="holds another evaluation"):
        evaluate_benchmarks(settings.model_copy(update={"seed": 7}), SilentReporter())


@pytest.mark.slow
def test_a_cache_is_a_feature_dataset_and_is_used(
    plain: Path, golden: Path, mini_benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "one", cache=cache)
    evaluate_benchmarks(settings, SilentReporter())
    folders = sorted(cache.iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["cityscapes-7", "kitti-7", "vspw-7"]
    for folder in folders:
        assert verify_dataset(folder) == []
    dataset = open_dataset(folders[2], "features")
    assert len(dataset) == 10
    assert dataset.card.patch_grid == (golden_sizes(golden)[1],) * 2
    encode = Backbone.patch_tokens

    def only_black(self: Backbone, frames: torch.Tensor) -> torch.Tensor:
        assert not frames.any(), "frames were encoded again"
        return encode(self, frames)

    monkeypatch.setattr(Backbone, "patch_tokens", only_black)
    evaluate_benchmarks(settings.model_copy(update={"out": tmp_path / "two"}), SilentReporter())
    assert same_tables(tmp_path / "one", tmp_path / "two")
    rounded, exact = (
        [row["value"] for row in table(out, "metrics").to_pylist() if row["metric"] == "smooth_l1"]
        for out in (tmp_path / "one", plain)
    )
    np.testing.assert_allclose(rounded, exact, atol=1e-4)
    assert rounded != exact
    with pytest.raises(DatasetError, match="holds another evaluation"):  # rounded numbers are other numbers
        evaluate_benchmarks(settings.model_copy(update={"out": plain, "examples": 1}), SilentReporter())


@pytest.mark.slow
def test_a_killed_cache_goes_on_with_workers(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "one", cache=cache)
    evaluate_benchmarks(settings, SilentReporter())
    (vspw,) = cache.glob("vspw-*")
    for path in (*(vspw / "receipts").iterdir(), vspw / "index.parquet", vspw / "tables.json"):
        path.unlink()
    evaluate_benchmarks(settings.model_copy(update={"out": tmp_path / "two", "workers": 2}), SilentReporter())
    assert same_tables(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_longer_horizons_where_there_are_frames(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    reporter = Lines()
    data = {"vspw": mini_benchmarks / "vspw"}
    heads = {"vspw": golden / "eval" / "head_vspw.safetensors"}
    horizons = (1, 3, 9)
    settings = mini_settings(
        golden, mini_benchmarks, tmp_path / "out", data=data, heads=heads, horizons=horizons
    )
    evaluate_benchmarks(settings, reporter)
    assert (
        "evaluate: vspw: 3 of 5 sequences have fewer than 13 frames: not scored at horizon 9" in reporter.said
    )
    rows = table(tmp_path / "out", "metrics").to_pylist()
    assert {(row["horizon"], row["n_sequences"]) for row in rows} == {(1, 5), (3, 5), (9, 2)}
    losses = [
        row["value"]
        for row in rows
        if (row["method"], row["metric"], row["aggregation"]) == ("deltaworld", "smooth_l1", "mean")
    ]
    assert losses == sorted(losses)


def test_without_a_head_features_alone_are_scored(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    reporter = Lines()
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "out", heads={}, worlds=(), tokenizer=None)
    evaluate_benchmarks(settings, reporter)
    assert "evaluate: vspw: no head, so features alone are scored" in reporter.said
    rows = table(tmp_path / "out", "metrics").to_pylist()
    assert {(row["task"], row["method"]) for row in rows} == {
        ("features", "copy_last"),
        ("features", "present"),
    }


def test_examples_hold_frames_and_maps(plain: Path, golden: Path) -> None:
    side = golden_sizes(golden)[0]
    examples = {each.title: each for each in load_examples(plain / "examples")}
    assert set(examples) == {"vspw 100_clip0_00000019", "cityscapes aachen_000000_000019",
                             "kitti 2011_09_26_drive_0002_sync_image_02_0000000021"}  # fmt: skip
    for example in examples.values():
        (maps,) = example.maps
        frames = load_frames(plain / "examples", example.clip_ids[0])
        assert frames is not None
        assert frames.shape == (7, side, side, 3)
        assert maps.truth.shape == (7, side, side)
        assert maps.reconstruction.shape == (3, side, side)
        (world,) = example.worlds
        assert maps.samples[world.fingerprint].shape == (4, 3, side, side)
        assert maps.kind == ("depth" if example.title.startswith("kitti") else "segmentation")
        assert maps.truth.dtype == (np.float16 if maps.kind == "depth" else np.uint8)
        assert maps.label is not None
    assert (examples["cityscapes aachen_000000_000019"].maps[0].truth < 19).all()


def test_a_head_of_other_classes_or_width_is_refused(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    heads = {"cityscapes": golden / "eval" / "head_vspw.safetensors"}
    data = {"cityscapes": mini_benchmarks / "cityscapes"}
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "out", heads=heads, data=data)
    with pytest.raises(MismatchError, match=r"head_vspw\.safetensors knows 124 classes, cityscapes has 19"):
        evaluate_benchmarks(settings, SilentReporter())
    assert not (tmp_path / "out").exists()


def test_a_label_of_another_size_is_refused_by_name(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(mini_benchmarks / "cityscapes", tmp_path / "cityscapes"))
    labels = sorted(root.glob("gtFine/val/*/*.png"))
    shutil.copy(mini_benchmarks / "vspw/data/100_clip0/mask/00000019.png", labels[1])
    data = {"cityscapes": root}
    heads = {"cityscapes": golden / "eval" / "head_cityscapes.safetensors"}
    settings = mini_settings(golden, mini_benchmarks, tmp_path / "out", heads=heads, data=data)
    with pytest.raises(DeltacacheError, match=rf"{labels[1].name} has 72 x 128 pixels, its frame 64 x 128"):
        evaluate_benchmarks(settings, SilentReporter())


@pytest.mark.usefixtures("small_blocks")
def test_no_more_sequences_are_held_than_threads_read_ahead(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    """Loaded sequences that were not taken yet, at any moment, on more sequences than that."""
    held, most = [0], [0]

    def load(item: int) -> int:
        held[0] += 1
        most[0] = max(most[0], held[0])
        return item

    ahead = Ahead(load, threads=2, size=lambda item: 1)
    taken = []
    for start in range(0, 60, 6):
        for item in ahead.loaded(range(start, start + 6), range(start + 6, start + 12)):
            held[0] -= 1
            taken.append(item)
    ahead.close()
    assert taken == list(range(60))
    assert most[0] <= 5


def test_frames_are_read_ahead_as_far_as_their_bytes_allow() -> None:
    """Sequences of long horizons are large: six of ten bytes each, with room for 25."""
    sizes, begun = {0: 10, 1: 10, 2: 10, 3: 60, 4: 10, 5: 10}, []

    def load(item: int) -> int:
        begun.append(item)
        return item

    ahead = Ahead(load, threads=4, size=sizes.__getitem__, most_bytes=25)
    seen = []
    for item in ahead.loaded(list(sizes)):
        while len(begun) < min(
            len(sizes), item + (2 if sizes.get(item + 1) == 10 and sizes[item] == 10 else 1)
        ):
            time.sleep(0.001)
        seen.append((item, sorted(begun)))
    ahead.close()
    assert [item for item, _ in seen] == list(sizes)
    assert [len(each) for _, each in seen] == [2, 3, 3, 4, 6, 6]


def test_tables_open_whatever_reads_parquet(plain: Path, mini_benchmarks: Path) -> None:
    metrics = pq.read_table(plain / "metrics.parquet")
    units: dict[str, set[str]] = {}
    for row in pq.read_table(plain / "sequences.parquet").to_pylist():
        units.setdefault(row["dataset"], set()).add(row["unit"])
    for name in ("vspw", "cityscapes", "kitti"):
        found = benchmark_sequences(name, mini_benchmarks / name, FrameCounts((5, 7))).sequences
        assert units[name] == {each.group for each in found}
    for row in metrics.to_pylist():  # the miniature trees have two or three videos, cities and drives
        assert row["unit_kind"] == {"vspw": "video", "cityscapes": "city", "kitti": "drive"}[row["dataset"]]
        assert row["ci_low"] is None or (
            row["n_units"] >= 3 and row["ci_low"] < row["value"] < row["ci_high"]
        )
    per_class = [row for row in metrics.to_pylist() if row["metric"].startswith("iou/")]
    assert {row["dataset"] for row in per_class} == {"vspw", "cityscapes"}


def test_a_feature_dataset_in_the_same_tables(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", draw_clips())
    clips = clip_evaluation(out=tmp_path / "alone", features=features, device="cpu")
    evaluate_clips(clips, SilentReporter())
    data = {"vspw": mini_benchmarks / "vspw"}
    settings = mini_settings(
        golden,
        mini_benchmarks,
        tmp_path / "both",
        data=data,
        heads={},
        tokenizer=None,
        worlds=(),
        clips=clips,
    )
    evaluate_benchmarks(settings, SilentReporter())
    both, alone = (table(tmp_path / name, "metrics").to_pylist() for name in ("both", "alone"))
    assert len({row["run_id"] for row in both}) == 1
    assert {row["dataset"] for row in both} == {"vspw", "clips"}
    kept = [{**row, "run_id": None} for row in both if row["dataset"] == "clips"]
    assert kept == [{**row, "run_id": None} for row in alone]
    assert table(tmp_path / "both", "sequences").num_rows > table(tmp_path / "alone", "sequences").num_rows


@pytest.mark.parametrize(
    ("data", "heads", "flags", "message"),
    [
        ({"vimeo": "x"}, {}, {}, "vimeo is not known: give vspw, cityscapes, kitti or clips"),
        ({"vspw": "x"}, {"kitti": "y"}, {}, "there is no data kitti=DIR"),
        ({"clips": "x"}, {}, {"workers": 2}, "workers is for benchmarks"),
        ({"clips": "x"}, {"clips": "y"}, {}, "head is for benchmarks"),
        ({"vspw": "x"}, {}, {"kitti_split": "y"}, "give kitti=DIR, or leave it out"),
        ({"vspw": "x"}, {}, {"futures": "y"}, "give --data clips=FEATURES too"),
        ({"vspw": "x"}, {}, {"horizons": (0,)}, "horizon 0 is not after the context"),
        ({}, {}, {}, "there is nothing to evaluate"),
    ],
)
def test_flags_that_do_not_go_together(
    data: dict[str, str], heads: dict[str, str], flags: dict[str, object], message: str, tmp_path: Path
) -> None:
    asked = {"tokenizer": None, "worlds": (), "kitti_split": None, "cache": None} | flags
    with pytest.raises(DeltacacheError, match=message):
        evaluation(data, heads, out=tmp_path, **asked)


def test_roots_and_horizons_without_sequences_are_refused(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    gone = mini_settings(
        golden, mini_benchmarks, tmp_path / "out", data={"vspw": tmp_path / "nowhere"}, heads={}
    )
    with pytest.raises(DatasetError, match="nowhere is missing"):
        evaluate_benchmarks(gone, SilentReporter())
    far = mini_settings(golden, mini_benchmarks, tmp_path / "out", horizons=(30,))
    with pytest.raises(DatasetError, match=r"no sequence of vspw.*need 34 frames"):
        evaluate_benchmarks(far, SilentReporter())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def mixed_vspw(mini_benchmarks: Path, tmp_path: Path) -> Path:
    """Landscape, portrait and square videos; the last one in one crop."""
    root = tmp_path / "vspw"
    names = ["100_clip0", "square", "101_clip1"]
    for name in names[::2]:
        (root / "data").mkdir(parents=True, exist_ok=True)
        (root / "data" / name).symlink_to(mini_benchmarks / "vspw" / "data" / name)
    for folder, suffix in (("origin", "jpg"), ("mask", "png")):
        (root / "data" / "square" / folder).mkdir(parents=True)
        for path in sorted((mini_benchmarks / "vspw" / "data" / "100_clip0" / folder).iterdir()):
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert picture is not None
            side = min(picture.shape[:2])
            cv2.imwrite(
                str(root / "data" / "square" / folder / f"{path.stem}.{suffix}"), picture[:side, :side]
            )
    (root / "val.txt").write_text("\n".join(names))
    return root


@pytest.mark.slow
def test_batches_of_any_crops_and_lengths(
    mixed_vspw: Path, golden: Path, mini_benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several sequences at once, as on a GPU, with a cache and without, against one at a time."""
    heads = {"vspw": golden / "eval" / "head_vspw.safetensors"}
    settings = mini_settings(
        golden, mini_benchmarks, tmp_path / "one", data={"vspw": mixed_vspw}, heads=heads, horizons=(1, 9)
    )
    evaluate_benchmarks(settings, SilentReporter())
    monkeypatch.setattr(worker, "batch_sequences", lambda device: 3)
    evaluate_benchmarks(settings.model_copy(update={"out": tmp_path / "three"}), SilentReporter())
    cached = {"out": tmp_path / "cached", "cache": tmp_path / "cache"}
    evaluate_benchmarks(settings.model_copy(update=cached), SilentReporter())
    rows = {name: table(tmp_path / name, "sequences").to_pylist() for name in ("one", "three", "cached")}
    by_key = {
        name: {
            (row["sequence_id"], row["method"], row["aggregation"], row["metric"], row["horizon"]): row[
                "value"
            ]
            for row in each
        }
        for name, each in rows.items()
    }
    assert by_key["three"] == pytest.approx(by_key["one"], abs=1e-4)
    assert by_key["cached"] == pytest.approx(by_key["one"], abs=2e-2)
    crops = {
        row["sequence_id"]: row["totals"][0]
        for row in table(tmp_path / "three", "statistics").to_pylist()
        if row["task"] == "features"
    }
    assert {name.split("_000")[0]: count for name, count in crops.items()} == {
        "100_clip0": 2, "square": 1, "101_clip1": 2
    }  # fmt: skip
    for folder in (tmp_path / "cache").iterdir():
        assert verify_dataset(folder) == []


@pytest.mark.slow
def test_pictures_of_features_beside_the_maps(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    settings = mini_settings(
        golden,
        mini_benchmarks,
        tmp_path / "out",
        data={"vspw": mini_benchmarks / "vspw"},
        heads={"vspw": golden / "eval" / "head_vspw.safetensors"},
        rgb_decoder=saved_decoder(golden, tmp_path / "decoder"),
        examples=1,
    )
    evaluate_benchmarks(settings, SilentReporter())
    (example,) = load_examples(tmp_path / "out" / "examples")
    segmentation, pictures = example.maps
    assert (segmentation.kind, pictures.kind) == ("segmentation", "rgb")
    side = golden_sizes(golden)[0]
    assert pictures.truth.shape == (7, side, side, 3)
    assert pictures.truth.dtype == np.uint8
    assert pictures.reconstruction.shape == (3, side, side, 3)
    assert pictures.samples[example.worlds[0].fingerprint].shape == (4, 3, side, side, 3)
    assert pictures.truth.std() > 0
