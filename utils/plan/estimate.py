"""What a call of a script will need, counted before the work: memory, disk and, roughly, time.

It follows from the options, the networks and what is there already; nothing is tried out.
docs/performance.md compares the estimates with peaks that were measured.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from utils.compute.cost import NetworkCost, expert_bytes, training_flop
from utils.core import ranks
from utils.core.progress import time_left
from utils.data.distilled import SyntheticSet
from utils.data.source import Source, SplitName
from utils.experts.buffer import ExpertBuffer
from utils.experts.features import Observer
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan.auto import choose_at_once, compiling_pays, expected_seconds
from utils.plan.footprint import (
    BEST_TAGS,
    BOTH,
    COMPILER_BYTES,
    EVALUATION_RECORD_BYTES,
    LAST_TAGS,
    STARTED_BYTES,
    DataSize,
    cache_bytes,
    choosing_bytes,
    cohort_bytes,
    distilling_bytes,
    experts_bytes,
    fits_zca,
    gpu_bytes,
    picture_bytes,
    reading_bytes,
    run_bytes,
    wideness,
)
from utils.plan.memory import held_bytes
from utils.plan.room import Demand, Disk, Need
from utils.plan.run_plan import RunPlan, evaluations_left
from utils.run.directory import RunDir


@dataclass(frozen=True)
class _Parts:
    """Bytes that one process takes. On the device that computes: `data` and, at the most, `work`.
    In the host's memory: `reading` at the most while the data are read, `kept` all the time, and in
    the main process `writing` at the most while files are written; and the compiler's, where
    something is `compiled`.
    """

    reading: int
    data: int
    work: int
    kept: int
    writing: int
    compiled: bool


@dataclass(frozen=True)
class _Here:
    """The processes of this call, all of them and those of this machine, each of which holds `held`
    bytes by now.
    """

    total: int
    processes: int
    held: int

    @classmethod
    def now(cls) -> "_Here":
        total = ranks.world()
        return cls(total, min(total, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), held_bytes())

    @property
    def all_held(self) -> int:
        """Bytes that the processes of this machine hold."""
        return self.processes * self.held

    def fewer(self) -> list[int]:
        """Numbers of processes that the call could be started with instead, on one machine."""
        return _halvings(self.processes) if self.total == self.processes else []

    def world(self, flags: Mapping[str, Any]) -> int:
        """All processes of a call with `flags`."""
        return flags.get("--nproc_per_node", self.total)


def experts_demand(
    options: BufferOptions,
    source: Source,
    device: torch.device,
    *,
    folder: Path,
    missing: Sequence[int],
    at_once: int,
    compiled: bool,
) -> Demand:
    """Of training the experts `missing` into `folder`, `at_once` of them in step a process; the
    training step may be compiled.
    """
    size, wide = DataSize.of(source), wideness(options.precision)
    cost, per_file = size.network(options.model), options.save_interval
    expert = expert_bytes(cost, epochs=options.train_epochs)
    batch = min(options.batch_train, size.train)
    fits = fits_zca(source, zca=options.zca)
    reading = reading_bytes(source, BOTH, kept=BOTH, zca=options.zca, fits=fits, wide=wide)
    caches = _caches(source, BOTH, fits=fits)
    here = _Here.now()

    def need(flags: Mapping[str, Any]) -> Need:
        together = flags.get("--experts_at_once", at_once)
        numbers = [n for n in missing if n < flags.get("--num_experts", options.num_experts)]
        if not numbers:
            return Need(device=0, host=here.all_held, held=here.all_held, disk=())
        world = here.world(flags)
        gathered = 2 * world * together * expert if world > 1 else 0
        parts = _Parts(
            reading=reading,
            data=wide * size.float_bytes(size.train + size.test),
            work=wide * cohort_bytes(cost, size, batch=batch, at_once=together),
            kept=together * expert + size.matrix_bytes * options.zca,
            writing=max(n % per_file for n in numbers) * expert + gathered,
            compiled=compiled and "--compile" not in flags,
        )
        unfinished = min(world * together, len(numbers)) * expert
        written = experts_bytes(expert, numbers, per_file=per_file) + unfinished
        disk = [Disk(folder, written, "another --buffer_path"), *caches]
        return _need(parts, device, here, flags, disk)

    least = options.first_expert + here.total
    flags: dict[str, Sequence[Any]] = {
        "--num_experts": [n for n in reversed(missing) if n >= least],
        "--nproc_per_node": here.fewer(),
        "--compile": ["off"] if compiled else [],
        "--experts_at_once": _halvings(at_once),
    }
    return Demand(need, flags)


def distillation_demand(
    options: DistillOptions,
    source: Source,
    how: RunPlan,
    device: torch.device,
    *,
    experts: ExpertBuffer,
    run: RunDir,
    iteration: int = -1,
) -> Demand:
    """Of distilling from `iteration`, -1 where the run has not begun, to the end.

    With --load_all the experts are still to be read into memory.
    """
    size, wide = DataSize.of(source), wideness(options.precision)
    expert = expert_bytes(size.network(options.model), epochs=experts.epochs)
    matrix = size.matrix_bytes * options.zca
    fits = fits_zca(source, zca=options.zca)
    # Only the others are widened, when the training images are gone.
    splits = tuple(source.labels)
    reading = reading_bytes(source, splits, kept=splits, zca=options.zca, fits=fits, wide=1)
    caches = _caches(source, BOTH, fits=fits)
    there = {tag for tag in (*LAST_TAGS, *BEST_TAGS) if run.distilled(tag).exists()}
    compiled = how.compiled or (how.eval_compiled and options.eval_it > 0)
    here = _Here.now()

    def need(flags: Mapping[str, Any]) -> Need:
        plan = replace(
            how,
            micro_batch=flags.get("--micro_batch", how.micro_batch),
            unroll=flags.get("--unroll", how.unroll),
            eval_at_once=flags.get("--eval_at_once", how.eval_at_once),
        )
        loads = options.load_all and "--load_all" not in flags
        loaded = flags.get("--max_experts", len(experts)) * expert * loads
        work = size.workload(options, world=here.world(flags))
        vectorised = device.type == "cuda"
        parts = _Parts(
            reading=reading + loaded,
            data=wide * size.float_bytes(size.test + size.val),
            work=wide * distilling_bytes(options, size, work, plan, vectorised=vectorised),
            kept=loaded + 2 * matrix,  # ZCA's inverse comes with the first picture
            writing=picture_bytes(size, options.ipc) + matrix,
            compiled=compiled and "--compile" not in flags,
        )
        saved = replace(options, save_it=flags.get("--save_it", options.save_it))
        written, replaced = run_bytes(saved, size, iteration=iteration, there=there)
        disk = [Disk(run.path, written + replaced, "another --save_path"), *caches]
        return _need(parts, device, here, flags, disk)

    flags: dict[str, Sequence[Any]] = {
        # A run that has begun must go on with as many experts.
        "--max_experts": _halvings(len(experts)) if iteration < 0 else [],
        "--nproc_per_node": [n for n in here.fewer() if options.trajectories % n == 0]
        if options.trajectories > 1
        else here.fewer(),
        "--load_all": ["false"] if options.load_all else [],
        "--compile": ["off"] if compiled else [],
        "--eval_at_once": _halvings(how.eval_at_once),
        "--micro_batch": _halvings(how.micro_batch),
        "--unroll": ["adjoint"] if how.unroll == "autograd" else [],
        "--save_it": _rarer(options),
    }
    return Demand(need, flags)


def evaluation_demand(
    options: EvalOptions,
    source: Source,
    distilled: SyntheticSet,
    models: Sequence[str],
    device: torch.device,
    *,
    folder: Path,
    observer: Observer | None = None,
) -> Demand:
    """Of training and testing `models` on `distilled` and, as asked for, on real images, which the
    `observer` may help to choose; recorded in `folder`. All processes must call it.
    """
    size, wide = DataSize.of(source), wideness(options.precision)
    images, normalisation = len(distilled.images), distilled.normalisation
    selections = len(options.selections)
    kept = BOTH if selections or options.full else BOTH[1:]
    read = BOTH if normalisation.needs_fit else kept
    fits = fits_zca(source, zca=normalisation.needs_fit)
    reading = reading_bytes(source, read, kept=kept, zca=normalisation.zca, fits=fits, wide=wide)
    caches = _caches(source, read, fits=fits)
    batch = min(
        options.batch_train or distilled.config["batch_train"],
        size.train if options.full else images,
    )
    costs = [size.network(model) for model in models]
    compiled = options.compile == "on" or (
        options.compile == "auto"
        and any(_compiling_pays(options, cost, device, images=images, size=size) for cost in costs)
    )
    at_once = [
        choose_at_once(options.eval_at_once, cost, device, batch=batch, networks=options.num_eval)
        for cost in costs
    ]
    on_device = images + size.test + (size.train if kept == BOTH else 0)
    if selections:  # once more for a checksum, for the training, or while the next are chosen
        on_device += 2 * options.num_eval * images
    choosing = 0
    if observer is not None:
        choosing = choosing_bytes(
            size.network(distilled.model),
            size,
            features=observer.width,
            largest=int(source.labels["train"].bincount().max()),
        )
    record = (1 + selections + options.full) * len(models) * EVALUATION_RECORD_BYTES
    here = _Here.now()

    def need(flags: Mapping[str, Any]) -> Need:
        most = flags.get("--eval_at_once", options.num_eval)
        training = [
            cohort_bytes(cost, size, batch=batch, at_once=min(most, number))
            for cost, number in zip(costs, at_once, strict=True)
        ]
        parts = _Parts(
            reading=reading,
            data=wide * size.float_bytes(on_device),
            work=wide * max(*training, choosing),
            kept=size.matrix_bytes * normalisation.zca,
            writing=0,
            compiled=compiled and "--compile" not in flags,
        )
        disk = [Disk(folder, 2 * record, "a copy of the set on another disk"), *caches]
        return _need(parts, device, here, flags, disk)

    flags: dict[str, Sequence[Any]] = {
        "--nproc_per_node": here.fewer(),
        "--compile": ["off"] if compiled else [],
        "--eval_at_once": _halvings(max(at_once)),
    }
    return Demand(need, flags)


def _compiling_pays(
    options: EvalOptions, cost: NetworkCost, device: torch.device, *, images: int, size: DataSize
) -> bool:
    """Whether training on some of the sets is compiled by auto."""
    work = [(images, options.epoch_eval_train)]
    if options.full:
        work.append((size.train, options.epoch_full_train or options.epoch_eval_train))
    networks = options.num_eval / ranks.world()
    flops = [networks * training_flop(cost, images=n, epochs=epochs) for n, epochs in work]
    return compiling_pays(max(flops), device, work="training", layers=cost.layers)


def _caches(source: Source, read: Sequence[SplitName], *, fits: bool) -> list[Disk]:
    """What is derived from the images and will be kept beside them."""
    if source.cache is None:
        return []
    return [Disk(source.cache.parent, cache_bytes(source, read, fits=fits))]


def _rarer(options: DistillOptions) -> list[int]:
    """Values of save_it that leave fewer sets."""
    every = options.sets_it
    if every == 0:
        return []
    return [every * factor for factor in (2, 5, 10) if every * factor < options.Iteration] + [0]


def _need(
    parts: _Parts,
    device: torch.device,
    here: _Here,
    flags: Mapping[str, Any],
    disk: Sequence[Disk],
) -> Need:
    on_gpu = device.type == "cuda"
    data, work = (0, 0) if on_gpu else (parts.data, parts.work)
    beside = STARTED_BYTES + parts.kept + data
    working = max(work, COMPILER_BYTES * parts.compiled)
    other = max(parts.reading, beside + working)
    main = max(parts.reading, beside + max(working, parts.writing))
    processes = flags.get("--nproc_per_node", here.processes)
    return Need(
        device=gpu_bytes(parts.data, parts.work) if on_gpu else 0,
        host=processes * here.held + (processes - 1) * other + main,
        held=here.all_held,
        disk=tuple(disk),
    )


def _halvings(count: int) -> list[int]:
    """Half of `count`, half of that, and so on down to 1."""
    return [count >> n for n in range(1, count.bit_length())]


def expected_experts_time(
    options: BufferOptions,
    source: Source,
    device: torch.device,
    *,
    missing: int,
    at_once: int,
    compiled: bool,
) -> str:
    """What training `missing` experts takes, roughly, by counted arithmetic: a line as `time_left`
    gives it from measured times.
    """
    size = DataSize.of(source)
    cost = size.network(options.model)
    training = training_flop(cost, images=size.train, epochs=1, flat=options.flat)
    flop = training + size.test * cost.flop
    epoch = expected_seconds(at_once * flop, device, work="training", compiled=compiled)
    rounds = -(-missing // (at_once * ranks.world()))
    return time_left([epoch], rounds * options.train_epochs, unit="epoch")


def expected_distillation_time(
    options: DistillOptions,
    source: Source,
    how: RunPlan,
    device: torch.device,
    *,
    iteration: int = -1,
    evaluated: int = -1,
) -> str:
    """The same of distilling from `iteration` to the end, the last evaluation being of `evaluated`;
    -1 where there was none.
    """
    size, world = DataSize.of(source), ranks.world()
    work = size.workload(options, world=world)
    step = expected_seconds(work.step_flop, device, work="outer steps", compiled=how.compiled)
    testing = (
        options.num_eval * (size.test + size.val) * sum(cost.flop for cost in work.evaluation_costs)
    )
    evaluation = expected_seconds(
        2 * (work.evaluation_flop + testing) / world,  # raw and EMA
        device,
        work="training",
        compiled=how.eval_compiled,
    )
    return time_left(
        [step],
        options.Iteration - max(iteration, 0),
        evaluations=evaluations_left(options, evaluated),
        evaluation_seconds=evaluation,
    )
