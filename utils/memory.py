"""How much memory there is, on the host and on the device."""

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on the CPU within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept_by_torch
    return min([psutil.virtual_memory().available, *_left_in_cgroup()])


def _left_in_cgroup() -> list[int]:
    """What the memory limit of a container leaves, where there is one (cgroup 2)."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = (CGROUP / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return []
    # Pages of files that were read and can be let go of, such as of mapped buffers, are no burden.
    cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
    return [int(limit) - used + cached] if limit.isdecimal() else []
