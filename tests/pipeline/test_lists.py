"""Lists of videos as people have them: which column is taken, what is said of it, what leaves videos out."""

import hashlib
import io
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from deltacache.pipeline.inputs.fetching import content_sha256, fetched
from deltacache.pipeline.inputs.lists import read_list
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.schemas.errors import DeltacacheError, VideoRefusedError

NAMES = ("b c.mp4", "sub/a.mp4", "x,y.mp4")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for name in (*NAMES, "flat.avi", "run/f_0.jpg", "run/f_1.jpg", "other/flat.mp4", "Train/z.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"v")
    (tmp_path / "thumb.jpg").write_bytes(b"t")
    return tmp_path


def uris(source: Path, column: str | None = None, notes: list[str] | None = None) -> list[str]:
    return [
        video.video_uri
        for video in find_videos(str(source), None, column, None if notes is None else notes.append)
    ]


LISTS = {  # name, text, column that is taken
    "own header": ("l.csv", "video_path,label\nsub/a.mp4,3\nb c.mp4,1\n", "column 'video_path'"),
    "filename": ("l.csv", "label,filename\n3,sub/a.mp4\n1,b c.mp4\n", "column 'filename'"),
    "an index column, as pandas writes it": ("l.csv", ",label,video\n0,3,sub/a.mp4\n1,1,b c.mp4\n", "column 'video'"),
    "a header nobody knows": ("l.csv", "klasse,datei\n3,sub/a.mp4\n1,b c.mp4\n", "column 'datei'"),
    "no header, label first": ("l.csv", "3,sub/a.mp4\n1,b c.mp4\n", "column 2"),
    "semicolons": ("l.csv", "Filename;Label\nsub/a.mp4;3\nb c.mp4;1\n", "column 'Filename'"),
    "tabs in a csv": ("l.csv", "path\tlabel\nsub/a.mp4\t3\nb c.mp4\t1\n", "column 'path'"),
    "bars": ("l.txt", "sub/a.mp4|3\nb c.mp4|1\n", "column 1"),
    "commas in a txt": ("l.txt", "path,label\nsub/a.mp4,3\nb c.mp4,1\n", "column 'path'"),
    "quotes": ("l.csv", 'label,path\n3,"sub/a.mp4"\n1,"b c.mp4"\n', "column 'path'"),
    "path label": ("l.txt", "sub/a.mp4 3\nb c.mp4 1\n", "the line without its last 1 words"),
    "path label in a csv": ("l.csv", "sub/a.mp4 3\nb c.mp4 1\n", "the line without its last 1 words"),
    "path start label": ("l.txt", "sub/a.mp4 0 3\nb c.mp4 7 1\n", "the line without its last 2 words"),
    "a usual name whose entries are not there": (
        "l.csv", "path,local\n/old/disk/a.mp4,sub/a.mp4\n/old/disk/b.mp4,b c.mp4\n", "column 'local'",
    ),
    "thumbnails are no videos": ("l.csv", "picture,v\nthumb.jpg,sub/a.mp4\nthumb.jpg,b c.mp4\n", "column 'v'"),
    "UTF-16": ("l.csv", "label,filename\n3,sub/a.mp4\n1,b c.mp4\n", "column 'filename'"),
    "JSON lines": (
        "l.jsonl", '{"label": 3, "video": "sub/a.mp4"}\n{"label": 1, "video": "b c.mp4"}\n', "column 'video'",
    ),
    "JSON lines of paths and bytes": (
        "l.jsonl", '{"video": {"path": "sub/a.mp4", "bytes": null}, "n": 1}\n{"video": {"path": "b c.mp4"}, "n": 2}\n',
        "column 'video'",
    ),
    "a JSON array": ("l.json", '[{"file": "sub/a.mp4", "n": 1}, {"file": "b c.mp4", "n": 2}]', "column 'file'"),
    "names without suffix": ("l.json", '[{"id": "a", "label": "x"}, {"id": "b c", "label": "y"}]', "column 'id'"),
    "ids as keys": ("l.json", '{"a": {"label": "x"}, "b c": {"label": "y"}}', "column 'id'"),
    "a list within": ("l.json", '{"date": "1", "videos": [{"video_uid": "a"}, {"video_uid": "b c"}]}', "column"),
    "urls of what is here": (
        "l.csv", "videoid,contentUrl,page_dir\na,https://x.invalid/1.mp4,1\nb c,https://x.invalid/2.mp4,2\n",
        "column 'videoid'",
    ),
    "paths of Windows": ("l.csv", "path,label\nsub\\a.mp4,3\n.\\b c.mp4,1\n", "column 'path'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_the_column_that_names_videos_is_found_and_said(case: str, videos: Path) -> None:
    name, text, column = LISTS[case]
    (videos / name).write_text(text, encoding="utf-16" if case == "UTF-16" else "utf-8-sig")
    notes = list[str]()
    assert [Path(uri).as_posix() for uri in uris(videos / name, notes=notes)] == ["b c.mp4", "sub/a.mp4"]
    assert len(notes) == 1
    assert f"2 entries of {column}" in notes[0]


def test_a_plain_list_is_read_line_by_line(videos: Path) -> None:
    notes = list[str]()
    (videos / "l.txt").write_text("x,y.mp4\nb c.mp4\ngone 1.mp4\nrun\n", encoding="utf-8-sig")
    assert uris(videos / "l.txt", notes=notes) == ["b c.mp4", "gone 1.mp4", "run", "x,y.mp4"]
    (videos / "l.csv").write_text("x,y.mp4\nb c.mp4\n")
    assert uris(videos / "l.csv") == ["b c.mp4", "x,y.mp4"]
    (videos / "l.txt").write_text("run 2 0\n")  # frames, their number, a label
    assert uris(videos / "l.txt") == ["run"]


def test_a_file_elsewhere_does_not_stand_in_for_a_missing_one(videos: Path) -> None:
    """Names are looked for below the list's folder, folders that an entry names are its own."""
    (videos / "l.txt").write_text("Test/z.mp4\n")
    with pytest.raises(DeltacacheError, match=r"none of the 1 videos"):
        uris(videos / "l.txt")
    (videos / "l.txt").write_text("a.mp4 1\nz.avi 2\nnone.mp4 1\n")
    assert uris(videos / "l.txt") == ["Train/z.mp4", "none.mp4", "sub/a.mp4"]
    (videos / "l.txt").write_text("flat\n")  # there are two
    with pytest.raises(DeltacacheError, match=r"none of the 1 videos"):
        uris(videos / "l.txt")


def test_lists_of_ffmpegs_concat_name_files(videos: Path) -> None:
    text = "ffconcat version 1.0\nfile 'sub/a.mp4'\nduration 3\n# x\nfile b\\ c.mp4\nfile 'it'\\''s.mp4'\n"
    (videos / "l.txt").write_text(text)
    assert uris(videos / "l.txt") == ["b c.mp4", "it's.mp4", "sub/a.mp4"]


def test_a_column_can_be_forced(videos: Path) -> None:
    (videos / "l.csv").write_text("path,second\nsub/a.mp4,b c.mp4\n")
    assert uris(videos / "l.csv") == ["sub/a.mp4"]
    for column in ("second", "Second"):
        assert uris(videos / "l.csv", column) == ["b c.mp4"]
    with pytest.raises(DeltacacheError, match=r"no column 'third': give --column one of path, second"):
        uris(videos / "l.csv", "third")
    (videos / "l.csv").write_text("sub/a.mp4;b c.mp4\n")
    assert uris(videos / "l.csv", "2") == ["b c.mp4"]
    (videos / "l.csv").write_text("video_uri,path\nsub/a.mp4,b c.mp4\n")
    assert uris(videos / "l.csv") == ["sub/a.mp4"]
    assert uris(videos / "l.csv", "path") == ["b c.mp4"]


@pytest.mark.parametrize(
    "kind",
    [
        "dictionary",
        "large",
        "view",
        "dictionary of large",
        "struct",
        "struct of large",
        "struct of path alone",
    ],
)
def test_strings_of_parquet_of_any_kind(kind: str, videos: Path) -> None:
    paths = ["sub/a.mp4", "b c.mp4"]
    strings = pa.large_string() if "large" in kind else pa.string_view() if kind == "view" else pa.string()
    column = pa.array(paths, strings)
    if "dictionary" in kind:
        column = column.dictionary_encode()
    if "struct" in kind:
        held = {"bytes": pa.nulls(2, pa.binary()), "path": column}
        held = {"path": column} if "alone" in kind else held
        column = pa.StructArray.from_arrays(list(held.values()), list(held))
    pq.write_table(pa.table({"n": [1, 2], "caption": ["x", "y"], "video": column}), videos / "l.parquet")
    notes = list[str]()
    assert uris(videos / "l.parquet", notes=notes) == ["b c.mp4", "sub/a.mp4"]
    assert "2 entries of column 'video'" in notes[0]
    with pytest.raises(DeltacacheError, match="column n holds int64, must be strings"):
        uris(videos / "l.parquet", "n")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_videos_inside_a_parquet_are_read(
    place: str, tmp_path: Path, memory_root: UPath, videos: Path
) -> None:
    """As Hugging Face datasets write them, with paths that lead nowhere or without; two row groups."""
    folder = videos if place == "local" else memory_root
    kind = pa.schema(
        {"caption": pa.string(), "video": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    )

    def write(contents: list[bytes | None], *paths: str | None) -> None:
        rows = [
            {"video": {"bytes": content, "path": path}, "caption": "x"}
            for content, path in zip(contents, paths, strict=True)
        ]
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, kind), stream, row_group_size=2)
        (folder / "l.parquet").write_bytes(stream.getvalue())

    contents: list[bytes | None] = [bytes([number]) * 100_000 for number in range(4)]
    write(contents, "/data/1.mp4", None, "clips\\2.webm", None)
    notes = list[str]()
    found = find_videos(str(folder / "l.parquet"), None, None, notes.append)
    assert "column 'video', which holds the videos themselves" in notes[0]
    names = ["l.parquet/0/1.mp4", "l.parquet/1", "l.parquet/2/2.webm", "l.parquet/3"]
    assert [video.video_uri for video in found] == names
    for video, content in zip(found, contents, strict=True):
        with fetched(video.path, tmp_path) as got:
            assert Path(got.path).read_bytes() == content
            assert Path(got.path).suffix == Path(video.video_uri).suffix
            assert (got.size_bytes, got.version) == (video.size_bytes, video.version)
            assert got.sha256 == content_sha256(video.path) == hashlib.sha256(content or b"").hexdigest()
    (tmp_path / "without.txt").write_text("2.webm\nl.parquet/3\n")
    left = find_videos(str(folder / "l.parquet"), UPath(tmp_path / "without.txt"), None)
    assert [video.video_uri for video in left] == names[:2]
    time.sleep(0.01)
    if place == "local":  # files that are there go before, if they are all
        write(contents[:2], "sub/a.mp4", "b c.mp4")
        assert uris(folder / "l.parquet") == ["b c.mp4", "sub/a.mp4"]
        write(contents[:2], "sub/a.mp4", None)
        assert uris(folder / "l.parquet") == ["l.parquet/0/a.mp4", "l.parquet/1"]
    write([b"other", *contents[1:3], None], "1.mp4", None, "2.webm", None)
    again = find_videos(str(folder / "l.parquet"), None, None)
    assert [video.video_uri for video in again] == names
    assert not {video.version for video in again} & {video.version for video in found}
    assert content_sha256(again[0].path) != content_sha256(found[1].path)
    with pytest.raises(VideoRefusedError, match="its row holds no bytes"):
        content_sha256(again[3].path)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_several_parquets_of_videos_are_one_source(
    place: str, tmp_path: Path, memory_root: UPath, videos: Path
) -> None:
    """A folder as Hugging Face's, a glob, and a list of files; tables of something else beside them are passed over."""
    root = videos / "hub" if place == "local" else memory_root
    (root / "data").mkdir(parents=True)

    def write(file: str, rows: list[dict[str, object]], features: dict[str, object] | None = None) -> None:
        table = pa.Table.from_pylist(rows)
        if features is not None:
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        stream = io.BytesIO()
        pq.write_table(table, stream)
        (root / file).write_bytes(stream.getvalue())

    names = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    write(names[0], [{"clip": {"bytes": b"0", "path": "a.mp4"}}, {"clip": {"bytes": b"1", "path": None}}])
    write(names[1], [{"v": {"bytes": b"2", "path": None}}, {"v": None}], {"v": {"_type": "Video"}})
    write(
        "data/pictures.parquet", [{"image": {"bytes": b"p", "path": "a.png"}}], {"image": {"_type": "Image"}}
    )
    write("data/hostile.parquet", [{"a": {"bytes": 1, "path": 2}}], {"a": ["Video"]})
    write("data/labels.parquet", [{"video": {"bytes": None, "path": "a.mp4"}, "label": 1}])
    expected = [f"{names[0]}/0/a.mp4", f"{names[0]}/1", f"{names[1]}/0", f"{names[1]}/1"]
    found = find_videos(str(root), None)
    assert [video.video_uri for video in found] == expected
    contents = list[bytes]()
    for video in found[:3]:
        with fetched(video.path, tmp_path) as got:
            contents.append(Path(got.path).read_bytes())
            assert (got.size_bytes, got.version) == (video.size_bytes, video.version)
    assert contents == [b"0", b"1", b"2"]
    with pytest.raises(VideoRefusedError, match="its row holds no bytes"):
        content_sha256(found[3].path)
    assert [f"data/{uri}" for uri in uris(root / "data" / "train-*.parquet")] == expected
    assert [f"data/{uri}" for uri in uris(root / "data" / "train-00000-of-00002.parquet")] == expected[:2]
    (root / "some.txt").write_text("\n".join(names))
    assert uris(root / "some.txt") == expected
    (root / "some.txt").write_text("\n".join(expected[1:3]))  # as in index.parquet
    assert uris(root / "some.txt") == expected[1:3]
    (root / names[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    *_, broken = find_videos(str(root), None)
    assert broken.video_uri == names[1]
    with pytest.raises(VideoRefusedError, match="a Parquet file that cannot be read"):
        content_sha256(broken.path)


@pytest.mark.parametrize("layout", ["{label}/", "", "train/{label}/", "{label_}/"])
@pytest.mark.parametrize("suffix", ["csv", "parquet", "json", "json by id"])
def test_kinetics_annotations_name_its_files(layout: str, suffix: str, tmp_path: Path) -> None:
    rows = [("eating cake", "-a_b", 3, 13), ("eating cake", "gone", 0, 10), ("yoga", "cc", 1000, 1010)]
    names = []
    for label, video, start, end in rows:
        folder = layout.format(label=label, label_=label.replace(" ", "_"))
        names.append(f"{folder}{video}_{start:06d}_{end:06d}.mp4")
        if video != "gone":
            (tmp_path / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / names[-1]).write_bytes(b"v")
    table = [
        {"label": label, "youtube_id": video, "time_start": start, "time_end": end, "split": "train"}
        for label, video, start, end in rows
    ]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "l.parquet")
    elif suffix == "json":
        (tmp_path / "l.json").write_text(json.dumps(table))
    elif suffix == "json by id":  # Kinetics-700
        held = {
            video: {
                "annotations": {"label": label, "segment": [float(start), float(end)]},
                "duration": 10.0,
                "subset": "train",
                "url": f"https://www.youtube.com/watch?v={video}",
            }
            for label, video, start, end in rows
        }
        (tmp_path / "l.json").write_text(json.dumps(held))
    else:
        lines = [",".join(map(str, row.values())) for row in table]
        (tmp_path / "l.csv").write_text("\n".join([",".join(table[0]), *lines]))
    notes = list[str]()
    assert uris(tmp_path / f"l.{suffix.split(maxsplit=1)[0]}", notes=notes) == sorted(names)
    assert "3 entries of column 'youtube_id_time_start_time_end', which name files below" in notes[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le with a mark"])
def test_byte_order_marks_of_exclude_lists_and_lists(encoding: str, videos: Path) -> None:
    mark, encoding = ("\ufeff", "utf-16-le") if encoding.endswith("mark") else ("", encoding)
    (videos / "l.txt").write_text(f"{mark}sub/a.mp4\nb c.mp4\n", encoding=encoding)
    (videos / "out.txt").write_text(f"{mark}sub/a.mp4\n", encoding=encoding)
    assert uris(videos / "l.txt") == ["b c.mp4", "sub/a.mp4"]
    assert [video.video_uri for video in find_videos(str(videos / "l.txt"), videos / "out.txt")] == [
        "b c.mp4"
    ]


@pytest.mark.parametrize("source", ["", "*/*.mp4", "l.txt", "link"])
def test_whatever_path_names_a_video_leaves_it_out(
    source: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "l.txt").write_text("sub/a.mp4\nother/flat.mp4\n")
    (videos.parent / "lists").mkdir(exist_ok=True)
    link = videos.parent / "lists" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(videos)
    monkeypatch.chdir(videos.parent)
    place = str(link if source == "link" else videos / source)
    all_of_it = {video.video_uri for video in find_videos(place, None)}
    ways = [
        "./sub/a.mp4",
        "sub/../sub/a.mp4",
        str(videos / "sub/a.mp4"),
        str(link / "sub/a.mp4"),
        "sub\\a.mp4",
    ]
    for way in [*ways, f"{videos.name}/sub/a.mp4"]:  # the last from the working directory
        (videos / "out.txt").write_text(f"{way}\nnobody\n")
        notes = list[str]()
        kept = {each.video_uri for each in find_videos(place, videos / "out.txt", None, notes.append)}
        assert kept == all_of_it - {"sub/a.mp4"}, way
        assert (
            f"leaves out 1 of {len(all_of_it)} videos; 1 of its entries match no video: nobody" in notes[-1]
        )


def test_what_a_list_may_not_be(videos: Path) -> None:
    refused = {
        "l.json": ('{"a": 1', "cannot be read as a list"),
        "m.json": ('"text"', "holds no list"),
        "n.jsonl": ('{"a": "b"}\n{', "cannot be read as a list"),
        "o.csv": ("path,label\n", "names no video"),
        "p.txt": ("\n", "names no video"),
    }
    for name, (text, message) in refused.items():
        (videos / name).write_text(text)
        with pytest.raises(DeltacacheError, match=message):
            uris(videos / name)


def test_a_list_that_comes_with_deltacache_is_known_by_its_name(tmp_path: Path) -> None:
    """The five videos of the released recipe, in whatever folder; a file of that name comes first."""
    names = [
        *("abseiling/dvEr9R6qkuQ_000026_000036", "capoeira/BM9p1LJtjAk_000000_000010"),
        *("jogging/48YTQor0v4I_000000_000010", "luge/wx1VdA9xef8_000014_000024"),
        *("snowmobiling/EO-b_K-qYUQ_000001_000011", "luge/aaaaaaaaaaa_000014_000024"),
    ]
    for name in names:
        video = tmp_path / "train" / f"{name}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_bytes(b"")
    said: list[str] = []
    left = find_videos(str(tmp_path), Path("kinetics700-released"), tell=said.append)
    assert [video.video_uri for video in left] == ["train/luge/aaaaaaaaaaa_000014_000024.mp4"]
    assert said == ["kinetics700-released: leaves out 5 of 6 videos; 0 of its entries match no video"]


@pytest.mark.parametrize(
    ("text", "taken", "left"),
    [
        ('{"train": ["a.mp4", "b.mp4"], "val": ["c.mp4"]}', ["a.mp4", "b.mp4"], "val"),
        (
            '{"annotations": [{"id": 1}, {"id": 2}, {"id": 3}], "images": [{"file_name": "a.mp4"}]}',
            ["a.mp4"],
            "id",
        ),
        (
            '{"a": [{"path": "a.mp4"}, {"path": "b.mp4"}], "b": [{"path": "c.mp4"}]}',
            ["a.mp4", "b.mp4"],
            "b.path",
        ),
    ],
)
def test_lists_of_an_object_that_are_not_taken_are_shown(
    tmp_path: Path, text: str, taken: list[str], left: str
) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.json").write_text(text)
    lines: list[str] = []
    assert read_list(str(tmp_path / "list.json"), tell=lines.append) == taken
    assert lines[0].endswith(f"not taken: {left} (--column NAME)")
