"""The same sources on object stores: a real S3 server, and fsspec's memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_maker import tar_bytes, write_cut, write_spanned, zip_bytes
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem
from test_archives import FOUND, FRAMES, MEMBERS, VIDEO, content

from deltacache.pipeline.inputs.fetching import fetched
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.storage.storage import filesystem_of
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from object_stores import s3_bucket


@pytest.fixture(scope="module", params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The url of an empty folder on a store."""
    if request.param == "s3":
        with s3_bucket() as url:
            yield url
    else:
        yield "memory://bucket"
        MemoryFileSystem.store.clear()


def put(url: str, files: dict[str, bytes]) -> str:
    fs, path = filesystem_of(url)
    for name, data in files.items():
        fs.pipe_file(f"{path}/{name}", data)
    return url


def by_uri(source: str) -> dict[str, VideoSource]:
    return {video.video_uri: video for video in find_videos(source, None)}


@pytest.mark.slow
def test_a_folder_is_searched_with_its_sizes_and_versions(store: str, tmp_path: Path) -> None:
    files = {"b.MP4": b"12", "x/y/a.mkv": b"345", "x/.hidden.mp4": b"", ".cache/c.mp4": b"", "n.txt": b"-"}
    frames = {f"run.1/f_{n}.5.jpg": bytes([n]) * n for n in range(1, 4)}
    url = put(f"{store}/folder", files | frames)
    put(f"{store}/folder2", {"other.mp4": b""})  # shares the prefix, is another folder
    videos = by_uri(url)
    assert {uri: video.size_bytes for uri, video in videos.items()} == {
        "b.MP4": 2,
        "run.1": 6,
        "x/y/a.mkv": 3,
    }
    assert by_uri(f"{url}/") == videos
    assert content(videos["x/y/a.mkv"], tmp_path / "spool") == {"video.mkv": b"345"}
    expected = {f"{n - 1:07d}_{n}.5.jpg": bytes([n]) * n for n in range(1, 4)}
    assert content(videos["run.1"], tmp_path / "spool") == expected
    put(url, {"b.MP4": b"21", "run.1/f_1.5.jpg": b"!"})
    changed = {uri for uri, video in by_uri(url).items() if video.version != videos[uri].version}
    assert changed == {"b.MP4", "run.1"}
    assert all(video.version for video in videos.values())


@pytest.mark.slow
def test_listing_asks_nothing_of_single_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_bucket() as url:
        put(url, {f"{n % 7}/{n}.mp4": b"v" for n in range(60)})
        calls: list[str] = []
        call_s3 = S3FileSystem._call_s3

        async def counted(self: S3FileSystem, method: str, *args: object, **kwargs: object) -> object:
            calls.append(method)
            return await call_s3(self, method, *args, **kwargs)

        monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
        assert len(find_videos(url, None)) == 60
        assert len(calls) < 5, calls
        put(url, {"list.txt": "\n".join(f"{n % 7}/{n}.mp4" for n in range(60)).encode()})
        calls.clear()
        assert len(find_videos(f"{url}/list.txt", None)) == 60
        assert len(calls) < 15, calls


def test_globs(store: str) -> None:
    url = put(f"{store}/glob", {"a/one.mp4": b"1", "b/two.mp4": b"2", "b/c/three.mp4": b"3", "b/n.txt": b""})
    assert list(by_uri(f"{url}/*/*.mp4")) == ["a/one.mp4", "b/two.mp4"]
    assert list(by_uri(f"{url}/**/*.mp4")) == ["a/one.mp4", "b/c/three.mp4", "b/two.mp4"]
    assert list(by_uri(f"{url}/b*")) == ["b/c/three.mp4", "b/two.mp4"]
    with pytest.raises(DeltacacheError, match="matches no video"):
        find_videos(f"{url}/*.avi", None)


def test_one_video_and_lists(store: str, tmp_path: Path) -> None:
    files = {"sub/a.mp4": b"1", "b.mp4": b"22", **{f"many/{n}.mp4": b"333" for n in range(6)}}
    url = put(f"{store}/lists", {**files, "frames/f_1.jpg": b"4444"})
    assert list(by_uri(f"{url}/sub/a.mp4")) == ["a.mp4"]
    lines = [
        "b.mp4",
        f"{url}/sub/a.mp4",
        "gone.mp4",
        "frames",
        *(f"many/{n}.mp4" for n in range(6)),
        "many/x.mp4",
    ]
    put(url, {"list.txt": "\n".join(lines).encode()})
    videos = by_uri(f"{url}/list.txt")
    sizes = {uri: video.size_bytes for uri, video in videos.items()}
    expected = {"b.mp4": 2, f"{url}/sub/a.mp4": 1, "gone.mp4": 0, "frames": 4, "many/x.mp4": 0}
    assert sizes == {**expected, **{f"many/{n}.mp4": 3 for n in range(6)}}
    assert content(videos["frames"], tmp_path / "spool") == {"0000000_1.jpg": b"4444"}
    for uri in ("gone.mp4", "many/x.mp4"):
        with pytest.raises(VideoRefusedError) as refused, fetched(videos[uri].path, tmp_path):
            pass
        assert refused.value.reason is FailureReason.UNREADABLE
        assert refused.value.message == "No such file or directory"
    (tmp_path / "here.mp4").write_bytes(b"55555")
    (tmp_path / "list.txt").write_text(f"here.mp4\n{url}/b.mp4\n")
    assert [video.size_bytes for video in find_videos(str(tmp_path / "list.txt"), None)] == [5, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "cut", "spanned"])
def test_archives(store: str, tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    match kind:
        case "whole":
            (tmp_path / "in/a.zip").write_bytes(zip_bytes(MEMBERS))
        case "cut":
            write_cut(tmp_path / "in", "a.zip", zip_bytes(MEMBERS), 3000)
        case "spanned":
            write_spanned(tmp_path / "in", "a", MEMBERS, 3000)
    archive = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    url = put(f"{store}/archives-{kind}", {**archive, "s.tar": tar_bytes({"k/v.mp4": VIDEO})})
    videos = by_uri(url)
    assert {uri: video.size_bytes for uri, video in videos.items()} == {**FOUND, "s.tar/k/v.mp4": 5000}
    assert content(videos["s.tar/k/v.mp4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert content(videos["a.zip/clips/v.MP4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert sorted(content(videos["a.zip/run 1/cam"], tmp_path / "spool").values()) == sorted(FRAMES.values())
    assert list(by_uri(f"{url}/*.zip*")) == list(FOUND)
    assert list(by_uri(f"{url}/s.tar")) == ["s.tar/k/v.mp4"]


def test_what_is_refused_and_how(store: str) -> None:
    url = put(f"{store}/refused", {"texts/readme.md": b"", "none.txt": b"# nothing\n"})
    for source, message in {
        "nowhere": "does not exist: give a folder",
        "texts": "holds no video",
        "texts/readme.md": "neither a video, an archive nor a list",
        "none.txt": "names no video",
    }.items():
        with pytest.raises(DeltacacheError, match=message):
            find_videos(f"{url}/{source}", None)
    for source, message in {
        "nosuchstore://bucket/videos": "scheme nosuchstore is not opened, only abfs, .*: --allow-scheme nosuchstore",
        "s3:/bucket/videos": "s3:/bucket/videos has one slash behind its scheme: give s3://bucket/videos",
        "simplecache::s3://bucket/videos": "simplecache::s3 chains protocols, which is not supported",
        "s3://KEY:SECRET@bucket/videos": "user name and password in s3://bucket/videos: s3 takes its credentials from",
        "gs://bucket/videos": "cannot be opened: .*gcsfs",
    }.items():
        with pytest.raises(DeltacacheError, match=message):
            find_videos(source, None)
    with pytest.raises(DeltacacheError, match="cannot be opened: Protocol not known: nosuchstore"):
        find_videos("nosuchstore://bucket/videos", None, schemes=["nosuchstore"])


def test_a_bucket_that_may_not_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_bucket(), pytest.raises(DeltacacheError, match=r"does not exist"):
        find_videos("s3://no-such-bucket/videos", None)
