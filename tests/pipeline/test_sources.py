"""Finding videos: folders, globs, lists, folders of frames, and what is refused."""

import os
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltacache.pipeline.inputs.fetching import content_sha256
from deltacache.pipeline.inputs.locations import are_numbers_alone, frames_among, spooled_frame_name
from deltacache.pipeline.inputs.sources import find_videos, video_id_of
from deltacache.schemas.clips import check_id
from deltacache.schemas.errors import DeltacacheError, VideoRefusedError


def make(root: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"v" * (place + 1))
    return root


def uris(source: Path | str, exclude: Path | None = None) -> list[str]:
    return [video.video_uri for video in find_videos(str(source), exclude)]


def test_folder_is_searched_recursively_and_sorted(tmp_path: Path) -> None:
    make(
        tmp_path,
        "z.MP4",
        "a/deep/er/b.mkv",
        "a/c.gif",
        "notes.txt",
        ".hidden.mp4",
        "a/._c.mp4",
        ".cache/d.mp4",
    )
    videos = find_videos(str(tmp_path), None)
    assert [video.video_uri for video in videos] == ["a/c.gif", "a/deep/er/b.mkv", "z.MP4"]
    assert [video.size_bytes for video in videos] == [3, 2, 1]
    assert [Path(video.path) for video in videos] == [tmp_path / video.video_uri for video in videos]


def test_video_ids_are_readable_safe_unique_and_from_the_uri_alone() -> None:
    ids = [
        video_id_of(uri)
        for uri in ("a/été d'or.mp4", "b/été d'or.mp4", "a/" + "x" * 300 + ".mp4", "a/$$$.mp4")
    ]
    assert len(set(ids)) == 4
    assert ids[0] == "t-d-or-" + ids[0][-10:]
    assert ids[3].startswith("video-")
    assert max(len(check_id(video_id)) for video_id in ids) == 51


def test_the_same_folder_elsewhere_gives_the_same_ids(tmp_path: Path) -> None:
    first, second = make(tmp_path / "one", "x/v.mp4"), make(tmp_path / "two/three", "x/v.mp4")
    assert find_videos(str(first), None)[0].video_id == find_videos(str(second), None)[0].video_id


def test_glob_uris_are_relative_to_the_part_without_wildcards(tmp_path: Path) -> None:
    make(tmp_path, "a/one.mp4", "b/two.mp4", "b/c/three.mp4", "b/notes.txt")
    assert uris(tmp_path / "*/*.mp4") == ["a/one.mp4", "b/two.mp4"]
    assert uris(tmp_path / "**/*.mp4") == ["a/one.mp4", "b/c/three.mp4", "b/two.mp4"]
    assert uris(tmp_path / "[b]*") == ["b/c/three.mp4", "b/two.mp4"]
    assert uris(tmp_path / "**") == ["a/one.mp4", "b/c/three.mp4", "b/two.mp4"]


def test_one_video_is_a_source(tmp_path: Path) -> None:
    make(tmp_path, "a/one.webm", "a/two.webm")
    assert uris(tmp_path / "a/one.webm") == ["one.webm"]


def test_folder_with_frames_is_one_video(tmp_path: Path) -> None:
    make(tmp_path, "run.1/f_0.0.jpg", "run.1/f_0.25.JPG", "run.1/poster.jpg", "b/clip.mp4", "b/thumb_1.jpg")
    videos = find_videos(str(tmp_path), None)
    assert [video.video_uri for video in videos] == ["b/clip.mp4", "run.1"]
    assert videos[1].size_bytes == 1 + 2
    assert videos[1].path == str(tmp_path / "run.1")
    assert uris(tmp_path / "run.1") == ["run.1"]


def test_frame_names_end_in_numbers() -> None:
    names = {"a_b_1.5.png": "1.5", "_0.jpeg": "0", "a_007.jpg": "007"}
    others = ["a.jpg", "a_1.5.mp4", "a_-1.jpg", "00001.jpg", "._a_1.jpg"]
    assert frames_among([*names, *others]) == names


@pytest.mark.parametrize(
    ("names", "are_frames"),
    [
        (["00001.jpg", "00002.JPG", "notes.txt", "._00001.jpg"], True),
        (["00001.jpg"], False),
        (["1.jpg", "2.jpg", "cover.jpg"], False),
        (["1.0.png", "2.0.png"], False),
        (["frame1.jpg", "frame02.jpg", "notes.txt"], True),
        (["my_img-0001.webp", "my_img-0002.webp"], True),
        (["left1.jpg", "right2.jpg"], False),
        (["frame1.jpg"], False),
        (["frame1.jpg", "2.jpg"], False),
    ],
)
def test_names_that_only_count(names: list[str], are_frames: bool) -> None:
    pictures = [name for name in names if name[0] != "." and name[-4:] != ".txt"]
    found = frames_among(names)
    assert list(found) == (pictures if are_frames else [])
    assert [int(number) for number in found.values()] == [1, 2][: len(found)]
    assert not found or are_numbers_alone(found)
    for name in found:
        assert re.fullmatch(r"0000007_0*[12]\.(jpg|webp)", spooled_frame_name(7, name))


def test_numbered_pictures_are_videos_where_a_rate_is_given(tmp_path: Path) -> None:
    """In folders and zip archives; without a rate a line names them, as they may be masks or thumbnails."""
    make(tmp_path, "d/bear/00000.jpg", "d/bear/00001.jpg", "d/x/clip.mp4", "d/x/1.jpg", "d/x/2.jpg")
    with zipfile.ZipFile(tmp_path / "d/z.zip", "w") as archive:
        for name in ("in/1.png", "in/2.png"):
            archive.writestr(name, "x")
    videos = find_videos(str(tmp_path / "d"), None, frames_per_second=24)
    assert [video.video_uri for video in videos] == ["bear", "x/clip.mp4", "z.zip/in"]
    lines: list[str] = []
    videos = find_videos(str(tmp_path / "d"), None, tell=lines.append)
    assert [video.video_uri for video in videos] == ["x/clip.mp4"]
    assert "2 folders of pictures whose names only count them (bear, z.zip/in) are not read" in lines[0]
    for source in ("d/bear", "d/z.zip", "d/b*"):
        with pytest.raises(DeltacacheError, match=r"and no other video: .* give --frames-per-second"):
            find_videos(str(tmp_path / source), None)
    (tmp_path / "list.csv").write_text("path,fps\nd/bear,24\nd/z.zip/in,\n")
    videos = find_videos(str(tmp_path / "list.csv"), None)
    assert [video.video_uri for video in videos] == ["d/bear", "d/z.zip/in"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "# comment\nb.mp4\n\nsub/a.mp4\n./b.mp4\n"),
        ("list.csv", "label,video_uri\n1,b.mp4\n2,sub/a.mp4\n"),
        ("list.csv", "label,path\n1,b.mp4\n2,sub/a.mp4\n"),
        ("list.csv", "b.mp4,1\nsub/a.mp4,2\n"),
        ("list.tsv", "\ufeffpath\tlabel\nsub/a.mp4\t1\nb.mp4\t2\n"),
    ],
)
def test_text_lists(tmp_path: Path, name: str, text: str) -> None:
    make(tmp_path, "sub/a.mp4", "b.mp4", "not-listed.mp4")
    (tmp_path / name).write_text(text)
    videos = find_videos(str(tmp_path / name), None)
    assert [(video.video_uri, video.size_bytes) for video in videos] == [("b.mp4", 2), ("sub/a.mp4", 1)]


def test_parquet_list(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "b.mp4")
    pq.write_table(pa.table({"n": [1, 2], "path": ["b.mp4", "a.mp4"]}), tmp_path / "list.parquet")
    assert uris(tmp_path / "list.parquet") == ["a.mp4", "b.mp4"]
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "list.parquet")
    with pytest.raises(DeltacacheError, match="column n holds int64, must be strings"):
        find_videos(str(tmp_path / "list.parquet"), None)


def test_list_entry_that_is_not_there_is_kept_for_the_decoder_to_refuse(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4\ngone.mp4\n")
    assert [video.size_bytes for video in find_videos(str(tmp_path / "list.txt"), None)] == [1, 0]
    (tmp_path / "list.txt").write_text("gone.mp4\n")
    with pytest.raises(
        DeltacacheError, match=r"none of the 1 videos in .*gone\.mp4.*relative to the list's folder"
    ):
        find_videos(str(tmp_path / "list.txt"), None)


def test_link_loops_end_and_broken_links_are_kept(tmp_path: Path) -> None:
    make(tmp_path, "z/real.mp4")
    (tmp_path / "z/up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    assert uris(tmp_path) == ["broken.mp4", "z/real.mp4"]
    assert "z/real.mp4" in uris(tmp_path / "**/*.mp4")


@pytest.mark.parametrize("by", ["id", "stem", "name", "uri"])
def test_exclude_list(tmp_path: Path, by: str) -> None:
    make(tmp_path / "videos", "a/one.mp4", "two.mp4")
    line = {"id": video_id_of("a/one.mp4"), "stem": "one", "name": "one.mp4", "uri": "a/one.mp4"}[by]
    (tmp_path / "exclude").write_text(f"# bad ones\n\n{line}\nnever-seen\n")
    assert uris(tmp_path / "videos", tmp_path / "exclude") == ["two.mp4"]


def test_what_is_refused_and_how(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "texts", "readme.md")
    make(tmp_path / "videos", "a.mp4")
    (tmp_path / "all").write_text("a\n")
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    refused = {
        "nowhere": "does not exist: give a folder",
        "empty": "holds no video: it must have files such as",
        "texts": "holds no video",
        "texts/readme.md": "neither a video, an archive nor a list",
        "videos/*.avi": "matches no video",
        "none.txt": "names no video",
        "bad.txt": "cannot be read as a list",
    }
    for source, message in refused.items():
        with pytest.raises(DeltacacheError, match=message):
            find_videos(str(tmp_path / source), None)
    with pytest.raises(DeltacacheError, match=r"excludes all 1 video "):
        find_videos(str(tmp_path / "videos"), tmp_path / "all")
    with pytest.raises(DeltacacheError, match=r"exclude list .* cannot be read"):
        find_videos(str(tmp_path / "videos"), tmp_path / "nowhere")


def test_versions_change_when_a_video_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "run/f_0.jpg", "run/f_1.jpg", "same.mp4")
    before = {video.video_uri: video for video in find_videos(str(tmp_path), None)}
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    os.utime(tmp_path / "run/f_0.jpg", ns=(4 << 60, 4 << 60))
    after = {video.video_uri: video.version for video in find_videos(str(tmp_path), None)}
    assert after == {"a.mp4": "1", "run": str(4 << 60), "same.mp4": before["same.mp4"].version}
    assert before["a.mp4"].version not in ("", "1")


def test_paths_are_absolute_so_that_other_machines_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "in/a.mp4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("in/a.mp4\n")
    for source in ("in", "in/a.mp4", "in/*.mp4", "list.txt"):
        assert [video.path for video in find_videos(source, None)] == [str(tmp_path / "in/a.mp4")]


def test_archives_that_are_not_read_are_named(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "sub/UCF101.rar", "b.7z")
    notes = list[str]()
    find_videos(str(tmp_path), None, None, notes.append)
    assert len(notes) == 1
    assert "2 RAR or 7z archives are not read (" in notes[0]
    assert "sub/UCF101.rar" in notes[0]


def test_a_name_that_is_not_text_is_one_failed_video(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "b/c.mp4")
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"v")
    (tmp_path / os.fsdecode(b"d\xff")).mkdir()
    (tmp_path / os.fsdecode(b"d\xff") / "e.mp4").write_bytes(b"v")
    videos = find_videos(str(tmp_path), None)
    assert [video.video_uri for video in videos] == ["a.mp4", "b/c.mp4", "caf\\xe9.mp4", "d\\xff/e.mp4"]
    for video in videos[2:]:
        with pytest.raises(VideoRefusedError, match="unreadable: its name is not UTF-8"):
            content_sha256(video.path)
    assert find_videos(str(tmp_path), None) == videos


def test_real_videos_are_all_found(real_videos: Path) -> None:
    suffixes = {".mp4", ".mkv", ".avi", ".webm", ".mov", ".gif"}
    expected = [
        path.relative_to(real_videos).as_posix() for path in real_videos.rglob("*") if path.suffix in suffixes
    ]
    assert uris(real_videos) == sorted(expected)


def test_globs_leave_out_hidden_names(tmp_path: Path) -> None:
    """As shells do, and as folders are searched; a glob that names them gets them."""
    make(tmp_path, "a/clip.mp4", "a/._clip.mp4", ".cache/x.mp4", "b/.y/z.mp4")
    for pattern in ("*/*.mp4", "*", "**/*.mp4"):
        assert uris(tmp_path / pattern) == ["a/clip.mp4"]
    assert uris(tmp_path / ".c*/*.mp4") == [".cache/x.mp4"]
