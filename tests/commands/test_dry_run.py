"""``extract-features --dry-run``."""

from pathlib import Path

import pytest
from command_runs import Command


@pytest.mark.parametrize("fixture", ["deltacache", "deltacache_on_ray"])
def test_a_dry_run_estimates_and_writes_nothing(
    fixture: str, request: pytest.FixtureRequest, real_videos: Path, tmp_path: Path
) -> None:
    deltacache: Command = request.getfixturevalue(fixture)
    out = tmp_path / "features"
    (tmp_path / "out.txt").write_text("nobody\n")
    said = deltacache(
        "extract-features", real_videos / "odd", out, "--dry-run", "--backbone", "tiny", "--image-size", 64,
        "--views", 3, "--videos-per-shard", 4, "--dtype", "int8", "--exclude-list", tmp_path / "out.txt",
    ).done().stdout  # fmt: skip
    assert not out.exists()
    assert "leaves out 0 of 25 videos; 1 of its entries match no video: nobody" in said
    assert "25 videos" in said
    assert "75 clips of 8 x 16 x 64 int8 in at least 7 shards" in said
    assert "limit: decoding" in said
    assert " min in all" in said
    refused = int(said.rpartition("rejected ")[2].split("%")[0])
    assert 10 < refused < 60  # some of these files are broken
