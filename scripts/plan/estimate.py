"""What a cell of the plan takes on one A100 (time, memory, disk), as the scripts estimate it."""

from dataclasses import dataclass, replace

from networks import CROSS_ARCHITECTURE
from utils.compute.cost import Training, expert_bytes
from utils.methods.trajectory.work import count_work
from utils.options import BufferOptions, DistillOptions, EvalOptions
from utils.plan.choose import plan_run, plan_training
from utils.plan.machine import A100
from utils.plan.need import (
    Time,
    device_bytes,
    distillation_time,
    distilling_bytes,
    experts_time,
    run_bytes,
)
from utils.plan.sizes import DataSize

ASSUMPTIONS = (
    f"estimates for a GPU as an A100, guessed and not measured: {A100.speed.rate / 1e12:.0f} "
    f"TFLOP/s sustained and {1e3 * A100.speed.step_seconds:.1f} ms a gradient, half of that "
    "compiled; every student takes all N_S steps"
)
EVALUATED_SETS = 3  # by eval.py: raw, EMA and random


@dataclass(frozen=True)
class Estimate:
    """GPU hours, and gigabytes of 1e9 bytes: the most memory on a GPU, disk for what is kept."""

    hours: float
    memory: float
    disk: float

    @classmethod
    def of(cls, *, seconds: float, memory: int, disk: int) -> "Estimate":
        return cls(seconds / 3600, memory / 1e9, disk / 1e9)


# At their own resolution; ImageNet's are those of a typical subset.
DATA_SIZES = {
    "digits": DataSize(1, 10, 8, train=1437, test=360),
    "CIFAR10": DataSize(3, 10, 32, train=50_000, test=10_000),
    "CIFAR100": DataSize(3, 100, 32, train=50_000, test=10_000),
    "Tiny": DataSize(3, 200, 64, train=100_000, test=10_000),
    "ImageNet": DataSize(3, 10, 128, train=13_000, test=500),
}


def experts_estimate(options: BufferOptions, *, res: int) -> Estimate:
    """Of training and keeping all experts."""
    size, number = replace(DATA_SIZES[options.dataset], image_size=res), options.num_experts
    training = size.experts_training(options)
    plan = plan_training(
        training,
        A100,
        networks=number,
        compile=options.compile,
        at_once=options.experts_at_once,
    )
    work = size.cohort_bytes(training, at_once=plan.at_once)
    return Estimate.of(
        seconds=experts_time(options, size, plan, A100, missing=number).total,
        memory=device_bytes(size.float_bytes(size.train + size.test), work),
        disk=number * expert_bytes(training.cost, epochs=options.train_epochs),
    )


def row_estimate(distill: DistillOptions, evaluation: EvalOptions, *, res: int) -> Estimate:
    """Of distilling and evaluating the result, raw and EMA, beside random real images."""
    size = replace(DATA_SIZES[distill.dataset], image_size=res)
    time, memory = distillation_estimate(distill, size)
    own = CROSS_ARCHITECTURE if evaluation.eval_mode == "M" else [distill.model]
    seconds = time.total
    for model in evaluation.model or own:
        images = size.classes * distill.ipc
        batch = min(distill.batch_train, images)
        training = Training(size.network(model), images, batch, evaluation.epoch_eval_train)
        plan = plan_training(
            training,
            A100,
            networks=evaluation.num_eval,
            compile=evaluation.compile,
            at_once=evaluation.eval_at_once,
        )
        seconds += EVALUATED_SETS * A100.training_seconds(
            training,
            networks=evaluation.num_eval,
            at_once=plan.at_once,
            tested=size.test,
            compiled=plan.compiled,
        )
        work = size.cohort_bytes(training, at_once=plan.at_once)
        memory = max(memory, device_bytes(size.float_bytes(size.test), work))
    written, _ = run_bytes(distill, size)
    return Estimate.of(seconds=seconds, memory=memory, disk=written)


def distillation_estimate(options: DistillOptions, size: DataSize) -> tuple[Time, int]:
    """Time of distill_att.py alone, and bytes of the GPU's memory."""
    work = count_work(options, size.network(options.model), classes=size.classes)
    plan = plan_run(options, size, work, A100, recorded={})
    memory = distilling_bytes(options, size, work, plan, A100)
    time = distillation_time(options, size, work, plan, A100)
    return time, device_bytes(size.float_bytes(size.test), memory)
