"""What a call of buffer.py takes, and which of its flags lower that."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.compute.cost import expert_bytes
from utils.config.resolve import packaged_yaml, resolve
from utils.data.source import Source
from utils.experts.files import missing_experts, read_settings
from utils.experts.kind import ExpertKind
from utils.options import BufferOptions
from utils.plan.choose import TrainingPlan, plan_training
from utils.plan.machine import Machine, halvings
from utils.plan.need import BOTH, Time, add_up, float_words, read_bytes
from utils.plan.room import Demand, Disk, Need
from utils.plan.sizes import DataSize


@dataclass(frozen=True)
class ExpertsToMake:
    """Experts that are still to be made: what a plan knows of them, and the command for them."""

    folder: Path
    options: BufferOptions  # of that command
    command: str

    @classmethod
    def of(
        cls, kind: ExpertKind, buffer_path: str, *, epochs: int, flags: str = ""
    ) -> "ExpertsToMake":
        """Those of `kind`, of `epochs` at least: as long as buffer.py makes them, or longer.

        What was begun in their folder goes on at its own length where that suffices. `flags` are
        more of them for the command.
        """
        folder = kind.folder(buffer_path)
        command, options = _command(kind, buffer_path, None, flags)
        begun = (read_settings(folder) or {}).get("train_epochs")
        is_of_use = isinstance(begun, int) and begun >= epochs
        length = begun if is_of_use else max(epochs, options.train_epochs)
        if length != options.train_epochs:
            command, options = _command(kind, buffer_path, length, flags)
        return cls(folder, options, command)

    def __len__(self) -> int:
        return self.options.num_experts

    @property
    def epochs(self) -> int:
        return self.options.train_epochs

    @property
    def missing(self) -> list[int]:
        """The numbers of those that are not there yet."""
        numbers = range(self.options.num_experts)
        return missing_experts(self.folder, numbers, experts_per_file=self.options.save_interval)


def _command(
    kind: ExpertKind, buffer_path: str, train_epochs: int | None, flags: str
) -> tuple[str, BufferOptions]:
    """The command, and what its flags resolve to."""
    command = " ".join(filter(None, (kind.command(buffer_path, train_epochs=train_epochs), flags)))
    resolved = resolve(
        BufferOptions,
        shlex.split(command)[2:],
        description="",
        find_yaml=lambda given: packaged_yaml(kind.dataset, "buffer"),
    )
    return command, resolved.options


@dataclass(frozen=True)
class ExpertsCall:
    """A call that trains the experts `missing`, as it is planned."""

    options: BufferOptions
    size: DataSize
    missing: Sequence[int]
    plan: TrainingPlan
    machine: Machine

    @classmethod
    def planned(
        cls, options: BufferOptions, size: DataSize, missing: Sequence[int], machine: Machine
    ) -> "ExpertsCall":
        """Decide what auto stands for."""
        plan = plan_training(
            size.experts_training(options),
            machine.compiling(options.model, size.shape),
            networks=options.num_experts,
            missing=len(missing),
            compile=options.compile,
            at_once=options.experts_at_once,
        )
        return cls(options, size, missing, plan, machine)

    @property
    def time(self) -> Time:
        """Estimate training the experts and testing them after every epoch."""
        together = self.machine.processes * self.plan.at_once
        epoch = self.machine.training_seconds(
            replace(self.plan.training, epochs=1),
            networks=together,
            at_once=self.plan.at_once,
            tested=self.size.test,
            compiled=self.plan.compiled,
        )
        rounds = -(-len(self.missing) // together)
        return Time(epoch, rounds * self.options.train_epochs, unit="epoch")

    def demand(self, source: Source, folder: Path) -> Demand:
        """Count what it needs to read `source` and to write the experts into `folder`."""
        options, size, plan, machine = self.options, self.size, self.plan, self.machine
        expert = expert_bytes(plan.training.cost, epochs=options.train_epochs)
        wide = float_words(options.precision)
        reading, caches = read_bytes(source, BOTH, zca=options.zca, fits=options.zca, wide=wide)

        def need(
            num_experts: int = options.num_experts,
            nproc_per_node: int = machine.processes_here,
            compile: str = "on" if plan.compiled else "off",
            experts_at_once: int = plan.at_once,
        ) -> Need:
            numbers = [n for n in self.missing if n < num_experts]
            together = machine.with_processes(nproc_per_node).processes * experts_at_once
            unfinished = min(together, len(numbers)) * expert
            written = experts_bytes(expert, numbers, per_file=options.save_interval) + unfinished
            return add_up(
                machine,
                nproc_per_node,
                compile=compile,
                reading=reading,
                data=wide * size.float_bytes(size.train + size.test),
                work=wide * size.cohort_bytes(plan.training, at_once=experts_at_once),
                kept=experts_at_once * expert + size.matrix_bytes * options.zca,
                writing=2 * together * expert if together > experts_at_once else 0,  # gathered
                disk=[Disk(folder, written, "another --buffer_path"), *caches],
            )

        least = options.first_expert + machine.processes
        gentler: dict[str, Sequence[object]] = {
            # With the first of those missing at least.
            "num_experts": [n for n in reversed(self.missing[1:]) if n >= least],
            "nproc_per_node": machine.fewer_processes,
            "compile": ["off"],
            "experts_at_once": halvings(plan.at_once),
        }
        return Demand(need, gentler)


def experts_bytes(expert: int, numbers: Sequence[int], *, per_file: int) -> int:
    """Disk for the experts `numbers`, in order, of `expert` bytes each.

    A file is written with the last of its experts, or of all: those in it are then there twice.
    """
    last = len(numbers)
    written = [(i, n % per_file + 1) for i, n in enumerate(numbers, 1)]
    return expert * max(i + in_file for i, in_file in written if in_file == per_file or i == last)
