"""What the cells of a plan run on: GPUs, or without one the CPU, each divided into slots."""

import math
import os
from dataclasses import dataclass

import torch

from scripts.plan.cells import Cell

PYTHON, TORCHRUN = ".venv/bin/python", ".venv/bin/torchrun --standalone --nproc_per_node"
SLOTS_PER_GPU = 4  # the most cells that share a GPU
SMOKE_SLOTS = 4  # the most cells of a smoke run at a time


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name in CUDA_VISIBLE_DEVICES, and its memory in GB."""

    name: str
    memory: float


@dataclass(frozen=True)
class Devices:
    """GPUs, or without one the CPU, with the number of `slots` of each."""

    gpus: tuple[Gpu, ...]
    slots: int

    @property
    def names(self) -> list[str]:
        return [gpu.name for gpu in self.gpus] or ["cpu"]

    @property
    def all_slots(self) -> int:
        return len(self.names) * self.slots

    def slots_for(self, cell: Cell) -> int:
        """How many slots a cell holds: of one device, or, where it is more than one has, all of
        all devices. Experts are divided over all GPUs.
        """
        if not self.gpus:
            return 1
        if cell.is_experts:
            return self.all_slots
        share = min(gpu.memory for gpu in self.gpus) / self.slots
        return min(self.slots, math.ceil(cell.estimate.memory / share))

    def command_lines(self, cell: Cell) -> list[str]:
        spreads = self.slots_for(cell) > self.slots
        launcher = f"{TORCHRUN} {len(self.gpus)}" if spreads else PYTHON
        return [f"{launcher} {command}" for command in cell.commands]

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU: {self.slots} cell(s) at a time on the CPU; the hours are a GPU's"
        sizes = ", ".join(sorted({f"{gpu.memory:.0f} GB" for gpu in self.gpus}))
        return (
            f"{len(self.gpus)} GPU(s) of {sizes}: experts take all of them, of the other cells up "
            f"to {self.slots} share one where their memory allows"
        )


def find_devices(*, smoke: bool) -> Devices:
    """The GPUs that this process and so the cells see; the CPU where there is none, or for a smoke
    run, whose small cells run beside one another.
    """
    if smoke:
        return Devices((), min(SMOKE_SLOTS, len(os.sched_getaffinity(0))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    memories = [
        torch.cuda.get_device_properties(n).total_memory / 1e9
        for n in range(torch.cuda.device_count())
    ]
    gpus = tuple(map(Gpu, names, memories))
    return Devices(gpus, SLOTS_PER_GPU if gpus else 1)
