"""Videos inside archives: found, read, and never trusted."""

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from archive_maker import tar_bytes, write_cut, write_spanned, zip_bytes

from deltacache.pipeline.inputs import archives
from deltacache.pipeline.inputs.fetching import content_sha256, fetched
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError

RANDOM = random.Random(3)
FRAMES = {f"run 1/cam/f_{n}.{n}5.jpg": RANDOM.randbytes(300 + n) for n in range(12)}
VIDEO = RANDOM.randbytes(5000)
MEMBERS = {
    **FRAMES,
    "top_0.5.png": b"top",
    "clips/v.MP4": VIDEO,
    "clips/thumb_1.jpg": b"not a frame: beside a video",
    "readme.txt": b"no video",
    "__MACOSX/run 1/cam/._f_0.jpg": b"hidden",
    ".hidden/a_1.jpg": b"hidden",
}
FOUND = {"a.zip": 3, "a.zip/clips/v.MP4": 5000, "a.zip/run 1/cam": sum(len(data) for data in FRAMES.values())}


def by_uri(source: Path) -> dict[str, VideoSource]:
    return {video.video_uri: video for video in find_videos(str(source), None)}


def content(video: VideoSource, spool: Path) -> dict[str, bytes]:
    """Spooled files by name; nothing is left afterwards, nothing lies outside."""
    spool.mkdir(exist_ok=True)
    with fetched(video.path, spool) as fetched_video:
        path = Path(fetched_video.path)
        assert path.is_relative_to(spool)
        files = {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
        assert fetched_video.size_bytes == sum(map(len, files.values())) == video.size_bytes
        assert fetched_video.version == video.version
        assert fetched_video.sha256 == content_sha256(video.path)
        every = {file for file in spool.parent.rglob("*") if file.is_file() and file.is_relative_to(spool)}
        assert {file.name for file in every} == set(files)
    assert list(spool.iterdir()) == []
    return files


def refusal(video: VideoSource, spool: Path) -> VideoRefusedError:
    spool.mkdir(exist_ok=True)
    with pytest.raises(VideoRefusedError) as refused, fetched(video.path, spool):
        pass
    assert list(spool.iterdir()) == []
    return refused.value


def write_zip(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    match kind:
        case "cut":
            assert len(write_cut(folder, "a.zip", zip_bytes(MEMBERS, zipfile.ZIP_STORED), 700)) > 9
        case "spanned":
            assert len(write_spanned(folder, "a", MEMBERS, 700)) > 9
        case compression:
            (folder / "a.zip").write_bytes(zip_bytes(MEMBERS, getattr(zipfile, compression)))


@pytest.mark.parametrize("kind", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_LZMA", "cut", "spanned"])
def test_frames_and_videos_of_a_zip(tmp_path: Path, kind: str) -> None:
    write_zip(tmp_path / "in", kind)
    videos = by_uri(tmp_path / "in")
    assert {uri: video.size_bytes for uri, video in videos.items()} == FOUND
    assert content(videos["a.zip/clips/v.MP4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert content(videos["a.zip"], tmp_path / "spool") == {"0000000_0.5.png": b"top"}
    frames = content(videos["a.zip/run 1/cam"], tmp_path / "spool")
    expected = [(f"{n:07d}_{name.rpartition('_')[2]}", FRAMES[name]) for n, name in enumerate(sorted(FRAMES))]
    assert sorted(frames.items()) == expected


def test_the_same_frames_have_the_same_identity_in_a_folder_and_a_zip(tmp_path: Path) -> None:
    write_zip(tmp_path / "in", "cut")
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, data in FRAMES.items():
        (folder / name.rpartition("/")[2]).write_bytes(data)
    (folder / "ignored.txt").write_text("no frame")
    zipped = content_sha256(by_uri(tmp_path / "in")["a.zip/run 1/cam"].path)
    assert content_sha256(str(folder)) == zipped
    (folder / "f_0.05.jpg").write_bytes(b"other")
    assert content_sha256(str(folder)) != zipped


@pytest.mark.parametrize(("kind", "name"), [("cut", "a.zip.002"), ("cut", "a.zip.001"), ("spanned", "a.z03")])
def test_a_missing_part_is_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    write_zip(tmp_path / "in", kind)
    (tmp_path / "in" / name).unlink()
    [(uri, video)] = by_uri(tmp_path / "in").items()
    assert uri == "a.zip"
    error = refusal(video, tmp_path / "spool")
    assert error.reason is FailureReason.UNREADABLE
    assert error.message == f"{name} is missing, a part of a.zip"


@pytest.mark.parametrize("kind", ["cut", "spanned"])
def test_a_missing_last_part_is_noticed(tmp_path: Path, kind: str) -> None:
    write_zip(tmp_path / "in", kind)
    last = max((tmp_path / "in").iterdir(), key=lambda file: file.name)
    last.unlink()
    [(uri, video)] = by_uri(tmp_path / "in").items()
    assert uri == "a.zip"
    assert "missing" in refusal(video, tmp_path / "spool").message


def test_too_few_parts_of_a_spanned_zip_are_noticed(tmp_path: Path) -> None:
    write_zip(tmp_path / "in", "spanned")
    for file in sorted((tmp_path / "in").glob("*.z*"))[-3:-1]:
        file.unlink()
    error = refusal(by_uri(tmp_path / "in")["a.zip"], tmp_path / "spool")
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "parts" in error.message


def test_an_archive_is_a_source_and_a_list_may_name_it_or_what_lies_in_it(tmp_path: Path) -> None:
    write_zip(tmp_path / "in", "cut")
    (tmp_path / "in/s.tar").write_bytes(tar_bytes({"k.mp4": b"12"}))
    assert list(by_uri(tmp_path / "in/a.zip.001")) == list(FOUND)
    (tmp_path / "list.txt").write_text("in/a.zip\nin/s.tar/k.mp4\nin/s.tar/gone.mp4\n")
    videos = by_uri(tmp_path / "list.txt")
    assert list(videos) == [*(f"in/{uri}" for uri in FOUND), "in/s.tar/gone.mp4", "in/s.tar/k.mp4"]
    assert refusal(videos["in/s.tar/gone.mp4"], tmp_path / "spool").reason is FailureReason.UNREADABLE
    (tmp_path / "texts.zip").write_bytes(zip_bytes({"a.txt": b""}))
    with pytest.raises(DeltacacheError, match=r"texts.zip holds no video: it must have members"):
        find_videos(str(tmp_path / "texts.zip"), None)
    assert "texts.zip" not in by_uri(tmp_path)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_videos_of_a_tar(tmp_path: Path, format: int) -> None:
    long = f"{'deep/' * 28}key.webm" if format != tarfile.USTAR_FORMAT else "key.webm"
    members = {"000.mp4": VIDEO, "000.json": b"{}", long: b"w" * 1024, "._x.mp4": b"hidden"}
    (tmp_path / "shard.tar").write_bytes(tar_bytes(members, format))
    videos = by_uri(tmp_path)
    assert list(videos) == ["shard.tar/000.mp4", f"shard.tar/{long}"]
    assert content(videos["shard.tar/000.mp4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert content(videos[f"shard.tar/{long}"], tmp_path / "spool") == {"video.webm": b"w" * 1024}


def test_names_and_links_lead_nowhere(tmp_path: Path) -> None:
    """Absolute names, names that climb, links: spooled under our names or refused."""
    evil = ["../../evil.mp4", f"{tmp_path}/abs.mp4", "x\\..\\evil.mp4", "a/../../e.mp4", "C:\\x.mp4"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/z.zip").write_bytes(zip_bytes(dict.fromkeys(evil, VIDEO) | {"../../up/f_1.jpg": b"j"}))
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.mp4")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../etc/passwd"
    tar = tar_bytes({**dict.fromkeys(evil, VIDEO), "link": link, "hard": hard})
    (tmp_path / "in/t.tar").write_bytes(tar)
    (tmp_path / "deep/er").mkdir(parents=True)
    videos = by_uri(tmp_path / "in")
    assert len(videos) == 2 * len(evil) + 3
    before = sorted(tmp_path.rglob("*"))
    for uri, video in videos.items():
        if uri.endswith(("link.mp4", "hard.mp4")):
            assert "link" in refusal(video, tmp_path / "deep/er/spool").message
        else:
            assert next(iter(content(video, tmp_path / "deep/er/spool"))) in ("video.mp4", "0000000_1.jpg")
    (tmp_path / "deep/er/spool").rmdir()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.mp4")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "a link inside an archive" in refusal(by_uri(tmp_path)["z.zip/link.mp4"], tmp_path / "s").message


def test_bombs_are_refused_and_only_they(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacache.pipeline.inputs.fetching.MAX_VIDEO_BYTES", 1 << 20)
    many = {f"many/f_{n}.jpg": bytes(1 << 18) for n in range(5)}
    (tmp_path / "z.zip").write_bytes(zip_bytes({"big.mp4": bytes(2 << 20), "ok.mp4": VIDEO, **many}))
    videos = by_uri(tmp_path)
    for uri in ("z.zip/big.mp4", "z.zip/many"):
        error = refusal(videos[uri], tmp_path / "spool")
        assert error.reason is FailureReason.TOO_LARGE
        assert "its archive claims" in error.message
    assert content(videos["z.zip/ok.mp4"], tmp_path / "spool") == {"video.mp4": VIDEO}


def test_a_member_that_is_larger_than_it_says_is_not_unpacked(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"big.mp4": bytes(1 << 20)}))
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<L", data, at + 24, 1000)
    (tmp_path / "z.zip").write_bytes(data)
    error = refusal(by_uri(tmp_path)["z.zip/big.mp4"], tmp_path / "spool")
    assert error.reason is FailureReason.CORRUPT_STREAM


def test_damage_costs_what_is_damaged(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.mp4": VIDEO, "b.mp4": VIDEO}, zipfile.ZIP_STORED))
    data[100] ^= 1
    (tmp_path / "z.zip").write_bytes(data)
    videos = by_uri(tmp_path)
    assert refusal(videos["z.zip/a.mp4"], tmp_path / "spool").reason is FailureReason.CORRUPT_STREAM
    assert content(videos["z.zip/b.mp4"], tmp_path / "spool") == {"video.mp4": VIDEO}


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
@pytest.mark.parametrize(("data", "reason"), [(b"", "empty_file"), (b"no archive" * 100, "corrupt_stream")])
def test_what_is_no_archive_is_one_failed_video(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.mp4").write_bytes(VIDEO)
    videos = by_uri(tmp_path)
    assert list(videos) == ["good.mp4", name]
    assert refusal(videos[name], tmp_path / "spool").reason.value == reason


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.mp4": VIDEO}, zipfile.ZIP_STORED))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(mark) + place] |= 1
    (tmp_path / "z.zip").write_bytes(data)
    assert "encrypted" in refusal(by_uri(tmp_path)["z.zip/a.mp4"], tmp_path / "spool").message


def test_a_damaged_header_in_a_tar_ends_it_with_a_failure(tmp_path: Path) -> None:
    """tarfile itself takes it for the end, and the videos behind it would be lost without a word."""
    data = bytearray(tar_bytes({f"{n}.mp4": VIDEO for n in range(4)}, tarfile.USTAR_FORMAT))
    data[2 * (512 + 5120) + 150] ^= 1
    (tmp_path / "s.tar").write_bytes(data)
    videos = by_uri(tmp_path)
    assert list(videos) == ["s.tar", "s.tar/0.mp4", "s.tar/1.mp4"]
    assert "cannot be read from byte 11264 on" in refusal(videos["s.tar"], tmp_path / "spool").message


def test_a_tar_that_was_cut_off_keeps_what_is_whole(tmp_path: Path) -> None:
    data = tar_bytes({"a.mp4": VIDEO, "b.mp4": VIDEO}, tarfile.USTAR_FORMAT)
    (tmp_path / "s.tar").write_bytes(data[: 512 + 5120 + 512 + 3000])
    videos = by_uri(tmp_path)
    assert content(videos["s.tar/a.mp4"], tmp_path / "spool") == {"video.mp4": VIDEO}
    assert refusal(videos["s.tar/b.mp4"], tmp_path / "spool").reason is FailureReason.TRUNCATED


def test_a_tar_of_negative_or_absurd_sizes_ends(tmp_path: Path) -> None:
    for name, size in (("negative.tar", -512), ("absurd.tar", 1 << 60)):
        header = bytearray(tar_bytes({"a.mp4": b""}, tarfile.GNU_FORMAT)[:512])
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[156:157] = b"x" if size > 0 else b"0"
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % sum(header)
        (tmp_path / name).write_bytes(bytes(header) * 3)
    assert list(by_uri(tmp_path)) == ["absurd.tar", "negative.tar"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_mutated_archives_neither_crash_nor_hang(tmp_path: Path, kind: str) -> None:
    members = {"a.mp4": VIDEO[:500], **{name: data[:80] for name, data in FRAMES.items()}}
    whole = zip_bytes(members) if kind == "zip" else tar_bytes(members)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/sound.mp4").write_bytes(b"sound")
    ends = set[str]()
    for seed in range(300):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        (tmp_path / "in" / f"x.{kind}").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for video in by_uri(tmp_path / "in").values():
            try:
                with fetched(video.path, tmp_path) as result:
                    ends.add("read" if Path(result.path).exists() else "lost")
            except VideoRefusedError as error:
                ends.add(error.reason.value)
    assert {"read", "corrupt_stream"} <= ends
    assert "lost" not in ends


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "z.zip"
    path.write_bytes(zip_bytes({"a.mp4": b"old"}))
    before = by_uri(tmp_path)["z.zip/a.mp4"]
    assert content(before, tmp_path / "spool") == {"video.mp4": b"old"}
    path.write_bytes(zip_bytes({"a.mp4": b"new"}))
    os.utime(path, ns=(1, 1))
    after = by_uri(tmp_path)["z.zip/a.mp4"]
    assert after.version != before.version
    assert after.path == before.path
    assert content(after, tmp_path / "spool") == {"video.mp4": b"new"}
    archives.open_zips.close()


def test_backslashes_of_windows_part_folders(tmp_path: Path) -> None:
    """Two folders of frames were one video with interleaved frames."""
    frames = {f"{run}\\cam\\f_{n}.5.jpg": f"{run}{n}".encode() for run in ("a", "b") for n in range(3)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"a\\": b"", **frames, "clips\\v.mp4": VIDEO}.items():
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.create_system = 0
            archive.writestr(info, data)
    (tmp_path / "w.zip").write_bytes(buffer.getvalue())
    videos = by_uri(tmp_path)
    assert {uri: video.size_bytes for uri, video in videos.items()} == {
        "w.zip/a/cam": 6, "w.zip/b/cam": 6, "w.zip/clips/v.mp4": 5000,
    }  # fmt: skip
    assert sorted(content(videos["w.zip/a/cam"], tmp_path / "spool").values()) == [b"a0", b"a1", b"a2"]
    assert list(content(videos["w.zip/clips/v.mp4"], tmp_path / "spool").values()) == [VIDEO]


def test_a_backslash_in_a_name_of_unix_stays(tmp_path: Path) -> None:
    (tmp_path / "u.zip").write_bytes(zip_bytes({"a/b.mp4": b"1", "a\\b.mp4": b"2", "c\\d.mp4": b"3"}))
    assert set(by_uri(tmp_path)) == {"u.zip/a/b.mp4", "u.zip/a\\b.mp4", "u.zip/c\\d.mp4"}


@pytest.mark.parametrize("name", ["k.tar.gz", "k.tgz", "k.tar.bz2", "k.tar.xz", "k.tar.zst", "k.tar"])
def test_compressed_tars_of_videos_are_counted(name: str, tmp_path: Path) -> None:
    """Kinetics ships as .tar.gz, which was passed over; such a file named .tar was called damaged."""
    pack = {
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }
    packed = pack.get(name.rpartition(".")[2], gzip.compress)
    (tmp_path / name).write_bytes(packed(tar_bytes({"readme.txt": b"x", "class/v.mp4": VIDEO})))
    (tmp_path / f"annotations-{name}").write_bytes(packed(tar_bytes({"train.csv": b"x"})))
    (tmp_path / "a.mp4").write_bytes(b"v")
    videos = by_uri(tmp_path)
    assert set(videos) == {name, "a.mp4"}
    refused = refusal(videos[name], tmp_path / "spool")
    assert refused.reason is FailureReason.COMPRESSED_ARCHIVE
    assert "can only be read from its beginning: unpack it first" in refused.message
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    assert refusal(by_uri(tmp_path)[name], tmp_path / "spool").reason is FailureReason.CORRUPT_STREAM
    (tmp_path / name).write_bytes(tar_bytes({"v.mp4": VIDEO}))  # unpacked by the program that fetched it
    assert set(by_uri(tmp_path)) == {f"{name}/v.mp4", "a.mp4"}


def test_sparse_members_say_what_they_are(tmp_path: Path) -> None:
    info = tarfile.TarInfo("v.mp4")
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "5", "GNU.sparse.major": "0"}
    (tmp_path / "s.tar").write_bytes(tar_bytes({"v.mp4": info, "w.mp4": VIDEO}))
    videos = by_uri(tmp_path)
    assert "stored as a sparse file" in refusal(videos["s.tar/v.mp4"], tmp_path / "spool").message
    assert list(content(videos["s.tar/w.mp4"], tmp_path / "spool").values()) == [VIDEO]
