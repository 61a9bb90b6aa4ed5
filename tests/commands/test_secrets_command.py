"""Planted credentials, searched for in every byte that a command writes or prints."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_runs import Command, Outcome

from web_server import Web, web_server

# One of each kind; a search for these words finds whatever stems from them.
USER, PASSWORD, SIGNATURE, KEY_ID, TOKEN = (
    "planteduser",
    "plantedpassword",
    "plantedsignature",
    "PLANTEDKEYID",
    "plantedtoken",
)
PLANTED = re.compile(b"planted", re.IGNORECASE)
FLAGS = ("--backbone", "tiny", "--image-size", 32, "--frames", 2, "--videos-per-shard", 2, "--retry-for", 1)
FLAGS += ("--precision", "float32")  # or every command would ask a Ray of its own
SIGNED = (
    f"?X-Amz-Credential={KEY_ID}%2Fus&X-Amz-Security-Token={TOKEN}&X-Amz-Signature=1&Signature={SIGNATURE}"
)


@pytest.fixture(scope="module")
def deltacache(deltacache_process: Command) -> Command:
    """In processes of their own."""
    return deltacache_process


@pytest.fixture
def web(real_videos: Path) -> Iterator[Web]:
    video = (real_videos / "fixture/rabbit_vp8.webm").read_bytes()
    files = {f"/v/{name}.webm": video for name in ("good", "also", "busy")}
    files |= {"/v/corrupt.webm": b"no video", "/v/forbidden.webm": b""}
    with web_server(Web(files=files, password=f"{USER}:{PASSWORD}", signature=SIGNATURE)) as running:
        running.statuses = {"/v/busy.webm": [503], "/v/forbidden.webm": [403]}
        yield running


def clean(outcome: Outcome, *folders: Path) -> Outcome:
    """No byte of what was printed or written has anything that was planted."""
    assert not PLANTED.search(outcome.stdout.encode() + outcome.stderr.encode()), outcome
    for folder in folders:
        for file in folder.rglob("*"):
            assert not PLANTED.search(str(file.relative_to(folder)).encode()), file
            if file.is_file() and not file.is_symlink():
                found = PLANTED.search(content := file.read_bytes())
                assert not found, (file, content[max(found.start() - 200, 0) : found.end() + 50])
    return outcome


@pytest.mark.timeout(600)
def test_no_byte_has_credentials(
    deltacache: Command, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ray = Path("/tmp") / f"r{os.getpid()}"  # sockets have short names
    monkeypatch.setenv("RAY_TMPDIR", str(ray))
    monkeypatch.setenv("RAY_enable_export_api_write", "1")  # what Ray's dashboard shows is in files too
    url = web.url.replace("://", f"://{USER}:{PASSWORD}@")
    names = ("good", "busy", "corrupt", "forbidden", "gone", "also")
    lines = [f"{url}/v/{name}.webm{SIGNED}&id={name}" for name in names]
    lines += [
        f"s3://{KEY_ID}:{PASSWORD}@bucket/a.mp4",
        f"s3:/{KEY_ID}:{PASSWORD}@bucket/a.mp4",
        f"simplecache::{url}/v/good.webm{SIGNED}",
        f"ftp://{USER}:{PASSWORD}@h/a.mp4",
    ]
    videos = tmp_path / "list.txt"
    videos.write_text("\n".join(lines))

    def refused(source: object, *more: object) -> dict[str, str]:
        """Reasons and messages by uri after a run."""
        outcome = deltacache("extract-features", source, out, *FLAGS, "--max-failed-fraction", 0.9, *more)
        clean(outcome, out, ray).done()
        rows = pq.read_table(out / "failures.parquet").to_pylist()
        return {row["video_uri"]: f"{row['reason']}: {row['message']}" for row in rows}

    try:
        rows = refused(videos)
        assert any(ray.rglob("event_EXPORT_DRIVER_JOB.log"))
        busy = f"{web.url}/v/busy.webm?id=busy"
        assert rows.pop(busy).startswith("unavailable: ClientResponseError, HTTP status 503, also when tried")
        others = {f"{web.url}/v/{name}.webm?id={name}" for name in ("corrupt", "forbidden", "gone")}
        others |= {"s3://bucket/a.mp4", "s3:/bucket/a.mp4", "ftp://h/a.mp4"}
        assert rows.keys() == others | {f"simplecache::{web.url}/v/good.webm"}
        # What may pass is tried by itself, with other credentials of the same videos, which are on the command line.
        web.statuses.clear()
        web.files["/v/forbidden.webm"] = web.files["/v/good.webm"]
        web.signature = "plantedrenewed"
        renewed = "\n".join(lines).replace(SIGNATURE, web.signature).replace("Signature=1", "Signature=2")
        web.files["/v/list.txt"] = renewed.encode()
        source = f"{url}/v/list.txt?Signature={web.signature}"
        assert refused(source) == rows
        assert len(pq.read_table(out / "index.parquet")) == 3
        assert f"source: {web.url}/v/list.txt\n" in (out / "config.yaml").read_text()
        # Whatever else is refused waits for the flag, under the same name.
        del rows[f"{web.url}/v/forbidden.webm?id=forbidden"]
        assert refused(source, "--retry-failed", "--encoders", 0) == rows  # without Ray, too
        assert len(pq.read_table(out / "index.parquet")) == 4
        clean(deltacache("inspect", out)).done()
        clean(deltacache("verify", out)).done()
    finally:
        shutil.rmtree(ray, ignore_errors=True)


def test_no_refusal_has_credentials(deltacache: Command, web: Web, tmp_path: Path) -> None:
    out, videos = tmp_path / "out", tmp_path / "list.txt"
    url = web.url.replace("://", f"://{USER}:{PASSWORD}@")
    videos.write_text(f"{url}/v/gone.webm{SIGNED}\n")

    def refused(*arguments: object) -> Outcome:
        outcome = clean(deltacache(*arguments), out)
        assert outcome.code in (1, 2), outcome
        return outcome

    extract = ("extract-features", *FLAGS)
    gone, forbidden = f"{url}/v/gone.txt{SIGNED}", f"{url}/v/forbidden.webm{SIGNED}"
    refused(*extract, videos, out).refused("none of the 1 videos", f"{web.url}/v/gone.webm")
    refused(*extract, gone, out, "--dry-run").refused(f"{web.url}/v/gone.txt does not exist")
    failed = refused("--debug", *extract, forbidden, out).stderr
    assert "Traceback" in failed
    assert f"message='Forbidden', url='{web.url}/v/forbidden.webm'" in failed
    refused(*extract, videos, f"s3://{KEY_ID}:{PASSWORD}@bucket/out").refused(
        "s3://bucket/out was given with"
    )
    refused(*extract, videos, out, gone).refused("extra argument", f"{web.url}/v/gone.txt")
    refused("tokenize", *FLAGS, gone, out, "--tokenizer", url).refused("does not exist")
    refused("inspect", gone).refused("does not exist")
    refused("report", gone).refused("cannot be read")
