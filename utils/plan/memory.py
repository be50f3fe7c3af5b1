"""How much room there is: memory on the host and on the device, and disk."""

import shutil
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


def held_bytes() -> int:
    """Bytes of memory that this process holds: interpreter, libraries and what it has loaded; but
    not expert buffers that are mapped, which the system can let go of.
    """
    process = psutil.Process()
    maps = process.memory_maps() if hasattr(process, "memory_maps") else []
    buffers = sum(each.rss for each in maps if each.path.endswith(".pt"))
    return process.memory_info().rss - buffers


def free_disk_bytes(folder: Path) -> int:
    """Bytes that can be written in `folder`, which need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def disk_of(folder: Path) -> int:
    """A number of the file system that `folder` lies on, or will lie on."""
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _left_in_cgroup() -> list[int]:
    """What the memory limit of a container leaves, where there is one (cgroup 2)."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = (CGROUP / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return []
    # Pages of files that were read and can be let go of, such as of mapped buffers, are no burden.
    kinds = [kind for kind in ("active_file", "inactive_file") if kind in stat]
    cached = sum(int(stat[stat.index(kind) + 1]) for kind in kinds)
    return [int(limit) - used + cached] if limit.isdecimal() else []
