"""What a machine has free, what it holds already, and how fast it is: this one, or an A100."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch

from utils.compute.contract import check_traceable
from utils.compute.cost import Training
from utils.compute.execution import check_compiles
from utils.core import ranks

CGROUP = Path("/sys/fs/cgroup")
Kind = Literal["outer steps", "training"]  # of work, by what compiling saves


@dataclass(frozen=True)
class Speed:
    """How fast a device is; rough on purpose, to tell seconds from hours.

    Attributes:
        rate: FLOP/s that uncompiled steps sustain.
        step_seconds: the least time of one gradient of a network, however small: launching it.
        saved: the part of its time that compiling saves, by the kind of work.
        compile_seconds: what compiling a function takes for each layer of its network.
        working_set: bytes that a step holds at most, where more are free. Beyond it a GPU does not
            get faster, and a CPU, out of its caches, slower.
    """

    rate: float
    step_seconds: float
    saved: Mapping[Kind, float]
    compile_seconds: float
    working_set: int


# Measured on two cores (docs/performance.md), where launching is nothing beside the arithmetic.
CPU_THREAD = Speed(
    rate=35e9,
    step_seconds=0.0,
    saved={"outer steps": 0.25, "training": 0.3},
    compile_seconds=12.0,
    working_set=256 * 2**20,
)
# Measured on an H100 with TF32 (docs/performance.md). A gradient takes at least the launches of its
# kernels, however small its batch.
GPU = Speed(
    rate=26e12,
    step_seconds=0.0006,
    saved={"outer steps": 0.5, "training": 0.4},
    compile_seconds=6.0,
    working_set=3 * 2**30,
)


@dataclass(frozen=True)
class Machine:
    """What a process of a call computes on.

    Attributes:
        device: "cpu", "cuda" or "mps".
        free, host: bytes that are free on the device and in the host's memory.
        held: bytes of the host's memory that this process holds already.
        processes, processes_here: of the whole call, and those that share this host.
        disk: tells of a folder, which need not be there yet, the number of its file system and the
            bytes that are free there.
        check_compiles: raises UserError where compiling fails.
        say: told what auto is taken for.
    """

    device: str
    free: int
    host: int
    held: int
    speed: Speed
    processes: int = 1
    processes_here: int = 1
    disk: Callable[[Path], tuple[int, int]] = lambda folder: (0, 10**15)
    check_compiles: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda line: None

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        """Look at this machine. All processes call it, and agree on the scarcest memory."""
        rate = CPU_THREAD.rate * torch.get_num_threads()
        world = ranks.world()
        return cls(
            device.type,
            free=ranks.min_over_ranks(free_bytes(device)),
            host=ranks.min_over_ranks(free_bytes(torch.device("cpu"))),
            held=ranks.from_main(held_bytes()),
            speed=GPU if device.type == "cuda" else replace(CPU_THREAD, rate=rate),
            processes=world,
            processes_here=min(world, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            disk=disk_of,
            check_compiles=partial(check_compiles, device),
            say=print,
        )

    def imagined(self) -> "Machine":
        """The same to plan for alone: nothing is tried, nothing said."""
        return replace(self, check_compiles=Machine.check_compiles, say=Machine.say)

    def compiling(self, model: str, shape: Mapping[str, int]) -> "Machine":
        """The same for steps of the network `model`, which the compiler may not follow."""

        def check() -> None:
            check_traceable(model, **shape)
            self.check_compiles()

        return replace(self, check_compiles=check)

    def with_processes(self, here: int) -> "Machine":
        """The same for a call of so many processes on this host, as many on each other one."""
        hosts = self.processes // self.processes_here
        return replace(self, processes=hosts * here, processes_here=here)

    @property
    def fewer_processes(self) -> list[int]:
        """Numbers of processes that a call on one host could be started with instead."""
        alone = self.processes == self.processes_here
        return halvings(self.processes) if alone else []

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def budget(self) -> int:
        """Bytes that a step may take."""
        return min(self.speed.working_set, self.free // 2)

    def seconds(self, flop: float, steps: float, kind: Kind, *, compiled: bool = False) -> float:
        """Seconds of `flop` in so many gradients of a network, one after another."""
        plain = flop / self.speed.rate + steps * self.speed.step_seconds
        return plain * (1 - self.speed.saved[kind] * compiled)

    def training_seconds(
        self,
        training: Training,
        *,
        networks: int,
        at_once: int,
        tested: int = 0,
        compiled: bool = False,
    ) -> float:
        """Seconds of training `networks`, which the processes divide, and testing each of them on
        `tested` images.
        """
        flop = networks * (training.flop + tested * training.cost.flop) / self.processes
        rounds = -(-networks // (self.processes * at_once))
        return self.seconds(flop, rounds * training.steps, "training", compiled=compiled)


# One to plan for, with nothing else on it; it has 0.6 of an H100's bandwidth and less of its rate.
A100 = Machine("cuda", free=80 * 10**9, host=10**12, held=0, speed=replace(GPU, rate=13e12))


def halvings(count: int) -> list[int]:
    """Half of `count`, half of that, and so on down to 1."""
    return [count >> n for n in range(1, count.bit_length())]


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
    # Pages of files that were read, such as of mapped buffers, can be let go of.
    kinds = [kind for kind in ("active_file", "inactive_file") if kind in stat]
    cached = sum(int(stat[stat.index(kind) + 1]) for kind in kinds)
    return [int(limit) - used + cached] if limit.isdecimal() else []


def held_bytes() -> int:
    """Bytes of memory that this process holds: interpreter, libraries and what it has loaded.

    Mapped expert buffers are left out: the system can let go of them.
    """
    process = psutil.Process()
    maps = process.memory_maps() if hasattr(process, "memory_maps") else []
    buffers = sum(each.rss for each in maps if each.path.endswith(".pt"))
    return process.memory_info().rss - buffers


def disk_of(folder: Path) -> tuple[int, int]:
    """The number of the file system that `folder` lies on, or will lie on, and its free bytes."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.stat().st_dev, shutil.disk_usage(there).free
