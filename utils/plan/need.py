"""What a planned call takes: upper bounds in bytes on memory and disk, and roughly the time.

Counted from the options, the networks and what is there already; nothing is tried out.
docs/performance.md compares the bounds with peaks that were measured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.compute.cohort import images_per_test_batch
from utils.compute.cost import FLOAT_BYTES, NetworkCost, Training, expert_bytes, inference_bytes
from utils.compute.device import storage_dtype
from utils.core.errors import UserError
from utils.core.pictures import MIN_SIDE
from utils.core.progress import time_left
from utils.data.distilled import SyntheticSet
from utils.data.normalisation import CHUNK
from utils.data.source import Source, SplitName
from utils.experts.buffer import ExpertBuffer
from utils.experts.features import ExpertFeatures
from utils.methods.base import Work
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan.choose import RunPlan, TrainingPlan, evaluations_left, plan_training
from utils.plan.machine import Machine
from utils.plan.room import Call, Demand, Disk, Need
from utils.plan.sizes import DataSize
from utils.run.directory import RunDir

# CUDA context and the libraries' workspaces; a guess, not measured.
CONTEXT_BYTES = 10**9
# Of the host, in every process: what the libraries load and keep once they compute, and what the
# compiler takes, most of it in processes of its own. Measured on digits, where the work is small.
STARTED_BYTES, COMPILER_BYTES = 100 * 10**6, 750 * 10**6
# Matrices (D, D), D values an image, that fitting ZCA takes beside two copies of the images: nearly
# all of them are those of the singular value decomposition. Measured for D = 3,072.
ZCA_MATRICES = 16
# Of all synthetic images: images, moving average, gradient and its last part, momentum, the copy
# before a step, and the augmented ones with their gradient.
IMAGE_COPIES = 8
# Of the features of a class: a copy, what is compared with a point, and the differences.
RULE_COPIES = 3
# Of a sheet: enlarged images, the sheet, its bytes as floats, and those.
PICTURE_COPIES = 4
# What a file of torch.save has beside its tensors, and a picture beside a byte a number.
FILE_BYTES = 3_000
STEP_RECORD_BYTES, EVALUATION_RECORD_BYTES = 160, 2_000  # in metrics.jsonl; in eval.json
BOTH: tuple[SplitName, ...] = ("train", "test")
LAST_TAGS, BEST_TAGS = ("last", "ema_last"), ("best", "ema_best")


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


def experts_time(
    options: BufferOptions, size: DataSize, plan: TrainingPlan, machine: Machine, *, missing: int
) -> Time:
    """Estimate training `missing` experts and testing them after every epoch."""
    epoch = machine.training_seconds(
        replace(size.experts_training(options), epochs=1),
        networks=machine.processes * plan.at_once,
        at_once=plan.at_once,
        tested=size.test,
        compiled=plan.compiled,
    )
    rounds = -(-missing // (plan.at_once * machine.processes))
    return Time(epoch, rounds * options.train_epochs, unit="epoch")


def distillation_time(
    options: DistillOptions,
    size: DataSize,
    work: Work,
    plan: RunPlan,
    machine: Machine,
    *,
    iteration: int = -1,
    evaluated: int = -1,
) -> Time:
    """Estimate distilling from `iteration` to the end; the last evaluation was of `evaluated`, or
    there was none (-1).
    """
    step = machine.seconds(work.flop, work.passes, "outer steps", compiled=plan.compiled)
    evaluation = sum(
        machine.training_seconds(
            training,
            networks=options.num_eval,
            at_once=plan.eval_at_once,
            tested=size.test + size.val,
            compiled=plan.eval_compiled,
        )
        for training in size.evaluation_trainings(options)
    )
    return Time(
        step,
        options.Iteration - max(iteration, 0),
        evaluations=evaluations_left(options, evaluated),
        evaluation_seconds=2 * evaluation,  # raw and EMA
    )


@dataclass(frozen=True)
class ExpertsCall(Call):
    num_experts: int
    experts_at_once: int


def experts_demand(
    options: BufferOptions,
    source: Source,
    plan: TrainingPlan,
    machine: Machine,
    *,
    folder: Path,
    missing: Sequence[int],
) -> Demand[ExpertsCall]:
    """Count what training the experts `missing` into `folder` needs."""
    size, wide = DataSize.of(source), float_words(options.precision)
    training = size.experts_training(options)
    expert = expert_bytes(training.cost, epochs=options.train_epochs)
    reading, caches = read_bytes(
        source, BOTH, kept=BOTH, zca=options.zca, fits=options.zca, wide=wide
    )

    def need(call: ExpertsCall) -> Need:
        numbers = [n for n in missing if n < call.num_experts]
        if not numbers:
            held = machine.processes_here * machine.held
            return Need(device=0, host=held, held=held, disk=())
        world, together = _processes(machine, call), call.experts_at_once
        gathered = 2 * world * together * expert if world > 1 else 0
        unfinished = min(world * together, len(numbers)) * expert
        written = experts_bytes(expert, numbers, per_file=options.save_interval) + unfinished
        return _need(
            machine,
            call,
            reading=reading,
            data=wide * size.float_bytes(size.train + size.test),
            work=wide * size.cohort_bytes(training, at_once=together),
            kept=together * expert + size.matrix_bytes * options.zca,
            writing=gathered,
            disk=[Disk(folder, written, "another --buffer_path"), *caches],
        )

    call = ExpertsCall(
        machine.processes_here, _on(plan.compiled), options.num_experts, plan.at_once
    )
    least = options.first_expert + machine.processes
    gentler: dict[str, Sequence[object]] = {
        "num_experts": [n for n in reversed(missing) if n >= least],
        "nproc_per_node": _fewer(machine),
        "compile": ["off"],
        "experts_at_once": _halvings(plan.at_once),
    }
    return Demand(call, need, gentler)


@dataclass(frozen=True)
class DistillCall(Call):
    max_experts: int
    load_all: bool
    eval_at_once: int
    micro_batch: int
    unroll: str
    save_it: int


def distillation_demand(
    options: DistillOptions,
    source: Source,
    count_work: Callable[[int], Work],
    plan: RunPlan,
    machine: Machine,
    *,
    experts: ExpertBuffer | None,
    run: RunDir,
    iteration: int = -1,
) -> Demand[DistillCall]:
    """Count what distilling from `iteration` (-1: from the start) to the end needs.

    `count_work` counts an outer step of one of several processes, with UserError where these cannot
    divide it. With --load_all the `experts` are still to be read into memory.
    """
    size, wide = DataSize.of(source), float_words(options.precision)
    matrix = size.matrix_bytes * options.zca
    splits = tuple(source.labels)
    # Only what is kept is widened, when the others are gone.
    reading, caches = read_bytes(
        source, splits, kept=splits, zca=options.zca, fits=options.zca, wide=1
    )
    number = 0 if experts is None else len(experts)
    epochs = 0 if experts is None else experts.epochs
    expert = expert_bytes(size.network(options.model), epochs=epochs)
    there = {tag for tag in (*LAST_TAGS, *BEST_TAGS) if run.distilled(tag).exists()}

    def need(call: DistillCall) -> Need:
        work = count_work(_processes(machine, call))
        loaded = call.max_experts * expert * call.load_all
        how = replace(
            plan,
            unroll=call.unroll,
            micro_batch=call.micro_batch,
            eval_at_once=call.eval_at_once,
        )
        kept_images = size.test + size.val + size.train * work.keeps_train
        saved = replace(options, save_it=call.save_it)
        written, replaced = run_bytes(saved, size, iteration=iteration, there=there)
        return _need(
            machine,
            call,
            reading=reading + loaded,
            data=wide * size.float_bytes(kept_images),
            work=wide * distilling_bytes(options, size, work, how, machine),
            kept=loaded + 2 * matrix,  # ZCA's inverse comes with the first picture
            writing=picture_bytes(size, options.ipc) + matrix,
            disk=[Disk(run.path, written + replaced, "another --save_path"), *caches],
        )

    def divides(processes: int) -> bool:
        try:
            count_work(processes)
        except UserError:
            return False
        return True

    call = DistillCall(
        machine.processes_here,
        _on(plan.compiled or (plan.eval_compiled and options.eval_it > 0)),
        max_experts=number,
        load_all=options.load_all,
        eval_at_once=plan.eval_at_once,
        micro_batch=plan.micro_batch,
        unroll=plan.unroll,
        save_it=options.sets_it,
    )
    rarer = [options.sets_it * factor for factor in (2, 5, 10)]
    gentler: dict[str, Sequence[object]] = {
        # A run that has begun must go on with as many experts.
        "max_experts": _halvings(number) if iteration < 0 else [],
        "nproc_per_node": [n for n in _fewer(machine) if divides(n)],
        "load_all": [False],
        "compile": ["off"],
        "eval_at_once": _halvings(plan.eval_at_once),
        "micro_batch": _halvings(plan.micro_batch),
        "unroll": ["adjoint"],
        "save_it": [n for n in rarer if 0 < n < options.Iteration] + [0],
    }
    return Demand(call, need, gentler)


@dataclass(frozen=True)
class EvalCall(Call):
    eval_at_once: int


def evaluation_demand(
    options: EvalOptions,
    source: Source,
    distilled: SyntheticSet,
    models: Sequence[str],
    machine: Machine,
    *,
    folder: Path,
    observer: ExpertFeatures | None = None,
) -> Demand[EvalCall]:
    """Count what training and testing `models` on `distilled` needs, and on the real images that
    flags add, which the `observer` may help to choose. The record lies in `folder`.
    """
    size, wide = DataSize.of(source), float_words(options.precision)
    images, normalisation = len(distilled.images), distilled.normalisation
    selections = len(options.selections)
    kept = BOTH if selections or options.full else BOTH[1:]
    reading, caches = read_bytes(
        source,
        BOTH if normalisation.needs_fit else kept,
        kept=kept,
        zca=normalisation.zca,
        fits=normalisation.needs_fit,
        wide=wide,
    )
    batch = options.batch_train or distilled.config["batch_train"]
    sets = [(images, options.epoch_eval_train)]
    if options.full:
        sets.append((size.train, options.epoch_full_train or options.epoch_eval_train))
    trainings = [
        Training(size.network(model), number, min(batch, number), epochs)
        for model in models
        for number, epochs in sets
    ]
    plans = [
        plan_training(
            training,
            machine.imagined(),
            networks=options.num_eval,
            compile=options.compile,
            at_once=options.eval_at_once,
        )
        for training in trainings
    ]
    on_device = images + size.test + (size.train if kept == BOTH else 0)
    if selections:  # once more for a checksum, for the training, or while the next are chosen
        on_device += 2 * options.num_eval * images
    choosing = 0
    if observer is not None:
        largest = int(source.labels["train"].bincount().max())
        cost = size.network(distilled.model)
        choosing = choosing_bytes(cost, size, features=observer.width, largest=largest)
    record = (1 + selections + options.full) * len(models) * EVALUATION_RECORD_BYTES

    def need(call: EvalCall) -> Need:
        training = max(
            size.cohort_bytes(each, at_once=min(call.eval_at_once, plan.at_once))
            for each, plan in zip(trainings, plans, strict=True)
        )
        return _need(
            machine,
            call,
            reading=reading,
            data=wide * size.float_bytes(on_device),
            work=wide * max(training, choosing),
            kept=size.matrix_bytes * normalisation.zca,
            disk=[Disk(folder, 2 * record, "a copy of the set on another disk"), *caches],
        )

    compiled = any(plan.compiled for plan in plans)
    at_once = max(plan.at_once for plan in plans)
    gentler: dict[str, Sequence[object]] = {
        "nproc_per_node": _fewer(machine),
        "compile": ["off"],
        "eval_at_once": _halvings(at_once),
    }
    return Demand(EvalCall(machine.processes_here, _on(compiled), at_once), need, gentler)


def _need(
    machine: Machine,
    call: Call,
    *,
    reading: int,
    data: int,
    work: int,
    kept: int,
    writing: int = 0,
    disk: Sequence[Disk],
) -> Need:
    """Add up the processes. Each takes `data` and at most `work` on the device, and of the host
    `kept` all the time, at most `reading` before the work, and the main one at most `writing` while
    it writes files.
    """
    device = device_bytes(data, work) if machine.is_gpu else 0
    if machine.is_gpu:
        data = work = 0
    beside = STARTED_BYTES + kept + data
    working = max(work, COMPILER_BYTES if call.compile == "on" else 0)
    other = max(reading, beside + working)
    main = max(reading, beside + max(working, writing))
    here = call.nproc_per_node
    return Need(
        device=device,
        host=here * machine.held + (here - 1) * other + main,
        held=machine.processes_here * machine.held,
        disk=tuple(disk),
    )


def device_bytes(data: int, work: int) -> int:
    """What a process takes on a GPU, its data and its work with the CUDA context."""
    return CONTEXT_BYTES + data + work


def distilling_bytes(
    options: DistillOptions, size: DataSize, work: Work, plan: RunPlan, machine: Machine
) -> int:
    """Memory of the images with all that belongs to them, and of an outer step or an evaluation,
    whichever is larger.
    """
    together = work.students if machine.is_gpu else 1
    step = work.kept_bytes + together * plan.micro_batch * work.image_bytes
    if plan.unroll == "autograd":
        step = work.graph_bytes or 0
    takes_turns = [step]
    if options.eval_it > 0:
        takes_turns += [
            size.cohort_bytes(training, at_once=plan.eval_at_once)
            for training in size.evaluation_trainings(options)
        ]
    return IMAGE_COPIES * size.float_bytes(size.classes * options.ipc) + max(takes_turns)


def choosing_bytes(cost: NetworkCost, size: DataSize, *, features: int, largest: int) -> int:
    """Memory of an expert that describes each training image by `features` numbers, or by logits
    and answers, and of a rule at work on the `largest` class.
    """
    tested = min(size.train, images_per_test_batch(size.image_size))
    looking = 2 * FLOAT_BYTES * cost.parameters + inference_bytes(cost, tested)
    kept = max(features, 2 * size.classes) * size.train
    return FLOAT_BYTES * kept + max(looking, RULE_COPIES * FLOAT_BYTES * features * largest)


def read_bytes(
    source: Source,
    read: Sequence[SplitName],
    *,
    kept: Sequence[SplitName],
    zca: bool,
    fits: bool,
    wide: int,
) -> tuple[int, list[Disk]]:
    """Host memory while the splits `read` are read and those `kept` normalised, and the caches that
    this writes.

    Pixels that are not from pictures lie in memory already. Where the whitening has to be fitted
    (`fits`) and is not kept from before, that takes more than all else.
    """
    size = DataSize.of(source)
    fits = fits and not (source.zca_cache and source.zca_cache.exists())
    # Images held out are decoded with the others.
    numbers = {"train": size.train + size.val, "val": size.val, "test": size.test}
    pixels = {split: size.values * numbers[split] for split in source.decoded if split in read}
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


def picture_bytes(size: DataSize, ipc: int) -> int:
    """Host memory while a sheet of all synthetic images is made."""
    enlarged = max(1, MIN_SIDE // size.image_size) ** 2
    return PICTURE_COPIES * enlarged * size.float_bytes(size.classes * ipc)


def experts_bytes(expert: int, numbers: Sequence[int], *, per_file: int) -> int:
    """Disk for the experts `numbers`, in order, of `expert` bytes each.

    A file is written with the last of its experts, or of all: those in it are then there twice.
    """
    last = len(numbers)
    written = [(i, n % per_file + 1) for i, n in enumerate(numbers, 1)]
    return expert * max(
        (i + in_file for i, in_file in written if in_file == per_file or i == last), default=0
    )


def run_bytes(
    options: DistillOptions,
    size: DataSize,
    *,
    iteration: int = -1,
    there: Iterable[str] = (),
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
    tags = {*LAST_TAGS, *(BEST_TAGS if options.eval_it > 0 else ())}.difference(there)
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


def float_words(precision: str | None) -> int:
    """How many float32 a number of images and parameters takes: 2 with fp64, else 1."""
    return storage_dtype(precision or "").itemsize // FLOAT_BYTES


def _processes(machine: Machine, call: Call) -> int:
    """All processes of `call`, on as many machines as now."""
    return machine.processes // machine.processes_here * call.nproc_per_node


def _fewer(machine: Machine) -> list[int]:
    """Numbers of processes that the call could be started with instead, on one machine."""
    alone = machine.processes == machine.processes_here
    return _halvings(machine.processes_here) if alone else []


def _halvings(count: int) -> list[int]:
    """Half of `count`, half of that, and so on down to 1."""
    return [count >> n for n in range(1, count.bit_length())]


def _on(compiled: bool) -> str:
    return "on" if compiled else "off"
