"""``deltacache doctor``: what a user runs first, whatever is missing, and pastes into a report."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_runs import Outcome

from deltacache.doctor.measured import (
    CHAINS,
    FORWARD,
    KINETICS_VIDEOS,
    TOKENIZER,
    WORLD,
    Measurement,
    Operations,
    seconds_of,
    stages_of,
)
from deltacache.schemas.configs import tokenizer_preset, world_preset

PLANTED = re.compile("planted", re.IGNORECASE)


class Gate(BaseHTTPRequestHandler):
    """A hub that knows the backbone and lets nobody have it."""

    tokens: ClassVar[list[str | None]] = []

    def do_HEAD(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def gated_hub() -> Iterator[int]:
    Gate.tokens.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def doctor(*arguments: object, python: Path | str = sys.executable) -> Outcome:
    """In a process of its own: the hub's package reads the environment while it is imported."""
    command = [str(each) for each in (python, "-m", "deltacache", "doctor", *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def problems_of(report: dict) -> str:
    return "\n".join(f"{each['what']} -> {each['way_out']}" for each in report["problems"])


@pytest.mark.timeout(400)
def test_a_measured_report_has_no_secrets(
    gated_hub: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": f"http://127.0.0.1:{gated_hub}",
        "HF_TOKEN": "hf_plantedtoken",
        "HTTPS_PROXY": "planteduser:plantedpassword@proxy.example:3128",
        "ALL_PROXY": "http://planteduser:planted@password@proxy.example:3128",
        "NO_PROXY": "127.0.0.1",
        "RAY_ADDRESS": "ray://planteduser:plantedpassword@head:10001",
        "AWS_SECRET_ACCESS_KEY": "plantedkey",
        "AWS_ENDPOINT_URL": "https://store.example/?X-Amz-Signature=plantedsignature",
        "TMPDIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    said = doctor("--measure", "--json", "--output", tmp_path / "new" / "out").done()
    assert not PLANTED.search(said.stdout + said.stderr), said
    report = json.loads(said.stdout)
    assert report["healthy"]
    assert report["versions"]["torch"]
    assert report["versions"]["FFmpeg of PyAV"]
    assert report["machine"]["cores_allowed"] == len(os.sched_getaffinity(0))
    assert 0 < report["machine"]["memory_free_bytes"] <= report["machine"]["memory_bytes"]
    assert [each["use"] for each in report["disks"][:3]] == ["here", "output", "temporary"]
    assert report["environment"]["HTTPS_PROXY"] == report["environment"]["ALL_PROXY"].removeprefix("http://")
    assert Gate.tokens == ["Bearer hf_plantedtoken"]  # asked with the token, which nobody sees
    assert report["hub"]["token"] is True
    assert (report["hub"]["reachable"], report["hub"]["access"]) == (True, "gated")
    assert "is gated, and the token that is set has no access to it -> accept its licence" in problems_of(
        report
    )
    assert "RAY_ADDRESS (ray://head:10001) is not read" in problems_of(report)

    measured = report["measured"]
    assert measured["took_s"] < 60  # on cores that other tests share, too
    assert all(rate > 1 for rate in measured["decode_clips_per_s"].values())
    assert measured["disk"]["write_bytes_per_s"] > 1e6
    stages = {name: [each["stage"] for each in chain] for name, chain in measured["chains"].items()}
    assert stages["released"] == [
        "features 256 px", "features 512 px", "tokenizer 256px", "tokenizer 512px", "tokenizer cooldown1",
        "tokenizer cooldown2", "tokenize", "world model main", "world model cooldown",
    ]  # fmt: skip
    assert stages["paper"] == [each for each in stages["released"] if "tokenizer cool" not in each]
    hours = {each["stage"]: each["hours"] for each in measured["chains"]["released"]}
    precision = next(iter(hours["tokenize"]))
    # 500,000 and 50,000 further steps of the same model; 300,000 and 5,000
    assert hours["tokenizer 512px"][precision] == pytest.approx(10 * hours["tokenizer cooldown1"][precision])
    assert hours["world model main"][precision] == pytest.approx(
        60 * hours["world model cooldown"][precision]
    )
    assert list(tmp_path.glob(".deltacache*")) == []
    assert not (tmp_path / "new").exists()


def test_the_operations_that_are_shipped_are_those_that_are_counted() -> None:
    """Where they differ, write ``json.dumps(counted.counted, indent=1)`` there."""
    counted, nothing = Operations(), Measurement("cpu", 1, {"float32": 1.0, "bfloat16": 1.0})
    tokenizer, world = tokenizer_preset("released"), world_preset("released")
    parts = counted.encoder(tokenizer, 256, 2), counted.pair(tokenizer, 256, 2), counted.clip(world, 2)
    assert min(parts) > 1e9
    for chain in CHAINS:
        assert stages_of(chain, nothing, counted)
    assert Operations.shipped().counted == counted.counted


def test_the_hours_in_the_readme_are_those_of_the_estimate() -> None:
    """At 200 TFLOP/s, as it says there."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"for {KINETICS_VIDEOS:,} videos" in text
    assert "divided by 200 TFLOP/s" in text
    rates = dict.fromkeys((FORWARD, TOKENIZER, WORLD), 2e14)
    assumed = Measurement(
        "cuda", KINETICS_VIDEOS, {"float32": 1.0, "bfloat16": 2.0}, model_flop_per_s={"bfloat16": rates}
    )
    for chain in CHAINS:
        stages = stages_of(chain, assumed, Operations.shipped())
        parts = [
            sum(each.hours("bfloat16") for each in stages if each.name.startswith(begin))
            for begin in ("features", "tokenizer ", "tokenize", "world model", "")
        ]
        parts[2] -= parts[1]  # "tokenize" alone
        cells = [f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}" for hours in parts]
        assert f"| `{chain}` | {' | '.join(cells)} |" in text


def test_past_the_deadline_one_run_of_a_model_is_enough() -> None:
    runs = list[float]()
    for deadline, expected in ((0.0, 1), (float("inf"), 3)):
        runs.clear()
        assert seconds_of(lambda: runs.append(0.0), torch.device("cpu"), deadline) >= 0
        assert len(runs) == expected


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://planteduser:planted@127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        began = time.monotonic()
        said = doctor("--output", "s3://planted:planted@bucket/out").done()
    assert time.monotonic() - began < 100
    assert not PLANTED.search(said.stdout + said.stderr), said
    assert "the hub does not answer" in said.stdout
    assert "s3://bucket/out: an object store, not looked at" in said.stdout


def bare_python(folder: Path, *hidden: str) -> Path:
    """An environment with everything that this one has but some packages, as if they were never installed."""
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    (source,) = {Path(importlib.util.find_spec(name).origin or "").parents[1] for name in ("torch", "typer")}
    for entry in source.iterdir():
        if re.split(r"[-.]", entry.name)[0] not in hidden and not entry.name.endswith(".pth"):
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def test_a_machine_with_torch_and_transformers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    bare = "ray", "decord", "decord2", "av", "zarr", "webdataset"
    said = doctor(python=bare_python(tmp_path / "bare", *bare)).done().stdout
    for distribution in ("ray", "decord2", "av", "zarr", "webdataset"):
        assert re.search(rf"- {distribution} is not installed: .* will not work\n  -> pip install", said), (
            said
        )
    assert re.search(r"^  ray +none$", said, re.MULTILINE)
    assert "not tried: offline mode" in said
    assert "offline mode (HF_HUB_OFFLINE), and facebook/dinov3" in said
    broken = doctor(python=bare_python(tmp_path / "broken", "crc32c", "ray"))
    assert broken.code == 1
    assert "- crc32c is not installed\n  -> pip install" in broken.stdout
    assert sys.executable not in said
