"""What a call of distill_att.py takes, and which of its flags lower that."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.compute.cost import expert_bytes
from utils.core.errors import UserError
from utils.core.pictures import MIN_SIDE
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.methods.base import Work
from utils.methods.registry import METHODS
from utils.options import DistillOptions
from utils.plan.choose import RunPlan, evaluations_left, plan_run
from utils.plan.experts import ExpertsToMake
from utils.plan.machine import Machine, halvings
from utils.plan.need import Time, add_up, float_words, read_bytes
from utils.plan.room import Demand, Disk, Need
from utils.plan.sizes import DataSize
from utils.run.directory import RunDir

# Of all synthetic images: images, moving average, gradient and its last part, momentum, the copy
# before a step, and the augmented ones with their gradient.
IMAGE_COPIES = 8
# Of a sheet: enlarged images, the sheet, its bytes as floats, and those.
PICTURE_COPIES = 4
# What a file of torch.save has beside its tensors, and a picture beside a byte a number.
FILE_BYTES = 3_000
STEP_RECORD_BYTES = 160  # in metrics.jsonl
TAGS = ("last", "ema_last", "best", "ema_best")


@dataclass(frozen=True)
class DistillCall:
    """A call that distils from `iteration` to the end (-1: from the start), as it is planned; the
    last evaluation was that of `evaluated` (-1: there was none).
    """

    options: DistillOptions
    size: DataSize
    plan: RunPlan
    machine: Machine
    iteration: int = -1
    evaluated: int = -1

    @classmethod
    def planned(
        cls,
        options: DistillOptions,
        size: DataSize,
        machine: Machine,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> "DistillCall":
        """Decide what auto stands for, in a call that begins or goes on from its `checkpoint`."""
        begun = checkpoint or {"how": {}, "state": {"iteration": -1}, "evaluated": -1}
        work = count_work(options, size, machine.processes)
        compiling = machine.compiling(options.model, size.shape)
        plan = plan_run(options, size, work, compiling, recorded=begun["how"])
        return cls(options, size, plan, machine, begun["state"]["iteration"], begun["evaluated"])

    @property
    def work(self) -> Work:
        """That of an outer step, for one of the processes."""
        return count_work(self.options, self.size, self.machine.processes)

    @property
    def time(self) -> Time:
        """Estimate the outer steps and evaluations that are left."""
        options, plan, work = self.options, self.plan, self.work
        step = self.machine.seconds(work.flop, work.passes, "outer steps", compiled=plan.compiled)
        evaluation = sum(
            self.machine.training_seconds(
                training,
                networks=options.num_eval,
                at_once=plan.eval_at_once,
                tested=self.size.test + self.size.val,
                compiled=plan.eval_compiled,
            )
            for training in self.size.evaluation_trainings(options)
        )
        return Time(
            step,
            options.Iteration - max(self.iteration, 0),
            evaluations=evaluations_left(options, self.evaluated),
            evaluation_seconds=len(METHODS[options.method].sets) * evaluation,
        )

    @property
    def work_bytes(self) -> int:
        """Memory of the synthetic images with all that belongs to them, and of an outer step or an
        evaluation, whichever is larger; in float32.
        """
        options, plan, work = self.options, self.plan, self.work
        together = work.students if self.machine.is_gpu else 1
        step = work.kept_bytes + together * plan.micro_batch * work.image_bytes
        takes_turns = [(work.graph_bytes or 0) if plan.unroll == "autograd" else step]
        if options.eval_it > 0:
            takes_turns += [
                self.size.cohort_bytes(training, at_once=plan.eval_at_once)
                for training in self.size.evaluation_trainings(options)
            ]
        images = self.size.float_bytes(self.size.classes * options.ipc)
        return IMAGE_COPIES * images + max(takes_turns)

    def demand(
        self, source: Source, experts: ExpertBuffer | ExpertsToMake | None, run: RunDir
    ) -> Demand:
        """Count what it needs to read `source` and to write into `run`.

        With --load_all the `experts` are still to be read into memory.
        """
        options, size, plan, machine = self.options, self.size, self.plan, self.machine
        wide, matrix = float_words(options.precision), size.matrix_bytes * options.zca
        # Only what is kept is widened, when the others are gone.
        reading, caches = read_bytes(
            source, tuple(source.labels), zca=options.zca, fits=options.zca
        )
        kept = size.test + size.val + size.train * self.work.keeps_train
        number, epochs = (len(experts), experts.epochs) if experts else (0, 0)
        expert = expert_bytes(size.network(options.model), epochs=epochs)
        compiled = plan.compiled or (plan.eval_compiled and options.eval_it > 0)
        there = {tag for tag in TAGS if run.distilled(tag).exists()}

        def need(
            max_experts: int = number,
            nproc_per_node: int = machine.processes_here,
            load_all: bool = options.load_all,
            compile: str = "on" if compiled else "off",
            eval_at_once: int = plan.eval_at_once,
            micro_batch: int = plan.micro_batch,
            unroll: str = plan.unroll,
            save_it: int = options.sets_it,
        ) -> Need:
            changed = replace(
                self,
                machine=machine.with_processes(nproc_per_node),
                plan=replace(
                    plan, eval_at_once=eval_at_once, micro_batch=micro_batch, unroll=unroll
                ),
            )
            loaded = max_experts * expert * load_all
            written, replaced = run_bytes(
                replace(options, save_it=save_it), size, iteration=self.iteration, there=there
            )
            return add_up(
                machine,
                nproc_per_node,
                compile=compile,
                reading=reading + loaded,
                data=wide * size.float_bytes(kept),
                work=wide * changed.work_bytes,
                kept=loaded + 2 * matrix,  # ZCA's inverse comes with the first picture
                writing=picture_bytes(size, options.ipc) + matrix,
                disk=[Disk(run.path, written + replaced, "another --save_path"), *caches],
            )

        rarer = [options.sets_it * factor for factor in (2, 5, 10)]
        gentler: dict[str, Sequence[object]] = {
            # A run that has begun must go on with as many experts.
            "max_experts": halvings(number) if self.iteration < 0 else [],
            "nproc_per_node": [n for n in machine.fewer_processes if _can_divide(options, size, n)],
            "load_all": [False],
            "compile": ["off"],
            "eval_at_once": halvings(plan.eval_at_once),
            "micro_batch": halvings(plan.micro_batch),
            "unroll": ["adjoint"],
            "save_it": [n for n in rarer if 0 < n < options.Iteration] + [0],
        }
        return Demand(need, gentler)


def count_work(options: DistillOptions, size: DataSize, processes: int) -> Work:
    """Count an outer step of one of `processes`; UserError where these cannot divide it."""
    count, cost = METHODS[options.method].count_work, size.network(options.model)
    work = count(options, cost, processes, classes=size.classes)
    return replace(work, flop=work.flop + work.train_flop * size.train) if work.train_flop else work


def _can_divide(options: DistillOptions, size: DataSize, processes: int) -> bool:
    try:
        count_work(options, size, processes)
    except UserError:
        return False
    return True


def picture_bytes(size: DataSize, ipc: int) -> int:
    """Host memory while a sheet of all synthetic images is made."""
    enlarged = max(1, MIN_SIDE // size.image_size) ** 2
    return PICTURE_COPIES * enlarged * size.float_bytes(size.classes * ipc)


def run_bytes(
    options: DistillOptions,
    size: DataSize,
    *,
    iteration: int = -1,
    there: Collection[str] = (),
) -> tuple[int, int]:
    """Disk of a run directory from `iteration` on (-1: from the start): what is still to be written
    and kept, and the largest file once more while it is replaced.

    `there` are the tags whose sets are there; these and the checkpoint are only replaced.
    """
    images = size.classes * options.ipc
    pixels, labels = size.float_bytes(images), 8 * images
    one = pixels + labels + size.values * images + 2 * FILE_BYTES
    tagged = one + size.matrix_bytes * options.zca
    checkpoint = 3 * float_words(options.precision) * pixels + FILE_BYTES
    tags = set(TAGS if options.eval_it > 0 else TAGS[:2]).difference(there)
    begun, steps_left = iteration >= 0, max(0, options.Iteration - max(iteration, 0))
    written = _sets_left(options, iteration) * one + len(tags) * tagged
    written += STEP_RECORD_BYTES * steps_left + (0 if begun else checkpoint)
    return written, max(tagged, checkpoint)


def _sets_left(options: DistillOptions, iteration: int) -> int:
    """The first one, and those of the multiples of save_it behind `iteration`."""
    every = options.sets_it
    if every == 0:
        return int(iteration < 0)
    return max(0, options.Iteration // every - iteration // every)
