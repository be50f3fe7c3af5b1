"""What a cell of the plan takes on one GPU: time, memory, disk. Estimates, not measurements.

Time is arithmetic over a sustained rate, but at least the number of steps times the shortest step,
since launching kernels bounds the small sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from networks import CROSS_ARCHITECTURE
from utils.auto import CUDA_RATE, WORKING_SET
from utils.cost import (
    FLOAT_BYTES,
    NetworkCost,
    adjoint_bytes,
    expert_bytes,
    network_cost,
    outer_step_flop,
    pieces_within,
    training_flop,
)
from utils.options import BufferOptions, DistillOptions, EvalOptions, EvaluationOptions
from utils.training import images_per_test_batch

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

CONTEXT_BYTES = 1e9  # CUDA context and the libraries' workspaces
# In units of a forward pass's activations.
TRAINING_COPIES, TEST_COPIES = 2, 0.5
STEP_RECORD_BYTES = 160  # a line of metrics.jsonl


@dataclass(frozen=True)
class Estimate:
    """GPU hours, and gigabytes of 1e9 bytes: the most memory on a GPU, disk for what is kept."""

    hours: float
    memory: float
    disk: float


@dataclass(frozen=True)
class DataSize:
    """How many images of what kind a data set has; ImageNet's are those of a typical subset."""

    channels: int
    classes: int
    train: int
    test: int


DATA_SIZES = {
    "digits": DataSize(1, 10, 1437, 360),
    "CIFAR10": DataSize(3, 10, 50_000, 10_000),
    "CIFAR100": DataSize(3, 100, 50_000, 10_000),
    "Tiny": DataSize(3, 200, 100_000, 10_000),
    "ImageNet": DataSize(3, 10, 13_000, 500),
}


def experts_estimate(options: BufferOptions, *, res: int) -> Estimate:
    """Of training and keeping all experts."""
    data, cost = DATA_SIZES[options.dataset], _cost(options.dataset, options.model, res)
    epochs, batch = options.train_epochs, min(options.batch_train, data.train)
    seconds = options.num_experts * (
        _training_seconds(cost, images=data.train, batch=batch, epochs=epochs)
        + epochs * _test_seconds(cost, data.test)
    )
    return Estimate(
        seconds / 3600,
        _memory(
            data,
            data.train + data.test,
            res,
            _training_bytes(
                cost, batch, networks=options.num_experts, at_once=options.experts_at_once, res=res
            ),
        ),
        options.num_experts * expert_bytes(cost, epochs=epochs) / 1e9,
    )


def row_estimate(distill: DistillOptions, evaluation: EvalOptions, *, res: int) -> Estimate:
    """Of distilling at the full length and evaluating the result beside random real images."""
    data, cost = DATA_SIZES[distill.dataset], _cost(distill.dataset, distill.model, res)
    images = data.classes * distill.ipc
    batch = min(distill.batch_syn or images, images)
    flop = outer_step_flop(cost, syn_steps=distill.syn_steps, batch=batch * distill.trajectories)
    step = max(flop / CUDA_RATE, distill.syn_steps * STUDENT_STEP_SECONDS)
    seconds = distill.Iteration * step
    for options, times in (
        (distill, 2 * _evaluations(distill)),  # raw and EMA
        (evaluation, 2),  # distilled and random
    ):
        models = _models(options, distill.model)
        seconds += times * _evaluation_seconds(
            distill.dataset, models, options, images=images, batch=distill.batch_train, res=res
        )
    students = distill.trajectories
    piece = distill.micro_batch or pieces_within(
        batch, WORKING_SET["cuda"] // adjoint_bytes(cost, students)
    )
    student = adjoint_bytes(cost, students * min(piece, batch))
    student += students * FLOAT_BYTES * cost.parameters * (distill.syn_steps + 1)
    evaluating = [
        _training_bytes(
            _cost(distill.dataset, model, res),
            min(distill.batch_train, images),
            networks=evaluation.num_eval,
            at_once=evaluation.eval_at_once,
            res=res,
        )
        for model in _models(evaluation, distill.model)
    ]
    return Estimate(
        seconds / 3600,
        _memory(data, data.test, res, max(student, *evaluating)),
        _run_bytes(distill, values=data.channels * res**2, images=images) / 1e9,
    )


def _models(options: EvaluationOptions, own: str) -> Sequence[str]:
    return CROSS_ARCHITECTURE if options.eval_mode == "M" else [own]


def _evaluation_seconds(
    dataset: str,
    models: Sequence[str],
    options: EvaluationOptions,
    *,
    images: int,
    batch: int,
    res: int,
) -> float:
    """Of training `options.num_eval` of each of the models on one set and testing them."""
    seconds = 0.0
    for cost in (_cost(dataset, model, res) for model in models):
        seconds += _training_seconds(
            cost, images=images, batch=batch, epochs=options.epoch_eval_train
        )
        seconds += _test_seconds(cost, DATA_SIZES[dataset].test)
    return options.num_eval * seconds


def _run_bytes(options: DistillOptions, *, values: int, images: int) -> float:
    """Disk of a run directory for `images` images of `values` numbers: the sets (a picture has a
    byte a number), the whitening in four of them, the checkpoint of about four sets, and the log.
    """
    save_it = options.eval_it if options.save_it is None else options.save_it
    sets = (options.Iteration // save_it + 1 if save_it else 1) + 4
    whitening = 4 * FLOAT_BYTES * values**2 if options.zca else 0
    pixels = images * values * (sets * (FLOAT_BYTES + 1) + 4 * FLOAT_BYTES)
    return pixels + whitening + options.Iteration * STEP_RECORD_BYTES


def _evaluations(options: DistillOptions) -> int:
    """At the start, every eval_it steps, at the end."""
    return math.ceil(options.Iteration / options.eval_it) + 1 if options.eval_it else 0


def _training_seconds(cost: NetworkCost, *, images: int, batch: int, epochs: int) -> float:
    arithmetic = training_flop(cost, images=images, epochs=epochs) / CUDA_RATE
    return max(arithmetic, epochs * math.ceil(images / batch) * TRAINING_STEP_SECONDS)


def _test_seconds(cost: NetworkCost, images: int) -> float:
    return images * cost.flop / CUDA_RATE


def _training_bytes(
    cost: NetworkCost, batch: int, *, networks: int, at_once: int | None, res: int
) -> float:
    """Of training `at_once` of the networks in step, by default as many as the working set holds,
    each on `batch` images, and of testing them.
    """
    one = TRAINING_COPIES * batch * cost.activation_bytes
    chosen = min(networks, at_once or max(1, WORKING_SET["cuda"] // one))
    testing = TEST_COPIES * images_per_test_batch(res) * cost.activation_bytes
    return max(chosen * one, testing)


def _memory(data: DataSize, images: int, res: int, working: float) -> float:
    """GB with `images` images of the data set on the GPU."""
    held = images * data.channels * res**2 * FLOAT_BYTES
    return (CONTEXT_BYTES + held + working) / 1e9


@cache
def _cost(dataset: str, model: str, res: int) -> NetworkCost:
    data = DATA_SIZES[dataset]
    return network_cost(model, channels=data.channels, num_classes=data.classes, image_size=res)
