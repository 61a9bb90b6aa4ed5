"""What ``doctor`` finds: versions, machine, devices, disks, hub and Ray, and the problems among them.

Nothing here needs more than torch and transformers. Packages are imported in a process of their own, so that one that
crashes is a line of the report.
"""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from deltacache import __version__
from deltacache.models.devices import free_bytes
from deltacache.models.flops import product_rate
from deltacache.schemas.jobs import DEFAULT_BACKBONE
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.texts import bytes_text

Facts = dict[str, Any]

_CHILD_S, _HUB_S, _PORT_S = 60.0, 6.0, 1.0
_GIB = 2**30
_NEEDED: Mapping[str, tuple[str, str | None]] = {  # module: distribution, what does not work without it
    "torch": ("torch", None),
    "transformers": ("transformers", None),
    "numpy": ("numpy", None),
    "pyarrow": ("pyarrow", None),
    "ray": ("ray", "extract-features, tokenize, demo, run, and --workers"),
    "decord": ("decord2", "decoding videos, other than by PyAV"),
    "av": ("av", "decoding videos"),
    "zarr": ("zarr", "datasets with --store zarr"),
    "webdataset": ("webdataset", "datasets with --store webdataset, the default"),
    "cv2": ("opencv-python-headless", "resizing frames, demo, the benchmarks"),
    "crc32c": ("crc32c", None),
    "s3fs": ("s3fs", "data on s3://"),
    "matplotlib": ("matplotlib", "curves.png and reports"),
    "tensorboard": ("tensorboard", "training curves"),
}
_SHOWN = re.compile(
    r"HF_(HOME|HUB_\w+|ENDPOINT)|TRANSFORMERS_(OFFLINE|CACHE)|CUDA_VISIBLE_DEVICES|(OMP|MKL)_NUM_THREADS|OMP_WAIT_POLICY"
    r"|PYTORCH_\w+|RAY_(ADDRESS|TMPDIR|AUTH_MODE)|TMPDIR|(HTTPS?|ALL|NO)_PROXY|AWS_(ENDPOINT_URL\w*|REGION|PROFILE)"
    r"|FSSPEC_\w+|PYTHONPATH|VIRTUAL_ENV|CONDA_DEFAULT_ENV|SLURM_JOB_ID",
    re.IGNORECASE,
)
"""Variables that change what a command does; no others are shown."""
_SECRET_NAME = re.compile(
    r"token|secret|passw|pwd|credential|auth|api_?key|access_?key|signature", re.IGNORECASE
)
_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(name, end=" ", flush=True)
    try:
        module = importlib.import_module(name)
        found = {"version": str(getattr(module, "__version__", ""))}
        if name == "av":
            found["ffmpeg"] = str(module.ffmpeg_version_info)
    except ModuleNotFoundError as error:
        found = {"missing" if error.name == name else "error": str(error)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True, slots=True)
class SetupProblem:
    """What is wrong, the way out, and whether no command works with it."""

    what: str
    way_out: str
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found, by section, and the problems; all text in it is free of credentials."""

    facts: Facts
    problems: Sequence[SetupProblem]

    @property
    def healthy(self) -> bool:
        """Whether nothing essential is broken."""
        return not any(problem.essential for problem in self.problems)


def examine(output: str | None = None) -> Examination:
    """Look at this machine, in some ten seconds; writes nothing but a small file that is removed again.

    Args:
        output: a folder that a command would write.
    """
    problems: list[SetupProblem] = []
    packages = subprocess.Popen(
        [sys.executable, "-c", _IMPORTS, *_NEEDED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    answers: Facts = {}
    hub = threading.Thread(
        target=_ask_hub, args=(answers,), daemon=True
    )  # a name server may hang for minutes
    hub.start()
    asked = time.monotonic()
    facts: Facts = {
        "machine": _machine(),
        "devices": _devices(problems),
        "disks": _disks(output, problems),
        "ray": _ray(problems),
    }
    facts = {"versions": _versions(packages, problems), **facts}
    hub.join(max(0.0, asked + _HUB_S - time.monotonic()))
    facts["hub"] = _hub(dict(answers), problems)
    facts["environment"] = {
        name: _without_user(value) if "://" in value or "proxy" in name.lower() else value
        for name, value in sorted(os.environ.items())
        if _SHOWN.fullmatch(name) and value
    }
    found = [SetupProblem(_cleaned(each.what), _cleaned(each.way_out), each.essential) for each in problems]
    return Examination(_cleaned(facts), found)


def _versions(packages: "subprocess.Popen[str]", problems: list[SetupProblem]) -> Facts:
    versions: Facts = {"Python": platform.python_version(), "deltacache": __version__}
    try:
        told, _ = packages.communicate(timeout=_CHILD_S)
    except subprocess.TimeoutExpired:
        packages.kill()
        told, _ = packages.communicate()
    found: Facts = {}
    for line in told.splitlines():
        name, _, answer = line.partition(" ")
        found[name] = json.loads(answer) if answer else {"error": "importing it crashes or hangs"}
    wanted = _requirements()
    for module, (distribution, without) in _NEEDED.items():
        about = found.get(module, {"error": "importing the one before it crashes"})
        version = about.get("version")
        if not version:  # what cannot be imported may be installed
            with suppress(metadata.PackageNotFoundError):
                version = metadata.version(distribution)
        versions[module] = version if "version" in about else None
        if "ffmpeg" in about:
            versions["FFmpeg of PyAV"] = about["ffmpeg"]
        needed = wanted.get(distribution)
        install = f"pip install '{needed or distribution}'"
        lost = f": {without} will not work" if without else ""
        if "missing" in about:
            problems.append(SetupProblem(f"{distribution} is not installed{lost}", install, without is None))
        elif "error" in about:
            way = f"pip install --force-reinstall '{needed or distribution}'"
            problems.append(
                SetupProblem(
                    f"{distribution} {version or ''} cannot be imported ({about['error']}){lost}",
                    way,
                    without is None,
                )
            )
        elif needed is not None and version and not _satisfies(version, needed):
            problems.append(
                SetupProblem(f"{distribution} {version} is not what deltacache needs ({needed})", install)
            )
    versions["CUDA of torch"] = torch.version.cuda
    versions["cuDNN"] = torch.backends.cudnn.version() if torch.version.cuda else None
    versions["NVIDIA driver"] = _driver()
    return versions


def _requirements() -> dict[str, str]:
    """Distribution to requirement, such as ``zarr>=3.1``, where deltacache is installed."""
    try:
        lines = metadata.requires("deltacache") or []
    except metadata.PackageNotFoundError:
        return {}
    plain = [line for line in lines if ";" not in line]
    return {re.split(r"[\[<>=!~ ]", line, maxsplit=1)[0]: line for line in plain}


def _satisfies(version: str, requirement: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    try:
        return Requirement(requirement).specifier.contains(version, prereleases=True)
    except (InvalidRequirement, InvalidVersion):
        return True


def _driver() -> str | None:
    about = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", about.read_text()) if about.exists() else None
    return found[1] if found else None


def _machine() -> Facts:
    from deltacache.models.devices import processor_kind

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = None
    try:
        spent, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = int(spent) / int(period)
    except (OSError, ValueError):  # no such control group, or "max": no limit
        pass
    return {
        "system": platform.platform(),
        "cpu": processor_kind()["cpu"],
        "instructions": [name for name, there in torch.cpu.get_capabilities().items() if there is True],
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "cores_quota": quota,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_free_bytes": free_bytes(torch.device("cpu")),
    }


def _devices(problems: list[SetupProblem]) -> list[Facts]:
    """The CPU and what else torch can use, each with the rate of its products in float32 and bfloat16."""
    found = [_rates(torch.device("cpu"), {"name": "cpu"})]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            try:
                about = torch.cuda.get_device_properties(device)
                free, total = torch.cuda.mem_get_info(device)
                found.append(
                    _rates(
                        device,
                        {
                            "name": f"cuda:{index}",
                            "model": about.name,
                            "capability": f"{about.major}.{about.minor}",
                            "memory_bytes": total,
                            "memory_free_bytes": free,
                        },
                    )
                )
            except RuntimeError as error:  # CUDA's own, out of memory among them
                told = str(error).splitlines()[0]
                problems.append(
                    SetupProblem(
                        f"cuda:{index} cannot compute ({told})",
                        "check nvidia-smi: is the GPU full, broken, or in need of another driver? Or give --device cpu",
                        True,
                    )
                )
    elif Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists():
        why = (
            "torch is a build without CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}, the driver is {_driver()}"
        )
        hidden = (
            "; CUDA_VISIBLE_DEVICES hides it" if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else ""
        )
        problems.append(
            SetupProblem(
                f"there is an NVIDIA GPU that torch cannot use ({why}{hidden})",
                "install the build of torch for this driver or a newer driver; everything runs on the CPU until then",
            )
        )
    if torch.backends.mps.is_available():
        found.append(
            _rates(torch.device("mps"), {"name": "mps", "memory_bytes": torch.mps.recommended_max_memory()})
        )
    return found


def _rates(device: torch.device, about: Facts) -> Facts:
    """``about``, and the rates; of one core of a CPU, for on a busy machine several wait for each other."""
    threads = torch.get_num_threads()
    side = 512 if device.type == "cpu" else None
    torch.set_num_threads(1)
    try:
        rates = {
            name: product_rate(device, dtype, 0.3, side)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
    finally:
        torch.set_num_threads(threads)
    return {**about, "flop_per_s": rates, "bfloat16_is_fast": rates["bfloat16"] > 1.5 * rates["float32"]}


def _disks(output: str | None, problems: list[SetupProblem]) -> list[Facts]:
    places: list[tuple[Literal["here", "output", "temporary", "shared memory"], str]] = [
        ("here", str(Path.cwd()))
    ]
    if output is not None:
        places.append(("output", output))
    places.append(("temporary", tempfile.gettempdir()))
    if Path("/dev/shm").exists():
        places.append(("shared memory", "/dev/shm"))
    found: list[Facts] = []
    for use, place in places:
        if "://" in place:
            found.append({"use": use, "path": place, "kind": "an object store, not looked at"})
            continue
        path = Path(place).absolute()
        there = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
        usage, inodes = shutil.disk_usage(there), os.statvfs(there)
        kind = _file_system(there)
        found.append(
            {"use": use, "path": place, "kind": kind, "bytes": usage.total, "free_bytes": usage.free}
        )
        needed = use in ("output", "temporary")
        if needed and not _can_write(there):
            problems.append(
                SetupProblem(
                    f"{there} ({use}) is not writable",
                    "choose another folder" if use == "output" else "set TMPDIR to a writable folder",
                    True,
                )
            )
        if inodes.f_files and not inodes.f_favail:
            problems.append(
                SetupProblem(
                    f"{there} ({use}) has no inodes left",
                    "delete files there, or choose another folder",
                    needed,
                )
            )
        if use == "temporary" and usage.free < _GIB:
            problems.append(
                SetupProblem(
                    f"{place} has {bytes_text(usage.free)} free for videos of urls and Ray's objects",
                    "free space there, or set TMPDIR",
                )
            )
        if use == "output" and usage.free < 10 * _GIB:
            problems.append(
                SetupProblem(
                    f"{place} has {bytes_text(usage.free)} free: 3,500 clips at 256 px take 10 GiB",
                    "free space there, or choose another folder",
                )
            )
        if use == "shared memory" and usage.total < _GIB:
            problems.append(
                SetupProblem(
                    f"/dev/shm has {bytes_text(usage.total)}: Ray's objects then lie on the disk, which is slow",
                    "start the container with more, such as docker run --shm-size=8g",
                )
            )
    return found


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".deltacache-doctor-") as file:
            file.write(b"1")
            file.flush()
    except OSError:
        return False
    return True


def _file_system(path: Path) -> str | None:
    """Such as ``ext4`` or ``nfs4``: that of the longest mount point above ``path``."""
    try:
        lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:  # not Linux
        return None
    real = path.resolve()
    mounts = [
        (len(where), kind) for _, where, kind, *_ in lines if real.is_relative_to(where.replace("\\040", " "))
    ]
    return max(mounts, default=(0, None))[1]


def _ray(problems: list[SetupProblem]) -> Facts:
    """What a command would do without ``--ray-address``, and which cluster there is on this machine."""
    temporary = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    facts: Facts = {"without_address": "starts a Ray on this machine that listens on loopback only"}
    note = temporary / "ray_current_cluster"
    try:
        address = note.read_text().strip()
    except OSError:
        address = ""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_PORT_S).close()
            facts["cluster_here"] = address
        except OSError:
            pass  # it has ended
    if asked := os.environ.get("RAY_ADDRESS"):
        shown = _without_user(asked)
        facts["RAY_ADDRESS"] = shown
        problems.append(
            SetupProblem(
                f"RAY_ADDRESS ({shown}) is not read by deltacache without --ray-address auto",
                f"give --ray-address {shown} to run on that cluster",
            )
        )
    return facts


def _ask_hub(answers: Facts) -> None:
    """Whether the hub answers, and lets us have the default backbone; nothing is downloaded."""
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

        answers["endpoint"] = _without_user(constants.ENDPOINT)
        answers["token"] = huggingface_hub.get_token() is not None
        files = [
            huggingface_hub.try_to_load_from_cache(DEFAULT_BACKBONE, name)
            for name in ("config.json", "model.safetensors")
        ]
        answers["cached"] = all(isinstance(each, str) for each in files)
        answers["offline"] = bool(constants.HF_HUB_OFFLINE)
        if answers["offline"]:
            answers["done"] = True
            return
        url = huggingface_hub.hf_hub_url(DEFAULT_BACKBONE, "config.json")
        begun = time.monotonic()
        try:
            huggingface_hub.get_hf_file_metadata(url, token=None, timeout=_HUB_S - 1)
            answers["access"] = "granted"
        except GatedRepoError:
            answers["access"] = "gated"
        except HfHubHTTPError as error:
            answers["access"] = f"refused: {str(error).strip().splitlines()[0]}"
        answers["seconds"] = time.monotonic() - begun
        answers["reachable"] = True
    except ImportError:
        answers["error"] = "huggingface_hub is not installed"
    except Exception as error:  # noqa: BLE001 whatever a library raises about a proxy or an endpoint is a line of the report
        lines = str(error).strip().splitlines() or [""]
        answers["reachable"], answers["error"] = False, f"{type(error).__name__}: {lines[0]}"
    answers["done"] = True


def _hub(answers: Facts, problems: list[SetupProblem]) -> Facts:
    facts = {name: value for name, value in answers.items() if name != "done"}
    facts = {"backbone": DEFAULT_BACKBONE, **facts}
    if not answers.get("done") and "access" not in answers:
        facts["reachable"], facts["error"] = False, f"no answer within {_HUB_S:g} s"
    if facts.get("cached"):
        return facts
    tiny = "or give --backbone a local Hugging Face folder, or tiny"
    if facts.get("offline"):
        problems.append(
            SetupProblem(
                f"offline mode (HF_HUB_OFFLINE), and {DEFAULT_BACKBONE} is not in the local cache",
                f"fetch it once without offline mode; {tiny}",
            )
        )
    elif not facts.get("reachable"):
        problems.append(
            SetupProblem(
                f"the hub does not answer ({facts.get('error')})",
                f"check the network and HTTPS_PROXY; {tiny}",
            )
        )
    elif facts["access"] != "granted":
        token = "the token that is set has no access to it" if facts["token"] else "no token is set"
        problems.append(
            SetupProblem(
                f"{DEFAULT_BACKBONE} is gated, and {token}"
                if facts["access"] == "gated"
                else f"{DEFAULT_BACKBONE}: {facts['access']}",
                f"accept its licence on its page of the hub and run 'hf auth login'; {tiny}",
            )
        )
    return facts


def _without_user(value: str) -> str:
    """A url or ``user:password@host:port`` without what stands before the host, and without signatures."""
    scheme, slashes, rest = value.rpartition("://")
    return without_secrets(f"{scheme}{slashes}{rest.rpartition('@')[2]}")


def _cleaned(value: Any) -> Any:
    """Without credentials of urls, the home's name, and what variables named like secrets hold."""
    if isinstance(value, dict):
        return {name: _cleaned(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each) for each in value]
    if not isinstance(value, str):
        return value
    text = without_secrets(value)
    for name, secret in os.environ.items():
        if _SECRET_NAME.search(name) and len(secret) >= 6 and not secret.startswith("/"):
            text = text.replace(secret, "***")
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if home != "/" else text
