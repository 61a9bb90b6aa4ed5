"""Running on a cluster that is there already."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from command_runs import Command
from slow_source import slow_source

import deltacache
from chaos import Nodes, nodes
from deltacache.pipeline.cluster.tasks import run_tasks
from deltacache.schemas.errors import DeltacacheError

ASK = """
import ray
from deltacache.pipeline.cluster.session import cluster
from deltacache.schemas.jobs import ClusterSettings
with cluster(ClusterSettings(ray_address={address!r})):
    @ray.remote
    def where():
        import deltacache.pipeline.work.attempts
        return deltacache.pipeline.work.attempts.__file__
    print(ray.get(where.remote()))
"""


@pytest.fixture(scope="module")
def one_node() -> Iterator[Nodes]:
    """A cluster of one node."""
    with nodes(1) as cluster:
        yield cluster


def test_workers_run_the_code_of_the_driver_and_not_what_is_installed_with_them(
    one_node: Nodes, tmp_path: Path
) -> None:
    package = Path(deltacache.__file__).parent
    shutil.copytree(package, tmp_path / "deltacache", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "deltacache" / "pipeline" / "work" / "attempts.py").open("a") as file:
        file.write("\n__file__ += ' of the driver'\n")
    asked = subprocess.run(
        [sys.executable, "-c", ASK.format(address=one_node.address)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd="/",  # workers on the same machine look into the driver's folder too
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip().endswith("attempts.py of the driver")
    assert str(tmp_path) not in asked.stdout


START = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
HEAD = ("start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--block")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster that asks for a token, as ``ray start`` does where a Ray has left one, without deltacache in it.

    Yields ``HOME``, where the token lies, and ``ADDRESS``.
    """
    folder = tmp_path_factory.mktemp("ray")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # but not what its .pth files add
    python = folder / "venv" / "bin" / "python"
    imported = subprocess.run(
        [python, "-c", "import deltacache"],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        check=False,
    )
    assert imported.returncode
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    home = {"HOME": str(folder)}
    session = Path("/tmp") / f"ray-{os.getpid()}"  # Ray's sockets need a short path
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [python, "-c", START, *HEAD, f"--temp-dir={session}", "--object-store-memory=100000000"],
            env={**os.environ, **home, "PYTHONPATH": ""},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 90
        while "--block" not in (folder / "log").read_text():
            assert head.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield {**home, "ADDRESS": (session / "ray_current_cluster").read_text().strip()}
    finally:
        processes = [head, *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        head.wait(30)
        for process in psutil.wait_procs(processes[1:], 10)[1]:
            process.kill()
        shutil.rmtree(session, ignore_errors=True)


@pytest.fixture
def videos(tmp_path: Path, real_videos: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("rabbit_vp8.webm", "kinetics_flipping_a_pancake.mkv"):
        (folder / name).symlink_to(real_videos / "fixture" / name)
    return folder


def test_a_cluster_without_deltacache_and_with_a_token_does_the_work(
    deltacache_process: Command,
    guarded: dict[str, str],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ("--backbone", "tiny", "--image-size", 32, "--ray-address", guarded["ADDRESS"])
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")  # seconds that Ray itself tries, instead of 20
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("HOME", str(tmp_path))
        deltacache_process("extract-features", videos, tmp_path / "out", *flags).refused(
            "RAY_AUTH_MODE=token"
        )
    monkeypatch.setenv("HOME", guarded["HOME"])
    done = deltacache_process("extract-features", videos, tmp_path / "out", *flags).done()
    assert "2 clips of 2 videos" in done.stdout
    found = re.search(r"Ray cluster at (\S+): 1 node, 2 CPUs \(2 free\), 0 GPUs", done.stdout)
    assert found
    assert found[1] == guarded["ADDRESS"]
    assert done.stdout.index(found[0]) < done.stdout.index("1 decoder")


def test_a_port_where_something_else_listens_is_refused_at_once(
    deltacache_process: Command, videos: Path, tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        asked = deltacache_process(
            "extract-features", videos, tmp_path / "out", "--backbone", "tiny", "--ray-address", address,
            timeout=60,
        )  # fmt: skip
        asked.refused(address, "is not Ray", "6379")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


MOUNTED = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'


def test_an_output_that_the_nodes_do_not_share_is_refused_and_does_not_open(
    one_node: Nodes, videos: Path, tmp_path: Path
) -> None:
    """The command runs where another disk lies under the path of the output: as on a node that does not share it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--mount", "sh", "-c", MOUNTED, "sh", str(disk)]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a disk of one process cannot be mounted here")
    out = disk / "features"
    extract = [
        "-m",
        "deltacache",
        "extract-features",
        "--backbone",
        "tiny",
        "--image-size",
        "32",
        "--videos-per-shard",
        "1",
    ]
    opened = f"from deltacache.pipeline.datasets.dataset import open_dataset; open_dataset({str(out)!r})"
    script = 'PYTHON=$1; OPEN=$2; shift 2; "$PYTHON" "$@"; echo "code $?"; exec "$PYTHON" -c "$OPEN"'
    arguments = [*extract, videos, out, "--ray-address", one_node.address]
    done = subprocess.run(
        [*alone, "sh", "-c", script, "sh", sys.executable, opened, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "code 1" in done.stdout, done
    assert done.returncode == 1
    said, _, opening = done.stderr.partition("Traceback")
    assert f"was not committed: {out}/.lock is not there on {platform.node()}" in said
    assert "all nodes and the next command must see one output folder" in said
    assert not list((out / "receipts").glob("*")), "nothing is committed where the workers run"
    assert (
        f"{out} is not finished: 2 planned shards are missing" in opening
        or "its tables do not hold" in opening
    )


def test_nodes_from_zero_are_waited_for_up_to_a_limit(
    deltacache_process: Command, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes(1, num_cpus=0) as cluster:
        address = cluster.address
        command = ["extract-features", videos, tmp_path / "out", "--backbone", "tiny", "--image-size", 32]
        # Two encoders and a decoder, for which one node of two CPUs is enough.
        command += ["--encoders", 2, "--decoders", 2, "--ray-address", address, "--wait-for-nodes"]
        refused = deltacache_process(*command, 2)
        refused.refused("leave none for decoding", "waited 2 s for nodes")
        assert "waiting for the cluster to grow, 0 of at most 2 s" in refused.stdout
        with pytest.raises(DeltacacheError, match="offer none"):
            list(run_tasks(lambda device: None, [1], 1, address, wait_s=0))
        log = tmp_path / "log"
        with log.open("w") as output:
            monkeypatch.setenv("RAY_ADDRESS", address)
            found = [each if each != address else "auto" for each in command]
            driver = subprocess.Popen(
                [sys.executable, "-m", "deltacache", *map(str, [*found, 120])], stdout=output, stderr=output
            )
        try:
            deadline = time.monotonic() + 120
            while "waiting for the cluster to grow" not in log.read_text():
                assert driver.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            cluster.add()
            assert driver.wait(200) == 0, log.read_text()
        finally:
            driver.kill()
            driver.wait()
    said = log.read_text()
    assert f"Ray cluster at {address}: 1 node, 0 CPUs" in said
    assert "look whether it is yours" in said
    assert "1 decoder, not 2" in said
    assert "2 clips of 2 videos" in said


def test_as_many_videos_are_decoded_as_there_are_decoders(
    deltacache_process: Command, real_videos: Path, tmp_path: Path
) -> None:
    """Six of them for one encoder; its two shards of one video make two groups, were there no others."""
    video, out = real_videos / "fixture" / "rabbit_vp8.webm", tmp_path / "out"
    with slow_source(video.read_bytes(), delay_s=6) as source:  # long beside the work on a busy machine
        flags = ["--backbone", "tiny", "--image-size", 32, "--decoders", 6, "--encoders", 1]
        videos = source.write_list(tmp_path / "list.txt", 18)
        deltacache_process("extract-features", videos, out, *flags, "--videos-per-shard", 1).done()
    assert 5 <= source.most <= 6
