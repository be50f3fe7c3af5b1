"""What the cells of a plan run on: GPUs, or without one the CPU, each divided into slots."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scripts.plan.cells import Cell

BIN = ".venv/Scripts" if os.name == "nt" else ".venv/bin"
PYTHON, TORCHRUN = f"{BIN}/python", f"{BIN}/torchrun --standalone --nproc_per_node"
SLOTS = 4  # the most cells that share a GPU, or of a smoke run the CPU


@dataclass(frozen=True)
class Devices:
    """The GB of each GPU by its name in CUDA_VISIBLE_DEVICES, none for the CPU; the number of
    `slots` of each.
    """

    gpus: Mapping[str, float]
    slots: int

    @property
    def names(self) -> list[str]:
        return list(self.gpus) or ["cpu"]

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
        share = min(self.gpus.values()) / self.slots
        return min(self.slots, math.ceil(cell.estimate.memory / share))

    def command_lines(self, cell: Cell) -> list[str]:
        spreads = self.slots_for(cell) > self.slots
        launcher = f"{TORCHRUN} {len(self.gpus)}" if spreads else PYTHON
        return [f"{launcher} {command}" for command in cell.commands]

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU: {self.slots} cell(s) at a time on the CPU; the hours are a GPU's"
        sizes = ", ".join(sorted({f"{memory:.0f} GB" for memory in self.gpus.values()}))
        return (
            f"{len(self.gpus)} GPU(s) of {sizes}: experts take all of them, of the other cells up "
            f"to {self.slots} share one where their memory allows"
        )


def usable_cores() -> int:
    """The cores that this process may use; only Linux tells them from those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_devices(*, smoke: bool) -> Devices:
    """The GPUs that this process and so the cells see; the CPU where there is none, or for a smoke
    run, whose small cells run beside one another.
    """
    if smoke:
        return Devices({}, min(SLOTS, usable_cores()))
    count = torch.cuda.device_count()
    memories = [torch.cuda.get_device_properties(n).total_memory / 1e9 for n in range(count)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return Devices(dict(zip(names, memories, strict=False)), SLOTS if count else 1)
