"""The published benchmarks through the command: the released code's numbers, killing it, its memory, refusals."""

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_runs import Command

from golden_sizes import golden_sizes
from warm_process import start_command

BENCHMARKS = ("vspw", "cityscapes", "kitti")


@pytest.fixture(scope="module")
def arguments(golden: Path, mini_benchmarks: Path) -> list[str]:
    """Flags of an evaluation of all three benchmarks with the golden models."""
    data = [f"--data={name}={mini_benchmarks / name}" for name in BENCHMARKS]
    heads = [f"--head={name}={golden / 'eval' / f'head_{name}.safetensors'}" for name in BENCHMARKS]
    models = (
        f"--backbone={golden / 'tiny' / 'backbone'}",
        f"--tokenizer={golden / 'tiny' / 'deltatok_released.safetensors'}",
    )
    size = f"--image-size={golden_sizes(golden)[0]}"
    return [*data, *heads, *models, size, "--context=4", "--horizons=1,3", "--examples=1"]


def rows_of(out: Path, name: str = "metrics") -> list[dict[str, object]]:
    """A table without its times of writing."""
    rows = pq.read_table(out / f"{name}.parquet").to_pylist()
    return [{column: value for column, value in row.items() if column != "created_at"} for row in rows]


@pytest.fixture(scope="module")
def finished(deltacache, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("benchmarks") / "out"
    return out, deltacache("evaluate", out, *arguments).done().stdout


def test_all_numbers_of_the_released_code(finished: tuple[Path, str], golden: Path) -> None:
    rows = rows_of(finished[0])
    expected = json.loads((golden / "eval" / "expected_metrics.json").read_text())
    for each in expected:
        of_method = {
            row["metric"]: row
            for row in rows
            if (row["dataset"], row["method"], row["horizon"])
            == (each["dataset"], each["method"], each["horizon"])
        }
        assert of_method[each["metric"]]["value"] == pytest.approx(each["value"], abs=1e-4), each
        loss = of_method["smooth_l1"]
        assert loss["value"] == pytest.approx(each["feature_loss_smooth_l1"], abs=1e-4), each
        assert loss["n_sequences"] == of_method[each["metric"]]["n_sequences"] == each["samples"]
    assert len(expected) == 18


def test_what_was_dropped_and_how_fast_it_was_is_printed(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "kitti: 1 dropped: no ground truth" in printed
    assert "9 sequences" in printed
    assert "sequences/s" in printed
    assert "waiting for frames" in printed
    assert "kitti: Depth RMSE (m), lower is better" in printed
    assert "kitti: 1 dropped: no ground truth" in json.loads((out / "notes.json").read_text())
    timing = json.loads((out / "timing.json").read_text())
    assert timing["sequences"] == 9
    parts = "waiting backbone encoder predictor decoder heads features samples pictures"
    assert set(timing["parts"]) == set(parts.split())
    assert timing["parts"]["pictures"] > 0
    assert 0 < sum(timing["parts"].values()) <= timing["total_s"]


def test_a_second_time_does_nothing(deltacache, finished: tuple[Path, str], arguments: list[str]) -> None:
    out, _ = finished
    before = (out / "metrics.parquet").read_bytes()
    assert "holds this evaluation already" in deltacache("evaluate", out, *arguments).done().stdout
    assert (out / "metrics.parquet").read_bytes() == before


def test_killed_and_started_again(
    deltacache, finished: tuple[Path, str], arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start_command("evaluate", out, *arguments) as running:
        until = time.monotonic() + 120
        while not list(out.glob("parts/*/vspw-00000")):
            assert time.monotonic() < until
            assert running.poll() is None
            time.sleep(0.002)
        running.kill()
        running.wait()
    assert not (out / "metrics.parquet").exists()
    deltacache("evaluate", out, *arguments).done()
    for name in ("metrics", "sequences", "statistics", "samples"):
        assert rows_of(out, name) == rows_of(finished[0], name), name
    assert json.loads((out / "timing.json").read_text())["sequences"] == 9
    assert not (out / "parts").exists()


def test_memory_does_not_grow_with_the_benchmark(
    deltacache_process: Command, golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    """Crops of a sequence are 2.8 MB at 256 px: seven times as many sequences, were they kept, would be 260 MB."""
    peaks = []
    for videos in (8, 56):
        root = tmp_path / f"vspw{videos}"
        (root / "data").mkdir(parents=True)
        for number in range(videos):
            (root / "data" / f"copy{number}").symlink_to(mini_benchmarks / "vspw" / "data" / "100_clip0")
        (root / "val.txt").write_text("\n".join(f"copy{number}" for number in range(videos)))
        out = tmp_path / f"out{videos}"
        deltacache_process(
            "evaluate", out, f"--data=vspw={root}", f"--head=vspw={golden / 'eval' / 'head_vspw.safetensors'}",
            f"--backbone={golden / 'tiny' / 'backbone'}", "--image-size=256", "--examples=0",
        ).done()  # fmt: skip
        timing = json.loads((out / "timing.json").read_text())
        assert timing["sequences"] == 2 * videos
        peaks.append(timing["peak_bytes"])
    assert peaks[1] - peaks[0] < 80e6


def test_refusals(deltacache, arguments: list[str], mini_benchmarks: Path, tmp_path: Path) -> None:
    vspw, out = f"vspw={mini_benchmarks / 'vspw'}", tmp_path / "out"
    deltacache("evaluate", out, f"--data={vspw}", f"--data={vspw}").refused("vspw was already given")
    flags = [flag for flag in arguments if not flag.startswith("--image-size")]
    deltacache("evaluate", out, *flags, "--image-size=65").refused("not a multiple of the patch size 16")
    assert not out.exists()
