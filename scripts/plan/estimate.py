"""What a cell of the plan takes on one GPU: time, memory, disk. Estimates, not measurements.

Time is arithmetic over a sustained rate, but at least the number of steps times the shortest step,
since launching kernels bounds the small sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from networks import CROSS_ARCHITECTURE
from utils.compute.cost import NetworkCost, expert_bytes, training_flop
from utils.options import BufferOptions, DistillOptions, EvalOptions, EvaluationOptions
from utils.plan.auto import CUDA_RATE, WORKING_SET, micro_batch_within, networks_within
from utils.plan.footprint import DataSize, cohort_bytes, distilling_bytes, gpu_bytes, run_bytes
from utils.plan.run_plan import RunPlan, evaluations_left

# From what is published for an A100 of 80 GB: ATT takes 0.8 s for an outer step of CIFAR10 at IPC
# 1, 80 student steps on 10 images; a training step is a third of a student's, there and back.
# CUDA_RATE agrees with MTT's 1.92 s for CIFAR100 at IPC 10, 20 steps on 1,000 images, 2e13 FLOP.
STUDENT_STEP_SECONDS = 0.01
TRAINING_STEP_SECONDS = 0.003
ASSUMPTIONS = (
    f"estimates for a GPU as an A100: {CUDA_RATE / 1e12:.0f} TFLOP/s sustained, at least "
    f"{1e3 * STUDENT_STEP_SECONDS:.0f} ms a student step and {1e3 * TRAINING_STEP_SECONDS:.0f} ms "
    "a training step, as published for eager code; every student takes all N_S steps"
)


@dataclass(frozen=True)
class Estimate:
    """GPU hours, and gigabytes of 1e9 bytes: the most memory on a GPU, disk for what is kept."""

    hours: float
    memory: float
    disk: float


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
    size = replace(DATA_SIZES[options.dataset], image_size=res)
    cost, epochs = size.network(options.model), options.train_epochs
    batch = min(options.batch_train, size.train)
    seconds = options.num_experts * (
        _training_seconds(cost, images=size.train, batch=batch, epochs=epochs, flat=options.flat)
        + epochs * _test_seconds(cost, size.test)
    )
    at_once = _at_once(options.experts_at_once, cost, batch=batch, networks=options.num_experts)
    return Estimate(
        seconds / 3600,
        gpu_bytes(
            size.float_bytes(size.train + size.test),
            cohort_bytes(cost, size, batch=batch, at_once=at_once),
        )
        / 1e9,
        options.num_experts * expert_bytes(cost, epochs=epochs) / 1e9,
    )


def row_estimate(distill: DistillOptions, evaluation: EvalOptions, *, res: int) -> Estimate:
    """Of distilling at the full length and evaluating the result, raw and EMA, beside random real
    images.
    """
    size = replace(DATA_SIZES[distill.dataset], image_size=res)
    images, work = size.classes * distill.ipc, size.workload(distill)
    batch = min(distill.batch_train, images)
    step = max(work.step_flop / CUDA_RATE, distill.syn_steps * STUDENT_STEP_SECONDS)
    seconds = distill.Iteration * step
    own = CROSS_ARCHITECTURE if evaluation.eval_mode == "M" else [distill.model]
    for options, models, times in (
        (distill, distill.evaluation_models, 2 * evaluations_left(distill)),  # raw and EMA
        (evaluation, evaluation.model or own, 3),  # raw, EMA and random
    ):
        costs = [size.network(model) for model in models]
        seconds += times * _evaluation_seconds(
            costs, options, images=images, batch=batch, tested=size.test
        )
    largest = max(work.evaluation_costs, key=lambda cost: cost.activation_bytes)
    how = RunPlan(
        compiled=True,
        unroll="autograd" if distill.unroll == "autograd" else "adjoint",
        micro_batch=distill.micro_batch
        or micro_batch_within(
            WORKING_SET["cuda"], work.cost, batch=work.batch, students=work.students
        ),
        eval_compiled=True,
        eval_at_once=_at_once(
            distill.eval_at_once, largest, batch=batch, networks=distill.num_eval
        ),
    )
    evaluating = [
        cohort_bytes(
            cost,
            size,
            batch=batch,
            at_once=_at_once(
                evaluation.eval_at_once, cost, batch=batch, networks=evaluation.num_eval
            ),
        )
        for cost in costs
    ]
    distilling = distilling_bytes(distill, size, work, how, vectorised=True)
    written, _ = run_bytes(distill, size)
    return Estimate(
        seconds / 3600,
        gpu_bytes(size.float_bytes(size.test), max(distilling, *evaluating)) / 1e9,
        written / 1e9,
    )


def _at_once(asked: int | None, cost: NetworkCost, *, batch: int, networks: int) -> int:
    """How many networks a GPU with room for the whole working set trains in step."""
    return min(networks, asked or networks_within(WORKING_SET["cuda"], cost, batch=batch))


def _evaluation_seconds(
    costs: Sequence[NetworkCost],
    options: EvaluationOptions,
    *,
    images: int,
    batch: int,
    tested: int,
) -> float:
    """Of training `options.num_eval` of each of the networks on one set and testing them."""
    seconds = sum(
        _training_seconds(cost, images=images, batch=batch, epochs=options.epoch_eval_train)
        + _test_seconds(cost, tested)
        for cost in costs
    )
    return options.num_eval * seconds


def _training_seconds(
    cost: NetworkCost, *, images: int, batch: int, epochs: int, flat: bool = False
) -> float:
    arithmetic = training_flop(cost, images=images, epochs=epochs, flat=flat) / CUDA_RATE
    step = TRAINING_STEP_SECONDS * (1 + flat)
    return max(arithmetic, epochs * math.ceil(images / batch) * step)


def _test_seconds(cost: NetworkCost, images: int) -> float:
    return images * cost.flop / CUDA_RATE
