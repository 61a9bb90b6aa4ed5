"""Futures of a video generator through the commands: what goes out comes back as it went."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.generators import (
    ClipFormat,
    ContextEntry,
    Padding,
    export_contexts,
    padded,
    placement_of,
    read_frame_at,
    read_manifest,
    samples_in,
    unpadded,
    write_clip,
)
from deltacache.evaluate.output import read_metrics
from deltacache.evaluate.settings import benchmark_evaluation
from deltacache.pipeline.benchmarks.frames import read_frame
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.jobs import ContextExport
from deltacache.schemas.progress import SilentReporter
from golden_sizes import golden_sizes

Kind = str
"""What is put in place of a generator: ``real`` future frames, or the last context frame ``repeated``."""


def fill(root: Path, mini: Path, kinds: list[Kind], clip_format: ClipFormat = "frames") -> None:
    """Answer every context of an export with these samples."""
    frames = {
        (name, each.sequence_id): each.frames
        for name in BENCHMARKS
        for each in benchmark_sequences(name, mini / name, FrameCounts((5, 7))).sequences
    }
    for entry in read_manifest(root).contexts:
        paths = frames[entry.dataset, entry.sequence_id][-1 - entry.horizon :]
        shown = [padded(read_frame(entry.dataset, path), entry.place) for path in paths]
        for number, kind in enumerate(kinds):
            future = shown[1:] if kind == "real" else shown[:1] * entry.horizon
            write_clip(root / entry.folder / f"sample-{number:02d}", future, clip_format, 5.0)


@pytest.fixture(scope="module")
def flags(golden: Path, mini_benchmarks: Path) -> list[str]:
    data = [f"--data={name}={mini_benchmarks / name}" for name in BENCHMARKS]
    heads = [f"--head={name}={golden / 'eval' / f'head_{name}.safetensors'}" for name in BENCHMARKS]
    return [
        *data,
        *heads,
        f"--backbone={golden / 'tiny' / 'backbone'}",
        f"--image-size={golden_sizes(golden)[0]}",
        "--examples=0",
    ]


def export(deltacache, mini: Path, out: Path, *more: str) -> Path:
    data = [f"--data={name}={mini / name}" for name in BENCHMARKS]
    deltacache("export-contexts", out, *data, "--rate", "evaluation", *more).done()
    return out


def values(out: Path, method: str, aggregation: str) -> dict[tuple[str, str, int], float]:
    return {
        (row["dataset"], row["metric"], row["horizon"]): row["value"]
        for row in pq.read_table(out / "metrics.parquet").to_pylist()
        if (row["method"], row["aggregation"]) == (method, aggregation)
        and not row["metric"].startswith("rank/")
    }


def test_real_futures_are_present_and_repeated_frames_copy_last(
    deltacache, flags: list[str], mini_benchmarks: Path, tmp_path: Path
) -> None:
    real = export(deltacache, mini_benchmarks, tmp_path / "real")
    still = tmp_path / "still"
    shutil.copytree(real, still)
    fill(real, mini_benchmarks, ["real"])
    fill(still, mini_benchmarks, ["repeated"])
    out = tmp_path / "out"
    deltacache("evaluate", out, *flags, "--predictions", f"seer={real}", "--predictions", str(still)).done()
    for generator, bound in (("seer", "present"), ("external", "copy_last")):
        made, expected = values(out, generator, "single"), values(out, bound, "single")
        assert made.keys() == expected.keys()
        assert {horizon for _, _, horizon in made} == {1, 3}
        for key, value in expected.items():
            assert made[key] == pytest.approx(value, abs=1e-6), (generator, key)


def test_the_best_of_samples_is_found_and_workers_change_nothing(
    deltacache, deltacache_on_ray, flags: list[str], mini_benchmarks: Path, tmp_path: Path
) -> None:
    root = export(deltacache, mini_benchmarks, tmp_path / "contexts")
    fill(root, mini_benchmarks, ["repeated", "real", "repeated"])
    command = ("evaluate", *flags, "--predictions", f"seer={root}")
    deltacache(*command, tmp_path / "one").done()
    deltacache_on_ray(*command, tmp_path / "two", "--workers", 2).done()
    best, present = values(tmp_path / "one", "seer", "best"), values(tmp_path / "one", "present", "single")
    for key, value in present.items():
        assert best[key] == pytest.approx(value, abs=1e-6)
    mean = values(tmp_path / "one", "seer", "mean")
    assert (
        0
        < mean["vspw", "smooth_l1", 3]
        < values(tmp_path / "one", "copy_last", "single")["vspw", "smooth_l1", 3]
    )
    vote = values(tmp_path / "one", "seer", "single")
    assert 0 < vote["vspw", "vote_coverage", 3] <= 1
    one, two = (
        pq.read_table(tmp_path / name / "metrics.parquet").drop_columns(["created_at"]).to_pylist()
        for name in ("one", "two")
    )
    assert one == two


def test_the_generator_of_the_page_stands_still(
    deltacache, flags: list[str], mini_benchmarks: Path, tmp_path: Path
) -> None:
    """The example of docs/evaluation.md, run as it stands: both samples repeat the last frame."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "contexts.json" in code
    ]
    root = export(deltacache, mini_benchmarks, tmp_path / "contexts")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
    deltacache("evaluate", tmp_path / "out", *flags, "--predictions", root).done()
    expected = values(tmp_path / "out", "copy_last", "single")
    for aggregation in ("best", "mean"):
        made = values(tmp_path / "out", "external", aggregation)
        for key, value in expected.items():
            assert made[key] == pytest.approx(value, abs=1e-6), (aggregation, key)


@pytest.mark.parametrize(("padding", "clip_format", "most"), [("plain", "mp4", 0.2), ("cosmos", "mp4", 0.2)])
def test_compression_and_padding_move_the_present_row_a_little(
    deltacache,
    flags: list[str],
    mini_benchmarks: Path,
    tmp_path: Path,
    padding: str,
    clip_format: ClipFormat,
    most: float,
) -> None:
    root = export(
        deltacache, mini_benchmarks, tmp_path / "contexts", "--padding", padding, "--format", clip_format
    )
    fill(root, mini_benchmarks, ["real"], clip_format)
    deltacache("evaluate", tmp_path / "out", *flags, "--predictions", f"seer={root}").done()
    made, present = values(tmp_path / "out", "seer", "single"), values(tmp_path / "out", "present", "single")
    still = values(tmp_path / "out", "copy_last", "single")
    for name, metric, scale in (("vspw", "miou", 1.0), ("cityscapes", "miou", 1.0), ("kitti", "rmse", 10.0)):
        moved = abs(made[name, metric, 3] - present[name, metric, 3]) / scale
        print(padding, name, made[name, metric, 3], present[name, metric, 3], made[name, "smooth_l1", 3])
        assert made[name, "smooth_l1", 3] < 0.7 * still[name, "smooth_l1", 3]
        assert moved < most, (name, made[name, metric, 3], present[name, metric, 3])


@pytest.mark.parametrize(
    ("shape", "benchmark"),
    [((480, 854), "vspw"), ((960, 540), "vspw"), ((1024, 2048), "cityscapes"), ((352, 1216), "kitti")],
)
@pytest.mark.parametrize("padding", ["plain", "cosmos"])
def test_what_is_padded_comes_back_as_it_was_resized(
    shape: tuple[int, int], benchmark: BenchmarkName, padding: Padding
) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    place = placement_of(*shape, padding, benchmark)
    out = padded(frame, place)
    assert out.shape == (place.height, place.width, 3)
    if padding == "plain":
        assert np.array_equal(out, frame)
        return
    assert out.shape == (640, 1024, 3)
    width = 1024 if benchmark == "kitti" else min(1024, round(512 * shape[1] / shape[0]))
    assert np.array_equal(
        unpadded(out, place), cv2.resize(frame, (width, 512), interpolation=cv2.INTER_LINEAR)
    )


@pytest.fixture
def answered(mini_benchmarks: Path, tmp_path: Path) -> Path:
    """Contexts of VSPW at horizon 1 with one real sample each."""
    wanted = ContextExport(data={"vspw": mini_benchmarks / "vspw"}, horizons=(1,), rate="evaluation")
    export_contexts(wanted, tmp_path / "contexts", SilentReporter())
    fill(tmp_path / "contexts", mini_benchmarks, ["real"])
    return tmp_path / "contexts"


@pytest.mark.parametrize("damage", ["missing", "short", "size", "unequal", "damaged", "horizon"])
def test_what_does_not_fit_is_refused_by_name(
    deltacache, golden: Path, mini_benchmarks: Path, answered: Path, tmp_path: Path, damage: str
) -> None:
    entry: ContextEntry = read_manifest(answered).contexts[1]
    sample = answered / entry.folder / "sample-00"
    horizons, words = "1", [str(sample)]
    if damage == "missing":
        shutil.rmtree(sample)
        words = [str(answered / entry.folder), "holds 0 samples"]
    elif damage == "short":
        (sample / "00000.png").unlink()
        words.append("has no frame 0")
    elif damage == "size":
        (sample / "00000.png").write_bytes(cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes())
        words.append("20 x 30 pixels")
    elif damage == "unequal":
        shutil.copytree(sample, sample.with_name("sample-01"))
        words = [str(answered / entry.folder), "holds 2 samples"]
    elif damage == "damaged":
        (sample / "00000.png").write_bytes(b"no picture")
        words = [str(sample / "00000.png"), "damaged"]
    else:
        horizons, words = "1,2", [entry.sequence_id.split("_")[0], "at horizon 2"]
    deltacache(
        "evaluate", tmp_path / "out", f"--data=vspw={mini_benchmarks / 'vspw'}", "--horizons", horizons,
        f"--backbone={golden / 'tiny' / 'backbone'}", f"--image-size={golden_sizes(golden)[0]}",
        "--predictions", answered,
    ).refused(*words)  # fmt: skip


def test_exports_are_refused_in_words(mini_benchmarks: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError,
        match=r"has 1 recorded frame up to it, not 9 \(aachen_000000_000015_leftImg8bit.png is missing\): "
        r"give --rate evaluation --frames 4, ",
    ):
        export_contexts(
            ContextExport(data={"cityscapes": mini_benchmarks / "cityscapes"}),
            tmp_path / "a",
            SilentReporter(),
        )
    beginning = ContextExport(data={"vspw": mini_benchmarks / "vspw"}, frames=12, horizons=(3,))
    with pytest.raises(
        DatasetError, match=r"00000010\.jpg has 11 .*not 12 .*give --frames 11, or --rate eval"
    ):
        export_contexts(beginning, tmp_path / "a", SilentReporter())
    with pytest.raises(ValidationError, match="coco is not known: give vspw, cityscapes, kitti"):
        ContextExport(data={"coco": "x"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError, match="horizon 0 is not after the context"):
        ContextExport(data={"vspw": mini_benchmarks / "vspw"}, horizons=(0,))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(DatasetError, match="is not empty"):
        export_contexts(
            ContextExport(data={"vspw": mini_benchmarks / "vspw"}), tmp_path / "b", SilentReporter()
        )


def test_native_contexts_are_the_recorded_frames_before_the_last_one(
    mini_benchmarks: Path, tmp_path: Path
) -> None:
    wanted = ContextExport(data={"vspw": mini_benchmarks / "vspw"}, horizons=(3,))
    export_contexts(wanted, tmp_path / "out", SilentReporter())
    entry = next(
        each for each in read_manifest(tmp_path / "out").contexts if each.sequence_id.endswith("00000019")
    )
    assert (entry.context_frames, entry.target_frame, entry.frames_per_second) == (9, 8, 15.0)
    written = sorted((tmp_path / "out" / entry.folder / "context").iterdir())
    video = mini_benchmarks / "vspw" / "data" / entry.sequence_id.rsplit("_", 1)[0] / "origin"
    for path, number in zip(written, range(2, 11), strict=True):  # 19 - 3 * 3 = 10 is the last context frame
        assert np.array_equal(
            read_frame("vspw", str(path)), read_frame("vspw", str(video / f"{number:08d}.jpg"))
        )
    assert json.loads((tmp_path / "out" / "contexts.json").read_text())["padding"] == "plain"


def evaluated(golden: Path, mini: Path, out: Path, contexts: Path, **changes: Any) -> str:
    """``run_id`` of VSPW's bounds and the generator's frames at horizon 1."""
    fields = {
        "horizons": (1,),
        "image_size": golden_sizes(golden)[0],
        "examples": 0,
        "device": "cpu",
    } | changes
    settings = benchmark_evaluation(
        out=out,
        data={"vspw": mini / "vspw"},
        backbone=str(golden / "tiny" / "backbone"),
        **({"predictions": {"seer": contexts}} | fields),
    )
    evaluate_benchmarks(settings, SilentReporter())
    return read_metrics(out)["run_id"][0].as_py()


def picture(value: int) -> np.ndarray:
    return np.full((8, 12, 3), value, np.uint8)


def test_frames_and_samples_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        folder = tmp_path / f"sample-{number}"
        folder.mkdir()
        for frame in range(1, 11):
            cv2.imwrite(str(folder / f"frame_{frame}.png"), picture(10 * number + frame))
        (folder / ".hidden.png").write_bytes(b"of the file browser")
    samples = samples_in(tmp_path)
    assert [path.name for path in samples] == ["sample-1", "sample-2", "sample-10"]
    values = [[int(read_frame_at(sample, at)[0, 0, 0]) for at in (0, 1, 9)] for sample in samples]
    assert values == [[11, 12, 20], [21, 22, 30], [101, 102, 110]]


def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "sample-01", [picture(1)], "frames", 5.0)
    (tmp_path / "sample-01.mp4").write_bytes(b"a video")
    with pytest.raises(DatasetError, match=r"sample-01 and sample-01\.mp4 are the same sample"):
        samples_in(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_that_was_cut_off_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "sample-0" / f"0.{suffix}"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    content = cv2.imencode(f".{suffix}", noise)[1].tobytes()
    path.write_bytes(content)
    assert read_frame_at(path.parent, 0).shape == (64, 96, 3)
    path.write_bytes(content[: 2 * len(content) // 3])
    with pytest.raises(DatasetError, match=rf"0\.{suffix} is damaged"):
        read_frame_at(path.parent, 0)


def test_a_video_without_pictures_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sample-0.mp4"
    with av.open(str(path), "w") as container:
        container.add_stream("aac", rate=16000)
        container.start_encoding()
    with pytest.raises(DatasetError, match=r"sample-0\.mp4 is damaged or not a video"):
        read_frame_at(path, 0)


def test_contexts_that_nobody_asks_for_need_no_answer(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    """Exported for two horizons and two benchmarks, answered for one of each."""
    data: dict[BenchmarkName, Path] = {name: mini_benchmarks / name for name in ("vspw", "cityscapes")}
    wanted = ContextExport(data=data, horizons=(1, 3), rate="evaluation")
    export_contexts(wanted, tmp_path / "contexts", SilentReporter())
    fill(tmp_path / "contexts", mini_benchmarks, ["real"])
    shutil.rmtree(tmp_path / "contexts" / "cityscapes")
    shutil.rmtree(tmp_path / "contexts" / "vspw" / "h3")
    evaluated(golden, mini_benchmarks, tmp_path / "out", tmp_path / "contexts")
    made = values(tmp_path / "out", "seer", "single")
    assert {horizon for _, _, horizon in made} == {1}
    with pytest.raises(DatasetError, match=r"h3.*holds 0 samples"):
        evaluated(golden, mini_benchmarks, tmp_path / "more", tmp_path / "contexts", horizons=(1, 3))


def test_only_the_scored_frame_makes_another_evaluation(
    golden: Path, mini_benchmarks: Path, answered: Path, tmp_path: Path
) -> None:
    run_id = evaluated(golden, mini_benchmarks, tmp_path / "out", answered)
    entry: ContextEntry = read_manifest(answered).contexts[0]
    sample = answered / entry.folder / "sample-00"
    for each in answered.glob("vspw/h1/*/sample-00"):
        shutil.copy(each / "00000.png", each / "00001.png")  # behind the scored one
    moved = Path(shutil.copytree(answered, tmp_path / "elsewhere"))
    assert evaluated(golden, mini_benchmarks, tmp_path / "again", moved) == run_id
    frame = cv2.imread(str(sample / "00000.png"))
    assert frame is not None
    frame[:20] //= 2
    cv2.imwrite(str(sample / "00000.png"), frame)
    assert evaluated(golden, mini_benchmarks, tmp_path / "other", answered) != run_id


def test_with_a_cache_generated_features_are_rounded_like_the_true_ones(
    golden: Path, mini_benchmarks: Path, answered: Path, tmp_path: Path
) -> None:
    """Or real future frames would not be the ``present`` row any more."""
    evaluated(golden, mini_benchmarks, tmp_path / "out", answered, cache=tmp_path / "cache")
    made, present = (values(tmp_path / "out", name, "single") for name in ("seer", "present"))
    assert made["vspw", "mse", 1] == pytest.approx(present["vspw", "mse", 1], abs=1e-12)


@pytest.mark.parametrize("name", ["two words", "../up", ""])
def test_names_of_generators_are_plain(
    golden: Path, mini_benchmarks: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(DeltacacheError, match="a method's name is letters, digits"):
        evaluated(golden, mini_benchmarks, tmp_path, tmp_path, predictions={name: tmp_path})
