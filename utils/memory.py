"""How much memory there is, on the host and on the device."""

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on the CPU within the limit of the job."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept_by_torch
    return min([psutil.virtual_memory().available, *_left_in_cgroup()])


def _left_in_cgroup() -> list[int]:
    """What the limit of a container or a batch job leaves, where there is one (cgroup 2)."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = (CGROUP / "memory.current").read_text().strip()
    except OSError:
        return []
    return [int(limit) - int(used)] if limit.isdecimal() else []
