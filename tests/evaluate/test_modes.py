"""Which futures the samples reach, and how futures files are matched with sequences."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltacache.evaluate.clips.scenes import (
    balance,
    coverage,
    find_scenes,
    futures_differ,
    odds_error,
    reached_futures,
    read_futures,
)
from deltacache.schemas.errors import DatasetError, DeltacacheError

HEADER = "video_uri,scene,outcome\n"
ODDS = "video_uri,scene,outcome,probability\n"


def test_reaching_needs_the_nearest_future_and_less_than_half_the_distance() -> None:
    between = np.array([[0.0, 10.0], [10.0, 0.0]])
    distances = np.array([[1.0, 9.5], [5.0, 5.1], [4.99, 6.0], [20.0, 12.0], [9.0, 2.0]])
    assert reached_futures(distances, between).tolist() == [0, -1, 0, -1, 1]


def test_three_futures_on_a_line_have_their_own_separations() -> None:
    places = np.array([0.0, 4.0, 20.0])
    between = np.abs(places[:, None] - places[None])
    samples = np.array([1.9, 2.1, 6.1, 13.0, 27.9])
    # around 20 the nearest future is 16 away, so 8 count; around 0 and 4 only 2
    assert reached_futures(np.abs(samples[:, None] - places[None]), between).tolist() == [0, 1, -1, 2, 2]


def test_coverage_needs_every_future() -> None:
    assert coverage(np.array([0, 1, -1, 0]), 2) == 1.0
    assert coverage(np.array([0, 0, -1]), 2) == 0.0
    assert coverage(np.array([-1, -1]), 2) == 0.0


@pytest.mark.parametrize(
    ("reached", "futures", "expected"),
    [
        ([0, 1, 1, 0], 2, 1.0),
        ([0, 1, 1, 1], 2, 0.5),
        ([0, 0, -1], 2, 0.0),
        ([-1, -1], 2, 0.0),
        ([0, 1, 2, 2, 2, -1], 3, 0.6),
    ],
)
def test_balance_is_the_normalised_minimum_count(reached: list[int], futures: int, expected: float) -> None:
    assert balance(np.array(reached), futures) == pytest.approx(expected)


def test_futures_that_differ_by_rounding_alone_do_not_differ() -> None:
    lengths = np.array([100.0, 100.0])
    assert futures_differ(np.array([[0.0, 1.0], [1.0, 0.0]]), lengths)
    assert not futures_differ(np.array([[0.0, 0.05], [0.05, 0.0]]), lengths)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_futures_are_read_as_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"futures{suffix}"
    columns = {"video_uri": ["a.mp4", "b.mp4"], "scene": ["007", "007"], "outcome": ["1", "2"]}
    if suffix == ".csv":
        path.write_text(HEADER + "a.mp4,007,1\nb.mp4,007,2\n")
    else:
        pq.write_table(pa.table(columns), path)
    assert read_futures(path) == pa.table(columns).to_pylist()


def test_odds_are_those_of_scenes_whose_outcomes_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "futures.csv"
    path.write_text(ODDS + "a,s,l,0.8\nb,s,r,0.2\nc,t,l,0.5\nd,t,r,0.3\ngone,t,x,0.2\nb,s,r,0.2\n")
    found = find_scenes(read_futures(path), {"a": 0, "b": 1, "c": 2, "d": 3}, path)
    assert [(scene.name, scene.odds) for scene in found.scenes] == [("s", (0.8, 0.2)), ("t", ())]
    assert "1 scenes lack an outcome that has a probability: not counted in the odds error" in found.notes
    assert any(note.startswith("1 scenes have futures of unequal probability") for note in found.notes)


def test_the_odds_error_is_how_far_shares_are_from_probabilities() -> None:
    nearest = np.array([0, 0, 0, 1, 2])
    distances = 1.0 - np.eye(3)[nearest]
    assert odds_error(distances, (0.6, 0.2, 0.2)) == pytest.approx(0)
    assert odds_error(distances, (0.0, 0.0, 1.0)) == pytest.approx(0.8)
    assert odds_error(distances[:3, :2], (0.75, 0.25)) == pytest.approx(0.25)  # of two, what either is off by


def test_scenes_need_two_outcomes_and_the_rest_is_counted() -> None:
    rows = [
        ("a", "s", "left"),
        ("b", "s", "right"),
        ("c", "s", "left"),
        ("d", "t", "left"),
        ("gone", "u", "x"),
    ]
    futures = [dict(zip(("video_uri", "scene", "outcome"), row, strict=True)) for row in rows]
    found = find_scenes(futures, {"a": 4, "b": 2, "c": 3, "d": 0}, Path("f.csv"))
    assert [(scene.name, scene.rows, scene.outcomes) for scene in found.scenes] == [
        ("s", (4, 2), ("left", "right"))
    ]
    assert [note.split()[0] for note in found.notes] == ["1", "1", "1"]


def test_futures_of_other_videos_are_refused() -> None:
    futures = [{"video_uri": "x", "scene": "s", "outcome": "left"}]
    with pytest.raises(DeltacacheError, match="names 1 video, of which 0 are in this dataset"):
        find_scenes(futures, {"a": 0}, Path("f.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video_uri,scene\na,b\n", "outcome is missing"),
        (HEADER + "a,s,\n", "empty cells"),
        ("", "not a readable CSV"),
        (HEADER + "a,s\n", "not a readable CSV"),
        (ODDS + "a,s,l,0.8\nb,s,r,\n", "empty cells.*and probability since there is one"),
        (
            ODDS + "a,s,l,0.8\nb,s,r,often\n",
            "probability 'often' of r in scene s is not a number from 0 to 1",
        ),
        (ODDS + "a,s,l,1.2\nb,s,r,-0.2\n", "probability '1.2' of l in scene s is not a number from 0 to 1"),
        (ODDS + "a,s,l,0.8\nb,s,r,0.1\n", "probabilities of scene s add up to 0.9, not to 1"),
    ],
)
def test_bad_futures_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "futures.csv"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_futures(path)


def test_missing_and_damaged_futures_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.csv does not exist"):
        read_futures(tmp_path / "gone.csv")
    (tmp_path / "futures.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetError, match="not a readable CSV or Parquet"):
        read_futures(tmp_path / "futures.parquet")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_column_of_futures(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "futures.csv"
    path.write_text(f"{HEADER}a.mp4,s,l\nb.mp4,s,r\n", encoding=encoding)
    assert [row["video_uri"] for row in read_futures(path)] == ["a.mp4", "b.mp4"]
