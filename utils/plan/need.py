"""The parts of an estimate: upper bounds in bytes on memory and disk, and roughly the time.

Counted from the options, the networks and what is there already; nothing is tried out.
docs/performance.md compares the bounds with peaks that were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.compute.cost import FLOAT_BYTES
from utils.compute.device import storage_dtype
from utils.core.progress import time_left
from utils.data.normalisation import CHUNK
from utils.data.source import Source, SplitName
from utils.plan.machine import Machine
from utils.plan.room import Disk, Need
from utils.plan.sizes import DataSize

# CUDA context and the libraries' workspaces; a guess, not measured.
CONTEXT_BYTES = 10**9
# Of the host, in every process: what the libraries load and keep once they compute, and what the
# compiler takes, most of it in processes of its own. Measured on digits, where the work is small.
STARTED_BYTES, COMPILER_BYTES = 100 * 10**6, 750 * 10**6
# Matrices (D, D), D values an image, that fitting ZCA takes beside two copies of the images: nearly
# all of them are those of the singular value decomposition. Measured for D = 3,072.
ZCA_MATRICES = 16
BOTH: tuple[SplitName, ...] = ("train", "test")


@dataclass(frozen=True)
class Time:
    """Seconds of one unit of work, what is left of it, and the evaluations between."""

    seconds: float
    left: int
    unit: str = "iteration"
    evaluations: int = 0
    evaluation_seconds: float = 0.0

    @property
    def total(self) -> float:
        return self.left * self.seconds + self.evaluations * self.evaluation_seconds

    def __str__(self) -> str:
        return time_left(
            [self.seconds],
            self.left,
            unit=self.unit,
            evaluations=self.evaluations,
            evaluation_seconds=self.evaluation_seconds,
        )


def add_up(
    machine: Machine,
    processes: int,
    *,
    compile: str,
    reading: int,
    data: int,
    work: int,
    kept: int,
    writing: int = 0,
    disk: Sequence[Disk],
) -> Need:
    """Add up what `processes` on this machine take, which may be other than those of now.

    Each takes `data` and at most `work` on the device, and of the host `kept` all the time, at most
    `reading` before the work, and the main one at most `writing` while it writes files.
    """
    device = device_bytes(data, work) if machine.is_gpu else 0
    if machine.is_gpu:
        data = work = 0
    beside = STARTED_BYTES + kept + data
    working = max(work, COMPILER_BYTES if compile == "on" else 0)
    other = max(reading, beside + working)
    main = max(reading, beside + max(working, writing))
    return Need(
        device=device,
        host=processes * machine.held + (processes - 1) * other + main,
        held=machine.processes_here * machine.held,
        disk=tuple(disk),
    )


def device_bytes(data: int, work: int) -> int:
    """What a process takes on a GPU, its data and its work with the CUDA context."""
    return CONTEXT_BYTES + data + work


def read_bytes(
    source: Source, kept: Sequence[SplitName], *, zca: bool, fits: bool, wide: int = 1
) -> tuple[int, list[Disk]]:
    """Host memory while images are read and the splits `kept` normalised, and the caches that this
    writes.

    Pixels that are not from pictures lie in memory already. Where a whitening is fitted (`fits`)
    and is not kept from before, that takes more than all else.
    """
    size = DataSize.of(source)
    read = {*kept, "train"} if fits else {*kept}
    fits = fits and not (source.zca_cache and source.zca_cache.exists())
    # Images held out are decoded with the others, those of a folder of their own are not.
    held_out = 0 if "val" in source.decoded else size.val
    numbers = {"train": size.train + held_out, "test": size.test, "val": size.val}
    pixels = {
        split: source.value_bytes * size.values * numbers[split]
        for split in source.decoded
        if split in read
    }
    fitting = 2 * size.float_bytes(size.train) + ZCA_MATRICES * size.matrix_bytes if fits else 0
    counts = [len(source.labels[split]) for split in kept]
    seen = size.float_bytes(sum(counts))
    widened = (1 + wide) * seen if wide > 1 else 0
    normalising = sum(pixels.values()) + seen + 3 * size.float_bytes(min(CHUNK, max(counts)))
    memory = max(
        sum(pixels.values()) + fitting, size.matrix_bytes * zca + max(normalising, widened)
    )
    if source.cache is None:
        return memory, []
    new = [count for split, count in pixels.items() if not source.decoded[split].exists()]
    return memory, [Disk(source.cache.parent, sum(new) + size.matrix_bytes * fits)]


def float_words(precision: str | None) -> int:
    """How many float32 a number of images and parameters takes: 2 with fp64, else 1."""
    return storage_dtype(precision).itemsize // FLOAT_BYTES
