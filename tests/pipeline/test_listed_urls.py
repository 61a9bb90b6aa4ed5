"""Lists of urls: what cannot be opened costs itself, whatever it is; names with odd characters; credentials."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from archive_maker import tar_bytes, zip_bytes
from fsspec.implementations.memory import MemoryFileSystem
from test_archives import FOUND, FRAMES, VIDEO, content, write_zip

from deltacache.pipeline.inputs.fetching import fetched
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.storage.storage import filesystem_of
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from object_stores import s3_bucket
from web_server import Web, web_server

ODD = [
    "a::b.mp4",
    "d//c.mp4",
    "what?.mp4",
    "no#1.mp4",
    "100%.mp4",
    "a%20b.mp4",
    "ä ö.mp4",
    "%.mp4",
    "x::y/z?#.mp4",
]


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as running:
        yield running


@pytest.fixture
def dead_host() -> str:
    """A host and port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def listed(folder: Path, *lines: str) -> dict[str, VideoSource]:
    (folder / "list.txt").write_text("\n".join(lines))
    return {video.video_uri: video for video in find_videos(str(folder / "list.txt"), None)}


def refusal(video: VideoSource, spool: Path) -> tuple[FailureReason, str]:
    with pytest.raises(VideoRefusedError) as refused, fetched(video.path, spool):
        pass
    return refused.value.reason, refused.value.message


@pytest.mark.slow
def test_each_bad_entry_costs_itself(
    web: Web, dead_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    good = [f"{web.url}/videos/{number}.mp4" for number in range(12)]  # the server lists no folder
    web.files |= {f"/videos/{number}.mp4": bytes([number]) * 9 for number in range(12)}
    web.statuses["/videos/broken.mp4"] = [500]
    (tmp_path / "here.mp4").write_bytes(b"here")
    bad = {
        f"http://{dead_host}/a.mp4": (FailureReason.UNAVAILABLE, "tried again for 0.5 s"),
        f"http://{dead_host}/b.mp4": (FailureReason.UNAVAILABLE, "tried again for 0.5 s"),
        "http://no-such-host.invalid/a.mp4": (None, "the name of its host is not known"),
        f"{web.url}/videos/gone.mp4": (FailureReason.UNREADABLE, "No such file"),
        f"{web.url}/videos/broken.mp4": (FailureReason.UNAVAILABLE, "HTTP status 500"),
        "nosuch://bucket/a.mp4": (FailureReason.UNREADABLE, "scheme nosuch is not opened"),
        "ftp://h/a.mp4": (FailureReason.UNREADABLE, "--allow-scheme ftp"),
        "gs://bucket/a.mp4": (FailureReason.UNREADABLE, "gcsfs"),
        "s3://bucket/a.mp4": (FailureReason.UNREADABLE, "AWS_ACCESS_KEY_ID"),
        "s3:/bucket/a.mp4": (FailureReason.UNREADABLE, "give s3://bucket/a.mp4"),
        "simplecache::s3://bucket/a.mp4": (FailureReason.UNREADABLE, "simplecache::s3 chains protocols"),
        f"zip://a.mp4::{web.url}/a.zip": (FailureReason.UNREADABLE, "chains protocols"),
        "reference::memory://x.json": (FailureReason.UNREADABLE, "chains protocols"),
        f"{web.url}/a.zip/b.mp4": (FailureReason.UNREADABLE, "its archive is not there"),
    }
    videos = listed(tmp_path, *good, *bad, "here.mp4")
    assert set(videos) == {*good, *bad, "here.mp4"}
    for number, url in enumerate(good):
        assert videos[url].size_bytes == 9
        assert videos[url].version
        assert content(videos[url], tmp_path / "spool") == {"video.mp4": bytes([number]) * 9}
    for url, (reason, words) in bad.items():
        found = refusal(videos[url], tmp_path)
        assert words in found[1], (url, found)
        assert reason is None or found[0] is reason, (url, found)
    with pytest.raises(
        DeltacacheError, match=f"none of the {len(bad)} videos in .* exists, the first is .*"
    ) as error:
        listed(tmp_path, *bad)
    assert "simplecache" not in str(error.value).partition("first is")[0]


def test_protocols_are_opened_by_name_only(tmp_path: Path) -> None:
    MemoryFileSystem().pipe_file("/x/a.mp4", b"1")
    (tmp_path / "list.txt").write_text("dir::memory://x/a.mp4\ndata://a.mp4\nmemory://x/a.mp4\n")
    videos = {video.video_uri: video.path for video in find_videos(str(tmp_path / "list.txt"), None)}
    assert [uri for uri, path in videos.items() if '"refused"' not in path] == ["memory://x/a.mp4"]
    (tmp_path / "list.txt").write_text("data://a.mp4\nmemory://x/a.mp4\n")
    videos = {v.video_uri: v.path for v in find_videos(str(tmp_path / "list.txt"), None, schemes=["data"])}
    assert "not opened" not in videos["data://a.mp4"]
    MemoryFileSystem.store.clear()


@pytest.mark.slow
@pytest.mark.parametrize("store", ["local", "memory", "s3", "http"])
def test_odd_names(store: str, tmp_path: Path) -> None:
    files = {name: f"content of {name}".encode() for name in ODD}
    if store == "http":  # names are encoded in urls; what is not and cannot be meant otherwise is, too
        with web_server() as web:
            web.files = {f"/v/{quote(name, safe=':/')}": data for name, data in files.items()}
            plain = [name for name in ODD if "?" not in name and "#" not in name and name != "a%20b.mp4"]
            entries = {f"{web.url}/v/{quote(name, safe=':/')}": name for name in ODD}
            entries |= {f"{web.url}/v/{name}": name for name in plain}
            _check(entries, files, listed(tmp_path, *entries), tmp_path)
            sharp = listed(tmp_path, f"{web.url}/v/no#1.mp4", f"{web.url}/v/a::b.mp4#t=10,20")
            _check(
                {f"{web.url}/v/no%231.mp4": "no#1.mp4", f"{web.url}/v/a::b.mp4": "a::b.mp4"},
                files,
                sharp,
                tmp_path,
            )
        return
    if store == "local":
        root = str(tmp_path / "in")
        for name in ODD:
            (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "in" / name).write_bytes(files[name])
        found = {str(video.video_uri): video for video in find_videos(root, None)}
        _check({name.replace("//", "/"): name for name in ODD}, files, found, tmp_path)
        _check(
            {f"in/{n}".replace("//", "/"): n for n in ODD},
            files,
            listed(tmp_path, *(f"in/{n}" for n in ODD)),
            tmp_path,
        )
        return
    with s3_bucket() as bucket:
        root = f"{bucket}/odd" if store == "s3" else "memory://odd/in"
        fs, path = filesystem_of(root)
        for name, data in files.items():
            fs.pipe_file(f"{path}/{name}", data)
        _check(
            {name: name for name in ODD}, files, {v.video_uri: v for v in find_videos(root, None)}, tmp_path
        )
        urls = {f"{root}/{name}": name for name in ODD}
        _check(urls, files, listed(tmp_path, *urls), tmp_path)
        fs.pipe_file(f"{path}/list.txt", "\n".join(ODD).encode())
        found = {v.video_uri: v for v in find_videos(f"{root}/list.txt", None)}
        _check({name: name for name in ODD}, files, found, tmp_path)
        assert content(find_videos(f"{root}/what?.mp4", None)[0], tmp_path / "one") == {
            "video.mp4": files["what?.mp4"]
        }
    MemoryFileSystem.store.clear()


def _check(
    names: dict[str, str], files: dict[str, bytes], videos: dict[str, VideoSource], tmp_path: Path
) -> None:
    assert set(videos) == set(names)
    for uri, name in names.items():
        with fetched(videos[uri].path, tmp_path) as here:
            assert Path(here.path).read_bytes() == files[name], uri


@pytest.mark.parametrize(("ranges", "sizes"), [(True, True), (False, True), (False, False)])
def test_servers_with_few_manners(web: Web, tmp_path: Path, ranges: bool, sizes: bool) -> None:
    data = os.urandom((17 << 20) + 5)
    web.files = {
        "/a.mp4": data,
        "/z.zip": zip_bytes({"v.mp4": data[:5000]}),
        "/t.tar": tar_bytes({"v.mp4": b"5"}),
    }
    web.ranges, web.sizes, web.tags = ranges, sizes, False
    videos = listed(tmp_path, *(f"{web.url}{name}" for name in web.files))
    with fetched(videos[f"{web.url}/a.mp4"].path, tmp_path) as here:
        assert Path(here.path).read_bytes() == data
    if ranges:
        assert content(videos[f"{web.url}/z.zip/v.mp4"], tmp_path / "zip") == {"video.mp4": data[:5000]}
        assert content(videos[f"{web.url}/t.tar/v.mp4"], tmp_path / "tar") == {"video.mp4": b"5"}
        return
    words = "does not support range requests" if sizes else "does not say how long"
    reason, message = refusal(videos[f"{web.url}/z.zip"], tmp_path)
    assert (reason, words in message) == (FailureReason.UNREADABLE, True), message


@pytest.mark.parametrize("kind", ["cut", "spanned"])
def test_archives_in_parts_are_read_from_a_server_that_lists_nothing(
    web: Web, tmp_path: Path, kind: str
) -> None:
    write_zip(tmp_path / "in", kind)
    web.files |= {f"/v/{path.name}": path.read_bytes() for path in (tmp_path / "in").iterdir()}
    first = "a.zip.001" if kind == "cut" else "a.zip"
    videos = find_videos(f"{web.url}/v/{first}", None)
    assert {video.video_uri: video.size_bytes for video in videos} == FOUND
    by_list = listed(tmp_path, f"{web.url}/v/a.zip")
    assert set(by_list) == {f"{web.url}/v/{uri}" for uri in FOUND}
    assert content(by_list[f"{web.url}/v/a.zip/clips/v.MP4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert len(content(by_list[f"{web.url}/v/a.zip/run 1/cam"], tmp_path / "spool")) == len(FRAMES)
    last = max(path for path in web.files if path != "/v/a.zip")
    del web.files[last]
    web.statuses[last] = [403]  # as stores answer that may not be listed
    [(_, broken)] = listed(tmp_path, f"{web.url}/v/a.zip").items()
    assert "a part is missing" in refusal(broken, tmp_path)[1]


def test_credentials_in_a_list_are_used_and_are_no_part_of_names(web: Web, tmp_path: Path) -> None:
    web.password, web.signature = "user:pass", "s3cr3t"
    web.files = {
        "/v/a.mp4": b"1",
        "/v/z.zip": zip_bytes({"b.mp4": b"22"}),
        "/v/list.txt": b"a.mp4?Signature=s3cr3t\n",
    }
    url = web.url.replace("://", "://user:pass@")
    signed = "?Expires=1&Signature=s3cr3t&id=4"
    lines = [f"{url}/v/a.mp4{signed}", f"{url}/v/z.zip{signed}", f"{url}/v/z.zip/b.mp4{signed}"]
    videos = listed(tmp_path, *lines)
    assert list(videos) == [f"{web.url}/v/a.mp4?id=4", f"{web.url}/v/z.zip/b.mp4"]
    again = listed(tmp_path, *(line.replace("Expires=1", "Expires=2") for line in lines))
    assert [v.video_id for v in again.values()] == [v.video_id for v in videos.values()]
    assert content(videos[f"{web.url}/v/a.mp4?id=4"], tmp_path / "a") == {"video.mp4": b"1"}
    assert content(videos[f"{web.url}/v/z.zip/b.mp4"], tmp_path / "b") == {"video.mp4": b"22"}
    [one] = find_videos(f"{url}/v/a.mp4{signed}", None)
    assert one.video_uri == "a.mp4"
    assert content(one, tmp_path / "c") == {"video.mp4": b"1"}
    [of_a_list] = find_videos(f"{url}/v/list.txt{signed}", None)
    assert of_a_list.video_uri == "a.mp4"
    assert content(of_a_list, tmp_path / "d") == {"video.mp4": b"1"}
    refused = refusal(
        listed(tmp_path, lines[0], f"{url}/v/a.mp4?Signature=wrong&id=5")[f"{web.url}/v/a.mp4?id=5"], tmp_path
    )
    assert refused == (FailureReason.UNREADABLE, "ClientResponseError, HTTP status 403")


def test_entries_that_only_credentials_tell_apart_are_refused(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match=r"two entries are http.*/get when what looks like credentials"):
        listed(tmp_path, f"{web.url}/get?key=1", f"{web.url}/get?key=2")
    web.files = {"/get": b"1"}
    assert len(listed(tmp_path, f"{web.url}/get?Signature=1", f"{web.url}/get?Signature=2")) == 1


def test_a_video_takes_a_share_of_the_temporary_space(tmp_path: Path) -> None:
    (tmp_path / "bomb.zip").write_bytes(zip_bytes({"a.mp4": bytes(8 << 20), "b.mp4": b"small"}))
    free = os.statvfs(tmp_path)
    share = (4 << 20) / (free.f_bavail * free.f_frsize)
    (tmp_path / "spool").mkdir()
    bomb, small = find_videos(str(tmp_path / "bomb.zip"), None)
    with pytest.raises(VideoRefusedError) as refused, fetched(bomb.path, tmp_path / "spool", share):
        pass
    assert refused.value.reason is FailureReason.TOO_LARGE
    assert (
        "temporary space that is free: make room in TMPDIR, or raise --temporary-share"
        in refused.value.message
    )
    assert list((tmp_path / "spool").iterdir()) == []
    with fetched(small.path, tmp_path / "spool", share) as here:
        assert Path(here.path).read_bytes() == b"small"
