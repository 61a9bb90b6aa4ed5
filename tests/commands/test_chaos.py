"""The short form of ``benchmarks/chaos.py``: a cluster of two nodes, a few kills of every kind."""

import random
from pathlib import Path

import pytest
from command_runs import Command

from chaos import KINDS, contents, nodes, run_through

FLAGS = ("--backbone", "tiny", "--image-size", "64", "--videos-per-shard", "1", "--views", "2")


@pytest.mark.timeout(600)
def test_kills_leave_a_dataset_that_is_byte_identical(
    deltacache: Command, real_videos: Path, tmp_path: Path
) -> None:
    whole, shaken = tmp_path / "whole", tmp_path / "shaken"
    deltacache("extract-features", real_videos / "fixture", whole, *FLAGS).done()
    command = ["extract-features", real_videos / "fixture", shaken, *FLAGS]
    with nodes(2) as cluster:
        report = run_through(
            command, shaken, cluster, KINDS, random.Random(0), most_kills=6, pause_s=(2.0, 5.0)
        )
    assert report.kills.total() >= 3, report
    assert report.redone == 0, report
    assert contents(shaken) == contents(whole)
    assert "no damage" in deltacache("verify", shaken).done().stdout
