"""How much memory is free, of a GPU or of the host."""

import os
from pathlib import Path

import torch

_CGROUPS = tuple(
    (*(f"/sys/fs/cgroup/{name}" for name in files), cached)
    for files, cached in (
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    )
)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take: of the GPU, or of the host within its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        found = []
    for limit, used, stat, cached in _CGROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            counts = dict(line.split() for line in Path(stat).read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        found.append(left + int(counts.get(cached, 0)))  # files that the kernel can drop
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
